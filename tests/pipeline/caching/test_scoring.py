"""From logits to the cache's columns, against float64: extreme rows, ties, padding, blocks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.data.targets.codec import decode_ids, decode_log_probs
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.caching import scoring
from rekindle.pipeline.caching.scoring import SCORERS, score_hidden
from rekindle.train.model.split_model import OutputHead

INF = float("inf")


def info_of(size: int, k: int | None, temperatures: tuple[float, ...] = (1.0,)) -> TeacherInfo:
    kind = "dense" if k is None else "topk"
    return TeacherInfo(
        name="t",
        task="causal_lm",
        kind=kind,
        view="clean",
        vocabulary_size=size,
        k=k,
        temperatures=() if k is None else temperatures,
    )


def scores(rows: np.ndarray, gold: list[int], info: TeacherInfo) -> dict[str, torch.Tensor]:
    logits = torch.tensor(rows, dtype=torch.float32)
    return SCORERS[info.kind](info).scores(logits, torch.tensor(gold), None)


def reference(rows: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """log softmax(rows/τ) in float64."""
    scaled = rows.astype(np.float32).astype(np.float64) / tau
    top = scaled.max(axis=1, keepdims=True)
    return scaled - top - np.log(np.exp(scaled - top).sum(axis=1, keepdims=True))


ROWS = st.integers(2, 40).flatmap(
    lambda size: st.tuples(
        st.lists(
            st.lists(st.floats(-60, 60, width=32), min_size=size, max_size=size),
            min_size=1,
            max_size=5,
        ),
        st.integers(1, size),
        st.integers(0, size - 1),
    )
)
TEMPERATURES = [(1.0,), (1.0, 2.0, 4.0), (1.0, 4.0), (0.5, 1.0, 3.0), (0.25, 0.5, 1.0, 8.0)]


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from(TEMPERATURES))
def test_scores_are_those_of_float64(case, temperatures):
    values, k, gold = case
    rows = np.array(values, np.float32)
    found = scores(rows, [gold] * len(rows), info_of(rows.shape[1], k, temperatures))
    exact = reference(rows)
    ids = found["ids"].numpy()
    kept = np.take_along_axis(rows, ids, axis=1)
    assert (np.sort(rows, axis=1)[:, ::-1][:, :k] == kept).all()  # the k largest, by falling value
    assert all(len(set(row)) == k for row in ids.tolist())
    np.testing.assert_allclose(
        found["log_probs"].numpy(), np.take_along_axis(exact, ids, 1), atol=2e-5, rtol=1e-5
    )
    np.testing.assert_allclose(found["gold_log_prob"].numpy(), exact[:, gold], atol=2e-5, rtol=1e-5)
    assert found["gold_rank"].tolist() == (rows > rows[:, gold : gold + 1]).sum(axis=1).tolist()
    entropy = -(np.exp(exact) * exact).sum(axis=1)
    np.testing.assert_allclose(found["entropy"].numpy(), entropy, atol=5e-5)
    for slot, tau in enumerate(temperatures):
        at_tau = reference(rows, tau)
        outside = np.exp(at_tau)
        np.put_along_axis(outside, ids, 0.0, axis=1)
        odds = found["tail_log_odds"][:, slot].numpy().astype(np.float64)
        for row in range(len(rows)):
            inside = np.exp(at_tau[row, ids[row]]).sum()
            tail = outside[row].sum()
            if tail == 0 or math.log(inside / tail) > 32:  # the codec's end: no tail to speak of
                assert odds[row] > 31.9
            else:
                assert odds[row] == pytest.approx(math.log(inside / tail), abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_dense_log_probs_are_those_of_float64(case):
    values, _, gold = case
    rows = np.array(values, np.float32)
    found = scores(rows, [gold] * len(rows), info_of(rows.shape[1], None))
    assert "ids" not in found
    np.testing.assert_allclose(found["log_probs"].numpy(), reference(rows), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 5, 6])
def test_tokens_of_logit_minus_infinity(k):
    """Grammars and banned tokens: no probability, no NaN anywhere, whether kept or not."""
    rows = np.array([[2.0, -INF, 1.0, -INF, -INF, 0.0], [-INF, 3.0, -INF, -INF, -INF, -INF]])
    found = scores(rows, [1, 1], info_of(6, k, (1.0, 2.0)))
    columns = SCORERS["topk"](info_of(6, k, (1.0, 2.0))).encode(found)
    assert not any(np.isnan(column).any() for column in columns.values())
    for slot, tau in enumerate((1.0, 2.0)):
        log_probs, log_tail = decode_log_probs(columns, tau, slot)
        total = np.exp(log_probs).sum(axis=1) + np.exp(log_tail)
        np.testing.assert_allclose(total, 1, atol=1e-5)
        best = 1 / (1 + np.exp(-1 / tau) + np.exp(-2 / tau))
        assert np.exp(log_probs[0, 0]) == pytest.approx(best, abs=0.02)
    assert columns["gold_log_prob"][0] == 65535  # saturated: 64 nats
    assert columns["gold_rank"].tolist() == [3, 0]
    assert columns["entropy"][1] == 0


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("place", [0, 4])
def test_logits_that_are_no_numbers_are_refused_wherever_they_stand(bad, k, place):
    rows = np.zeros((3, 5))
    rows[1, place] = bad
    with pytest.raises(InputError, match=r"'t' produced .* in fp32; .* Check the model"):
        scores(rows, [0, 0, 0], info_of(5, k))


def test_a_row_of_minus_infinity_is_refused():
    with pytest.raises(InputError, match="NaN or infinite"):
        scores(np.full((1, 4), -INF), [0], info_of(4, 2))


def test_a_large_shift_of_all_logits_changes_nothing():
    rows = np.arange(12, dtype=np.float64).reshape(2, 6) / 3
    low, high = (scores(rows + shift, [1, 2], info_of(6, 3)) for shift in (0, 4096))
    assert (low["ids"] == high["ids"]).all()
    torch.testing.assert_close(low["log_probs"], high["log_probs"], atol=2e-3, rtol=0)
    torch.testing.assert_close(low["tail_log_odds"], high["tail_log_odds"], atol=2e-3, rtol=0)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_blocks_and_padded_rows_change_nothing(monkeypatch, padding, kind):
    """Blocks of 1, 2 and all rows give the same; rows beyond the vocabulary do not exist."""
    torch.manual_seed(0)
    size, info = 50, info_of(50, None if kind == "dense" else 7, (1.0, 2.0))
    hidden = torch.randn(9, 16)
    weight, bias = torch.randn(size + padding, 16), torch.randn(size + padding)
    bias[size:] = 99.0
    gold = torch.arange(9)
    head = OutputHead(weight, bias, None, 1.0)
    exact = reference((hidden @ weight[:size].T + bias[:size]).numpy())
    (whole,) = score_hidden(hidden, head, gold, info)
    for rows in (1, 2, 100):
        monkeypatch.setitem(scoring.LOGITS_BYTES, "cpu", 4 * size * rows)
        blocks = list(score_hidden(hidden, head, gold, info))
        assert [len(b["entropy"]) for b in blocks] == [
            min(rows, 9 - first) for first in range(0, 9, rows)
        ]
        columns = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
        if kind == "dense":
            np.testing.assert_allclose(columns["log_probs"], exact, atol=2e-5)
            continue
        assert (columns["ids"] == np.argsort(-exact, axis=1)[:, :7]).all()
        assert whole.keys() == columns.keys()
        assert all((whole[name] == columns[name]).all() for name in columns)


@pytest.mark.parametrize("size", [65_536, 65_537, 131_072, 150_000])
def test_ids_and_ranks_of_large_vocabularies(size):
    """Ids past 16 and 17 bits, and ranks that 16 bits do not hold."""
    rows = np.zeros((2, size), np.float32)
    best = [size - 1, 65_535, min(131_071, size - 2), 3]
    rows[0, best] = [9.0, 8.0, 7.0, 6.0]
    rows[1] = np.arange(size)[::-1] / 1000
    info = info_of(size, 4)
    columns = SCORERS["topk"](info).encode(scores(rows, [0, size - 1], info))
    ids = decode_ids(columns, size)
    assert ids[0].tolist() == list(dict.fromkeys([*best, *ids[0].tolist()]))[:4]
    assert ids[1].tolist() == [0, 1, 2, 3]
    assert columns["gold_rank"].tolist() == [len(set(best)), size - 1]
