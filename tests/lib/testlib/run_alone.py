"""Run the model itself, and compare one cached position with it.

The reference is transformers' own ``model(**inputs).logits`` in float32 on one sequence at a time,
without padding, and ``torch.log_softmax``; none of our helpers takes part in it.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rekindle.data.example import TokenTargets

TEMPERATURES = [1.0, 2.0, 4.0, 0.5]
# float32 noise between a padded batch and a single sequence, in nats, at logits of about ±30.
NOISE = 2e-4


@functools.cache
def model_of(directory: Path, auto: str) -> Any:
    found = getattr(transformers, auto).from_pretrained(str(directory), dtype=torch.float32)
    return found.eval()


@torch.no_grad()
def logits_of(directory: Path, auto: str, **inputs: Any) -> torch.Tensor:
    """Return the model's own logits of one sequence: [S,V], [S,C] or [C]."""
    tensors = {name: torch.tensor([list(map(int, row))]) for name, row in inputs.items()}
    return model_of(directory, auto)(**tensors).logits[0].float()


def stated_precision(exact: np.ndarray, tau: float) -> float:
    """Return the codec's bound for candidates within 32 nats of the best, at temperature
    ``tau``.
    """
    span = min(exact.max() - exact.min(), 32)
    return 2 * (span / 510 + 1 / 1024) / tau + 1 / 2048


def check_distribution(found: TokenTargets, row: int, logits: torch.Tensor, gold: int) -> None:
    """Compare one cached position with the model's logits [V], to the codec's precision."""
    exact = torch.log_softmax(logits, -1).double().numpy()
    ids, log_probs = found.ids[row], found.log_probs[row].astype(np.float64)
    assert len(set(ids.tolist())) == len(ids)
    outside = np.setdiff1d(np.arange(len(exact)), ids)
    # The kept ids are the likeliest, by falling probability (equal ones may swap places).
    assert exact[ids].min() >= exact[outside].max(initial=-np.inf) - NOISE
    assert (np.diff(exact[ids]) < NOISE).all()
    near = exact[ids] > exact[ids].max() - 32
    error = np.abs(log_probs - exact[ids])[near]
    assert error.max() <= stated_precision(exact[ids], 1.0) + NOISE
    for tau, log_tail in found.log_tail.items():
        tempered = torch.log_softmax(logits.double() / tau, -1)
        tail = float(torch.logsumexp(tempered[outside], -1)) if len(outside) else -np.inf
        kept = float(torch.logsumexp(tempered[ids], -1))
        if tail - kept < -31.9:
            assert log_tail[row] < -31.9
        else:
            assert abs(log_tail[row] - tail) <= 1 / 2048 + NOISE / tau
    assert found.gold_ids[row] == gold
    assert abs(found.gold_log_prob[row] - max(exact[gold], -63.999)) <= 1 / 2048 + NOISE
    ranks = [(exact > exact[gold] + shift).sum() for shift in (NOISE, -NOISE)]
    assert ranks[0] <= found.gold_rank[row] <= max(ranks)
    entropy = -(np.exp(exact) * exact).sum()
    assert abs(found.entropy[row] - entropy) <= 1 / 2048 + NOISE


def check_dense(found: TokenTargets, row: int, logits: torch.Tensor, gold: int) -> None:
    exact = torch.log_softmax(logits, -1).numpy()
    assert found.ids[row].tolist() == list(range(len(exact)))
    assert np.abs(found.log_probs[row] - exact).max() <= NOISE
    assert found.gold_ids[row] == gold
    assert abs(found.gold_log_prob[row] - max(exact[gold], -63.999)) <= 1 / 2048 + NOISE
    assert abs(found.entropy[row] + (np.exp(exact) * exact).sum()) <= 1 / 2048 + NOISE


CLASSIFIER = "AutoModelForSequenceClassification"
