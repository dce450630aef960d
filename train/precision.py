"""Which number format a run computes in: chosen once, from the configuration and the device."""

from contextlib import AbstractContextManager, nullcontext

import torch


def chosen_precision(precision: str, device_type: str) -> str:
    """Return what ``auto`` means on a device: bf16 on a GPU that has it; any other as it is."""
    if precision != "auto":
        return precision
    return "bf16" if device_type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16 autocast where ``precision`` asks for it."""
    if chosen_precision(precision, device.type) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
