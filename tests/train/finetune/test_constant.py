"""A result that is no better than one answer to every text, or than shuffled guesses."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.train.finetune.constant import Constant, Weak, beyond_shuffled, find_weakness
from rekindle.train.finetune.metrics import scores_of
from rekindle.train.finetune.task_data import TaskData

NAMES = ("no", "yes", "maybe")
LABELS = [0] * 50 + [1] * 30 + [2] * 20


def weak(metric, guesses, labels, names=NAMES, positive=None, **more):
    """What is weak about guesses: classes, bool [N,C] of several labels, or scores."""
    guesses, labels = np.array(guesses), np.array(labels)
    data = TaskData([""] * len(labels), None, labels, names, positive, **more)
    logits = guesses[:, None].astype(np.float32)
    if names:
        said = guesses if guesses.ndim > 1 else guesses[:, None] == np.arange(len(names))
        logits = np.where(said, 9.0, -9.0).astype(np.float32)
    found = find_weakness(metric, scores_of(data, logits)[metric], logits, data)
    return found and found.constant


def with_hits(labels, wrong):
    """The labels, of which ``wrong`` are taken for the next class, evenly over the classes."""
    guesses = np.array(labels)
    rows = np.random.default_rng(0).permutation(len(labels))[:wrong]
    guesses[rows] = (guesses[rows] + 1) % 3
    return guesses


def test_always_the_commonest_class_is_weak_and_is_named():
    found = weak("accuracy", [0] * 100, LABELS)
    assert found == ("no", 0.5)
    assert str(found) == "0.5000, that of always saying 'no'"


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_most_right_is_not_weak_and_shuffled_is(metric):
    assert weak(metric, with_hits(LABELS, 20), LABELS) is None
    assert weak(metric, np.random.default_rng(1).permutation(LABELS), LABELS) is not None


def test_beyond_chance_but_near_the_commonest_class_is_weak():
    """A fit that has begun: 0.31 where always saying one class gets 0.23."""
    labels = np.repeat(np.arange(3), [500, 300, 200])
    guesses = np.zeros(1000, np.int64)
    guesses[500:540] = 1
    assert weak("accuracy", guesses, labels) == ("no", 0.5)


@pytest.mark.parametrize(
    ("near", "beyond", "told"),
    [
        (
            True,
            True,
            "is little better than 0.5000, that of always saying 'no'; little was learned",
        ),
        (
            True,
            False,
            "is no better than 0.5000, that of always saying 'no'; next to nothing was learned",
        ),
        (False, False, "may be chance on so few rows (beside 0.5000, that of always saying 'no')"),
    ],
)
def test_what_is_weak_is_told_in_its_own_words(near, beyond, told):
    assert str(Weak(Constant("no", 0.5), near, beyond)) == told


def test_a_few_rows_must_say_more():
    labels, guesses = [0, 1] * 5, [0, 1, 0, 1, 0, 1, 0, 0, 1, 0]  # 7 of 10
    assert weak("accuracy", guesses, labels, NAMES[:2]) is not None
    assert weak("accuracy", guesses * 10, labels * 10, NAMES[:2]) is None


def test_the_f1_of_a_rare_class_is_held_against_always_saying_it():
    labels = [1] * 5 + [0] * 95
    half = [1] * 3 + [0] * 95 + [1] * 2  # F1 0.6, accuracy 0.96
    assert weak("f1", half, labels, NAMES[:2], "yes") is None
    found = weak("f1", [1] * 100, labels, NAMES[:2], "yes")
    assert found == ("yes", pytest.approx(2 * 5 / 105))


def test_several_labels_are_held_against_the_commonest_together():
    draw = np.random.default_rng(0)
    labels = draw.random((200, 3)) < [0.8, 0.6, 0.1]
    always = np.tile([True, True, False], (200, 1))
    found = weak("f1_micro", always, labels)
    assert found is not None
    assert found.answer == "no and yes"
    assert weak("f1_micro", labels ^ (draw.random(labels.shape) < 0.05), labels) is None


def test_tags_of_words_are_held_against_the_commonest():
    labels = np.array([0] * 80 + [1] * 20)
    words, guesses = [["a"] * 50] * 2, labels.copy()
    guesses[[0, 99]] = [1, 0]
    given = {"words": words, "names": ("O", "PER")}
    data = TaskData(["", ""], None, labels, given["names"], words=words)
    for said, is_weak in ((guesses, False), (np.zeros_like(labels), True)):
        logits = np.where(said[:, None] == np.arange(2), 9.0, -9.0).astype(np.float32)
        logits[50] = np.nan  # a word that was not read
        found = find_weakness("accuracy", scores_of(data, logits)["accuracy"], logits, data)
        assert (found is not None) == is_weak


def test_scores_are_held_against_no_correlation():
    draw = np.random.default_rng(0)
    labels, noise = draw.normal(size=(2, 200)).astype(np.float32)
    assert str(weak("pearson", noise, labels, ())) == "0, that of guessing"
    assert weak("spearman", np.ones_like(labels), labels, ()) is not None
    assert weak("pearson", labels + noise, labels, ()) is None


def test_where_dev_has_one_class_nothing_is_said():
    assert weak("accuracy", [0] * 9, [0] * 9) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=5))
def test_mean_and_deviation_are_those_of_all_permutations(rows):
    guesses, labels = (np.array(side) for side in zip(*rows, strict=True))
    hits = [(np.array(order) == labels).sum() for order in permutations(guesses)]
    spread = np.std(hits)
    expected = ((guesses == labels).sum() - np.mean(hits)) / spread if spread > 1e-9 else 0.0
    columns = ((side[:, None] == np.arange(3)).astype(float) for side in (guesses, labels))
    assert beyond_shuffled(*columns) == pytest.approx(expected, abs=1e-6)
