"""Decoding on the device held equal to the cache's own; cutting a batch; the rows of a loss."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rekindle.data.batch import (
    Batch,
    MaskedInputs,
    PairInputs,
    SequenceTargetBatch,
    TokenLabelBatch,
    TokenTargetBatch,
)
from rekindle.data.errors import InputError
from rekindle.data.storage.cuts import RowTexts
from rekindle.data.targets.codec import encode
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.device_batch import (
    language_rows,
    model_inputs,
    send,
    sparse_targets,
    split_batch,
)

CPU = torch.device("cpu")
TEMPERATURES = (0.5, 1.0, 2.0, 8.0)
# Around the uint16 border, where an id gets a 17th, an 18th and a 21st bit.
VOCABULARIES = (3, 300, 65_535, 65_536, 65_537, 131_072, 131_073, 1_500_000)


def topk_info(vocabulary, k, temperatures=TEMPERATURES):
    return TeacherInfo(
        name="t",
        task="causal_lm",
        kind="topk",
        view="clean",
        vocabulary_size=vocabulary,
        k=k,
        temperatures=temperatures,
    )


def encoded_targets(vocabulary, k, positions, seed, sharpness=3.0):
    """Columns as the cache would hold them for random logits, made by hand from (seed, …)."""
    draw = np.random.default_rng(seed)
    ids = np.stack([draw.choice(vocabulary, k, replace=False) for _ in range(positions)])
    ids[:, 0] = vocabulary - 1 if k == 1 else ids[:, 0]
    logits = -np.sort(-draw.normal(size=(positions, k)) * sharpness, axis=1)
    rest = np.where(draw.random(positions) < 0.2, -np.inf, draw.normal(size=positions) * 3)
    total = np.logaddexp(np.logaddexp.reduce(logits, axis=1), rest)
    odds = [np.logaddexp.reduce(logits / t, axis=1) - rest / t for t in TEMPERATURES]
    log_probs = (logits - total[:, None]).astype(np.float32)
    columns = encode(ids, log_probs, np.stack(odds, axis=1).astype(np.float32), vocabulary)
    places = np.arange(positions, dtype=np.int64)
    batch = TokenTargetBatch(topk_info(vocabulary, k), places * 0, places, columns)
    return batch, ids


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("k", [1, 2, 7, 32])
def test_decoding_on_the_device_is_the_caches_decoding(vocabulary, k):
    k = min(k, vocabulary)
    batch, ids = encoded_targets(vocabulary, k, 40, seed=vocabulary + k)
    assert ("ids_high" in batch.columns) == (vocabulary > 65_536)
    for temperature in TEMPERATURES:
        for prefix in {None, 1, max(1, k // 2), k}:
            expected = batch.decode(temperature, prefix)
            found = sparse_targets(batch, temperature, prefix, CPU)
            assert np.array_equal(found.ids.numpy(), expected[0])
            assert np.array_equal(found.ids.numpy(), ids[:, :prefix])
            np.testing.assert_allclose(found.probs, np.exp(expected[1]), rtol=2e-6, atol=1e-9)
            np.testing.assert_allclose(found.tail, np.exp(expected[2]), rtol=2e-6, atol=1e-9)
            mass = found.probs.double().sum(1) + found.tail.double()
            np.testing.assert_allclose(mass, 1.0, atol=2e-6)


def test_peaked_flat_and_tailless_rows_decode_alike():
    info = topk_info(300, 4, (1.0, 3.0))
    columns = {
        "ids": np.array([[0, 1, 2, 3]] * 4, np.uint16),
        "values": np.array(
            [[0, 255, 255, 255], [0, 0, 0, 0], [0, 1, 254, 255], [0, 9, 99, 255]], np.uint8
        ),
        "log_prob_max": np.array([0, 65535, 700, 1], np.uint16),
        "log_prob_min": np.array([32_768, 65535, 701, 65535], np.uint16),
        # Nothing outside; almost everything outside; almost nothing outside; in between.
        "tail_log_odds": np.array(
            [[32767, 32767], [-32766, -32766], [32766, 9000], [0, -700]], np.int16
        ),
    }
    batch = TokenTargetBatch(info, np.zeros(4, np.int64), np.arange(4), columns)
    for temperature in (1.0, 3.0):
        for k in (None, 1, 3):
            expected = batch.decode(temperature, k)
            found = sparse_targets(batch, temperature, k, CPU)
            np.testing.assert_allclose(found.probs, np.exp(expected[1]), rtol=2e-6, atol=1e-12)
            np.testing.assert_allclose(found.tail, np.exp(expected[2]), rtol=2e-6, atol=1e-12)
            assert torch.isfinite(found.probs).all()
    assert sparse_targets(batch, 1.0, None, CPU).tail[0] == 0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("k", [None, 1, 5, 11, 40])
def test_dense_targets_decode_alike(temperature, k):
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(9, 11)).astype(np.float32) * 4
    columns = {"log_probs": logits - np.logaddexp.reduce(logits, axis=1)[:, None]}
    info = TeacherInfo(name="t", task="causal_lm", kind="dense", view="clean", vocabulary_size=11)
    batch = TokenTargetBatch(info, np.zeros(9, np.int64), np.arange(9), columns)
    found = sparse_targets(batch, temperature, k, CPU)
    expected = batch.decode(temperature, None if k is None else min(k, 11))
    assert np.array_equal(found.ids.numpy(), expected[0])
    np.testing.assert_allclose(found.probs, np.exp(expected[1]), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found.tail, np.exp(expected[2]), rtol=1e-5, atol=1e-7)


def test_a_real_teachers_targets_decode_alike(masked_world):
    cache = masked_world.open()
    view = cache.masked_view().name
    names = ["big", "wide", "whole", "odd.lm"]
    batch = cache.gather(np.arange(len(cache)), names, epoch=1, masked_view=view)
    for name in names:
        target = batch.targets[name]
        stored = target.info.temperatures or (1.0, 2.0)
        for temperature in stored:
            for k in (None, 3):
                expected = target.decode(temperature, k)
                found = sparse_targets(target, temperature, k, CPU)
                np.testing.assert_allclose(found.probs, np.exp(expected[1]), rtol=1e-5, atol=1e-8)
                np.testing.assert_allclose(found.tail, np.exp(expected[2]), rtol=1e-5, atol=1e-7)


def test_what_is_not_stored_cannot_be_decoded():
    batch, _ = encoded_targets(300, 4, 3, seed=0)
    with pytest.raises(InputError, match=r"stores the temperatures \[0.5, 1.0, 2.0, 8.0\], not 3"):
        sparse_targets(batch, 3.0, None, CPU)
    with pytest.raises(InputError, match="keeps 4 candidates; k = 5 is not cached"):
        sparse_targets(batch, 1.0, 5, CPU)
    for k in (0, -1, 2.5):
        with pytest.raises(InputError, match=f"k is {k}; it is how many candidates are read"):
            sparse_targets(batch, 1.0, k, CPU)


@given(hnp.arrays(st.sampled_from(["u1", "u2", "i2", "i4", "i8", "f4", "?"]), (3, 4)))
@settings(max_examples=30)
def test_sending_keeps_values_and_types(values):
    for array in (values, values[:, ::2], values[1:]):
        sent = send(array, CPU)
        assert np.array_equal(sent.numpy(), array, equal_nan=True)
        assert str(sent.dtype).endswith(array.dtype.name)


def test_model_inputs_mask_what_is_padding():
    ids = np.array([[5, 6, 7], [8, 0, 0]], np.int32)
    types = np.array([[0, 1, 1], [0, 0, 0]], np.int32)
    found = model_inputs(ids, np.array([3, 1]), CPU, types)
    assert {t.dtype for t in found.values()} == {torch.int64}
    assert found["input_ids"].tolist() == ids.tolist()
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found["token_type_ids"].tolist() == types.tolist()
    assert "token_type_ids" not in model_inputs(ids, np.array([3, 1]), CPU)


# --- rows of the LM loss ---


def plain_batch(lengths, masked_counts=None, seed=0):
    """A hand-made batch with every kind of target in it."""
    draw = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int64)
    count, width = len(lengths), int(lengths.max())
    ids = draw.integers(5, 90, (count, width)).astype(np.int32)
    ids[np.arange(width) >= lengths[:, None]] = 0
    masked = None
    if masked_counts is not None:
        picks = [
            np.sort(draw.choice(n, m, replace=False))
            for n, m in zip(lengths, masked_counts, strict=True)
        ]
        rows = np.repeat(np.arange(count), masked_counts)
        positions = np.concatenate(picks).astype(np.int64)
        seen = ids.copy()
        seen[rows, positions] = 4
        masked = MaskedInputs(1, seen, rows, positions, ids[rows, positions].astype(np.int64))
    return Batch(
        index=draw.permutation(1000)[:count],
        digests=[f"d{i}" for i in range(count)],
        domains=[None if i % 3 else "x" for i in range(count)],
        input_ids=ids,
        lengths=lengths,
        masked=masked,
        pairs={"pairs-a": plain_pairs(draw.integers(0, 6, count), draw)},
        targets=targets_of(lengths, draw),
    )


def plain_pairs(lengths, draw):
    shape = (len(lengths), int(lengths.max()))
    there = np.arange(shape[1]) < lengths[:, None]
    ids, types = draw.integers(1, 90, shape), draw.integers(0, 2, shape)
    return PairInputs(*(np.where(there, a, 0).astype(np.int32) for a in (ids, types)), lengths)


def targets_of(lengths, draw):
    rows = np.repeat(np.arange(len(lengths)), np.maximum(lengths - 2, 0))
    positions = np.concatenate([np.arange(max(n - 2, 0)) for n in lengths]).astype(np.int64)
    count = len(lengths)
    encoded, _ = encoded_targets(300, 4, max(1, len(rows)), seed=1)
    columns = {name: flat[: len(rows)] for name, flat in encoded.columns.items()}
    token = {"name": "tags", "task": "token_classification", "kind": "token", "view": "text"}
    sense = {"name": "s", "task": "sequence_classification", "kind": "sequence", "view": "text"}
    logits = draw.normal(size=(count, 3)).astype(np.float32)
    return {
        "lm": TokenTargetBatch(encoded.info, rows, positions, columns),
        "tags": TokenLabelBatch(
            TeacherInfo(**token, num_labels=2),
            rows,
            positions,
            draw.normal(size=(len(rows), 2)).astype(np.float32),
        ),
        "s": SequenceTargetBatch(
            TeacherInfo(**sense, num_labels=3), draw.random(count) < 0.6, logits, None
        ),
        "mc": SequenceTargetBatch(
            TeacherInfo(**sense, num_labels=3, monte_carlo_passes=4),
            draw.random(count) < 0.6,
            logits,
            logits**2,
        ),
    }


def test_masked_language_rows_are_the_masked_positions():
    batch = plain_batch([6, 2, 9], [2, 0, 3])
    found = language_rows(batch, "masked_lm", CPU)
    masked = batch.masked
    assert np.array_equal(found.keys, masked.rows * 9 + masked.positions)
    assert np.array_equal(found.select, found.keys)
    assert np.array_equal(found.labels, batch.input_ids[masked.rows, masked.positions])
    assert np.array_equal(found.inputs["input_ids"], masked.input_ids)
    assert np.array_equal(found.inputs["attention_mask"], batch.attention_mask)


def test_causal_language_rows_are_every_token_that_has_a_next_one():
    batch = plain_batch([4, 1, 3])
    found = language_rows(batch, "causal_lm", CPU)
    expected = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert found.keys.tolist() == [r * 4 + p for r, p in expected]
    assert found.labels.tolist() == [int(batch.input_ids[r, p + 1]) for r, p in expected]
    assert np.array_equal(found.inputs["input_ids"], batch.input_ids)


def test_a_batch_of_single_tokens_has_no_causal_rows():
    found = language_rows(plain_batch([1, 1]), "causal_lm", CPU)
    assert len(found.keys) == len(found.labels) == len(found.select) == 0


def lm_target(rows, positions):
    encoded, _ = encoded_targets(300, 4, max(1, len(rows)), seed=1)
    columns = {name: flat[: len(rows)] for name, flat in encoded.columns.items()}
    return TokenTargetBatch(
        encoded.info, np.asarray(rows, np.int64), np.asarray(positions, np.int64), columns
    )


def test_targets_find_their_rows():
    found = language_rows(plain_batch([4, 1, 3]), "causal_lm", CPU)
    assert found.match(lm_target([0, 2, 2], [2, 0, 1]), 4).tolist() == [2, 3, 4]
    assert found.match(lm_target([], []), 4).tolist() == []


@pytest.mark.parametrize("place", [(0, 3), (1, 0), (2, 2), (2, 3)])
def test_a_target_without_a_loss_is_refused(place):
    """The last token, a sequence of one, padding, and what lies past every row."""
    found = language_rows(plain_batch([4, 1, 3]), "causal_lm", CPU)
    with pytest.raises(InputError, match="targets at positions where the student has no loss"):
        found.match(lm_target([0, place[0]], [0, place[1]]), 4)


def test_a_target_is_refused_where_there_is_no_row_at_all():
    found = language_rows(plain_batch([1, 1]), "causal_lm", CPU)
    with pytest.raises(InputError, match="no loss"):
        found.match(lm_target([0], [0]), 1)


# --- micro-batches ---


def joined(parts, starts):
    """What was cut, put together again; row numbers are shifted by where their part began, and what
    is as wide as the longest of its part (padded with 0) is as wide as the longest of all.
    """
    first = parts[0]
    if isinstance(first, np.ndarray):
        if first.ndim == 2 and first.dtype == np.int32:
            widest = max(part.shape[1] for part in parts)
            parts = [np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in parts]
        return np.concatenate(parts)
    if isinstance(first, list | RowTexts):
        return [item for part in parts for item in part]
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts], starts) for key in first}
    if (
        first is None
        or not hasattr(first, "__dataclass_fields__")
        or isinstance(first, TeacherInfo)
    ):
        assert all(part == first for part in parts)
        return first
    values = {name: joined([vars(p)[name] for p in parts], starts) for name in vars(first)}
    if "rows" in values:
        shifted = [part.rows + start for part, start in zip(parts, starts, strict=True)]
        values["rows"] = np.concatenate(shifted)
    return type(first)(**values)


def same(a, b):
    """Deep equality of dataclasses that hold arrays."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return a == b


@pytest.mark.parametrize("masked", [None, [2, 0, 3, 1, 0, 5, 1]])
@pytest.mark.parametrize("size", range(1, 9))
def test_micro_batches_together_are_the_batch(masked, size):
    batch = plain_batch([6, 2, 9, 1, 4, 9, 3], masked)
    parts = split_batch(batch, size)
    assert [len(p.index) for p in parts] == [min(size, 7 - s) for s in range(0, 7, size)]
    for part in parts:
        count = len(part.index)
        assert part.input_ids.shape == (count, part.lengths.max())
        pairs = part.pairs["pairs-a"]
        assert pairs.input_ids.shape == (count, max(1, pairs.lengths.max()))
        assert all((t.rows < count).all() for t in part.targets.values() if hasattr(t, "rows"))
    assert same(joined(parts, range(0, 7, size)), batch)


def test_micro_batches_of_a_real_batch(masked_world):
    cache = masked_world.open()
    view, names = cache.masked_view().name, list(cache.teachers)
    batch = cache.gather(np.arange(30, 53), names, epoch=1, masked_view=view)
    for size in (1, 4, 22):
        assert same(joined(split_batch(batch, size), range(0, 23, size)), batch)
    assert split_batch(batch, 23)[0] is batch
