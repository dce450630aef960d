"""NDCG@10, MRR and MAP against scikit-learn and against all orders of what is tied."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from rekindle.train.ranking.scores import (
    CUT,
    beyond_chance,
    group_scores,
    groups_with_order,
    parts_of,
    ranking_scores,
)

grades_of_one = st.lists(st.integers(0, 3), min_size=2, max_size=14).filter(any)
ties = st.lists(st.integers(0, 3), min_size=14, max_size=14)


@given(grades_of_one, st.randoms(use_true_random=False))
def test_without_ties_they_are_scikit_learns_and_the_definition(grades, random):
    truth = np.array(grades, np.float32)
    scores = np.array(random.sample(range(100), len(grades)), np.float32) / 7
    ndcg, rank, precision = group_scores(scores, truth)
    assert ndcg == pytest.approx(ndcg_score(truth[None], scores[None], k=CUT), abs=1e-9)
    assert precision == pytest.approx(average_precision_score(truth > 0, scores), abs=1e-9)
    assert rank == pytest.approx(1 / (1 + np.flatnonzero(truth[np.argsort(-scores)] > 0)[0]))


@given(grades_of_one, ties)
def test_ndcg_of_ties_is_scikit_learns(grades, scores):
    truth, said = np.array(grades, np.float32), np.array(scores[: len(grades)], np.float32)
    assert group_scores(said, truth)[0] == pytest.approx(
        ndcg_score(truth[None], said[None], k=CUT), abs=1e-6
    )


@settings(max_examples=25)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=6).filter(any), ties)
def test_a_tie_is_the_mean_over_all_its_orders(grades, scores):
    truth, said = np.array(grades, np.float64), np.array(scores[: len(grades)], np.float64)
    each = [
        group_scores(said + 1e-3 * np.array(order), truth)
        for order in itertools.permutations(range(len(truth)))
    ]
    assert group_scores(said, truth) == pytest.approx(np.mean(each, axis=0), abs=1e-9)


def test_the_means_are_over_the_groups_that_an_order_matters_in():
    grades = np.array([1, 0, 2, 2, 0, 0, 3, 0, 1], np.float32)
    groups = np.array([5, 5, 1, 1, 2, 2, 3, 4, 4])
    scores = np.array([1, 2, 9, 8, 7, 6, 5, 1, 2], np.float32)
    assert [rows.tolist() for rows in groups_with_order(grades, parts_of(groups))] == [
        [7, 8],
        [0, 1],
    ]
    wanted = {"ndcg@10": (1 + 1 / np.log2(3)) / 2, "mrr": 0.75, "map": 0.75}
    assert ranking_scores(scores, grades, groups) == pytest.approx(wanted)
    shuffled = np.random.default_rng(0).permutation(len(groups))
    assert ranking_scores(scores[shuffled], grades[shuffled], groups[shuffled]) == pytest.approx(
        wanted
    )
    with pytest.raises(ValueError, match="no group has documents of different grades"):
        ranking_scores(scores[2:7], grades[2:7], groups[2:7])


def test_chance_is_that_of_shuffles_within_groups():
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(40), 5)
    grades = random.integers(0, 3, len(groups)).astype(np.float32)
    apart = random.normal(0, 50, 40)[groups]  # how easy a query is says nothing of an order
    assert abs(beyond_chance(apart, grades, groups)) < 1e-6
    assert beyond_chance(apart + grades, grades, groups) > 8
    shuffled = [
        beyond_chance(random.permuted(grades.reshape(40, 5), axis=1).ravel(), grades, groups)
        for _ in range(200)
    ]
    assert abs(np.mean(shuffled)) < 0.25
    assert np.std(shuffled) == pytest.approx(1, abs=0.15)
