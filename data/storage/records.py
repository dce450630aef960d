"""The commit records of a set, and their roll-up for large sets.

The records are the only proof that a unit is done. For a set of MIN_UNITS or more,
``records.arrow`` repeats their counted fields (``columns_of``), so that a cache can be opened
without reading a million records; ``records.json``, written after it, has its checksum. Both can be
removed at any time.

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
from rekindle.data.storage.commits import Commit, Commits, columns_of, first_difference
from rekindle.data.storage.manifest import raise_version
from rekindle.data.storage.seal import REPAIR, WITH_ROLL_UPS, read_sealed, seal
from rekindle.data.storage.units import (
    FIELDS,
    NOT_A_UNIT,
    arrow_array,
    column_type,
    int_values,
    join_tables,
    sort_key,
    unit_key,
)

log = logging.getLogger("rekindle")

MIN_UNITS = 1024  # smaller sets have no roll-up
RECORDS_PER_CHUNK = 8192  # records read before they become rows
SAMPLE_COUNT = 8  # records compared with a roll-up whenever it is read
# seconds after which a folder's time distinguishes a further change from the last one
SETTLE_SECONDS = 2.0
JSON = ".json"
ROLL_UP_TABLE, ROLL_UP_ABOUT = "records.arrow", "records.json"

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
        existing = self._read_roll_up() if check is None and state else None
        if existing and existing.state == state and self._matches_records(existing.table):
            return _Survey(Commits({}, existing.table, self.read_many), {}, True, state)
        listed = _listing_table(self.store.listing(self.commits))
        is_large = len(listed) >= MIN_UNITS
        unsettled = SETTLE_SECONDS - (began - int(state) / 1e9) if state else 0.0
        if settle and is_large and 0 < unsettled <= SETTLE_SECONDS:
            time.sleep(unsettled)
            return self._survey(check)
        if check is None and is_large and not state:
            existing = self._read_roll_up()
        trusted = None
        if existing:
            trusted = existing.table.filter(_matches_listing(existing.table, listed))
        if trusted is not None and not (len(trusted) and self._matches_records(trusted)):
            trusted = None
        unread = listed
        if trusted is not None:
            trusted_rows = pc.index_in(listed["unit"], value_set=trusted["unit"].combine_chunks())
            unread = listed.filter(pc.is_null(trusted_rows))
        states = dict(zip(unread["unit"].to_pylist(), unread["state"].to_pylist(), strict=True))
        loaded, tables, damaged = self._read_all(
            sorted(states, key=sort_key), states, check, is_large
        )
        if trusted is not None:
            tables.append(trusted)
        sizes = {len(listed), len(trusted or ()), len(existing.table) if existing else -1}
        is_current = len(sizes) == 1 and not state
        commits = Commits(loaded, join_tables(tables) if tables else None, self.read_many)
        return _Survey(commits, damaged, is_current, state if unsettled <= 0 else "")

    def _read_all(
        self, units: Sequence[str], states: Mapping[str, str], check: Check | None, is_large: bool
    ) -> tuple[dict[str, Commit], list[pa.Table], Damaged]:
        """Read ``units``: return records that stay in memory, tables of the others, and the damaged
        ones.
        """
        loaded: dict[str, Commit] = {}
        tables: list[pa.Table] = []
        damaged: Damaged = {}
        if len(units) >= MIN_UNITS:
            log.info("%s: reading %s", self.commits, counted(len(units), "commit record"))
        for first in range(0, len(units), RECORDS_PER_CHUNK):
            chunk, sound = units[first : first + RECORDS_PER_CHUNK], []
            for unit, content in zip(chunk, self._contents(chunk), strict=True):
                try:
                    commit = self._parse(unit, content)
                    if check is not None:
                        check(commit)
                except CacheFormatError as error:
                    damaged[unit] = error
                    continue
                if is_large and unit_key(unit) != NOT_A_UNIT:
                    sound.append(commit)
                else:
                    loaded[unit] = commit
            if sound:
                tables.append(columns_of(sound, states))
        return loaded, tables, damaged

    # --- the roll-up ------------------------------------------------------------------------------

    def roll_up(self) -> None:
        """Write the fields of a large set's records to one file, unless it exists.

        Skips a store that cannot be written to, a set with damaged records, and one with names that
        are not units' names, which would be missed.
        """
        survey = self._survey(None, settle=True)
        commits = survey.commits
        has_foreign = commits.keys_in_order[-1:] == NOT_A_UNIT
        if survey.damaged or len(commits) < MIN_UNITS or has_foreign.any():
            return
        try:
            raise_version(self.store, WITH_ROLL_UPS)
            if not survey.is_current:
                self._write(commits.table, survey.state)
        except InputError as error:
            log.info("the commit records of %s are not rolled up: %s", self.folder, error)

    def _write(self, table: pa.Table, state: str) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        content = sink.getvalue().to_pybytes()
        digest = xxhash.xxh3_64_hexdigest(content)
        description = {"folder": self.folder, "state": state, "xxh3": digest}
        self.store.replace(f"{self.folder}/{ROLL_UP_TABLE}", content)
        self.store.replace(f"{self.folder}/{ROLL_UP_ABOUT}", seal(description, WITH_ROLL_UPS))

    def _read_roll_up(self) -> "_RollUp | None":
        """Return the roll-up, a table of units in order, if there is one and it is whole."""
        with suppress(FileNotFoundError, CacheFormatError, pa.ArrowException):
            description = read_sealed(self.store, f"{self.folder}/{ROLL_UP_ABOUT}")
            content = pa.py_buffer(self.store.view(f"{self.folder}/{ROLL_UP_TABLE}"))
            if description.get("xxh3") != xxhash.xxh3_64_hexdigest(content):
                return None
            table = pa.ipc.open_file(content).read_all()
            table.validate(full=True)
            if _is_valid_table(table):
                return _RollUp(table, str(description.get("state", "")))
        return None

    def _matches_records(self, table: pa.Table) -> bool:
        """Return whether SAMPLE_COUNT of its units have matching records."""
        rows = {*np.linspace(0, len(table) - 1, SAMPLE_COUNT).astype(int).tolist()} if table else ()
        try:
            commits = self.read_many([table["unit"][row].as_py() for row in rows])
        except (FileNotFoundError, CacheFormatError):
            return False
        return not any(map(first_difference, repeat(table), rows, commits))

    def roll_up_error(self, sound: Commits) -> CacheFormatError | None:
        """Return what is wrong with a roll-up that would be trusted, given the ``sound``
        records.
        """
        existing = self._read_roll_up()
        if existing is None:
            return None
        trusted = self._survey(None).commits.table
        columns = [name for name in trusted.column_names if name != "state"]
        names = {*sound.table.column_names} - {"state"}
        if names == {*columns} and trusted.select(columns).equals(sound.table.select(columns)):
            return None
        return CacheFormatError(
            f"{self.store.location}/{self.folder}/{ROLL_UP_TABLE} does not repeat the commit "
            f"records. {REPAIR}"
        )

    def forget_roll_up(self) -> None:
        """Remove it, before a record is taken back or if it is wrong."""
        for name in (ROLL_UP_ABOUT, ROLL_UP_TABLE):
            self.store.discard(f"{self.folder}/{name}")


@dataclass(frozen=True)
class _RollUp:
    table: pa.Table
    state: str  # of the commits folder, if it shows every change


@dataclass(frozen=True)
class _Survey:
    commits: Commits
    damaged: Damaged
    is_current: bool  # whether the roll-up on disk says the same
    state: str  # of the commits folder before the listing, if it shows every change


def _is_valid_table(table: pa.Table) -> bool:
    types = {field.name: field.type for field in table.schema}
    known = all(column_type(name) == dtype for name, dtype in types.items())
    if not known or not FIELDS.keys() <= types.keys():
        return False
    keys = int_values(table, "key") if not table["key"].null_count else np.zeros(0)
    ascend = len(keys) and keys[0] >= 0 and keys[-1] < NOT_A_UNIT and (keys[1:] > keys[:-1]).all()
    return bool(ascend) and not any(table[name].null_count for name in FIELDS)


def _listing_table(listing: Mapping[str, str]) -> pa.Table:
    """Return the units whose records were listed, with the states of these records."""
    columns = {"unit": [*listing], "state": [*listing.values()]}
    table = pa.table({name: arrow_array(of, pa.string()) for name, of in columns.items()})
    table = table.filter(pc.ends_with(table["unit"], JSON))
    return table.set_column(0, "unit", pc.utf8_slice_codeunits(table["unit"], 0, -len(JSON)))


def _matches_listing(table: pa.Table, listed: pa.Table) -> pa.Array:
    """Return which units have a record in the state the roll-up knows."""
    rows = pc.index_in(table["unit"], value_set=listed["unit"].combine_chunks()).combine_chunks()
    return pc.equal(listed["state"].take(rows), table["state"])  # null if it has none
