"""The losses compared with eager PyTorch, and the host's cost of a call."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import host_cost
from results_csv import Row

import kernels  # noqa: TID251 (the benchmark beside this one)

KEPT, REPEATS = 64, 8
CASES = (("logits", 1.0), ("logits", 2.0), ("linear", 1.0))  # task, temperature


def measure(toy: bool, add: Callable[[Row], None]) -> None:
    """Measure every shape of `kernels.py`, at one k; without its other peers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, kept, repeats = (kernels.TOY_SHAPES, 8, 2) if toy else (kernels.SHAPES, KEPT, REPEATS)
    for providers in kernels.TASKS.values():
        for name in [*providers][2:]:
            del providers[name]
    rates = kernels.machine_rates(device, 256 if toy else 8192, repeats)
    add(("copy", "machine", "rate", rates[0] / 1e12, "TB/s"))
    add(("product", "machine", "rate", rates[1] / 1e12, "TFLOP/s"))
    for shape in shapes:
        for task, tau in CASES:
            case = f"{task} N={shape[0]} V={shape[1]} H={shape[2]} k={kept} tau={tau:g}"
            for row in kernels.measure(task, shape, kept, tau, device, repeats, rates):
                add((case, *row))


def measure_host(toy: bool, add: Callable[[Row], None]) -> None:
    """Measure as `host_cost.py` does."""
    torch.set_num_threads(1)
    if toy:
        host_cost.REPEATS, host_cost.CALLS = 2, 1
        host_cost.TAUGHT_ROWS = 2
    host_cost.measure(add)
