"""Teachers that share their forward passes: they are probed together, and their time is divided."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.caching.shared_pass import Group, group_by_pass
from rekindle.pipeline.caching.teachers import TeacherPlan
from rekindle.pipeline.plan.probe import Probe, probe_teachers
from rekindle.pipeline.plan.work import FolderWork

Part = tuple[TeacherInfo, FolderWork]  # one folder of the cache: a part of a teacher's targets


@dataclass(frozen=True)
class Pass:
    """A forward pass, its teachers, and the tokens to show each of them."""

    group: Group
    tokens: Mapping[str, float]
    probed: dict[str, Probe] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers, in the order of the run file."""
        return tuple(plan.info.name for plan in self.group)

    def probe(self, name: str, probe_corpus: Corpus) -> Probe:
        """Return a teacher's probe. The whole group is probed together, once."""
        if not self.probed:
            self.probed.update(
                zip(self.names, probe_teachers(self.group, probe_corpus), strict=True)
            )
        return self.probed[name]

    def seconds(self, name: str, rate: float) -> float:
        """Return a teacher's part of the time of the passes.

        ``rate``: seconds for each teacher and each token that all teachers see. Teachers that see a
        token share its time equally.
        """
        seconds, previous_level = 0.0, 0.0
        for level in sorted({*self.tokens.values()}):
            sharing = [other for other, tokens in self.tokens.items() if tokens >= level]
            if name in sharing:
                seconds += (level - previous_level) * rate * len(self.group) / len(sharing)
            previous_level = level
        return seconds


def shared_passes(plans: Iterable[tuple[TeacherPlan | None, Sequence[Part]]]) -> dict[str, Pass]:
    """Return each teacher's shared pass by name. Leave out teachers whose model is not here and
    those with nothing, or only further tails, to make.

    ``plans``: every teacher with its parts.
    """
    tokens: dict[str, float] = {}
    to_make: list[TeacherPlan] = []
    for plan, parts in plans:
        work = next((w for info, w in parts if info.extends is None), None)
        if plan is not None and work is not None and work.units:
            to_make.append(plan)
            tokens[plan.info.name] = work.tokens
    passes: dict[str, Pass] = {}
    for group in group_by_pass(to_make):
        names = [plan.info.name for plan in group]
        shared = Pass(group, {name: tokens[name] for name in names})
        passes |= dict.fromkeys(names, shared)
    return passes
