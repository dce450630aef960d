"""The precise codec: exact ids, the stated bound at every temperature, tails as the default's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.targets.codec import decode_ids, decode_log_probs, encode
from rekindle.data.targets.codec_precise import (
    SATURATED,
    VALUE_STEP,
    decode_precise,
    encode_precise,
)
from testlib.codecs import logit_rows, truth

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
FLOAT32 = 4e-6  # what rounding 32 nats and their sums to float32 costs


def scored(logits, k):
    """What stage 1 hands to a codec: ids, log-probs, tail log-odds, the last two in float32."""
    ids = np.argsort(-np.asarray(logits), axis=1, kind="stable")[:, :k]
    kept, _ = truth(logits, ids, 1.0)
    at = [truth(logits, ids, temperature) for temperature in TEMPERATURES]
    odds = [np.logaddexp.reduce(lp, axis=1) - tail for lp, tail in at]
    return ids, kept.astype(np.float32), np.stack(odds, axis=1).astype(np.float32)


def encoded(logits, k):
    ids, kept, odds = scored(logits, k)
    return encode_precise(ids, kept, odds, np.shape(logits)[1]), ids


def divergence(logits, ids, columns, slot):
    """KL(true ‖ decoded) over the k+1 outcomes of every row, in nats."""
    kept, tail = truth(logits, ids, TEMPERATURES[slot])
    log_probs, log_tail = decode_precise(columns, TEMPERATURES[slot], slot)
    rest = np.where(np.isneginf(tail), 0, np.exp(tail) * (tail - np.maximum(log_tail, -1e9)))
    return (np.exp(kept) * (kept - log_probs)).sum(axis=1) + rest


@settings(max_examples=60, deadline=None)
@given(rows=logit_rows())
def test_every_log_prob_is_within_the_stated_bound_at_every_temperature(rows):
    logits, k = rows
    columns, ids = encoded(logits, k)
    for slot, temperature in enumerate(TEMPERATURES):
        log_probs, log_tail = decode_precise(columns, temperature, slot)
        kept, tail = truth(logits, ids, temperature)
        step = 1 / VALUE_STEP / temperature
        assert np.abs(log_probs - kept).max() <= step + 1 / 2048 + FLOAT32
        relative = (log_probs - log_probs[:, :1]) - (kept - kept[:, :1])
        assert np.abs(relative).max() <= step + 2 * FLOAT32
        if k < logits.shape[1]:
            least = -32766 / 1024  # the odds of an int16: smaller tails are stored as e^−32
            assert np.abs(log_tail - np.maximum(tail, least)).max() <= 1 / 2048 + FLOAT32
            mass = np.exp(log_probs.astype(np.float64)).sum(axis=1)
            assert np.abs(np.log(mass) - np.log1p(-np.exp(tail))).max() <= 1 / 2048 + FLOAT32
        total = np.exp(log_probs.astype(np.float64)).sum(axis=1) + np.exp(log_tail)
        assert total == pytest.approx(1, abs=1e-6)
        assert (np.diff(log_probs, axis=1) <= 0).all()


def test_the_bound_is_no_larger_than_needed():
    """Nearly all mass on candidates that round up moves the others down by as much."""
    half = 0.499 / VALUE_STEP
    logits = np.full((1, 5000), -1e9)
    logits[0, :64] = np.r_[0.0, np.full(61, -half), -20.501 / VALUE_STEP, -3.0]
    columns, ids = encoded(logits, 64)
    log_probs, _ = decode_precise(columns, 1.0, TEMPERATURES.index(1.0))
    kept, _ = truth(logits, ids, 1.0)
    worst = np.abs(log_probs - kept).max()
    assert 0.9 / VALUE_STEP < worst <= 1 / VALUE_STEP


@settings(max_examples=40, deadline=None)
@given(rows=logit_rows(), data=st.data())
def test_reading_fewer_candidates_is_dropping_them_into_the_tail(rows, data):
    logits, stored = rows
    k = data.draw(st.integers(1, stored))
    columns, _ = encoded(logits, stored)
    for slot, temperature in enumerate(TEMPERATURES):
        whole, whole_tail = decode_precise(columns, temperature, slot)
        part, part_tail = decode_precise(columns, temperature, slot, k)
        assert np.array_equal(part, whole[:, :k])
        expected = np.exp(whole_tail) + np.exp(whole[:, k:]).sum(axis=1)
        assert np.exp(part_tail) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [2, 30_522, 65_536, 65_537, 128_256, 262_144])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_ids_best_log_prob_and_tails_are_those_of_the_default_codec(size, k):
    k = min(k, size)
    draw = np.random.default_rng(size + k)
    ids = draw.integers(0, size, (50, k))
    ids[0], ids[1] = 0, size - 1
    kept = np.sort(draw.normal(-5, 2, (50, k)), axis=1)[:, ::-1].astype(np.float32)
    odds = draw.normal(0, 9, (50, 3)).astype(np.float32)
    odds[:3] = [[np.inf], [100], [-100]]
    columns, default = encode_precise(ids, kept, odds, size), encode(ids, kept, odds, size)
    assert np.array_equal(decode_ids(columns, size), ids)
    assert ("ids_high" in columns) == (size > 65_536)
    assert "log_prob_min" not in columns
    for name in ("log_prob_max", "tail_log_odds"):
        assert np.array_equal(columns[name], default[name])
    _, log_tail = decode_precise(columns, 1.0, 2)
    assert log_tail == pytest.approx(decode_log_probs(default, 1.0, 2)[1], abs=FLOAT32)


def test_columns_and_their_integers():
    columns, _ = encoded(np.random.default_rng(0).normal(0, 2, (5, 70_000)), 16)
    assert {name: (value.dtype.name, value.shape) for name, value in columns.items()} == {
        "ids": ("uint16", (5, 16)),
        "ids_high": ("uint8", (5, 2)),
        "values": ("uint16", (5, 16)),
        "log_prob_max": ("uint16", (5,)),
        "tail_log_odds": ("int16", (5, 4)),
    }


def test_values_saturate_at_32_nats_and_never_wrap():
    below = np.array([0, 1, 31.9, 31.9995, 32, 33, 1e4, np.inf])
    log_probs = (-0.1 - below).astype(np.float32)[None]
    ids, odds = np.arange(8)[None], np.zeros((1, 1), np.float32)
    values = encode_precise(ids, log_probs, odds, 100)["values"][0]
    assert values[:3].tolist() == [0, 2048, 65_331]
    assert values[3:].tolist() == [SATURATED - 1 + (values[3] == SATURATED)] + [SATURATED] * 4


@pytest.mark.parametrize("top", [0.0, 1e4])
def test_tokens_that_cannot_occur(top):
    """Logits of −inf, as from a constrained head: fewer can occur than are kept."""
    logits = np.full((4, 500), -np.inf)
    logits[:, :3] = top + np.log([0.5, 0.3, 0.2])
    columns, _ = encoded(logits, 10)
    assert (columns["values"][:, 3:] == SATURATED).all()
    for slot, temperature in enumerate(TEMPERATURES):
        log_probs, log_tail = decode_precise(columns, temperature, slot)
        assert np.isfinite(log_probs).all()
        assert (log_tail == -np.inf).all()
        assert np.exp(log_probs).sum(axis=1) == pytest.approx(1, abs=1e-6)
        assert log_probs[:, 3] - log_probs[:, 0] == pytest.approx(-32 / temperature, abs=0.01)


def test_flat_rows_and_single_candidates():
    for k in (1, 64):
        columns, _ = encoded(np.zeros((3, 1000)), k)
        assert (columns["values"] == 0).all()
        for slot, temperature in enumerate(TEMPERATURES):
            log_probs, log_tail = decode_precise(columns, temperature, slot)
            assert log_probs == pytest.approx(np.log(1 / 1000), abs=1 / 2048)
            assert np.exp(log_tail) == pytest.approx(1 - k / 1000, abs=1e-4)


def test_no_positions():
    empty = np.zeros((0, 8), np.float32)
    columns = encode_precise(empty.astype(np.int64), empty, np.zeros((0, 3), np.float32), 128_256)
    log_probs, log_tail = decode_precise(columns, 2.0, 1, k=3)
    assert log_probs.shape == (0, 3)
    assert log_tail.shape == (0,)


def test_it_is_twenty_times_closer_than_the_default_on_rows_like_a_language_models():
    """Zipf-like tails under a few strong candidates: KL below 1e-7 nats, the same best token."""
    draw = np.random.default_rng(0)
    ranks = np.log(np.arange(1, 30_523))
    logits = -draw.uniform(1.1, 2.6, (48, 1)) * ranks + draw.normal(0, 0.5, (48, 30_522))
    logits = draw.permuted(logits.astype(np.float32), axis=1)
    columns, ids = encoded(logits, 32)
    for slot in range(len(TEMPERATURES)):
        assert divergence(logits, ids, columns, slot).mean() <= 1e-7
        assert divergence(logits, ids, columns, slot).max() <= 1e-6
    log_probs, _ = decode_precise(columns, 1.0, 1)
    assert np.array_equal(
        np.take_along_axis(ids, log_probs.argmax(axis=1)[:, None], 1)[:, 0], logits.argmax(axis=1)
    )
    coarse = encode(*scored(logits, 32), 30_522)
    kept, tail = truth(logits, ids, 1.0)
    log_probs, log_tail = decode_log_probs(coarse, 1.0, 1)
    default = (np.exp(kept) * (kept - log_probs)).sum(axis=1) + np.exp(tail) * (tail - log_tail)
    assert divergence(logits, ids, columns, 1).mean() < default.mean() / 20
