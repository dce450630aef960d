"""Whole distributions from hidden states: against dense float64, in blocks of any size."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rekindle.kernels import blocks, blockwise, ops
from rekindle.kernels.hidden import DenseTargets, HiddenTargets
from rekindle.kernels.losses import KDLoss, kd_loss, linear_kd_loss
from rekindle.kernels.targets import LOG_OF_ZERO, LossSettings
from rekindle.kernels.whole_vocabulary import whole_buffers
from testlib.hidden import (
    DEVICE,
    DIVERGENCES,
    ROWS,
    VOCABULARY,
    Largest,
    budget,
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


@pytest.mark.covering(2)
@pytest.mark.parametrize("head_options", [{}, {"softcap": 4.0, "logit_scale": 0.6}])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradients_are_those_of_all_logits(
    kind: str, tau: float, labelled: bool, head_options: dict
) -> None:
    options: dict[str, Any] = {"divergence": kind, "temperature": tau} | head_options
    if labelled:
        options |= {"labels": labels(), "ce_weight": 0.3, "kd_weight": 0.7}
    # Every two of reduction, weights of rows and the teacher's cap together.
    caps = itertools.cycle([(None, 1.0), (3.0, 1.7), (3.0, 1.7), (None, 1.0)])
    for reduction, rows in itertools.product(
        ("mean", "sum", "none"), (None, torch.arange(ROWS) % 3)
    ):
        cap, scale = next(caps)
        options |= {"reduction": reduction}
        options |= {"row_weight": None if rows is None else rows.double().to(DEVICE)}
        targets = teacher(softcap=cap, logit_scale=scale)
        expected = with_gradients(truth, head(), targets, **options)
        for path in (fused, from_logits):
            check(with_gradients(path, head(), targets, impl="torch", **options), expected)


@pytest.mark.parametrize("kind", ["int16", "int8", "float"])
@pytest.mark.parametrize("bias", [True, False])
def test_states_of_any_type_with_and_without_bias(kind: str, bias: bool) -> None:
    targets = teacher(kind, bias=bias)
    check(
        with_gradients(fused, head(), targets, impl="torch"), with_gradients(truth, head(), targets)
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_stored_probabilities_are_such_targets_too(kind: str) -> None:
    """Log-probabilities, or logits, of the same teacher."""
    hidden, options = teacher(), {"divergence": kind, "temperature": 2.0, "impl": "torch"}
    logits = teacher_logits(hidden)
    expected = with_gradients(fused, head(), hidden, **options)
    for stored in (logits, torch.log_softmax(logits, 1)):
        check(with_gradients(fused, head(), DenseTargets(stored), **options), expected)
        check(with_gradients(from_logits, head(), DenseTargets(stored), **options), expected)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_it_is_what_sparse_targets_of_every_id_give(kind: str, tau: float) -> None:
    hidden = teacher()
    probs = torch.softmax(teacher_logits(hidden) / tau, 1)
    ids = torch.arange(VOCABULARY, device=DEVICE).expand(ROWS, -1)
    options = {"divergence": kind, "temperature": tau, "labels": labels(), "ce_weight": 0.4}

    def sparse(inputs: list[Tensor], targets: Any, **o: Any) -> KDLoss:
        x, w, b = inputs
        return linear_kd_loss(x, w, ids, probs, tail_prob=probs.new_zeros(ROWS), bias=b, **o)

    options["impl"] = "torch"
    check(
        with_gradients(fused, head(), hidden, **options),
        with_gradients(sparse, head(), None, **options),
    )


@pytest.mark.parametrize(
    ("kind", "reduction"), [*((kind, "mean") for kind in DIVERGENCES), (DIVERGENCES[0], "none")]
)
def test_gradcheck(kind: str, reduction: str) -> None:
    targets = teacher(softcap=5.0)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kd_loss(
            x, w, targets, bias=b, divergence=kind, temperature=2.0, labels=labels(),
            ce_weight=0.3, softcap=8.0, logit_scale=0.7, reduction=reduction, impl="torch",
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in head()])


@given(st.integers(0, 10**6), st.sampled_from(DIVERGENCES), st.floats(0.2, 8), st.floats(0.1, 30))
@settings(max_examples=60, deadline=None)
def test_float32_is_near_float64(seed: int, kind: str, tau: float, sharpness: float) -> None:
    """Flat and peaked rows, of student and teacher."""
    x, w, b = head(torch.float32, seed)
    targets = teacher(seed=seed + 1, logit_scale=sharpness)
    inputs, options = [x * sharpness, w, b], {"divergence": kind, "temperature": tau}
    found = with_gradients(fused, inputs, targets, **options)
    expected = with_gradients(truth, inputs, targets, **options)
    assert all(t.dtype == torch.float32 for t in found)
    check(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(kind: str) -> None:
    x, w, b = head()
    targets = HiddenTargets(x, None, w, b)
    loss, _, _, *gradients = with_gradients(fused, [x, w, b], targets, divergence=kind)
    assert abs(float(loss)) < 1e-12
    if kind != "tvd":  # its slope is ±1 beside the kink, where rounding decides
        assert max(float(g.abs().max()) for g in gradients) < 1e-12


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_ids_that_cannot_occur(kind: str, tau: float) -> None:
    """-inf in either or both; all of a row; the label's. As sparse targets define it."""
    student, log_q = (
        torch.randn(ROWS, VOCABULARY, dtype=torch.float64, device=DEVICE) for _ in "ab"
    )
    student[0, 3] = log_q[1, 4] = -math.inf
    student[2, :9] = log_q[2, 5:12] = -math.inf
    student[3] = -math.inf
    of = labels()
    student[0, of[0]] = student[5, of[5]] = -math.inf
    options = {"divergence": kind, "temperature": tau, "labels": of, "ce_weight": 0.3}
    z = student.clone().requires_grad_()
    found = kd_loss(z, DenseTargets(log_q), impl="torch", reduction="none", **options)
    assert torch.isfinite(found.loss).all()
    (gradient,) = torch.autograd.grad(found.loss.sum(), z)
    assert (gradient[student == -math.inf] == 0).all()
    assert torch.isfinite(gradient).all()

    there = torch.arange(ROWS, device=DEVICE) != 3
    ids = torch.arange(VOCABULARY, device=DEVICE).expand(ROWS, -1)[there]
    probs = torch.softmax(log_q[there] / tau, 1)
    other = student[there].requires_grad_()
    options |= {"labels": of[there], "tail_prob": probs.new_zeros(len(probs))}
    expected = kd_loss(other, ids, probs, impl="torch", reduction="none", **options)
    torch.testing.assert_close(found.kd[there], expected.kd)
    torch.testing.assert_close(found.ce[there], expected.ce)
    wanted = torch.autograd.grad(expected.loss.sum(), other)[0]
    torch.testing.assert_close(gradient[there], wanted)


def test_an_unlikely_id_counts_as_it_is_and_an_impossible_one_as_the_smallest_number() -> None:
    """Reverse KL at one id of probability e^-500: its logarithm is −500, in float32 too."""
    log_q = torch.zeros(1, 3, device=DEVICE)
    log_q[0, 0] = -500.0
    z = torch.zeros(1, 3, device=DEVICE)
    kd = kd_loss(z, DenseTargets(log_q), divergence="reverse_kl").kd
    assert float(kd) == pytest.approx(-math.log(3) + 500 / 3 + math.log(2), rel=1e-6)
    log_q[0, 0] = -math.inf
    kd = kd_loss(z, DenseTargets(log_q), divergence="reverse_kl").kd
    assert float(kd) == pytest.approx(
        -math.log(3) - LOG_OF_ZERO / 3 + 2 / 3 * math.log(2), rel=1e-6
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_large_logits_lose_nothing(kind: str) -> None:
    """|z| = 1e4 in float32: differences of a row are exact, its size does not matter."""
    z = torch.randint(-8, 8, (ROWS, VOCABULARY), device=DEVICE) / 4.0
    log_q = torch.randint(-8, 8, (ROWS, VOCABULARY), device=DEVICE) / 4.0
    options = {"divergence": kind, "labels": labels(), "ce_weight": 0.5, "reduction": "none"}
    near = kd_loss(z, DenseTargets(log_q), **options)
    far = kd_loss(z + 8192, DenseTargets(log_q - 8192), **options)
    torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("rows", [1, 3, ROWS])
def test_blocks_of_any_size_give_the_same(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"divergence": kind, "temperature": 2.0, "labels": labels()}
    options |= {"ce_weight": 0.3, "softcap": 6.0, "impl": "torch"}
    buffers = whole_buffers(LossSettings(softcap=6.0, divergence=kind), True)
    seen = []
    inner = blockwise.whole_loss_block
    monkeypatch.setattr(
        blockwise, "whole_loss_block", lambda z, *rest: seen.append(len(z)) or inner(z, *rest)
    )
    for path in (fused, from_logits):
        whole = with_gradients(path, head(), teacher(), **options)
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setitem(blocks.BLOCK_BYTES, DEVICE, budget(rows, buffers, 8))
            check(with_gradients(path, head(), teacher(), **options), whole, rtol=1e-12)
        assert sum(seen) == ROWS
        assert max(seen) == rows


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("form", ["hidden", "dense"])
def test_no_more_than_blocks_of_logits_are_ever_made(
    form: str, kind: str, tau: float, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither [N,V] in one tensor, nor more bytes of blocks than the budget, students' and
    teachers', gradients included.
    """
    rows, block = 24, 4
    objective = LossSettings(divergence=kind, temperature=tau, ce_weight=0.5 * labelled)
    buffers = whole_buffers(objective, labelled)
    monkeypatch.setitem(blocks.BLOCK_BYTES, DEVICE, budget(block, buffers, 4))
    x, w, b = head(torch.float32, rows=rows)
    mode = Largest((block, VOCABULARY))
    inner = ops._compute

    def watched(*arguments: Any) -> Any:
        with mode:  # inside the operator, which no mode sees into
            return inner(*arguments)

    monkeypatch.setattr(ops, "_compute", watched)
    targets: Any = teacher(rows=rows)
    if form == "dense":
        targets = DenseTargets(teacher_logits(targets).float())
    options = {"labels": labels(rows)} if labelled else {}
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = linear_kd_loss(
        x, w, targets, bias=b, divergence=kind, temperature=tau, ce_weight=0.5 * labelled, **options
    ).loss
    torch.autograd.grad(loss, leaves)
    assert mode.largest >= block * VOCABULARY  # the mode has seen the blocks
    assert mode.largest < rows * VOCABULARY
    assert budget(block, buffers - 1, 4) < mode.most <= budget(block, buffers, 4)


# --- rows that do not count -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["states", "scale", "hidden", "log_probs"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_of_weight_zero_may_hold_anything(bad: str, reduction: str) -> None:
    x, w, b = head()
    keep = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
    targets: Any = teacher("float", rows=ROWS)
    targets = targets._replace(scale=torch.ones(ROWS, device=DEVICE))
    if bad == "log_probs":
        targets = DenseTargets(teacher_logits(targets))
    options = {"row_weight": keep, "labels": labels(), "ce_weight": 0.5, "reduction": reduction}
    clean = with_gradients(fused, [x, w, b], targets, **options)
    if bad == "hidden":
        x = x.masked_fill((keep == 0)[:, None], math.nan)
    else:
        spoiled = getattr(targets, bad).clone()
        spoiled[keep == 0] = math.nan
        targets = targets._replace(**{bad: spoiled})
    found = with_gradients(fused, [x, w, b], targets, **options)
    check(found, clean, rtol=1e-13)
    assert (found[3][keep == 0] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_no_rows_that_count(reduction: str) -> None:
    for rows, weight in ((0, None), (0, torch.zeros(0)), (4, torch.zeros(4))):
        x, w, b = head(rows=rows)
        options = {"reduction": reduction, "row_weight": weight, "labels": labels(rows)}
        for path in (fused, from_logits):
            loss, ce, kd, *gradients = with_gradients(
                path, [x, w, b], teacher(rows=rows), ce_weight=1.0, **options
            )
            shape = (rows,) if reduction == "none" else ()
            assert all(t.shape == shape and (t == 0).all() for t in (loss, ce, kd))
            assert all((g == 0).all() for g in gradients)
