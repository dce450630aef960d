"""What must be said beside the tables of a cycle: what its numbers are of, and what not."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from rekindle.pipeline.cycle.finetuned import EXPERT, LONGER, MLM, TAUGHT, FineTuned
from rekindle.pipeline.cycle.scores import MEAN, SELECTED, CycleResults
from rekindle.pipeline.cycle.searched import Searched
from rekindle.pipeline.report.significance import Difference
from rekindle.train.finetune.metrics import printed_name

UNFINISHED = "unfinished"  # how the note begins that says what is not there
UNLEARNED = "next to nothing was learned"  # the one that names where this is so
UNHELPFUL = "guidance is not shown to help"  # and the one that says this
_SURE = 0.05  # adjusted p below which a difference counts as more than chance
FEWEST_SEEDS = 5  # below, an interval is little more than a guess


def notes_of(results: CycleResults, found: Mapping[tuple[str, str], FineTuned]) -> list[str]:
    """The notes, those first that say what is not there. ``found``: by arm and task."""
    missing = list(_missing(results, found))
    if not found:
        return [*missing, f"{UNFINISHED}: nothing is fine-tuned yet"]
    return [
        *missing,
        *_unlearned(found.values()),
        *_guidance(results.differences),
        *_tests(results.differences),
        *_seeds(len(next(iter(found.values())).seeds)),
        *_metrics(found.values()),
        *_selected(results),
        *_budgets(results, found),
        *_searched(results.searched),
        *_versions(list(found.values())),
    ]


def _missing(results: CycleResults, found: Collection[tuple[str, str]]) -> Iterator[str]:
    tasks = {
        arm: [name for name in results.metrics if (arm, name) not in found] for arm in results.arms
    }
    if listed := "; ".join(f"{arm} on {', '.join(names)}" for arm, names in tasks.items() if names):
        means = ": these arms have no mean over tasks" if len(results.tasks) > 1 else ""
        yield f"{UNFINISHED}, not there yet: {listed}{means}"


def _unlearned(found: Collection[FineTuned]) -> Iterator[str]:
    """One sentence of the fine-tunings that `pipeline finetune` warns of."""
    told = []
    for one in found:
        if weak := [seed.seed for seed in one.per_seed if seed.warning]:
            of = "" if len(weak) == len(one.seeds) else f" (seed {', '.join(map(str, weak))})"
            told.append(f"{one.arm} on {one.task}{of}")
    if told:
        yield (
            f"{UNLEARNED} by {'; '.join(told)}: on dev this is near what the same answer for every "
            "text scores, and differences say little. Train longer (finetune.epochs), at another "
            "finetune.learning_rate, or see whether the labels fit the texts"
        )


def _guidance(differences: Sequence[Difference]) -> Iterator[str]:
    """One sentence where no student of experts beats the one of the text alone (else the expert):
    on the mean over tasks, or on the only task.
    """
    taught = [one for one in differences if one.arm in TAUGHT]
    for against in (MLM, EXPERT):
        ones = [one for one in taught if one.against == against]
        ones = [one for one in ones if one.task == MEAN] or ones
        if len({one.task for one in ones}) != 1:
            continue
        if not any(is_gain(one) for one in ones):
            spread = [f"({one.interval})" if one.n > 1 else "with one seed" for one in ones]
            gains = [f"{one.arm} {100 * one.mean:+.2f}" for one in ones]
            listed = ", ".join(f"{gain} {w}" for gain, w in zip(gains, spread, strict=True))
            where = "the mean over tasks" if ones[0].task == MEAN else ones[0].task
            yield (
                f"{UNHELPFUL}: no student of experts scores more than {against} on {where} by more "
                f"than chance ({listed}, in points)"
            )
        return


def is_gain(one: Difference) -> bool:
    """Whether it is more than chance; the same gain with every seed, which has no p, is."""
    p = one.p_adjusted
    return one.mean > 0 and (one.n > 1 if p is None else p < _SURE)


def _tests(differences: Sequence[Difference]) -> Iterator[str]:
    if counts := Counter(one.against for one in differences if one.p is not None):
        listed = ", ".join(f"{count} against {against}" for against, count in counts.items())
        means = " and on the mean over tasks" if any(o.task == MEAN for o in differences) else ""
        across = ", not across these groups" if len(counts) > 1 else ""
        yield (
            f"{counts.total()} paired t-tests were made (two-sided, by seed, on each task's main "
            f"metric{means}): {listed}; p is adjusted by Holm's method over all tests against the "
            f"same arm{across}; the intervals are not adjusted"
        )
    if equal := [one for one in differences if one.p is None and one.n > 1]:
        listed = ", ".join(f"{one.arm} − {one.against} on {one.task}" for one in equal)
        yield f"the same difference with every seed, so that no test can be made: {listed}"


def _seeds(seeds: int) -> Iterator[str]:
    few = f"fewer than {FEWEST_SEEDS} seeds: " if seeds < FEWEST_SEEDS else ""
    if seeds == 1:
        yield f"{few}one fine-tuning of each arm; nothing is known of their spread"
        return
    yield (
        f"{few}intervals (95 %, Student's t) and tests are over {seeds} fine-tunings, which differ "
        "in their seed (order of the data, dropout, the weights of a new head), on one test split"
    )
    yield (
        "one student per arm was pre-trained: how much another seed of pre-training, or another "
        "test split, would change is not in the intervals"
    )


def _metrics(found: Collection[FineTuned]) -> Iterator[str]:
    """What an F1 is of, where its name does not say that."""
    names = {one.task: printed_name(one.metric, one.problem, len(one.label_names)) for one in found}
    meanings = {"macro f1": "the unweighted mean over classes (macro)", "entity f1": "of entities"}
    for name, meaning in meanings.items():
        if tasks := ", ".join(task for task, own in names.items() if own == name):
            yield f"f1 of {tasks} is {meaning}"


def _selected(results: CycleResults) -> Iterator[str]:
    """Students of a selected teacher start from more than the mean expert has."""
    main = results.main
    if not any(arm == SELECTED for arm, _ in main):
        return
    yield (
        "the expert that teaches is the best of its seeds on dev, so that its students start from "
        f"a selected one: a gain over the mean of {EXPERT} includes that selection. "
        f"`{SELECTED}` is the test score of that one, without an interval"
    )
    for arm in results.arms:
        gains = [
            f"{100 * (main[arm, task].mean - main[SELECTED, task].mean):+.2f} on {task}"
            for task in (*results.metrics, MEAN)
            if (arm, task) in main and (SELECTED, task) in main
        ]
        if gains:
            yield f"mean of {arm} − {SELECTED}, in points: {', '.join(gains)}"


def _budgets(results: CycleResults, found: Collection[tuple[str, str]]) -> Iterator[str]:
    if any(arm == LONGER for arm, _ in found):
        yield f"{LONGER}: fine-tuned with twice the epochs; all other arms had the same budget"
    tasks = [task for task in results.tasks if task.test_in_train]
    if shared := ", ".join(f"{task.test_in_train:,} of {task.name}" for task in tasks):
        yield f"test examples whose text is also in train: {shared}"


def _searched(searched: Sequence[Searched]) -> Iterator[str]:
    if not searched:
        return
    points = max(len(one.tried) for one in searched)
    yield (
        f"{', '.join(searched[0].tried[0].settings)}: chosen on dev for each arm and task among "
        f"the same {points} settings, with the same seeds, none of which is compared; test scores "
        "have chosen nothing"
    )
    if edges := "; ".join(f"{one.arm} on {one.task}" for one in searched if _at_edge(one)):
        yield f"the choice is at an edge of what was tried, and more may help: {edges}"


def _at_edge(one: Searched) -> bool:
    """Whether a number that was chosen is the smallest or largest of three or more."""
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
