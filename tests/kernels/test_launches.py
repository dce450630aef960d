"""How many kernels a call would launch on a GPU: a loss is the host's time before it is the GPU's.

Every launch and every operation beside it costs the host some 10 µs: a check that reads a tensor
once more shows here. `tests/benchmarks/host_cost.py` measures the time by the same means.
"""

import collections
from typing import Any

import pytest
import torch

from rekindle.kernels.encoded import decode
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from testlib.kernels.encoded_rows import encoded_rows
from testlib.kernels.launches import counted_launches, launches

pytest.importorskip("triton")

ROWS, VOCABULARY, HIDDEN = 6, 64, 8  # rows of 64 ids need no padding
OURS = {"_count_kernel": 1, "row_kernel": 1, "_sum_kernel": 1}


def forms_of_targets() -> dict[str, dict[str, Any]]:
    encoded = encoded_rows(torch.arange(5).repeat(ROWS, 1), 2.0)
    decoded = decode(encoded, 2.0)
    tensors = dict(zip(("target_ids", "target_probs", "tail_prob"), decoded, strict=True))
    given: dict[str, Any] = {"encoded": encoded, "decoded": decoded}
    return {"tensors": tensors} | {n: {"target_ids": one} for n, one in given.items()}


@pytest.mark.parametrize("form", ["tensors", "decoded", "encoded"])
@pytest.mark.parametrize("head", [False, True])
def test_a_call_is_a_few_launches(form: str, head: bool) -> None:
    """From logits the kernels alone; a head adds its three products, and scales two gradients."""
    options = {**forms_of_targets()[form], "temperature": 2.0, "ce_weight": 0.5, "impl": "triton"}
    options["labels"] = torch.arange(ROWS)
    w = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    x = torch.randn(ROWS, HIDDEN if head else VOCABULARY, requires_grad=True)
    seed = torch.ones(())

    def step() -> object:
        loss = linear_kd_loss(x, w, **options).loss if head else kd_loss(x, **options).loss
        return torch.autograd.grad(loss, (x, w) if head else (x,), seed)

    counts = collections.Counter[str]()
    with counted_launches(counts):
        made = launches(step, counts)
    extra = {"mm": 3, "_scale_kernel": 2} if head else {"_scale_kernel": 1}
    assert made == OURS | extra
