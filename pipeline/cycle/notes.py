"""Notes beside the tables of a cycle: what its numbers cover, and what not."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from rekindle.data.counted import counted
from rekindle.pipeline.cycle.arms import GUIDED
from rekindle.pipeline.cycle.finetuned import EXPERT, LONGER, MLM, FineTuned
from rekindle.pipeline.cycle.scores import MEAN, SELECTED, CycleResults, planned_tests
from rekindle.pipeline.cycle.searched import Searched
from rekindle.pipeline.report.significance import Difference
from rekindle.train.finetune.metrics import printed_name

UNFINISHED = "unfinished"  # start of the note about missing parts
UNLEARNED = "next to nothing was learned"  # start of the note about what hardly learned anything
UNHELPFUL = "guidance is not shown to help"  # start of the note that guidance does not help
_SURE = 0.05  # below this adjusted p, a difference counts as more than chance
FEWEST_SEEDS = 5  # with fewer, an interval is little more than a guess


Draws = Mapping[int, Mapping[tuple[str, str], FineTuned]]  # by arm and task, for every draw


def notes_of(results: CycleResults, draws: Draws, said: Sequence[str] = ()) -> list[str]:
    """Return the notes, first those about missing parts, like ``said``. ``draws``: what was
    fine-tuned in each draw of the labels (a single draw if they are not drawn again).
    """
    found = [one for cells in draws.values() for one in cells.values()]
    missing = [*_missing(results, {cell for cells in draws.values() for cell in cells}), *said]
    if not found:
        return [*missing, f"{UNFINISHED}: nothing is fine-tuned yet"]
    return [
        *missing,
        *_unlearned(draws),
        *_guidance(results),
        *_tests(results),
        *_covered(results, found),
        *_metrics(found),
        *_selected(results),
        *_budgets(results, {one.arm for one in found}),
        *_held(results),
        *_searched(results),
        *_versions(found),
    ]


def _missing(results: CycleResults, found: Collection[tuple[str, str]]) -> Iterator[str]:
    tasks = {
        arm: [name for name in results.metrics if (arm, name) not in found] for arm in results.arms
    }
    if listed := "; ".join(f"{arm} on {', '.join(names)}" for arm, names in tasks.items() if names):
        means = ": these arms have no mean over tasks" if len(results.tasks) > 1 else ""
        yield f"{UNFINISHED}, not there yet: {listed}{means}"


def _unlearned(draws: Draws) -> Iterator[str]:
    """Yield one sentence about the fine-tunings that `pipeline finetune` warns about."""
    found: dict[str, list[str]] = {}
    for draw, cells in draws.items():
        for one in cells.values():
            if weak := [seed.seed for seed in one.per_seed if seed.warning]:
                seeds = [f"seed {', '.join(map(str, weak))}"] * (len(weak) < len(one.seeds))
                of = [f"draw {draw}"] if len(draws) > 1 else seeds
                found.setdefault(f"{one.arm} on {one.task}", []).extend(of)
    if found:
        told = [
            name + (f" ({', '.join(of)})" if of and not len(of) == len(draws) > 1 else "")
            for name, of in found.items()
        ]
        yield (
            f"{UNLEARNED} by {'; '.join(told)}: on dev this is near what the same answer for every "
            "text scores, and differences say little. Train longer (finetune.epochs), at another "
            "finetune.learning_rate, or see whether the labels fit the texts"
        )


def _guidance(results: CycleResults) -> Iterator[str]:
    """Yield one sentence if no student of experts beats the student of the text alone (else the
    base arm), on the mean over tasks or the only task.
    """
    taught = [one for one in results.differences if one.arm in GUIDED]
    for against in (MLM, results.base):
        ones = [one for one in taught if one.against == against]
        ones = [one for one in ones if one.task == MEAN] or ones
        if len({one.task for one in ones}) != 1:
            continue
        if not any(is_gain(one) for one in ones):
            once = f"with one {results.unit}"
            spread = [f"({one.interval})" if one.n > 1 else once for one in ones]
            gains = [f"{one.arm} {100 * one.mean:+.2f}" for one in ones]
            listed = ", ".join(f"{gain} {w}" for gain, w in zip(gains, spread, strict=True))
            where = "the mean over tasks" if ones[0].task == MEAN else ones[0].task
            yield (
                f"{UNHELPFUL}: no student of experts scores more than {against} on {where} by more "
                f"than chance ({listed}, in points)"
            )
        return


def is_gain(one: Difference) -> bool:
    """Return whether a test shows it to be more than chance.

    The same gain with every seed has no test; with two seeds on few rows it often is chance.
    """
    return one.mean > 0 and one.p_adjusted is not None and one.p_adjusted < _SURE


def _tests(results: CycleResults) -> Iterator[str]:
    differences, unit = results.differences, results.unit
    if (primary := results.primary) is not None:
        yield (
            f"the comparison of {primary.arm} with {', '.join(primary.against)} is the primary "
            "one, named before anything ran: its p are adjusted by Holm's method over these "
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
    """Say how many tests p is adjusted for, if some of the planned ones are missing."""
    there = Counter(one.against for one in results.differences if one.p is not None)
    planned = planned_tests(results.arms, [*results.metrics])
    told = [f"{len(names)} against {arm}" for arm, names in planned.items() if there[arm]]
    lacking = any(len(names) > there[arm] for arm, names in planned.items() if there[arm])
    return f", as for all that are planned ({', '.join(told)})" if lacking else ""


def _covered(results: CycleResults, found: Sequence[FineTuned]) -> Iterator[str]:
    """Say what the intervals cover, and what not."""
    seeds = next((one for one in found if one.arm != EXPERT), found[0]).seeds
    if results.draws is not None:
        yield from _covered_by_draws(results, len(results.draws), len(seeds))
        return
    if results.by_student:
        yield _covered_by_students(results.students, len(seeds))
        return
    few = f"fewer than {FEWEST_SEEDS} seeds: " if len(seeds) < FEWEST_SEEDS else ""
    if len(seeds) == 1:
        yield f"{few}one fine-tuning of each arm; nothing is known of their spread"
        return
    yield (
        f"{few}intervals (95 %, Student's t) and tests are over {len(seeds)} fine-tunings, which "
        "differ in their seed (order of the data, dropout, the weights of a new head), on one test "
        "split"
    )
    if results.students == 1:
        yield (
            "one student per arm was pre-trained: how much another seed of pre-training, or "
            "another test split, would change is not in the intervals"
        )
        return
    yield (
        f"{results.students} students of every kind were pre-trained, each with a seed of its own, "
        "each fine-tuned once. How much another test split would change is not in the intervals"
    )


def _covered_by_students(students: int, seeds: int) -> str:
    few = f"fewer than {FEWEST_SEEDS} students: " if students < FEWEST_SEEDS else ""
    return (
        f"{few}intervals (95 %, Student's t) and tests are over {students} students of every kind, "
        f"each pre-trained with a seed of its own, which share {seeds} fine-tunings: those of one "
        "student are alike, and the score of a student is their mean; of arms without students, "
        "that of the same seeds. How much another test split would change is not in the intervals"
    )


def _covered_by_draws(results: CycleResults, draws: int, seeds: int) -> Iterator[str]:
    few = f"fewer than {FEWEST_SEEDS} draws of the labels: " if draws < FEWEST_SEEDS else ""
    each = f"the mean of {seeds} fine-tunings" if seeds > 1 else "one fine-tuning"
    if (own := results.file.get("experts", {}).get("seeds") or seeds) != seeds:
        each += f" ({EXPERT}: {own})"
    students = f" of {results.students} students" if results.students > 1 else ""
    if draws == 1:
        yield f"{few}{each}{students} of each arm; nothing is known of the spread over draws"
        return
    yield (
        f"{few}intervals (95 %, Student's t) and tests are over {draws} draws of the labels; the "
        f"score of a draw is {each}{students}. Each draw has its own rows to train on, and all "
        "that is made of them: its experts, what these say of the text, its students"
    )
    yield (
        "the test split, the unlabelled text and the seeds of pre-training and fine-tuning are the "
        "same in all draws: how much others would change is not in the intervals"
    )
    planned, first = results.file.get("label_draws") or 0, results.settings.get("draws_at_first")
    if first and first < planned:
        yield (
            f"the cycle was begun with {counted(first, 'draw')} of the labels, and "
            f"{planned - first} more were asked for later: if that was decided by what had come "
            "out, p and intervals are surer than they may be"
        )


def _metrics(found: Collection[FineTuned]) -> Iterator[str]:
    """Say what an F1 covers, if its name does not."""
    names = {one.task: printed_name(one.metric, one.problem, len(one.label_names)) for one in found}
    meanings = {"macro f1": "the unweighted mean over classes (macro)", "entity f1": "of entities"}
    for name, meaning in meanings.items():
        if tasks := ", ".join(task for task, own in names.items() if own == name):
            yield f"f1 of {tasks} is {meaning}"


def _selected(results: CycleResults) -> Iterator[str]:
    """Say that students of a selected teacher start from more than the mean expert has."""
    main = results.main
    if not any(arm == SELECTED for arm, _ in main):
        return
    spread = ", without an interval" if results.draws is None else ", in each draw"
    what = f"`{SELECTED}` is the test score of that one{spread}"
    if results.base != EXPERT:
        yield f"the expert that teaches is the best of its seeds on dev: {what}"
        return
    yield (
        "the expert that teaches is the best of its seeds on dev, so that its students start from "
        f"a selected one: a gain over the mean of {EXPERT} includes that selection. {what}"
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
    own = bool(results.file.get("experts", {}).get("finetune"))
    if LONGER in arms:
        others = f"all other arms but {EXPERT}" if own else "all other arms"
        yield f"{LONGER}: fine-tuned with twice the epochs; {others} had the same budget"
    if own:
        yield f"{EXPERT}: of another model, with a budget of its own (experts.finetune)"
    tasks = [task for task in results.tasks if task.test_in_train]
    if shared := ", ".join(f"{task.test_in_train:,} of {task.name}" for task in tasks):
        yield f"test examples whose text is also in train: {shared}"


def _held(results: CycleResults) -> Iterator[str]:
    """Say what is known of test texts in the training text."""
    for one in results.texts:
        where = f"the text of {one.task}" if one.task else "the unlabelled text"
        if one.exact is None or one.near is None:
            yield f"test texts in {where} were not counted: it was gone"
        elif not one.exact + one.near:
            yield f"no record of {where} holds a test text, or nearly"
        else:
            records = f"{counted(one.exact + one.near, 'record')} of {where}"
            held = "a test text"
            if one.removed and _has_without(results, one.task):  # counted together
                held += " or a text of corpus.without"
            how = f"{held} ({one.exact:,} as it stands, {one.near:,} nearly)"
            end = "left out" if one.removed else "kept (test_texts: keep), and students read them"
            yield f"{records} with {how}: {end}"
    for task in results.tasks:
        if rows := [f"{count:,} of {split}" for split, count in task.held.items() if count]:
            removed = results.file.get("test_texts") == "remove"
            end = "left out" if removed else "kept (test_texts: keep)"
            yield f"rows of {task.name} that are a row of its test: {', '.join(rows)}, {end}"


def _has_without(results: CycleResults, text: str) -> bool:
    """Return whether the cycle's file excludes more than test texts from this text."""
    own = {one["name"]: one.get("corpus") for one in results.file.get("tasks", [])}.get(text)
    return bool(((results.file.get("corpus") or {}) | (own or {})).get("without"))


def _searched(results: CycleResults) -> Iterator[str]:
    searched = results.searched
    if not searched:
        return
    points = max(len(one.tried) for one in searched)
    yield (
        f"{', '.join(searched[0].tried[0].settings)}: chosen on dev for each arm and task among "
        f"the same {points} settings, with the same seeds, none of which is compared; test scores "
        "have chosen nothing"
        + ("; searched in draw 0, and taken over in the others" if results.draws else "")
    )
    if edges := "; ".join(f"{one.arm} on {one.task}" for one in searched if _at_edge(one)):
        yield f"the choice is at an edge of what was tried, and more may help: {edges}"


def _at_edge(one: Searched) -> bool:
    """Return whether a chosen number is the smallest or largest of three or more."""
    for key, value in (one.chosen or {}).items():
        values = [point.settings[key] for point in one.tried]
        tried = [v for v in set(values) if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(tried) > 2 and value in (min(tried), max(tried)):
            return True
    return False


def _versions(found: Sequence[FineTuned]) -> Iterator[str]:
    names = {name for one in found for name in one.versions}
    differing = sorted(n for n in names if len({one.versions.get(n) for one in found}) > 1)
    if differing:
        yield f"not all fine-tuned with the same {', '.join(differing)}"
