"""What every training step reads: each sequence once per epoch, nothing of a held-out document."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.corpus import BUCKETS
from rekindle.train.stream import TrainingStream, split_corpus


class FakeCorpus:
    def __init__(self, buckets):
        self._buckets = np.asarray(buckets, np.uint16)

    def buckets(self):
        return self._buckets


class FakeCache:
    """Hands out the indices it is asked for, and remembers what was asked."""

    def __init__(self, buckets, fail_at=None, delay=0.0):
        self.corpus, self.fail_at, self.delay = FakeCorpus(buckets), fail_at, delay
        self.asked: list[tuple] = []

    def __len__(self):
        return len(self.corpus.buckets())

    def gather(self, index, teachers, *, epoch, masked_view, allow_missing, scalars):
        assert not scalars  # no loss needs them
        if self.fail_at is not None and len(self.asked) == self.fail_at:
            raise RuntimeError("the disk is on fire")
        time.sleep(self.delay)
        self.asked.append((index.copy(), tuple(teachers), epoch, masked_view, allow_missing))
        return index


def stream(cache, indices, batch=4, seed=0, teachers_at=lambda step: [], **options):
    return TrainingStream(cache, np.asarray(indices), batch, seed, teachers_at, "masks", **options)


def prefetchers():
    return [t for t in threading.enumerate() if t.name == "prefetch" and t.is_alive()]


def documents(sizes, buckets):
    return np.repeat(np.asarray(buckets), sizes)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, BUCKETS - 1)), min_size=1, max_size=40),
    st.floats(0, 0.9),
)
def test_the_split_shares_out_the_sequences_and_no_document_is_on_both_sides(corpus, fraction):
    buckets = documents(*zip(*corpus, strict=True))
    split = split_corpus(FakeCache(buckets), fraction)
    together = np.concatenate([split.train, split.held_out])
    assert np.array_equal(np.sort(together), np.arange(len(buckets)))
    assert len(split.train)
    assert np.array_equal(split.train, np.sort(split.train))
    if fraction == 0:
        assert not len(split.held_out)
        return
    if len(buckets) > 1:
        assert len(split.held_out)
    # By document, unless whole documents would have been far more than was asked for.
    if set(buckets[split.train]) & set(buckets[split.held_out]):
        lowest = buckets <= max(buckets.min(), fraction * BUCKETS)
        assert lowest.all() or lowest.mean() > 0.25
        assert len(split.held_out) <= max(fraction, 0.5) * len(buckets) + 1


def test_the_split_depends_on_the_documents_alone(masked_world):
    cache = masked_world.open()
    split = split_corpus(cache, 0.2)
    again = split_corpus(masked_world.open(), 0.2)
    assert np.array_equal(split.train, again.train)
    assert np.array_equal(split.held_out, again.held_out)
    names = np.array([cache.example(i).document for i in range(len(cache))])
    assert not set(names[split.train]) & set(names[split.held_out])
    assert 0.03 < len(split.held_out) / len(cache) < 0.5
    more = split_corpus(cache, 0.4)  # a larger share holds the smaller one
    assert set(split.held_out) <= set(more.held_out)


def test_a_small_corpus_holds_out_a_whole_document():
    """Two per cent of 40 documents is less than one: the one with the lowest hash is taken."""
    buckets = documents([3] * 40, range(400, 10_000, 240))
    split = split_corpus(FakeCache(buckets), 0.02)
    assert split.held_out.tolist() == [0, 1, 2]


@pytest.mark.parametrize("sequences", [1, 2, 3, 100])
def test_one_document_is_split_by_sequences(sequences):
    split = split_corpus(FakeCache([77] * sequences), 0.1)
    assert len(split.train) + len(split.held_out) == sequences
    assert len(split.train)
    assert bool(len(split.held_out)) == (sequences > 1)
    assert len(split.held_out) <= max(1, sequences // 10)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 4), st.integers(0, 5))
def test_every_training_sequence_is_read_exactly_once_per_epoch(size, batch, world, seed):
    indices = np.arange(size) * 3 + 1  # not 0..N−1: the places must be looked up
    epochs, total = 3, 3 * size
    steps = -(-total // batch)
    by_rank = [
        [
            stream(FakeCache(range(size * 3 + 1)), indices, batch, seed, rank=r, world_size=world)
            .batch(step)
            .tolist()
            for step in range(steps)
            if batch >= world
        ]
        for r in range(world)
    ]
    if batch < world:
        return
    read = []
    for step in range(steps):
        parts = [by_rank[r][step] for r in range(world)]
        merged = [None] * batch
        for r, part in enumerate(parts):
            merged[r::world] = part
        read += merged
    for epoch in range(epochs):
        assert sorted(read[epoch * size : (epoch + 1) * size]) == indices.tolist()
    alone = stream(FakeCache(range(size * 3 + 1)), indices, batch, seed)
    assert read == [i for step in range(steps) for i in alone.batch(step).tolist()]


def test_the_order_changes_from_epoch_to_epoch_and_with_the_seed():
    cache = FakeCache(range(64))
    first, second = (stream(cache, range(64), 64).batch(step).tolist() for step in (0, 1))
    other = stream(cache, range(64), 64, seed=1).batch(0).tolist()
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_a_step_asks_for_its_teachers_its_epochs_masks_and_the_allowed_holes():
    cache = FakeCache(range(10))
    found = stream(
        cache, range(10), 4, teachers_at=lambda step: [f"t{step}"], allow_missing=("t0",)
    )
    for step in (0, 2, 3, 5):
        found.batch(step)
    asked = [(teachers, epoch) for _, teachers, epoch, _, _ in cache.asked]
    # Step 2 reads places 8..11: it began in epoch 0 and keeps its masks.
    assert asked == [(("t0",), 0), (("t2",), 0), (("t3",), 1), (("t5",), 2)]
    assert {(view, missing) for _, _, _, view, missing in cache.asked} == {("masks", ("t0",))}


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (4, 9), (9, 9)])
def test_steps_are_the_batches_in_order_from_any_start(start, stop):
    one = stream(FakeCache(range(20)), range(20))
    found = [(step, batch.tolist()) for step, batch in one.steps(start, stop)]
    assert found == [(step, one.batch(step).tolist()) for step in range(start, stop)]
    assert not prefetchers()


def test_reading_runs_ahead_by_the_depth_and_no_further():
    cache = FakeCache(range(20))
    steps = stream(cache, range(20)).steps(0, 100, depth=2)
    next(steps)
    deadline = time.monotonic() + 5
    while len(cache.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    # One was taken, two wait in the queue, one is in the reader's hand.
    assert len(cache.asked) == 4
    steps.close()
    assert not prefetchers()


def test_an_error_of_the_reader_reaches_the_loop_after_the_batches_before_it():
    steps = stream(FakeCache(range(20), fail_at=3), range(20)).steps(0, 10)
    assert [next(steps)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="on fire"):
        next(steps)
    assert not prefetchers()


def test_waiting_for_data_is_counted():
    one = stream(FakeCache(range(20), delay=0.03), range(20))
    for _ in one.steps(0, 4):
        pass
    assert 0.05 < one.waited < 2
