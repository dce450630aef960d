"""Sets of Arrow shards with commit records: how everything in a cache is written and trusted.

A unit is one shard, or one masking of it. A set is a folder with ``data/<unit>-<attempt>.arrow``
(Arrow IPC *file* format, never overwritten, not trusted by itself) and ``commits/<unit>.json``. The
record is created exclusively after the data
is durable; its existence is the only proof that a unit is done. It contains the file's name, size,
sha256 and an xxh3 checksum per region (the schema, each record batch, the footer), and a checksum
of itself.
"""

import hashlib
import json
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError, unusable
from rekindle.data.storage.arrow_sizes import unpacked_bytes
from rekindle.data.storage.atomic import new_attempt
from rekindle.data.storage.base import Store
from rekindle.data.storage.commits import ROWS_PER_BATCH, Commit, Commits
from rekindle.data.storage.manifest import describe_missing
from rekindle.data.storage.records import Records
from rekindle.data.storage.seal import REPAIR
from rekindle.data.storage.shard_bytes import Region, ShardBytes
from rekindle.data.storage.store import LocalStore

MAX_UNPACKED = 1 << 28  # bytes of a compressed record batch; ours are about 10 MB

MAGIC = b"ARROW1\0\0"  # the file's first bytes, before the schema


class ShardSet:
    """One folder of shards: the corpus, a view, or one teacher's targets."""

    def __init__(self, store: Store, folder: str):
        self.store = store
        self.folder = folder
        self.records = Records(store, folder)

    def committed(self) -> Commits:
        """Return the finished units in order, from one listing of the commit records.

        Raise CacheFormatError if one of the records is damaged.
        """
        commits, damaged = self.survey()
        for error in damaged.values():
            raise error
        return commits

    def survey(
        self, check: Callable[[Commit], object] | None = None
    ) -> tuple[Commits, dict[str, CacheFormatError]]:
        """Return the finished units, and the errors of units with a damaged record or that fail
        ``check``, which raises CacheFormatError. With ``check``, the records themselves are read,
        whatever their roll-up says.
        """
        return self.records.survey(check)

    def forget(self, unit: str) -> None:
        """Take back a damaged unit, so that it is made again; its record goes first."""
        path = None
        with suppress(CacheFormatError, FileNotFoundError):  # its data file then stays until `gc`
            path = self.read_record(unit).path
        self.records.forget_roll_up()
        self.store.discard(f"{self.folder}/commits/{unit}.json")
        if path is not None:
            self.store.discard(f"{self.folder}/{path}")

    def has(self, unit: str) -> bool:
        """Return whether the unit is committed by now."""
        return self.store.exists(f"{self.folder}/commits/{unit}.json")

    def read_record(self, unit: str) -> Commit:
        """Return the record of one finished unit."""
        return self.records.read(unit)

    def write(
        self,
        unit: str,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        facts: Mapping[str, object] | None = None,
        write_options: pa.ipc.IpcWriteOptions | None = None,
        rows_per_batch: int = ROWS_PER_BATCH,
        late_facts: Callable[[], Mapping[str, object]] = dict,
    ) -> Commit:
        """Write one unit and commit it. An exception commits nothing and leaves nothing behind.

        Every batch but the last must have ``rows_per_batch`` rows, a divisor of ROWS_PER_BATCH.
        ``facts`` go into the commit record, with those of ``late_facts``, which is called after all
        batches are written. If another process has committed the unit meanwhile, its record is
        returned and this attempt's data is removed: both were complete. Raise InputError if the
        disk is full or write protected.
        """
        path = f"data/{unit}-{new_attempt()}.arrow"
        name = f"{self.folder}/{path}"
        try:
            with self.store.writing(name):
                local = self.store.begin(name)
                written = write_shard(local, schema, batches, write_options)
                all_facts = dict(facts or {}) | dict(late_facts())
                commit = Commit(unit, path, *written, all_facts, rows_per_batch)
                self.store.finish(name)
        except BaseException:
            with suppress(OSError, InputError):  # of a disk or a bucket; the first error counts
                self.store.discard(name)
            raise
        # From here on an error must leave the data: the record may have been created.
        if self.store.create(f"{self.folder}/commits/{unit}.json", commit.to_bytes()):
            return commit
        winner = self.read_record(unit)
        if winner.path != path:  # else our put succeeded, and only its reply was lost
            self.store.discard(name)
        return winner

    def check_sizes(self, units: Sequence[str], commits: Commits) -> None:
        """Raise CacheFormatError if a file of the local ``units`` does not have its committed size,
        so that the problem shows before expensive work.
        """
        if not isinstance(self.store, LocalStore):
            return  # it would cost a request per unit
        for commit in (commits[unit] for unit in units):
            name = f"{self.folder}/{commit.path}"
            with unusable(
                describe_missing(self.store, name), FileNotFoundError, advice=f". {REPAIR}"
            ):
                size, _ = self.store.state(name)
            check_size(f"{self.store.location}/{name}", size, commit)

    def check(self, commit: Commit) -> None:
        """Compare every byte of a unit with its checksums; raise CacheFormatError on a
        difference.
        """
        self.open(commit, direct=True).check()

    def open(
        self,
        commit: Commit,
        about: Mapping[str, object] | None = None,
        fields: Sequence[pa.Field] | None = None,
        check_batch: Callable[[int, pa.RecordBatch], None] | None = None,
        direct: bool = False,
    ) -> "Shard":
        """Return the committed shard, whose checksums are verified as its parts are used.
        ``direct``: read the store itself, not a local copy.

        Raise CacheMismatchError if the shard's own description differs from ``about``,
        CacheFormatError if its columns are not ``fields``. ``check_batch`` is called with the
        number and content of every record batch read; it raises if the owner cannot use the batch.
        """
        name = f"{self.folder}/{commit.path}"
        facts = commit.bytes, commit.sha256, commit.regions
        try:
            source = self.store.open_bytes(name, *facts, direct)
        except FileNotFoundError:
            raise CacheFormatError(f"{describe_missing(self.store, name)}. {REPAIR}") from None
        shard = Shard(source, commit, check_batch)
        stored = shard.metadata
        different = sorted(k for k, v in (about or {}).items() if stored.get(k) != v)
        if different:
            raise CacheMismatchError(
                f"{shard.name} describes itself differently from {self.folder} (in: "
                f"{', '.join(different)}): it was copied from elsewhere, or a description in "
                f"{self.folder} was edited"
            )
        if fields is not None and not shard.schema.equals(pa.schema(fields), check_metadata=False):
            raise CacheFormatError(
                f"{shard.name} has not the columns that {self.folder} consists of"
            )
        return shard


class _HashingFile:
    """A file that hashes what is written to it, as a whole and region by region.

    It hashes the data in memory, not what the disk returns: otherwise what a faulty disk has
    changed would be sealed as sound.
    """

    def __init__(self, file: BinaryIO, schema_end: int):
        self._file = file
        self._schema_end = schema_end
        self.closed = False
        self.position = 0
        self.sha256 = hashlib.sha256()
        self.regions: list[Region] = []
        self._start = 0
        self._region = xxhash.xxh3_64()

    def write(self, data: bytes | memoryview) -> int:
        # Arrow writes the schema together with the first batch; the schema gets its own region.
        if self.position < self._schema_end < self.position + len(data):
            end = self._schema_end - self.position
            return self.write(data[:end]) + self.write(data[end:])
        self._file.write(data)
        self.sha256.update(data)
        self._region.update(data)
        self.position += len(data)
        if self.position == self._schema_end:
            self.end_region()
        return len(data)

    def end_region(self) -> None:
        self.regions.append((self._start, self.position - self._start, self._region.hexdigest()))
        self._start, self._region = self.position, xxhash.xxh3_64()

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        self._file.flush()


def write_shard(
    path: Path,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    options: pa.ipc.IpcWriteOptions | None,
) -> tuple[int, int, str, tuple[Region, ...]]:
    """Write the file; return its rows, bytes, sha256 and regions."""
    rows = 0
    with open(path, "xb") as raw:
        file = _HashingFile(raw, len(MAGIC) + schema.serialize().size)
        sink = pa.PythonFile(file, mode="w")
        # Not a `with`: leaving it by an exception would write a footer and make a partial file
        # valid.
        writer = pa.ipc.new_file(sink, schema, options=options)
        for batch in batches:
            writer.write_batch(batch)
            file.end_region()
            rows += batch.num_rows
        writer.close()
        file.end_region()
        raw.flush()
    return rows, file.position, file.sha256.hexdigest(), tuple(file.regions)


def check_size(name: str, size: int, commit: Commit) -> None:
    """Raise CacheFormatError if a file does not have the committed size."""
    if size != commit.bytes:
        raise CacheFormatError(
            f"{name} has {size:,} bytes, {commit.bytes:,} were committed: it was cut short or "
            f"changed. {REPAIR}"
        )


class Shard:
    """One committed Arrow file. Record batches are checked when first used."""

    def __init__(
        self,
        source: ShardBytes,
        commit: Commit,
        check_batch: Callable[[int, pa.RecordBatch], None] | None = None,
    ):
        self.name = source.name  # for messages
        self.commit = commit
        self.source = source
        self._check_batch = check_batch
        self._checked: set[int] = set()
        self._batches: dict[int, pa.RecordBatch] = {}
        self._read_lock = threading.RLock()  # all threads share the file's position
        check_size(self.name, source.size, commit)
        self._check_region(0)  # the schema
        self._check_region(len(commit.regions) - 1)  # the footer
        self._reader = self._open()
        self._row_ranges = rows_in_batches(commit.rows, commit.rows_per_batch)
        # In format 1 the schema shared its region with the first batch.
        self._first_batch_region = len(commit.regions) - 1 - self.batch_count
        if self._first_batch_region not in (0, 1) or len(self._row_ranges) != self.batch_count:
            raise CacheFormatError(f"{self.name} has not the record batches that were committed")

    def _open(self, options: pa.ipc.IpcReadOptions | None = None) -> pa.RecordBatchFileReader:
        with unusable(f"{self.name} is not an Arrow IPC file", pa.ArrowException, OSError):
            return pa.ipc.open_file(self.source.file(), options=options)

    @property
    def schema(self) -> pa.Schema:
        """The shard's schema, with its description in the metadata."""
        return self._reader.schema

    @property
    def metadata(self) -> dict[str, Any]:
        """The description that the writer put into the schema."""
        raw = (self.schema.metadata or {}).get(b"rekindle", b"")
        message = f"{self.name} does not describe itself: not a shard"
        with unusable(message, ValueError, TypeError, RecursionError):
            metadata: dict[str, Any] = dict(json.loads(raw))
        return metadata

    @cached_property
    def batch_count(self) -> int:
        """Number of record batches in the file."""
        count: int = self._reader.num_record_batches
        return count

    def batch(self, index: int, keep: bool = True) -> pa.RecordBatch:
        """Return record batch ``index``, verified; its rows start at ``index * rows_per_batch``.

        ``keep``: hold the batch for later calls; pass False for compressed ones, which would fill
        the memory.
        """
        batch = self._batches.get(index)
        if batch is None:
            if index >= self.batch_count:
                raise CacheFormatError(f"{self.name} has no record batch {index}: it lacks rows")
            region_number = self._first_batch_region + index
            with self._read_lock:
                self._check_region(region_number)
                self._check_unpacked_size(index, region_number)
                batch = self._read_batch(self._reader, index)
            if self._check_batch is not None:
                self._check_batch(index, batch)
            if keep and self.source.is_mapped:
                self._batches[index] = batch
        return batch

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all record batches, verified."""
        return map(self.batch, range(self.batch_count))

    def _check_unpacked_size(self, index: int, region: int) -> None:
        """Check a batch's unpacked size: a foreign writer may have committed far too much."""
        offset, length, _ = self.commit.regions[region]
        message = f"{self.name}: no record batch {index} where it must be"
        with unusable(message, struct.error, IndexError, ValueError):
            content = self.source.region(offset, length)
            unpacked = unpacked_bytes(content, after_schema=region == 0)
        if unpacked > MAX_UNPACKED:
            raise CacheFormatError(
                f"{self.name}: record batch {index} would unpack to {unpacked:,} bytes, more than "
                f"{MAX_UNPACKED:,}: it was not written by Rekindle"
            )

    def _read_batch(self, reader: pa.RecordBatchFileReader, index: int) -> pa.RecordBatch:
        start, stop = self._row_ranges[index]
        with unusable(f"{self.name}: record batch {index}", pa.ArrowException, OSError):
            batch = reader.get_batch(index)
            batch.validate(full=True)  # offsets that point outside would crash the process
        if batch.num_rows != stop - start:
            raise CacheFormatError(
                f"{self.name}: record batch {index} has {batch.num_rows} rows, not {stop - start}"
            )
        return batch

    def read_unverified(self, names: list[str]) -> list[pa.RecordBatch]:
        """Return some columns of all record batches, NOT verified; the others' bytes are not read.

        For callers that compare the columns with their own checksum.
        """
        included = [self.schema.get_field_index(name) for name in names]
        reader = self._open(pa.ipc.IpcReadOptions(included_fields=included))
        return [self._read_batch(reader, index).select(names) for index in range(self.batch_count)]

    def table(self) -> pa.Table:
        """Return the whole shard, verified."""
        return pa.Table.from_batches(self.batches(), self.schema)

    def check(self) -> None:
        """Compare the whole file with its checksums."""
        for region in range(len(self.commit.regions)):
            self._check_region(region)

    def sha256(self) -> str:
        """Return the sha256 of the whole file as it is now."""
        digest = hashlib.sha256()
        for offset, length, _ in self.commit.regions:
            digest.update(memoryview(self.source.region(offset, length)))
        return digest.hexdigest()

    def _check_region(self, region: int) -> None:
        if region in self._checked:
            return
        offset, length, expected = self.commit.regions[region]
        if xxhash.xxh3_64_hexdigest(memoryview(self.source.region(offset, length))) != expected:
            raise CacheFormatError(
                f"{self.name}: bytes {offset:,}–{offset + length:,} are not what was committed "
                f"(checksum mismatch). {REPAIR}"
            )
        if self.source.is_mapped:  # otherwise it is read again, and may differ
            self._checked.add(region)


def shard_schema(fields: list[pa.Field], metadata: Mapping[str, object]) -> pa.Schema:
    """Return a schema whose metadata describes the shard, as JSON under the key ``rekindle``."""
    return pa.schema(fields, metadata={"rekindle": json.dumps(metadata, sort_keys=True)})


def rows_in_batches(rows: int, size: int = ROWS_PER_BATCH) -> list[tuple[int, int]]:
    """Return the row ranges of a shard's record batches: all full but the last."""
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
