"""The order of training data: a permutation per (seed, epoch), split over ranks without loss."""

import tracemalloc
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.permutation import epoch_batch, permute, stream_part


def epoch_order(size, seed=0, epoch=0):
    return permute(np.arange(size, dtype=np.int64), size, seed=seed, epoch=epoch)


@pytest.mark.parametrize("seed", [0, 7])
def test_permute_is_a_bijection_for_every_small_size(seed):
    for size in range(1, 301):
        assert sorted(epoch_order(size, seed).tolist()) == list(range(size))


# Around powers of two and of four, where the Feistel domain changes its width.
@pytest.mark.parametrize("size", [4095, 4096, 4097, 65_535, 65_536, 65_537, 100_003, 262_145])
def test_permute_is_a_bijection_for_large_sizes(size):
    assert np.array_equal(np.sort(epoch_order(size)), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 2**62), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6))
def test_a_huge_epoch_stays_within_its_size_and_does_not_collide(size, seed, epoch):
    index = np.unique(np.linspace(0, size - 1, 500).astype(np.int64).clip(0, size - 1))
    places = permute(index, size, seed=seed, epoch=epoch)
    assert places.min() >= 0
    assert places.max() < size
    assert len(np.unique(places)) == len(index)


def test_seeds_and_epochs_give_different_orders():
    orders = {(s, e): tuple(epoch_order(1000, s, e)) for s in range(8) for e in range(8)}
    assert len(set(orders.values())) == 64


def test_the_order_is_shuffled():
    """Neighbours land far apart, and no sequence stays near its place more often than chance."""
    order = epoch_order(10_000)
    assert np.abs(np.diff(order)).mean() == pytest.approx(10_000 / 3, rel=0.05)
    assert (order == np.arange(10_000)).sum() < 8
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04


def test_each_place_is_uniform_over_epochs():
    """Every sequence comes first equally often (chi-squared with 15 degrees of freedom)."""
    firsts = [int(permute(np.array([0]), 16, seed=3, epoch=e)[0]) for e in range(1600)]
    counts = np.bincount(firsts, minlength=16)
    assert ((counts - 100) ** 2 / 100).sum() < 45  # p ≈ 1e-4


def test_memory_does_not_grow_with_the_size():
    index = np.arange(64, dtype=np.int64)
    permute(index, 100, seed=0, epoch=0)
    tracemalloc.start()
    permute(index, 2**61, seed=0, epoch=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000


def test_the_order_of_a_trillion_sequences_needs_no_memory_of_its_own():
    size, batch = 10**12, 768
    steps = [0, 1, size // batch - 1, size // batch, 3 * size // batch]  # over two epochs' borders
    stream_part(0, batch, size, seed=0)
    tracemalloc.start()
    parts = [stream_part(step * batch, (step + 1) * batch, size, seed=0) for step in steps]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
    assert all(places.min() >= 0 and places.max() < size for places in parts)
    epochs = [np.arange(step * batch, (step + 1) * batch) // size for step in steps]
    assert [np.unique(one).tolist() for one in epochs] == [[0], [0], [0], [0, 1], [3]]
    first = np.concatenate(parts)[np.concatenate(epochs) == 0]
    assert len(np.unique(first)) == len(first)


@pytest.mark.parametrize("index", [[-1], [5], [0, 7]])
def test_an_index_outside_the_epoch_is_refused(index):
    with pytest.raises(ValueError, match=r"0\.\.4"):
        permute(np.array(index), 5, seed=0, epoch=0)


def test_nothing_is_a_permutation_of_nothing():
    assert len(permute(np.zeros(0, np.int64), 0, seed=0, epoch=0)) == 0


# Batches of one, that divide the size or not, larger than the size; more ranks than a batch holds.
GRID = list(product((1, 2, 7, 16, 61), (1, 3, 8, 64), (1, 2, 5)))


def test_ranks_together_are_the_batch_of_one_process_and_an_epoch_is_read_once():
    for size, batch, world in GRID:
        check_epoch(size, batch, world)


def check_epoch(size, batch, world):
    seen = []
    for number in range(-(-size // batch)):
        alone = epoch_batch(number, size, batch, seed=5, epoch=2)
        parts = [
            epoch_batch(number, size, batch, seed=5, epoch=2, rank=rank, world_size=world)
            for rank in range(world)
        ]
        woven = np.full(len(alone), -1)
        for rank, part in enumerate(parts):
            woven[rank::world] = part
        assert np.array_equal(woven, alone)
        seen += alone.tolist()
    assert sorted(seen) == list(range(size))


# Every index: one, two, around powers of two and four, primes; parts that divide an epoch or not,
# or hold several.
SIZES = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 97, 127, 129, 257)


@pytest.mark.covering
@pytest.mark.parametrize("first_epoch", [0, 3])
@pytest.mark.parametrize("batch", [1, 4, 6, 13, 64, 360])
def test_a_stream_reads_every_index_once_per_epoch_over_epoch_borders(batch, first_epoch):
    epochs = 3
    for size in SIZES:
        edges = range(0, size * epochs + batch, batch)
        parts = [
            stream_part(a, b, size, seed=3, first_epoch=first_epoch) for a, b in pairwise(edges)
        ]
        assert all(len(part) == batch for part in parts)
        read = np.concatenate(parts)
        for epoch in range(epochs):
            there = read[epoch * size : (epoch + 1) * size]
            assert np.array_equal(np.sort(there), np.arange(size))
            assert np.array_equal(there, epoch_order(size, 3, first_epoch + epoch))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 500), start=st.integers(0, 10**12), length=st.integers(0, 1500))
def test_a_part_can_be_read_without_those_before_it(size, start, length):
    """Wherever a run is resumed; and the order within it is the epochs'."""
    found = stream_part(start, start + length, size, seed=9)
    expected = [
        int(permute(np.array([p % size]), size, seed=9, epoch=p // size)[0])
        for p in range(start, start + min(length, 20))
    ]
    assert len(found) == length
    assert found[: len(expected)].tolist() == expected
