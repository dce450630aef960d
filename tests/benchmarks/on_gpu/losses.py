"""The losses compared with eager PyTorch, the row kernel's shapes compared with a copy, and the
host's cost of a call.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import host_cost
import kd_losses
from results_csv import Row

from rekindle.kernels.targets import KernelTargets

KEPT, REPEATS = 64, 8
CASES = (("logits", 1.0), ("logits", 2.0), ("logits", 3.0), ("linear", 1.0))  # task, temperature
SHAPES_TAU = 1.0


def measure(toy: bool, add: Callable[[Row], None], left: Callable[[], float]) -> None:
    """Measure every shape of `kd_losses.py`, at one k, without its other peers; then the shapes of
    the row kernel as far as there is time.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, kept, repeats = (kd_losses.SHAPES, KEPT, REPEATS)
    if toy:
        shapes, kept, repeats = kd_losses.TOY_SHAPES, 8, 2
    for providers in kd_losses.TASKS.values():
        for name in [*providers][2:]:
            del providers[name]
    rates = kd_losses.machine_rates(device, 256 if toy else 8192, repeats)
    add(("copy", "machine", "rate", rates[0] / 1e12, "TB/s"))
    add(("product", "machine", "rate", rates[1] / 1e12, "TFLOP/s"))
    for shape in shapes:
        for task, tau in CASES:
            case = f"{task} N={shape[0]} V={shape[1]} H={shape[2]} k={kept} tau={tau:g}"
            for row in kd_losses.measure(task, shape, kept, tau, device, repeats, rates):
                add((case, *row))
    if device == "cuda":
        measure_shapes(shapes, kept, repeats, device, add, left)


def measure_shapes(
    shapes: Sequence[tuple[int, int, int]],
    kept: int,
    repeats: int,
    device: str,
    add: Callable[[Row], None],
    left: Callable[[], float],
) -> None:
    """Measure the row kernel in the shape that the table has for it and in others that load ahead,
    which those without are not expected to beat (`kd_losses.py --shapes` has all), each vocabulary
    if it is likely to be done.
    """
    from rows.shapes import measure as shapes_of

    expected = 8.0  # seconds; then what the one before took, and half of that again
    for shape in shapes:
        if left() < expected:
            print(f"row kernel's shapes: no time for V={shape[1]} and on", flush=True)
            return
        began = time.perf_counter()
        batch = kd_losses.make_batch(shape[0], shape, kept, SHAPES_TAU, device)
        targets = KernelTargets(batch.ids, batch.probs, batch.tail, batch.labels)
        logits = batch.hidden @ batch.weight.t()
        case = f"row kernel N={shape[0]} V={shape[1]} k={kept} tau={SHAPES_TAU:g}"
        for row in shapes_of(
            logits, targets, SHAPES_TAU, repeats, kd_losses.take_turns, leave_out=("stages 1",)
        ):
            add((case, *row))
        del batch, targets, logits  # before the next ones are made
        expected = 1.5 * (time.perf_counter() - began)


def measure_host(toy: bool, add: Callable[[Row], None], left: Callable[[], float]) -> None:
    """Measure as `host_cost.py` does."""
    torch.set_num_threads(1)
    if toy:
        host_cost.REPEATS, host_cost.CALLS = 2, 1
        host_cost.TAUGHT_ROWS = 2
    host_cost.measure(add)
