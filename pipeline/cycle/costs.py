"""The cost of a cycle: the recorded seconds of every stage, and what each arm needs of them.

A stage that several arms need, such as an expert, counts for each of them: the sum of an arm is the
cost of making only its models, with all seeds that were run.
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
    finished = [*cells.fine_tuned.values(), *cells.own_heads.values()]
    costs = {one.folder: one.seconds for one in finished}
    for points in cells.searches.values():
        if points:
            costs[_search_folder(points)] = sum(one.seconds for one in points)
    for student in cells.students.values():
        recorded = {**student.caching, student.folder: student.seconds}
        costs |= {stage: float(s) for stage, s in recorded.items() if s is not None}
    return dict(sorted(costs.items()))


def arm_costs(arms: Sequence[str], tasks: Sequence[str], cells: Cells) -> list[ArmCost]:
    """Return the cost of each arm that has all tasks, followed by its students with their own
    heads, which are scored but not fine-tuned.
    """
    costs, by_arm = stage_costs(cells), []
    for arm in arms:
        for name, scored in ((arm, cells.fine_tuned), (own_head(arm), cells.own_heads)):
            if all((arm, task) in scored for task in tasks):
                with_own_head = scored is cells.own_heads
                stages = {
                    kind: list(_stages(kind, arm, tasks, cells, with_own_head)) for kind in KINDS
                }
                by_arm.append(_arm_cost(name, stages, costs))
    return by_arm


def _stages(
    kind: str, arm: str, tasks: Sequence[str], cells: Cells, with_own_head: bool
) -> Iterator[str]:
    """Yield the folders of all stages of a kind that an arm needs, each once."""
    students = [one for name, one in cells.students.items() if _arm_of(name) == arm]
    teachers = {name for one in students for name in one.teachers}
    experts = [(EXPERT, task) for task in tasks if task in {_task_of(t, tasks) for t in teachers}]
    own_cells = [] if with_own_head else [(arm, task) for task in tasks]
    fine_tuned = {"experts": experts, "fine-tuning": own_cells}
    searched = {"experts": experts, "search": own_cells}
    if kind == "scoring" and with_own_head:
        yield from (cells.own_heads[arm, task].folder for task in tasks)
    if kind == "caching":
        yield from dict.fromkeys(stage for one in students for stage in one.caching)
    if kind == "students":
        yield from (one.folder for one in students)
    searches = [cells.searches[cell] for cell in searched.get(kind, ())]
    yield from (_search_folder(points) for points in searches if points)
    for cell in fine_tuned.get(kind, ()):
        if cell in cells.fine_tuned:
            yield cells.fine_tuned[cell].folder


def _search_folder(points: Sequence[FineTuned]) -> str:
    """Return the folder of a search, which contains a folder for each point."""
    return points[0].folder.rpartition("/")[0]


def _arm_of(student: str) -> str:
    """Return the arm of a student: mlm, mlm.1, kd-TASK and kd-TASK.1 belong to mlm and kd."""
    return student.split("-")[0].split(".")[0]


def _task_of(teacher: str, tasks: Sequence[str]) -> str:
    """Return the task of an expert, or of one seed of it (TASK.0), by its name in the cache."""
    return teacher if teacher in tasks else teacher.rpartition(".")[0]


def _arm_cost(
    arm: str, stages_of: Mapping[str, Sequence[str]], costs: Mapping[str, float]
) -> ArmCost:
    """Return the cost of an arm with these stages, by kind."""
    by_kind = {
        kind: sum(costs.get(stage, 0.0) for stage in stages)
        for kind, stages in stages_of.items()
        if stages
    }
    unknown = [stage for stages in stages_of.values() for stage in stages if stage not in costs]
    return ArmCost(arm, by_kind, sum(by_kind.values()), unknown)


def mean_costs(draws: Sequence[Sequence[ArmCost]]) -> list[ArmCost]:
    """Return the mean over draws of the labels, for arms that all draws have."""
    by_arm = [{one.arm: one for one in draw} for draw in draws]
    means = []
    for arm in [arm for arm in (by_arm or [{}])[0] if all(arm in draw for draw in by_arm)]:
        ones = [draw[arm] for draw in by_arm]
        kinds = [kind for kind in KINDS if any(kind in one.by_kind for one in ones)]
        by_kind = {kind: fmean(one.by_kind.get(kind, 0.0) for one in ones) for kind in kinds}
        unknown = list(dict.fromkeys(stage for one in ones for stage in one.unknown))
        means.append(ArmCost(arm, by_kind, sum(by_kind.values()), unknown))
    return means
