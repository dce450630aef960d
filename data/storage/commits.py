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
    FLOAT,
    INT,
    INT64_LIMIT,
    JSON,
    NOT_A_UNIT,
    UnitPlace,
    arrow_array,
    column_type,
    float_values,
    int_values,
    is_in,
    join_tables,
    numpy_values,
    replicas_of,
    shards_among,
    unit_key,
    unit_keys,
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

    def count_fact(self, fact: str) -> int:
        """Return a number from the facts; raise CacheFormatError without one."""
        number = self.facts.get(fact)
        if type(number) is not int or number < 0:
            raise CacheFormatError(
                f"the commit record of {self.path} does not say how many {fact} it has. {REPAIR}"
            )
        return number

    @staticmethod
    def from_json(body: Any, name: str) -> "Commit":
        """Parse and check a record read from ``name``; raise CacheFormatError if it is damaged."""
        message = f"the commit record {name} is damaged"
        wrong = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
        with unusable(message, *wrong, advice=f". {REPAIR}"):
            recorded = body.pop(SEAL)
            if recorded != checksum(body):
                raise ValueError("its checksum does not match")
            commit = _parse(body)
            _check_regions(commit.regions, commit.bytes)
            if commit.rows_per_batch <= 0 or ROWS_PER_BATCH % commit.rows_per_batch:
                raise ValueError(f"{commit.rows_per_batch} rows a record batch")
            # Readers expand the row count later, so first check that the regions can hold it.
            batches = -(-commit.rows // commit.rows_per_batch)
            if commit.rows < 0 or len(commit.regions) - 1 - batches not in (0, 1):
                raise ValueError(f"{commit.rows} rows in {len(commit.regions)} regions")
        return commit


_PARSER = TypeAdapter(Commit)


def _parse(body: Any) -> Commit:
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
    seconds: Any = commit.facts.get(SECONDS)
    if type(seconds) in (int, float) and 0 <= seconds < math.inf:
        return float(seconds)
    return None


def _check_regions(regions: tuple[Region, ...], size: int) -> None:
    """Raise ValueError unless the regions cover the file from first to last byte in order."""
    end = 0
    for offset, length, _ in regions:
        if offset != end or length <= 0:
            raise ValueError("its regions do not follow each other")
        end += length
    if end != size or not regions:
        raise ValueError("its regions do not cover the file")


def columns_of(commits: Iterable[Commit], states: Mapping[str, str]) -> pa.Table:
    """Return the table of ``commits``; ``states``: the store's tag of each record, if known."""
    commits = list(commits)
    keys = [unit_key(commit.unit) for commit in commits]
    columns: dict[str, list[Any]] = {
        "key": keys,
        "unit": [commit.unit for commit in commits],
        "state": [states.get(commit.unit, "") for commit in commits],
        "rows": [commit.rows for commit in commits],
        "bytes": [commit.bytes for commit in commits],
        "sha256": [commit.sha256 for commit in commits],
    }
    for row, commit in enumerate(commits):
        for fact, value in commit.facts.items():
            if (prefix := _column_prefix(value)) is not None and fact.isascii():
                column = columns.setdefault(f"{prefix}{fact}", [None] * len(commits))
                column[row] = json.dumps(value, sort_keys=True) if prefix == JSON else value
    return pa.table(
        {name: arrow_array(column, column_type(name)) for name, column in columns.items()}
    )


def _column_prefix(value: object) -> str | None:
    if type(value) is int and -INT64_LIMIT <= value < INT64_LIMIT:
        return INT
    if type(value) is float:
        return FLOAT
    return JSON if isinstance(value, dict) else None


# --- the records of a whole set -------------------------------------------------------------------

MOST_CACHED = 4096  # how many records, read one by one, are kept so as not to read them again
RECORDS_PER_READ = 1024  # records read together if all are wanted

ReadRecords = Callable[[Sequence[str]], list[Commit]]  # the records of those units


def no_records(units: Sequence[str]) -> list[Commit]:
    """Return no records: the reader of a set that holds all its records in memory."""
    assert not units
    return []


class Commits(Mapping[str, Commit]):
    """The finished units by name, in order.

    ``loaded`` are records in memory. For large sets, ``rolled_up`` is the table of the others
    (``columns_of``); ``read_records`` reads their records on demand, and the table is compared
    with them.
    """

    def __init__(
        self,
        loaded: Mapping[str, Commit],
        rolled_up: pa.Table | None = None,
        read_records: ReadRecords = no_records,
    ):
        self._loaded, self._rolled_up = dict(loaded), rolled_up
        self._read_records = read_records
        self._cached: dict[str, Commit] = {}
        self._keys = np.zeros(0, np.int64) if rolled_up is None else int_values(rolled_up, "key")

    def __reduce__(self) -> tuple[object, ...]:
        return Commits, (self._loaded, self._rolled_up, self._read_records)

    def __getitem__(self, unit: str) -> Commit:
        commit = self._loaded.get(unit) or self._cached.get(unit)
        if commit is None:
            if (row := self._row(unit)) is None:
                raise KeyError(unit)
            (commit,) = self._read_records([unit])
            self._check_rolled_up(commit, row)
            if len(self._cached) >= MOST_CACHED:
                del self._cached[next(iter(self._cached))]
            self._cached[unit] = commit
        return commit

    def _row(self, unit: str) -> int | None:
        """Return the unit's row in the table, if it has one."""
        row = int(np.searchsorted(self._keys, key := unit_key(unit)))
        return row if row < len(self._keys) and self._keys[row] == key else None

    def _check_rolled_up(self, commit: Commit, row: int) -> None:
        assert self._rolled_up is not None
        if problem := first_difference(self._rolled_up, row, commit):
            raise CacheFormatError(
                f"the commit record of {commit.path} and the roll-up of these records differ in "
                f"{problem}. The record is the one to trust: `pipeline cache-teachers --check` "
                "writes the roll-up anew"
            )

    def __contains__(self, unit: object) -> bool:
        return unit in self._loaded or (isinstance(unit, str) and self._row(unit) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table["unit"].to_pylist())

    def __len__(self) -> int:
        return len(self._loaded) + len(self._keys)

    def records(self) -> Iterator[Commit]:
        """Yield all records in the order of units; for large sets none is kept."""
        units = list(self)
        for first in range(0, len(units), RECORDS_PER_READ):
            chunk = units[first : first + RECORDS_PER_READ]
            others = iter(self._read_records([unit for unit in chunk if unit not in self._loaded]))
            for unit in chunk:
                yield self._loaded[unit] if unit in self._loaded else next(others)

    @property
    def last_commit(self) -> Commit:
        """The record of the last unit."""
        return self[self.table["unit"][-1].as_py()]

    def add(self, commit: Commit) -> None:
        """Add one more finished unit."""
        self._loaded[commit.unit] = commit
        vars(self).pop("table", None)

    # --- columns over all units -------------------------------------------------------------------

    @cached_property
    def table(self) -> pa.Table:
        """The counted fields of the units: ``columns_of``."""
        if not self._loaded and self._rolled_up is not None:
            return self._rolled_up
        loaded = columns_of(self._loaded.values(), {})
        return join_tables([loaded] if self._rolled_up is None else [self._rolled_up, loaded])

    @property
    def keys_in_order(self) -> NDArray[np.int64]:
        """The keys of the units, ascending."""
        return int_values(self.table, "key")

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of each unit."""
        return int_values(self.table, "rows")

    @property
    def bytes(self) -> int:
        """Bytes of all units."""
        return int(int_values(self.table, "bytes").sum())

    @property
    def sha256s(self) -> list[str]:
        """The sha256 of each unit's file."""
        found: list[str] = self.table["sha256"].to_pylist()
        return found

    def fingerprint(self, first_units: int) -> str:
        """Return the identity of the content of that many units: the sha256 over their digests."""
        digests = self.table["sha256"].combine_chunks()[:first_units]
        _, offsets, content = digests.buffers()
        if not len(digests) or content is None:
            return hashlib.sha256().hexdigest()
        ends = np.frombuffer(offsets, np.int32)[digests.offset :]
        return hashlib.sha256(memoryview(content)[ends[0] : ends[len(digests)]]).hexdigest()

    def count_facts(self, fact: str) -> NDArray[np.int64]:
        """Return a number for each unit; raise CacheFormatError if one lacks it."""
        column = self._fact_column(INT, fact)
        invalid = np.flatnonzero(~(np.nan_to_num(float_values(column), nan=-1) >= 0))
        if len(invalid):
            # This raises, naming the record, unless only the roll-up is wrong.
            self[self.table["unit"][int(invalid[0])].as_py()].count_fact(fact)
            raise CacheFormatError(f"the commit records do not say how many {fact} there are")
        return numpy_values(column, np.int64)

    def has_fact(self, fact: str) -> bool:
        """Return whether any unit has that fact."""
        return any(f"{kind}{fact}" in self.table.column_names for kind in (INT, FLOAT, JSON))

    def number_facts(self, fact: str) -> NDArray[np.float64]:
        """Return a number for each unit; NaN where it is missing."""
        integers, floats = (float_values(self._fact_column(kind, fact)) for kind in (INT, FLOAT))
        return np.where(np.isnan(integers), floats, integers)

    def counts_by_name(self, fact: str) -> Iterator[dict[str, Any] | None]:
        """Yield the counts by name of each unit; None where missing."""
        for text in self._fact_column(JSON, fact):
            yield json.loads(text.as_py()) if text.is_valid else None

    def _fact_column(self, kind: str, fact: str) -> pa.Array:
        name = f"{kind}{fact}"
        if name in self.table.column_names:
            return self.table[name].combine_chunks()
        return pa.nulls(len(self), pa.string() if kind == JSON else pa.float64())

    # --- which units exist ------------------------------------------------------------------------

    @property
    def leading_shards(self) -> int:
        """How many shards there are, from shard 0 on, before the first one that is missing."""
        shards = shards_among(self.keys_in_order)
        gaps = np.flatnonzero(shards != np.arange(len(shards)))
        return int(gaps[0]) if len(gaps) else len(shards)

    def missing_units(self, shards: int, replicas: Iterable[int | None]) -> list[UnitPlace]:
        """Return the missing units of the first ``shards``, replica by replica."""
        keys, numbers = self.keys_in_order, np.arange(shards)
        missing = []
        for replica in replicas:
            is_present = is_in(unit_keys(numbers, replica), keys)
            missing += [(shard, replica) for shard in np.flatnonzero(~is_present).tolist()]
        return missing

    def has_all(self, other: "Commits") -> bool:
        """Return whether every unit of ``other`` is here, too."""
        if other is self:
            return True
        other_keys = other.keys_in_order
        all_present = is_in(other_keys[other_keys < NOT_A_UNIT], self.keys_in_order).all()
        return bool(all_present) and all(
            unit in self for unit in other._loaded if unit_key(unit) == NOT_A_UNIT
        )

    def shared_with(self, others: Sequence["Commits"]) -> "Commits":
        """Return the units that all ``others`` have, too."""
        keys = self.keys_in_order
        mask = keys < NOT_A_UNIT
        for other in others:
            mask &= is_in(keys, other.keys_in_order)
        return self._select(mask)

    def select_first(self, shards: int, replicas: int) -> "Commits":
        """Return the first ``replicas`` masked replicas of each of the first ``shards`` shards."""
        keys = self.keys_in_order
        inside = keys < unit_key(unit_of(shards))
        replica = replicas_of(keys)
        return self._select(inside & (replica >= 0) & (replica < replicas))

    def shard_numbers(self) -> NDArray[np.int64]:
        """Return the existing shards, of a set without replicas."""
        return shards_among(self.keys_in_order)

    def _select(self, mask: NDArray[np.bool_]) -> "Commits":
        if mask.all():
            return self
        selected = self.table.filter(arrow_array(mask, pa.bool_()))
        if self._rolled_up is None:
            return Commits({unit: self._loaded[unit] for unit in selected["unit"].to_pylist()})
        return Commits({}, selected, self._read_records)


class ShardCommits(Sequence[Commit]):
    """The records of a corpus's shards, by shard number."""

    def __init__(self, commits: Commits):
        self.by_unit = commits
        self._count = commits.leading_shards

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        number = range(self._count)[index]
        return self.by_unit[unit_of(number)]


def first_difference(table: pa.Table, row: int, commit: Commit) -> str | None:
    """Return the first field in which a record differs from a row of the table, or None."""
    rolled_up = {name: table[name][row].as_py() for name in ("unit", "rows", "bytes", "sha256")}
    return next((name for name, value in rolled_up.items() if getattr(commit, name) != value), None)
