"""A cycle in a few words: which arm is best and whether that is chance, and what it was made of."""

from collections.abc import Iterator

from rekindle.data.counted import counted
from rekindle.pipeline.cycle.finetuned import EXPERT, LONGER, MLM
from rekindle.pipeline.cycle.notes import is_gain
from rekindle.pipeline.cycle.scores import MEAN, CycleResults
from rekindle.pipeline.report.significance import Difference

_WHO = {MLM: "mlm (the text alone)", LONGER: "longer (twice the epochs)"}


def verdict_of(results: CycleResults) -> str:
    """One sentence, without its full stop: the best arm on the mean over tasks, or on the only
    task, held against the expert, and, if experts taught it, against text and training alone.
    """
    main, where = results.main, MEAN if len(results.tasks) > 1 else results.tasks[0].name
    scores = {arm: main[arm, where].mean for arm in results.arms if (arm, where) in main}
    place = f"the mean over {len(results.tasks)} tasks" if where == MEAN else where
    if not scores:
        return f"nothing is known yet on {place}"
    found = {(one.arm, one.against): one for one in results.differences if one.task == where}
    best = max(scores, key=lambda arm: scores[arm])
    gains = [arm for arm in scores if (arm, EXPERT) in found and is_gain(found[arm, EXPERT])]
    metric = "" if where == MEAN else f"{results.metrics[where]} "
    if len(scores) == 1:
        return f"only {best} is scored yet on {place}: {metric}{100 * scores[best]:.2f}"
    if not gains:
        return f"no arm is shown to beat {EXPERT} on {place}: " + _highest(best, scores, found)
    shown = max(gains, key=lambda arm: scores[arm])
    told = f"{shown} beats {EXPERT} on {place}: {metric}{100 * scores[shown]:.2f}, "
    told += f"{_points(found[shown, EXPERT])} over {EXPERT}, more than chance"
    others = [found[shown, arm] for arm in (MLM, LONGER) if (shown, arm) in found]
    more = [f"over {_WHO[one.against]} {_points(one)}, {_sure(one)}" for one in others]
    if best != shown:
        more.append(f"{best} has {100 * scores[best]:.2f}, not told apart from {EXPERT}")
    return "; ".join([told, *more])


def _highest(best: str, scores: dict[str, float], found: dict[tuple[str, str], Difference]) -> str:
    if best == EXPERT:
        next_one = max((arm for arm in scores if arm != EXPERT), key=lambda arm: scores[arm])
        return f"it has {100 * scores[best]:.2f}, the next, {next_one}, {_of(next_one, scores)}"
    told = f"{best} has the highest score, {_of(best, scores)}"
    one = found.get((best, EXPERT))
    return told if one is None else f"{told}, {_points(one)} over {EXPERT}, {_sure(one)}"


def _of(arm: str, scores: dict[str, float]) -> str:
    return f"{100 * scores[arm]:.2f}"


def _points(one: Difference) -> str:
    interval = "" if one.low is None else f" [{100 * one.low:+.2f}, {100 * (one.high or 0):+.2f}]"
    return f"{100 * one.mean:+.2f}{interval} points"


def _sure(one: Difference) -> str:
    if one.n == 1:
        return "and one seed says nothing of chance"
    return "more than chance" if is_gain(one) else "not told apart"


def facts_of_results(results: CycleResults) -> Iterator[tuple[str, str]]:
    """What came in, and which expert of each task was kept: pairs of what and words."""
    if (cache := results.cache) is not None:
        texts = "" if cache.documents is None else f"{counted(cache.documents, 'text')}, "
        sequences, tokens = counted(cache.sequences, "sequence"), counted(cache.tokens, "token")
        yield "unlabelled text", f"{texts}{sequences} (pieces that are read at once), {tokens}"
    for task in results.tasks:
        rows = f"{counted(task.train, 'labelled row')} to train on, {task.dev:,} dev, "
        yield task.name, f"{rows}{task.test:,} test"
    for one in results.experts:
        among = f" of {one.seeds}, the best on dev" if one.seeds > 1 else ", the only one"
        yield (
            f"expert of {one.task}",
            f"seed {one.seed}{among}: {one.metric} {one.dev:.4f} on dev ({one.folder})",
        )
