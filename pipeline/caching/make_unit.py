"""Make a unit of a teacher's targets: compute it, write its shard, commit it.

Several processes may work on one cache, also on several machines: each checks, before it begins a
unit, whether another has committed it. Two that make the same unit do no harm.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.commits import SECONDS
from rekindle.data.storage.manifest import raise_version
from rekindle.data.storage.seal import WITH_SERVED
from rekindle.data.storage.shards import Commit, ShardSet
from rekindle.data.storage.store import open_store
from rekindle.data.targets.head import write_head
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.writing import claim_teacher, write_targets
from rekindle.pipeline.caching.compute_unit import Steps, Unit, UnitResult, begin_unit, run_unit
from rekindle.pipeline.caching.model_parallel import receive_message, send_message
from rekindle.pipeline.caching.served_units import ServedTeacher
from rekindle.pipeline.caching.teachers import Teacher, TeacherPlan


class UnitRunner:
    """A loaded model and all it needs to make units of one part of a teacher's targets, or of
    several teachers that share its passes.
    """

    def __init__(self, plans: Sequence[TeacherPlan], corpus: Corpus):
        self.corpus = corpus
        first = Teacher(plans[0], corpus)
        self.teachers = [first, *(first.with_plan(plan) for plan in plans[1:])]
        self.heads = {
            teacher.info.name: teacher.output_matrix()
            for teacher in self.teachers
            if kind_of(teacher.info).has_head
        }
        self.plans, info = plans, first.info
        self.id_reader = None  # reads the part whose ids the tails belong to
        if info.extends is not None:
            main = read_teacher(corpus.store, info.name, info.extends)
            self.id_reader = TeacherReader(corpus, [main], first.view)

    def store_lost_heads(self) -> None:
        """Write again the output matrices that described teachers have lost."""
        for teacher in self.teachers:
            if is_described(self.corpus.store, teacher.info.name):
                self._store_head(teacher.info)

    def __call__(self, unit: Unit) -> dict[str, Commit]:
        """As ``make``."""
        return self.make(unit)

    def make(self, unit: Unit) -> dict[str, Commit]:
        """Compute, write and commit a unit of each teacher that lacks it, so that a kill costs at
        most one unit; return the commits by the teachers' names.

        Skips a teacher for which another process has made the unit meanwhile: two processes started
        on one cache share the work.
        """
        teachers = self._teachers_without(unit)
        if not teachers:
            return {}
        start_time = time.perf_counter()
        if self.is_split:
            send_message(unit)
        result = self.run(unit, teachers)
        return self._write(unit, teachers, result, time.perf_counter() - start_time)

    def run_many(self, units: Iterable[Unit]) -> Iterator[dict[str, Commit]]:
        """Make units as ``make`` does, in their order.

        A device that runs beside the host is given a unit's first batch before the last results of
        the unit before are fetched, and a thread writes meanwhile: a kill costs at most two units
        and a begun third.
        """
        if self.teachers[0].transfer.max_in_flight == 1 or self.is_split:
            yield from map(self.make, units)
            return
        writes = deque[Future[dict[str, Commit]]]()
        with ThreadPoolExecutor(1, "write") as writer:
            for unit_passes, result, seconds in overlapped(map(self._passes_of, units)):
                writes.append(
                    writer.submit(
                        self._write, unit_passes.unit, unit_passes.teachers, result, seconds
                    )
                )
                while len(writes) > 1:  # at most one unit waits to be written
                    yield writes.popleft().result()
            while writes:
                yield writes.popleft().result()

    def _passes_of(self, unit: Unit) -> "_Passes":
        """Return the passes that a unit needs; none if all teachers have it."""
        teachers = self._teachers_without(unit)
        if not teachers:
            return _Passes(unit, teachers, iter(()), _EMPTY)
        return _Passes(
            unit,
            teachers,
            begin_unit(teachers[0], unit, stored=self.id_reader, others=teachers[1:]),
        )

    def _teachers_without(self, unit: Unit) -> list[Teacher]:
        """Return the teachers that lack this unit."""
        store = self.corpus.store
        return [t for t in self.teachers if not ShardSet(store, t.info.folder).has(unit.name)]

    def _write(
        self, unit: Unit, teachers: Sequence[Teacher], result: UnitResult, seconds: float
    ) -> dict[str, Commit]:
        """Write a unit of ``teachers``, from passes that took ``seconds``."""
        if not teachers:
            return {}
        # Each is charged its part of the passes, and the writing of its own file.
        seconds_each, commits = seconds / len(teachers), {}
        for teacher, teacher_result in zip(teachers, (result, *result.others), strict=True):
            start_time = time.perf_counter() - seconds_each
            self._store_head(teacher.info)
            commits[teacher.info.name] = write_unit(
                teacher.info, self.corpus, unit, teacher_result, start_time
            )
        return commits

    @property
    def is_split(self) -> bool:
        """Whether other processes make a part of each pass."""
        return self.plans[0].config.tp_plan is not None

    def run(self, unit: Unit, teachers: Sequence[Teacher]) -> UnitResult:
        """Compute a unit of teachers that share its passes; write nothing."""
        first, *others = teachers
        return run_unit(first, unit, stored=self.id_reader, others=others)

    def _store_head(self, info: TeacherInfo) -> None:
        """Store the matrix after the teacher's description, and before any unit."""
        if (head := self.heads.pop(info.name, None)) is not None:
            claim_teacher(self.corpus, info)
            write_head(self.corpus.store, info.folder, head)


class ServedRunner:
    """Like UnitRunner for a teacher that a server runs, which shares with none: no model
    is loaded.
    """

    def __init__(self, plan: TeacherPlan, corpus: Corpus):
        raise_version(corpus.store, WITH_SERVED)
        self.teacher = ServedTeacher(plan, corpus)

    def make(self, unit: Unit) -> dict[str, Commit]:
        """As ``UnitRunner.make``."""
        info, corpus = self.teacher.info, self.teacher.corpus
        if ShardSet(corpus.store, info.folder).has(unit.name):
            return {}
        start_time = time.perf_counter()
        return {info.name: write_unit(info, corpus, unit, self.teacher.unit(unit), start_time)}


@dataclass(frozen=True)
class Loader:
    """Loads the model of teachers that share its passes, and returns the function that makes their
    units.

    Picklable: another process opens the cache for itself.
    """

    plans: Sequence[TeacherPlan]
    corpus: Corpus

    def __call__(self) -> Callable[[Unit], dict[str, Commit]]:
        """Raise InputError for a model that cannot be loaded, or not as a teacher."""
        if self.plans[0].config.served is not None:
            return ServedRunner(self.plans[0], self.corpus).make
        if self.plans[0].config.tp_plan is not None:
            send_message((self.plans, self.corpus.store.location))
        runner = UnitRunner(self.plans, self.corpus)
        runner.store_lost_heads()
        return runner

    def __reduce__(self) -> tuple[object, ...]:
        return partial, (_load, self.plans, self.corpus.store.location)


_EMPTY = UnitResult(np.zeros(0, np.int64), {})


class _Passes:
    """A unit's passes, run step by step."""

    def __init__(
        self,
        unit: Unit,
        teachers: list[Teacher],
        steps: Steps | Iterator[bool],
        result: UnitResult | None = None,
    ):
        self.unit, self.teachers, self.steps, self.result = unit, teachers, steps, result
        self.start_time = time.perf_counter()

    def step(self) -> bool:
        """Give the device one more batch; return whether it was the last."""
        try:
            return next(self.steps)
        except StopIteration as end:
            self.result = self.result or end.value
            return True

    def end(self) -> UnitResult:
        """Run the remaining steps and return the result."""
        while self.result is None:
            self.step()
        return self.result


def overlapped(
    all_passes: Iterable[_Passes],
) -> Iterator[tuple[_Passes, UnitResult, float]]:
    """Yield the results of units in their order, and the seconds that each took. The device gets a
    unit's first batch after the last batch of the unit before, whose results are fetched then.
    """
    previous, previous_end = None, 0.0
    for passes in chain(all_passes, [None]):
        is_complete = passes is None or passes.step()
        if previous is not None:
            result, now = previous.end(), time.perf_counter()
            # A unit begun while another ran is timed from the end of that one.
            yield previous, result, now - max(previous.start_time, previous_end)
            previous_end = now
        while passes is not None and not is_complete:
            is_complete = passes.step()
        previous = passes


def _load(plans: Sequence[TeacherPlan], location: str) -> Callable[[Unit], dict[str, Commit]]:
    return Loader(plans, Corpus(open_store(location)))()


def follow() -> None:
    """Make the passes that the main process makes, and keep nothing, until it is done."""
    runner = None
    while (message := receive_message()) is not None:
        if isinstance(message, Unit):
            assert runner is not None
            runner.run(message, runner.teachers)
        else:
            plans, location = message
            runner = None  # its model goes before the next one comes
            runner = UnitRunner(plans, Corpus(open_store(location)))


def write_unit(
    info: TeacherInfo,
    corpus: Corpus,
    unit: Unit,
    result: UnitResult,
    start_time: float | None = None,
) -> Commit:
    """Write and commit one unit. ``start_time``: the time by ``time.perf_counter`` when work on it
    began; the record then states the seconds until all was encoded.
    """

    def seconds_taken() -> dict[str, float]:
        return {} if start_time is None else {SECONDS: round(time.perf_counter() - start_time, 6)}

    place = (unit.shard, unit.replica)
    return write_targets(
        info, corpus, place, result.rows, result.columns, result.facts, seconds_taken
    )
