"""Choose the number format a run computes in, once, from the configuration and the device."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

log = logging.getLogger("rekindle")

# CPU instructions for each format, named as in torch.cpu.get_capabilities: of x86 and of ARM.
_INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"),
}
_ADVICE = "The work continues as asked; for speed set {}"


def chosen_precision(precision: str, device_type: str) -> str:
    """Return what ``auto`` means on a device: bf16 on a GPU that has it, else fp32; others
    unchanged.
    """
    if precision != "auto":
        return precision
    return "bf16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def describe_slow_precision(
    requested: Mapping[str, str], device_type: str, advice_instead: str = ""
) -> str | None:
    """Return a warning, before expensive work, about precisions for which this CPU has no
    instructions; None if there are none, or the work is not on the CPU.

    ``requested``: each precision by its notation, with {} in its place ("train.precision: {}").
    ``advice_instead``: the advice, if fp32 in the same place is not possible.

    torch then converts each product back and forth. Measured: MiniLM-L6, 32 x 16 tokens, forward
    and backward: 0.57 s in fp32, 8.99 s in bf16 autocast (AMD EPYC with AVX2 only, torch 2.13.0,
    2026-11-28).
    """
    if device_type != "cpu":
        return None
    capabilities = torch.cpu.get_capabilities()
    slow = {
        notation: precision
        for notation, precision in requested.items()
        if precision in _INSTRUCTIONS
        and not any(capabilities.get(one) for one in _INSTRUCTIONS[precision])
    }
    if not slow:
        return None
    settings = ", ".join(notation.format(precision) for notation, precision in slow.items())
    missing = "; ".join(
        f"{precision}: none of {', '.join(_INSTRUCTIONS[precision])}"
        for precision in dict.fromkeys(slow.values())
    )
    advice = advice_instead or _ADVICE.format(
        ", ".join(notation.format("fp32") for notation in slow)
    )
    return (
        f"{settings}: this CPU has no instructions for that ({missing}), and takes up to 16 times "
        f"as long as in fp32. {advice}"
    )


def bf16_saves(precision: str, device_type: str) -> bool:
    """Return whether bf16 is worth suggesting to save memory: not if it is in use (``precision`` is
    the one in use, never auto), nor on a CPU that would be many times slower in it.
    """
    return precision == "fp32" and describe_slow_precision({"{}": "bf16"}, device_type) is None


def warn_of_slow_precision(
    requested: Mapping[str, str], device_type: str, advice_instead: str = ""
) -> None:
    """Log the warning of ``describe_slow_precision``, if there is one."""
    if (warning := describe_slow_precision(requested, device_type, advice_instead)) is not None:
        log.warning("%s", warning)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return bf16 autocast if ``precision`` asks for it, else a null context."""
    if chosen_precision(precision, device.type) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
