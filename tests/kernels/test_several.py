"""Several teachers in one call: the sum of their own calls, from one reading of the logits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle.kernels import blockwise
from rekindle.kernels.hidden import DenseTargets
from rekindle.kernels.losses import KDLoss, kd_loss, linear_kd_loss
from rekindle.kernels.targets import DecodedTargets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl")
# Of an id that only others list, an ordinary exponential is taken where it may overflow.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
ROWS, VOCABULARY, HIDDEN = 5, 61, 6
KD_WEIGHTS = [0.5, 0.0, 2.0]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def teachers() -> list[DecodedTargets]:
    """Ids that all, some or one list; padding anywhere; rows without a target; a whole row."""
    found = []
    for seed, k in enumerate((4, 6, 1)):
        near = draw(ROWS, VOCABULARY, seed=0) * 2 + draw(ROWS, VOCABULARY, seed=seed + 1)
        probs, ids = near.softmax(1).topk(k, dim=1)
        ids[2, 0] = -1
        ids[3 if seed else 4] = -1
        found.append(DecodedTargets(ids, probs, (1 - probs.sum(1)).clamp(min=0)))
    return found


def student(dtype: torch.dtype) -> list[Tensor]:
    x, w = draw(ROWS, HIDDEN, seed=9), draw(VOCABULARY, HIDDEN, seed=8)
    return [t.to(dtype).requires_grad_() for t in (x, w, draw(VOCABULARY, seed=7))]


def options(reduction: str) -> dict[str, Any]:
    labels = torch.tensor([3, -100, 7, 0, 60], device=DEVICE)
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5, 0.0], device=DEVICE)
    return {"labels": labels, "row_weight": weight, "reduction": reduction, "temperature": 2.0}


def found(made: KDLoss, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(0.5, 1.5, ROWS, device=DEVICE) if made.loss.dim() else None
    if upstream is not None:
        upstream = upstream.to(made.loss.dtype)
    gradients = torch.autograd.grad(made.loss, leaves, upstream)
    return [t.detach().double() for t in (*made, *gradients)]


def together(leaves: list[Tensor], head: bool, **given: Any) -> KDLoss:
    if head:
        x, w, b = leaves
        return linear_kd_loss(x, w, teachers(), bias=b, kd_weight=KD_WEIGHTS, **given)
    return kd_loss(leaves[0], teachers(), kd_weight=KD_WEIGHTS, **given)


def one_by_one(leaves: list[Tensor], head: bool, **given: Any) -> KDLoss:
    """In float64, each teacher in a call of its own; the cross-entropy in the first."""
    made = []
    for targets, weight in zip(teachers(), KD_WEIGHTS, strict=True):
        own = targets._replace(probs=targets.probs.double(), tail=targets.tail.double())
        given["kd_weight"] = weight
        if head:
            made.append(linear_kd_loss(*leaves[:2], own, bias=leaves[2], **given))
        else:
            made.append(kd_loss(leaves[0], own, **given))
        if "labels" in given:
            given["ce_weight"] = 0.0
    loss = torch.stack([m.loss for m in made]).sum(0)
    return KDLoss(loss, made[0].ce, torch.stack([m.kd for m in made], -1))


@pytest.mark.covering
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_call_is_the_sum_of_its_teachers(impl: str, divergence: str, head: bool) -> None:
    exactly = impl == "torch"
    close = {"rtol": 1e-10, "atol": 1e-12} if exactly else {"rtol": 2e-5, "atol": 5e-6}
    cases = [("bucket", "mean"), ("renormalise", "sum"), ("none", "none")]
    for tail, reduction in cases if exactly else cases[head : head + 1]:
        given = {**options(reduction), "divergence": divergence, "tail": tail, "ce_weight": 0.3}
        inputs = [t.detach() for t in student(torch.float64 if exactly else torch.float32)]
        if not head:
            inputs = [inputs[0] @ inputs[1].t() + inputs[2]]
        leaves = [t.clone().requires_grad_() for t in inputs]
        exact = [t.double().requires_grad_() for t in inputs]
        ours = found(together(leaves, head, impl=impl, **given), leaves)
        truth = found(one_by_one(exact, head, impl="torch", **given), exact)
        for one, other in zip(ours, truth, strict=True):
            torch.testing.assert_close(one, other, **close)


def test_the_logits_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = blockwise.product_

    def counted(total: Tensor, *factors: Tensor, plus: bool = False) -> None:
        made.append(tuple(total.shape))
        original(total, *factors, plus=plus)

    monkeypatch.setattr(blockwise, "product_", counted)
    together(student(torch.float32), True, impl="torch").loss.backward()
    assert made == [(ROWS, VOCABULARY), (ROWS, HIDDEN), (VOCABULARY, HIDDEN)]


def test_several_teachers_compile_as_one_graph(impl: str) -> None:
    given = teachers()

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kd_loss(x, w, given, bias=b, kd_weight=KD_WEIGHTS, impl=impl).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = student(torch.float32)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )


def test_a_list_of_one_has_an_axis_of_teachers() -> None:
    leaves = student(torch.float64)
    alone = linear_kd_loss(*leaves[:2], teachers()[0], kd_weight=0.5)
    listed = linear_kd_loss(*leaves[:2], teachers()[:1], kd_weight=[0.5])
    assert torch.equal(alone.loss, listed.loss)
    assert torch.equal(alone.kd, listed.kd[0])


def test_what_no_list_may_hold_is_refused() -> None:
    z = draw(ROWS, VOCABULARY, seed=1)
    wrong: list[tuple[Any, Any, str]] = [
        ([], 1.0, "empty list"),
        ([DenseTargets(z)], 1.0, r"target_ids\[0\] is a .*DenseTargets; a list holds"),
        (teachers(), [1.0], r"kd_weight is \[1.0\], but .* a list of 3 teachers'; give"),
        (teachers()[0], [1.0], "but the targets are one teacher's; give a number"),
    ]
    for targets, weight, message in wrong:
        with pytest.raises(ValueError, match=message):
            kd_loss(z, targets, kd_weight=weight)
