"""Report what this machine has (versions, devices, the loss implementation), and whether a run will
find what it needs.
"""

from pathlib import Path

import torch

from rekindle.data.cores import cores
from rekindle.data.storage.client import is_remote
from rekindle.kernels.choice import TRITON_INSTALLED
from rekindle.pipeline.checks.machine import (
    check_disk,
    check_locks,
    check_memory,
    check_models,
    check_step,
)
from rekindle.pipeline.config import RunConfig
from rekindle.train.model.files import place
from rekindle.train.record.disk_room import free_bytes_near
from rekindle.train.record.versions import package_versions


def diagnose(config: RunConfig | None = None) -> dict[str, str]:
    """Return facts by name, in display order; with ``config``, also about that run.

    Raise InputError as ``plan_run`` does.
    """
    facts = package_versions()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["devices"] = ", ".join(names)
    else:
        facts["devices"] = f"CPU, {cores()} cores, {torch.get_num_threads()} torch threads"
    facts["precision"] = f"auto is {place('auto').precision} here"
    facts["attention"] = "sdpa (transformers' default)"
    facts["kd loss"] = kernel_choice()
    facts["step"] = check_step()
    folder = Path() if config is None or is_remote(config.cache.path) else Path(config.cache.path)
    facts["locks"] = check_locks(free_bytes_near(folder)[0])
    if config is not None:
        facts["models"] = check_models(config)
        facts["disk"] = check_disk(config)
        facts |= {f"memory, {name}": summary for name, summary in check_memory(config)}
    return facts


def kernel_choice() -> str:
    """Return which implementation ``impl="auto"`` chooses here, and why."""
    if not torch.cuda.is_available():
        return "torch, in bounded blocks: there is no CUDA device"
    if not TRITON_INSTALLED:
        return "torch, in bounded blocks: the package triton is not installed"
    return "triton; for targets over the whole vocabulary torch, in bounded blocks"
