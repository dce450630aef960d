"""Batches of whole groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.train.ranking.groups import batches_of_groups, trained_rows


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.integers(1, 12),
    st.integers(0, 3),
    st.booleans(),
)
def test_every_group_is_whole_in_one_batch_of_each_epoch(numbers, size, epoch, pointwise):
    groups = np.array(numbers, np.int64)
    grades = (np.arange(len(groups)) % 3 == 0).astype(np.float32)
    if not pointwise and all(len({*grades[groups == g]}) < 2 for g in groups):
        return
    trained = trained_rows(groups, grades, pointwise)
    lengths = np.arange(len(groups))[::-1] % 7
    about = (groups, lengths, size)
    batches = batches_of_groups(*about, seed=5, epoch=epoch, chosen_rows=trained)
    assert sorted(np.concatenate(batches).tolist()) == trained.tolist()
    where = [{*groups[rows].tolist()} for rows in batches]
    assert sum(map(len, where)) == len({*groups[trained].tolist()})
    for rows, inside in zip(batches, where, strict=True):
        assert len(rows) <= size or len(inside) == 1
    again = batches_of_groups(*about, seed=5, epoch=epoch, chosen_rows=trained)
    assert all(map(np.array_equal, batches, again))


def test_epochs_and_seeds_differ_and_small_groups_share_a_batch():
    groups = np.repeat(np.arange(30), 3)
    about = (groups, np.ones(90, np.int64), 12)
    trained = np.arange(90)
    made = [
        batches_of_groups(*about, seed=seed, epoch=epoch, chosen_rows=trained)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert [[len(rows) for rows in batches] for batches in made] == [[12] * 7 + [6]] * 3
    first = [np.concatenate(batches).tolist() for batches in made]
    assert first[0] != first[1] != first[2]


def test_comparing_losses_are_taught_by_groups_with_an_order_alone():
    groups, grades = np.array([0, 1, 1, 2, 2]), np.array([1, 0, 1, 2, 2], np.float32)
    assert trained_rows(groups, grades, pointwise=False).tolist() == [1, 2]
    assert trained_rows(groups, grades, pointwise=True).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="need at least one array"):
        trained_rows(groups[:1], grades[:1], pointwise=False)  # refused when it is read
