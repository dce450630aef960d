"""Batches of similar lengths: what a window reads shuffled, dealt out to its steps by length."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.train.order.held_out import Ranges
from rekindle.train.order.replay import Replay
from rekindle.train.order.sequences import Order
from rekindle.train.order.similar_lengths import STEPS, WINDOWS, padding_ratios, window_of

MEMORIES = {"a": Ranges([(1000, 1037)]), "b": Ranges([(2000, 2011)])}


def lengths(numbers):
    """Of every sequence, by its number alone; as uneven as those of short texts."""
    return 3 + (np.asarray(numbers) * 7919) % 61


def order(size=300, batch=6, similar=True, seed=0, every=5, fraction=0.3, first=9):
    replay = Replay(MEMORIES, fraction, batch, seed, every) if fraction else None
    part = Ranges([(10, 50)]) if first else None
    made = lengths if similar else None
    return Order(Ranges([(0, size)]), batch, seed, part, first, replay, made)


def told(one, done):
    one.replay.learn(done, {"ce/a": 1 / done, "ce/b": 2 - done % 4 / 10})


@given(st.integers(1, 700), st.integers(0, 50))
def test_windows_part_a_stretch(count, first):
    seen, step = [], first
    while step < first + count:
        window = window_of(step, first, first + count)
        assert window.start == step
        assert {window_of(at, first, first + count) for at in window} == {window}
        seen.append(len(window))
        step = window.stop
    assert step == first + count
    assert max(seen) <= STEPS
    assert max(seen) - min(seen) <= 1
    assert len(seen) >= min(WINDOWS, count)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 60),
    st.sampled_from([None, 0.3]),
    st.sampled_from([0, 9]),
)
def test_every_sequence_is_read_once_per_epoch(batch, size, fraction, first):
    """By the steps that begin in an epoch: but for the last of them, which reads on in the next."""
    one, plain = (order(size, batch, s, 3, None, fraction, first) for s in (True, False))
    steps = range(3 * -(-size // batch) + 20)
    epochs = [one.epoch(step) for step in steps]
    assert epochs == [plain.epoch(step) for step in steps]
    for epoch in range(max(epochs)):  # not the last one: of it some steps are not looked at
        inside = [step for step in steps if epochs[step] == epoch]
        ours, theirs = (
            sorted(np.concatenate([o.at(s) for s in inside]).tolist()) if inside else []
            for o in (one, plain)
        )
        assert ours == theirs
        assert all(len(one.at(step)) == batch for step in inside)


def test_a_batch_holds_neighbours_in_length_and_the_longest_come_first():
    one = order(size=4096, batch=16, fraction=None, first=0)
    widest = lengths(one.at(0)).max()
    for start in range(0, 256, 64):  # the windows of an epoch of 256 steps
        batches = [lengths(one.at(step)) for step in range(start, start + 64)]
        spans = sorted((b.min(), b.max()) for b in batches)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
        assert all((np.diff(b) <= 0).all() for b in batches)  # micro-batches are cut so
        means = [b.mean() for b in batches]
        assert abs(np.corrcoef(means, range(64))[0, 1]) < 0.5  # in no order of length
    assert widest == max(lengths(one.at(step)).max() for step in range(64))


@pytest.mark.parametrize("seed", [0, 2**62])
def test_any_place_to_go_on_from_gives_the_same(seed):
    """Also in the middle of a window, with replay that follows evaluations."""
    whole = order(seed=seed)
    expected = []
    for step in range(40):
        expected.append(whole.at(step).tolist())
        if (step + 1) % 5 == 0:
            told(whole, step + 1)
    for stop in (0, 13, 31):
        before, again = order(seed=seed), order(seed=seed)
        for done in range(5, stop + 1, 5):
            told(before, done)
        again.replay.restore(before.replay.state())
        for step in range(stop, 40):
            assert again.at(step).tolist() == expected[step]
            if (step + 1) % 5 == 0:
                told(again, step + 1)
    assert expected[20:] != [order(seed=seed + 1).at(step).tolist() for step in range(15)]


def test_what_is_not_known_yet_is_not_asked_for():
    """A window ends where what it replays is decided anew."""
    one = order(every=5)
    for step in range(15):  # before the first evaluation three intervals are known
        assert one.replay.knows(step)
        one.at(step)
    assert not one.replay.knows(15)


def test_what_padding_costs():
    even = padding_ratios(np.full(50, 7), 8)
    assert even == {"shuffled": 1.0, "similar_lengths": 1.0}
    uneven = padding_ratios(np.array([1, 1, 1, 9]), 8)
    assert uneven["shuffled"] > 2.5
    assert uneven["similar_lengths"] < 1.05
    smaller = padding_ratios(np.array([1, 1, 1, 9]), 8, micro_batch=2)
    assert 1.05 < smaller["shuffled"] < uneven["shuffled"]
