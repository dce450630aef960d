"""The registered operators: schema and fakes, autograd, torch.compile, autocast, accumulation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from rekindle.kernels import blockwise, ops
from rekindle.kernels.hidden import DenseTargets, HiddenTargets, WholeLogits
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.kernels.targets import DecodedTargets, KernelTargets, LossSettings
from testlib.kernels.encoded_rows import encoded_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(rows: int = 5, vocabulary: int = 37, hidden: int = 8) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    case = {
        "hidden": torch.randn(rows, hidden, generator=g),
        "weight": torch.randn(vocabulary, hidden, generator=g),
        "bias": torch.randn(vocabulary, generator=g),
        "ids": torch.rand(rows, vocabulary, generator=g).argsort(1)[:, :6],
        "probs": torch.rand(rows, 6, generator=g) / 6,
        "labels": torch.randint(vocabulary, (rows,), generator=g),
        "row_weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])[:rows],
    }
    return {name: t.to(DEVICE) for name, t in case.items()}


def call(case: dict, student: ops.StudentLogits, impl: str, reduction: str) -> list[object]:
    settings = LossSettings(ce_weight=0.5, temperature=2.0, reduction=reduction)
    targets = KernelTargets(case["ids"], case["probs"], None, case["labels"], case["row_weight"])
    computation = ops.Computation(impl, torch.float32, [t is not None for t in student])
    return ops.Call(student, targets, WholeLogits(), settings, computation).flat()


@pytest.mark.covering
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(impl: str, reduction: str) -> None:
    """Schemas, fakes, autograd registration and ahead-of-time tracing with dynamic shapes."""
    case = make()
    head = ops.StudentLogits(*(case[n] for n in ("hidden", "weight", "bias")))
    for student in (head, ops.StudentLogits(case["hidden"] @ case["weight"].t())):
        leaves = [None if t is None else t.clone().requires_grad_() for t in student]
        arguments = call(case, ops.StudentLogits._make(leaves), impl, reduction)
        torch.library.opcheck(ops._kd_loss, arguments)
        if reduction == "none":
            upstream = torch.rand(5, device=DEVICE)
            arguments = call(case, student, impl, reduction)
            torch.library.opcheck(ops._kd_loss_backward, (upstream, *arguments))


def gradients(case: dict, function: Any, factor: float = 1.0) -> list[Tensor]:
    x, w, b = (case[n].clone().requires_grad_() for n in ("hidden", "weight", "bias"))
    loss = function(x, w, b) * factor
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (x, w, b))]


@pytest.mark.covering
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(impl: str, reduction: str) -> None:
    case = make()
    options = {"labels": case["labels"], "ce_weight": 0.5, "temperature": 2.0, "impl": impl}
    options |= {"reduction": reduction, "row_weight": case["row_weight"]}

    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kd_loss(x.tanh(), w, case["ids"], case["probs"], bias=b, **options).loss

    def logits(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = torch.nn.functional.linear(x, w, b)
        return kd_loss(z, case["ids"], case["probs"], **options).loss

    for function in (linear, logits):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for factor in (1.0, 0.25):
            torch.testing.assert_close(
                gradients(case, compiled, factor), gradients(case, function, factor)
            )


@pytest.mark.slow
def test_compiles_with_inductor(impl: str) -> None:
    case = make()

    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kd_loss(x.tanh(), w, case["ids"], case["probs"], bias=b, impl=impl).loss

    compiled = torch.compile(linear, fullgraph=True)
    torch.testing.assert_close(gradients(case, compiled), gradients(case, linear))


def test_numbers_that_change_and_targets_of_a_cache_compile_as_one_graph(impl: str) -> None:
    """As of a schedule of weights; the compiler makes a number that changes a symbol."""
    case = make()
    targets = encoded_rows(case["ids"], 2.0)

    def linear(x: Tensor, w: Tensor, number: float) -> Tensor:
        options = {"kd_weight": number, "logit_scale": 1 + number, "temperature": 2.0}
        return linear_kd_loss(x, w, targets, impl=impl, **options).loss

    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for number in (0.5, 0.25, 0.75):
        given = case["hidden"], case["weight"], number
        torch.testing.assert_close(compiled(*given), linear(*given))


def targets_of(kind: str, rows: int, vocabulary: int) -> Any:
    probs, ids = torch.rand(rows, vocabulary).softmax(1).topk(3)
    mixture = DecodedTargets(ids, probs, 1 - probs.sum(1))
    return {
        "decoded": mixture,
        "three teachers": [mixture] * 3,
        "encoded": encoded_rows(ids, 1.0),
        "dense": DenseTargets(torch.rand(rows, vocabulary).log_softmax(1)),
        "hidden": HiddenTargets(torch.randn(rows, 6), None, torch.ones(vocabulary, 6)),
    }[kind]


@pytest.mark.parametrize("kind", ["decoded", "three teachers", "encoded", "dense", "hidden"])
def test_any_number_of_rows_is_one_compilation(kind: str) -> None:
    """A step of masked LM has another number of rows each time."""
    counter, w = CompileCounter(), torch.randn(50, 4)

    def loss(x: Tensor, labels: Tensor, targets: Any) -> Tensor:
        return linear_kd_loss(x, w, targets, labels=labels, ce_weight=0.5, impl="torch").loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for rows in (7, 9, 8):  # no other size of the call is one of these
        given = torch.randn(rows, 4), torch.randint(50, (rows,)), targets_of(kind, rows, 50)
        torch.testing.assert_close(compiled(*given), loss(*given))
    assert counter.frame_count == 1


def test_auto_compiles_too() -> None:
    case = make()

    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kd_loss(x, w, case["ids"], case["probs"], bias=b).loss

    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(case, compiled), gradients(case, linear))


def test_autocast_keeps_float32_gradients_of_float32_weights(impl: str) -> None:
    """Triton's products are in bfloat16, PyTorch's in float32; dW is rounded in neither."""
    case = make()

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_kd_loss(x, w, case["ids"], case["probs"], bias=b, impl=impl).loss

    exact = gradients(case, loss)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        mixed = gradients(case, loss)
    for a, b in zip(mixed, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= (0.02 if impl == "triton" else 1e-6) * b.norm()
    if impl == "triton":
        assert (mixed[2] != mixed[2].to(torch.bfloat16).float()).any()


def test_accumulation_over_micro_batches_is_the_whole_batch(impl: str) -> None:
    case = make(rows=4)
    w = case["weight"].clone().requires_grad_()
    for rows in (slice(0, 2), slice(2, 4)):
        part = (case[n][rows] for n in ("ids", "probs"))
        (linear_kd_loss(case["hidden"][rows], w, *part, impl=impl).loss / 2).backward()
    whole = case["weight"].clone().requires_grad_()
    linear_kd_loss(case["hidden"], whole, case["ids"], case["probs"], impl=impl).loss.backward()
    torch.testing.assert_close(w.grad, whole.grad)


def test_walking_a_graph_twice_does_not_corrupt(impl: str) -> None:
    case = make()
    z = (case["hidden"] @ case["weight"].t()).requires_grad_()
    w = case["weight"].clone().requires_grad_()
    targets = (case["ids"], case["probs"])
    for leaf, loss in (
        (z, kd_loss(z, *targets, impl=impl).loss),
        (w, linear_kd_loss(case["hidden"], w, *targets, impl=impl).loss),
    ):
        loss.backward(retain_graph=True)
        once = leaf.grad.clone()
        (3 * loss).backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(leaf.grad, 5 * once)


def test_logits_of_any_layout(impl: str) -> None:
    """Padded rows, columns of a larger matrix, a transpose."""
    case = make()
    dense = case["hidden"] @ case["weight"].t()
    padded = torch.zeros(5, 48, device=DEVICE)[:, :37].copy_(dense)
    shifted = torch.zeros(5, 90, device=DEVICE)[:, 3:40].copy_(dense)
    transposed = dense.t().contiguous().t()
    options = {"labels": case["labels"], "ce_weight": 1.0, "impl": impl}
    results = []
    for z in (dense, padded, shifted, transposed):
        z = z.detach().requires_grad_()
        loss = kd_loss(z, case["ids"], case["probs"], **options).loss
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.covering
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", ["transpose", "last position", "no rows"])
def test_the_gradient_of_a_single_row_of_any_stride(impl: str, layout: str, compiled: bool) -> None:
    """The stride of one row, or none, says nothing, and PyTorch leaves it at anything."""
    column = torch.randn(37, 0 if layout == "no rows" else 1, device=DEVICE)
    whole = torch.randn(1, 9, 37, device=DEVICE)
    z = whole[:, -1] if layout == "last position" else column.t()
    case = make(rows=len(z))

    def loss(logits: Tensor) -> Tensor:
        found = kd_loss(logits, case["ids"], case["probs"], reduction="sum", impl=impl)
        return found.loss

    def gradient(logits: Tensor, function: Any) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    torch.compiler.reset()
    chosen = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    found = gradient(z, chosen)
    assert found.shape == z.shape
    torch.testing.assert_close(
        found, gradient(z.clone(memory_format=torch.contiguous_format), loss)
    )


def test_a_head_without_an_output_embedding_is_refused(impl: str) -> None:
    case = make()
    with pytest.raises(ValueError, match="weight is None"):
        linear_kd_loss(case["hidden"], None, case["ids"], case["probs"], impl=impl)  # type: ignore[arg-type]


@pytest.mark.usefixtures("triton_runs")
def test_a_gradient_is_summed_in_float32_where_products_are_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of float64 weights under autocast: a GPU adds sixteen-bit products up in no other."""
    case, totals = make(), []
    original = blockwise.product_

    def spied(total: Tensor, a: Tensor, b: Tensor, plus: bool = False) -> None:
        totals.append((total.dtype, a.dtype))
        original(total, a, b, plus)

    monkeypatch.setattr(blockwise, "product_", spied)
    x, w = (case[n].double().requires_grad_() for n in ("hidden", "weight"))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        linear_kd_loss(x, w, case["ids"], case["probs"], impl="triton").loss.backward()
    assert (torch.float32, torch.bfloat16) in totals
    assert not [total for total, _ in totals if total == torch.float64]
    assert w.grad.dtype == torch.float64


@pytest.mark.gpu
def test_no_waiting_for_the_device() -> None:
    if DEVICE == "cpu":
        pytest.skip("needs a CUDA device")
    case = make()
    x, w = (case[n].clone().requires_grad_() for n in ("hidden", "weight"))
    options = {"labels": case["labels"], "ce_weight": 0.5}
    linear_kd_loss(x, w, case["ids"], case["probs"], **options).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_kd_loss(x, w, case["ids"], case["probs"], **options).loss.backward()
        kd_loss(x @ w.t(), case["ids"], case["probs"], **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
