"""The cost of a cycle: the recorded seconds of every stage, and what each arm needs of them.

What several arms need, such as the experts, counts for each of them: the sum of an arm is the cost
of making only its models, with all seeds that were run.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from rekindle.pipeline.cycle.cells import Cells
from rekindle.pipeline.cycle.finetuned import EXPERT, FineTuned, own_head
from rekindle.pipeline.cycle.scores import ArmCost

# What an arm may need, in the order of execution.
KINDS = ("experts", "caching", "students", "search", "fine-tuning", "scoring")
SHARED_KINDS = KINDS[:2]  # stages that serve several arms


def stage_costs(cells: Cells) -> dict[str, float]:
    """Return the seconds of the finished stages that recorded them, by folder."""
    done = [*cells.found.values(), *cells.heads.values()]
    costs = {one.folder: one.seconds for one in done}
    for ones in cells.tried.values():
        if ones:
            costs[_searched(ones)] = sum(one.seconds for one in ones)
    for student in cells.students.values():
        recorded = {**student.caching, student.folder: student.seconds}
        costs |= {stage: float(s) for stage, s in recorded.items() if s is not None}
    return dict(sorted(costs.items()))


def arm_costs(arms: Sequence[str], tasks: Sequence[str], cells: Cells) -> list[ArmCost]:
    """Return the cost of each arm that has all tasks, followed by its students with their own
    heads, which are scored but not fine-tuned.
    """
    costs, found = stage_costs(cells), []
    for arm in arms:
        for name, scored in ((arm, cells.found), (own_head(arm), cells.heads)):
            if all((arm, task) in scored for task in tasks):
                own = scored is cells.heads
                needs = {kind: list(_stages(kind, arm, tasks, cells, own)) for kind in KINDS}
                found.append(_sum(name, needs, costs))
    return found


def _stages(
    kind: str, arm: str, tasks: Sequence[str], cells: Cells, with_own_head: bool
) -> Iterator[str]:
    """Yield the folders of all stages of a kind that an arm needs, each once."""
    own = {name: one for name, one in cells.students.items() if _arm_of(name) == arm}
    teachers = {name for one in own.values() for name in one.taught_by}
    experts = [(EXPERT, task) for task in tasks if task in {_task_of(t, tasks) for t in teachers}]
    itself = [] if with_own_head else [(arm, task) for task in tasks]
    fine_tuned = {"experts": experts, "fine-tuning": itself}
    searched = {"experts": experts, "search": itself}
    if kind == "scoring" and with_own_head:
        yield from (cells.heads[arm, task].folder for task in tasks)
    if kind == "caching":
        yield from dict.fromkeys(stage for one in own.values() for stage in one.caching)
    if kind == "students":
        yield from (one.folder for one in own.values())
    tried = [cells.tried[cell] for cell in searched.get(kind, ())]
    yield from (_searched(ones) for ones in tried if ones)
    yield from (cells.found[c].folder for c in fine_tuned.get(kind, ()) if c in cells.found)


def _searched(points: Sequence[FineTuned]) -> str:
    """Return the folder of a search, which contains a folder for each point."""
    return points[0].folder.rpartition("/")[0]


def _arm_of(student: str) -> str:
    """Return the arm of a student: mlm, mlm.1, kd-TASK and kd-TASK.1 belong to mlm and kd."""
    return student.split("-")[0].split(".")[0]


def _task_of(teacher: str, tasks: Sequence[str]) -> str:
    """Return the task of an expert, or of one seed of it (TASK.0), by its name in the cache."""
    return teacher if teacher in tasks else teacher.rpartition(".")[0]


def _sum(arm: str, needs: Mapping[str, Sequence[str]], costs: Mapping[str, float]) -> ArmCost:
    by_kind = {k: sum(costs.get(s, 0.0) for s in stages) for k, stages in needs.items() if stages}
    unknown = [stage for stages in needs.values() for stage in stages if stage not in costs]
    return ArmCost(arm, by_kind, sum(by_kind.values()), unknown)


def mean_costs(draws: Sequence[Sequence[ArmCost]]) -> list[ArmCost]:
    """Return the mean over draws of the labels, for arms that all draws have."""
    each = [{one.arm: one for one in draw} for draw in draws]
    found = []
    for arm in [arm for arm in (each or [{}])[0] if all(arm in draw for draw in each)]:
        ones = [draw[arm] for draw in each]
        kinds = [kind for kind in KINDS if any(kind in one.by_kind for one in ones)]
        by_kind = {kind: fmean(one.by_kind.get(kind, 0.0) for one in ones) for kind in kinds}
        unknown = list(dict.fromkeys(stage for one in ones for stage in one.unknown))
        found.append(ArmCost(arm, by_kind, sum(by_kind.values()), unknown))
    return found
