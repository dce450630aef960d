"""Which number format a run computes in: chosen once, from the configuration and the device."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

log = logging.getLogger("rekindle")

# What computes in a format on a CPU, as torch.cpu.get_capabilities names it: of x86, and of ARM.
_INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"),
}
_PUT = "It goes on as asked; for speed put {}"


def chosen_precision(precision: str, device_type: str) -> str:
    """Return what ``auto`` means on a device: bf16 on a GPU that has it; any other as it is."""
    if precision != "auto":
        return precision
    return "bf16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def told_of_slow(asked: Mapping[str, str], device_type: str, instead: str = "") -> str | None:
    """What is said, before dear work, of precisions for which this CPU has no instructions; None
    where there are none, or the work is not the CPU's.

    ``asked``: each precision by how it is written, with {} in its place ("train.precision: {}").
    ``instead``: what to do, where fp32 in the same place is no way.

    torch then computes each product in a format that it converts to and fro. Measured: MiniLM-L6,
    32 x 16 tokens, forward and backward: 0.57 s in fp32, 8.99 s in bf16 autocast (AMD EPYC with
    AVX2 alone, torch 2.13.0, 2026-11-28).
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
    """Whether bf16 is an advice where memory does not suffice: not where it is used (``precision``,
    not auto, is what is), nor on a CPU that would take many times as long in it.
    """
    return precision == "fp32" and told_of_slow({"{}": "bf16"}, device_type) is None


def tell_slow(asked: Mapping[str, str], device_type: str, instead: str = "") -> None:
    """Say ``told_of_slow`` in the log, where there is something to say."""
    if (told := told_of_slow(asked, device_type, instead)) is not None:
        log.warning("%s", told)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16 autocast where ``precision`` asks for it."""
    if chosen_precision(precision, device.type) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
