"""Make a unit of a teacher's targets: compute it, write its shard, commit it.

Several processes may work on one cache, also on several machines: each looks, before it begins a
unit, whether another has committed it; two that make the same one are harmless.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
from rekindle.pipeline.caching.compute_unit import Unit, UnitResult, run_unit
from rekindle.pipeline.caching.served_units import ServedTeacher
from rekindle.pipeline.caching.shared_out import tell, told
from rekindle.pipeline.caching.teachers import Teacher, TeacherPlan


class UnitRunner:
    """A loaded model and all that it needs to make units of one part of a teacher's targets, or of
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
        self.kept = None  # reads the part whose ids tails are taken of
        if info.extends is not None:
            main = read_teacher(corpus.store, info.name, info.extends)
            self.kept = TeacherReader(corpus, [main], first.view)

    def store_lost(self) -> None:
        """Write the matrices of described teachers that are lost."""
        for teacher in self.teachers:
            if is_described(self.corpus.store, teacher.info.name):
                self._store_head(teacher.info)

    def make(self, unit: Unit) -> dict[str, Commit]:
        """Compute, write and commit a unit of each teacher that has none, so that a kill costs no
        more than one; return the commits by the teachers' names.

        None of a teacher of which another process has made it meanwhile: two that were started on
        one cache share the work.
        """
        store = self.corpus.store
        left = [t for t in self.teachers if not ShardSet(store, t.info.folder).has(unit.name)]
        if not left:
            return {}
        began = time.perf_counter()
        if self.shared_out:
            tell(unit)
        result = self.run(unit, left)
        # Each has its part of what the passes took, and what its own file takes.
        spent, made = (time.perf_counter() - began) / len(left), {}
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
        """The matrix comes after the teacher's description, and before any unit."""
        if (head := self.heads.pop(info.name, None)) is not None:
            claim_teacher(self.corpus, info)
            write_head(self.corpus.store, info.folder, head)


class ServedRunner:
    """The same of a teacher that a server runs, which shares with none: no model is loaded."""

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
    """Loads the model of teachers that share its passes, and gives what makes their units.

    Picklable: another process opens the cache for itself.
    """

    plans: Sequence[TeacherPlan]
    corpus: Corpus

    def __call__(self) -> Callable[[Unit], dict[str, Commit]]:
        """Raises InputError for a model that cannot be loaded, or not as a teacher."""
        if self.plans[0].config.served is not None:
            return ServedRunner(self.plans[0], self.corpus).make
        if self.plans[0].config.tp_plan is not None:
            tell((self.plans, self.corpus.store.location))
        runner = UnitRunner(self.plans, self.corpus)
        runner.store_lost()
        return runner.make

    def __reduce__(self) -> tuple[object, ...]:
        return partial, (_load, self.plans, self.corpus.store.location)


def _load(plans: Sequence[TeacherPlan], location: str) -> Callable[[Unit], dict[str, Commit]]:
    return Loader(plans, Corpus(open_store(location)))()


def follow() -> None:
    """Make the passes that the main process makes, and keep nothing, until it lets go."""
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
    """Write and commit one unit. ``began``: by ``time.perf_counter``, when work on it did; the
    record then says how many seconds it took until all was encoded.
    """

    def late() -> dict[str, float]:
        return {} if began is None else {SECONDS: round(time.perf_counter() - began, 6)}

    place = (unit.shard, unit.replica)
    return write_targets(info, corpus, place, result.rows, result.columns, result.facts, late)
