"""Stores: exclusive creation under races, no leftovers, names that stay inside; an S3 server."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.storage.base import safe_name
from rekindle.data.storage.object_store import CONFLICT_DELAYS, ObjectStore
from rekindle.data.storage.store import LocalStore, open_store

# --- a local folder -------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path):
    return LocalStore(tmp_path / "cache")


def files(root):
    return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())


def test_create_writes_once(local):
    assert local.create("a/b.json", b"first")
    assert not local.create("a/b.json", b"second")
    assert local.read_bytes("a/b.json") == b"first"
    assert files(local.root) == ["a/b.json"]


def test_create_is_exclusive_among_threads(local):
    """In each of many races one thread wins, and what it wrote is there whole."""
    gate = threading.Barrier(16)

    def race(number):
        won = []
        for round_ in range(25):
            gate.wait()
            if local.create(f"commits/{round_}.json", bytes([number]) * 5000):
                won.append(round_)
        return won

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(race, range(16)))
    assert sorted(round_ for won in results for round_ in won) == list(range(25))
    for number, won in enumerate(results):
        for round_ in won:
            assert local.read_bytes(f"commits/{round_}.json") == bytes([number]) * 5000
    assert len(files(local.root)) == 25  # no temporary is left


RACER = """
import json
import sys
from pathlib import Path
from rekindle.data.storage.store import LocalStore
root, number = sys.argv[1:]
store = LocalStore(Path(root))
print("ready", flush=True)
sys.stdin.readline()
won = [n for n in range(40) if store.create(f"commits/{n}.json", number.encode() * 3000)]
print(json.dumps(won))
"""


def test_create_is_exclusive_among_processes(local):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(local.root), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = [json.loads(racer.communicate()[0]) for racer in racers]
    assert sorted(n for won in wins for n in won) == list(range(40))
    for number, won in enumerate(wins):
        for n in won:
            assert local.read_bytes(f"commits/{n}.json") == str(number).encode() * 3000
    assert len(files(local.root)) == 40


def test_replace_writes_whole_and_leaves_no_temporary(local):
    local.replace("cache.json", b"1")
    local.replace("cache.json", b"22")
    assert local.read_bytes("cache.json") == b"22"
    assert files(local.root) == ["cache.json"]


def test_a_failing_disk_leaves_no_temporary(local, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (local.create, local.replace):
        with pytest.raises(
            InputError, match=r"cannot write .*No space.*What is there already stays"
        ):
            write("commits/0.json", b"x" * 1000)
    assert files(local.root) == []


def test_a_file_system_without_hard_links_is_told_as_such(local, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(InputError, match="no hard links"):
        local.create("commits/0.json", b"x")
    assert files(local.root) == []


def test_listings(local):
    assert local.names("commits") == local.folders("commits") == []
    for name in ("commits/1.json", "commits/0.json", "commits/.0.json.1234.tmp", "commits/sub/x"):
        path = local.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert local.names("commits") == [
        "0.json",
        "1.json",
    ]  # what a killed process left is not listed
    assert local.folders("commits") == ["sub"]


def test_a_data_object_is_begun_finished_and_read(local):
    path = local.begin("data/a.arrow")
    path.write_bytes(b"123")
    local.finish("data/a.arrow")
    assert bytes_in(local, "data/a.arrow", b"123") == b"123"
    local.discard("data/a.arrow")
    local.discard("data/a.arrow")  # not an error
    with pytest.raises(FileNotFoundError):
        bytes_in(local, "data/a.arrow", b"123")
    with pytest.raises(FileNotFoundError):
        local.read_bytes("data/a.arrow")


LEAVING = ["/etc/passwd", "../x", "a/../../x", "a/..", "..", "", ".", "a\\..\\x", "a\0b"]


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_leave_the_root_are_refused(local, name):
    with pytest.raises(CacheFormatError, match="leaves the cache's folder"):
        safe_name(name)
    for use in (local.read_bytes, local.names, local.folders, local.begin, local.discard):
        with pytest.raises(CacheFormatError):
            use(name)
    for use in (local.create, local.replace):
        with pytest.raises(CacheFormatError):
            use(name, b"")


@pytest.mark.parametrize(
    "name", ["a", "a/b.json", "a/..b", "a...json", "corpus/data/00000-x.arrow"]
)
def test_names_that_stay_inside(name):
    assert safe_name(name) == name


def test_json_that_is_none(local):
    local.create("cache.json", b"{oops")
    with pytest.raises(CacheFormatError, match="not valid JSON"):
        local.read_json("cache.json")
    local.create("other.json", b"\xff\xfe{")
    with pytest.raises(CacheFormatError, match="not valid JSON"):
        local.read_json("other.json")


def test_open_store(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/cache").root == tmp_path / "cache"
    assert open_store(f"file://{tmp_path}/cache").root == tmp_path / "cache"
    assert open_store(tmp_path).root == tmp_path
    with pytest.raises(InputError, match=r"foo://x/y.*pip install -e '\.\[s3\]'"):
        open_store("foo://x/y")


def bytes_in(store, name: str, content: bytes) -> bytes:
    """A data object's bytes, of which ``content`` was committed."""
    regions = [(0, len(content), "")]
    found = store.open_bytes(name, len(content), hashlib.sha256(content).hexdigest(), regions)
    return bytes(found.region(0, len(content)))


# --- object stores --------------------------------------------------------------------------------


@pytest.fixture
def memory():
    """fsspec's in-memory file system, emptied afterwards."""
    import fsspec

    store = ObjectStore("memory://bucket/run")
    yield store
    fsspec.filesystem("memory").store.clear()


def test_a_conflict_of_two_puts_is_asked_again(memory, monkeypatch):
    """S3 answers 409 when two conditional puts meet; whoever gets it has not won yet."""
    answers = [OSError(errno.EBUSY, "ConditionalRequestConflict")] * 2
    put = memory.fs.pipe_file

    def pipe_file(*args, **options):
        if answers:
            raise answers.pop()
        return put(*args, **options)

    monkeypatch.setattr(memory.fs, "pipe_file", pipe_file)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert memory.create("commits/0.json", b"x")
    assert not memory.create("commits/0.json", b"y")
    answers += [OSError(errno.EBUSY, "ConditionalRequestConflict")] * (len(CONFLICT_DELAYS) + 1)
    with pytest.raises(InputError, match=r"cannot reach memory://bucket/run/commits/1\.json"):
        memory.create("commits/1.json", b"x")


def test_a_store_without_conditional_puts_is_only_read(tmp_path, memory, monkeypatch):
    """By its kind, and by what its server does: some take no notice of the condition."""
    store = ObjectStore(f"local://{tmp_path}")
    (tmp_path / "a").write_bytes(b"1")
    assert store.read_bytes("a") == b"1"
    with pytest.raises(InputError, match=r"can be read, not written to.*s3:// or gs://"):
        store.create("b", b"1")
    put = memory.fs.pipe_file
    monkeypatch.setattr(memory.fs, "pipe_file", lambda path, value, mode: put(path, value))
    with pytest.raises(InputError, match="overwrites objects that must not be"):
        memory.create("b", b"1")


def test_errors_of_the_client_become_one_message(memory, monkeypatch):
    class NoCredentialsError(Exception):
        pass

    def fail(*args, **options):
        raise NoCredentialsError("Unable to locate credentials")

    for method in ("cat_file", "ls", "pipe_file", "put_file", "rm_file", "info"):
        monkeypatch.setattr(memory.fs, method, fail)
    memory.begin("data/x").write_bytes(b"")
    uses = [
        lambda: memory.read_bytes("a"),
        lambda: memory.names("a"),
        lambda: memory.create("a", b""),
        lambda: memory.replace("a", b""),
        lambda: memory.finish("data/x"),
        lambda: memory.discard("a"),
        lambda: bytes_in(memory, "a", b""),
    ]
    for use in uses:
        with pytest.raises(InputError, match=r"cannot reach.*Unable to locate credentials"):
            use()


def test_many_objects_are_read_in_the_order_asked_for(memory, local):
    for store in (memory, local):
        for number in range(100):
            store.replace(f"commits/{number}.json", str(number).encode())
        names = [f"commits/{number}.json" for number in (7, 99, 0, 7, *range(100))]
        assert store.read_many(names) == [n[8:-5].encode() for n in names]
        assert store.read_many([]) == []
        with pytest.raises(FileNotFoundError):
            store.read_many(["commits/1.json", "commits/none.json"])


def test_an_uploaded_object_does_not_stay_on_the_local_disk(memory):
    """A teacher's targets may be larger than the disk of the machine that makes them."""
    path = memory.begin("data/a.arrow")
    path.write_bytes(b"123")
    memory.finish("data/a.arrow")
    assert not path.exists()
    assert bytes_in(memory, "data/a.arrow", b"123") == b"123"


def test_the_local_copies_go_with_the_store():
    store = ObjectStore("memory://bucket/gone")
    scratch = store.begin("data/a").parent
    assert scratch.is_dir()
    del store
    assert not scratch.exists()


def test_another_process_has_a_client_and_copies_of_its_own():
    """A fork that is done with the store leaves the copies to the process that made them."""
    store = ObjectStore("memory://bucket/shared")
    store.replace("a", b"1")
    mine = store.begin("data/mine")
    mine.write_bytes(b"2")
    other = pickle.loads(pickle.dumps(store))
    assert other.read_bytes("a") == b"1"
    assert other.begin("data/mine") != mine
    client = store.fs
    child = os.fork()
    if not child:
        sound = store.fs is not client and store.read_bytes("a") == b"1"
        del store
        os._exit(0 if sound else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert mine.read_bytes() == b"2"
    assert store.fs is client


# --- a real S3 server, in a process of its own ----------------------------------------------------


def test_credentials_are_no_part_of_a_location():
    """And are not repeated: what is said of a location is logged."""
    with pytest.raises(InputError, match="holds no user names") as caught:
        open_store("s3://AKIA:hidden-word@bucket/run")
    assert "hidden-word" not in str(caught.value)


def test_s3_create_is_exclusive(s3):
    store = open_store(f"{s3}/exclusive")
    assert store.create("commits/0.json", b"first")
    assert not store.create("commits/0.json", b"second")
    assert store.read_bytes("commits/0.json") == b"first"
    stores = [open_store(f"{s3}/exclusive") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for name in (f"commits/r{round_}.json" for round_ in range(5)):
            contents = [bytes([number]) * 100 for number in range(8)]
            made = list(pool.map(ObjectStore.create, stores, [name] * 8, contents))
            assert sum(made) == 1
            assert store.read_bytes(name) == contents[made.index(True)]


def test_s3_objects_and_listings(s3):
    store = open_store(f"{s3}/objects/")
    assert store.location == f"{s3}/objects"
    assert store.names("data") == store.folders("data") == []
    store.begin("data/a.arrow").write_bytes(b"1" * 1000)
    assert store.names("data") == []  # not visible before it is finished
    store.finish("data/a.arrow")
    store.create("data/sub/x.json", b"{}")
    store.fs.pipe_file("bucket/objects/data/", b"")  # a "folder" as consoles make it
    assert store.names("data") == ["a.arrow"]
    assert store.folders("data") == ["sub"]
    other = open_store(f"{s3}/objects")
    assert bytes_in(other, "data/a.arrow", b"1" * 1000) == b"1" * 1000
    other.discard("data/a.arrow")
    other.discard("data/a.arrow")
    assert store.names("data") == []
    with pytest.raises(FileNotFoundError):
        store.read_bytes("data/a.arrow")
    with pytest.raises(FileNotFoundError):
        bytes_in(store, "data/a.arrow", b"another")
    assert files(store._scratch) == []  # a download that failed left nothing


def test_s3_without_the_bucket(s3):
    store = open_store("s3://no-such-bucket/run")
    assert store.names("corpus") == []
    with pytest.raises(InputError, match=r"cannot reach s3://no-such-bucket/run/cache\.json"):
        store.create("cache.json", b"{}")


def test_a_corpus_built_on_s3_is_byte_for_byte_the_local_one(s3, tmp_path, corpus_file, wordpiece):
    config = CorpusConfig(source=str(corpus_file), tokenizer=str(wordpiece), sequence_length=32)
    stores = [LocalStore(tmp_path), open_store(f"{s3}/cache")]
    ours, theirs = (build_corpus(store, config, 20) for store in stores)
    assert len(ours.commits) > 2
    assert [c.sha256 for c in ours.commits] == [c.sha256 for c in theirs.commits]
    assert [c.regions for c in ours.commits] == [c.regions for c in theirs.commits]
    again = Corpus(open_store(f"{s3}/cache"))
    assert again.complete
    assert again.tokenizer.digest == ours.tokenizer.digest
    for number, commit in enumerate(again.commits):
        here = ours.shards.open(ours.commits[number])
        assert again.shards.open(commit).sha256() == here.sha256() == commit.sha256
        assert again.shard(number).table().equals(ours.shard(number).table())
    build_corpus(stores[1], config, 20)  # nothing is missing
    assert Corpus(stores[1]).fingerprint == ours.fingerprint
