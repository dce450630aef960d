"""The arms' test scores, the differences between them, and the results of a cycle. Pure arithmetic
on what was read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rekindle.data.errors import InputError
from rekindle.pipeline.cycle.arms import GUIDED, WITH_TEACHERS
from rekindle.pipeline.cycle.finetuned import (
    EXPERT,
    LONGER,
    MLM,
    PSEUDO,
    START,
    FineTuned,
    own_head,
)
from rekindle.pipeline.cycle.search import SearchResult
from rekindle.pipeline.report.cache import CacheFacts
from rekindle.pipeline.report.cost import Cost
from rekindle.pipeline.report.significance import Difference, holm, mean_interval, paired

SELECTED = "expert (selected)"  # the expert's seed that is best on dev, and teaches
HELD_TEXTS_FILE = "held.json"  # beside the cost of making a text
MEAN = "mean"  # in place of a task and its metric: the mean of all tasks' main metrics


@dataclass(frozen=True)
class ArmScores:
    """An arm's test scores, as fractions, in the order of ``seeds``.

    With several draws of the labels, ``seeds`` are the draws' numbers, and a score is the mean over
    the draw's seeds. With several students that share the fine-tunings, and for students with their
    own heads, ``seeds`` are the students' numbers, and a score is the mean over a student's
    fine-tunings.

    ``std`` is the sample deviation, ``low`` to ``high`` the 95 % interval of the mean; None for a
    single seed. ``task`` and ``metric`` are "mean" for the mean of the tasks' main metrics. The arm
    "expert (selected)" has only the seed of the expert that teaches; its ``seeds`` are empty in the
    mean over tasks, where experts have different seeds.
    """

    arm: str
    task: str
    metric: str
    seeds: list[int]
    scores: list[float]
    mean: float
    std: float | None
    low: float | None
    high: float | None

    @property
    def by_number(self) -> dict[int, float]:
        """The scores by seed, or by draw."""
        return dict(zip(self.seeds, self.scores, strict=True))

    @classmethod
    def of(
        cls, arm: str, task: str, metric: str, seeds: list[int], scores: list[float]
    ) -> "ArmScores":
        """Return these scores with their mean and its uncertainty."""
        low, high = mean_interval(scores) or (None, None)
        std = stdev(scores) if len(scores) > 1 else None
        return cls(arm, task, metric, seeds, scores, fmean(scores), std, low, high)


def scores_of(
    arms: Sequence[str],
    tasks: Sequence[str],
    fine_tuned: Mapping[tuple[str, str], FineTuned],
    own_heads: Mapping[tuple[str, str], FineTuned] = {},
    selected: bool = True,
    students: int = 1,
) -> list[ArmScores]:
    """Return, arm by arm, each task's main metric and the second one, and the mean over tasks.

    There is a mean if there are several tasks and the arm has them all. The expert that teaches
    follows the arm ``expert``, if one is ``selected``, and each arm is followed by its students
    with their own heads. ``fine_tuned``, ``own_heads``: by arm and task; an arm has the same seeds
    in all tasks. If ``students`` share the seeds, the scores of every arm are means over the seeds
    of one student, also for arms without students, so that the pairs match.
    """
    scores: list[ArmScores] = []
    for arm in arms:
        results = [fine_tuned[arm, task] for task in tasks if (arm, task) in fine_tuned]
        with_mean = len(results) == len(tasks) > 1
        scores += _arm_scores(arm, [(one, one.seeds) for one in results], with_mean, students)
        if arm == EXPERT and selected:
            scores += _arm_scores(SELECTED, [(one, [one.best_seed]) for one in results], with_mean)
        results = [own_heads[arm, task] for task in tasks if (arm, task) in own_heads]
        with_mean = len(results) == len(tasks) > 1
        scores += _arm_scores(own_head(arm), [(one, one.seeds) for one in results], with_mean)
    return scores


def _arm_scores(
    arm: str, results: Sequence[tuple[FineTuned, list[int]]], with_mean: bool, students: int = 1
) -> Iterator[ArmScores]:
    """Yield the scores of each task with these seeds, and if ``with_mean`` their mean."""
    main: list[list[float]] = []
    for one, seeds in results:
        tests = {seed: one.test[one.seeds.index(seed)] for seed in seeds}
        numbers, groups = seeds, [[seed] for seed in seeds]
        if students > 1:  # number j has been fine-tuned with the seeds j, j + students, …
            numbers = sorted({seed % students for seed in seeds})
            groups = [[s for s in seeds if s % students == number] for number in numbers]
        for metric in one.shown_metrics:
            scores = [fmean(tests[seed][metric] for seed in group) for group in groups]
            main += [scores] if metric == one.metric else []
            yield ArmScores.of(arm, one.task, metric, numbers, scores)
    if with_mean:
        numbers = [] if arm == SELECTED else numbers
        yield ArmScores.of(arm, MEAN, MEAN, numbers, [fmean(s) for s in zip(*main, strict=True)])


def main_scores(
    scores: Sequence[ArmScores], metrics: Mapping[str, str]
) -> dict[tuple[str, str], ArmScores]:
    """Return, by arm and task, the scores on the tasks' main ``metrics``, and the means
    over tasks.
    """
    main = {**metrics, MEAN: MEAN}
    return {(one.arm, one.task): one for one in scores if main[one.task] == one.metric}


def join_draws(
    draws: Mapping[int, Sequence[ArmScores]],
) -> tuple[list[ArmScores], dict[tuple[str, str], list[int]]]:
    """Return the scores over several draws of the labels: one for each draw, the mean over its
    seeds. Also return, by arm and task, the draws that are missing.

    If a draw lacks an arm on a task for which it has other arms, the arm is left out on that task,
    because means over different draws cannot be compared.
    """
    by_cell: dict[tuple[str, str, str], dict[int, float]] = {}
    for draw, scores in draws.items():
        for one in scores:
            by_cell.setdefault((one.arm, one.task, one.metric), {})[draw] = one.mean
    draws_with = {
        name: {d for (_, t, _), v in by_cell.items() if t == name for d in v}
        for name in {task for _, task, _ in by_cell}
    }
    if MEAN in draws_with:
        draws_with[MEAN] = {draw for of_task in draws_with.values() for draw in of_task}
    joined, missing_draws = [], {}
    for (arm, task, metric), values in by_cell.items():
        if missing := sorted(draws_with[task] - values.keys()):
            missing_draws[arm, task] = missing
        else:
            numbers = sorted(values)
            joined.append(ArmScores.of(arm, task, metric, numbers, [values[n] for n in numbers]))
    return joined, missing_draws


# The arms that others are compared with, in this order: all arms with the first two, and students
# of experts with the others.
_COMPARED_WITH = (EXPERT, START, MLM, LONGER, PSEUDO)


def differences_of(
    arms: Sequence[str], metrics: Mapping[str, str], scores: Sequence[ArmScores]
) -> list[Difference]:
    """Return the differences of every arm to ``expert`` and ``start``; for students of experts also
    to ``mlm``, ``longer`` and ``pseudo``, as far as these exist.

    ``metrics``: each task's main one. The last three comparisons decide whether the experts'
    probabilities help, and not the text, the longer training, or the labels of an expert.
    """
    main = main_scores(scores, metrics)
    families = planned_tests(arms, [*metrics]).values()
    return [one for names in families for one in _family(names, main)]


def planned_tests(
    arms: Sequence[str], tasks: Sequence[str]
) -> dict[str, list[tuple[str, str, str]]]:
    """Return all comparisons (arm, other arm, task) of a complete cycle, by the other arm."""
    tests: dict[str, list[tuple[str, str, str]]] = {}
    for against in [one for one in _COMPARED_WITH if one in arms]:
        others = [arm for arm in arms if arm != against and (against == EXPERT or arm in GUIDED)]
        if against == START:  # the reverse is listed under the expert
            others = [arm for arm in arms if arm not in (EXPERT, START)]
        all_tasks = [*tasks, MEAN] if len(tasks) > 1 else tasks
        tests[against] = [(arm, against, task) for arm in others for task in all_tasks]
    return tests


def _family(
    names: Sequence[tuple[str, str, str]], main: Mapping[tuple[str, str], ArmScores]
) -> list[Difference]:
    """Return the existing differences, with p adjusted for all the named ones.

    Pairs are made over the common seeds or draws; experts may have more.
    """
    family = []
    for arm, against, task in names:
        if (arm, task) in main and (against, task) in main:
            first, second = (main[one, task].by_number for one in (against, arm))
            common = [number for number in first if number in second]
            before, after = ([one[number] for number in common] for one in (first, second))
            family.append(paired(before, after, names=(arm, against, task)))
    adjusted = holm([one.p for one in family], missing=len(names) - len(family))
    return [replace(one, p_adjusted=p) for one, p in zip(family, adjusted, strict=True)]


@dataclass(frozen=True)
class Primary:
    """The comparison named before anything ran: ``arm`` against others on the mean over tasks, or
    the only task. Its p are adjusted only over these comparisons; ``differences`` are the existing
    ones.
    """

    arm: str
    against: list[str]
    about: str
    differences: list[Difference]

    @classmethod
    def of(
        cls, primary: Mapping[str, Any] | None, main: Mapping[tuple[str, str], ArmScores], task: str
    ) -> "Primary | None":
        """Return the comparison ``primary`` of the cycle's file, on a ``task`` or MEAN."""
        if not primary:
            return None
        arm, against = primary["arm"], list(primary["against"])
        differences = _family([(arm, one, task) for one in against], main)
        return cls(arm, against, primary.get("about") or "", differences)


# --- all of it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskFacts:
    """A task: its main metric, the examples in each split, the test examples also in train, the
    score of guessing (None: unknown), what it asks, and how many rows of the train and dev files
    are a row of test.
    """

    name: str
    metric: str
    train: int
    dev: int
    test: int
    test_in_train: int = 0
    chance: float | None = None
    about: str = ""
    held: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TextFacts:
    """The records of an unlabelled text that contain a test text of any task, exactly or nearly.

    ``removed``: they are in no sequence. ``exact`` and ``near`` are None if the text was gone
    before they were counted. ``task``: the task with this text; empty if all tasks share it.
    """

    task: str
    exact: int | None
    near: int | None
    removed: bool


@dataclass(frozen=True)
class KeptExpert:
    """The expert of a task that teaches: the best of its ``seeds`` on dev, with its score by the
    task's main metric as a fraction. ``folder`` is relative to the cycle.
    """

    task: str
    folder: str
    seed: int
    seeds: int
    metric: str
    dev: float


@dataclass(frozen=True)
class ArmCost:
    """Seconds of everything an arm needs, from the labels and the text to its scores, by kind of
    stage. ``unknown``: the stages without a record, which are not in the sums.
    """

    arm: str
    by_kind: dict[str, float]
    seconds: float
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CycleResults:
    """Everything that a cycle found.

    ``costs``: seconds by folder of the stage ("experts/cola", "search/mlm/cola", "cache/cola" for a
    teacher's pass, "students/mlm", "fine-tuned/mlm/cola"). ``notes``: what must be known beside the
    tables. ``settings``: the rest of cycle.json. ``cache`` and ``cost``: the content of the cache,
    and the cost of a student with it and without; None if unknown. ``verdict``: the result in a
    sentence. ``experts``: those that teach. ``draws``: the finished draws of the labels, if there
    are several; scores are then by draw. ``by_student``: scores are by student, because several
    students share the fine-tunings.
    """

    arms: list[str]
    tasks: list[TaskFacts]
    scores: list[ArmScores]
    differences: list[Difference]
    searched: list[SearchResult]
    costs: dict[str, float]
    notes: list[str]
    settings: dict[str, Any]
    cache: CacheFacts | None = None
    cost: Cost | None = None
    verdict: str = ""
    experts: list[KeptExpert] = field(default_factory=list)
    draws: list[int] | None = None
    texts: list[TextFacts] = field(default_factory=list)
    primary: Primary | None = None
    arm_costs: list[ArmCost] = field(default_factory=list)
    by_student: bool = False

    @property
    def file(self) -> dict[str, Any]:
        """The cycle's file as it was begun; empty if not recorded."""
        return dict(self.settings.get("settings") or {})

    @property
    def students(self) -> int:
        """Students of every kind, each with its own pre-training."""
        return int(self.file.get("students") or 1)

    @property
    def unit(self) -> str:
        """What the scores of an arm differ in: "seed", "draw" or "student"."""
        if self.draws is not None:
            return "draw"
        return "student" if self.by_student else "seed"

    @property
    def base(self) -> str:
        """The arm to beat: the students' model fine-tuned, or else the expert."""
        return START if START in self.arms else EXPERT

    @property
    def judged_on(self) -> str:
        """The task that arms are judged on: the mean over tasks, or the only one."""
        return MEAN if len(self.tasks) > 1 else self.tasks[0].name

    @property
    def metrics(self) -> dict[str, str]:
        """Each task's main metric."""
        return {task.name: task.metric for task in self.tasks}

    @property
    def main(self) -> dict[tuple[str, str], ArmScores]:
        """The scores on the tasks' main metrics, and the means over tasks, by arm and task."""
        return main_scores(self.scores, self.metrics)

    @property
    def own_head_differences(self) -> list[Difference]:
        """The differences of students with their own heads to the base arm, to ``longer``, and to
        themselves fine-tuned again; the p of each of these three are adjusted together.

        Empty by seed: a student has one own head, so that it takes several students, or draws.
        """
        taught = [arm for arm in self.arms if arm in WITH_TEACHERS and self.unit != "seed"]
        places = [*self.metrics, *([MEAN] if len(self.tasks) > 1 else [])]
        families = (
            [(own_head(arm), other or arm, place) for arm in taught for place in places]
            for other in (self.base, LONGER, "")
        )
        return [one for names in families for one in _family(names, self.main)]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values; all numbers are finite."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "CycleResults":
        """Return the results from ``as_dict``, for instance from results.json, which suffices for
        the tables.

        Unknown keys are ignored. Raise InputError if others are missing.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise InputError(f"these are not the results of a cycle ({error})") from None
