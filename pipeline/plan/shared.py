"""Teachers of a plan that share their forward passes: probed together, their time divided."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.caching.shared_pass import Group, passes
from rekindle.pipeline.caching.teachers import TeacherPlan
from rekindle.pipeline.plan.probe import Probe, probe_teachers
from rekindle.pipeline.plan.work import FolderWork

Part = tuple[TeacherInfo, FolderWork]  # of a teacher's targets: one folder of the cache


@dataclass(frozen=True)
class Pass:
    """A forward pass, the teachers that it is for, and the tokens that it is to show each."""

    group: Group
    tokens: Mapping[str, float]
    probed: dict[str, Probe] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers, in the order of the run file."""
        return tuple(plan.info.name for plan in self.group)

    def probe(self, name: str, steps: Corpus) -> Probe:
        """Return what was measured of a teacher: all of the group are tried at once, once."""
        if not self.probed:
            self.probed.update(zip(self.names, probe_teachers(self.group, steps), strict=True))
        return self.probed[name]

    def seconds(self, name: str, rate: float) -> float:
        """Return a teacher's part of the time that the passes take, at ``rate`` seconds for each of
        them and a token shown to all: of a token, as much as every other that it is shown to.
        """
        found, before = 0.0, 0.0
        for level in sorted({*self.tokens.values()}):
            with_it = [other for other, tokens in self.tokens.items() if tokens >= level]
            if name in with_it:
                found += (level - before) * rate * len(self.group) / len(with_it)
            before = level
        return found


def shared_passes(plans: Iterable[tuple[TeacherPlan | None, Sequence[Part]]]) -> dict[str, Pass]:
    """Return, by each teacher's name, the pass that it has to go through; nothing of a teacher that
    is not at hand, or of which nothing but further tails, or nothing, is to be made.

    ``plans``: every teacher, and the parts of it.
    """
    tokens: dict[str, float] = {}
    to_make: list[TeacherPlan] = []
    for plan, parts in plans:
        work = next((w for info, w in parts if info.extends is None), None)
        if plan is not None and work is not None and work.units:
            to_make.append(plan)
            tokens[plan.info.name] = work.tokens
    found: dict[str, Pass] = {}
    for group in passes(to_make):
        names = [plan.info.name for plan in group]
        one = Pass(group, {name: tokens[name] for name in names})
        found |= dict.fromkeys(names, one)
    return found
