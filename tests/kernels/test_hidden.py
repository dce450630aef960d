"""Whole distributions from hidden states: against dense float64 autograd; in bounded memory."""

import itertools
import logging
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rekindle.kernels import chunked, losses, ops
from rekindle.kernels.closed_form import Coefficients
from rekindle.kernels.hidden import DenseTargets, HiddenTargets, TeacherBlocks, row_entropy
from rekindle.kernels.losses import KDLoss, kd_loss, linear_kd_loss
from rekindle.kernels.targets import LOG_OF_ZERO, LossSettings, SparseTargets
from rekindle.kernels.whole_vocabulary import whole_buffers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
ROWS, VOCABULARY, HIDDEN, TEACHER_HIDDEN = 7, 23, 5, 3


def head(dtype: torch.dtype = torch.float64, seed: int = 0, rows: int = ROWS) -> list[Tensor]:
    """Hidden states, weight and bias of a student."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]


def teacher(kind: str = "int16", seed: int = 1, rows: int = ROWS, **options: Any) -> HiddenTargets:
    """States as a cache keeps them, in integers of 16 or 8 bits, or as floats."""
    g = torch.Generator().manual_seed(seed)
    weight = 2 * torch.randn(VOCABULARY, TEACHER_HIDDEN, generator=g)
    bias = torch.randn(VOCABULARY, generator=g) if options.pop("bias", True) else None
    if kind == "float":
        states, scale = torch.randn(rows, TEACHER_HIDDEN, generator=g), None
    else:
        dtype = getattr(torch, kind)
        top = torch.iinfo(dtype).max
        states = torch.randint(-top, top, (rows, TEACHER_HIDDEN), generator=g).to(dtype)
        scale = (0.5 + torch.rand(rows, generator=g)) / top
    tensors = (None if t is None else t.to(DEVICE) for t in (states, scale, weight, bias))
    return HiddenTargets(*tensors, **options)


def labels(rows: int = ROWS) -> Tensor:
    g = torch.Generator().manual_seed(2)
    found = torch.randint(VOCABULARY, (rows,), generator=g)
    found[1::3] = -100
    return found.to(DEVICE)


def transformed(z: Tensor, scale: float, cap: float | None) -> Tensor:
    return scale * z if cap is None else cap * torch.tanh(scale * z / cap)


def teacher_logits(targets: HiddenTargets | DenseTargets) -> Tensor:
    """[N,V] in float64."""
    if isinstance(targets, DenseTargets):
        return targets.log_probs.double()
    states = targets.states.double()
    if targets.scale is not None:
        states = states * targets.scale.double()[:, None]
    bias = None if targets.bias is None else targets.bias.double()
    z = F.linear(states, targets.weight.double(), bias)
    return transformed(z, targets.logit_scale, targets.softcap)


def divergence(log_q: Tensor, log_p: Tensor, kind: str) -> Tensor:
    """D [N] of finite log-probabilities [N,V]."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(1)

    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return {
        "forward_kl": kl(log_q, log_p),
        "reverse_kl": kl(log_p, log_q),
        "jsd": (kl(log_q, log_m) + kl(log_p, log_m)) / 2,
        "tvd": (log_q.exp() - log_p.exp()).abs().sum(1) / 2,
    }[kind]


def truth(inputs: Any, targets: Any, **o: Any) -> KDLoss:
    """The loss through dense float64 autograd: all logits, every row, plain formulas."""
    x, w, b = (None if t is None else t.double() for t in inputs)
    raw = x if w is None else F.linear(x, w, b)
    z = transformed(raw, o.get("logit_scale", 1.0), o.get("softcap"))
    tau, row_weight = o.get("temperature", 1.0), o.get("row_weight")
    log_q = torch.log_softmax(teacher_logits(targets) / tau, 1)
    kind = o.get("divergence", "forward_kl")
    kd = divergence(log_q, torch.log_softmax(z / tau, 1), kind)
    ce = torch.zeros_like(kd)
    if o.get("labels") is not None:
        ce = F.cross_entropy(z, o["labels"], reduction="none", ignore_index=-100)
    counted = o["labels"] != -100 if o.get("labels") is not None else torch.zeros_like(kd)
    active = torch.ones_like(kd)
    if row_weight is not None:
        active = (row_weight != 0).double()
        kd, ce = kd * row_weight.double(), ce * row_weight.double()
    if o.get("reduction", "mean") == "mean":
        kd = kd.sum() / active.sum().clamp(min=1)
        ce = ce.sum() / (active * counted).sum().clamp(min=1)
    elif o["reduction"] == "sum":
        kd, ce = kd.sum(), ce.sum()
    loss = o.get("ce_weight", 0.0) * ce + o.get("kd_weight", 1.0) * tau**2 * kd
    return KDLoss(loss, ce.detach(), kd.detach())


def with_gradients(function: Any, inputs: list[Tensor], targets: Any, **o: Any) -> list[Tensor]:
    """loss, ce, kd, and the gradients of inputs, weight and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(leaves, targets, **o)
    upstream = torch.linspace(0.5, 2, out.loss.numel(), dtype=out.loss.dtype, device=DEVICE)
    gradients = torch.autograd.grad(out.loss, leaves, upstream.view(out.loss.shape))
    return [t.detach() for t in out] + list(gradients)


def fused(inputs: list[Tensor], targets: Any, **o: Any) -> KDLoss:
    x, w, b = inputs
    return linear_kd_loss(x, w, targets, bias=b, **o)


def from_logits(inputs: list[Tensor], targets: Any, **o: Any) -> KDLoss:
    x, w, b = inputs
    return kd_loss(F.linear(x, w, b), targets, **o)


def check(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=rtol * size)


# --- the loss and its gradients -------------------------------------------------------------------


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
    for reduction, rows, (cap, scale) in itertools.product(
        ("mean", "sum", "none"), (None, torch.arange(ROWS) % 3), ((None, 1.0), (3.0, 1.7))
    ):
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


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
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


# --- blocks and memory ----------------------------------------------------------------------------


def budget(rows: int, buffers: int, size: int) -> int:
    return rows * buffers * size * VOCABULARY


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("rows", [1, 3, ROWS])
def test_blocks_of_any_size_give_the_same(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"divergence": kind, "temperature": 2.0, "labels": labels()}
    options |= {"ce_weight": 0.3, "softcap": 6.0, "impl": "torch"}
    buffers = whole_buffers(LossSettings(softcap=6.0, divergence=kind), True)
    seen = []
    inner = chunked.whole_loss_block
    monkeypatch.setattr(
        chunked, "whole_loss_block", lambda z, *rest: seen.append(len(z)) or inner(z, *rest)
    )
    for path in (fused, from_logits):
        whole = with_gradients(path, head(), teacher(), **options)
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setitem(chunked.BLOCK_BYTES, DEVICE, budget(rows, buffers, 8))
            check(with_gradients(path, head(), teacher(), **options), whole, rtol=1e-12)
        assert sum(seen) == ROWS
        assert max(seen) == rows


class Largest(TorchDispatchMode):
    """The most elements of any tensor, and the most bytes of blocks alive at once."""

    def __init__(self, block: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.block, self.largest, self.most = block, 0, 0
        self.living: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.shape != self.block or storage._cdata in self.living:
            return
        self.living[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.living.pop, storage._cdata, None)
        tensor._kept_storage = storage  # the storage's wrapper dies with the tensor
        self.most = max(self.most, sum(self.living.values()))


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
    monkeypatch.setitem(chunked.BLOCK_BYTES, DEVICE, budget(block, buffers, 4))
    x, w, b = head(torch.float32, rows=rows)
    mode = Largest((block, VOCABULARY))
    inner = ops._run

    def watched(*arguments: Any) -> Any:
        with mode:  # inside the operator, which no mode sees into
            return inner(*arguments)

    monkeypatch.setattr(ops, "_run", watched)
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


# --- the operator ---------------------------------------------------------------------------------


def call(student: ops.StudentLogits, targets: Any, reduction: str) -> list[object]:
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.5], device=DEVICE)
    none = torch.empty(ROWS, 0, dtype=torch.int64, device=DEVICE)
    rows = SparseTargets(none, none, None, labels(), weight)
    settings = LossSettings(ce_weight=0.5, temperature=2.0, reduction=reduction)
    computation = ops.Computation("torch", torch.float32, [t is not None for t in student])
    teacher = ops.WholeTeacher.of(targets)
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
    x, w, b = head(torch.float32, rows=64)
    targets, objective = teacher(rows=64), LossSettings(divergence=kind)
    none = torch.empty(64, 0, dtype=torch.long, device=DEVICE)
    rows = SparseTargets(none, none, None, None, None)
    ones = torch.full((64,), 1 / 64, device=DEVICE)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        losses_, gradients = chunked.linear_blockwise(
            x, w, b, rows, objective, Coefficients(ones, ones), (True, True, True),
            TeacherBlocks(targets, torch.float32, dtype), dtype,
        )  # fmt: skip
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
    losses._say_once.cache_clear()
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
        with pytest.raises(ValueError, match="HiddenTargets carry their probabilities"):
            linear_kd_loss(x, w, teacher(), **extra)
    with pytest.raises(ValueError, match="labels hold 23"):
        linear_kd_loss(x, w, teacher(), labels=torch.full((ROWS,), VOCABULARY))
    with pytest.raises(ValueError, match="target_probs is missing"):
        linear_kd_loss(x, w, torch.zeros(ROWS, 2, dtype=torch.long))


# --- the student's entropy ------------------------------------------------------------------------


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.3), (5.0, 2.0)])
@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("biased", [True, False])
def test_entropy_is_that_of_all_logits(
    rows: int, softcap: float | None, scale: float, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, b = head(torch.float32)
    monkeypatch.setitem(chunked.BLOCK_BYTES, DEVICE, budget(rows, 3, 4))
    z = transformed(
        F.linear(x.double(), w.double(), b.double() if biased else None), scale, softcap
    )
    with Largest() as mode:
        found = row_entropy(x, w, b if biased else None, softcap=softcap, logit_scale=scale)
    assert found.dtype == torch.float32
    assert mode.largest <= max(rows * VOCABULARY, w.numel())
    expected = torch.distributions.Categorical(logits=z).entropy()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_entropy_of_extremes() -> None:
    """Flat rows, certain ones, ids that cannot occur, no rows, other dtypes, no gradient."""
    w = torch.eye(4, device=DEVICE)
    x = torch.tensor([[0, 0, 0, 0], [5000, 0, 0, 0], [1, 1, -4000, -4000]], device=DEVICE).float()
    expected = torch.tensor([math.log(4), 0.0, math.log(2)], device=DEVICE)
    torch.testing.assert_close(row_entropy(x, w), expected)
    bias = torch.tensor([0, -math.inf, 0, -math.inf], device=DEVICE)
    two = row_entropy(x[:1], w, bias)
    torch.testing.assert_close(two, torch.full_like(two, math.log(2)))
    assert row_entropy(x[:0], w).shape == (0,)
    assert row_entropy(x.double(), w.double()).dtype == torch.float32
    assert row_entropy(x.bfloat16(), w.bfloat16()).dtype == torch.float32
    assert not row_entropy(x.requires_grad_(), w.requires_grad_()).requires_grad


def test_entropy_under_autocast_is_the_same_on_cpu() -> None:
    if DEVICE != "cpu":
        pytest.skip("a GPU's products are in bfloat16 there")
    x, w, b = head(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = row_entropy(x, w, b)
    torch.testing.assert_close(mixed, row_entropy(x, w, b), rtol=0, atol=0)
