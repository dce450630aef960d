"""Times every shape in which the row kernel can take a row here, compared with a copy of the same
bytes.

Called by `kd_losses.py --shapes`. A shape first has to agree with float64.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rows.candidates import candidates
from rows.cubins import launchers
from torch import Tensor

from rekindle.kernels import triton_rows
from rekindle.kernels.losses import kd_loss
from rekindle.kernels.row_shapes import Shape, machine_of, shape_of
from rekindle.kernels.targets import KernelTargets, LossSettings

GATE_ROWS = 16
POWERS = {1.0: 1, 2.0: 2, 4.0: 4}


def measure(
    logits: Tensor,
    targets: KernelTargets,
    tau: float,
    repeats: int,
    take_turns: Callable[[dict[str, Callable[[], Any]], str, int], dict[str, list[float]]],
    cubins: Path | None = None,
    leave_out: Sequence[str] = (),
) -> list[tuple[str, str, float, str]]:
    """Print one table of logits [N,V]; return (provider, metric, value, unit). Without the shapes
    whose names have one of ``leave_out`` in them.
    """
    rows, vocabulary = logits.shape
    settings = LossSettings(temperature=tau, ce_weight=0.5, kd_weights=(0.5,), reduction="sum")
    machine = machine_of(logits.device)
    if logits.device.type != "cuda":
        machine = machine._replace(clusters=True)  # the interpreter has any
    gradient, target = torch.empty_like(logits), torch.empty_like(logits)
    kernel = triton_rows.RowKernel(targets, settings, True)
    expected = _gradient_in_float64(logits[:GATE_ROWS], targets.take(slice(0, GATE_ROWS)), settings)

    def run(shape: Shape) -> None:
        triton_rows.shape_of = lambda *_: shape
        try:
            kernel.run(logits, gradient, slice(0, rows))
        finally:
            triton_rows.shape_of = shape_of

    works: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(logits)}
    kept, floats = 1 << (targets.ids.shape[1] - 1).bit_length(), 1 + (tau not in POWERS)
    chosen = shape_of(vocabulary, logits.itemsize, kept, floats, machine)
    shapes = {"table": chosen}
    for name, fields in candidates(vocabulary, logits.itemsize, *machine).items():
        if not any(part in name for part in leave_out):
            shapes[name] = Shape(*fields)
    tried: dict[str, Callable[[], Any]] = {}
    for name, shape in shapes.items():
        tried[name] = lambda shape=shape: run(shape)
    if cubins is not None:
        values = _arguments(logits, gradient, targets, kernel, settings)
        stream = torch.cuda.current_stream().cuda_stream
        power = POWERS.get(tau, 0)
        tried |= launchers(cubins, vocabulary, power, rows, values, stream)
    for name, work in tried.items():
        try:
            gradient.zero_()
            work()
            found = gradient[:GATE_ROWS].double()
            assert (found - expected).norm() <= 3e-2 * expected.norm(), "is not the derivative"
            works[name] = work
        except Exception as error:  # a shape that the compiler or the device refuses is a finding
            print(f"  {name:36s} {type(error).__name__}: {str(error).splitlines()[0][:80]}")
    times = {
        n: statistics.median(t) for n, t in take_turns(works, logits.device.type, repeats).items()
    }
    print(f"\nrow kernel N={rows} V={vocabulary} tau={tau:g}; the table says {chosen}")
    for name, milliseconds in sorted(times.items(), key=lambda item: item[1]):
        share = 100 * times["copy"] / milliseconds
        print(f"  {name:36s} {milliseconds:9.3f} ms {share:6.1f} % of copy")
    return [(f"rekindle {n}", "time", t, "ms") for n, t in times.items()]


def _arguments(
    logits: Tensor,
    gradient: Tensor,
    targets: KernelTargets,
    kernel: triton_rows.RowKernel,
    settings: LossSettings,
) -> dict[str, Any]:
    """Return the row kernel's arguments by name, as `cubins` compiles it."""
    (rows, vocabulary), kept = logits.shape, targets.ids.shape[1]
    ones = torch.ones(max(rows, 2), device=logits.device)
    values = {"logits_ptr": logits, "grad_ptr": gradient, "ids_ptr": targets.ids}
    values |= {"probs_ptr": targets.probs, "tail_ptr": targets.tail, "labels_ptr": targets.labels}
    values |= {"weight_ptr": ones, "counts_ptr": ones, "ce_ptr": kernel.ce, "kd_ptr": kernel.kd}
    numbers = {"rows": rows, "stride": logits.stride(0), "V": vocabulary, "K": kept, "kept": 0}
    numbers |= {"ignore_index": settings.ignore_index, "upstream_stride": 0}
    numbers |= {"inverse_tau": 1.0 / settings.temperature, "scale": 1.0, "softcap": 0.0}
    numbers |= {"resolution": 2.0**-9, "log_skew": math.log(0.5), "logit_skew": 0.0}
    numbers |= {"ce_weight": settings.ce_weight, "spread": 1.0}
    return {**values, **numbers, "kd_weights": settings.kd_factors}


def _gradient_in_float64(logits: Tensor, targets: KernelTargets, settings: LossSettings) -> Tensor:
    z = logits.double().requires_grad_()
    loss = kd_loss(
        z, targets.ids, targets.probs.double(), tail_prob=targets.tail, labels=targets.labels,
        temperature=settings.temperature, ce_weight=settings.ce_weight,
        kd_weight=settings.kd_weights[0], reduction=settings.reduction, impl="torch",
    ).loss  # fmt: skip
    return torch.autograd.grad(loss, z)[0]
