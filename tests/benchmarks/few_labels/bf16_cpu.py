r"""Runs a cycle in bf16 on a CPU that computes in it (amx_bf16), as ``auto`` does on a GPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/few_labels/bf16_cpu.py rekindle few_labels.yaml \
        --out runs/few-labels --draw 2 --task trec --workers 1 --set train.micro_batch_sequences=16

Takes the arguments of ``pipeline``. torch's fused attention has a backward pass in bf16 that takes
half of a step there (LOG.md), so the plain one is used.

Each job is a process of its own that runs this file again, forked where rekindle's modules are
imported already: each name of the function is replaced, not only where it is defined.
"""

import sys

import torch

from rekindle.train import precision

torch.backends.cuda.enable_flash_sdp(False)  # for CPUs, too


def bf16_on_cpu(asked: str, device_type: str) -> str:
    """Take the place of ``chosen_precision``."""
    return "bf16" if asked == "auto" else asked


original = precision.chosen_precision
for name, module in [*sys.modules.items()]:
    if name.startswith("rekindle.") and getattr(module, "chosen_precision", None) is original:
        setattr(module, "chosen_precision", bf16_on_cpu)  # noqa: B010 -- mypy knows no such name

if __name__ == "__main__":
    from rekindle.pipeline.cli import main

    sys.argv[0] = "pipeline"
    main()
