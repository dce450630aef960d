"""A result that is no better than one answer to every text, or than shuffled guesses."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.train.finetune.constant import _beyond_shuffled, weak_beside
from rekindle.train.finetune.task_data import TaskData

NAMES = ("no", "yes", "maybe")


def task(labels, names=NAMES, positive=None):
    dtype = np.int64 if names else np.float32
    return TaskData([""] * len(labels), None, np.array(labels, dtype), names, positive)


def with_hits(labels, wrong):
    """The labels, of which ``wrong`` are taken for the next class, evenly over the classes."""
    guesses = np.array(labels)
    rows = np.random.default_rng(0).permutation(len(labels))[:wrong]
    guesses[rows] = (guesses[rows] + 1) % 3
    return guesses


LABELS = [0] * 50 + [1] * 30 + [2] * 20


def test_always_the_commonest_class_is_weak_and_is_named():
    found = weak_beside("accuracy", np.zeros(100, np.int64), task(LABELS))
    assert found is not None
    assert found == ("no", 0.5)
    assert str(found) == "0.5000, that of always saying 'no'"


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_most_right_is_not_weak_and_shuffled_is(metric):
    assert weak_beside(metric, with_hits(LABELS, 20), task(LABELS)) is None
    shuffled = np.random.default_rng(1).permutation(LABELS)
    assert weak_beside(metric, shuffled, task(LABELS)) is not None


def test_beyond_chance_but_near_the_commonest_class_is_weak():
    """A fit that has begun: 0.31 where always saying ENTY gets 0.23 (TREC-6, three epochs)."""
    labels = np.repeat(np.arange(3), [500, 300, 200])
    guesses = np.zeros(1000, np.int64)
    guesses[500:540] = 1
    assert _beyond_shuffled(guesses, labels, 3) > 5
    assert weak_beside("accuracy", guesses, task(labels)) is not None


def test_a_few_rows_must_say_more():
    labels = [0, 1] * 5
    guesses = np.array([0, 1, 0, 1, 0, 1, 0, 0, 1, 0])  # 7 of 10
    assert weak_beside("accuracy", guesses, task(labels, NAMES[:2])) is not None
    assert weak_beside("accuracy", np.tile(guesses, 10), task(labels * 10, NAMES[:2])) is None


def test_the_f1_of_a_rare_class_is_held_against_always_saying_it():
    labels = np.array([1] * 5 + [0] * 95)
    half = np.array([1] * 3 + [0] * 95 + [1] * 2)  # F1 0.6, accuracy 0.96
    data = task(labels, NAMES[:2], "yes")
    assert weak_beside("f1", half, data) is None
    found = weak_beside("f1", np.ones(100, np.int64), data)
    assert found == ("yes", pytest.approx(2 * 5 / 105))


def test_scores_are_held_against_no_correlation():
    draw = np.random.default_rng(0)
    labels = draw.normal(size=200).astype(np.float32)
    noise = draw.normal(size=200).astype(np.float32)
    assert str(weak_beside("pearson", noise, task(labels, ()))) == "0, that of guessing"
    assert weak_beside("spearman", np.ones_like(labels), task(labels, ())) is not None
    assert weak_beside("pearson", labels + noise, task(labels, ())) is None


def test_where_dev_has_one_class_nothing_is_said():
    assert weak_beside("accuracy", np.zeros(9, np.int64), task([0] * 9)) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=5))
def test_the_permutation_test_is_that_of_all_permutations(rows):
    guesses, labels = (np.array(side) for side in zip(*rows, strict=True))
    hits = [(np.array(order) == labels).sum() for order in permutations(guesses)]
    spread = np.std(hits)
    expected = ((guesses == labels).sum() - np.mean(hits)) / spread if spread > 1e-9 else 0.0
    assert _beyond_shuffled(guesses, labels, 3) == pytest.approx(expected, abs=1e-6)
