"""An object store that is overloaded, cut off or away for a while: behind a proxy with faults."""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from rekindle.data.errors import InputError
from rekindle.data.storage import client, patience
from rekindle.data.storage.client import Client
from rekindle.data.storage.patience import Patience, is_transient
from rekindle.data.storage.store import open_store
from testlib.servers.faulty_s3 import Faulty, faulty_server


@pytest.fixture
def faulty(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    with faulty_server(monkeypatch) as server:
        yield server


FAULTS = ["503", "500", "drop", "unheard"]
CONTENT = bytes(range(256)) * 2000


@pytest.mark.parametrize("fault", [*FAULTS, "cut", "slow"])
def test_reading_outlasts_faults(s3, faulty, tmp_path, fault):
    store = open_store(f"{s3}/reading-{fault}")
    store.replace("f/a", CONTENT)
    faulty.faults = [fault] * 4
    assert store.read_bytes("f/a") == CONTENT
    assert not faulty.faults or fault == "slow"  # which asks nothing again
    faulty.faults = [fault] * 4
    digest, regions = hashlib.sha256(CONTENT).hexdigest(), [(0, len(CONTENT), "")]
    copied = store.open_bytes("f/a", len(CONTENT), digest, regions)
    assert bytes(copied.region(0, len(CONTENT))) == CONTENT
    assert not faulty.faults or fault == "slow"  # which asks nothing again
    assert {path.name for path in copied.path.parent.iterdir()} == {"a"}
    if fault not in ("cut", "slow"):
        faulty.faults = [fault] * 4
        assert store.names("f") == ["a"]


def test_a_download_of_many_blocks_is_whole_and_in_order(s3, faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "BLOCK_BYTES", 10_001)
    store = open_store(f"{s3}/blocks")
    for length in (0, 1, 10_001, 4 * 10_001, len(CONTENT)):
        content = CONTENT[:length]
        store.replace("a", content)
        faulty.faults = ["", "cut", "drop"] * 2
        store.download("a", tmp_path / str(length))
        assert (tmp_path / str(length)).read_bytes() == content


@pytest.mark.parametrize("fault", FAULTS)
def test_writing_outlasts_faults_and_creates_once(s3, faulty, fault):
    """Also where a put was made and its answer lost: what is there is then what was written."""
    store = open_store(f"{s3}/writing-{fault}")
    assert store.names("commits") == []
    faulty.faults = [fault] * 4
    store.create("commits/0.json", b"ours")
    assert not store.create("commits/0.json", b"another")
    assert store.read_bytes("commits/0.json") == b"ours"
    store.begin("data/0.arrow").write_bytes(CONTENT)
    faulty.faults = [fault] * 4
    store.finish("data/0.arrow")
    assert store.read_bytes("data/0.arrow") == CONTENT


def test_a_server_that_is_away_is_waited_for_and_that_is_said_once(s3, faulty, caplog):
    """One that answered before: whoever mistyped an address is told in seconds."""
    store = open_store(f"{s3}/away")
    store.replace("a", b"there")
    faulty.faults = ["drop"] * 10_000
    threading.Timer(1.0, faulty.faults.clear).start()
    with caplog.at_level(logging.WARNING, "rekindle"):
        began = time.monotonic()
        assert store.read_bytes("a") == b"there"
    assert time.monotonic() - began > 0.9
    told = [record.getMessage() for record in caplog.records if "asked again" in record.msg]
    assert len(told) == 1
    assert told[0].startswith(f"{s3}/away is overloaded or away (")


def test_patience_ends(s3, faulty, monkeypatch):
    store = open_store(f"{s3}/gone")
    faulty.faults = ["503"] * 10_000
    monkeypatch.setattr(patience, "FIRST_PATIENCE", 0.2)
    with pytest.raises(InputError, match="cannot reach s3://bucket/gone/a"):
        store.read_bytes("a")
    faulty.faults = []
    store.replace("a", b"")
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    faulty.faults = ["drop"] * 10_000
    with pytest.raises(InputError, match="cannot reach s3://bucket/gone/a"):
        store.read_bytes("a")


def test_patience_with_one_put_ends_once(s3, faulty, monkeypatch, caplog):
    """An overloaded server is no other writer that was met on the way."""
    store = open_store(f"{s3}/overloaded")
    store.replace("a", b"")
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    faulty.faults = ["503"] * 10_000
    with pytest.raises(InputError, match=r"cannot reach s3://bucket/overloaded/commits/0.json"):
        store.create("commits/0.json", b"ours")
    assert sum("asked again" in record.msg for record in caplog.records) == 1


def test_an_error_waits_for_no_other_object(s3, monkeypatch):
    """Nor does Ctrl-C: others may be patient for minutes."""
    store, read = open_store(f"{s3}/many"), list[str]()
    begun, ended = threading.Event(), threading.Event()

    def read_bytes(name: str) -> bytes:
        if name == "away":
            begun.set()
            ended.wait(5)
            read.append(name)
        begun.wait(5)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "read_bytes", read_bytes)
    with pytest.raises(KeyboardInterrupt):
        store.read_many(["told to end", "away"])
    assert not read
    ended.set()


def test_what_a_server_answers_is_not_asked_again(s3, faulty):
    store = open_store(f"{s3}/answers")
    store.names("f")
    before = faulty.seen
    with pytest.raises(FileNotFoundError):
        store.read_bytes("nothing")
    assert faulty.seen - before <= 3


def test_delays_grow_and_are_of_random_length(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    asked = Patience("s3://x")
    asked.answered = True
    tries = iter([ConnectionResetError()] * 10)

    def call() -> str:
        for error in tries:
            raise error
        return "there"

    assert asked.retry(call) == "there"
    longest = [min(patience.FIRST_DELAY * 2**n, patience.LONGEST_DELAY) for n in range(10)]
    assert all(most / 2 <= delay <= most for delay, most in zip(slept, longest, strict=True))
    assert len({*slept}) == 10


class NoCredentialsError(Exception):
    pass


class HttpError(Exception):
    """As gcsfs raises it, which has not the errors of S3's clients."""

    def __init__(self, code: int):
        self.code = code


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (FileNotFoundError(), False),
        (PermissionError("403"), False),
        (NoCredentialsError(), False),
        (ValueError("bad bucket"), False),
        *((HttpError(code), True) for code in (408, 429, 500, 503)),
        *((HttpError(code), False) for code in (400, 401, 403, 412)),
    ],
)
def test_what_passes_by_itself(error: Exception, passing: bool) -> None:
    assert is_transient(error) is passing
    outer = OSError("translated")
    outer.__cause__ = error
    assert is_transient(outer) is passing


def test_a_client_that_would_wait_for_ever_has_a_limit(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "fsspec.core.url_to_fs", lambda url, **how: (asked.setdefault(url, how), url)
    )
    for url in ("gs://bucket/a", "s3://bucket/a"):
        Client(url)
    assert asked == {"gs://bucket/a": {"requests_timeout": 300.0}, "s3://bucket/a": {}}
