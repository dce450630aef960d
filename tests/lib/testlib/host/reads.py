"""What a host would wait for a device to say, counted on a CPU."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
INDEXED = ("index", "index_put", "index_put_")


def ours() -> bool:
    """Whether the call comes from the loop's side: the kernels look at values on a CPU alone."""
    frame = sys._getframe(1)
    while frame is not None and "/kernels/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is None


class Reads(TorchDispatchMode):
    """Counts them by name; an index of truth values is one, as its length is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, indices = func.overloadpacket.__name__, args[1] if len(args) > 1 else ()
        is_masked = name in INDEXED and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in indices
        )
        if (name in READS or is_masked) and ours():
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def counting_copies(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Count from now on what a CPU does without an operation, by name."""
    counted: Counter[str] = Counter()
    for name in ("tolist", "numpy", "cpu"):
        real = getattr(Tensor, name)

        def counting(tensor: Tensor, *args: Any, real: Any = real, name: str = name, **more: Any):
            counted[name] += ours()
            return real(tensor, *args, **more)

        patch.setattr(Tensor, name, counting)
    return counted
