"""The Triton kernels against float64: on a GPU where there is one, else under the interpreter.

The interpreter costs milliseconds an operation and block, so shapes are small; each is in the
grid for the reason that stands beside it.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle.kernels.losses import KDLoss, kd_loss, linear_kd_loss
from rekindle.kernels.targets import KernelTargets, LossSettings
from testlib.kernels.reference import loss_settings, reference_losses
from testlib.kernels.shapes import DEVICE, kernel_takes

pytest.importorskip("triton")

# Listed entries go through the ordinary formula before they are overwritten; it may overflow.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning"),
    pytest.mark.usefixtures("triton_runs"),
]

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl")
TAILS = ("bucket", "renormalise", "none")
# one unit in the last place, as a share of the value; the interpreter cuts bfloat16 off, so twice
# there
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def make(rows: int, vocabulary: int, k: int, seed: int = 0, dtype: Any = torch.float32) -> dict:
    """A peaked row (p ≥ 0.999), a flat one, padding anywhere, a row without target, −inf."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, vocabulary, generator=g)
    ids = torch.rand(rows, vocabulary, generator=g).argsort(1)[:, :k]
    probs = (2 * torch.randn(rows, vocabulary, generator=g)).softmax(1).gather(1, ids)
    labels = torch.randint(vocabulary, (rows,), generator=g)
    labels[0] = ids[0, 0]
    logits[0, ids[0, 0]] = 18.0
    if rows > 4:
        logits[1] = 0.0
        labels[2] = -100
        ids[2, 0] = -1
        ids[3] = -1
        logits[4, int(ids[4, -1])] = -math.inf
        logits[4, labels[4]] = 1.0
    case = {"logits": logits.to(dtype), "ids": ids, "probs": probs, "labels": labels}
    return {name: t.to(DEVICE) for name, t in case.items()}


def truth(case: dict, logits: Tensor | None = None, **options: Any) -> tuple[KDLoss, Tensor]:
    """Losses and gradient in float64 by autograd, of the very numbers the kernel reads."""
    z = (case["logits"] if logits is None else logits).detach().double().requires_grad_()
    tensors = [options.pop(name, None) for name in ("tail_prob", "labels", "row_weight")]
    targets = KernelTargets(case["ids"], case["probs"].double(), *tensors)
    out = KDLoss(*reference_losses(z, targets, loss_settings(**options)))
    return out, torch.autograd.grad(out.loss.sum(), z)[0]


def fused(case: dict, **options: Any) -> tuple[KDLoss, Tensor]:
    z = case["logits"].clone().requires_grad_()
    out = kd_loss(z, case["ids"], case["probs"], impl="triton", **options)
    return out, torch.autograd.grad(out.loss.sum(), z)[0]


def assert_agrees(case: dict, **options: Any) -> tuple[KDLoss, Tensor]:
    """Returns what the kernel gave."""
    out, gradient = fused(case, **options)
    expected, expected_gradient = truth(case, **options)
    for a, b in ((out.ce, expected.ce), (out.kd, expected.kd), (out.loss, expected.loss)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6)
    assert_gradient(gradient, expected_gradient)
    return out, gradient


def assert_gradient(gradient: Tensor, expected: Tensor) -> None:
    """Within an ulp of the stored type, and the float32 noise of entries of size one."""
    ulp = ULP.get(gradient.dtype, 0.0)
    if gradient.dtype == torch.float16:
        ulp_floor = 2.0**-24  # subnormals
    else:
        ulp_floor = 0.0
    scale = expected.abs().max()
    error = (gradient.double() - expected).abs()
    assert (error <= ulp * expected.abs() + ulp_floor + 2e-6 * scale).all(), error.max()


@pytest.mark.covering(2)
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_tail_and_temperature(divergence: str, tail: str, tau: float) -> None:
    case = make(rows=5, vocabulary=333, k=9)
    assert_agrees(
        case, labels=case["labels"], temperature=tau, ce_weight=0.3, kd_weight=0.7, tail=tail,
        divergence=divergence, reduction="sum",
    )  # fmt: skip


@pytest.fixture(params=["streamed", "held", "cluster of 4"])
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape of the kernel takes the rows."""
    kernel_takes(request.param, monkeypatch)


@pytest.mark.usefixtures("shape")
@pytest.mark.parametrize(
    ("tau", "divergence", "dtype"),
    [
        (1.0, "forward_kl", torch.bfloat16),
        (2.0, "reverse_kl", torch.float16),
        (3.0, "jsd", torch.float32),  # exponentials of their own
        (4.0, "skew_kl", torch.float32),
    ],
)
def test_every_shape(tau: float, divergence: str, dtype: torch.dtype) -> None:
    """A peaked row, whose listed ids are taken out, a row of weight 0, a softcap, odd starts."""
    case = make(rows=5, vocabulary=523, k=9, dtype=dtype)
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5], device=DEVICE)
    options: dict[str, Any] = {"labels": case["labels"], "row_weight": weight, "ce_weight": 0.5}
    options |= {"temperature": tau, "divergence": divergence}
    assert_agrees(case, softcap=15.0 if tau == 2.0 else None, **options)


@pytest.mark.usefixtures("shape")
def test_every_shape_takes_heavy_ids_out_exactly() -> None:
    """Twelve listed ids, more than are taken out at a time, each hide what is left by a factor of
    e³; they stand at both edges and in every part of the row, and ties stand beside them.
    """
    z = torch.zeros(3, 509)
    ids = torch.tensor([0, 1, 127, 128, 150, 255, 256, 350, 383, 384, 504, 508]).repeat(3, 1)
    z[:, ids[0]] = torch.arange(12.0) * 3 + 3
    z[1, 2] = 9.0  # not listed, and as likely as one that is
    z[2] += torch.linspace(-80, 0, 509)
    probs = torch.full((3, 12), 0.08)
    case = {"logits": z.to(DEVICE), "ids": ids.to(DEVICE), "probs": probs.to(DEVICE)}
    labels = torch.tensor([508, 2, 5], device=DEVICE)
    assert_agrees(case, labels=labels, ce_weight=0.5, temperature=1.0)
    assert_agrees(case, temperature=2.0, divergence="jsd")


@pytest.mark.usefixtures("shape")
def test_every_shape_writes_a_private_buffer_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    test_linear_head(10**9, 1.0, monkeypatch)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocabulary", "k"),
    [
        (5, 3),  # shorter than the step rows are aligned to
        (127, 127),  # every id listed: no rest
        (1000, 8),  # rows start aligned
        (1023, 1),  # odd: every row starts elsewhere
        (4099, 33),  # odd, and longer than one block
        (4096, 256),  # exactly one block
    ],
)
def test_shapes_and_types(vocabulary: int, k: int, dtype: torch.dtype) -> None:
    case = make(rows=5, vocabulary=vocabulary, k=k, dtype=dtype)
    for tau in (1.0, 4.0):
        assert_agrees(case, labels=case["labels"], temperature=tau, ce_weight=0.5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_that_change_the_program(reduction: str) -> None:
    """No labels, stored tails, weights, softcap and scale, each its own compiled kernel."""
    case = make(rows=6, vocabulary=333, k=9)
    tail = torch.linspace(0.05, 0.9, 6, device=DEVICE)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0], device=DEVICE)
    assert_agrees(case, temperature=3.0, reduction=reduction)
    probs = case["probs"].where(case["ids"] >= 0, 0.0)
    whole = probs * ((1 - tail) / probs.sum(1))[:, None]
    assert_agrees(case | {"probs": whole}, temperature=1.0, tail_prob=tail, reduction=reduction)
    assert_agrees(
        case, labels=case["labels"], ce_weight=1.0, kd_weight=0.0, row_weight=weight,
        reduction=reduction,
    )  # fmt: skip
    for tau in (1.0, 2.0, 3.0):
        assert_agrees(
            case, labels=case["labels"], ce_weight=0.5, temperature=tau, row_weight=weight,
            softcap=5.0, logit_scale=0.7, reduction=reduction,
        )  # fmt: skip


@pytest.mark.parametrize("skew", [1e-4, 0.6])
def test_the_skew_reaches_the_kernel(skew: float) -> None:
    case = make(rows=5, vocabulary=77, k=9)
    assert_agrees(case, divergence="skew_kl", skew=skew, temperature=2.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_rows(divergence: str) -> None:
    """|z| = 1e4, the rest far below what the row's total resolves, nothing possible in the rest."""
    z = torch.full((5, 40), -1e4)
    z[0, 0] = 1e4
    z[1, 5] = 1e4  # the row's mass is on an id that is not listed
    z[2] = -math.inf
    z[2, :2] = 1.0
    z[3, :2] = 30.0
    z[3, 2:] = torch.linspace(-3, 3, 38)
    z[4] = torch.linspace(-50, 50, 40)
    ids = torch.tensor([[0, 1]] * 5)
    probs = torch.tensor([[0.9995, 1e-4]] * 2 + [[0.5, 0.5], [0.6, 0.3], [0.0, 0.2]])
    labels = torch.tensor([0, 0, 1, 7, 39])
    case = {"logits": z.to(DEVICE), "ids": ids.to(DEVICE), "probs": probs.to(DEVICE)}
    # a stored tail: 1 − Σ in float32 would be the larger error
    tail = torch.tensor([4e-4, 4e-4, 0.0, 0.1, 0.8]).to(DEVICE)
    options = {"labels": labels.to(DEVICE), "ce_weight": 0.5, "divergence": divergence}
    options |= {"tail_prob": tail}
    for tau in (1.0, 2.0):
        out, gradient = assert_agrees(case, temperature=tau, reduction="none", **options)
        assert out.loss.isfinite().all()
        assert gradient.isfinite().all()


def test_ignored_rows_may_hold_anything_and_the_callers_logits_stay() -> None:
    case = make(rows=5, vocabulary=77, k=4)
    case["logits"][2] = math.nan
    before = case["logits"].clone()
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], device=DEVICE)
    out, gradient = fused(case, row_weight=weight)
    assert out.loss.isfinite()
    assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))
    assert gradient.isfinite().all()
    torch.testing.assert_close(case["logits"], before, rtol=0, atol=0, equal_nan=True)


def test_an_id_out_of_range_is_loud() -> None:
    """A device is not waited for to raise an error: that row's loss is NaN, and memory is safe."""
    from rekindle.kernels.triton_rows import RowKernel

    case = make(rows=3, vocabulary=50, k=4)
    case["ids"][1, 2] = 50
    targets = KernelTargets(case["ids"], case["probs"], None, None, None)
    kernel = RowKernel(targets, LossSettings(), False)
    kernel.run(case["logits"], torch.empty_like(case["logits"]), slice(0, 3))
    assert kernel.kd.isnan().tolist() == [False, True, False]


def test_rows_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer is virtual: three rows a gibi-element apart touch a few pages of it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    from rekindle.kernels.triton_rows import RowKernel

    rows, vocabulary, stride = 3, 203, 2**30
    case = make(rows=rows, vocabulary=vocabulary, k=5, dtype=torch.float16)
    far = torch.empty(2 * stride + 1024, dtype=torch.float16, device=DEVICE)
    z = far.as_strided((rows, vocabulary), (stride, 1))
    z.copy_(case["logits"])
    targets = KernelTargets(case["ids"], case["probs"], None, case["labels"], None)
    kernel = RowKernel(targets, LossSettings(ce_weight=1.0, reduction="none"), True)
    kernel.run(z, z, slice(0, rows))
    expected, gradient = truth(case, labels=case["labels"], ce_weight=1.0, reduction="none")
    torch.testing.assert_close(kernel.kd.double(), expected.kd, rtol=3e-6, atol=3e-6)
    assert_gradient(z, gradient)


@pytest.mark.covering
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("budget", [1, 2 * 4 * 128, 10**9])
def test_linear_head(budget: int, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows dropped, blocks of any size, a buffer written in place, bias, all three gradients."""
    from rekindle.kernels import blocks

    monkeypatch.setitem(blocks.BLOCK_BYTES, DEVICE, budget)
    case = make(rows=6, vocabulary=101, k=7)
    g = torch.Generator().manual_seed(1)
    shapes = ((6, 8), (101, 8), (101,))
    inputs = [torch.randn(s, generator=g).to(DEVICE) for s in shapes]
    inputs[0][5] = math.nan
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 0.0], device=DEVICE)
    options: dict = {"labels": case["labels"], "ce_weight": 0.5, "temperature": tau}
    options |= {"row_weight": weight}
    x, w, b = (t.clone().requires_grad_() for t in inputs)
    out = linear_kd_loss(x, w, case["ids"], case["probs"], bias=b, impl="triton", **options)
    grads = torch.autograd.grad(out.loss * 1.5, (x, w, b))
    xd, wd, bd = (t.double().requires_grad_() for t in inputs)
    expected = linear_kd_loss(
        xd, wd, case["ids"], case["probs"].double(), bias=bd, impl="torch", **options
    )
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    for a, e in zip(grads, torch.autograd.grad(expected.loss * 1.5, (xd, wd, bd)), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_head_in_sixteen_bits_loses_no_more_than_plain_low_precision(
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((40, 16), (301, 16)))
    case = make(rows=40, vocabulary=301, k=7)
    args = (case["ids"], case["probs"])
    results = {}
    for name, cast in (("triton", dtype), ("plain", dtype), ("truth", torch.float64)):
        a, b = (t.detach().to(cast).requires_grad_() for t in (x, w))
        if name == "triton":
            loss = linear_kd_loss(a, b, *args, impl="triton", temperature=2.0).loss
        else:
            probs = args[1].double() if name == "truth" else args[1]
            targets = KernelTargets(args[0], probs, None, None, None)
            loss = reference_losses(a @ b.t(), targets, LossSettings(temperature=2.0))[0]
        results[name] = [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (a, b)))]
    for ours, plain, exact in zip(*(results[n] for n in ("triton", "plain", "truth")), strict=True):
        assert (ours - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-5 * exact.norm()


def test_nothing_to_do() -> None:
    for rows in (0, 3):
        x = torch.randn(rows, 4, device=DEVICE, requires_grad=True)
        w = torch.randn(7, 4, device=DEVICE, requires_grad=True)
        ids = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
        weight, probs = torch.zeros(rows, device=DEVICE), torch.ones(rows, 1, device=DEVICE)
        for out in (
            linear_kd_loss(x, w, ids, probs, row_weight=weight, impl="triton"),
            kd_loss(x @ w.t(), ids, probs, row_weight=weight, impl="triton"),
        ):
            assert out.loss == 0
            for g in torch.autograd.grad(out.loss, (x, w)):
                assert torch.equal(g, torch.zeros_like(g))


def test_repeats_are_equal_to_the_bit() -> None:
    case = make(rows=5, vocabulary=333, k=9)
    first, again = (
        fused(case, labels=case["labels"], ce_weight=1.0, temperature=2.0) for _ in range(2)
    )
    assert torch.equal(first[0].loss, again[0].loss)
    assert torch.equal(first[1], again[1])


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(rows=2, vocabulary=9, k=2)
    with pytest.raises(ValueError, match="float64"):
        kd_loss(case["logits"].double(), case["ids"], case["probs"], impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on cpu"):
        kd_loss(case["logits"].cpu(), case["ids"].cpu(), case["probs"].cpu(), impl="triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_scaling_by_an_upstream_scalar(dtype: torch.dtype) -> None:
    """More than one block; a factor of 1 leaves memory alone; a view with gaps is scaled too.

    Float64 is computed in float64: the PyTorch path hands its gradients to this kernel on a GPU.
    """
    from rekindle.kernels.triton_rows import scale_unless_one

    g = torch.Generator().manual_seed(0)
    values = torch.randn(5, 1003, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    factors = [torch.tensor(f, device=DEVICE) for f in (1.0, 0.25, 0.3)]
    if dtype != torch.float16:  # the linear head's weight may have fewer bits than its loss
        factors += [torch.tensor(f, dtype=torch.float64, device=DEVICE) for f in (1 + 1e-9, 0.3)]
    for given in (values, values.new_zeros(5, 1100)[:, :1003].copy_(values)):
        for factor in factors:
            scaled = given.clone(memory_format=torch.preserve_format)
            scale_unless_one(scaled, factor)
            assert torch.equal(scaled, values * factor)
