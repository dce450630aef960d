"""Length buckets: every row exactly once, and never more tokens than the budget allows."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.pipeline.caching.batching import length_buckets

LENGTHS = st.lists(st.integers(0, 600), max_size=200).map(lambda n: np.array(n, np.int64))
BUDGETS = st.integers(1, 3000)


@given(LENGTHS, BUDGETS)
def test_every_row_with_tokens_stands_in_exactly_one_batch(lengths, budget):
    batches = length_buckets(lengths, budget)
    rows = [int(row) for batch in batches for row in batch]
    assert sorted(rows) == np.flatnonzero(lengths).tolist()
    assert all(len(batch) > 0 for batch in batches)


@given(LENGTHS, BUDGETS)
def test_a_batch_is_within_the_budget_or_a_single_sequence(lengths, budget):
    for batch in length_buckets(lengths, budget):
        assert len(batch) * lengths[batch].max() <= budget or len(batch) == 1


@given(LENGTHS, BUDGETS)
def test_the_longest_come_first_and_equal_lengths_keep_their_order(lengths, budget):
    rows = [int(row) for batch in length_buckets(lengths, budget) for row in batch]
    assert rows == sorted(rows, key=lambda row: (-lengths[row], row))


@given(LENGTHS, BUDGETS)
def test_no_batch_could_have_taken_the_next_row(lengths, budget):
    batches = length_buckets(lengths, budget)
    for batch, _ in pairwise(batches):
        assert (len(batch) + 1) * lengths[batch].max() > budget


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_run_is_no_batch(lengths):
    assert length_buckets(np.array(lengths, np.int64), 64) == []


def test_padding_counts():
    batches = length_buckets(np.array([1, 10, 1, 1, 10, 1]), 20)
    assert [batch.tolist() for batch in batches] == [[1, 4], [0, 2, 3, 5]]
