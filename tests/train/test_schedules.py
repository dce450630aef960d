"""Weights and learning rates over the steps: worked examples, and what holds for all of them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.schedules import Schedule, is_used, learning_rate_factor, weight_at

KINDS = ("linear", "cosine", "step", "constant")
weights = st.floats(0, 10)
fractions = st.floats(0.01, 1)


def schedule(kind="linear", start=1.0, end=0.0, over=1.0):
    values = {"schedule": kind, "from": start, "to": end, "over": over}
    return parse_settings(Schedule, values)


def test_linear_is_knowledge_inheritances_weight():
    """α_t = max(1 − t/T_KD, 0) (Qin et al. 2022), T_KD = 60 of 100 steps."""
    found = [schedule(over=0.6).value(t, 100) for t in range(100)]
    assert found == pytest.approx([max(1 - t / 60, 0) for t in range(100)], abs=1e-15)
    assert found[59] > 0
    assert found[60:] == [0.0] * 40


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]),
        ("step", [2.0, 2.0, 2.0, 2.0, 1.0, 1.0]),
        ("constant", [2.0] * 6),
        ("cosine", [2.0, 1.5 + math.sqrt(0.125), 1.5, 1.5 - math.sqrt(0.125), 1.0, 1.0]),
    ],
)
def test_worked_examples(kind, expected):
    found = [schedule(kind, 2.0, 1.0, 0.5).value(t, 8) for t in range(6)]
    assert found == pytest.approx(expected, abs=1e-12)


@given(st.sampled_from(KINDS), weights, weights, fractions, st.integers(1, 400))
def test_schedules_begin_and_end_exactly_and_are_monotone(kind, start, end, over, steps):
    values = [schedule(kind, start, end, over).value(t, steps) for t in range(steps + 1)]
    assert values[0] == start
    last = start if kind == "constant" else end
    through = [v for t, v in enumerate(values) if t >= over * steps]
    assert through == [last] * len(through)
    assert through  # step `steps` at the latest
    low, high = min(start, last), max(start, last)
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)
    rising = [b - a for a, b in pairwise(values)]
    assert all(d * (last - start) >= -1e-9 for d in rising)


@given(st.integers(1, 1000), st.integers(1, 100))
def test_a_weight_that_fell_to_zero_is_zero_where_the_fraction_ends(steps, percent):
    """``over`` is written in decimals: 0.55 of 100 steps are 55, whatever floating point says."""
    if steps * percent % 100 == 0:
        end = steps * percent // 100
        for kind in ("linear", "step", "cosine"):
            fall = schedule(kind, over=percent / 100)
            assert fall.value(end, steps) == 0.0
            assert fall.value(end - 1, steps) > 0.0


@pytest.mark.parametrize(
    ("weight", "used"),
    [
        (0.0, False),
        (0.5, True),
        ({"from": 0, "to": 0}, False),
        ({"from": 0, "to": 1}, True),
        ({"from": 1, "to": 0}, True),
        ({"schedule": "constant", "from": 0, "to": 1}, False),
    ],
)
def test_a_weight_is_used_that_is_above_0_at_some_step(weight, used):
    weight = Schedule.model_validate(weight) if isinstance(weight, dict) else weight
    assert is_used(weight) == used
    assert any(weight_at(weight, step, 10) > 0 for step in range(10)) == used


def test_weight_at_takes_numbers_and_schedules():
    assert weight_at(0.3, 5, 10) == 0.3
    assert weight_at(2, 5, 10) == 2.0
    assert weight_at(schedule(), 5, 10) == 0.5


@pytest.mark.parametrize(
    "values",
    [{"from": -1}, {"to": -0.1}, {"over": 0}, {"over": 1.5}, {"schedule": "sine"}, {"form": 1}],
)
def test_schedules_refuse_what_makes_no_sense(values):
    with pytest.raises(InputError, match=next(iter(values))):
        parse_settings(Schedule, values)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_learning_rate_warms_up_linearly_and_reaches_its_peak(kind):
    found = [learning_rate_factor(kind, t, 100, 10) for t in range(11)]
    assert found == pytest.approx([(t + 1) / 10 for t in range(10)] + [1.0])


def test_the_learning_rate_after_the_warm_up():
    linear = [learning_rate_factor("linear", t, 12, 2) for t in (2, 7, 11, 12)]
    assert linear == pytest.approx([1.0, 0.5, 0.1, 0.0])
    cosine = [learning_rate_factor("cosine", t, 12, 2) for t in (2, 7, 12)]
    assert cosine == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate_factor("constant", 12, 12, 2) == 1.0


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(1, 300), st.integers(0, 400))
def test_the_learning_rate_stays_positive_and_falls_after_the_warm_up(kind, steps, warmup):
    factors = [learning_rate_factor(kind, t, steps, warmup) for t in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    rise, fall = factors[: min(warmup, steps)], factors[min(warmup, steps) :]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
