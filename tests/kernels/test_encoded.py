"""Targets as a cache stores them: the twin against the codec, the kernel against the twin."""

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rekindle.data.targets import codec
from rekindle.kernels.encoded import EncodedTargets, decode
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.kernels.targets import KernelTargets
from testlib.kernels.reference import loss_settings, reference_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def stored(rows: int, vocabulary: int, count: int, tau: float) -> EncodedTargets:
    """Encoded rows of real distributions: flat, peaked, and in between. Not to be written into."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(rows, vocabulary)) * np.geomspace(0.01, 12, rows)[:, None]
    ids = np.argsort(-logits, axis=1)[:, :count]
    log_probs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    tempered = np.exp(logits / tau - np.logaddexp.reduce(logits / tau, axis=1)[:, None])
    kept = np.take_along_axis(tempered, ids, axis=1).sum(axis=1)
    np.put_along_axis(tempered, ids, 0.0, axis=1)
    with np.errstate(divide="ignore"):
        odds = np.log(kept) - np.log(tempered.sum(axis=1))
    values = np.take_along_axis(log_probs, ids, axis=1).astype(np.float32)
    encoded = codec.encode(ids, values, odds[:, None].astype(np.float32), vocabulary)
    tensors = {n: torch.from_numpy(v).to(DEVICE) for n, v in encoded.items()}
    tensors["tail_log_odds"] = tensors["tail_log_odds"][:, 0].contiguous()
    return EncodedTargets(**tensors, planes=codec.high_planes(vocabulary))


def as_numpy(targets: EncodedTargets) -> codec.Columns:
    names = ("ids", "ids_high", "values", "log_prob_max", "log_prob_min", "tail_log_odds")
    found = {name: getattr(targets, name) for name in names}
    columns = {name: tensor.cpu().numpy() for name, tensor in found.items() if tensor is not None}
    return columns | {"tail_log_odds": columns["tail_log_odds"][:, None]}


@pytest.mark.parametrize("k", [None, 1, 5])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize(("vocabulary", "kept"), [(300, 9), (300, 300), (65_537, 9), (200_000, 33)])
def test_the_twin_decodes_as_the_codec(vocabulary, kept, tau, k):
    targets = replace(stored(6, vocabulary, kept, tau), k=k)
    ids, probs, tail = decode(targets, tau)
    plain = as_numpy(targets)
    expected = codec.decode_ids(plain, vocabulary)[:, :k]
    log_probs, log_tail = codec.decode_log_probs(plain, tau, 0, k)
    assert ids.tolist() == expected.tolist()
    np.testing.assert_allclose(probs.cpu(), np.exp(log_probs), rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(tail.cpu(), np.exp(log_tail), rtol=2e-5, atol=1e-9)


def case(vocabulary: int, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(rows, vocabulary, generator=g)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[1] = -100
    return logits.to(DEVICE), labels.to(DEVICE)


TAILS = ("bucket", "renormalise", "none")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl")
# What an id's third byte adds, and what k takes away, is over before any sum: there each divergence
# and each tail comes.
PLANS = [
    *itertools.product([333], [9], [None], DIVERGENCES, TAILS),
    *((333, 9, 4, name, TAILS[i % 3]) for i, name in enumerate(DIVERGENCES)),
    *((66_000, 7, 3, name, TAILS[i % 3]) for i, name in enumerate(DIVERGENCES)),
]


@pytest.mark.covering
@pytest.mark.parametrize(("vocabulary", "kept", "k", "divergence", "tail"), PLANS)
@pytest.mark.usefixtures("triton_runs")
def test_the_kernel_decodes_as_the_twin(vocabulary, kept, k, divergence, tail):
    """Losses and gradient from encoded rows equal float64 ones of the decoded rows."""
    tau = 2.0
    targets = replace(stored(4, vocabulary, kept, tau), k=k)
    logits, labels = case(vocabulary, 4)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5], device=DEVICE)
    options = {"temperature": tau, "ce_weight": 0.3, "kd_weight": 0.7, "reduction": "sum"}
    options |= {"divergence": divergence, "tail": tail}
    z = logits.clone().requires_grad_()
    out = kd_loss(z, targets, labels=labels, row_weight=weight, impl="triton", **options)
    (gradient,) = torch.autograd.grad(out.loss, z)

    ids, probs, rest = decode(targets, tau)
    exact = logits.double().requires_grad_()
    plain = KernelTargets(ids, probs.double(), rest.double(), labels, weight.double())
    loss, _, _ = reference_losses(exact, plain, loss_settings(**options))
    (expected,) = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=3e-6, atol=3e-6)
    scale = float(expected.abs().max())
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=4e-6 * scale)


def test_a_linear_head_takes_them_too(impl):
    targets = stored(6, 300, 8, 1.0)
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(6, 16, generator=g), torch.randn(300, 16, generator=g)
    pairs = []
    for given in ((targets,), decode(targets, 1.0)[:2]):
        h = hidden.to(DEVICE).requires_grad_()
        w = weight.to(DEVICE).requires_grad_()
        tail = None if len(given) == 1 else decode(targets, 1.0)[2]
        out = linear_kd_loss(h, w, *given, tail_prob=tail, impl=impl)
        pairs.append((out.loss, *torch.autograd.grad(out.loss, (h, w))))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_encoded_targets_come_alone():
    logits, _ = case(300)
    targets = stored(6, 300, 8, 1.0)
    with pytest.raises(ValueError, match="carry their own probabilities"):
        kd_loss(logits, targets, torch.ones(6, 8))
    with pytest.raises(ValueError, match="target_probs is missing"):
        kd_loss(logits, torch.zeros(6, 1, dtype=torch.long))
    assert math.isfinite(float(kd_loss(logits, targets).loss))
