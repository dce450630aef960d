"""Entropy from hidden states is that of all logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from rekindle.kernels import blocks
from rekindle.kernels.hidden import row_entropy
from testlib.hidden import DEVICE, ROWS, VOCABULARY, Largest, budget, head, transformed


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.3), (5.0, 2.0)])
@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("biased", [True, False])
def test_entropy_is_that_of_all_logits(
    rows: int, softcap: float | None, scale: float, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, b = head(torch.float32)
    monkeypatch.setitem(blocks.BLOCK_BYTES, DEVICE, budget(rows, 3, 4))
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
