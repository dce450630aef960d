"""Commit records: the small files whose existence is the only proof that a unit is done.

Those of a set are one object, ``Commits``: counts of them all are columns, each record is read when
it is asked for.
"""

import builtins
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import AfterValidator, TypeAdapter, ValidationError

from rekindle.data.errors import CacheFormatError, unusable
from rekindle.data.storage.base import safe_name
from rekindle.data.storage.seal import REPAIR, SEAL, checksum
from rekindle.data.storage.shard_bytes import Region
from rekindle.data.storage.units import (
    FRACTION,
    LARGEST,
    NAMED,
    STRANGE,
    WHOLE,
    UnitPlace,
    among,
    array_of,
    as_they_lie,
    floats_in,
    joined,
    key_of,
    keys_of,
    numbers_in,
    replicas_among,
    shards_among,
    type_of,
    unit_of,
)

ROWS_PER_BATCH = 128  # 128 sequences x 512 positions are a few MB: one checksum, one page-in
SECONDS = "seconds"  # a fact: see `seconds_of`


@dataclass(frozen=True)
class Commit:
    """What a commit record says of one unit."""

    unit: str
    path: Annotated[str, AfterValidator(safe_name)]  # relative to the set's folder
    rows: int
    bytes: int
    sha256: str
    regions: tuple[Region, ...]  # covering the whole file
    facts: dict[str, Any]  # what the owner of the set wants to know
    rows_per_batch: int = ROWS_PER_BATCH  # of every record batch but the last

    def to_bytes(self) -> builtins.bytes:
        """The record as JSON, with its own checksum last."""
        body = asdict(self)
        if self.rows_per_batch == ROWS_PER_BATCH:  # as before there were others
            del body["rows_per_batch"]
        return (json.dumps(body | {SEAL: checksum(body)}, indent=1) + "\n").encode()

    def count(self, fact: str) -> int:
        """A number in the facts; CacheFormatError where there is none."""
        found = self.facts.get(fact)
        if type(found) is not int or found < 0:
            raise CacheFormatError(
                f"the commit record of {self.path} does not say how many {fact} it has. {REPAIR}"
            )
        return found

    @staticmethod
    def from_json(body: Any, where: str) -> "Commit":
        """Parse and check a record read from ``where``; CacheFormatError when it is damaged."""
        told = f"the commit record {where} is damaged"
        wrong = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
        with unusable(told, *wrong, advice=f". {REPAIR}"):
            stated = body.pop(SEAL)
            if stated != checksum(body):
                raise ValueError("its checksum does not match")
            commit = _parsed(body)
            _check_regions(commit.regions, commit.bytes)
            if commit.rows_per_batch <= 0 or ROWS_PER_BATCH % commit.rows_per_batch:
                raise ValueError(f"{commit.rows_per_batch} rows a record batch")
            # Rows are counted out below: first they must be as many as the regions can hold.
            batches = -(-commit.rows // commit.rows_per_batch)
            if commit.rows < 0 or len(commit.regions) - 1 - batches not in (0, 1):
                raise ValueError(f"{commit.rows} rows in {len(commit.regions)} regions")
        return commit


_PARSER = TypeAdapter(Commit)


def _parsed(body: Any) -> Commit:
    """The record that ``body`` is; ValueError, in a line, where a field is none of a record."""
    try:
        return _PARSER.validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None


def seconds_of(commit: Commit) -> float | None:
    """The seconds that the unit took to compute, where its record says so.

    A fact of the record alone: neither the data nor any fingerprint depends on it, so that two runs
    of one unit still give the same bytes of data.
    """
    found: Any = commit.facts.get(SECONDS)
    if type(found) in (int, float) and 0 <= found < math.inf:
        return float(found)
    return None


def _check_regions(regions: tuple[Region, ...], size: int) -> None:
    """ValueError unless the regions follow each other from the file's first byte to its last."""
    at = 0
    for offset, length, _ in regions:
        if offset != at or length <= 0:
            raise ValueError("its regions do not follow each other")
        at += length
    if at != size or not regions:
        raise ValueError("its regions do not cover the file")


def columns_of(commits: Iterable[Commit], states: Mapping[str, str]) -> pa.Table:
    """The table of ``commits``, as they come; ``states`` by unit, "" where there is none."""
    commits = list(commits)
    keys = [key_of(commit.unit) for commit in commits]
    found: dict[str, list[Any]] = {
        "key": keys,
        "unit": [commit.unit for commit in commits],
        "state": [states.get(commit.unit, "") for commit in commits],
        "rows": [commit.rows for commit in commits],
        "bytes": [commit.bytes for commit in commits],
        "sha256": [commit.sha256 for commit in commits],
    }
    for row, commit in enumerate(commits):
        for fact, value in commit.facts.items():
            if (kind := _kind_of(value)) is not None and fact.isascii():
                column = found.setdefault(f"{kind}{fact}", [None] * len(commits))
                column[row] = json.dumps(value, sort_keys=True) if kind == NAMED else value
    return pa.table({name: array_of(column, type_of(name)) for name, column in found.items()})


def _kind_of(value: object) -> str | None:
    if type(value) is int and -LARGEST <= value < LARGEST:
        return WHOLE
    if type(value) is float:
        return FRACTION
    return NAMED if isinstance(value, dict) else None


# --- those of a set -------------------------------------------------------------------------------

KEPT = 4096  # records that were read one by one, and are not read again
AT_ONCE = 1024  # records that are read together, where all are wanted

Read = Callable[[Sequence[str]], list[Commit]]  # the records of those units


def no_records(units: Sequence[str]) -> list[Commit]:
    """Where all are held, no other is ever asked for."""
    assert not units
    return []


class Commits(Mapping[str, Commit]):
    """The finished units by name, in their order.

    ``held`` are records in memory. ``rest``, of large sets, is the table of the others
    (``columns_of``); ``read`` reads their records when they are asked for, and what the table
    says of them is held against these.
    """

    def __init__(
        self,
        held: Mapping[str, Commit],
        rest: pa.Table | None = None,
        read: Read = no_records,
    ):
        self._held, self._rest, self._read_records = dict(held), rest, read
        self._read: dict[str, Commit] = {}
        self._keys = np.zeros(0, np.int64) if rest is None else numbers_in(rest, "key")

    def __reduce__(self) -> tuple[object, ...]:
        return Commits, (self._held, self._rest, self._read_records)

    def __getitem__(self, unit: str) -> Commit:
        found = self._held.get(unit) or self._read.get(unit)
        if found is None:
            if (row := self._row(unit)) is None:
                raise KeyError(unit)
            (found,) = self._read_records([unit])
            self._check(found, row)
            if len(self._read) >= KEPT:
                del self._read[next(iter(self._read))]
            self._read[unit] = found
        return found

    def _row(self, unit: str) -> int | None:
        """Where the unit stands in the table, if it does."""
        row = int(np.searchsorted(self._keys, key := key_of(unit)))
        return row if row < len(self._keys) and self._keys[row] == key else None

    def _check(self, commit: Commit, row: int) -> None:
        assert self._rest is not None
        if problem := difference(self._rest, row, commit):
            raise CacheFormatError(
                f"the commit record of {commit.path} has other {problem} than the roll-up of these "
                "records. The record counts: `pipeline cache-teachers --check` makes the roll-up "
                "anew"
            )

    def __contains__(self, unit: object) -> bool:
        return unit in self._held or (isinstance(unit, str) and self._row(unit) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table["unit"].to_pylist())

    def __len__(self) -> int:
        return len(self._held) + len(self._keys)

    def records(self) -> Iterator[Commit]:
        """All records, in the order of units; of large sets none is kept."""
        units = list(self)
        for first in range(0, len(units), AT_ONCE):
            part = units[first : first + AT_ONCE]
            later = iter(self._read_records([unit for unit in part if unit not in self._held]))
            for unit in part:
                yield self._held[unit] if unit in self._held else next(later)

    @property
    def newest(self) -> Commit:
        """The record of the last unit."""
        return self[self.table["unit"][-1].as_py()]

    def add(self, commit: Commit) -> None:
        """One more unit, that was made."""
        self._held[commit.unit] = commit
        vars(self).pop("table", None)

    # --- of all -----------------------------------------------------------------------------------

    @cached_property
    def table(self) -> pa.Table:
        """What is counted of the units: ``columns_of``."""
        if not self._held and self._rest is not None:
            return self._rest
        held = columns_of(self._held.values(), {})
        return joined([held] if self._rest is None else [self._rest, held])

    @property
    def keys_in_order(self) -> NDArray[np.int64]:
        """The keys of the units, ascending."""
        return numbers_in(self.table, "key")

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of each unit."""
        return numbers_in(self.table, "rows")

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return int(numbers_in(self.table, "bytes").sum())

    @property
    def sha256s(self) -> list[str]:
        """The digest of each unit's file."""
        found: list[str] = self.table["sha256"].to_pylist()
        return found

    def fingerprint(self, units: int) -> str:
        """Identity of the content of the first ``units``: the sha256 over their digests."""
        digests = self.table["sha256"].combine_chunks()[:units]
        _, offsets, content = digests.buffers()
        if not len(digests) or content is None:
            return hashlib.sha256().hexdigest()
        ends = np.frombuffer(offsets, np.int32)[digests.offset :]
        return hashlib.sha256(memoryview(content)[ends[0] : ends[len(digests)]]).hexdigest()

    def counts(self, fact: str) -> NDArray[np.int64]:
        """A number of each unit; CacheFormatError where one does not say it."""
        column = self._column(WHOLE, fact)
        wrong = np.flatnonzero(~(np.nan_to_num(floats_in(column), nan=-1) >= 0))
        if len(wrong):
            self[self.table["unit"][int(wrong[0])].as_py()].count(fact)
            raise CacheFormatError(f"the commit records do not say how many {fact} there are")
        return as_they_lie(column, np.int64)

    def says(self, fact: str) -> bool:
        """Whether any unit says something of that fact."""
        return any(f"{kind}{fact}" in self.table.column_names for kind in (WHOLE, FRACTION, NAMED))

    def numbers(self, fact: str) -> NDArray[np.float64]:
        """A number of each unit; NaN where it does not say one."""
        whole, others = (floats_in(self._column(kind, fact)) for kind in (WHOLE, FRACTION))
        return np.where(np.isnan(whole), others, whole)

    def named(self, fact: str) -> Iterator[dict[str, Any] | None]:
        """Counts by name of each unit; None where it does not say any."""
        for text in self._column(NAMED, fact):
            yield json.loads(text.as_py()) if text.is_valid else None

    def _column(self, kind: str, fact: str) -> pa.Array:
        name = f"{kind}{fact}"
        if name in self.table.column_names:
            return self.table[name].combine_chunks()
        return pa.nulls(len(self), pa.string() if kind == NAMED else pa.float64())

    # --- which there are --------------------------------------------------------------------------

    @property
    def contiguous(self) -> int:
        """How many of the first shards there are, without a gap: the number of the first missing
        one.
        """
        shards = shards_among(self.keys_in_order)
        wrong = np.flatnonzero(shards != np.arange(len(shards)))
        return int(wrong[0]) if len(wrong) else len(shards)

    def lacking(self, shards: int, replicas: Iterable[int | None]) -> list[UnitPlace]:
        """The units that are missing of the first ``shards``, of one replica after another."""
        keys, numbers = self.keys_in_order, np.arange(shards)
        missing = []
        for replica in replicas:
            there = among(keys_of(numbers, replica), keys)
            missing += [(shard, replica) for shard in np.flatnonzero(~there).tolist()]
        return missing

    def has_all(self, other: "Commits") -> bool:
        """Whether every unit of ``other`` is here, too."""
        if other is self:
            return True
        theirs = other.keys_in_order
        ours = among(theirs[theirs < STRANGE], self.keys_in_order).all()
        return bool(ours) and all(unit in self for unit in other._held if key_of(unit) == STRANGE)

    def shared_with(self, others: Sequence["Commits"]) -> "Commits":
        """The units that all ``others`` have, too."""
        keys = self.keys_in_order
        mask = keys < STRANGE
        for other in others:
            mask &= among(keys, other.keys_in_order)
        return self._only(mask)

    def of_first(self, shards: int, replicas: int) -> "Commits":
        """The units of the first ``shards``, of so many replicas."""
        keys = self.keys_in_order
        inside = keys < key_of(unit_of(shards))
        replica = replicas_among(keys)
        return self._only(inside & (replica >= 0) & (replica < replicas))

    def shard_numbers(self) -> NDArray[np.int64]:
        """The shards that there are, of a set without replicas."""
        return shards_among(self.keys_in_order)

    def _only(self, mask: NDArray[np.bool_]) -> "Commits":
        if mask.all():
            return self
        chosen = self.table.filter(array_of(mask, pa.bool_()))
        if self._rest is None:
            return Commits({unit: self._held[unit] for unit in chosen["unit"].to_pylist()})
        return Commits({}, chosen, self._read_records)


class ShardCommits(Sequence[Commit]):
    """The records of a corpus's shards, by their numbers."""

    def __init__(self, commits: Commits):
        self.units = commits
        self._count = commits.contiguous

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        number = range(self._count)[index]
        return self.units[unit_of(number)]


def difference(table: pa.Table, row: int, commit: Commit) -> str | None:
    """Which of a record's fields a row of the table has otherwise."""
    said = {name: table[name][row].as_py() for name in ("unit", "rows", "bytes", "sha256")}
    return next((name for name, value in said.items() if getattr(commit, name) != value), None)
