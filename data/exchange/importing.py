"""Write targets that were made elsewhere into a cache, as the targets of a teacher, unit by unit.

Each row is checked against its sequence before anything of it is kept. A unit is committed as soon
as all its sequences have arrived; after a kill the same rows complete the rest, and rows of
finished units are compared with what is stored.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rekindle.data.batch import read_masked
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.counted import counted
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError, naming
from rekindle.data.exchange.config import ImportConfig
from rekindle.data.exchange.expected import expected_positions, may_have_targets, view_name
from rekindle.data.exchange.label_rows import LabelRows
from rekindle.data.exchange.logprobs import expand_row
from rekindle.data.exchange.rows import Row, SequencePlace, check_shown, place_of, tokens_of
from rekindle.data.exchange.token_rows import TopKRows
from rekindle.data.exchange.vector_rows import VectorRows
from rekindle.data.inventory import info_from_shards, is_imported, roll_up_records
from rekindle.data.journal import adding
from rekindle.data.storage.manifest import raise_version
from rekindle.data.storage.seal import WITH_IMPORTS, describe_damage
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import UnitPlace, unit_of
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.imported import EXPECTED
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import VOCABULARY_TASKS, TeacherInfo
from rekindle.data.views.reader import ViewReader, shown_view
from rekindle.data.views.registry import view_kind
from rekindle.data.writing import check_name, claim_teacher, write_targets

log = logging.getLogger("rekindle")

RowParser = TopKRows | LabelRows | VectorRows

OPEN_UNITS = 4  # units whose expected positions are held


@dataclass
class ImportResult:
    """What an import did."""

    info: TeacherInfo
    rows: int = 0
    positions: int = 0
    units_done: int = 0
    units_present: int = 0
    repaired: int = 0
    missing: int = 0  # sequences without a row, if allowed
    noticed: list[str] = field(default_factory=list)

    def as_text(self) -> str:
        """Return a summary for people."""
        info = self.info
        lines = [
            f"teacher {info.name}: {kind_of(info).description}; {counted(self.rows, 'row')}, "
            f"{counted(self.positions, 'target')}; {counted(self.units_done, 'unit')} made, "
            f"{self.units_present} already there (unit: a teacher's file)"
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.noticed)])


def import_targets(
    corpus: Corpus,
    rows: Iterable[tuple[str, Row]],
    config: ImportConfig,
    progress: Callable[[int], None] = lambda rows: None,
) -> ImportResult:
    """Check ``rows`` and write their targets; docs/targets_elsewhere.md says what each must have.

    Each row comes with its name for messages (``numbered``); ``progress`` is called with the number
    of rows taken since the last call. Raises InputError, naming the row, for a wrong one: units
    that were complete before it are kept. Raises CacheMismatchError if the cache has another
    teacher of that name, or other targets of this one.
    """
    if corpus.is_packed:
        raise InputError(
            "the corpus has several documents in a sequence, with attention within each "
            "(corpus.packing: packed), but targets that were made elsewhere saw a sequence as "
            "one text. Import them into a cache with packing: document"
        )
    with adding(corpus.store) as is_alone:
        may_repair = is_alone is not False  # None: the store cannot tell, which counts as alone
        job = _Import(corpus, config, may_repair)
        for name, row in rows:
            with naming(name):
                job.take(name, row)
            progress(1)
        result = job.finish()
        if may_repair:  # no other process removes records meanwhile
            roll_up_records(corpus.store)
        return result


def numbered(rows: Iterable[Row], source: str = "rows") -> Iterator[tuple[str, Row]]:
    """Yield the rows of ``source``, each with its name there."""
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


class _Import:
    """An unfinished import: its rows so far, by unit."""

    def __init__(self, corpus: Corpus, config: ImportConfig, may_repair: bool):
        self.corpus, self.config = corpus, config
        self.view_name = view_name(corpus, config)
        self.view: ViewReader | None = shown_view(corpus, self.view_name)
        is_masked = view_kind(self.view_name).masked
        self.replicas = self.view.replicas if is_masked and self.view else None
        repaired = _forget_damaged(corpus, config.name) if may_repair else 0
        if is_described(corpus.store, config.name):
            self.existing: TeacherInfo | None = read_teacher(corpus.store, config.name)
        else:  # its description may have been lost
            self.existing = info_from_shards(corpus.store, config.name)
        self.parser: RowParser | None = None
        self.waiting: list[tuple[str, Row]] = []  # rows before the first that has a position
        self.pending: dict[UnitPlace, dict[int, Columns]] = {}
        self.arrived: dict[UnitPlace, NDArray[np.bool_]] = {}  # the sequences that have arrived
        self.expected: OrderedDict[UnitPlace, list[NDArray[np.int64]]] = OrderedDict()
        self.stored: TeacherReader | None = None
        self.finished_units: set[str] = set()
        self.counts = {"rows": 0, "positions": 0, "made": 0, "repaired": repaired}
        if config.task not in (*VOCABULARY_TASKS, "embedding"):
            self._begin(LabelRows.begin(corpus, config, self.view_name))

    # --- the first row decides what all have ------------------------------------------------------

    def _begin(self, parser: RowParser) -> None:
        self.parser = parser
        self.finished_units = {*ShardSet(self.corpus.store, parser.info.folder).committed()}
        check_name(self.corpus, self.existing, parser.info)
        if self.finished_units:
            claim_teacher(self.corpus, parser.info)  # unless its description is there
            self.stored = self._stored_reader(parser.info)

    def _stored_reader(self, info: TeacherInfo) -> TeacherReader:
        """Return a reader of the units that are there now."""
        return TeacherReader(self.corpus, [info], self.view)

    def take(self, name: str, row: Row) -> None:
        """Take one row; commit the unit that it completes."""
        if not isinstance(row, Mapping):
            raise InputError(f"must be a mapping of fields (given: a {type(row).__name__})")
        if self.parser is None and self.config.task == "embedding":
            self._begin(VectorRows.begin(self.corpus, self.config, self.view_name, row))
        if self.parser is None:
            place = place_of(row, self.corpus, self.replicas)
            known = self.existing.k if self.existing else None
            tokens = tokens_of(self.corpus, (place.shard, place.row))
            expanded = expand_row(row, tokens, self.config.task)
            k = self.config.k or known
            view = (self.view_name, self._target_share)
            parser = TopKRows.begin(self.corpus, self.config, view, k, expanded)
            if parser is None:
                self.waiting.append((name, row))
                return
            self._begin(parser)
            waiting, self.waiting = self.waiting, []
            for earlier_name, earlier_row in waiting:
                with naming(earlier_name):
                    self._take(earlier_row)
        self._take(row)

    # --- every row --------------------------------------------------------------------------------

    def _take(self, row: Row) -> None:
        assert self.parser is not None
        place = place_of(row, self.corpus, self.replicas)
        unit = (place.shard, place.replica)
        arrived = self._arrived(unit)
        if arrived[place.row]:
            self._raise_not_needed(place)
        tokens = tokens_of(self.corpus, (place.shard, place.row))
        if self.parser.info.is_vocabulary:
            check_shown(row, self._shown_ids(place, tokens), place)
        expanded = expand_row(row, tokens, self.config.task)
        columns = self.parser.columns(expanded, tokens, self._expected(unit)[place.row])
        arrived[place.row] = True
        self.counts["rows"] += 1
        self.counts["positions"] += _length(columns)
        if unit_of(*unit) in self.finished_units:
            self._compare(place, columns)
            return
        pending = self.pending.setdefault(unit, {})
        pending[place.row] = columns
        if arrived.all():
            self._write(unit)

    @property
    def _target_share(self) -> float:
        """Return the approximate largest share of a sequence's tokens with a target."""
        masks = self.view.identity.get("mask", {}) if self.view else {}
        return float(masks.get("probability", 1.0))

    def _arrived(self, unit: UnitPlace) -> NDArray[np.bool_]:
        """Return which sequences of a unit have arrived, or cannot have a target."""
        if unit not in self.arrived:
            self.arrived[unit] = ~may_have_targets(self.corpus, self.view, unit[0])
        return self.arrived[unit]

    def _raise_not_needed(self, place: SequencePlace) -> None:
        if may_have_targets(self.corpus, self.view, place.shard)[place.row]:
            raise InputError(f"sequence {place.index} already had a row; give only one of the two")
        raise InputError(
            f"sequence {place.index} has no pair of texts in {self.view_name}, so nothing of it "
            "was shown; leave its row out"
        )

    def _expected(self, unit: UnitPlace) -> list[NDArray[np.int64]]:
        """Return where each row of a unit has a target, or may have one."""
        if unit not in self.expected:
            assert self.parser is not None
            positions = expected_positions(self.corpus, self.parser.info, self.view, unit)
            self.expected[unit] = positions
            while len(self.expected) > OPEN_UNITS:
                self.expected.popitem(last=False)
        return self.expected[unit]

    def _shown_ids(self, place: SequencePlace, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the tokens of a sequence as the model saw them."""
        if place.replica is None or self.view is None:
            return tokens
        places = [(place.shard, place.row)]
        return read_masked(self.view, places, tokens[None], place.replica).input_ids[0]

    def _compare(self, place: SequencePlace, columns: Columns) -> None:
        """Compare a row's targets with those of a finished unit."""
        assert self.parser is not None
        if self.stored is None:  # written by this import, which takes one row per sequence
            return
        lists, start, end = self.stored.cut((place.shard, place.row), place.replica)
        if any(
            not np.array_equal(lists.columns[name][start:end], values)
            for name, values in columns.items()
        ):
            raise CacheMismatchError(
                f"sequence {place.index}: the cache has other targets of teacher "
                f"{self.config.name!r} for it, and its unit is finished. Give the same rows as "
                "when it was begun, import these under another name, or delete "
                f"{self.parser.info.folder} to import again"
            )

    def _write(self, unit: UnitPlace) -> None:
        assert self.parser is not None
        if isinstance(self.parser, TopKRows):
            self.parser.alignment.check()
        info, pending = self.parser.info, self.pending.pop(unit)
        self.finished_units.add(unit_of(*unit))
        if ShardSet(self.corpus.store, info.folder).has(unit_of(*unit)):  # another import was first
            self.stored, first_index = self._stored_reader(info), self.corpus.first(unit[0])
            for row, columns in pending.items():
                self._compare(SequencePlace(first_index + row, unit[0], row, unit[1]), columns)
            return
        ordered = sorted(pending)
        counts = np.array([_length(pending[row]) for row in ordered], np.int64)
        rows = np.repeat(np.array(ordered, np.int64), counts)
        names = pending[ordered[0]] if ordered else ()
        columns = {name: np.concatenate([pending[row][name] for row in ordered]) for name in names}
        if kind_of(info).per_sequence:
            facts = {EXPECTED: int(may_have_targets(self.corpus, self.view, unit[0]).sum())}
        else:
            facts = {EXPECTED: sum(len(positions) for positions in self._expected(unit))}
        raise_version(self.corpus.store, WITH_IMPORTS)
        write_targets(info, self.corpus, unit, rows, columns, facts)
        self.counts["made"] += 1

    # --- the end ----------------------------------------------------------------------------------

    def finish(self) -> ImportResult:
        """Write the units in which rows are missing; return what was done."""
        if self.parser is None or not self.counts["rows"]:
            raise InputError(
                "no row has a target, so there is nothing to import"
                if self.waiting
                else "there are no rows, so there is nothing to import"
            )
        replicas = [None] if self.replicas is None else range(self.replicas)
        planned = [(s, r) for r in replicas for s in range(len(self.corpus.commits))]
        missing: list[tuple[int, int | None]] = []  # sequence, replica
        for unit in planned:
            if unit_of(*unit) not in self.finished_units:
                missing_rows = np.flatnonzero(~self._arrived(unit))
                if not len(missing_rows):  # none of its sequences can have a target
                    self.pending[unit] = {}
                first_index = self.corpus.first(unit[0])
                missing += [(first_index + int(row), unit[1]) for row in missing_rows]
        if missing and not self.config.allow_missing:
            raise InputError(_describe_missing(missing, self.finished_units))
        for unit in sorted(self.pending, key=lambda unit: (unit[1] or 0, unit[0])):
            self._write(unit)
        facts, notes = self.counts, self._notes(len(missing))
        present = len(self.finished_units & {unit_of(*unit) for unit in planned}) - facts["made"]
        return ImportResult(
            self.parser.info,
            facts["rows"],
            facts["positions"],
            facts["made"],
            present,
            facts["repaired"],
            len(missing),
            notes,
        )

    def _notes(self, missing: int) -> list[str]:
        notes = self.parser.notes() if isinstance(self.parser, LabelRows | VectorRows) else []
        if isinstance(self.parser, TopKRows):
            info = self.parser.info
            lacks = info.imported.lacks if info.imported else ()
            notes += self.parser.noticed.sentences(self.parser.k)
            if info.estimator["tail"] == "derived":
                notes.append("tails are 1 minus the candidates, in float64 (no log_tail given)")
            if info.temperatures != (1.0,):
                listed = ", ".join(f"{at:g}" for at in info.temperatures)
                notes.append(f"a student can be trained at the temperatures {listed}")
            if lacks:
                notes.append(
                    f"not given, and so not stored: {', '.join(lacks)} (curricula need them to "
                    "score sequences)"
                )
        if missing:
            notes.append(
                f"{counted(missing, 'sequence')} without a row; name the teacher in "
                "train.allow_missing to train them without it"
            )
        return notes


def _describe_missing(missing: list[tuple[int, int | None]], finished_units: set[str]) -> str:
    sequences = [f"{n}" + ("" if r is None else f" (replica {r})") for n, r in missing[:5]]
    listed = ", ".join(sequences) + (", …" if len(missing) > 5 else "")
    return (
        f"{counted(len(missing), 'sequence')} of the cache without a row: {listed}. Complete units "
        f"are kept ({counted(len(finished_units), 'unit')}). Give the other rows too, with the "
        "same command or another one, or allow that they are missing (allow_missing, "
        "--allow-missing)"
    )


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _forget_damaged(corpus: Corpus, name: str) -> int:
    """Forget the damaged files of the teacher, so that they are imported again; return how many."""
    store, folder = corpus.store, f"targets/{name}"
    described, count = is_described(store, name), 0
    if store.names(f"{folder}/commits") and not described and not is_imported(store, name):
        raise CacheFormatError(
            f"{store.location}/{folder} has targets, but not the description of their teacher: "
            "`pipeline cache-teachers` with the configuration they were made with restores it. "
            "Import under another name"
        )
    if described:
        try:
            if read_teacher(store, name).imported is None:
                return 0  # `cache-teachers` repairs it
        except CacheFormatError as error:
            if not is_imported(store, name):
                raise
            log.warning("%s: made again", describe_damage(error).rstrip("."))
            store.discard(f"{folder}/teacher.json")
            count += 1
    shards = ShardSet(store, folder)
    check = shards.check if isinstance(store, LocalStore) else None
    for unit, problem in shards.survey(check)[1].items():
        log.warning("%s: made again", describe_damage(problem).rstrip("."))
        shards.forget(unit)
        count += 1
    return count
