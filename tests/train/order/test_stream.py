"""What every training step reads: each sequence once per epoch, whatever reads it."""

import sys
import threading
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.permutation import permute
from rekindle.data.targets.reading import reader as teacher_reader
from rekindle.train.order.held_out import Ranges, split_corpus
from rekindle.train.order.sequences import Order
from rekindle.train.order.stream import AHEAD, TrainingStream


class FakeCache:
    """Hands out the indices it is asked for, and remembers what was asked.

    ``read(index)`` may raise or take its time.
    """

    def __init__(self, read=lambda index: None):
        self.read = read
        self.asked: list[tuple] = []

    def gather(self, index, teachers, *, epoch, masked_view, allow_missing, scalars):
        assert not scalars  # no loss needs them
        self.asked.append((index.copy(), tuple(teachers), epoch, masked_view, allow_missing))
        self.read(index)
        return index


def stream(cache, indices, batch=4, seed=0, teachers_at=lambda step: [], **options):
    order = Order(Ranges.of(np.asarray(indices, np.int64)), batch, seed)
    return TrainingStream(cache, order, teachers_at, "masks", **options)


def prefetchers():
    return [t for t in threading.enumerate() if t.name == "prefetch" and t.is_alive()]


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


# --- order ---


def test_longest_first_is_the_same_share_of_the_same_step_by_length(masked_world):
    """And so each of its sequences with its own masks and targets, whatever the place."""
    cache = masked_world.open()
    options = {"teachers_at": lambda step: ["big"], "rank": 1, "world_size": 2}
    order = Order(split_corpus(cache, 0.1).train, 16, 0)
    plain, sorted_ = (
        TrainingStream(cache, order, masked_view=cache.masked_view().name, **options, **more)
        for more in ({}, {"longest_first": True})
    )
    moved = 0
    for step in range(len(order) // 16):
        one, other = plain.batch(step), sorted_.batch(step)
        back = np.argsort(-one.lengths, kind="stable")
        moved += not np.array_equal(back, np.arange(len(back)))
        assert (np.diff(other.lengths) <= 0).all()
        assert np.array_equal(other.index, one.index[back])
        for row, place in enumerate(back):
            assert_same(
                vars(other.take(slice(row, row + 1))), vars(one.take(slice(place, place + 1)))
            )
    assert moved > 2


@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_every_training_sequence_is_read_exactly_once_per_epoch(size, share, world, seed):
    """The ranks' strided parts, woven together, are the batches of a single process."""
    batch, epochs = share * world, 3
    indices = [3 * i + 1 for i in range(size)]  # not 0..N−1: the places must be looked up

    def part(rank, world):
        options = {"rank": rank, "world_size": world}
        order = Order(Ranges.of(np.array(indices)), batch, seed)
        return TrainingStream(FakeCache(), order, lambda step: [], None, **options)

    alone, ranks = part(0, 1), [part(rank, world) for rank in range(world)]
    read = []
    for step in range(-(-epochs * size // batch)):
        woven = np.full(batch, -1)
        for rank, one in enumerate(ranks):
            woven[rank::world] = one.batch(step)
            assert np.array_equal(one.order.at(step), alone.batch(step))
        assert np.array_equal(woven, alone.batch(step))
        read += woven.tolist()
    for epoch in range(epochs):
        there = read[epoch * size : (epoch + 1) * size]
        assert sorted(there) == indices
        order = permute(np.arange(size), size, seed=seed, epoch=epoch)
        assert there == [indices[place] for place in order]


def test_the_order_changes_from_epoch_to_epoch_and_with_the_seed():
    first, second = (stream(FakeCache(), range(64), 64).batch(step).tolist() for step in (0, 1))
    other = stream(FakeCache(), range(64), 64, seed=1).batch(0).tolist()
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_naming_the_sequences_of_a_step_reads_nothing():
    cache = FakeCache()
    assert len(stream(cache, range(20), 6, world_size=2, rank=1).order.at(7)) == 6
    assert not cache.asked


def test_a_step_asks_for_its_teachers_its_epochs_masks_and_the_allowed_holes():
    cache = FakeCache()
    found = stream(
        cache, range(10), 4, teachers_at=lambda step: [f"t{step}"], allow_missing=("t0",)
    )
    for step in (0, 2, 3, 5):
        found.batch(step)
    asked = [(teachers, epoch) for _, teachers, epoch, _, _ in cache.asked]
    # Step 2 reads places 8..11: it began in epoch 0 and keeps its masks.
    assert asked == [(("t0",), 0), (("t2",), 0), (("t3",), 1), (("t5",), 2)]
    assert {(view, missing) for _, _, _, view, missing in cache.asked} == {("masks", ("t0",))}


def test_every_rank_uses_the_masks_of_the_epoch_that_its_step_began_in():
    """Also one whose own sequences are all of the next epoch."""
    for size in (1, 3, 9, 10):
        for step in range(12):
            epochs = set()
            for rank in range(4):
                cache = FakeCache()
                stream(cache, range(size), 4, rank=rank, world_size=4).batch(step)
                epochs.add(cache.asked[0][2])
            assert epochs == {step * 4 // size}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 6, "world_size": 4}, r"batch_sequences 6 .* 4 processes.*a multiple of 4"),
        ({"batch": 2, "world_size": 4}, r"batch_sequences 2 .* 4 processes"),
        ({"indices": []}, "no sequence to train on"),
    ],
)
def test_a_world_that_cannot_share_a_batch_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        stream(FakeCache(), options.pop("indices", range(20)), **options)


# --- reading ahead ---


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("start", "stop"), [(0, 40), (4, 9), (8, 9), (9, 9)])
def test_steps_are_the_batches_in_order_from_any_start(start, stop, threads):
    """Whichever thread is done first."""
    delays = np.random.default_rng(0).permutation(20) / 10_000
    cache = FakeCache(lambda index: time.sleep(delays[index[0]]))
    one = stream(cache, range(20), threads=threads)
    found = [(step, batch.tolist()) for step, batch in one.steps(start, stop)]
    assert found == [(step, one.order.at(step).tolist()) for step in range(start, stop)]
    assert len(cache.asked) == stop - start
    assert not prefetchers()


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_runs_ahead_by_so_many_batches_per_thread_and_no_further(threads):
    cache = FakeCache()
    steps = stream(cache, range(20), threads=threads).steps(0, 100)
    for taken in (1, 2):
        next(steps)
        wait_until(lambda taken=taken: len(cache.asked) == taken + AHEAD * threads)
    time.sleep(0.05)
    assert len(cache.asked) == 2 + AHEAD * threads
    steps.close()
    assert not prefetchers()


def test_threads_read_at_the_same_time():
    """Each waits until four batches are being read."""
    four = threading.Barrier(4, timeout=60)
    one = stream(FakeCache(lambda index: four.wait()), range(20), threads=4)
    assert [step for step, _ in one.steps(0, 8)] == list(range(8))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("fails", [0, 3])
def test_an_error_of_the_reader_reaches_the_loop_after_the_batches_before_it(threads, fails):
    def read(index):
        if index[0] == bad:
            raise RuntimeError("the disk is on fire")
        time.sleep(0.01)  # it fails before the batches before it are there

    one = stream(FakeCache(read), range(400), threads=threads)
    bad = one.order.at(fails)[0]
    steps = one.steps(0, 100)
    assert [next(steps)[0] for _ in range(fails)] == list(range(fails))
    with pytest.raises(RuntimeError, match="on fire"):
        next(steps)
    assert not prefetchers()
    assert len(one.cache.asked) <= fails + AHEAD * threads


def test_of_two_errors_the_first_step_s_is_raised():
    late = threading.Event()

    def read(index):
        for step in (2, 3):
            if index[0] == one.order.at(step)[0]:
                if step == 2:
                    late.wait(60)
                late.set()
                raise RuntimeError(f"step {step}")

    one = stream(FakeCache(read), range(400), threads=4)
    steps = one.steps(0, 100)
    assert [next(steps)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="step 2"):
        next(steps)


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_closing_ends_every_thread_and_begins_no_other_batch(taken):
    gate = threading.Event()
    gate.set()
    cache = FakeCache(lambda index: gate.wait(60))
    steps = stream(cache, range(20), threads=3).steps(0, 10**9)
    list(islice(steps, taken))
    assert len(prefetchers()) == (3 if taken else 0)
    gate.clear()
    threading.Timer(0.05, gate.set).start()  # some are in the midst of a batch
    steps.close()
    assert not prefetchers()
    asked = len(cache.asked)
    time.sleep(0.02)
    assert len(cache.asked) == asked


def test_waiting_for_data_is_counted():
    one = stream(FakeCache(lambda index: time.sleep(0.03)), range(20))
    for _ in one.steps(0, 4):
        pass
    assert 0.05 < one.waited < 2
    quick = stream(FakeCache(), range(20))
    for _ in quick.steps(0, 4):
        time.sleep(0.03)
    assert quick.waited < one.waited


# --- a real cache ---


@pytest.fixture
def hasty():
    """Threads take turns as often as they can: a race that there is shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def assert_same(one, other):
    """Two batches, byte by byte."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif hasattr(one, "__dataclass_fields__"):
        assert_same(
            {name: getattr(one, name) for name in one.__dataclass_fields__},
            {name: getattr(other, name) for name in one.__dataclass_fields__},
        )
    else:
        assert one == other


def check_threads(path, names, repeats, steps=24):
    """What four threads read of a freshly opened cache is what one thread reads."""

    def opened(threads):
        cache = Cache.open(path)
        order = Order(split_corpus(cache, 0.1).train, 8, 0)
        view = cache.masked_view().name
        return TrainingStream(cache, order, lambda step: names, view, threads=threads)

    expected = list(opened(1).steps(0, steps))
    for _ in range(repeats):
        with closing(opened(4).steps(0, steps)) as found:
            for (one, batch), (other, again) in zip(expected, found, strict=True):
                assert one == other
                assert_same(batch, again)


def test_four_threads_read_what_one_reads(masked_world, hasty):
    """Every kind of teacher; from a cache that is freshly opened, so that all is read at once."""
    check_threads(masked_world.path, sorted(masked_world.open().teachers), repeats=6)


def test_four_threads_may_drop_decoded_batches_at_the_same_time(masked_world, hasty, monkeypatch):
    monkeypatch.setattr(teacher_reader, "DECODED_BATCHES", 1)
    check_threads(masked_world.path, ["sense", "score", "topics", "pair"], repeats=6)
