"""Commit records: the small files whose existence is the only proof that a unit is done.

``Commits`` holds the records of a set of units. It keeps their counts as columns, and reads a whole
record when you ask for it.
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
    """The content of one unit's commit record."""

    unit: str
    path: Annotated[str, AfterValidator(safe_name)]  # relative to the set's folder
    rows: int
    bytes: int
    sha256: str
    regions: tuple[Region, ...]  # covering the whole file
    facts: dict[str, Any]  # recorded by the owner of the set
    rows_per_batch: int = ROWS_PER_BATCH  # of every record batch but the last

    def to_bytes(self) -> builtins.bytes:
        """Return the record as JSON, with its own checksum last."""
        body = asdict(self)
        if self.rows_per_batch == ROWS_PER_BATCH:  # as in older versions
            del body["rows_per_batch"]
        return (json.dumps(body | {SEAL: checksum(body)}, indent=1) + "\n").encode()

    def count(self, fact: str) -> int:
        """Return a number from the facts; raise CacheFormatError without one."""
        found = self.facts.get(fact)
        if type(found) is not int or found < 0:
            raise CacheFormatError(
                f"the commit record of {self.path} does not say how many {fact} it has. {REPAIR}"
            )
        return found

    @staticmethod
    def from_json(body: Any, where: str) -> "Commit":
        """Parse and check a record read from ``where``; raise CacheFormatError if it is damaged."""
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
            # Readers expand the row count later, so first check that the regions can hold it.
            batches = -(-commit.rows // commit.rows_per_batch)
            if commit.rows < 0 or len(commit.regions) - 1 - batches not in (0, 1):
                raise ValueError(f"{commit.rows} rows in {len(commit.regions)} regions")
        return commit


_PARSER = TypeAdapter(Commit)


def _parsed(body: Any) -> Commit:
    """Parse ``body`` as a record; raise a one-line ValueError for an invalid field."""
    try:
        return _PARSER.validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None


def seconds_of(commit: Commit) -> float | None:
    """Return the seconds the unit took to compute, if its record has them.

    Only the record has this fact; data and fingerprints do not depend on it, so two runs of one
    unit still give the same bytes of data.
    """
    found: Any = commit.facts.get(SECONDS)
    if type(found) in (int, float) and 0 <= found < math.inf:
        return float(found)
    return None


def _check_regions(regions: tuple[Region, ...], size: int) -> None:
    """Raise ValueError unless the regions cover the file from first to last byte in order."""
    at = 0
    for offset, length, _ in regions:
        if offset != at or length <= 0:
            raise ValueError("its regions do not follow each other")
        at += length
    if at != size or not regions:
        raise ValueError("its regions do not cover the file")


def columns_of(commits: Iterable[Commit], states: Mapping[str, str]) -> pa.Table:
    """Return the table of ``commits`` in their order; ``states`` by unit, "" where missing."""
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

KEPT = 4096  # how many records, read one by one, are kept so as not to read them again
AT_ONCE = 1024  # records read together if all are wanted

Read = Callable[[Sequence[str]], list[Commit]]  # the records of those units


def no_records(units: Sequence[str]) -> list[Commit]:
    """Return no records: the reader of a set that holds all its records in memory."""
    assert not units
    return []


class Commits(Mapping[str, Commit]):
    """The finished units by name, in order.

    ``held`` are records in memory. For large sets, ``rest`` is the table of the others
    (``columns_of``); ``read`` reads their records on demand, and the table is compared with them.
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
        """Return the unit's row in the table, if it has one."""
        row = int(np.searchsorted(self._keys, key := key_of(unit)))
        return row if row < len(self._keys) and self._keys[row] == key else None

    def _check(self, commit: Commit, row: int) -> None:
        assert self._rest is not None
        if problem := difference(self._rest, row, commit):
            raise CacheFormatError(
                f"the commit record of {commit.path} and the roll-up of these records differ in "
                f"{problem}. The record is the one to trust: `pipeline cache-teachers --check` "
                "writes the roll-up anew"
            )

    def __contains__(self, unit: object) -> bool:
        return unit in self._held or (isinstance(unit, str) and self._row(unit) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table["unit"].to_pylist())

    def __len__(self) -> int:
        return len(self._held) + len(self._keys)

    def records(self) -> Iterator[Commit]:
        """Yield all records in the order of units; for large sets none is kept."""
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
        """Add one more finished unit."""
        self._held[commit.unit] = commit
        vars(self).pop("table", None)

    # --- of all -----------------------------------------------------------------------------------

    @cached_property
    def table(self) -> pa.Table:
        """The counted fields of the units: ``columns_of``."""
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
        """Bytes of all units."""
        return int(numbers_in(self.table, "bytes").sum())

    @property
    def sha256s(self) -> list[str]:
        """The sha256 of each unit's file."""
        found: list[str] = self.table["sha256"].to_pylist()
        return found

    def fingerprint(self, units: int) -> str:
        """Return the identity of the first ``units``' content: the sha256 over their digests."""
        digests = self.table["sha256"].combine_chunks()[:units]
        _, offsets, content = digests.buffers()
        if not len(digests) or content is None:
            return hashlib.sha256().hexdigest()
        ends = np.frombuffer(offsets, np.int32)[digests.offset :]
        return hashlib.sha256(memoryview(content)[ends[0] : ends[len(digests)]]).hexdigest()

    def counts(self, fact: str) -> NDArray[np.int64]:
        """Return a number for each unit; raise CacheFormatError if one lacks it."""
        column = self._column(WHOLE, fact)
        wrong = np.flatnonzero(~(np.nan_to_num(floats_in(column), nan=-1) >= 0))
        if len(wrong):
            self[self.table["unit"][int(wrong[0])].as_py()].count(fact)
            raise CacheFormatError(f"the commit records do not say how many {fact} there are")
        return as_they_lie(column, np.int64)

    def says(self, fact: str) -> bool:
        """Return whether any unit has that fact."""
        return any(f"{kind}{fact}" in self.table.column_names for kind in (WHOLE, FRACTION, NAMED))

    def numbers(self, fact: str) -> NDArray[np.float64]:
        """Return a number for each unit; NaN where it is missing."""
        whole, others = (floats_in(self._column(kind, fact)) for kind in (WHOLE, FRACTION))
        return np.where(np.isnan(whole), others, whole)

    def named(self, fact: str) -> Iterator[dict[str, Any] | None]:
        """Yield the counts by name of each unit; None where missing."""
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
        """How many shards there are, from shard 0 on, before the first one that is missing."""
        shards = shards_among(self.keys_in_order)
        wrong = np.flatnonzero(shards != np.arange(len(shards)))
        return int(wrong[0]) if len(wrong) else len(shards)

    def lacking(self, shards: int, replicas: Iterable[int | None]) -> list[UnitPlace]:
        """Return the missing units of the first ``shards``, replica by replica."""
        keys, numbers = self.keys_in_order, np.arange(shards)
        missing = []
        for replica in replicas:
            there = among(keys_of(numbers, replica), keys)
            missing += [(shard, replica) for shard in np.flatnonzero(~there).tolist()]
        return missing

    def has_all(self, other: "Commits") -> bool:
        """Return whether every unit of ``other`` is here, too."""
        if other is self:
            return True
        theirs = other.keys_in_order
        ours = among(theirs[theirs < STRANGE], self.keys_in_order).all()
        return bool(ours) and all(unit in self for unit in other._held if key_of(unit) == STRANGE)

    def shared_with(self, others: Sequence["Commits"]) -> "Commits":
        """Return the units that all ``others`` have, too."""
        keys = self.keys_in_order
        mask = keys < STRANGE
        for other in others:
            mask &= among(keys, other.keys_in_order)
        return self._only(mask)

    def of_first(self, shards: int, replicas: int) -> "Commits":
        """Return the first ``replicas`` masked replicas of each of the first ``shards`` shards."""
        keys = self.keys_in_order
        inside = keys < key_of(unit_of(shards))
        replica = replicas_among(keys)
        return self._only(inside & (replica >= 0) & (replica < replicas))

    def shard_numbers(self) -> NDArray[np.int64]:
        """Return the existing shards, of a set without replicas."""
        return shards_among(self.keys_in_order)

    def _only(self, mask: NDArray[np.bool_]) -> "Commits":
        if mask.all():
            return self
        chosen = self.table.filter(array_of(mask, pa.bool_()))
        if self._rest is None:
            return Commits({unit: self._held[unit] for unit in chosen["unit"].to_pylist()})
        return Commits({}, chosen, self._read_records)


class ShardCommits(Sequence[Commit]):
    """The records of a corpus's shards, by number."""

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
    """Return the first field in which a record differs from a row of the table, or None."""
    said = {name: table[name][row].as_py() for name in ("unit", "rows", "bytes", "sha256")}
    return next((name for name, value in said.items() if getattr(commit, name) != value), None)
