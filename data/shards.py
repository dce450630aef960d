"""Sets of Arrow shards with commit records: how anything in a cache is written and believed.

A set is a folder with ``data/<unit>-<attempt>.arrow`` (Arrow IPC *file* format, never overwritten,
not trusted by itself) and ``commits/<unit>.json``. The record is created exclusively after the data
is durable; its existence is the only proof that a unit is done. It carries the file's name, size,
sha256 and an xxh3 checksum per region (each record batch, the first with the schema; the footer),
and a checksum of itself.
"""

import builtins
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from rekindle.data.errors import CacheFormatError, CacheMismatchError
from rekindle.data.store import Store, new_attempt, safe_name

ROWS_PER_BATCH = 128  # 128 sequences x 512 positions are a few MB: one checksum, one page-in


Region = tuple[int, int, str]  # offset, length, xxh3_64


@dataclass(frozen=True)
class Commit:
    """What a commit record says of one unit."""

    unit: str
    path: str  # relative to the set's folder
    rows: int
    bytes: int
    sha256: str
    regions: tuple[Region, ...]  # covering the whole file
    facts: dict[str, Any] = field(default_factory=dict)  # what the owner of the set wants to know

    def to_bytes(self) -> builtins.bytes:
        """The record as JSON, with its own checksum last."""
        body = {
            "unit": self.unit,
            "path": self.path,
            "rows": self.rows,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "regions": [list(region) for region in self.regions],
            "facts": self.facts,
        }
        return (json.dumps(body | {"record": _self_checksum(body)}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, body: Any, where: str) -> "Commit":
        """Parse and check a record read from ``where``; CacheFormatError when it is damaged."""
        try:
            stated = body.pop("record")
            if stated != _self_checksum(body):
                raise ValueError("its checksum does not match")
            regions = tuple((int(o), int(n), str(x)) for o, n, x in body["regions"])
            _check_regions(regions, int(body["bytes"]))
            commit = cls(
                unit=str(body["unit"]),
                path=safe_name(body["path"]),
                rows=int(body["rows"]),
                bytes=int(body["bytes"]),
                sha256=str(body["sha256"]),
                regions=regions,
                facts=dict(body["facts"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheFormatError(
                f"the commit record {where} is damaged ({error}). "
                "Delete it to have its shard made again"
            ) from None
        return commit


def _check_regions(regions: tuple[tuple[int, int, str], ...], size: int) -> None:
    """ValueError unless the regions follow each other from the file's first byte to its last."""
    at = 0
    for offset, length, _ in regions:
        if offset != at or length <= 0:
            raise ValueError("its regions do not follow each other")
        at += length
    if at != size or not regions:
        raise ValueError("its regions do not cover the file")


def _self_checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()


class ShardSet:
    """One folder of shards: the corpus, a view, or one teacher's targets."""

    def __init__(self, store: Store, folder: str):
        self.store = store
        self.folder = folder

    def committed(self) -> dict[str, Commit]:
        """The finished units by name, from one listing of the commit records."""
        names = [n for n in self.store.names(f"{self.folder}/commits") if n.endswith(".json")]
        contents = self.store.read_many([f"{self.folder}/commits/{name}" for name in names])
        units = [name.removesuffix(".json") for name in names]
        return {unit: self._parse(unit, c) for unit, c in zip(units, contents, strict=True)}

    def commit(self, unit: str) -> Commit:
        """The record of one finished unit."""
        return self._parse(unit, self.store.read_bytes(f"{self.folder}/commits/{unit}.json"))

    def _parse(self, unit: str, content: bytes) -> Commit:
        name = f"{self.folder}/commits/{unit}.json"
        body = self.store.parse_json(name, content)
        commit = Commit.from_json(body, f"{self.store.location}/{name}")
        if commit.unit != unit:
            raise CacheFormatError(f"the commit record {name} speaks of unit {commit.unit!r}")
        return commit

    def write(
        self,
        unit: str,
        schema: pa.Schema,
        batches: Iterable[pa.RecordBatch],
        facts: Mapping[str, Any] | None = None,
    ) -> Commit:
        """Write one unit and commit it. An exception commits nothing and leaves nothing behind.

        ``facts`` go into the commit record. If another process committed the unit meanwhile, its
        record is returned and this attempt's data is removed: both were complete.
        """
        path = f"data/{unit}-{new_attempt()}.arrow"
        name = f"{self.folder}/{path}"
        try:
            rows, size, sha256, regions = _write_file(self.store.begin(name), schema, batches)
            commit = Commit(unit, path, rows, size, sha256, regions, dict(facts or {}))
            self.store.finish(name)
        except BaseException:
            self.store.discard(name)
            raise
        # From here on an error must leave the data: whether the record was created is not known.
        if self.store.create(f"{self.folder}/commits/{unit}.json", commit.to_bytes()):
            return commit
        winner = self.commit(unit)
        if winner.path != path:  # a put repeated after a lost answer finds its own record
            self.store.discard(name)
        return winner

    def open(self, commit: Commit, about: Mapping[str, Any] | None = None) -> "Shard":
        """The committed shard, memory-mapped; checksums are verified as its parts are touched.

        Raises CacheMismatchError when the shard does not say of itself what ``about`` says.
        """
        name = f"{self.folder}/{commit.path}"
        try:
            path = self.store.local_file(name)
        except FileNotFoundError:
            raise CacheFormatError(
                f"{self.store.location}/{name} is missing although it was committed. "
                f"Delete {self.folder}/commits/{commit.unit}.json to have it made again"
            ) from None
        shard = Shard(path, commit)
        described = shard.metadata
        different = sorted(k for k, v in (about or {}).items() if described.get(k) != v)
        if different:
            raise CacheMismatchError(
                f"{path} was not made for {self.folder} as it is now: its {', '.join(different)} "
                "differ. Shards cannot be exchanged, nor the descriptions beside them edited"
            )
        return shard


class _HashingFile:
    """A file that hashes what passes through it, as a whole and region by region."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.closed = False
        self.position = 0
        self.sha256 = hashlib.sha256()
        self.regions: list[Region] = []
        self._start = 0
        self._region = xxhash.xxh3_64()

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.sha256.update(data)
        self._region.update(data)
        self.position += len(data)
        return len(data)

    def end_region(self) -> None:
        self.regions.append((self._start, self.position - self._start, self._region.hexdigest()))
        self._start, self._region = self.position, xxhash.xxh3_64()

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        self._file.flush()


def _write_file(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> tuple[int, int, str, tuple[Region, ...]]:
    rows = 0
    with open(path, "xb") as raw:
        file = _HashingFile(raw)
        sink = pa.PythonFile(file, mode="w")
        # Not a `with`: leaving it by an exception would write a footer and make a partial file
        # valid.
        writer = pa.ipc.new_file(sink, schema)
        for batch in batches:
            writer.write_batch(batch)  # Arrow writes the schema together with the first one
            file.end_region()
            rows += batch.num_rows
        writer.close()
        file.end_region()
        raw.flush()
    return rows, file.position, file.sha256.hexdigest(), tuple(file.regions)


class Shard:
    """One committed Arrow file. Record batches are checked when they are first touched.

    The file is mapped, not held open: a process reads thousands of shards at a time.
    """

    def __init__(self, path: Path, commit: Commit):
        self.path = path
        self.commit = commit
        self._checked: set[int] = set()
        self._batches: dict[int, pa.RecordBatch] = {}
        if path.stat().st_size != commit.bytes:
            raise CacheFormatError(
                f"{path} has {path.stat().st_size:,} bytes, {commit.bytes:,} were committed: it "
                "was "
                "cut short or changed. Run `pipeline verify` on the cache"
            )
        with pa.memory_map(str(path)) as file:
            self._buffer = file.read_buffer()  # the mapping outlives the file's descriptor
        self._bytes = memoryview(self._buffer)
        self._check(0)  # the schema and the first batch
        self._check(len(commit.regions) - 1)  # the footer
        try:
            self._reader = pa.ipc.open_file(self._buffer)
        except (pa.ArrowException, OSError) as error:
            raise CacheFormatError(f"{path} is not an Arrow IPC file: {error}") from None
        rows = rows_in_batches(commit.rows)
        if (
            self._reader.num_record_batches != len(commit.regions) - 1
            or len(rows) != self.batch_count
        ):
            raise CacheFormatError(f"{path} does not have the record batches that were committed")

    @property
    def schema(self) -> pa.Schema:
        """The shard's schema, with its self-description in the metadata."""
        return self._reader.schema

    @property
    def metadata(self) -> dict[str, Any]:
        """The self-description that the writer put into the schema."""
        raw = (self.schema.metadata or {}).get(b"rekindle", b"")
        try:
            described: dict[str, Any] = dict(json.loads(raw))
        except (ValueError, TypeError):
            raise CacheFormatError(f"{self.path} does not describe itself: not a shard") from None
        return described

    @cached_property
    def batch_count(self) -> int:
        """Record batches in the file."""
        count: int = self._reader.num_record_batches
        return count

    def batch(self, index: int) -> pa.RecordBatch:
        """Record batch ``index``, verified; rows ``index * ROWS_PER_BATCH`` and on."""
        if index not in self._batches:
            self._check(index)
            self._batches[index] = self._read(index)
        return self._batches[index]

    def _read(self, index: int) -> pa.RecordBatch:
        """A batch whose bytes are those committed may still come from a stranger's writer."""
        rows = min(ROWS_PER_BATCH, self.commit.rows - index * ROWS_PER_BATCH)
        try:
            batch = self._reader.get_batch(index)
            batch.validate(full=True)  # offsets that point outside would crash the process
        except (pa.ArrowException, OSError) as error:
            raise CacheFormatError(f"{self.path}: record batch {index}: {error}") from None
        if batch.num_rows != rows:
            raise CacheFormatError(
                f"{self.path}: record batch {index} has {batch.num_rows} rows, not {rows}"
            )
        return batch

    def table(self) -> pa.Table:
        """The whole shard, verified."""
        return pa.Table.from_batches([self.batch(i) for i in range(self.batch_count)], self.schema)

    def _check(self, region: int) -> None:
        if region in self._checked:
            return
        offset, length, expected = self.commit.regions[region]
        if xxhash.xxh3_64_hexdigest(self._bytes[offset : offset + length]) != expected:
            raise CacheFormatError(
                f"{self.path}: bytes {offset:,}–{offset + length:,} are not what was committed "
                "(checksum mismatch). `pipeline verify` finds every damaged shard of the cache"
            )
        self._checked.add(region)


def describe(fields: list[pa.Field], metadata: dict[str, Any]) -> pa.Schema:
    """A schema whose metadata says, in JSON under the key ``rekindle``, what the shard holds."""
    return pa.schema(fields, metadata={"rekindle": json.dumps(metadata, sort_keys=True)})


def rows_in_batches(rows: int) -> list[tuple[int, int]]:
    """The row ranges of a shard's record batches: all full but the last."""
    return [(s, min(s + ROWS_PER_BATCH, rows)) for s in range(0, rows, ROWS_PER_BATCH)]
