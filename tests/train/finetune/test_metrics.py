import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.train.finetune.label_lists import SEVERAL, TAGS
from rekindle.train.finetune.metrics import (
    METRICS,
    all_scores,
    chosen_metric,
    log_undefined_scores,
    printed_name,
    score,
)
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.ranking.kinds import RANKING

CLASSES = "single_label_classification"
labels_of_two = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@given(labels_of_two)
def test_two_classes_agree_with_the_counts(rows):
    guess, truth = np.array(rows).T
    tp, fp = int(np.sum(guess & truth)), int(np.sum(guess & (1 - truth)))
    fn, tn = int(np.sum((1 - guess) & truth)), int(np.sum((1 - guess) & (1 - truth)))
    assert score("accuracy", guess, truth) == pytest.approx((tp + tn) / len(rows))
    expected_f1 = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
    assert score("f1", guess, truth) == pytest.approx(expected_f1)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / product**0.5 if product else 0.0
    assert score("matthews", guess, truth) == pytest.approx(expected, abs=1e-12)


def test_f1_counts_class_one_for_two_classes_and_every_class_for_more():
    truth, guess = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    one, zero = 2 / 3, 4 / 5
    assert score("f1", guess, truth) == pytest.approx(one)
    assert score("f1", guess, truth, num_classes=3) == pytest.approx((one + zero) / 2)


@given(st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=2, max_size=30))
def test_correlations_are_finite_symmetric_and_bounded(rows):
    guess, truth = np.array(rows, dtype=np.float32).T
    for metric in METRICS["regression"]:
        value = score(metric, guess, truth)
        assert -1 - 1e-9 <= value <= 1 + 1e-9
        assert value == pytest.approx(score(metric, truth, guess), abs=1e-9)
        assert value == pytest.approx(score(metric, guess * 3 + 7, truth), abs=1e-6)


def test_pearson_is_numpys_and_spearman_looks_at_ranks_only():
    truth = np.array([0.0, 1.0, 2.5, 4.0, 5.0])
    guess = np.array([0.1, 0.2, 4.0, 3.0, 90.0])
    assert score("pearson", guess, truth) == pytest.approx(np.corrcoef(guess, truth)[0, 1])
    assert score("spearman", np.exp(truth), truth) == pytest.approx(1.0)
    assert score("spearman", -truth, truth) == pytest.approx(-1.0)


@pytest.mark.parametrize("metric", METRICS["regression"])
def test_a_constant_prediction_scores_zero(metric):
    truth = np.array([1.0, 2.0, 3.0])
    assert score(metric, np.full(3, 2.5), truth) == 0.0
    assert score(metric, np.array([0.0, 1e-200, 0.0]), truth) == pytest.approx(0.0, abs=1e-9)
    assert score(metric, truth, np.full(3, 2.5)) == 0.0


def test_all_scores_come_from_logits():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    right = {"accuracy": 1.0, "f1": 1.0, "matthews": 1.0}
    assert all_scores(CLASSES, logits, np.array([0, 1, 1]), positive=1) == right
    assert all_scores(CLASSES, logits, np.array([0, 1, 1])).keys() == {"accuracy", "matthews"}
    rising = all_scores("regression", np.array([[1.0], [2.0], [3.0]]), np.array([5.0, 6.0, 7.0]))
    assert rising == pytest.approx({"pearson": 1.0, "spearman": 1.0})
    several = np.array([[1.0, 5.0], [2.0, 4.0], [3.0, 3.0]])
    mean = all_scores("regression", several, several * [1, -1])
    assert mean == pytest.approx({"pearson": 0.0, "spearman": 0.0}, abs=1e-9)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="diverged"):
        all_scores(CLASSES, np.array([[np.nan, 0.0]]), np.array([0]))


@pytest.mark.parametrize("problem", METRICS)
def test_a_metric_must_fit_its_problem(problem):
    names = () if problem in ("regression", RANKING) else ("B-x", "O")
    labels = np.zeros((1, 2), bool) if problem == SEVERAL else np.zeros(1, np.int64)
    words = [["a"]] if problem == TAGS else None
    groups = np.zeros(1, np.int64) if problem == RANKING else None
    data = TaskData(["a"], None, labels, names, words=words, groups=groups)
    assert data.problem == problem
    assert chosen_metric(None, data) == METRICS[problem][0]
    assert chosen_metric(METRICS[problem][-1], data) == METRICS[problem][-1]
    for wrong in {"bleu", *itertools.chain(*METRICS.values())} - {*METRICS[problem]}:
        with pytest.raises(InputError, match=", ".join(METRICS[problem])):
            chosen_metric(wrong, data)


def test_f1_of_two_classes_needs_a_positive_one():
    two = TaskData(["a"], None, np.zeros(1, np.int64), ("ham", "spam"))
    with pytest.raises(InputError, match=r"f1 needs one .* positive=spam"):
        chosen_metric("f1", two)
    assert chosen_metric("f1", replace(two, positive="ham")) == "f1"
    guess, truth = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    assert score("f1", guess, truth, positive=0) == pytest.approx(4 / 5)


def test_an_f1_is_printed_with_what_it_is_of():
    single = "single_label_classification"
    names = [printed_name("f1", *of) for of in ((single, 2), (single, 3), (TAGS, 5))]
    assert names == ["f1", "macro f1", "entity f1"]
    assert printed_name("f1_macro", SEVERAL, 3) == "f1_macro"
    assert printed_name("accuracy", single, 3) == "accuracy"


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match="2 predictions for 1 labels"):
        score("accuracy", np.array([1, 0]), np.array([1]))


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        (np.float32([2.5, 2.5]), (), "every score of F is 2.5: a correlation is not defined, 0 is"),
        (np.float32([[1, 3], [2, 3]]), (), "every score number 1 of F is 3: a correlation"),
        (np.float32([2.5, 3]), (), ""),
        (np.array([[True, False]]), ("a", "b"), "1 of 2 labels have rows; f1_macro is the mean"),
        (np.array([[True, True]]), ("a", "b"), ""),
        (np.array([0, 2]), ("a", "b", "c"), "2 of 3 classes have rows; f1 is the mean over these"),
        (np.array([1, 1]), ("a", "b"), "every label of F is 'b': matthews is not defined"),
        (np.array([1, 0]), ("a", "b"), ""),
    ],
)
def test_what_is_not_defined_and_what_a_mean_is_over_are_said(labels, names, told, caplog):
    caplog.set_level("INFO", "rekindle")
    log_undefined_scores("F", TaskData(["t"] * len(labels), None, labels, names))
    assert told in caplog.text
    assert len(caplog.records) == bool(told)
