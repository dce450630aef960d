"""Choose the implementation that computes a loss, and say why the other cannot."""

import functools
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from rekindle.kernels.call import StudentLogits
from rekindle.kernels.checks import TargetObjects
from rekindle.kernels.encoded import EncodedTargets
from rekindle.kernels.hidden import WholeTargets
from rekindle.kernels.targets import MAX_KEPT, TRITON_INSTALLED

logger = logging.getLogger("rekindle")

IMPLEMENTATIONS = ("auto", "triton", "torch")
AnyTargets = Tensor | TargetObjects


def choose(impl: str, student: StudentLogits, all_targets: Sequence[AnyTargets]) -> str:
    """Return the implementation to run, "triton" or "torch"; log once what "auto" takes,
    and why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "torch":
        return "torch"
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # in tests
    is_whole = isinstance(all_targets[0], WholeTargets)
    device, dtype = student.inputs.device, student.fused_dtype
    obstacle = _obstacle(device, dtype, all_targets, interpreted)
    if impl == "triton" and obstacle and not is_whole:
        raise ValueError(f"impl is 'triton', but {obstacle}; use 'auto' or 'torch'")
    if (impl == "auto" or is_whole) and not torch.compiler.is_compiling():
        chosen = f"torch ({obstacle})" if obstacle else f"triton ({device.type}, {dtype})"
        _log_once(f"distillation loss: impl {impl} takes {chosen}")
    return "torch" if obstacle else "triton"


def _obstacle(
    device: torch.device, dtype: torch.dtype, all_targets: Sequence[AnyTargets], interpreted: bool
) -> str | None:
    """Return why the Triton kernels cannot run here; None if they can."""
    if isinstance(all_targets[0], WholeTargets):
        return "targets of the whole vocabulary have no Triton kernel"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type}"
    if dtype == torch.float64:
        return "the kernels compute in float32 and the student is float64"
    all_ids = (t if isinstance(t, Tensor | WholeTargets) else t.ids for t in all_targets)
    total_ids = sum(ids.shape[-1] for ids in all_ids if isinstance(ids, Tensor))
    if total_ids > MAX_KEPT:
        return f"a row holds {total_ids} ids and the kernels take at most {MAX_KEPT}"
    targets = all_targets[0]  # several teachers' targets are decoded first
    if (
        len(all_targets) == 1
        and isinstance(targets, EncodedTargets)
        and targets.values.dtype != torch.uint8
    ):
        return "the kernels decode values of eight bits"
    if not TRITON_INSTALLED:
        return "the package triton is not installed"
    return None


@functools.cache
def _log_once(line: str) -> None:
    logger.info(line)
