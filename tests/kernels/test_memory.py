"""What lay in memory before a call does not reach its results: NaN lies in all of it here."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle.kernels import blocks, blockwise
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from testlib.kernels.memory import nan_in_new_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# one more than a multiple of 32: on AMX, products in bfloat16 read on to the next one
VOCABULARY, HIDDEN, ROWS = 97, 8, 6


@pytest.fixture(autouse=True)
def _nan() -> Iterator[None]:
    with nan_in_new_memory():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def targets() -> tuple[Tensor, Tensor]:
    probs, ids = draw(ROWS, VOCABULARY, seed=1).softmax(1).topk(5)
    return ids, probs


def span(matrix: Tensor) -> Tensor:
    """All memory from a matrix' first entry to its last, what lies between its rows too."""
    length = 1 + sum((n - 1) * step for n, step in zip(matrix.shape, matrix.stride(), strict=True))
    return matrix.as_strided((length,), (1,))


def test_new_memory_holds_nan() -> None:
    like = torch.zeros(3, device=DEVICE)
    for fresh in (torch.empty(3, device=DEVICE), torch.empty_like(like), like.new_empty(3)):
        assert fresh.isnan().all()
    assert torch.empty_strided((3, 2), (5, 1), device=DEVICE).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_overwrites_what_it_is_given(dtype: torch.dtype) -> None:
    a, b = draw(5, 97).to(dtype), draw(97, 7).to(dtype)
    padded = blocks.rows_apart(5, 97, 128, dtype, a.device)
    padded.copy_(a)
    for factor in (a, padded, a.t().contiguous().t()):
        for out in (torch.empty_like(a @ b), torch.empty(5, 64, dtype=dtype, device=DEVICE)[:, :7]):
            assert out.isnan().all()
            blocks.product_(out, factor, b)
            torch.testing.assert_close(out, a @ b)


def test_only_what_lies_between_rows_is_zero() -> None:
    rows = blocks.rows_apart(3, 5, 8, torch.float32, torch.device(DEVICE))
    assert (rows.shape, rows.stride()) == ((3, 5), (8, 1))
    assert rows.isnan().all()
    assert span(rows).nansum() == 0
    assert span(rows).isnan().sum() == 15
    whole = blocks.rows_apart(3, 5, 5, rows.dtype, rows.device)
    assert whole.is_contiguous()
    assert whole.isnan().all()


@pytest.mark.covering
@pytest.mark.parametrize("budget", [1, 10**9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_heads_products_read_nothing_that_nobody_wrote(
    impl: str, dtype: torch.dtype, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even between the rows of their factors: whether that reaches a result is the CPU's."""
    read = 0

    def watch(name: str, factors: slice) -> None:
        product = getattr(torch, name)

        def watched(*arguments: Tensor, **options: Any) -> Tensor:
            nonlocal read
            for factor in arguments[factors]:
                assert span(factor).isfinite().all(), name
                read += 1
            return product(*arguments, **options)

        monkeypatch.setattr(torch, name, watched)

    monkeypatch.setitem(blocks.BLOCK_BYTES, DEVICE, budget)
    watch("mm", slice(0, 2))
    watch("addmm", slice(-2, None))
    x, w = (draw(n, HIDDEN, seed=n).to(dtype).requires_grad_() for n in (ROWS, VOCABULARY))
    for bias in (None, draw(VOCABULARY).to(dtype)):
        loss = linear_kd_loss(x, w, *targets(), bias=bias, impl=impl).loss
        for gradient in (loss, *torch.autograd.grad(loss, (x, w))):
            assert gradient.isfinite().all()
    assert read >= 8


@pytest.mark.parametrize(("vocabulary", "dtype", "ids"), [
    (96, torch.bfloat16, 96), (97, torch.bfloat16, 128), (100, torch.bfloat16, 128),
    (100, torch.float32, 100), (98, torch.float32, 128),
])  # fmt: skip
def test_no_product_of_the_row_kernels_head_has_rows_that_end_within_16_bytes(
    vocabulary: int, dtype: torch.dtype, ids: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the ids that are added for it change no loss and no gradient."""
    shapes = []
    product = blocks.product_

    def noted(total: Tensor, a: Tensor, b: Tensor, plus: bool = False) -> None:
        shapes.append((*total.shape, a.shape[1]))
        product(total, a, b, plus)

    monkeypatch.setattr(blockwise, "product_", noted)
    x, w = (draw(n, HIDDEN, seed=n).to(dtype).requires_grad_() for n in (ROWS, vocabulary))
    kept, probs = targets()
    bias = draw(vocabulary)
    results = []
    for impl in ("triton", "torch"):
        loss = linear_kd_loss(x, w, kept % vocabulary, probs, bias=bias, impl=impl).loss
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    assert shapes[:3] == [(ROWS, ids, HIDDEN), (ROWS, HIDDEN, ids), (ids, HIDDEN, ROWS)]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, torchs in zip(*results, strict=True):
        assert ours.shape == torchs.shape
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)


WHOLE, HALF = 10**9, 3 * 128 * 2  # bytes of one block, and of three rows padded to 128 ids


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize(
    ("product", "weight", "budget", "sums", "is_final"),
    [
        (torch.bfloat16, torch.bfloat16, WHOLE, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, WHOLE, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, HALF, torch.float32, False),  # rounded after the last
        (torch.bfloat16, torch.float32, HALF, torch.float32, True),
        (torch.float16, torch.float16, WHOLE, torch.float32, False),  # lifted
    ],
)
def test_a_single_block_writes_the_weights_gradient_as_it_is_handed_over(
    product: torch.dtype,
    weight: torch.dtype,
    budget: int,
    sums: torch.dtype,
    is_final: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the weight's type, without a float32 copy of [V,H]. Of several blocks the first overwrites
    the sum. Autocast may round the products.
    """
    written = []

    def noted(total: Tensor, a: Tensor, b: Tensor, plus: bool = False) -> None:
        if total.shape == (vocabulary, HIDDEN):
            written.append((total.dtype, plus, total.data_ptr()))
        blocks.product_(total, a, b, plus)

    vocabulary = 96
    monkeypatch.setitem(blocks.BLOCK_BYTES, DEVICE, budget)
    monkeypatch.setattr(blockwise, "product_", noted)
    x, w = (draw(n, HIDDEN, seed=n).to(weight).requires_grad_() for n in (ROWS, vocabulary))
    ids, probs = targets()
    with torch.autocast(DEVICE, product, enabled=weight != product):
        loss = linear_kd_loss(x, w, ids % vocabulary, probs, impl="triton").loss
    (gradient,) = torch.autograd.grad(loss, w)
    assert [each[:2] for each in written] == [(sums, False), (sums, True)][: 1 + (budget == HALF)]
    assert gradient.dtype == weight
    assert (gradient.data_ptr() == written[-1][2]) == is_final


def test_a_gpus_blocks_follow_all_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth, at least 2 GiB, whatever others leave free: sums must not depend on them."""

    def never(*_: object) -> None:
        raise AssertionError("free memory was asked for")

    monkeypatch.setattr(torch.cuda, "mem_get_info", never)
    monkeypatch.setattr(torch.cuda, "memory_allocated", never)
    monkeypatch.setattr(blocks, "_gpu_budget", blocks._gpu_budget.__wrapped__)  # without its cache
    row = 2**21  # bytes
    for total, rows in ((80 * 2**30, 5 * 2**30 // row), (16 * 2**30, 2 * 2**30 // row)):
        properties = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        cut = blocks.row_blocks(5120, row // 2, 2, torch.device("cuda"))
        assert [block.stop - block.start for block in cut] == [rows] * (5120 // rows)


@pytest.mark.covering
@pytest.mark.parametrize("stride", [VOCABULARY, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_has_nothing_unwritten_between_its_rows(
    impl: str, dtype: torch.dtype, stride: int
) -> None:
    """What multiplies it next is the caller's graph."""
    z = torch.zeros(ROWS, stride, dtype=dtype, device=DEVICE)[:, :VOCABULARY]
    z.copy_(draw(ROWS, VOCABULARY))
    weight = torch.ones(ROWS, device=DEVICE)
    weight[2] = 0.0
    z.requires_grad_()
    loss = kd_loss(z, *targets(), row_weight=weight, impl=impl).loss
    (gradient,) = torch.autograd.grad(loss, z)
    assert span(gradient).isfinite().all()
