"""A cycle in a few words: which arm is best, whether that is chance, and what it was made from."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rekindle.data.counted import counted
from rekindle.pipeline.cycle.finetuned import LONGER, MLM, PSEUDO
from rekindle.pipeline.cycle.notes import is_gain
from rekindle.pipeline.cycle.scores import MEAN, CycleResults, KeptExpert, Primary
from rekindle.pipeline.report.significance import Difference, p_words

_CONTROLS = {
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
        return _primary_verdict(results, results.primary)
    main, task, base = results.main, results.judged_on, results.base
    scores = {arm: main[arm, task].mean for arm in results.arms if (arm, task) in main}
    place = _place(results)
    if not scores:
        return f"nothing is known yet on {place}"
    found = {(one.arm, one.against): one for one in results.differences if one.task == task}
    best = max(scores, key=lambda arm: scores[arm])
    gains = [arm for arm in scores if (arm, base) in found and is_gain(found[arm, base])]
    metric = "" if task == MEAN else f"{results.metrics[task]} "
    if len(scores) == 1:
        return f"only {best} is scored yet on {place}: {metric}{100 * scores[best]:.2f}"
    if not gains:
        one = found.get((best, base))
        certainty = "" if one is None else _certainty(one, results.unit)
        highest = _describe_highest(best, base, scores, one, certainty)
        return f"no arm is shown to beat {base} on {place}: {highest}"
    winner = max(gains, key=lambda arm: scores[arm])
    verdict = f"{winner} beats {base} on {place}: {metric}{100 * scores[winner]:.2f}, "
    one = found[winner, base]
    verdict += f"{_points(one)} over {base}, {_certainty(one, results.unit)}"
    parts = [verdict]
    for arm in _CONTROLS:
        if (winner, arm) in found:
            one = found[winner, arm]
            parts.append(f"over {_CONTROLS[arm]} {_points(one)}, {_certainty(one, results.unit)}")
    if best != winner:
        parts.append(f"{best} has {100 * scores[best]:.2f}, not told apart from {base}")
    return "; ".join(parts)


def _place(results: CycleResults) -> str:
    if results.judged_on == MEAN:
        return f"the mean over {len(results.tasks)} tasks"
    return results.judged_on


def _primary_verdict(results: CycleResults, primary: Primary) -> str:
    """Return the result of the comparison named before anything ran, against each arm."""
    ones, place = primary.differences, _place(results)
    if missing := [arm for arm in primary.against if arm not in {one.against for one in ones}]:
        arms = "" if len(missing) == len(primary.against) else f" with {', '.join(missing)}"
        return f"the primary comparison, of {primary.arm}{arms} on {place}, is not known yet"
    beaten = [one.against for one in ones if is_gain(one)]
    better = [one.against for one in ones if is_gain(replace(one, mean=-one.mean))]
    undecided = [one.against for one in ones if one.against not in (*beaten, *better)]
    outcomes = [f"beats {_joined(beaten)}"] if beaten else []
    outcomes += [f"is worse than {_joined(better)}"] if better else []
    outcomes += [f"is not told apart from {_joined(undecided)}"] if undecided else []
    unit = results.unit
    details = [
        f"over {one.against} {_points(one)}{_higher_suffix(one, unit)}{_p_suffix(one)}"
        for one in ones
    ]
    details += [f"one {unit} says nothing of chance"] if any(one.n == 1 for one in ones) else []
    outcome, detail = ", ".join(outcomes), "; ".join(details)
    return f"{primary.arm} {outcome} on {place} (primary comparison): {detail}"


def _joined(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _p_suffix(one: Difference) -> str:
    if one.p_adjusted is None:
        return f", {_UNTESTED}" if one.n > 1 else ""
    return f", p {p_words(one.p_adjusted)}"


def _describe_highest(
    best: str, base: str, scores: dict[str, float], one: Difference | None, certainty: str
) -> str:
    if best == base:
        next_one = max((arm for arm in scores if arm != base), key=lambda arm: scores[arm])
        own, next_score = _in_percent(best, scores), _in_percent(next_one, scores)
        return f"it has {own}, the next, {next_one}, {next_score}"
    highest = f"{best} has the highest score, {_in_percent(best, scores)}"
    return highest if one is None else f"{highest}, {_points(one)} over {base}, {certainty}"


def _in_percent(arm: str, scores: dict[str, float]) -> str:
    return f"{100 * scores[arm]:.2f}"


def _points(one: Difference) -> str:
    interval = "" if one.low is None else f" [{100 * one.low:+.2f}, {100 * (one.high or 0):+.2f}]"
    return f"{100 * one.mean:+.2f}{interval} points"


def _certainty(one: Difference, unit: str) -> str:
    if one.n == 1:
        return f"and one {unit} says nothing of chance"
    words = _UNTESTED if one.p is None else "more than chance" if is_gain(one) else "not told apart"
    return f"{words}{_higher_suffix(one, unit)}"


def _higher_suffix(one: Difference, unit: str) -> str:
    """Return in how many of the seeds, or draws, the arm scores more."""
    if one.n == 1 or one.higher is None:  # results of an older version
        return ""
    return f" (higher in {one.higher} of {one.n} {unit}s)"


def facts_of_results(results: CycleResults) -> Iterator[tuple[str, str]]:
    """Yield the inputs and the kept expert of each task, as pairs of label and text."""
    if (cache := results.cache) is not None:
        texts = "" if cache.documents is None else f"{counted(cache.documents, 'text')}, "
        sequences, tokens = counted(cache.sequences, "sequence"), counted(cache.tokens, "token")
        yield "unlabelled text", f"{texts}{sequences} (pieces that are read at once), {tokens}"
    for task in results.tasks:
        rows = f"{counted(task.train, 'labelled row')} to train on, {task.dev:,} dev, "
        yield task.name, f"{rows}{task.test:,} test"
    for name in results.metrics:
        experts = [one for one in results.experts if one.task == name]
        yield from ((f"expert of {name}", words) for words in _describe_experts(experts))


def _describe_experts(experts: Sequence[KeptExpert]) -> Iterator[str]:
    """Yield which expert of a task was kept, in one sentence for all draws of the labels."""
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
