r"""Runs a cycle in bf16 on a CPU that computes in it (amx_bf16), as ``auto`` does on a GPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/few_labels/bf16_cpu.py rekindle few_labels.yaml \
        --out runs/few-labels --draw 2 --task trec --workers 1 --set train.micro_batch_sequences=16

Takes the arguments of ``pipeline``. torch's fused attention has a backward pass in bf16 that takes
half of a step there (LOG.md), so the plain one is used.
"""

import sys

import torch

from rekindle.train import precision

torch.backends.cuda.enable_flash_sdp(False)  # for CPUs, too
precision.chosen_precision = lambda asked, device: "bf16" if asked == "auto" else asked

if __name__ == "__main__":  # each job is a separate process, which runs the lines above again
    from rekindle.pipeline.cli import main

    sys.argv[0] = "pipeline"
    main()
