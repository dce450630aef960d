"""A cycle in a few words: which arm is best, whether that is chance, and what it was made from."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rekindle.data.counted import counted
from rekindle.pipeline.cycle.finetuned import LONGER, MLM, PSEUDO
from rekindle.pipeline.cycle.notes import is_gain
from rekindle.pipeline.cycle.scores import MEAN, CycleResults, KeptExpert, Primary
from rekindle.pipeline.report.significance import Difference, p_words

_WHO = {
    MLM: "mlm (the text alone)",
    LONGER: "longer (twice the epochs)",
    PSEUDO: "pseudo (the expert's classes as labels)",
}
_UNTESTED = "the same every time, so that no test can be made"


def verdict_of(results: CycleResults) -> str:
    """Return one sentence, without its full stop.

    If a primary comparison was named, its result; else the best arm on the mean over tasks, or on
    the only task, compared with the base arm and, if experts taught it, with text, training and
    labels alone.
    """
    if results.primary is not None:
        return _of_primary(results, results.primary)
    main, where, base = results.main, results.where, results.base
    scores = {arm: main[arm, where].mean for arm in results.arms if (arm, where) in main}
    place = _place(results)
    if not scores:
        return f"nothing is known yet on {place}"
    found = {(one.arm, one.against): one for one in results.differences if one.task == where}
    best = max(scores, key=lambda arm: scores[arm])
    gains = [arm for arm in scores if (arm, base) in found and is_gain(found[arm, base])]
    metric = "" if where == MEAN else f"{results.metrics[where]} "
    if len(scores) == 1:
        return f"only {best} is scored yet on {place}: {metric}{100 * scores[best]:.2f}"
    if not gains:
        one = found.get((best, base))
        sure = "" if one is None else _sure(one, results.unit)
        told = _highest(best, base, scores, one, sure)
        return f"no arm is shown to beat {base} on {place}: {told}"
    shown = max(gains, key=lambda arm: scores[arm])
    told = f"{shown} beats {base} on {place}: {metric}{100 * scores[shown]:.2f}, "
    one = found[shown, base]
    told += f"{_points(one)} over {base}, {_sure(one, results.unit)}"
    others = [found[shown, arm] for arm in _WHO if (shown, arm) in found]
    more = [f"over {_WHO[o.against]} {_points(o)}, {_sure(o, results.unit)}" for o in others]
    if best != shown:
        more.append(f"{best} has {100 * scores[best]:.2f}, not told apart from {base}")
    return "; ".join([told, *more])


def _place(results: CycleResults) -> str:
    many = results.where == MEAN
    return f"the mean over {len(results.tasks)} tasks" if many else results.where


def _of_primary(results: CycleResults, primary: Primary) -> str:
    """Return the result of the comparison named before anything ran, against each arm."""
    ones, place = primary.differences, _place(results)
    if lacking := [arm for arm in primary.against if arm not in {one.against for one in ones}]:
        them = "" if len(lacking) == len(primary.against) else f" with {', '.join(lacking)}"
        return f"the primary comparison, of {primary.arm}{them} on {place}, is not known yet"
    beaten = [one.against for one in ones if is_gain(one)]
    lost = [one.against for one in ones if is_gain(replace(one, mean=-one.mean))]
    apart = [one.against for one in ones if one.against not in (*beaten, *lost)]
    told = [f"beats {_listed(beaten)}"] if beaten else []
    told += [f"is worse than {_listed(lost)}"] if lost else []
    told += [f"is not told apart from {_listed(apart)}"] if apart else []
    unit = results.unit
    each = [f"over {o.against} {_points(o)}{_higher(o, unit)}{_p(o)}" for o in ones]
    each += [f"one {results.unit} says nothing of chance"] * any(one.n == 1 for one in ones)
    return f"{primary.arm} {', '.join(told)} on {place} (primary comparison): {'; '.join(each)}"


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _p(one: Difference) -> str:
    if one.p_adjusted is None:
        return f", {_UNTESTED}" if one.n > 1 else ""
    return f", p {p_words(one.p_adjusted)}"


def _highest(
    best: str, base: str, scores: dict[str, float], one: Difference | None, sure: str
) -> str:
    if best == base:
        next_one = max((arm for arm in scores if arm != base), key=lambda arm: scores[arm])
        return f"it has {100 * scores[best]:.2f}, the next, {next_one}, {_of(next_one, scores)}"
    told = f"{best} has the highest score, {_of(best, scores)}"
    return told if one is None else f"{told}, {_points(one)} over {base}, {sure}"


def _of(arm: str, scores: dict[str, float]) -> str:
    return f"{100 * scores[arm]:.2f}"


def _points(one: Difference) -> str:
    interval = "" if one.low is None else f" [{100 * one.low:+.2f}, {100 * (one.high or 0):+.2f}]"
    return f"{100 * one.mean:+.2f}{interval} points"


def _sure(one: Difference, unit: str) -> str:
    if one.n == 1:
        return f"and one {unit} says nothing of chance"
    told = _UNTESTED if one.p is None else "more than chance" if is_gain(one) else "not told apart"
    return f"{told}{_higher(one, unit)}"


def _higher(one: Difference, unit: str) -> str:
    """Say in how many of the seeds, or draws, the arm scores more."""
    if one.n == 1 or one.higher is None:  # results of an older version
        return ""
    return f" (higher in {one.higher} of {one.n} {unit}s)"


def facts_of_results(results: CycleResults) -> Iterator[tuple[str, str]]:
    """Yield the inputs, and the expert of each task that was kept, as pairs of label and text."""
    if (cache := results.cache) is not None:
        texts = "" if cache.documents is None else f"{counted(cache.documents, 'text')}, "
        sequences, tokens = counted(cache.sequences, "sequence"), counted(cache.tokens, "token")
        yield "unlabelled text", f"{texts}{sequences} (pieces that are read at once), {tokens}"
    for task in results.tasks:
        rows = f"{counted(task.train, 'labelled row')} to train on, {task.dev:,} dev, "
        yield task.name, f"{rows}{task.test:,} test"
    for name in results.metrics:
        experts = [one for one in results.experts if one.task == name]
        yield from ((f"expert of {name}", words) for words in _kept(experts))


def _kept(experts: Sequence[KeptExpert]) -> Iterator[str]:
    """Say which expert of a task was kept; with several draws of the labels, for all together."""
    if not experts:
        return
    one, scores = experts[0], [expert.dev for expert in experts]
    among = f" of {one.seeds}, the best on dev" if one.seeds > 1 else ", the only one"
    if len(experts) == 1:
        yield f"seed {one.seed}{among}: {one.metric} {one.dev:.4f} on dev ({one.folder})"
    else:
        yield (
            f"one seed{among}, in each of {len(experts)} draws: {one.metric} {min(scores):.4f} to "
            f"{max(scores):.4f} on dev ({one.folder}, …)"
        )
