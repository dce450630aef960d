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
_PUT = "The work continues as asked; for speed set {}"


def chosen_precision(precision: str, device_type: str) -> str:
    """Return what ``auto`` means on a device: bf16 on a GPU that has it, else fp32; others
    unchanged.
    """
    if precision != "auto":
        return precision
    return "bf16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def told_of_slow(asked: Mapping[str, str], device_type: str, instead: str = "") -> str | None:
    """Return a warning, before expensive work, about precisions for which this CPU has no
    instructions; None if there are none, or the work is not on the CPU.

    ``asked``: each precision by its notation, with {} in its place ("train.precision: {}").
    ``instead``: the advice, if fp32 in the same place is not possible.

    torch then converts each product back and forth. Measured: MiniLM-L6, 32 x 16 tokens, forward
    and backward: 0.57 s in fp32, 8.99 s in bf16 autocast (AMD EPYC with AVX2 only, torch 2.13.0,
    2026-11-28).
    """
    if device_type != "cpu":
        return None
    has = torch.cpu.get_capabilities()
    slow = {
        written: precision
        for written, precision in asked.items()
        if precision in _INSTRUCTIONS and not any(has.get(one) for one in _INSTRUCTIONS[precision])
    }
    if not slow:
        return None
    named = ", ".join(written.format(precision) for written, precision in slow.items())
    lacks = "; ".join(
        f"{precision}: none of {', '.join(_INSTRUCTIONS[precision])}"
        for precision in dict.fromkeys(slow.values())
    )
    put = instead or _PUT.format(", ".join(written.format("fp32") for written in slow))
    return (
        f"{named}: this CPU has no instructions for that ({lacks}), and takes up to 16 times as "
        f"long as in fp32. {put}"
    )


def bf16_saves(precision: str, device_type: str) -> bool:
    """Return whether bf16 is worth suggesting to save memory: not if it is in use (``precision`` is
    the one in use, never auto), nor on a CPU that would be many times slower in it.
    """
    return precision == "fp32" and told_of_slow({"{}": "bf16"}, device_type) is None


def tell_slow(asked: Mapping[str, str], device_type: str, instead: str = "") -> None:
    """Log the warning of ``told_of_slow``, if there is one."""
    if (told := told_of_slow(asked, device_type, instead)) is not None:
        log.warning("%s", told)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return bf16 autocast if ``precision`` asks for it, else a null context."""
    if chosen_precision(precision, device.type) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
