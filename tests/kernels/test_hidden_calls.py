"""Whole distributions from hidden states: as an op of torch, and calls that are refused."""

import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rekindle.kernels import blockwise, choice, ops
from rekindle.kernels.closed_form import Coefficients
from rekindle.kernels.hidden import DenseTargets, WholeLogits
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.kernels.targets import KernelTargets, LossSettings
from testlib.hidden import (
    DEVICE,
    DIVERGENCES,
    ROWS,
    TEACHER_HIDDEN,
    VOCABULARY,
    check,
    from_logits,
    fused,
    head,
    labels,
    teacher,
    teacher_logits,
    truth,
    with_gradients,
)


def call(student: ops.StudentLogits, targets: Any, reduction: str) -> list[object]:
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.5], device=DEVICE)
    none = torch.empty(ROWS, 0, dtype=torch.int64, device=DEVICE)
    rows = KernelTargets(none, none, None, labels(), weight)
    settings = LossSettings(ce_weight=0.5, temperature=2.0, reduction=reduction)
    computation = ops.Computation("torch", torch.float32, [t is not None for t in student])
    teacher = WholeLogits.of(targets)
    return ops.Call(student, rows, teacher, settings, computation).flat()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str) -> None:
    plain = ops.StudentLogits(*head(torch.float32))
    leaves = ops.StudentLogits(*(t.requires_grad_() for t in head(torch.float32)))
    targets = teacher(softcap=9.0)
    torch.library.opcheck(ops._kd_loss, call(leaves, targets, reduction))
    logits = ops.StudentLogits(F.linear(*plain).requires_grad_())
    dense = DenseTargets(teacher_logits(teacher()).float())
    torch.library.opcheck(ops._kd_loss, call(logits, dense, reduction))
    if reduction == "none":
        upstream = torch.rand(ROWS, device=DEVICE)
        arguments = (upstream, *call(plain, targets, reduction))
        torch.library.opcheck(ops._kd_loss_backward, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction: str) -> None:
    targets = teacher()
    options = {"labels": labels(), "ce_weight": 0.5, "temperature": 2.0, "reduction": reduction}
    for path in (fused, from_logits):
        torch.compiler.reset()
        compiled = torch.compile(path, fullgraph=True, backend="aot_eager")
        inputs = head(torch.float32)
        check(
            with_gradients(compiled, inputs, targets, **options),
            with_gradients(path, inputs, targets, **options),
            rtol=1e-6,
        )


@pytest.mark.parametrize("path", [fused, from_logits])
def test_autocast_changes_nothing_of_float32_inputs_on_cpu(path: Any) -> None:
    if path is from_logits or DEVICE != "cpu":
        exact = head(torch.float32)
        logits = [F.linear(*exact), None, None]
        path = lambda inputs, targets, **o: kd_loss(inputs[0], targets, **o)  # noqa: E731
        inputs = logits[:1]
    else:
        inputs = head(torch.float32)
    plain = with_gradients(path, inputs, teacher())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        mixed = with_gradients(path, inputs, teacher())
    assert all(t.dtype == torch.float32 for t in mixed)
    check(mixed, plain, rtol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_products_may_be_of_sixteen_bits(kind: str) -> None:
    """As on a GPU under autocast: factors are rounded, and nothing else is."""
    student = ops.StudentLogits(*head(torch.float32, rows=64))
    targets, objective = teacher(rows=64), LossSettings(divergence=kind)
    none = torch.empty(64, 0, dtype=torch.long, device=DEVICE)
    rows = KernelTargets(none, none, None, None, None)
    ones = torch.full((64,), 1 / 64, device=DEVICE)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        computation = ops.Computation("torch", dtype, (True, True, True))
        asked = ops.Call(student, rows, WholeLogits.of(targets), objective, computation)
        losses_, gradients = blockwise.blockwise(asked, Coefficients(ones, ones))
        assert all(g.dtype == torch.float32 for g in gradients)
        results.append([losses_.kd, *gradients])
    for exact, rounded in zip(*results, strict=True):
        error = (exact - rounded).norm() / exact.norm()
        assert 1e-5 < error < 0.03
    assert (results[1][2] != results[1][2].bfloat16().float()).any()  # dW is a float32 sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_students(dtype: torch.dtype) -> None:
    inputs = head(dtype)
    found = with_gradients(fused, inputs, teacher(), impl="torch")
    assert found[0].dtype == torch.float32
    assert all(g.dtype == dtype for g in found[3:])
    expected = with_gradients(truth, inputs, teacher())
    check(found[:3], expected[:3], rtol=1e-5)
    check(found[3:], [g.to(dtype) for g in expected[3:]], rtol=1e-2)


def test_walking_a_graph_twice_and_adding_up() -> None:
    x, w, _ = head(torch.float32)
    w.requires_grad_()
    loss = linear_kd_loss(x, w, teacher()).loss
    loss.backward(retain_graph=True)
    once = w.grad.clone()
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(w.grad, 5 * once)


def test_only_what_is_wanted_is_formed() -> None:
    x, w, b = head(torch.float32)
    for wanted in itertools.product([True, False], repeat=3):
        leaves = [t.clone().requires_grad_(f) for t, f in zip((x, w, b), wanted, strict=True)]
        loss = fused(leaves, teacher()).loss
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    with torch.no_grad():
        assert not fused([t.requires_grad_() for t in (x, w, b)], teacher()).loss.requires_grad


def test_a_teacher_gets_no_gradient() -> None:
    targets = teacher("float")
    targets = targets._replace(
        **{n: getattr(targets, n).requires_grad_() for n in ("states", "weight")}
    )
    x, w, b = (t.requires_grad_() for t in head())
    fused([x, w, b], targets).loss.backward()
    assert targets.states.grad is targets.weight.grad is None
    assert w.grad is not None


def test_it_is_said_that_there_is_no_triton_kernel(caplog: pytest.LogCaptureFixture) -> None:
    choice._log_once.cache_clear()
    for impl in ("auto", "triton"):
        with caplog.at_level(logging.INFO, "rekindle"):
            found = with_gradients(fused, head(), teacher(), impl=impl)
        expected = with_gradients(fused, head(), teacher(), impl="torch")
        check(found, expected, rtol=1e-13)
        line = f"impl {impl} takes torch (targets of the whole vocabulary have no Triton kernel)"
        assert line in caplog.text


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("states", torch.zeros(3, TEACHER_HIDDEN), r"states is \(3, 3\); it must be \(7, 3\)"),
        ("states", torch.zeros(ROWS, 4), r"states is \(7, 4\); it must be \(7, 3\)"),
        ("scale", torch.zeros(3), r"scale is \(3,\); it must be \(7,\)"),
        ("weight", torch.zeros(9, TEACHER_HIDDEN), r"weight is \(9, 3\); it must be \(23, 3\)"),
        ("weight", torch.zeros(VOCABULARY, 3).int(), "values are torch.int32"),
        ("bias", torch.zeros(9), r"bias is \(9,\); it must be \(23,\)"),
        ("softcap", 0.0, "softcap is 0.0; it must be positive"),
        ("logit_scale", -1.0, "logit_scale is -1.0; it must be positive"),
    ],
)
def test_targets_that_do_not_fit_are_refused(field: str, value: Any, message: str) -> None:
    value = value.to(DEVICE) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=f"the teacher's {message}"):
        fused(head(), teacher()._replace(**{field: value}))


def test_other_calls_that_do_not_fit_are_refused() -> None:
    x, w, b = head()
    with pytest.raises(ValueError, match=r"log_probs is \(7, 9\); it must be \(7, 23\)"):
        linear_kd_loss(x, w, DenseTargets(torch.zeros(ROWS, 9, device=DEVICE)))
    with pytest.raises(ValueError, match=r"log_probs is \(7, 9\)"):
        kd_loss(F.linear(x, w, b), DenseTargets(torch.zeros(ROWS, 9, device=DEVICE)))
    for extra in ({"target_probs": torch.zeros(1)}, {"tail_prob": torch.zeros(ROWS)}):
        with pytest.raises(ValueError, match="HiddenTargets carry their own probabilities"):
            linear_kd_loss(x, w, teacher(), **extra)
    with pytest.raises(ValueError, match="labels hold 23"):
        linear_kd_loss(x, w, teacher(), labels=torch.full((ROWS,), VOCABULARY), ce_weight=1.0)
    with pytest.raises(ValueError, match="target_probs is missing"):
        linear_kd_loss(x, w, torch.zeros(ROWS, 2, dtype=torch.long))
