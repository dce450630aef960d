"""Which run is best at a task: intervals of paired draws and of seeds, and one sentence of them."""

import numpy as np
import pytest
from scipy import stats

from rekindle.pipeline.compare.standing import LEAST_ROWS, RowScores, draw, standing_of
from rekindle.pipeline.report.scores import TaskScores

ROWS = 400


def answers(share, seed):
    """Which rows a model has right."""
    return np.random.Generator(np.random.Philox(seed)).random(ROWS) < share


def standing(**right):
    scores = {run: [float(own.mean())] for run, own in right.items()}
    count = len(next(iter(right.values())))
    draws = {run: draw(lambda rows, own=own: own[rows].mean(), count) for run, own in right.items()}
    on_rows = RowScores(count, draws, right)
    return standing_of(TaskScores("trec", "accuracy", "test.jsonl", scores), on_rows)


def test_an_interval_of_paired_draws_is_that_of_the_mean_of_the_differences():
    first, second = answers(0.8, 1), answers(0.7, 2)
    found = standing(kd=first, ce=second)
    (one,) = found.differences
    assert (one.arm, one.against, one.mean) == (
        "kd",
        "ce",
        pytest.approx(first.mean() - second.mean()),
    )
    spread = (first.astype(float) - second).std() / np.sqrt(ROWS)
    low, high = stats.norm.interval(0.95, one.mean, spread)
    assert (one.low, one.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


def test_rows_are_paired_so_that_what_both_have_wrong_does_not_blur_their_difference():
    first = answers(0.7, 1)
    second = first.copy()
    second[np.flatnonzero(first)[:12]] = False  # twelve rows worse, all else equal
    one = standing(kd=first, ce=second).differences[0]
    assert one.low > 0
    assert one.high - one.low < 0.04


def test_of_several_runs_the_intervals_hold_together():
    runs = {name: answers(0.7, n) for n, name in enumerate("abcdef")}
    wide = {one.against: one for one in standing(**runs).differences}
    best = standing(**runs).best
    for name, one in wide.items():
        alone = standing(**{best: runs[best], name: runs[name]}).differences[0]
        assert one.high - one.low > 1.2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (
            {"ce": answers(0.5, 1), "kd": answers(0.9, 2), "both": answers(0.5, 3)},
            ["kd is best on trec by 0.", " over both (accuracy 0.9", " on test.jsonl)"],
        ),
        (
            {"ce": answers(0.5, 1), "kd": answers(0.9, 2), "both": answers(0.9, 3)},
            ["is better on trec than ce by 0.", "; not told apart from "],
        ),
        (
            {"ce": answers(0.7, 1), "kd": answers(0.7, 2)},
            ["No run is shown to be best on trec: ", "not told apart from ", "(more by 0.0"],
        ),
        ({"kd": answers(0.9, 1)}, ["only kd has a score on trec: accuracy 0.9"]),
    ],
)
def test_the_sentence_says_what_is_sure_and_what_is_not(right, words):
    found = standing(**right)
    assert [word for word in words if word not in found.verdict] == []
    assert found.is_best == (
        found.verdict.startswith("kd is best") and "apart" not in found.verdict
    )


def test_several_seeds_are_paired_and_one_seed_says_nothing_of_chance():
    def of(**scores):
        seeds = {run: range(len(own)) for run, own in scores.items()}
        return standing_of(TaskScores("t", "f1", "dev", scores, seeds=seeds))

    sure = of(a=[0.5, 0.52, 0.51], b=[0.6, 0.621, 0.609])
    assert sure.is_best
    assert sure.verdict == "b is best on t by 0.100 [0.098, 0.102] over a (f1 0.6100 on dev)"
    assert not of(a=[0.5, 0.6, 0.7], b=[0.61, 0.58, 0.72]).is_best
    same = {"a": [0.5, 0.6], "b": [0.8, 0.9]}  # differences: nothing varied
    for scores in ({"a": [0.5], "b": [0.9]}, {"a": [0.5], "b": [0.9, 0.8]}, same):
        told = of(**scores).verdict
        assert told.startswith("b has the highest score on t (f1 0.")
        assert told.endswith("; whether that is chance is unknown")
    assert standing_of(TaskScores("t", "f1", "dev", {"a": []})) is None


def test_scores_are_paired_by_the_number_of_their_seed_or_not_at_all():
    scores = {"a": [0.5, 0.6, 0.7], "b": [0.72, 0.521, 0.62]}

    def bounds(**seeds):
        (one,) = standing_of(TaskScores("t", "f1", "dev", scores, seeds=seeds)).differences
        return one.low, one.high

    assert bounds(a=[0, 1, 2], b=[2, 0, 1])[0] > 0  # as they belong together
    welch = stats.ttest_ind(scores["b"], scores["a"], equal_var=False).confidence_interval()
    for seeds in ({"a": [0, 1, 2], "b": [3, 4, 5]}, {"a": [0, 1, 2]}, {}):
        assert bounds(**seeds) == (pytest.approx(welch.low), pytest.approx(welch.high))


def test_of_equal_runs_one_is_rarely_better():
    """However many: the data choose which is held against the others."""
    wrong = 0
    for again in range(40):
        seed = np.random.Generator(np.random.Philox(key=[7, again])).random((12, 300))
        runs = {f"r{n}": own < 0.8 for n, own in enumerate(seed)}
        wrong += bool(with_weights(runs).significant)
    assert wrong <= 5


def with_weights(runs):
    """The standing of what is right, by counts of the rows that are drawn: faster."""
    right = {run: own.astype(float) for run, own in runs.items()}
    draws = {run: WEIGHTS @ own / 300 for run, own in right.items()}
    scores = {run: [float(own.mean())] for run, own in right.items()}
    return standing_of(TaskScores("t", "accuracy", "x", scores), RowScores(300, draws, runs))


WEIGHTS = np.random.Generator(np.random.Philox(5)).multinomial(300, [1 / 300] * 300, 500) * 1.0


def test_of_few_rows_no_more_is_said_than_the_exact_test_says():
    one = standing(a=np.array([True]), b=np.array([False]))
    assert not one.significant
    assert one.verdict.endswith(f"is unknown with fewer than {LEAST_ROWS} rows")
    base = np.arange(ROWS) < 300
    for more, told in ((5, False), (6, True)):  # 2 / 2^5 > 0.05 > 2 / 2^6
        better = base | (np.arange(ROWS) >= ROWS - more)
        assert standing(a=better, b=base).is_best == told


def test_draws_are_the_same_for_every_model_of_as_many_rows():
    rows = [draw(lambda at: float(at.sum()), 30, 50) for _ in range(2)]
    assert rows[0].tolist() == rows[1].tolist()
    assert len({*rows[0].tolist()}) > 20
