"""The public losses in PyTorch: closed form against autograd, invariants, edges, errors."""

import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rekindle.kernels import blocks, choice, ops
from rekindle.kernels.losses import KDLoss, kd_loss, linear_kd_loss
from rekindle.kernels.targets import DecodedTargets, KernelTargets
from testlib.kernels.reference import loss_settings, reference_losses

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl")
TAILS = ("bucket", "renormalise", "none")


def make(rows: int = 6, vocabulary: int = 19, k: int = 5, seed: int = 0, **options: Any) -> dict:
    """Logits and targets in float64: padding in any place, labels inside and outside the ids."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=g, dtype=torch.float64)
    teacher = 2 * torch.randn(rows, vocabulary, generator=g, dtype=torch.float64)
    ids = torch.stack([torch.randperm(vocabulary, generator=g)[:k] for _ in range(rows)])
    probs = teacher.softmax(1).gather(1, ids)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    if options.get("holes", rows > 4 and k > 2):
        ids[1, 1] = -1
        ids[2, 0] = -1
        ids[3] = -1
        labels[0] = ids[0, 2]
        labels[4] = -100
    return {"logits": logits, "ids": ids, "probs": probs, "labels": labels}


def head(case: dict, hidden_size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows, vocabulary = case["logits"].shape
    return (
        torch.randn(rows, hidden_size, generator=g, dtype=torch.float64),
        torch.randn(vocabulary, hidden_size, generator=g, dtype=torch.float64),
        torch.randn(vocabulary, generator=g, dtype=torch.float64),
    )


def dense_truth(case: dict, divergence: str, tail: str, tau: float) -> Tensor:
    """D per row written out over explicit outcomes, row by row, for strictly positive targets."""
    values = []
    for z, ids, probs in zip(case["logits"], case["ids"], case["probs"], strict=True):
        kept = [(int(i), float(q)) for i, q in zip(ids, probs, strict=True) if i >= 0]
        p = (z / tau).softmax(0)
        q = torch.tensor([q for _, q in kept], dtype=torch.float64)
        p_in = p[[i for i, _ in kept]]
        if tail == "renormalise":
            q = q / q.sum()
        rest = (1 - q.sum()).clamp(min=0) if tail == "bucket" else torch.zeros(())
        q = torch.cat([q, rest.double()[None]])
        p = torch.cat([p_in, (1 - p_in.sum())[None]])
        m = (q + p) / 2
        log_q = torch.where(q > 0, q, 2.0**-126).log()
        value = {
            "forward_kl": (q * (log_q - p.log())).sum(),
            "reverse_kl": (p * (p.log() - log_q)).sum(),
            "jsd": (
                torch.special.entr(m) - (torch.special.entr(q) + torch.special.entr(p)) / 2
            ).sum(),
            "tvd": (q - p).abs().sum() / 2,
            "skew_kl": torch.special.xlogy(q, q / (0.1 * q + 0.9 * p)).sum(),
        }[divergence]
        values.append(value if kept else torch.zeros((), dtype=torch.float64))
    return torch.stack(values)


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_divergence_is_its_textbook_formula(divergence: str, tail: str, tau: float) -> None:
    case = make()
    out = kd_loss(
        case["logits"], case["ids"], case["probs"],
        temperature=tau, divergence=divergence, tail=tail, reduction="none", impl="torch",
    )  # fmt: skip
    torch.testing.assert_close(
        out.kd, dense_truth(case, divergence, tail, tau), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(out.loss, tau**2 * out.kd)


def reference(logits: Tensor, ids: Tensor, probs: Tensor, **options: Any) -> KDLoss:
    """The defining implementation, through autograd."""
    tensors = (options.pop(name, None) for name in ("tail_prob", "labels", "row_weight"))
    return KDLoss(
        *reference_losses(logits, KernelTargets(ids, probs, *tensors), loss_settings(**options))
    )


def all_paths(
    case: dict, upstream: Tensor, **options: Any
) -> list[tuple[KDLoss, tuple[Tensor, ...]]]:
    """Losses and gradients from hidden states, from logits, and from the reference."""
    results = []
    for path in (linear_kd_loss, kd_loss, reference):
        x, w, b = (t.requires_grad_() for t in head(case))
        if path is linear_kd_loss:
            out = path(x, w, case["ids"], case["probs"], bias=b, **options)
        else:
            out = path(F.linear(x, w, b), case["ids"], case["probs"], **options)
        results.append((out, torch.autograd.grad(out.loss, (x, w, b), upstream)))
    return results


# Every two of τ, reduction and labels together, with every divergence and tail.
PLANS = [
    (tau, reduction, ("no", "some", "all")[(i + j) % 3])
    for i, tau in enumerate([1.0, 2.0, 3.0])
    for j, reduction in enumerate(["mean", "sum", "none"])
]


@pytest.mark.covering(2)
@pytest.mark.parametrize(("tau", "reduction", "labelled"), PLANS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_closed_form_equals_autograd(
    divergence: str, tail: str, tau: float, reduction: str, labelled: str
) -> None:
    case = make()
    labels, ce_weight = (None, 0.0) if labelled == "no" else (case["labels"], 0.3)
    if labelled == "all":
        labels = labels.clamp(min=0)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.3], dtype=torch.float64)
    upstream = torch.tensor(1.7, dtype=torch.float64)
    if reduction == "none":
        upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    for softcap, scale in ((None, 1.0), (3.0, 0.7)):
        *paths, (truth, truth_grads) = all_paths(
            case, upstream, labels=labels, temperature=tau, ce_weight=ce_weight, kd_weight=0.7,
            tail=tail, divergence=divergence, row_weight=weight, reduction=reduction,
            softcap=softcap, logit_scale=scale,
        )  # fmt: skip
        for out, grads in paths:
            for x, y in zip((*out, *grads), (*truth, *truth_grads), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.covering(2)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_the_derivative_of_the_returned_loss(
    divergence: str, tail: str, reduction: str
) -> None:
    case = make(rows=3, vocabulary=6, k=3, seed=3)
    case["ids"][1, 0], case["labels"][2] = -1, -100
    options = {
        "labels": case["labels"], "temperature": 2.0, "ce_weight": 0.4, "kd_weight": 0.6,
        "divergence": divergence, "tail": tail, "reduction": reduction,
    }  # fmt: skip

    def from_logits(z: Tensor) -> Tensor:
        return kd_loss(z, case["ids"], case["probs"], impl="torch", **options).loss

    def from_hidden(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kd_loss(
            x, w, case["ids"], case["probs"], bias=b, impl="torch", **options
        ).loss

    assert torch.autograd.gradcheck(from_logits, case["logits"].requires_grad_())
    assert torch.autograd.gradcheck(from_hidden, [t.requires_grad_() for t in head(case, 2)])


def test_stored_tail_is_used_as_given() -> None:
    case = make(rows=3, k=4, holes=False)
    tail = torch.tensor([0.2, 0.0, 0.7], dtype=torch.float64)
    q = 0.3 * case["probs"]  # with any of these tails no more than 1
    out = kd_loss(case["logits"], DecodedTargets(case["ids"], q, tail), reduction="none")
    p = case["logits"].softmax(1).gather(1, case["ids"])
    rest = 1 - p.sum(1)
    expected = (q * (q / p).log()).sum(1)
    expected = expected + torch.where(tail > 0, tail * (tail.clamp(min=1e-9) / rest).log(), 0.0)
    torch.testing.assert_close(out.kd, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tau_squared_is_in_the_loss_and_in_the_gradient(divergence: str) -> None:
    """With logits and targets that grow with τ, D stays the same and the loss must grow by τ²."""
    case = make(rows=4, holes=False)
    base = None
    for tau in (1.0, 2.0, 4.0):
        z = (case["logits"] * tau).requires_grad_()
        out = kd_loss(z, case["ids"], case["probs"], temperature=tau, divergence=divergence)
        (gradient,) = torch.autograd.grad(out.loss, z)
        base = (out.loss, gradient) if base is None else base
        torch.testing.assert_close(out.loss / base[0], torch.tensor(tau**2).double())
        torch.testing.assert_close(gradient, base[1] * tau)  # τ² · 1/τ


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 23),
    share=st.floats(0, 1),
    divergence=st.sampled_from(DIVERGENCES),
    tail=st.sampled_from(TAILS),
    tau=st.sampled_from([0.7, 1.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_invariants(
    seed: int, vocabulary: int, share: float, divergence: str, tail: str, tau: float
) -> None:
    """Gradient rows sum to 0; logits may shift; ids come in any order; k runs from 1 to V."""
    k = 1 + round(share * (vocabulary - 1))
    case = make(rows=3, vocabulary=vocabulary, k=k, seed=seed, holes=False)
    x = torch.eye(vocabulary, dtype=torch.float64)
    options = {"temperature": tau, "divergence": divergence, "tail": tail, "ce_weight": 0.5}
    options |= {"labels": case["labels"], "reduction": "sum"}

    def run(logits: Tensor, ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        z = logits.clone().requires_grad_()
        out = linear_kd_loss(z, x, ids, probs, **options)
        return out.loss.detach(), torch.autograd.grad(out.loss, z)[0]

    loss, gradient = run(case["logits"], case["ids"], case["probs"])
    assert gradient.sum(1).abs().max() < 1e-12
    torch.testing.assert_close(run(case["logits"] + 1000, case["ids"], case["probs"])[0], loss)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    again = run(case["logits"], case["ids"][:, order], case["probs"][:, order])
    torch.testing.assert_close(again, (loss, gradient))
    truth = reference(case["logits"], case["ids"], case["probs"], **options)
    torch.testing.assert_close(truth.loss, loss)


@pytest.mark.parametrize("tail", ["bucket", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_equal_to_student_costs_nothing(divergence: str, tail: str) -> None:
    """With every id listed, D is 0; with some, the bucket keeps it 0 and its gradient too."""
    z = torch.randn(4, 11, dtype=torch.float64)
    k = 11 if tail == "none" else 6
    ids = torch.arange(k).repeat(4, 1)
    case = {"logits": z, "ids": ids, "probs": (z / 2).softmax(1)[:, :k]}
    for run in (kd_loss, lambda x, *a, **o: linear_kd_loss(x, torch.eye(11).double(), *a, **o)):
        x = z.clone().requires_grad_()
        out = run(x, ids, case["probs"], temperature=2.0, divergence=divergence, tail=tail)
        (gradient,) = torch.autograd.grad(out.loss, x)
        assert abs(out.loss.item()) < 1e-14
        if divergence != "tvd":  # its derivative is a sign, which rounding decides at a tie
            assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("skew", [1e-12, 0.3, 0.9])
def test_the_skew_mixes_the_target_into_the_student(skew: float) -> None:
    """At nearly 0 it is forward KL; at any, the derivative is the loss's and −log α the most."""
    case = make(holes=False)
    ids, probs = case["ids"], case["probs"]
    z = case["logits"].requires_grad_()
    options = {"temperature": 2.0, "reduction": "sum"}
    out = kd_loss(z, ids, probs, divergence="skew_kl", skew=skew, **options)
    (gradient,) = torch.autograd.grad(out.loss, z)
    if skew == 1e-12:
        plain = kd_loss(z, ids, probs, **options)
        torch.testing.assert_close(out.loss, plain.loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            gradient, torch.autograd.grad(plain.loss, z)[0], rtol=1e-9, atol=0
        )
    truth = reference(z, ids, probs, divergence="skew_kl", skew=skew, **options)
    torch.testing.assert_close(out.loss, truth.loss)
    torch.testing.assert_close(gradient, torch.autograd.grad(truth.loss, z)[0])
    worst = torch.zeros(1, 3, dtype=torch.float64)
    worst[0, 2] = 1e4  # all of the student's mass where the teacher has none
    sure = kd_loss(worst, torch.tensor([[0]]), torch.ones(1, 1), divergence="skew_kl", skew=skew)
    assert sure.kd.item() == pytest.approx(-math.log(skew), abs=1e-6)


def test_total_variation_has_no_gradient_at_an_exact_tie() -> None:
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    ids, probs = torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]], dtype=torch.float64)
    for out in (
        kd_loss(z, ids, probs, divergence="tvd"),
        linear_kd_loss(z, torch.eye(4).double(), ids, probs, divergence="tvd"),
    ):
        assert torch.equal(torch.autograd.grad(out.loss, z)[0], torch.zeros(1, 4).double())


@pytest.mark.parametrize("tail", TAILS)
def test_one_certain_id_is_cross_entropy(tail: str) -> None:
    z = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 12, 7, 7])
    out = kd_loss(z, y[:, None], torch.ones(5, 1).double(), tail=tail)
    fused = linear_kd_loss(
        z, torch.eye(13).double(), y[:, None], torch.ones(5, 1).double(), tail=tail
    )
    truth = F.cross_entropy(z, y)
    for value in (out.loss, fused.loss):
        torch.testing.assert_close(value, truth)
        torch.testing.assert_close(
            torch.autograd.grad(value, z, retain_graph=True),
            torch.autograd.grad(truth, z, retain_graph=True),
        )


def test_only_the_loss_carries_a_gradient_and_it_is_the_weighted_sum() -> None:
    case = make()
    x, w, _ = (t.requires_grad_() for t in head(case))
    options = {"labels": case["labels"], "temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7}
    for out in (
        linear_kd_loss(x, w, case["ids"], case["probs"], **options),
        kd_loss(x @ w.t(), case["ids"], case["probs"], **options),
    ):
        assert out.loss.requires_grad
        assert not out.ce.requires_grad
        assert not out.kd.requires_grad
        torch.testing.assert_close(out.loss.detach(), 0.3 * out.ce + 0.7 * 4 * out.kd)


def test_mean_divides_by_the_rows_that_count() -> None:
    """D: rows of weight ≠ 0, with or without target; CE: those of them whose label counts."""
    case = make(rows=6)
    weight = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    options = {"labels": case["labels"], "ce_weight": 0.0, "row_weight": weight}
    rows = kd_loss(case["logits"], case["ids"], case["probs"], reduction="none", **options)
    mean = kd_loss(case["logits"], case["ids"], case["probs"], **options)
    torch.testing.assert_close(mean.kd, rows.kd.sum() / 5)  # row 3 has no target and counts
    torch.testing.assert_close(mean.ce, rows.ce.sum() / 4)  # row 4 has no label and does not
    assert rows.kd[0] == rows.ce[0] == rows.kd[3] == rows.ce[4] == 0


@pytest.mark.parametrize("path", [kd_loss, reference])
def test_ignored_rows_may_hold_anything(path: Any) -> None:
    case = make()
    x, w, _ = head(case)
    x[2], x[5] = math.nan, math.inf
    x.requires_grad_()
    w.requires_grad_()
    weight = torch.tensor([1, 1, 0, 1, 1, 0])
    ids, probs = case["ids"].clone(), case["probs"].clone()
    ids[5], probs[2] = 99, math.nan  # garbage targets too
    out = linear_kd_loss(x, w, ids, probs, row_weight=weight)
    gradients = torch.autograd.grad(out.loss, (x, w))
    z = case["logits"].clone()
    z[2] = math.nan
    z.requires_grad_()
    from_logits = path(z, ids, probs, row_weight=weight)
    gradients += torch.autograd.grad(from_logits.loss, z)
    assert out.loss.isfinite()
    assert from_logits.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    for g in (gradients[0], gradients[2]):
        assert torch.equal(g[2], torch.zeros_like(g[2]))
        assert torch.equal(g[5], torch.zeros_like(g[5]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_learn_gives_zero_and_a_usable_gradient(rows: int, reduction: str) -> None:
    x = torch.randn(rows, 4, requires_grad=True)
    w, b = torch.randn(7, 4, requires_grad=True), torch.randn(7, requires_grad=True)
    ids, probs = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1)
    options = {"labels": torch.zeros(rows, dtype=torch.long), "row_weight": torch.zeros(rows)}
    for out in (
        linear_kd_loss(x, w, ids, probs, bias=b, reduction=reduction, ce_weight=1.0, **options),
        kd_loss(F.linear(x, w, b), ids, probs, reduction=reduction, ce_weight=1.0, **options),
    ):
        assert out.loss.shape == out.kd.shape == out.ce.shape
        assert torch.equal(out.loss, torch.zeros_like(out.loss))
        for g in torch.autograd.grad(out.loss.sum(), (x, w, b)):
            assert torch.equal(g, torch.zeros_like(g))


def test_without_targets_it_is_plain_cross_entropy() -> None:
    x, w, b = (t.requires_grad_() for t in head(make()))
    labels = torch.tensor([3, -100, 5, 0, 18, 2])
    none = (torch.zeros(6, 0, dtype=torch.long), torch.zeros(6, 0))
    truth = F.cross_entropy(F.linear(x, w, b), labels)
    expected = torch.autograd.grad(truth, (x, w, b))
    for tau in (1.0, 2.0):
        out = linear_kd_loss(x, w, *none, bias=b, labels=labels, ce_weight=1.0, temperature=tau)
        torch.testing.assert_close(out.loss, truth)
        torch.testing.assert_close(torch.autograd.grad(out.loss, (x, w, b)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_rows_are_finite_and_right(
    divergence: str, tail: str, tau: float, dtype: torch.dtype
) -> None:
    """-inf at listed ids, others, labels; |z| = 1e4; p ≥ 0.999; nothing possible in the rest."""
    inf = math.inf
    z = torch.tensor(
        [
            [1e4, -1e4, 0.0, 3.0, -5.0],
            [-1e4, 1e4, 1.0, 2.0, 3.0],
            [9.0, 0.0, -inf, 0.5, -inf],
            [-inf, 2.0, 1.0, -inf, 0.0],
            [0.5, 1.5, -inf, -inf, -inf],
            [-inf, -inf, 1.0, 0.0, -1.0],
            [12.0, 0.0, 1.0, 0.0, 0.0],
            [0.0, 0.0, 1.0, 0.0, 14.0],
        ],
        dtype=dtype,
    )
    ids = torch.tensor([[0, 1]] * 8)
    probs = torch.tensor([[0.6, 0.3]] * 6 + [[0.9995, 1e-4], [1e-6, 0.0]], dtype=dtype)
    labels = torch.tensor([1, 0, 2, 0, 1, 2, 0, 4])
    options = {"labels": labels, "ce_weight": 0.5, "temperature": tau, "divergence": divergence}
    options |= {"tail": tail, "reduction": "none"}
    a, b = z.double().requires_grad_(), z.clone().requires_grad_()
    truth = reference(a, ids, probs.double(), **options)
    out = kd_loss(b, ids, probs, impl="torch", **options)
    (ga,) = torch.autograd.grad(truth.loss.sum(), a)
    (gb,) = torch.autograd.grad(out.loss.sum(), b)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    for x, y in ((truth.kd, out.kd), (truth.ce, out.ce), (ga, gb)):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("k", [1, 8, 101])
@pytest.mark.parametrize("budget", [1, 3000, 10**9])
def test_block_size_is_irrelevant_and_repeats_are_equal_to_the_bit(
    k: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(rows=9, vocabulary=101, k=k, holes=False)
    options = {"labels": case["labels"], "ce_weight": 0.5, "temperature": 2.0}
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 10**9)
    (truth, truth_grads), *_ = all_paths(case, torch.tensor(1.0).double(), **options)
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", budget)
    (out, grads), *_ = all_paths(case, torch.tensor(1.0).double(), **options)
    torch.testing.assert_close((*out, *grads), (*truth, *truth_grads))
    (again, grads_again), *_ = all_paths(case, torch.tensor(1.0).double(), **options)
    for x, y in zip((*out, *grads), (*again, *grads_again), strict=True):
        assert torch.equal(x, y)


@given(st.integers(0, 5000), st.integers(1, 300_000), st.integers(1, 24), st.integers(1, 2**31))
def test_blocks_cover_the_rows_within_the_budget(
    rows: int, vocabulary: int, size: int, budget: int
) -> None:
    step = blocks.block_rows(rows, vocabulary, size, budget)
    assert step >= 1
    assert step == 1 or step * vocabulary * size <= budget
    count = -(-rows // step)
    assert count <= 1 or rows > (count - 1) * step  # the last block is not empty


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the forward or backward pass is larger than the budget allows."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    case = make(rows=64, vocabulary=500, k=4, holes=False)
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 40_000)
    x, w, _ = (t.requires_grad_() for t in head(case))
    with Watch():
        linear_kd_loss(x, w, case["ids"], case["probs"], temperature=2.0).loss.backward()
    assert largest <= 40_000


def test_gradients_only_where_needed_and_none_under_no_grad(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[bool, ...]] = []
    original = ops._compute

    def spy(*args: Any) -> Any:
        asked.append(tuple(args[0].computation.needs_grad))
        return original(*args)

    monkeypatch.setattr(ops, "_compute", spy)
    case = make()
    x, w, b = head(case)
    args = (case["ids"], case["probs"])
    linear_kd_loss(x, w.requires_grad_(), *args, bias=b).loss.backward()
    with torch.no_grad():
        assert not linear_kd_loss(x, w, *args, bias=b).loss.requires_grad
    linear_kd_loss(x.requires_grad_(), w.detach(), *args, bias=b).loss.backward()
    assert asked == [(False, True, False), (False, False, False), (True, False, False)]
    assert b.grad is None


def test_backward_twice_and_accumulation_do_not_corrupt() -> None:
    case = make()
    x, w, _ = (t.requires_grad_() for t in head(case))
    (once,) = torch.autograd.grad(linear_kd_loss(x, w, case["ids"], case["probs"]).loss, w)
    loss = linear_kd_loss(x, w, case["ids"], case["probs"]).loss
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(w.grad, 3 * once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    case = make()
    x, w, _ = (t.to(dtype).requires_grad_() for t in head(case))
    probs = case["probs"].float()
    out = linear_kd_loss(x, w, case["ids"], probs)
    assert out.loss.dtype == torch.float32
    gx, gw = torch.autograd.grad(out.loss, (x, w))
    assert gx.dtype == gw.dtype == dtype
    xf, wf = (t.detach().float().requires_grad_() for t in (x, w))
    truth = linear_kd_loss(xf, wf, case["ids"], probs)
    torch.testing.assert_close(out.loss, truth.loss)
    torch.testing.assert_close(gw, torch.autograd.grad(truth.loss, wf)[0].to(dtype))
    assert (
        kd_loss(x, case["ids"].clamp(max=3), probs, tail="none", row_weight=torch.zeros(6)).loss
        == 0
    )


def test_float64_in_float64_out() -> None:
    case = make()
    assert (
        kd_loss(case["logits"], case["ids"], case["probs"], impl="torch").loss.dtype
        == torch.float64
    )


def test_auto_says_once_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    choice._log_once.cache_clear()
    case = make()
    with caplog.at_level(logging.INFO, logger="rekindle"):
        for _ in range(3):
            kd_loss(case["logits"], case["ids"], case["probs"])
    lines = [r.message for r in caplog.records if "impl auto" in r.message]
    assert len(lines) == 1
    assert "torch" in lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "divergence"),
        ({"tail": "ghost"}, "tail"),
        ({"reduction": "avg"}, "reduction"),
        ({"impl": "cuda"}, "impl"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"ce_weight": math.inf}, "ce_weight is inf"),
        ({"labels": torch.full((6,), 19), "ce_weight": 1.0}, "labels hold 19 in row 0"),
        ({"labels": torch.zeros(5, dtype=torch.long), "ce_weight": 1.0}, r"labels is \(5,\)"),
        ({"labels": torch.zeros(6), "ce_weight": 1.0}, "labels is torch.float32"),
        ({"row_weight": torch.ones(6, 1)}, "row_weight"),
        ({"skew": 0.1}, "skew is for divergence: skew_kl, not forward_kl"),
        ({"divergence": "skew_kl", "skew": 0.0}, "skew is 0; it must lie between 0 and 1"),
        ({"tail_prob": torch.full((6,), -0.1)}, "tail_prob"),
        ({"target_ids": torch.full((6, 5), 19)}, "target_ids"),
        ({"target_ids": torch.full((6, 5), -2)}, "target_ids"),
        ({"target_ids": torch.full((6, 5), 3)}, "twice"),
        ({"target_ids": torch.zeros(6, 4, dtype=torch.long)}, "target_ids"),
        ({"target_ids": torch.zeros(6, 5)}, "target_ids"),
        ({"target_probs": torch.full((6, 5), math.nan)}, "target_probs"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    case = make()
    args = {"target_ids": case["ids"], "target_probs": case["probs"], **change}
    with pytest.raises(ValueError, match=message):
        kd_loss(case["logits"], **args)
    x, w, _ = head(case)
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(x, w, **args)


def test_shapes_of_the_head_are_checked() -> None:
    case = make()
    x, w, b = head(case)
    targets = (case["ids"], case["probs"])
    for bad in ((x[0], w, None), (x, w[:, :2], None), (x, w, b[:3]), (x.long(), w, None)):
        with pytest.raises(ValueError, match="must be"):
            linear_kd_loss(bad[0], bad[1], *targets, bias=bad[2])
