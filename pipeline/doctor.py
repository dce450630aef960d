"""What this machine has: versions, devices, and which implementation of the loss runs."""

import torch

from rekindle.data.cores import cores
from rekindle.kernels.choice import TRITON_INSTALLED
from rekindle.train.model.files import package_versions, place


def diagnose() -> dict[str, str]:
    """Facts by name, in the order they are shown."""
    facts = package_versions()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["devices"] = ", ".join(names)
    else:
        facts["devices"] = f"CPU, {cores()} cores, {torch.get_num_threads()} torch threads"
    facts["precision"] = f"auto is {place('auto').precision} here"
    facts["attention"] = "sdpa (transformers' default)"
    facts["kd loss"] = kernel_choice()
    return facts


def kernel_choice() -> str:
    """Which implementation ``impl="auto"`` takes here, and why."""
    if not torch.cuda.is_available():
        return "torch, in bounded blocks: there is no CUDA device"
    if not TRITON_INSTALLED:
        return "torch, in bounded blocks: the package triton is not installed"
    return "triton; for targets of the whole vocabulary torch, in bounded blocks"
