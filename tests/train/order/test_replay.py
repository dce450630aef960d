"""What is replayed: how much, of which domain, which sequences; the same wherever a run goes on."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.train.order.held_out import Ranges
from rekindle.train.order.replay import CYCLE, Replay, _deal

MEMORIES = {"a": Ranges([(0, 7)]), "b": Ranges([(10, 12), (20, 23)]), "c": Ranges([(40, 41)])}


def replay(every=4, fraction=0.25, batch=10, memories=MEMORIES, seed=0):
    return Replay(memories, fraction, batch, seed, every)


def losses_after(done):
    """Held-out losses that fall at changing speeds."""
    return {
        "loss/a": 5 / done,
        "loss/b": 3 - 0.1 * (done % 3),
        "loss/c": 2 + done / 50,
        "loss": 9.0,
    }


def run(one, start, stop, every=4):
    """What every step replays, told of the evaluations in turn."""
    found = []
    for step in range(start, stop):
        assert one.knows(step)
        found.append(one.at(step).tolist())
        if every and (step + 1) % every == 0:
            one.learn(step + 1, losses_after(step + 1))
    return found


def domain_of(number):
    return next(name for name, m in MEMORIES.items() if number in m.select(np.arange(len(m))))


# --- how many ---


@given(st.integers(1, 64), st.sampled_from([0.1, 0.05, 1 / 3, 0.5, 0.99]), st.integers(0, 10**9))
def test_the_share_of_all_sequences_is_exact_at_every_step(batch, fraction, step):
    one = replay(every=None, fraction=fraction, batch=batch)
    assert abs(one.slots_before(step) - step * batch * fraction) < 1 + 1e-6 * step
    count = one.slots_before(step + 1) - one.slots_before(step)
    assert len(one.at(step)) == count
    assert abs(count - batch * fraction) < 1 + 1e-6


def test_a_tenth_of_a_batch_of_four_is_one_in_every_tenth_step_of_five():
    one = replay(every=None, fraction=0.1, batch=4)
    assert [len(one.at(step)) for step in range(10)] == [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]


# --- which sequences ---


@pytest.mark.parametrize("every", [None, 1, 4, 7])
def test_every_sequence_of_a_domain_is_replayed_once_per_epoch_of_it(every):
    """Over intervals whose weights differ."""
    read = list(chain(*run(replay(every), 0, 120, every)))
    assert len(read) == 300
    for name, memory in MEMORIES.items():
        numbers = memory.select(np.arange(len(memory)))
        own = [number for number in read if domain_of(number) == name]
        assert len(own) > 2 * len(memory)
        for epoch in range(len(own) // len(memory)):
            there = own[epoch * len(memory) : (epoch + 1) * len(memory)]
            assert sorted(there) == numbers.tolist()


@pytest.mark.parametrize("every", [1, 4, 7])
def test_a_run_that_goes_on_anywhere_replays_the_same(every):
    whole = replay(every)
    expected = run(whole, 0, 60, every)
    for stop in range(1, 60, 2):
        first = replay(every)
        run(first, 0, stop, every)
        again = replay(every)
        again.restore(first.state)
        assert run(again, stop, 60, every) == expected[stop:]
        assert again.state == whole.state


def test_another_seed_replays_in_another_order():
    assert run(replay(seed=1), 0, 20) != run(replay(), 0, 20)


# --- which domain ---


def test_weights_are_the_loss_changes_of_two_evaluations_an_interval_before():
    one = replay(every=4)
    for interval in range(1, 6):
        one.learn(4 * interval, losses_after(4 * interval))
    for interval in range(3):
        assert one.weights(interval) == (1 / 3,) * 3
    for interval in range(3, 7):
        later, before = (losses_after(4 * (interval - n)) for n in (1, 2))
        changes = [abs(later[f"loss/{name}"] - before[f"loss/{name}"]) for name in MEMORIES]
        expected = [change / sum(changes) for change in changes]
        assert one.weights(interval) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [{}, {"loss/a": math.nan}, {"loss/a": math.inf}])
def test_weights_are_equal_where_a_loss_is_no_number_or_none_has_changed(bad):
    one, same = replay(every=1), replay(every=1)
    for done in (1, 2):
        one.learn(done, losses_after(done) | bad if bad else {})
        same.learn(done, losses_after(7))
    assert one.weights(3) == same.weights(3) == (1 / 3,) * 3
    again = replay(every=1)
    again.restore(one.state)
    assert again.weights(3) == (1 / 3,) * 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda w: sum(w) > 1e-3))
def test_slots_are_dealt_out_in_proportion_and_evenly(values):
    weights = np.array(values) / sum(values)
    deal = _deal(tuple(weights.tolist()))
    turns = np.bincount(deal.domains, minlength=len(weights))
    assert len(deal.domains) == CYCLE
    assert np.abs(turns - weights * CYCLE).max() < 1 + 1e-6
    for slot in (0, 1, 37, CYCLE - 1, CYCLE, 2 * CYCLE + 5):
        before = np.bincount(np.tile(deal.domains, 3)[:slot], minlength=len(weights))
        assert np.array_equal(deal.before(slot), before)
        assert np.abs(before - turns * slot / CYCLE).max() < len(weights)


def test_a_small_weight_has_its_turn_over_many_short_intervals():
    """Of every interval's three slots it would never get one if all began alike."""
    one = replay(every=1, batch=12)

    def losses(done):
        return {"loss/a": 0.9 * done, "loss/b": 0.05 * done, "loss/c": 0.05 * done}

    seen = Counter()
    for step in range(1003):
        if step >= 3:
            seen.update(map(domain_of, one.at(step).tolist()))
        one.learn(step + 1, losses(step + 1))
    total = sum(seen.values())
    assert total == 3000
    assert seen["b"] / total == pytest.approx(0.05, abs=0.015)
    assert seen["c"] / total == pytest.approx(0.05, abs=0.015)


# --- reading ahead ---


def test_what_an_interval_replays_is_known_a_whole_interval_before():
    one = replay(every=4)
    for step in range(12):
        assert one.knows(step)
    assert not one.knows(12)
    one.learn(4, losses_after(4))
    assert not one.knows(12)
    one.learn(8, losses_after(8))
    assert one.knows(15)
    assert not one.knows(16)
    assert replay(every=None).knows(10**9)


def test_what_is_known_can_be_said_while_an_evaluation_is_learned(monkeypatch):
    """Threads that read ahead ask at any moment, within ``learn``, too."""
    one, sum_up = replay(every=1), Replay._extend

    def asked_before_and_after(self):
        for _ in range(2):
            for step in filter(self.knows, range(12)):
                self.at(step)
            sum_up(self)

    monkeypatch.setattr(Replay, "_extend", asked_before_and_after)
    for done in range(1, 9):
        one.learn(done, losses_after(done))
    assert one.knows(9)


def test_an_evaluation_within_an_interval_is_not_learned():
    one = replay(every=4)
    one.learn(3, losses_after(3))
    assert one.state == []
    one.learn(4, losses_after(4))
    one.learn(6, losses_after(6))
    assert len(one.state) == 1
