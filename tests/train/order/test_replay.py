"""What is replayed: how much, of which domain, which sequences; the same wherever a run goes on."""

import math
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import CheckpointError
from rekindle.train.order.held_out import Ranges
from rekindle.train.order.replay import CYCLE, RULE, Replay, _deal, weights_by_loss

MEMORIES = {"a": Ranges([(0, 7)]), "b": Ranges([(10, 12), (20, 23)]), "c": Ranges([(40, 41)])}


def replay(every=4, fraction=0.25, batch=10, memories=MEMORIES, seed=0):
    return Replay(memories, fraction, batch, seed, every)


def losses_after(done):
    """Held-out losses that fall at changing speeds."""
    return {
        "ce/a": 5 / done,
        "ce/b": 3 - 0.1 * (done % 3),
        "ce/c": 2 + done / 50,
        "loss": 9.0,
    }


def run(one, start, stop, every=4):
    """What every step replays, told of the evaluations in turn."""
    found = []
    for step in range(start, stop):
        assert one.knows(step)
        found.append(one.at(step).tolist())
        one.count(batch_of([domain_of(number) for number in found[-1]]))
        if every and (step + 1) % every == 0:
            one.learn(step + 1, losses_after(step + 1))
    return found


def batch_of(domains, labels=3, masked=True):
    """A batch of sequences of these domains, with so many labels each."""
    rows = np.repeat(np.arange(len(domains)), labels)
    lengths = np.full(len(domains), labels + 1)
    view = SimpleNamespace(rows=rows) if masked else None
    predicted = np.repeat(np.arange(len(lengths)), np.maximum(lengths - 1, 0)), None
    return SimpleNamespace(index=lengths, domains=domains, next_places=predicted, masked=view)


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
    for stop in range(every, 60, 6):  # about every second stop by one of them
        first = replay(every)
        run(first, 0, stop, every)
        again = replay(every)
        again.restore(first.state())
        assert run(again, stop, 60, every) == expected[stop:]
        assert again.state() == whole.state()


def test_another_seed_replays_in_another_order():
    assert run(replay(seed=1), 0, 20) != run(replay(), 0, 20)


# --- which domain ---


# Losses of two domains, tokens of each, whether it is the second half: the shares, by hand.
BY_HAND = [
    # 0.5 in 10 tokens, 0.3 in 20: 0.05 and 0.015 a token, so 10 : 3
    ((4.0, 5.0), (3.5, 4.7), (10, 20), False, (10 / 13, 3 / 13)),
    ((4.0, 5.0), (3.5, 4.7), (10, 20), True, (10 / 13, 3 / 13)),
    # none replayed counts as one token: 0.5 and 0.1
    ((4.0, 5.0), (3.5, 4.0), (0, 10), False, (5 / 6, 1 / 6)),
    # forgotten, or flat: as much as the other in the first half, nothing in the second
    ((4.0, 5.0), (5.0, 4.0), (10, 10), False, (0.5, 0.5)),
    ((5.0, 5.0), (5.0, 4.0), (10, 10), False, (0.5, 0.5)),
    ((5.0, 5.0), (5.0, 4.0), (10, 10), True, (1e-8, 1.0)),
    # the largest of all, not the mean of the others
    ((5.0, 5.0, 5.0), (6.0, 4.0, 4.5), (9, 10, 10), False, (0.4, 0.4, 0.2)),
    # nothing falls
    ((5.0, 5.0), (5.0, 6.0), (10, 10), False, (0.5, 0.5)),
    ((5.0, 5.0), (5.0, 6.0), (10, 10), True, (0.5, 0.5)),
]


@pytest.mark.parametrize(("before", "later", "tokens", "second_half", "shares"), BY_HAND)
def test_the_authors_rule_by_hand(before, later, tokens, second_half, shares):
    found = weights_by_loss(before, later, tokens, second_half)
    assert found == pytest.approx(shares, rel=1e-6, abs=1e-7)
    assert sum(found) == pytest.approx(1)


def test_weights_follow_two_evaluations_an_interval_before_and_what_was_replayed_between():
    one = Replay(MEMORIES, 0.25, 10, 0, every=4, steps=40)
    losses = {"a": (4, 5, 5, 5, 5, 5), "b": (5, 4.5, 4.2, 4.0, 3.9, 3.8), "c": (9, 8, 7, 7, 6, 5)}
    tokens = {"a": (0, 7, 7, 7, 7, 7), "b": (5, 5, 50, 5, 5, 5), "c": (1, 20, 20, 20, 20, 20)}
    for interval in range(6):
        for name, counts in tokens.items():
            for masked in (True, False):  # of a causal LM: all tokens that have a next one
                one.count(batch_of([name, "new", None], counts[interval], masked))
        values = {f"ce/{name}": each[interval] for name, each in losses.items()}
        one.learn(4 * (interval + 1), values)
    for interval in range(3):
        assert one.weights(interval) == (1 / 3,) * 3
    for interval in range(3, 8):
        # After intervals i−2 and i−1, counted from 1; replayed in interval i−1.
        falls = {
            name: (each[interval - 3] - each[interval - 2]) / max(2 * tokens[name][interval - 2], 1)
            for name, each in losses.items()
        }
        best = max(falls.values()) if interval < 5 else 1e-9  # 40 steps: the 20th begins interval 5
        raw = [fall if fall > 0 else best for fall in falls.values()]
        assert one.weights(interval) == pytest.approx([w / sum(raw) for w in raw], rel=1e-6)
    assert one.weights(4)[0] == max(one.weights(4))  # flat, and not given up
    assert one.weights(6)[0] < 1e-5


def test_a_run_under_the_former_rule_is_not_gone_on_with():
    former = [[4.0, 5.0, 6.0], [5.0, None, 6.0]]
    for state in (former, {"rule": RULE - 1, "losses": former}):
        with pytest.raises(CheckpointError, match="begun by another version"):
            replay().restore(state)
    replay(every=None).restore([])  # all domains alike: the same rule as ever
    replay().restore(None)


def test_the_counts_of_all_processes_are_one(monkeypatch):
    """Two processes with a share each, one of which ends within an interval and is resumed."""
    whole, ranks = replay(every=2), [replay(every=2) for _ in range(2)]
    batches = [batch_of(list(names)) for names in ("ab", "ca", "bb", "ac")]

    def total(own):
        return [sum(values) for values in zip(*(rank._own_tokens for rank in ranks), strict=True)]

    for step, batch in enumerate(batches):
        whole.count(batch)
        for rank, domain in zip(ranks, batch.domains, strict=True):
            rank.count(batch_of([domain]))
        if step == 2:
            state = ranks[0].state(total)
            for rank in ranks:
                rank.restore(state)
        if step % 2:
            whole.learn(step + 1, losses_after(step + 1))
            sums = total(None)
            for rank in ranks:
                rank.learn(step + 1, losses_after(step + 1), lambda own, sums=sums: sums)
    assert ranks[0].state() == ranks[1].state() == whole.state()
    assert whole.state()["tokens"] == [[6, 3, 3], [3, 6, 3]]


@pytest.mark.parametrize("bad", [{}, {"ce/a": math.nan}, {"ce/a": math.inf}])
def test_weights_are_equal_where_a_loss_is_no_number_or_none_has_changed(bad):
    one, same = replay(every=1), replay(every=1)
    for done in (1, 2):
        one.learn(done, losses_after(done) | bad if bad else {})
        same.learn(done, losses_after(7))
    assert one.weights(3) == same.weights(3) == (1 / 3,) * 3
    again = replay(every=1)
    again.restore(one.state())
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
        return {"ce/a": -0.9 * done, "ce/b": -0.05 * done, "ce/c": -0.05 * done}

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
    assert one.state()["losses"] == []
    one.learn(4, losses_after(4))
    one.learn(6, losses_after(6))
    assert len(one.state()["losses"]) == 1
