"""Intervals, paired tests and Holm's adjustment: textbook values, scipy's, and what must hold."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rekindle.pipeline.report.significance import holm, mean_interval, paired

# Student (1908), "The probable error of a mean": additional hours of sleep with two drugs.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

scores = st.floats(-1, 1, allow_nan=False).map(lambda value: round(value, 6))
pairs = st.lists(st.tuples(scores, scores), min_size=2, max_size=8)
levels = st.floats(0.5, 0.999)
p_values = st.lists(st.none() | st.floats(0, 1), max_size=12)


def split(drawn):
    return [a for a, _ in drawn], [b for _, b in drawn]


# --- intervals ------------------------------------------------------------------------------------


def test_the_interval_of_a_textbook():
    """Mean 3, s² = 2.5, n = 5; t(0.975, 4) = 2.776."""
    low, high = mean_interval([1, 2, 3, 4, 5])
    assert (low + high) / 2 == pytest.approx(3)
    assert (high - low) / 2 == pytest.approx(2.776 * math.sqrt(2.5 / 5), abs=5e-4)


@pytest.mark.parametrize("values", [[], [0.5]])
def test_fewer_than_two_values_have_no_interval(values):
    assert mean_interval(values) is None


@given(st.lists(scores, min_size=2, max_size=8), levels)
def test_the_interval_is_that_of_scipy_and_holds_the_mean(values, level):
    low, high = mean_interval(values, level)
    assert low <= np.mean(values) + 1e-12
    assert high >= np.mean(values) - 1e-12
    if np.ptp(values) > 1e-9:
        expected = stats.t.interval(
            level, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
        )
        assert (low, high) == pytest.approx(expected, abs=1e-9)


@given(st.lists(scores, min_size=2, max_size=8))
def test_more_certainty_needs_a_wider_interval(values):
    narrow, wide = mean_interval(values, 0.9), mean_interval(values, 0.99)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


def test_the_interval_covers_as_often_as_it_says():
    """Of 2,000 samples of five normal values, 95 % (four standard errors: ± 2 %)."""
    draws = np.random.default_rng(7).normal(0.6, 0.02, size=(2000, 5))
    covered = [low <= 0.6 <= high for low, high in (mean_interval(row) for row in draws.tolist())]
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize("level", [0, 1, 95, -0.5])
def test_a_level_is_a_probability(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([1.0, 2.0], level)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(wrong):
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, wrong])
    with pytest.raises(ValueError, match="finite"):
        paired([1.0, 2.0], [1.0, wrong])


# --- paired tests ---------------------------------------------------------------------------------


def test_students_own_example():
    """t = 4.0621 on 9 degrees of freedom, p = 0.00283, interval 0.70 to 2.46."""
    result = paired(SLEEP_1, SLEEP_2)
    assert result.mean == pytest.approx(1.58)
    assert result.p == pytest.approx(0.002833, abs=1e-6)
    assert (result.low, result.high) == pytest.approx((0.7001, 2.4599), abs=1e-4)
    assert result.n == 10


@given(pairs)
def test_the_test_is_that_of_scipy(drawn):
    first, second = split(drawn)
    result = paired(first, second)
    if result.p is not None and result.low != result.high:
        expected = stats.ttest_rel(second, first)
        assert result.p == pytest.approx(expected.pvalue, abs=1e-9)
        interval = expected.confidence_interval(0.95)
        assert (result.low, result.high) == pytest.approx(tuple(interval), abs=1e-9)


@given(pairs)
def test_the_other_way_round_has_the_other_sign(drawn):
    first, second = split(drawn)
    one, other = paired(first, second), paired(second, first)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.p == pytest.approx(other.p)
    assert one.higher == sum(b - a > 1e-9 for a, b in zip(first, second, strict=True))
    assert one.higher + other.higher <= one.n  # the others are equal


@given(pairs, st.integers(-4, 4))
def test_what_both_gain_changes_nothing(drawn, gain):
    first, second = split(drawn)
    one = paired(first, second)
    other = paired([a + gain for a in first], [b + gain for b in second])
    assert other.mean == pytest.approx(one.mean, abs=1e-11)
    assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=1e-9)
    assert (other.p is None) == (one.p is None)
    assert one.p is None or other.p == pytest.approx(one.p, abs=1e-4)


@given(pairs)
def test_the_order_of_the_seeds_changes_nothing(drawn):
    one, other = paired(*split(drawn)), paired(*split(drawn[::-1]))
    assert other.mean == pytest.approx(one.mean, abs=1e-12)
    assert other.p == pytest.approx(one.p, abs=1e-9)


@given(pairs, st.floats(0.8, 0.99))
def test_the_interval_leaves_out_zero_where_the_test_rejects(drawn, level):
    result = paired(*split(drawn), level)
    if result.p is not None and abs(result.p - (1 - level)) > 1e-6:
        assert (result.p < 1 - level) == (not result.low <= 0 <= result.high)


def test_no_difference_is_rejected_as_often_as_it_says():
    """Arms that are equal: 5 % of 2,000 tests (four standard errors: ± 2 %)."""
    draws = np.random.default_rng(11).normal(size=(2, 2000, 5)).tolist()
    rejected = [paired(a, b).p < 0.05 for a, b in zip(*draws, strict=True)]
    assert 0.03 < np.mean(rejected) < 0.07


def test_pairing_takes_out_what_the_seeds_share():
    """Seeds that are hard for both arms hide a gain from a test of two independent samples."""
    first = [0.50, 0.60, 0.70, 0.80, 0.90]
    second = [0.511, 0.609, 0.712, 0.808, 0.911]
    assert paired(first, second).p < 0.001
    assert stats.ttest_ind(first, second).pvalue > 0.5


def test_arms_without_any_difference():
    result = paired([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (result.mean, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_one_difference_with_every_seed_is_no_test():
    """In float64 the differences are not equal: 0.9 − 0.8 is below 0.1, 0.4 − 0.3 above."""
    first, second = [0.8, 0.6, 0.3], [0.9, 0.7, 0.4]
    assert len({b - a for a, b in zip(first, second, strict=True)}) > 1
    result = paired(first, second)
    assert result.low == result.mean == result.high == pytest.approx(0.1)
    assert result.p is None


def test_rounding_alone_is_no_difference():
    first = [0.1 + 0.2, 0.7, 0.3]
    result = paired(first, [0.3, 0.7, 0.1 * 3])
    assert (result.mean, result.p, result.higher) == (0, 1, 0)


def test_a_single_pair_has_a_difference_and_no_more():
    result = paired([0.5], [0.75])
    assert (result.mean, result.low, result.high, result.p, result.n) == (0.25, None, None, None, 1)


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0, 2.0]), ([], [])])
def test_what_cannot_be_paired_is_refused(first, second):
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(first, second)


# --- Holm -----------------------------------------------------------------------------------------


def test_holm_as_in_a_textbook():
    """Four tests: 0.005·4, 0.01·3, then 0.03·2 and 0.04·1, raised to the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(p_values)
def test_holm_keeps_the_order_and_lowers_nothing(values):
    adjusted = holm(values)
    assert [p is None for p in adjusted] == [p is None for p in values]
    made = [(p, a) for p, a in zip(values, adjusted, strict=True) if p is not None]
    assert all(p <= a <= 1 for p, a in made)
    by_raw = [a for _, a in sorted(made)]
    assert by_raw == sorted(by_raw)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_by_its_definition(values):
    """Rejected at α: those before the first p(i) that is above α / (m − i + 1)."""
    adjusted = holm(values)
    order = sorted(values)
    m = len(values)
    for alpha in (0.01, 0.05, 0.2):
        steps = [p * (m - number) <= alpha for number, p in enumerate(order)]
        rejected = steps.index(False) if False in steps else m
        assert sum(a <= alpha for a in adjusted) == rejected


@given(p_values)
def test_holm_lies_between_none_and_bonferroni(values):
    for p, a in zip(values, holm(values), strict=True):
        assert a is None or a <= min(1, p * len(values))


def test_tests_that_could_not_be_made_make_no_other_surer():
    """As if they had shown nothing: it is known beforehand that they are made."""
    assert holm([0.02, None, 0.5]) == [0.06, None, 1.0]
    assert holm([None]) == [None]
    assert holm([]) == []


@given(p_values, st.integers(0, 5))
def test_tests_that_are_not_there_yet_count_as_if_they_showed_nothing(values, missing):
    assert holm(values, missing) == holm([*values, *[1.0] * missing])[: len(values)]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(wrong):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.5, wrong])
