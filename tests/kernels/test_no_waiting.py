"""A loss on a device makes the host wait for nothing: told by tensors that have no values.

Those of the device "meta" refuse `item`, `nonzero` and whatever else needs a value.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle.kernels import blockwise, ops
from rekindle.kernels.call import Call, Computation, StudentLogits
from rekindle.kernels.closed_form import Coefficients
from rekindle.kernels.hidden import WholeLogits
from rekindle.kernels.targets import KernelTargets, LossSettings

N, V, H, K = 6, 11, 4, 3


def a_call(kind: str, impl: str, device: str = "cpu") -> Call:
    """Rows of weight 0 and 1, labels of which some are ignored; the first row holds NaN."""
    whole, head = kind == "whole", kind != "logits"
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    hidden, matrix, bias, states = normal(N, H), normal(V, H), normal(V), normal(N, V)
    ids = torch.arange(K).repeat(N, 1)
    labels, weight = torch.arange(N), torch.tensor([0.0, 1, 2, 0, 1, 1])
    labels[2] = -100
    for given in (hidden, states):
        given[0] = torch.nan
    student = (hidden, matrix, bias) if head else (states,)
    targets = ids[:, :0] if whole else ids, torch.full((N, K), 0.3), None, labels, weight
    return Call(
        StudentLogits(*(t.to(device) for t in student)),
        KernelTargets(*(t if t is None else t.to(device) for t in targets)),
        WholeLogits(states.to(device) if whole else None),
        LossSettings(ce_weight=0.5, temperature=2.0),
        Computation(impl, torch.float32 if impl == "triton" else None, (True, head, head)),
    )


@pytest.mark.parametrize(
    ("kind", "impl"),
    [(k, "torch") for k in ("sparse", "whole", "logits")]
    + [(k, "triton") for k in ("sparse", "logits")],
)
def test_nothing_is_asked_of_a_device(
    kind: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if impl == "triton":
        triton_rows = pytest.importorskip("rekindle.kernels.triton_rows")
        monkeypatch.setattr(triton_rows, "_launch", lambda *arguments, **constants: None)
    call = a_call(kind, impl, "meta")
    found, gradients = ops._compute(call, None)
    assert {t.device.type for t in (*found, *gradients) if t is not None} == {"meta"}
    for value in (call.targets.active().nonzero, call.targets.active().all().item):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # they do refuse
            value()


@pytest.mark.parametrize("kind", ["sparse", "whole", "logits"])
def test_rows_that_are_kept_at_weight_nothing_add_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does with them is what a CPU does, which leaves them out; NaN in them or not."""
    call = a_call(kind, "torch")
    assert call.targets.weight is not None
    factors = Coefficients(call.targets.weight, call.targets.weight / 2)
    results: list[list[Any]] = []
    for drops in (True, False):
        monkeypatch.setattr(blockwise, "_drops_rows", lambda _, drops=drops: drops)
        losses, gradients = blockwise.blockwise(call, factors)
        results.append([*losses, *(g for g in gradients if g is not None)])
    for dropped, kept in zip(*results, strict=True):
        torch.testing.assert_close(dropped, kept, rtol=1e-6, atol=1e-7)
