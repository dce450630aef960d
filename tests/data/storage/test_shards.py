"""Shards and commits: a flipped byte is found, nothing half-written believed, races end whole."""

import gc
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.data.storage import shards as shards_module
from rekindle.data.storage.columns import list_array, list_type, offsets_of
from rekindle.data.storage.seal import checksum
from rekindle.data.storage.shard_bytes import MappedBytes
from rekindle.data.storage.shards import (
    ROWS_PER_BATCH,
    Commit,
    Shard,
    ShardSet,
    rows_in_batches,
    shard_schema,
)
from rekindle.data.storage.store import LocalStore

FIELDS = [
    pa.field("digest", pa.string()),
    pa.field("ids", list_type(pa.uint16(), 2)),
    pa.field("flags", list_type(pa.bool_())),
]
SCHEMA = shard_schema(FIELDS, {"kind": "test", "shard": 0})


def batches(rows, fill=0, schema=SCHEMA):
    for first, last in rows_in_batches(rows):
        offsets = offsets_of([n % 3 for n in range(first, last)])
        count = int(offsets[-1])
        columns = [
            pa.array([f"{n:04x}" for n in range(first, last)], pa.string()),
            list_array(offsets, np.full((count, 2), fill, np.uint16)),
            list_array(offsets, np.arange(count) % 2 == 0),
        ]
        yield pa.record_batch(columns, schema=schema)


@pytest.fixture
def shards(tmp_path):
    return ShardSet(LocalStore(tmp_path), "set")


def files(shards):
    root = shards.store.root
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def read_all(shards, unit="00000"):
    return shards.open(shards.read_record(unit)).table()


def test_what_is_written_is_read(shards):
    rows = 2 * ROWS_PER_BATCH + 5
    commit = shards.write("00000", SCHEMA, batches(rows, fill=7), {"tokens": 3})
    assert commit == shards.read_record("00000") == shards.committed()["00000"]
    assert (commit.rows, commit.facts) == (rows, {"tokens": 3})
    shard = shards.open(commit)
    assert shard.batch_count == 3
    assert shard.table().equals(pa.Table.from_batches(batches(rows, fill=7), SCHEMA))
    assert shard.metadata == {"kind": "test", "shard": 0}
    content = shard.source.path.read_bytes()
    assert len(content) == commit.bytes
    assert hashlib.sha256(content).hexdigest() == commit.sha256
    assert files(shards) == ["set/commits/00000.json", f"set/{commit.path}"]


class FaultyFile(io.FileIO):
    """Keeps another number than it was given."""

    def write(self, data):
        return super().write(bytes(data).replace(b"\7\0\7\0", b"\7\0\6\0"))


def test_what_a_disk_changes_is_not_sealed_as_sound(shards, monkeypatch):
    """The checksums are of what was handed over, not of what lies in the file."""
    monkeypatch.setattr(shards_module, "open", FaultyFile, raising=False)
    commit = shards.write("00000", SCHEMA, batches(3, fill=7))
    with pytest.raises(CacheFormatError, match="checksum mismatch"):
        shards.check(commit)


def test_a_unit_without_rows(shards):
    commit = shards.write("00000", SCHEMA, [])
    assert commit.rows == 0
    assert shards.open(commit).table().num_rows == 0


@pytest.mark.parametrize("rows", [0, 3, ROWS_PER_BATCH + 1])
def test_a_flipped_byte_anywhere_is_found_on_first_touch(shards, rows):
    """Byte after byte: header, schema, bodies, padding, footer."""
    commit = shards.write("00000", SCHEMA, batches(rows))
    path = shards.open(commit).source.path
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for place in range(len(content)):
            os.pwrite(file.fileno(), bytes([content[place] ^ (1 << (place % 8))]), place)
            with pytest.raises(CacheFormatError, match="not what was committed"):
                shards.open(commit).table()
            os.pwrite(file.fileno(), content[place : place + 1], place)
    assert shards.open(commit).table().num_rows == rows


def test_only_what_is_touched_is_read_and_checked(shards):
    """Damage in one record batch does not keep the others from being read, and is found by name."""
    commit = shards.write("00000", SCHEMA, batches(3 * ROWS_PER_BATCH))
    path = shards.open(commit).source.path
    offset, length, _ = commit.regions[2]  # of the second batch, after the schema and the first
    content = bytearray(path.read_bytes())
    content[offset + length // 2] ^= 1
    path.write_bytes(content)
    shard = shards.open(commit)
    assert shard.batch(0).num_rows == shard.batch(2).num_rows == ROWS_PER_BATCH
    for _ in range(2):  # not only the first time
        with pytest.raises(CacheFormatError, match=f"{offset:,}"):
            shard.batch(1)


def test_a_truncated_or_lengthened_file_is_found(shards):
    commit = shards.write("00000", SCHEMA, batches(5))
    path = shards.open(commit).source.path
    content = path.read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(CacheFormatError, match="cut short or changed"):
            shards.open(commit)
    path.unlink()
    with pytest.raises(CacheFormatError, match=r"missing although it was .*makes it anew"):
        shards.open(commit)


class Boom(BaseException):
    """Not an Exception, as a KeyboardInterrupt is not."""


@pytest.mark.covering
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Boom])
def test_an_exception_while_writing_commits_nothing_and_leaves_no_file(shards, after, error):
    def failing():
        for number, batch in enumerate(batches(2 * ROWS_PER_BATCH)):
            if number == after:
                raise error
            yield batch
        raise error

    with pytest.raises(error):
        shards.write("00000", SCHEMA, failing())
    gc.collect()  # a writer that is thrown away must not finish the file either
    assert files(shards) == []
    assert shards.committed() == {}
    shards.write("00000", SCHEMA, batches(3))  # the unit can be made afterwards
    assert read_all(shards).num_rows == 3


def test_an_exception_when_it_becomes_durable_leaves_no_file(shards, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space"):
            shards.write("00000", SCHEMA, batches(3))
    assert files(shards) == []


def test_an_interrupt_stays_one_where_the_data_cannot_be_removed(shards, monkeypatch):
    """As of a bucket that is away: what it says then would hide what ended the work."""

    def told(name):
        raise KeyboardInterrupt

    def away(name):
        raise InputError("cannot reach s3://bucket")

    monkeypatch.setattr(shards.store, "finish", told)
    monkeypatch.setattr(shards.store, "discard", away)
    with pytest.raises(KeyboardInterrupt):
        shards.write("00000", SCHEMA, batches(3))


def test_an_error_of_the_commit_keeps_the_data(shards, monkeypatch):
    """Whether the record was created is not known then: data that may be committed must stay."""

    def lost(name, content):
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(shards.store, "create", lost)
        with pytest.raises(OSError, match="connection lost"):
            shards.write("00000", SCHEMA, batches(3))
    assert len(files(shards)) == 1


def test_a_put_that_was_repeated_after_a_lost_answer_is_not_taken_for_a_rival(shards, monkeypatch):
    """S3 clients repeat a conditional put that timed out, and are told that the name is taken."""
    create = shards.store.create

    def repeated(name, content):
        assert create(name, content)
        return create(name, content)  # False, although it is ours

    monkeypatch.setattr(shards.store, "create", repeated)
    commit = shards.write("00000", SCHEMA, batches(3))
    assert commit == shards.read_record("00000")
    assert read_all(shards).num_rows == 3


def test_of_two_writers_one_commits_and_its_data_is_whole(shards):
    """The loser's file goes; it returns the winner's record. Over many races, both orders occur."""
    for round_ in range(20):
        unit = f"{round_:05d}"

        def write(fill, unit=unit):
            return fill, shards.write(unit, SCHEMA, batches(200, fill))

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(write, range(4)))
        winner = shards.read_record(unit)
        assert {commit.path for _, commit in results} == {winner.path}
        values = read_all(shards, unit)["ids"].combine_chunks().flatten().flatten()
        assert len(set(values.to_pylist())) == 1  # of one writer only
    assert len(files(shards)) == 40


def test_a_writer_that_comes_late_leaves_the_committed_data_alone(shards):
    first = shards.write("00000", SCHEMA, batches(3, fill=1))
    content = shards.open(first).source.path.read_bytes()
    second = shards.write("00000", SCHEMA, batches(3, fill=2))
    assert second == first
    assert shards.open(first).source.path.read_bytes() == content
    assert len(files(shards)) == 2


def test_data_without_a_commit_is_not_believed(shards):
    commit = shards.write("00000", SCHEMA, batches(3))
    (shards.store.root / "set/commits/00000.json").unlink()
    assert shards.committed() == {}
    assert len(files(shards)) == 1
    again = shards.write("00000", SCHEMA, batches(3))
    assert again.path != commit.path
    assert again.sha256 == commit.sha256


# --- commit records -------------------------------------------------------------------------------


def record(shards, unit="00000"):
    return shards.store.root / f"set/commits/{unit}.json"


def test_every_damaged_byte_of_a_commit_record_is_found(shards):
    """Byte after byte: the record is refused, or (other white space) it still says the same."""
    commit = shards.write("00000", SCHEMA, batches(3), {"positions": 12, "name": "ünïcode"})
    content = record(shards).read_bytes()
    refused = 0
    with open(record(shards), "r+b", buffering=0) as file:
        for place in range(len(content)):
            for flip in (1, 32, 128):
                os.pwrite(file.fileno(), bytes([content[place] ^ flip]), place)
                try:
                    assert shards.read_record("00000") == commit
                except CacheFormatError:
                    refused += 1
            os.pwrite(file.fileno(), content[place : place + 1], place)
    assert refused > 2.9 * len(content.strip())
    assert shards.read_record("00000") == commit


def test_a_truncated_commit_record_is_found(shards):
    shards.write("00000", SCHEMA, batches(3))
    content = record(shards).read_bytes().rstrip()
    for length in range(len(content)):
        record(shards).write_bytes(content[:length])
        with pytest.raises(CacheFormatError):
            shards.committed()


def forged(shards, **changes):
    """A record with a right checksum of its own, as a stranger could write it."""
    body = json.loads(record(shards).read_bytes())
    del body["record"]
    body |= changes
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    body["record"] = hashlib.sha256(canonical).hexdigest()
    record(shards).write_text(json.dumps(body))


PATHS = ["../../secret.arrow", "data/../../x", "/etc/passwd", "", "data\\x", None, 3]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_leaves_the_cache_is_refused(shards, path):
    shards.write("00000", SCHEMA, batches(3))
    forged(shards, path=path)
    with pytest.raises(CacheFormatError):
        shards.read_record("00000")


def test_a_record_of_another_unit_is_refused(shards):
    shards.write("00000", SCHEMA, batches(3))
    record(shards, "00001").write_bytes(record(shards).read_bytes())
    with pytest.raises(CacheFormatError, match="names unit '00000'"):
        shards.committed()


def regions_that_lie(regions, size):
    (o0, n0, x0), (_, n1, _), *_ = regions
    return [
        [],
        regions[:-1],
        [[o0, n0 - 1, x0], *regions[1:]],
        [[o0, n0 + n1, x0]],
        [regions[0], regions[0], *regions[1:]],
        [[-1, n0 + 1, x0], *regions[1:]],
        [[0, 0, "0"], *regions],
        [*regions, [size, 5, "0"]],
        "oops",
        [[o0, n0], *regions[1:]],
    ]


def test_regions_must_cover_the_file(shards):
    """Else a stranger's record could leave bytes unchecked, or an index without a region."""
    commit = shards.write("00000", SCHEMA, batches(3))
    regions = [list(region) for region in commit.regions]
    for lie in regions_that_lie(regions, commit.bytes):
        forged(shards, regions=lie)
        with pytest.raises(CacheFormatError, match=r"regions|damaged"):
            shards.open(shards.read_record("00000"))


def test_the_field_that_is_wrong_is_named_in_a_line(shards):
    shards.write("00000", SCHEMA, batches(3))
    forged(shards, rows="some")
    with pytest.raises(CacheFormatError, match=r"damaged: rows: Input should be [^\[]*verify`"):
        shards.read_record("00000")


def test_a_record_without_facts_is_damaged(shards):
    shards.write("00000", SCHEMA, batches(3))
    body = json.loads(record(shards).read_bytes())
    del body["facts"], body["record"]
    record(shards).write_text(json.dumps(body | {"record": checksum(body)}))
    with pytest.raises(CacheFormatError, match=r"damaged: facts: Field required\."):
        shards.read_record("00000")


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'{"record": 1}', b"{}", b'"x"'])
def test_a_record_that_is_something_else(shards, content):
    path = record(shards)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CacheFormatError, match="damaged"):
        shards.committed()


# --- files of strangers: sound bytes, by their own record, that are no shard of ours --------------


def committed_as_it_is(shards, content, rows):
    """A file with a record whose checksums are right."""
    import xxhash

    path = shards.store.begin("data/x.arrow")
    path.write_bytes(content)
    regions = ((0, len(content), xxhash.xxh3_64_hexdigest(content)),)
    digest = hashlib.sha256(content).hexdigest()
    return path, Commit("00000", "x.arrow", rows, len(content), digest, regions, {})


def test_a_file_that_is_no_arrow_file(shards):
    for content in (b"x" * 100, b"ARROW1\0\0" + b"\0" * 92, b"ARROW1"):
        path, commit = committed_as_it_is(shards, content, 0)
        with pytest.raises(CacheFormatError, match="not an Arrow IPC file"):
            Shard(MappedBytes(path), commit)


def test_a_folder_in_place_of_a_file_is_told_and_made_again(shards):
    commit = shards.write("00000", SCHEMA, batches(5))
    path = shards.store.root / "set" / commit.path
    path.unlink()
    path.mkdir()
    with pytest.raises(CacheFormatError, match="is missing although it was committed"):
        read_all(shards)
    shards.forget("00000")
    shards.write("00000", SCHEMA, batches(5))
    assert read_all(shards).num_rows == 5


def test_rows_must_be_those_that_were_committed(shards):
    commit = shards.write("00000", SCHEMA, batches(3))
    forged(shards, rows=4)
    with pytest.raises(CacheFormatError, match="has 3 rows, not 4"):
        shards.open(shards.read_record("00000")).table()
    forged(shards, rows=commit.rows + ROWS_PER_BATCH)
    with pytest.raises(CacheFormatError, match="record batches"):
        shards.open(shards.read_record("00000"))


def test_record_batches_must_have_the_rows_that_readers_count_on(shards):
    """Row 130 is looked for in the second record batch, so the first must have 128 rows."""
    parts = [*batches(3), *batches(ROWS_PER_BATCH)]
    commit = shards.write("00000", SCHEMA, parts)
    with pytest.raises(CacheFormatError, match="record batch 0 has 3 rows, not 128"):
        shards.open(commit).table()


def test_offsets_that_point_outside_are_an_error_not_a_crash(shards):
    schema = shard_schema([pa.field("x", list_type(pa.int32()))], {})
    memory = np.array([0, 1, 2], np.int32)
    values = pa.array([1, 2], pa.int32())
    lying = pa.ListArray.from_buffers(
        list_type(pa.int32()), 2, [None, pa.py_buffer(memory)], children=[values]
    )
    memory[1] = 7
    commit = shards.write("00000", schema, [pa.record_batch([lying], schema=schema)])
    with pytest.raises(CacheFormatError, match="record batch 0"):
        shards.open(commit).table()


def test_a_shard_that_says_other_things_of_itself_is_refused(shards):
    commit = shards.write("00000", SCHEMA, batches(3))
    assert shards.open(commit, {"kind": "test", "shard": 0}).batch_count == 1
    with pytest.raises(CacheMismatchError, match=r"\(in: shard\)"):
        shards.open(commit, {"kind": "test", "shard": 1})
    bare = shards.write("00001", pa.schema(FIELDS), batches(3, schema=pa.schema(FIELDS)))
    with pytest.raises(CacheFormatError, match="does not describe itself"):
        shards.open(bare, {"kind": "test"})


def test_thousands_of_shards_can_be_open(shards):
    """A mapping needs no open file: the usual limit is 1,024 of them."""
    commit = shards.write("00000", SCHEMA, batches(3))
    before = len(os.listdir("/proc/self/fd"))
    held = [shards.open(commit) for _ in range(50)]
    assert all(shard.batch(0).num_rows == 3 for shard in held)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_batches_are_views_of_the_file(shards):
    commit = shards.write("00000", SCHEMA, batches(ROWS_PER_BATCH))
    before = pa.total_allocated_bytes()
    shard = shards.open(commit)
    batch = shard.batch(0)
    assert shard.batch(0) is batch
    assert pa.total_allocated_bytes() == before


def test_rows_in_batches():
    for rows in (0, 1, 127, 128, 129, 1000):
        parts = rows_in_batches(rows)
        assert [n for a, b in parts for n in range(a, b)] == list(range(rows))
        assert all(b - a == ROWS_PER_BATCH for a, b in parts[:-1])
