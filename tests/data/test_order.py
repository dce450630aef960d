"""The order of training data: a permutation per (seed, epoch), split over ranks without loss."""

import tracemalloc
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.order import epoch_batch, permute, step_epoch, stream_batch


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
    stream_batch(0, size, batch, seed=0)
    tracemalloc.start()
    parts = [part for step in steps for part in stream_batch(step, size, batch, seed=0)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
    borders = [[epoch for epoch, _ in stream_batch(step, size, batch, seed=0)] for step in steps]
    assert borders == [[0], [0], [0], [0, 1], [3]]
    assert all(places.min() >= 0 and places.max() < size for _, places in parts)
    first = np.concatenate([places for epoch, places in parts if epoch == 0])
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


def test_a_stream_reads_every_sequence_once_per_epoch_over_epoch_borders():
    for size, batch, world in GRID:
        check_stream(size, batch, world)


def check_stream(size, batch, world, epochs=3):
    steps = -(-size * epochs // batch)
    seen = {}
    for step in range(steps):
        alone = stream_batch(step, size, batch, seed=1)
        assert sum(len(places) for _, places in alone) == batch
        joined = {}
        for rank in range(world):
            for epoch, places in stream_batch(
                step, size, batch, seed=1, rank=rank, world_size=world
            ):
                joined.setdefault(epoch, []).extend(places.tolist())
        assert {e: sorted(p) for e, p in joined.items()} == {e: sorted(p) for e, p in alone}
        for epoch, places in alone:
            seen.setdefault(epoch, []).extend(places.tolist())
    for epoch in range(epochs):  # the last one that was begun may be unfinished
        assert sorted(seen[epoch]) == list(range(size))
    for places in seen.values():
        assert len(set(places)) == len(places)


# Every index: one, two, around powers of two and four, primes; batches that divide an epoch or
# not, or hold several; every world that divides the batch.
SIZES = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 97, 127, 129, 257)
WORLDS = {1: (1,), 4: (1, 2, 4), 6: (1, 2, 3, 6), 13: (1, 13), 64: (1, 2, 8, 64), 360: (1, 5, 24)}


@pytest.mark.parametrize("batch", WORLDS)
def test_every_index_is_read_once_per_epoch_by_every_world_that_divides_the_batch(batch):
    epochs = 3
    for size, world in product(SIZES, WORLDS[batch]):
        read = []  # (epoch, index) as the ranks' parts of every step are woven together
        for step in range(-(-size * epochs // batch)):
            woven = np.full((batch, 2), -1)
            for rank in range(world):
                parts = stream_batch(step, size, batch, seed=3, rank=rank, world_size=world)
                flat = [np.stack([np.full(len(p), e), p], axis=1) for e, p in parts]
                woven[rank::world] = np.concatenate(flat)
            assert woven[0, 0] == step_epoch(step, size, batch)
            read.append(woven)
        read = np.concatenate(read)
        assert np.array_equal(read[:, 0], np.arange(len(read)) // size)
        for epoch in range(epochs):
            there = read[read[:, 0] == epoch, 1]
            assert np.array_equal(np.sort(there), np.arange(size))
            assert np.array_equal(there, epoch_order(size, 3, epoch))


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 500),
    batch=st.integers(1, 700),
    step=st.integers(0, 10**9),
    world=st.integers(1, 9),
)
def test_a_step_can_be_read_without_those_before_it(size, batch, step, world):
    """Wherever a run is resumed; and within a step the order is the epoch's."""
    alone = stream_batch(step, size, batch, seed=9)
    flat = [(epoch, int(place)) for epoch, places in alone for place in places]
    first = step * batch
    expected = [
        (p // size, int(permute(np.array([p % size]), size, seed=9, epoch=p // size)[0]))
        for p in range(first, first + min(batch, 20))
    ]
    assert flat[: len(expected)] == expected
    epochs = [epoch for epoch, _ in alone]
    assert epochs == sorted(set(epochs))
