"""What torch encodes on a device is what NumPy encodes on the host, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.head import encode_hidden
from rekindle.data.targets.kinds.registry import VOCABULARY_KINDS, kind_of
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.caching import scoring
from rekindle.pipeline.caching.encoding import on_device
from rekindle.pipeline.caching.scoring import SCORERS
from rekindle.train.model.split_model import OutputHead

INF = np.float32(np.inf)
# Around the borders at which an id gets a bit more, and where ranks need four bytes.
VOCABULARIES = (9, 300, 65_535, 65_536, 65_537, 131_073, 1_500_000)
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def nats(draw, shape, scale):
    """Draw non-negative float32 values: any, whole and half steps of the codecs, their neighbours,
    and the ends of the range.
    """
    values = np.abs(draw.normal(0, scale, shape)).astype(np.float32)
    halves = np.round(values * 4096) / 4096
    chosen = draw.integers(0, 8, shape)
    for number, other in enumerate(
        (halves, np.nextafter(halves, INF), np.nextafter(halves, -INF), np.float32(0), INF)
    ):
        values = np.where(chosen == number, other, values)
    return np.abs(values).astype(np.float32)


def candidates(seed, size, k, scale, between):
    """What stage 1 hands to a codec of ``size`` ids: ids, log-probabilities by falling value, odds.
    ``between``: as near to the middle of two codes of a byte as float32 allows.
    """
    generator = np.random.default_rng(seed)
    gaps = nats(generator, (40, k), scale)
    gaps[gaps < 1e-30] = 0  # 255 / span would overflow; log-probs are no nearer to each other
    gaps[:, 0] = 0
    gaps[generator.random(40) < 0.2] = 0  # flat rows
    if between:
        span = np.minimum(gaps.max(axis=1, keepdims=True), 32)
        halves = (generator.integers(0, 255, gaps.shape) + 0.5) * (span / 255)
        gaps[:, 1:-1] = halves[:, 1:-1]
    best = -nats(generator, (40, 1), scale)
    best[np.isinf(best)] = np.float32(-70)  # no row has only impossible ids
    log_probs = (best - np.sort(gaps, axis=1)).astype(np.float32)
    odds = nats(generator, (40, 3), scale) * generator.choice([-1, 1], (40, 3))
    ids = generator.integers(0, size, (40, k))
    ids[0] = size - 1
    return ids, log_probs, odds.astype(np.float32)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        array = found[name].cpu().numpy()
        assert array.dtype == values.dtype, name
        np.testing.assert_array_equal(array, values, name)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from(VOCABULARIES),
    k=st.integers(1, 9),
    scale=st.sampled_from([0.001, 0.1, 3.0, 40.0]),
    between=st.booleans(),
)
def test_candidates(codec, device, seed, size, k, scale, between):
    arrays = candidates(seed, size, k, scale, between)
    tensors = [torch.from_numpy(values).to(device) for values in arrays]
    same(on_device.ENCODERS[codec](*tensors, size), CODECS[codec].encode(*arrays, size))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from(VOCABULARIES))
def test_scalars(device, seed, size):
    draw = np.random.default_rng(seed)
    entropy = nats(draw, 40, 3.0)
    entropy[:2] = (-1e-7, np.nan)  # a sum's rounding
    scores = {
        "gold_log_prob": -nats(draw, 40, 20.0),
        "gold_rank": draw.integers(0, size, 40),
        "entropy": entropy,
    }
    scores["gold_rank"][:2] = (size - 1, min(size, 65_536) - 1)
    info = TeacherInfo(name="t", task="causal_lm", kind="dense", view="clean", vocabulary_size=size)
    scorer = SCORERS["dense"](info)
    tensors = {name: torch.from_numpy(values).to(device) for name, values in scores.items()}
    same(scorer.encode_on_device(tensors), scorer.encode(scores))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-42, 1e-30, 1.0, 1e4, 1e36]))
def test_hidden_states(device, seed, scale):
    """Also rows of zeros, of numbers below the smallest normal one, and half steps."""
    draw = np.random.default_rng(seed)
    states = (draw.normal(0, 1, (12, 7)) * scale).astype(np.float32)
    states[0] = 0
    states[1:3] = draw.integers(-65_534, 65_535, (2, 7)) / 2  # of a row with the scale 1
    states[1:3, 0] = 32_767
    top = np.abs(draw.normal(0, scale, (6, 1))).astype(np.float32)
    states[3:9] = (draw.integers(0, 32_767, (6, 7)) + 0.5) * (top / np.float32(32_767))
    states[3:9, :1] = top  # the others lie between two steps, as near as float32 allows
    stored, row_scale = encode_hidden(states)
    found = on_device.encode_hidden(torch.from_numpy(states).to(device))
    same(found, {"hidden": stored, "hidden_scale": row_scale})


@pytest.mark.parametrize("size", [300, 70_000])
@pytest.mark.parametrize("name", VOCABULARY_KINDS)
def test_what_comes_to_the_host_is_what_a_cache_keeps(monkeypatch, name, size):
    """Of every kind: the types and widths of its columns, and whether numbers were none."""
    kept = VOCABULARY_KINDS[name].settings(9, (1.0,), "default", size, 16)
    about = {"name": "t", "task": "causal_lm", "view": "clean", "vocabulary_size": size}
    info = TeacherInfo.model_validate(about | kept)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=draw) for rows in (5, size))
    keys = torch.arange(10).view(5, 2)
    monkeypatch.setattr(scoring, "_may_read", lambda values: False)
    blocks = scoring.scored_blocks(
        hidden, OutputHead(weight, None, None, 1.0), keys[:, 0], info, keys
    )
    ((_, scores),) = blocks
    assert scores.pop(scoring.NOT_FINITE).nbytes == 1
    columns = kind_of(info).memory_columns()
    assert scores.keys() == columns.keys()
    for column, (dtype, width) in columns.items():
        values = scores[column].numpy()
        assert values.dtype == dtype.to_pandas_dtype(), column
        assert values.shape == ((5,) if width is None else (5, width)), column


def test_one_block_of_many_that_is_no_number_is_told(monkeypatch):
    """Blocks come to the host together."""
    info = TeacherInfo(name="t", task="causal_lm", kind="dense", view="clean", vocabulary_size=9)
    monkeypatch.setattr(scoring, "_may_read", lambda values: False)
    monkeypatch.setitem(scoring.LOGITS_BYTES, "cpu", 4 * 9)
    hidden = torch.ones(5, 4)
    for value in (1.0, np.nan):
        hidden[3, 0] = value
        head = OutputHead(torch.ones(9, 4), None, None, 1.0)
        blocks = scoring.scored_blocks(hidden, head, torch.arange(5), info)
        ((finish, scores),) = blocks
        arrays = {name: values.numpy() for name, values in scores.items()}
        if value == 1:
            assert len(finish(arrays)["log_probs"]) == 5
            continue
        with pytest.raises(InputError, match="NaN or infinite"):
            finish(arrays)
