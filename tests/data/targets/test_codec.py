"""The codec: exact ids, probabilities within the stated bound at all temperatures, honest tails."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.targets.codec import (
    RANGE,
    STEP,
    decode_ids,
    decode_log_probs,
    encode,
    fixed_point,
    high_bytes,
    high_planes,
)
from testlib.codecs import log_softmax, logit_rows, truth

TEMPERATURES = (1.0, 2.0, 4.0)


def score(logits, k, temperatures=TEMPERATURES):
    """What stage 1 hands to the codec, in float64: ids, log-probs, tail log-odds."""
    log_probs = log_softmax(logits)
    ids = np.argsort(-log_probs, axis=1, kind="stable")
    ordered = np.take_along_axis(log_probs, ids, axis=1)
    odds = []
    for temperature in temperatures:
        kept = np.logaddexp.reduce(ordered[:, :k] / temperature, axis=1)
        rest = np.logaddexp.reduce(ordered[:, k:] / temperature, axis=1, initial=-np.inf)
        odds.append(kept - rest)
    return ids[:, :k], ordered[:, :k], np.stack(odds, axis=1)


def encoded(logits, k, temperatures=TEMPERATURES):
    ids, kept, odds = score(logits, k, temperatures)
    codes = encode(ids, kept.astype(np.float32), odds.astype(np.float32), np.shape(logits)[1])
    return codes, ids


def bound(kept, temperature):
    """The module's promise, and half a thousandth of a step for float32."""
    span = np.minimum(kept[:, :1] - kept[:, -1:], RANGE)
    return 2 * (span / 510 + 1 / 1024) / temperature + 1 / 2048 + 3e-5


@settings(max_examples=60, deadline=None)
@given(rows=logit_rows())
def test_every_log_prob_is_within_the_stated_bound_at_every_temperature(rows):
    logits, k = rows
    codes, ids = encoded(logits, k)
    at_one, _ = truth(logits, ids, 1.0)
    for slot, temperature in enumerate(TEMPERATURES):
        log_probs, log_tail = decode_log_probs(codes, temperature, slot)
        kept, tail = truth(logits, ids, temperature)
        assert (np.abs(log_probs - kept) <= bound(at_one, temperature)).all()
        if k < logits.shape[1]:
            assert np.abs(log_tail - tail).max() <= 1 / 2048 + 1e-5
        total = np.exp(log_probs.astype(np.float64)).sum(axis=1) + np.exp(log_tail)
        assert total == pytest.approx(1, abs=3e-6)
        assert (np.diff(log_probs, axis=1) <= 0).all()  # by falling probability


def test_the_bound_is_needed_and_no_larger_than_needed():
    """Most mass on candidates that all round up moves every other one down by as much."""
    worst = 0.0
    for span in np.linspace(0.5, 30, 60):
        step = span / 255
        relative = np.sort([0.0, *[0.499 * step] * 61, 20.501 * step, span])
        logits = np.full((1, 5000), -1e9)
        logits[0, :64] = -relative
        codes, ids = encoded(logits, 64, (1.0,))
        log_probs, _ = decode_log_probs(codes)
        kept, _ = truth(logits, ids, 1.0)
        error = np.abs(log_probs - kept).max()
        assert error <= bound(kept, 1.0).max()
        worst = max(worst, error / (span / 510))
    assert worst > 1.5  # half the bound would be a lie


@pytest.mark.parametrize("size", [2, 300, 30_522, 65_536, 65_537, 128_256, 200_000, 262_144])
@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_ids_are_exact_for_every_vocabulary(size, k):
    k = min(k, size)
    draw = np.random.default_rng(size + k)
    ids = draw.integers(0, size, (50, k))
    ids[0], ids[1] = 0, size - 1  # the ends
    edges = [65_535, 65_536, 131_071, 131_072, 196_608]
    ids[2] = np.resize([e for e in edges if e < size] or [0], k)
    codes = encode(ids, np.zeros((50, k), np.float32), np.zeros((50, 1), np.float32), size)
    assert np.array_equal(decode_ids(codes, size), ids)
    if size <= 65_536:
        assert "ids_high" not in codes
    else:
        assert "ids_high" in codes
        assert codes["ids_high"].shape == (50, high_bytes(size, k))


def test_planes_grow_with_the_vocabulary():
    sizes = {2: 0, 65_536: 0, 65_537: 1, 131_072: 1, 131_073: 2, 262_144: 2, 262_145: 3}
    assert {size: high_planes(size) for size in sizes} == sizes
    assert [high_bytes(128_256, k) for k in (1, 8, 9, 64)] == [1, 1, 2, 8]


@pytest.mark.parametrize("size", [3, 17, 300])
def test_all_of_a_small_vocabulary_leaves_no_tail(size):
    logits = np.random.default_rng(0).normal(0, 2, (20, size))
    codes, ids = encoded(logits, size)
    for slot, temperature in enumerate(TEMPERATURES):
        log_probs, log_tail = decode_log_probs(codes, temperature, slot)
        assert (log_tail == -np.inf).all()
        assert np.exp(log_probs).sum(axis=1) == pytest.approx(1, abs=1e-6)
        _, fewer_tail = decode_log_probs(codes, temperature, slot, k=size - 1)
        assert fewer_tail == pytest.approx(log_probs[:, -1], abs=1e-5)
    assert np.array_equal(np.sort(ids, axis=1), np.tile(np.arange(size), (20, 1)))


@settings(max_examples=40, deadline=None)
@given(rows=logit_rows(), data=st.data())
def test_reading_fewer_candidates_is_dropping_them_into_the_tail(rows, data):
    logits, stored = rows
    k = data.draw(st.integers(1, stored))
    codes, _ = encoded(logits, stored)
    for slot, temperature in enumerate(TEMPERATURES):
        whole, whole_tail = decode_log_probs(codes, temperature, slot)
        part, part_tail = decode_log_probs(codes, temperature, slot, k)
        assert np.array_equal(part, whole[:, :k])
        expected = np.exp(whole_tail) + np.exp(whole[:, k:]).sum(axis=1)
        assert np.exp(part_tail) == pytest.approx(expected, abs=1e-6)


def test_flat_rows_stay_flat():
    codes, _ = encoded(np.zeros((3, 1000)), 64)
    for slot, temperature in enumerate(TEMPERATURES):
        log_probs, log_tail = decode_log_probs(codes, temperature, slot)
        assert log_probs == pytest.approx(np.log(1 / 1000), abs=1 / 2048)
        assert np.exp(log_tail) == pytest.approx(0.936, abs=1e-4)
    assert (codes["values"] == 0).all()


@pytest.mark.parametrize("peak", [0.9999, 0.999999, 1 - 1e-9])
def test_peaked_rows_keep_their_tail(peak):
    """A tail by subtraction would be lost in float32; the stored one is right to 1/2048."""
    size, k = 30_522, 32
    logits = np.random.default_rng(1).normal(0, 1, (8, size))
    rest = np.logaddexp.reduce(logits[:, 1:], axis=1)
    logits[:, 0] = rest + np.log(peak / (1 - peak))
    codes, ids = encoded(logits, k)
    for slot, temperature in enumerate(TEMPERATURES):
        kept, tail = truth(logits, ids, temperature)
        log_probs, log_tail = decode_log_probs(codes, temperature, slot)
        assert log_tail == pytest.approx(tail, abs=1 / 2048 + 1e-5)
        assert (np.abs(log_probs - kept) <= bound(truth(logits, ids, 1.0)[0], temperature)).all()
    assert (ids[:, 0] == 0).all()


def test_tokens_that_cannot_occur():
    """Logits of −inf, as from a constrained head: fewer can occur than are kept."""
    logits = np.full((4, 500), -np.inf)
    logits[:, :3] = np.log([0.5, 0.3, 0.2])
    codes, _ = encoded(logits, 10)
    for slot, temperature in enumerate(TEMPERATURES):
        log_probs, log_tail = decode_log_probs(codes, temperature, slot)
        assert np.isfinite(log_probs).all()
        assert (log_tail == -np.inf).all()
        assert np.exp(log_probs).sum(axis=1) == pytest.approx(1, abs=1e-6)
        # What cannot be told from 32 nats below the best is read as that much.
        assert log_probs[:, 3] - log_probs[:, 0] == pytest.approx(-RANGE / temperature, abs=0.01)


def test_a_candidate_far_below_the_best_does_not_overflow():
    logits = np.zeros((2, 100))
    logits[:, 0] = 1e4
    codes, _ = encoded(logits, 20)
    log_probs, log_tail = decode_log_probs(codes)
    assert log_probs[:, 0] == pytest.approx(0, abs=1e-6)
    assert log_probs[:, 1] == pytest.approx(-RANGE, abs=0.01)
    assert (log_tail <= -31.9).all()


def test_one_candidate():
    logits = np.random.default_rng(2).normal(0, 3, (50, 900))
    codes, ids = encoded(logits, 1)
    for slot, temperature in enumerate(TEMPERATURES):
        log_probs, log_tail = decode_log_probs(codes, temperature, slot)
        kept, tail = truth(logits, ids, temperature)
        assert log_probs == pytest.approx(kept, abs=1 / 2048 + 1e-5)
        assert log_tail == pytest.approx(tail, abs=1 / 2048 + 1e-5)


def test_no_positions():
    empty = np.zeros((0, 8))
    codes = encode(empty.astype(np.int64), empty.astype(np.float32), np.zeros((0, 3)), 128_256)
    log_probs, log_tail = decode_log_probs(codes)
    assert log_probs.shape == (0, 8)
    assert log_tail.shape == (0,)
    assert decode_ids(codes, 128_256).shape == (0, 8)


def test_everything_stored_is_an_integer():
    codes, _ = encoded(np.random.default_rng(0).normal(0, 2, (5, 70_000)), 16)
    assert {name: value.dtype.name for name, value in codes.items()} == {
        "ids": "uint16",
        "ids_high": "uint8",
        "values": "uint8",
        "log_prob_max": "uint16",
        "log_prob_min": "uint16",
        "tail_log_odds": "int16",
    }


def realistic(rows, size, seed):
    """Logits like a language model's: Zipf-like tails under a few strong candidates, ~2 nats."""
    draw = np.random.default_rng(seed)
    ranks = np.log(np.arange(1, size + 1))
    slope = draw.uniform(1.1, 2.6, (rows, 1))
    logits = -slope * ranks + draw.normal(0, 0.5, (rows, size))
    return draw.permuted(logits.astype(np.float32), axis=1)


def test_the_error_of_the_values_is_far_below_that_of_the_truncation():
    """KL(true ‖ decoded) over k+1 outcomes, on rows of ~2 nats; STORAGE.md measured 5e-6."""
    logits = realistic(64, 30_522, 0)
    log_probs = log_softmax(logits)
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=1)
    assert 1.5 < entropy.mean() < 3
    codes, ids = encoded(logits, 32)
    for slot, temperature in enumerate(TEMPERATURES):
        kept, tail = truth(logits, ids, temperature)
        log_probs, log_tail = decode_log_probs(codes, temperature, slot)
        kl = (np.exp(kept) * (kept - log_probs)).sum(axis=1) + np.exp(tail) * (tail - log_tail)
        assert kl.mean() <= 2e-5
        assert kl.max() <= 3e-4


@settings(max_examples=100, deadline=None)
@given(nats=st.lists(st.floats(0, 60, width=32), min_size=1, max_size=20))
def test_fixed_point_is_within_half_a_step(nats):
    values = np.array(nats, np.float32)
    assert np.abs(fixed_point(values) / 1024 - values).max() <= 0.5 / 1024 + 1e-9


def test_fixed_point_saturates_and_never_wraps():
    values = np.array([-1e-7, -0.0, 63.999, 64, 1e30, np.inf], np.float32)
    assert fixed_point(values).tolist() == [0, 0, 65_535, 65_535, 65_535, 65_535]


def test_what_was_read_and_is_written_again_is_read_the_same():
    """Also where the best candidate lies halfway between two steps, as some do of many."""
    draw = np.random.default_rng(0)
    relative = np.sort(draw.normal(0, 3, (50_000, 8)), axis=1)[:, ::-1]
    kept = draw.uniform(0.05, 0.999, (50_000, 1))
    log_probs = relative - np.log(np.exp(relative).sum(axis=1, keepdims=True)) + np.log(kept)
    ids, odds = np.tile(np.arange(8), (50_000, 1)), np.log(kept / (1 - kept))
    columns = encode(ids, log_probs.astype(np.float32), odds.astype(np.float32), 1000)
    once = decode_log_probs(columns)[0]
    for _ in range(3):
        columns = encode(ids, decode_log_probs(columns)[0], columns["tail_log_odds"] / STEP, 1000)
        np.testing.assert_array_equal(decode_log_probs(columns)[0], once)
