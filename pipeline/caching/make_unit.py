"""Make a unit of a teacher's targets: compute it, write its shard, commit it.

Several processes may work on one cache, also on several machines: each looks, before it begins a
unit, whether another has committed it; two that make the same one are harmless.
"""

import time

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.storage.commits import SECONDS
from rekindle.data.storage.shards import Commit, ShardSet
from rekindle.data.targets.head import write_head
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.writing import claim_teacher, write_targets
from rekindle.pipeline.caching.compute_unit import Unit, UnitResult, run_unit
from rekindle.pipeline.caching.teachers import Teacher, TeacherPlan


class UnitRunner:
    """A loaded teacher and all that it needs to make units of one part of its targets."""

    def __init__(self, plan: TeacherPlan, corpus: Corpus):
        self.corpus, self.info = corpus, plan.info
        self.teacher = Teacher(plan, corpus)
        self.head = self.teacher.output_matrix() if kind_of(plan.info).has_head else None
        self.kept = None  # reads the part whose ids tails are taken of
        if plan.info.extends is not None:
            main = read_teacher(corpus.store, plan.info.name, plan.info.extends)
            self.kept = TeacherReader(corpus, [main], self.teacher.view)
        if is_described(corpus.store, plan.info.name):  # a matrix of this teacher that was lost
            self._store_head()

    def make(self, unit: Unit) -> Commit | None:
        """Compute, write and commit a unit, so that a kill costs no more than one.

        None if another process has made it meanwhile: two that were started on one cache share
        the work.
        """
        if ShardSet(self.corpus.store, self.info.folder).has(unit.name):
            return None
        began = time.perf_counter()
        result = run_unit(self.teacher, unit, kept=self.kept)
        self._store_head()
        return write_unit(self.info, self.corpus, unit, result, began)

    def _store_head(self) -> None:
        """The matrix comes after the teacher's description, and before any unit."""
        if self.head is not None:
            claim_teacher(self.corpus, self.info)
            write_head(self.corpus.store, self.info.folder, self.head)
            self.head = None


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
