"""Times every shape in which the row kernel can take a row here, beside a copy of the same bytes.

Called by `kernels.py --shapes`. A shape first has to agree with float64.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rekindle.kernels import triton_rows
from rekindle.kernels.losses import kd_loss
from rekindle.kernels.row_shapes import Machine, Shape, machine_of, shape_of
from rekindle.kernels.targets import LossSettings, SparseTargets

GATE_ROWS = 16
REGISTERS = {16: 64, 32: 80, 64: 128}  # by what a thread holds of its row


def candidates(vocabulary: int, size: int, machine: Machine) -> dict[str, Shape]:
    """Shapes by name: held by 1 to 16 programs, and streamed with and without a bound on rows."""
    block = max(256, 1 << (vocabulary - 1).bit_length())
    found = {}
    for ctas in (1, 2, 4, 8, 16) if machine.clusters else (1,):
        for warps in (8, 16, 32):
            most = 65_536 // (32 * warps)
            held = block // (ctas * warps * 32)
            if held in REGISTERS and REGISTERS[held] <= most:
                registers = REGISTERS[held]
                found[f"held {ctas}x{warps}"] = Shape(True, ctas, block, warps, registers)
    for tile, warps, registers in ((4_096, 8, 64), (8_192, 16, 64), (16_384, 16, 128)):
        if tile > block:
            continue
        resident = machine.processors * (65_536 // (32 * warps * registers))
        bounds = {"": None, " resident": resident, " L2": machine.cache // (vocabulary * size)}
        for stages in (1, 3):
            for name, programs in bounds.items():
                shape = Shape(False, 1, tile, warps, registers, stages, programs)
                found[f"streamed {tile}x{warps} stages {stages}{name}"] = shape
    return found


def measure(
    logits: Tensor,
    targets: SparseTargets,
    tau: float,
    repeats: int,
    take_turns: Callable[[dict[str, Callable[[], Any]], str, int], dict[str, list[float]]],
) -> list[tuple[str, str, float, str]]:
    """Prints one table of logits [N,V]; returns (provider, metric, value, unit)."""
    rows, vocabulary = logits.shape
    settings = LossSettings(temperature=tau, ce_weight=0.5, kd_weight=0.5, reduction="sum")
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
    kept, floats = 1 << (targets.ids.shape[1] - 1).bit_length(), 1 + (tau not in (1.0, 2.0, 4.0))
    chosen = shape_of(vocabulary, logits.itemsize, kept, floats, machine)
    for name, shape in {
        "table": chosen,
        **candidates(vocabulary, logits.itemsize, machine),
    }.items():
        try:
            run(shape)
            found = gradient[:GATE_ROWS].double()
            assert (found - expected).norm() <= 3e-2 * expected.norm(), "is not the derivative"
            works[name] = lambda shape=shape: run(shape)
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


def _gradient_in_float64(logits: Tensor, targets: SparseTargets, settings: LossSettings) -> Tensor:
    z = logits.double().requires_grad_()
    loss = kd_loss(
        z, targets.ids, targets.probs.double(), tail_prob=targets.tail, labels=targets.labels,
        temperature=settings.temperature, ce_weight=settings.ce_weight,
        kd_weight=settings.kd_weight, reduction=settings.reduction, impl="torch",
    ).loss  # fmt: skip
    return torch.autograd.grad(loss, z)[0]
