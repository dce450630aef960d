"""Count what a call of the losses would launch on a GPU, on a CPU and without running the kernels.

Every Triton kernel is replaced by a counter, and the operations of torch run on the CPU and are
counted where they would be kernels. Losses and gradients are then undefined.
"""

import collections
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]  # one call, forward and backward

# operations of torch that launch nothing: they take memory, or view it differently
NO_KERNEL = (
    "promote_types",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "set_",
    "_local_scalar_dense",
)


@contextmanager
def counted_launches(counts: collections.Counter[str]) -> Iterator[None]:
    """Let Triton's kernels only count their launches; impl triton is taken on a CPU, and the values
    of tensors are looked at no more than on a GPU.
    """
    checks = importlib.import_module("rekindle.kernels.checks")
    looked, checks._raise_or_find_full = checks._raise_or_find_full, lambda *_: None
    ops = importlib.import_module("rekindle.kernels.ops")
    module = importlib.import_module("rekindle.kernels.triton_rows")
    scaled, ops._scale_ = (
        ops._scale_,
        lambda gradients, factor: [  # as on a GPU
            module.scale_unless_one(each, factor) for each in gradients
        ],
    )
    interpreted = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    kernels = {
        name: value
        for name, value in vars(module).items()
        if hasattr(value, "arg_names") or type(value).__name__ == "InterpretedFunction"
    }
    for name in kernels:
        setattr(module, name, _Counter(name, counts))
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
        checks._raise_or_find_full, ops._scale_ = looked, scaled
        del os.environ["TRITON_INTERPRET"]
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


class _Counter:
    """Replaces a kernel."""

    def __init__(self, name: str, counts: collections.Counter[str]):
        self.name, self.counts = name, counts

    def __getitem__(self, grid: object) -> "_Counter":
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        self.counts[self.name] += 1


class _Operations(TorchDispatchMode):
    """Counts the operations of torch that would be kernels on a GPU."""

    def __init__(self, counts: collections.Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in (*NO_KERNEL, "detach"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def launches(step: Step, counts: collections.Counter[str]) -> collections.Counter[str]:
    """Return the launches of one call, within `counted_launches` of the same counts."""
    step()
    counts.clear()
    with _Operations(counts):
        step()
    return collections.Counter(counts)
