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
from rekindle.pipeline.caching.served_units import ServedTeacher
from rekindle.pipeline.caching.shared_out import tell, told
from rekindle.pipeline.caching.teachers import Teacher, TeacherPlan


class UnitRunner:
    """A loaded model and all it needs to make units of one part of a teacher's targets, or of
    several teachers that share its passes.
    """

    def __init__(self, plans: Sequence[TeacherPlan], corpus: Corpus):
        self.corpus = corpus
        first = Teacher(plans[0], corpus)
        self.teachers = [first, *(first.beside(plan) for plan in plans[1:])]
        self.heads = {
            teacher.info.name: teacher.output_matrix()
            for teacher in self.teachers
            if kind_of(teacher.info).has_head
        }
        self.plans, info = plans, first.info
        self.kept = None  # reads the part whose ids the tails belong to
        if info.extends is not None:
            main = read_teacher(corpus.store, info.name, info.extends)
            self.kept = TeacherReader(corpus, [main], first.view)

    def store_lost(self) -> None:
        """Write lost matrices of described teachers."""
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
        left = self._left(unit)
        if not left:
            return {}
        began = time.perf_counter()
        if self.shared_out:
            tell(unit)
        result = self.run(unit, left)
        return self._write(unit, left, result, time.perf_counter() - began)

    def several(self, units: Iterable[Unit]) -> Iterator[dict[str, Commit]]:
        """Make units as ``make`` does, in their order.

        A device that runs beside the host is given a unit's first batch before the last results of
        the unit before are fetched, and a thread writes meanwhile: a kill costs at most two units
        and a begun third.
        """
        if self.teachers[0].way.most == 1 or self.shared_out:
            yield from map(self.make, units)
            return
        written = deque[Future[dict[str, Commit]]]()
        with ThreadPoolExecutor(1, "write") as writer:
            for one, result, seconds in overlapped(map(self._passes, units)):
                written.append(writer.submit(self._write, one.unit, one.left, result, seconds))
                while len(written) > 1:  # at most one unit waits to be written
                    yield written.popleft().result()
            while written:
                yield written.popleft().result()

    def _passes(self, unit: Unit) -> "_Passes":
        """Return the passes that a unit needs; none if all teachers have it."""
        left = self._left(unit)
        if not left:
            return _Passes(unit, left, iter(()), _NOTHING)
        return _Passes(unit, left, begin_unit(left[0], unit, kept=self.kept, beside=left[1:]))

    def _left(self, unit: Unit) -> list[Teacher]:
        """Return the teachers that lack this unit."""
        store = self.corpus.store
        return [t for t in self.teachers if not ShardSet(store, t.info.folder).has(unit.name)]

    def _write(
        self, unit: Unit, left: Sequence[Teacher], result: UnitResult, seconds: float
    ) -> dict[str, Commit]:
        """Write the targets of the teachers that lack the unit (``left``), from passes that took
        ``seconds``.
        """
        if not left:
            return {}
        # Each is charged its part of the passes, and the writing of its own file.
        spent, made = seconds / len(left), {}
        for teacher, own in zip(left, (result, *result.beside), strict=True):
            began = time.perf_counter() - spent
            self._store_head(teacher.info)
            made[teacher.info.name] = write_unit(teacher.info, self.corpus, unit, own, began)
        return made

    @property
    def shared_out(self) -> bool:
        """Whether other processes make a part of each pass."""
        return self.plans[0].config.tp_plan is not None

    def run(self, unit: Unit, teachers: Sequence[Teacher]) -> UnitResult:
        """Compute a unit of teachers that share its passes; write nothing."""
        first, *beside = teachers
        return run_unit(first, unit, kept=self.kept, beside=beside)

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
        began = time.perf_counter()
        return {info.name: write_unit(info, corpus, unit, self.teacher.unit(unit), began)}


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
            tell((self.plans, self.corpus.store.location))
        runner = UnitRunner(self.plans, self.corpus)
        runner.store_lost()
        return runner

    def __reduce__(self) -> tuple[object, ...]:
        return partial, (_load, self.plans, self.corpus.store.location)


_NOTHING = UnitResult(np.zeros(0, np.int64), {})


class _Passes:
    """A unit's passes, run step by step."""

    def __init__(
        self,
        unit: Unit,
        left: list[Teacher],
        steps: Steps | Iterator[bool],
        result: UnitResult | None = None,
    ):
        self.unit, self.left, self.steps, self.result = unit, left, steps, result
        self.began = time.perf_counter()

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
    begun: Iterable[_Passes],
) -> Iterator[tuple[_Passes, UnitResult, float]]:
    """Yield the results of units in their order, and the seconds that each took. The device gets a
    unit's first batch after the last batch of the unit before, whose results are fetched then.
    """
    last, done = None, 0.0
    for passes in chain(begun, [None]):
        given_all = passes is None or passes.step()
        if last is not None:
            result, now = last.end(), time.perf_counter()
            # A unit begun while another ran is timed from the end of that one.
            yield last, result, now - max(last.began, done)
            done = now
        while passes is not None and not given_all:
            given_all = passes.step()
        last = passes


def _load(plans: Sequence[TeacherPlan], location: str) -> Callable[[Unit], dict[str, Commit]]:
    return Loader(plans, Corpus(open_store(location)))()


def follow() -> None:
    """Make the passes that the main process makes, and keep nothing, until it is done."""
    runner = None
    while (message := told()) is not None:
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
    began: float | None = None,
) -> Commit:
    """Write and commit one unit. ``began``: the time by ``time.perf_counter`` when work on it
    began; the record then states the seconds until all was encoded.
    """

    def late() -> dict[str, float]:
        return {} if began is None else {SECONDS: round(time.perf_counter() - began, 6)}

    place = (unit.shard, unit.replica)
    return write_targets(info, corpus, place, result.rows, result.columns, result.facts, late)
