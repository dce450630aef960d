"""The commit records of a set, and their roll-up for large sets.

The records are the only proof that a unit is done. For a set of UNITS or more, ``records.arrow``
repeats their counted fields (``columns_of``), so that a cache can be opened without reading a
million records; ``records.json``, written after it, has its checksum. Both can be removed at any
time.

The roll-up is trusted about a unit if the commits folder is unchanged since it was written (local
folders, by their modification time), or if a listing of the folder has the unit's record (in object
stores, with the same ETag). Some records are read and compared each time, so that a roll-up of
another set is not trusted; and opening a unit reads its record. All other records are read, and the
next stage 1 writes the roll-up again.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from rekindle.data.counted import counted
from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.storage.base import Store
from rekindle.data.storage.commits import Commit, Commits, columns_of, difference
from rekindle.data.storage.manifest import raise_version
from rekindle.data.storage.seal import REPAIR, WITH_ROLL_UPS, read_sealed, seal
from rekindle.data.storage.units import (
    FIELDS,
    STRANGE,
    array_of,
    joined,
    key_of,
    numbers_in,
    order_of,
    type_of,
)

log = logging.getLogger("rekindle")

UNITS = 1024  # smaller sets have no roll-up
CHUNK = 8192  # records read before they become rows
SAMPLED = 8  # records compared with a roll-up whenever it is read
# seconds after which a folder's time distinguishes a further change from the last one
SETTLED = 2.0
JSON = ".json"
RECORDS, ABOUT = "records.arrow", "records.json"

Check = Callable[[Commit], object]
Damaged = dict[str, CacheFormatError]


class Records:
    """The commit records of the set in ``folder``."""

    def __init__(self, store: Store, folder: str):
        self.store, self.folder = store, folder
        self.commits = f"{folder}/commits"

    def read(self, unit: str) -> Commit:
        """Return the record of one finished unit."""
        return self._parse(unit, self.store.read_bytes(f"{self.commits}/{unit}.json"))

    def read_many(self, units: Sequence[str]) -> list[Commit]:
        """Return the records of those units."""
        return [self._parse(*one) for one in zip(units, self._contents(units), strict=True)]

    def _contents(self, units: Sequence[str]) -> list[bytes]:
        return self.store.read_many([f"{self.commits}/{unit}.json" for unit in units])

    def _parse(self, unit: str, content: bytes) -> Commit:
        name = f"{self.commits}/{unit}.json"
        body = self.store.parse_json(name, content)
        commit = Commit.from_json(body, f"{self.store.location}/{name}")
        if commit.unit != unit:
            raise CacheFormatError(f"the commit record {name} names unit {commit.unit!r}")
        return commit

    def survey(self, check: Check | None = None) -> tuple[Commits, Damaged]:
        """Return the finished units, and the errors of units with a damaged record or that fail
        ``check``, which raises CacheFormatError. With ``check``, every record is read.
        """
        found = self._survey(check)
        return found.commits, found.damaged

    def _survey(self, check: Check | None, settle: bool = False) -> "_Survey":
        """Do ``survey``. ``settle``: wait until the modification time of a large set's folder will
        show every later change; a change within the same clock tick would not show.
        """
        state, began = self.store.folder_state(self.commits), time.time()
        rolled = self._rolled_up() if check is None and state else None
        if rolled and rolled.state == state and self._agrees(rolled.table):
            return _Survey(Commits({}, rolled.table, self.read_many), {}, True, state)
        listed = _table_of(self.store.listing(self.commits))
        large = len(listed) >= UNITS
        unsettled = SETTLED - (began - int(state) / 1e9) if state else 0.0
        if settle and large and 0 < unsettled <= SETTLED:
            time.sleep(unsettled)
            return self._survey(check)
        if check is None and large and not state:
            rolled = self._rolled_up()
        believed = rolled.table.filter(_as_listed(rolled.table, listed)) if rolled else None
        if believed is not None and not (len(believed) and self._agrees(believed)):
            believed = None
        fresh = listed
        if believed is not None:
            known = pc.index_in(listed["unit"], value_set=believed["unit"].combine_chunks())
            fresh = listed.filter(pc.is_null(known))
        states = dict(zip(fresh["unit"].to_pylist(), fresh["state"].to_pylist(), strict=True))
        held, tables, damaged = self._read_all(sorted(states, key=order_of), states, check, large)
        if believed is not None:
            tables.append(believed)
        same = rolled is not None and len(rolled.table) == len(believed or ()) == len(listed)
        rest = joined(tables) if tables else None
        told = state if unsettled <= 0 else ""
        return _Survey(Commits(held, rest, self.read_many), damaged, same and not state, told)

    def _read_all(
        self, units: Sequence[str], states: Mapping[str, str], check: Check | None, large: bool
    ) -> tuple[dict[str, Commit], list[pa.Table], Damaged]:
        """Read ``units``: return records that stay in memory, tables of the others, and the damaged
        ones.
        """
        held: dict[str, Commit] = {}
        tables: list[pa.Table] = []
        damaged: Damaged = {}
        if len(units) >= UNITS:
            log.info("%s: reading %s", self.commits, counted(len(units), "commit record"))
        for first in range(0, len(units), CHUNK):
            part, sound = units[first : first + CHUNK], []
            for unit, content in zip(part, self._contents(part), strict=True):
                try:
                    commit = self._parse(unit, content)
                    if check is not None:
                        check(commit)
                except CacheFormatError as error:
                    damaged[unit] = error
                    continue
                if large and key_of(unit) != STRANGE:
                    sound.append(commit)
                else:
                    held[unit] = commit
            if sound:
                tables.append(columns_of(sound, states))
        return held, tables, damaged

    # --- the roll-up ------------------------------------------------------------------------------

    def roll_up(self) -> None:
        """Write the fields of a large set's records to one file, unless it exists.

        Skips a store that cannot be written to, a set with damaged records, and one with names that
        are not units' names, which would be missed.
        """
        found = self._survey(None, settle=True)
        commits = found.commits
        strangers = commits.keys_in_order[-1:] == STRANGE
        if found.damaged or len(commits) < UNITS or strangers.any():
            return
        try:
            raise_version(self.store, WITH_ROLL_UPS)
            if not found.same:
                self._write(commits.table, found.state)
        except InputError as error:
            log.info("the commit records of %s are not rolled up: %s", self.folder, error)

    def _write(self, table: pa.Table, state: str) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        content = sink.getvalue().to_pybytes()
        about = {"folder": self.folder, "state": state, "xxh3": xxhash.xxh3_64_hexdigest(content)}
        self.store.replace(f"{self.folder}/{RECORDS}", content)
        self.store.replace(f"{self.folder}/{ABOUT}", seal(about, WITH_ROLL_UPS))

    def _rolled_up(self) -> "_RollUp | None":
        """Return the roll-up, a table of units in order, if there is one and it is whole."""
        with suppress(FileNotFoundError, CacheFormatError, pa.ArrowException):
            about = read_sealed(self.store, f"{self.folder}/{ABOUT}")
            content = pa.py_buffer(self.store.view(f"{self.folder}/{RECORDS}"))
            if about.get("xxh3") != xxhash.xxh3_64_hexdigest(content):
                return None
            table = pa.ipc.open_file(content).read_all()
            table.validate(full=True)
            if _is_of_units(table):
                return _RollUp(table, str(about.get("state", "")))
        return None

    def _agrees(self, table: pa.Table) -> bool:
        """Return whether SAMPLED of its units have matching records."""
        rows = {*np.linspace(0, len(table) - 1, SAMPLED).astype(int).tolist()} if table else ()
        try:
            commits = self.read_many([table["unit"][row].as_py() for row in rows])
        except (FileNotFoundError, CacheFormatError):
            return False
        return not any(map(difference, repeat(table), rows, commits))

    def wrongly_rolled_up(self, sound: Commits) -> CacheFormatError | None:
        """Return what is wrong with a roll-up that would be trusted, given the ``sound``
        records.
        """
        rolled = self._rolled_up()
        if rolled is None:
            return None
        believed = self._survey(None).commits.table
        columns = [name for name in believed.column_names if name != "state"]
        names = {*sound.table.column_names} - {"state"}
        if names == {*columns} and believed.select(columns).equals(sound.table.select(columns)):
            return None
        return CacheFormatError(
            f"{self.store.location}/{self.folder}/{RECORDS} does not repeat the commit records. "
            f"{REPAIR}"
        )

    def forget_roll_up(self) -> None:
        """Remove it, before a record is taken back or if it is wrong."""
        for name in (ABOUT, RECORDS):
            self.store.discard(f"{self.folder}/{name}")


@dataclass(frozen=True)
class _RollUp:
    table: pa.Table
    state: str  # of the commits folder, if it shows every change


@dataclass(frozen=True)
class _Survey:
    commits: Commits
    damaged: Damaged
    same: bool  # whether the roll-up exists already
    state: str  # of the commits folder before the listing, if it shows every change


def _is_of_units(table: pa.Table) -> bool:
    types = {field.name: field.type for field in table.schema}
    known = all(type_of(name) == dtype for name, dtype in types.items())
    if not known or not FIELDS.keys() <= types.keys():
        return False
    keys = numbers_in(table, "key") if not table["key"].null_count else np.zeros(0)
    ascend = len(keys) and keys[0] >= 0 and keys[-1] < STRANGE and (keys[1:] > keys[:-1]).all()
    return bool(ascend) and not any(table[name].null_count for name in FIELDS)


def _table_of(listing: Mapping[str, str]) -> pa.Table:
    """Return the units whose records were listed, with the states of these records."""
    found = {"unit": [*listing], "state": [*listing.values()]}
    table = pa.table({name: array_of(of, pa.string()) for name, of in found.items()})
    table = table.filter(pc.ends_with(table["unit"], JSON))
    return table.set_column(0, "unit", pc.utf8_slice_codeunits(table["unit"], 0, -len(JSON)))


def _as_listed(table: pa.Table, listed: pa.Table) -> pa.Array:
    """Return which units have a record in the state the roll-up knows."""
    found = pc.index_in(table["unit"], value_set=listed["unit"].combine_chunks()).combine_chunks()
    return pc.equal(listed["state"].take(found), table["state"])  # null if it has none
