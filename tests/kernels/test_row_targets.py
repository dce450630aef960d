"""Every form of targets in every shape of the row kernel, against float64 by autograd.

Ids stand in every part of a row, so that each program of a cluster has some of its own.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle.kernels.encoded import EncodedTargets, decode
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.kernels.targets import DecodedTargets, KernelTargets
from testlib.kernels.encoded_rows import encoded_rows
from testlib.kernels.reference import loss_settings, reference_losses
from testlib.kernels.shapes import DEVICE, kernel_takes, shape_named

pytest.importorskip("triton")

# Listed entries go through the ordinary formula before they are overwritten; it may overflow.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning"),
    pytest.mark.usefixtures("triton_runs"),
]

ROWS, KEPT, HIDDEN = 3, 48, 4
KD_WEIGHTS = [0.5, 1.5, 0.25]
SHAPES = ("streamed", "held", "cluster of 4", "cluster of 8", "cluster of 16")
FORMS = ("encoded", "three teachers")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl")
# 2,043: odd, so that every row starts elsewhere, and with ids in each of sixteen parts of a row of
# 2,048; 1,100: nearly half of the programs have no part
VOCABULARIES = (2043, 1100)


def spread(vocabulary: int, first: int) -> Tensor:
    """Return ids [N,K] at equal distances; the likeliest stands elsewhere in each row."""
    apart = vocabulary // KEPT
    slots = torch.arange(KEPT) + 11 * torch.arange(ROWS)[:, None]
    return (slots % KEPT * apart + first).to(DEVICE)


def teachers(form: str, vocabulary: int, tau: float) -> list[EncodedTargets | DecodedTargets]:
    """Return one, of which the last ids are cut off, or three: ids that one, two or all list, a
    row without a target.
    """
    ids = spread(vocabulary, first=0)
    encoded = encoded_rows(ids, tau)
    if form == "encoded":
        return [replace(encoded, k=KEPT - 7)]
    second = ids[:, ::2].clone()
    second[1] = -1
    probs = torch.rand(second.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    probs = 0.9 * probs / probs.sum(1, keepdim=True)
    tail = torch.full((ROWS,), 0.1, device=DEVICE)
    return [
        encoded,
        DecodedTargets(second, probs, tail),
        encoded_rows(torch.cat([spread(vocabulary, first=1), ids[:, :1]], 1), tau),
    ]


def student(vocabulary: int, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return hidden states, weight and bias, and labels: one listed, one not, one ignored. Most of
    the first row's mass is on its listed ids, so that the rest must be summed without them.
    """
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, HIDDEN, generator=g) for size in (ROWS, vocabulary))
    w[ids[0].cpu()] += 4 * x[0]
    b = torch.linspace(-1, 1, vocabulary)
    labels = torch.tensor([int(ids[0, 5]), vocabulary - 2, -100])
    return [t.to(DEVICE) for t in (x, w, b)], labels.to(DEVICE)


def truth(z: Tensor, given: list[Any], labels: Tensor, **options: Any) -> Tensor:
    """Return the loss of logits in float64; the cross-entropy is in the first teacher's."""
    total, ce_weight = z.new_zeros(()), options.pop("ce_weight")
    for targets, weight in zip(given, KD_WEIGHTS, strict=False):
        tau = options["temperature"]
        ids, probs, tail = decode(targets, tau) if isinstance(targets, EncodedTargets) else targets
        plain = KernelTargets(ids, probs.double(), tail.double(), labels)
        settings = loss_settings(weight, ce_weight=ce_weight, **options)
        total = total + reference_losses(z, plain, settings)[0]
        ce_weight = 0.0
    return total


def cases() -> list[Any]:
    """Every shape with every form of targets, from logits and from a head; the slow ones are the
    whole grid.
    """
    found: list[Any] = []
    for shape, form, head in itertools.product(SHAPES, FORMS, (False, True)):
        number = len(found)
        vocabulary, divergence = VOCABULARIES[(number // 4 + number) % 2], DIVERGENCES[number % 5]
        found.append((shape, form, head, vocabulary, divergence, 2.0))
    grid = itertools.product(SHAPES, FORMS, (False, True), VOCABULARIES, DIVERGENCES, (2.0, 3.0))
    return found + [pytest.param(*c, marks=pytest.mark.slow) for c in grid if c not in found]


@pytest.mark.parametrize(("shape", "form", "head", "vocabulary", "divergence", "tau"), cases())
def test_every_shape_takes_every_form_of_targets(
    shape: str,
    form: str,
    head: bool,
    vocabulary: int,
    divergence: str,
    tau: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel_takes(shape, monkeypatch)
    given = teachers(form, vocabulary, tau)
    inputs, labels = student(vocabulary, spread(vocabulary, first=0))
    options: dict[str, Any] = {"temperature": tau, "divergence": divergence, "ce_weight": 0.3}
    if not head:
        x, w, b = inputs
        inputs = [x @ w.t() + b]
    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    kd_weight: Any = KD_WEIGHTS[: len(given)] if len(given) > 1 else KD_WEIGHTS[0]
    targets: Any = given if len(given) > 1 else given[0]
    call = {"labels": labels, "kd_weight": kd_weight, "impl": "triton", **options}
    if head:
        loss = linear_kd_loss(*leaves[:2], targets, bias=leaves[2], **call).loss
    else:
        loss = kd_loss(leaves[0], targets, **call).loss
    found = torch.autograd.grad(loss, leaves)
    z = exact[0] @ exact[1].t() + exact[2] if head else exact[0]
    wanted = truth(z, given, labels, **options)
    torch.testing.assert_close(loss.double(), wanted, rtol=3e-6, atol=3e-6)
    for one, other in zip(found, torch.autograd.grad(wanted, exact), strict=True):
        error = (one.double() - other).abs().max()
        assert error <= 4e-6 * other.abs().max()


@pytest.mark.parametrize("programs", [4, 8, 16])
def test_every_program_has_ids(programs: int) -> None:
    """What the grid above is for."""
    block = shape_named(f"cluster of {programs}", VOCABULARIES[0]).block
    for row in spread(VOCABULARIES[0], first=0):
        counts = torch.bincount(row.cpu() // (block // programs), minlength=programs)
        assert min(counts.tolist()) >= 2
