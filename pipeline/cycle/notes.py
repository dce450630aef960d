"""Notes beside the tables of a cycle: what its numbers cover, and what they do not cover."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from rekindle.data.counted import counted
from rekindle.pipeline.cycle.arms import GUIDED
from rekindle.pipeline.cycle.finetuned import EXPERT, LONGER, MLM, FineTuned, own_head
from rekindle.pipeline.cycle.scores import (
    MEAN,
    SELECTED,
    CycleResults,
    planned_tests,
)
from rekindle.pipeline.cycle.search import SearchResult
from rekindle.pipeline.report.significance import Difference
from rekindle.train.finetune.metrics import printed_name

# The first words of the notes about missing parts, about fine-tunings that hardly learned anything,
# and about guidance that does not help.
UNFINISHED = "unfinished"
UNLEARNED = "next to nothing was learned"
UNHELPFUL = "guidance is not shown to help"
_SIGNIFICANCE = 0.05  # below this adjusted p, a difference counts as more than chance
FEWEST_SEEDS = 5  # with fewer, an interval is little more than a guess


Draws = Mapping[int, Mapping[tuple[str, str], FineTuned]]  # by arm and task, for every draw


def notes_of(results: CycleResults, draws: Draws, first_notes: Sequence[str] = ()) -> list[str]:
    """Return the notes. Those about missing parts come first, followed by ``first_notes``.

    ``draws``: the fine-tunings of each draw of the labels; a single draw if they are not drawn
    again.
    """
    fine_tuned = [one for cells in draws.values() for one in cells.values()]
    finished = {cell for cells in draws.values() for cell in cells}
    missing = [*_missing_results(results, finished), *first_notes]
    if not fine_tuned:
        return [*missing, f"{UNFINISHED}: nothing is fine-tuned yet"]
    return [
        *missing,
        *_unlearned(draws),
        *_guidance(results),
        *_own_heads(results),
        *_test_notes(results),
        *_coverage(results, fine_tuned),
        *_f1_meanings(fine_tuned),
        *_selected_teacher(results),
        *_budgets(results, {one.arm for one in fine_tuned}),
        *_test_texts(results),
        *_search_notes(results),
        *_versions(fine_tuned),
    ]


def _missing_results(results: CycleResults, finished: Collection[tuple[str, str]]) -> Iterator[str]:
    tasks = {
        arm: [name for name in results.metrics if (arm, name) not in finished]
        for arm in results.arms
    }
    if listed := "; ".join(f"{arm} on {', '.join(names)}" for arm, names in tasks.items() if names):
        means = ": these arms have no mean over tasks" if len(results.tasks) > 1 else ""
        yield f"{UNFINISHED}, not there yet: {listed}{means}"


def _unlearned(draws: Draws) -> Iterator[str]:
    """Yield one sentence about the fine-tunings that `pipeline finetune` warns about."""
    weak: dict[str, list[str]] = {}  # draws or seeds, by arm and task
    for draw, cells in draws.items():
        for one in cells.values():
            if weak_seeds := [seed.seed for seed in one.per_seed if seed.warning]:
                is_part = len(weak_seeds) < len(one.seeds)
                seeds = [f"seed {', '.join(map(str, weak_seeds))}"] if is_part else []
                parts = [f"draw {draw}"] if len(draws) > 1 else seeds
                weak.setdefault(f"{one.arm} on {one.task}", []).extend(parts)
    if weak:
        names = [
            name + (f" ({', '.join(parts)})" if parts and not len(parts) == len(draws) > 1 else "")
            for name, parts in weak.items()
        ]
        yield (
            f"{UNLEARNED} by {'; '.join(names)}: on dev this scores little more than the same "
            "answer for every text, and differences say little. Train longer (finetune.epochs), at "
            "another finetune.learning_rate, or see whether the labels fit the texts"
        )


def _guidance(results: CycleResults) -> Iterator[str]:
    """Yield one sentence if no student of experts beats the student of the text alone, or the base
    arm if there is no such student, on the mean over tasks or the only task.
    """
    guided = [one for one in results.differences if one.arm in GUIDED]
    for against in (MLM, results.base):
        differences = [one for one in guided if one.against == against]
        differences = [one for one in differences if one.task == MEAN] or differences
        if len({one.task for one in differences}) != 1:
            continue
        if not any(is_gain(one) for one in differences):
            single = f"with one {results.unit}"
            spread = [f"({one.interval})" if one.n > 1 else single for one in differences]
            gains = [f"{one.arm} {100 * one.mean:+.2f}" for one in differences]
            listed = ", ".join(f"{gain} {w}" for gain, w in zip(gains, spread, strict=True))
            task = differences[0].task
            place = "the mean over tasks" if task == MEAN else task
            yield (
                f"{UNHELPFUL}: no student of experts scores more than {against} on {place} by more "
                f"than chance ({listed}, in points)"
            )
        return


def _own_heads(results: CycleResults) -> Iterator[str]:
    """Yield one sentence if students score more with their own heads than fine-tuned again."""
    own = [one for one in results.own_head_differences if one.arm == own_head(one.against)]
    better = [one for one in own if one.task == results.judged_on and is_gain(one)]
    if listed := ", ".join(f"{o.against} {100 * o.mean:+.2f} ({o.interval})" for o in better):
        place = "the mean over tasks" if results.judged_on == MEAN else results.judged_on
        yield (
            "students score more with their own heads than fine-tuned again on the experts' "
            f"labels, on {place} ({listed}, in points): use them as they are (`pipeline predict "
            "--head`)"
        )


def is_gain(one: Difference) -> bool:
    """Return whether a difference is a gain that a test shows to be more than chance.

    There is no test if the gain is the same with every seed; with two seeds on few rows that often
    is chance.
    """
    return one.mean > 0 and one.p_adjusted is not None and one.p_adjusted < _SIGNIFICANCE


def _test_notes(results: CycleResults) -> Iterator[str]:
    differences, unit = results.differences, results.unit
    if (primary := results.primary) is not None:
        yield (
            f"the comparison of {primary.arm} with {', '.join(primary.against)} is the primary "
            "one, named before anything ran: its p values are adjusted by Holm's method over these "
            f"{len(primary.against)} alone. All other comparisons are secondary: they say what to "
            "look at next, and prove nothing"
        )
    if counts := Counter(one.against for one in differences if one.p is not None):
        listed = ", ".join(f"{count} against {against}" for against, count in counts.items())
        means = " and on the mean over tasks" if any(o.task == MEAN for o in differences) else ""
        across = ", not across these groups" if len(counts) > 1 else ""
        secondary = " secondary" if primary is not None else ""
        yield (
            f"{counts.total()}{secondary} paired t-tests were made (two-sided, by {unit}, on each "
            f"task's main metric{means}): {listed}; p is adjusted by Holm's method over all tests "
            f"against the same arm{across}{_planned(results)}; the intervals are not adjusted"
        )
    if equal := [one for one in differences if one.p is None and one.n > 1]:
        listed = ", ".join(f"{one.arm} − {one.against} on {one.task}" for one in equal)
        yield f"the same difference with every {unit}, so that no test can be made: {listed}"


def _planned(results: CycleResults) -> str:
    """Return how many tests p is adjusted for, if some of the planned ones are missing."""
    made = Counter(one.against for one in results.differences if one.p is not None)
    planned = planned_tests(results.arms, [*results.metrics])
    counts = [f"{len(names)} against {arm}" for arm, names in planned.items() if made[arm]]
    are_missing = any(len(names) > made[arm] for arm, names in planned.items() if made[arm])
    return f", as for all that are planned ({', '.join(counts)})" if are_missing else ""


def _coverage(results: CycleResults, fine_tuned: Sequence[FineTuned]) -> Iterator[str]:
    """Yield what the intervals cover, and what they do not cover."""
    seeds = next((one for one in fine_tuned if one.arm != EXPERT), fine_tuned[0]).seeds
    if results.draws is not None:
        yield from _coverage_by_draws(results, len(results.draws), len(seeds))
        return
    if results.by_student:
        yield _coverage_by_students(results.students, len(seeds))
        return
    warning = f"fewer than {FEWEST_SEEDS} seeds: " if len(seeds) < FEWEST_SEEDS else ""
    if len(seeds) == 1:
        yield f"{warning}one fine-tuning of each arm; nothing is known of their spread"
        return
    yield (
        f"{warning}intervals (95 %, Student's t) and tests are over {len(seeds)} fine-tunings, "
        "which differ in their seed (order of the data, dropout, the weights of a new head), on "
        "one test split"
    )
    if results.students == 1:
        yield (
            "one student per arm was pre-trained: the intervals do not cover how much another seed "
            "of pre-training, or another test split, would change"
        )
        return
    yield (
        f"{results.students} students of every kind were pre-trained, each with its own seed, and "
        "each fine-tuned once. The intervals do not cover how much another test split would change"
    )


def _coverage_by_students(students: int, seeds: int) -> str:
    warning = f"fewer than {FEWEST_SEEDS} students: " if students < FEWEST_SEEDS else ""
    return (
        f"{warning}intervals (95 %, Student's t) and tests are over {students} students of every "
        f"kind, each pre-trained with its own seed, which share {seeds} fine-tunings. Fine-tunings "
        "of one student are alike, so the score of a student is their mean; arms without students "
        "have the mean over the same seeds. The intervals do not cover how much another test split "
        "would change"
    )


def _coverage_by_draws(results: CycleResults, draws: int, seeds: int) -> Iterator[str]:
    warning = f"fewer than {FEWEST_SEEDS} draws of the labels: " if draws < FEWEST_SEEDS else ""
    score = f"the mean of {seeds} fine-tunings" if seeds > 1 else "one fine-tuning"
    if (expert_seeds := results.file.get("experts", {}).get("seeds") or seeds) != seeds:
        score += f" ({EXPERT}: {expert_seeds})"
    students = f" of {results.students} students" if results.students > 1 else ""
    if draws == 1:
        yield f"{warning}{score}{students} of each arm; nothing is known of the spread over draws"
        return
    yield (
        f"{warning}intervals (95 %, Student's t) and tests are over {draws} draws of the labels; "
        f"the score of a draw is {score}{students}. Each draw has its own rows to train on, and "
        "everything made from them: its experts, their outputs on the text, its students"
    )
    yield (
        "the test split, the unlabelled text and the seeds of pre-training and fine-tuning are the "
        "same in all draws: the intervals do not cover how much others would change"
    )
    planned, first = results.file.get("label_draws") or 0, results.settings.get("draws_at_first")
    if first and first < planned:
        yield (
            f"the cycle was begun with {counted(first, 'draw')} of the labels, and "
            f"{planned - first} more were asked for later: if the results so far were the reason, "
            "p and intervals promise too much"
        )


def _f1_meanings(fine_tuned: Collection[FineTuned]) -> Iterator[str]:
    """Yield what an F1 covers, if its name does not say it."""
    names = {
        one.task: printed_name(one.metric, one.problem, len(one.label_names)) for one in fine_tuned
    }
    meanings = {"macro f1": "the unweighted mean over classes (macro)", "entity f1": "of entities"}
    for name, meaning in meanings.items():
        if tasks := ", ".join(task for task, printed in names.items() if printed == name):
            yield f"f1 of {tasks} is {meaning}"


def _selected_teacher(results: CycleResults) -> Iterator[str]:
    """Yield that the teacher was selected, and so scores more than the mean expert."""
    main = results.main
    if not any(arm == SELECTED for arm, _ in main):
        return
    spread = ", without an interval" if results.draws is None else ", in each draw"
    meaning = f"`{SELECTED}` is the test score of that one{spread}"
    if results.base != EXPERT:
        yield f"the expert that teaches is the best of its seeds on dev: {meaning}"
        return
    yield (
        "the expert that teaches is the best of its seeds on dev, so a gain of its students over "
        f"the mean of {EXPERT} includes that selection. {meaning}"
    )
    for arm in results.arms:
        gains = [
            f"{100 * (main[arm, task].mean - main[SELECTED, task].mean):+.2f} on {task}"
            for task in (*results.metrics, MEAN)
            if (arm, task) in main and (SELECTED, task) in main
        ]
        if gains:
            yield f"mean of {arm} − {SELECTED}, in points: {', '.join(gains)}"


def _budgets(results: CycleResults, arms: Collection[str]) -> Iterator[str]:
    has_own_budget = bool(results.file.get("experts", {}).get("finetune"))
    if LONGER in arms:
        others = f"all other arms but {EXPERT}" if has_own_budget else "all other arms"
        yield f"{LONGER}: fine-tuned with twice the epochs; {others} had the same budget"
    if has_own_budget:
        yield f"{EXPERT}: another model, with its own budget (experts.finetune)"
    tasks = [task for task in results.tasks if task.test_in_train]
    if shared := ", ".join(f"{task.test_in_train:,} of {task.name}" for task in tasks):
        yield f"test examples whose text is also in train: {shared}"


def _test_texts(results: CycleResults) -> Iterator[str]:
    """Yield how many test texts were found in the texts and in the rows to train on."""
    for one in results.texts:
        text = f"the text of {one.task}" if one.task else "the unlabelled text"
        if one.exact is None or one.near is None:
            yield f"test texts in {text} were not counted: it was gone"
        elif not one.exact + one.near:
            yield f"no record of {text} holds a test text, or nearly"
        else:
            records = f"{counted(one.exact + one.near, 'record')} of {text}"
            held = "a test text"
            if one.removed and _has_without(results, one.task):  # counted together
                held += " or a text of corpus.without"
            held += f" ({one.exact:,} as it stands, {one.near:,} nearly)"
            fate = "left out" if one.removed else "kept (test_texts: keep), and students read them"
            yield f"{records} with {held}: {fate}"
    for task in results.tasks:
        if rows := [f"{count:,} of {split}" for split, count in task.held.items() if count]:
            removed = results.file.get("test_texts") == "remove"
            fate = "left out" if removed else "kept (test_texts: keep)"
            yield f"rows of {task.name} that are a row of its test: {', '.join(rows)}, {fate}"


def _has_without(results: CycleResults, text: str) -> bool:
    """Return whether the cycle's file excludes more than test texts from this text."""
    corpora = {one["name"]: one.get("corpus") for one in results.file.get("tasks", [])}
    return bool(((results.file.get("corpus") or {}) | (corpora.get(text) or {})).get("without"))


def _search_notes(results: CycleResults) -> Iterator[str]:
    searches = results.searched
    if not searches:
        return
    points = max(len(one.tried) for one in searches)
    yield (
        f"{', '.join(searches[0].tried[0].settings)}: chosen on dev for each arm and task among "
        f"the same {points} settings, with the same seeds, none of which is compared; test scores "
        "have chosen nothing"
        + ("; searched in draw 0, and taken over in the others" if results.draws else "")
    )
    if edges := "; ".join(f"{one.arm} on {one.task}" for one in searches if _is_at_edge(one)):
        yield f"the choice is at an edge of what was tried, and more may help: {edges}"


def _is_at_edge(one: SearchResult) -> bool:
    """Return whether a chosen number is the smallest or largest of three or more."""
    for key, value in (one.chosen or {}).items():
        values = [point.settings[key] for point in one.tried]
        numbers = [v for v in set(values) if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) > 2 and value in (min(numbers), max(numbers)):
            return True
    return False


def _versions(fine_tuned: Sequence[FineTuned]) -> Iterator[str]:
    names = {name for one in fine_tuned for name in one.versions}
    differing = sorted(n for n in names if len({one.versions.get(n) for one in fine_tuned}) > 1)
    if differing:
        yield f"not all fine-tuned with the same {', '.join(differing)}"
