"""Measures the fixed cost of a call of the losses: the time of a call of few rows, forward and
backward.

    python tests/benchmarks/host_cost.py            # a table
    python tests/benchmarks/host_cost.py --record   # and rows of results.csv

"cpu": N = 8, V = 64, H = 8, k = 4 in PyTorch on one thread, compared with eager PyTorch from the
same logits (or hidden states); "rekindle-encoded" takes other targets, as a cache stores them.
"launches": the same calls as a GPU makes them, up to the launches. Every Triton kernel is replaced
by a counter and every other operation runs on the CPU, where a small one takes about as long as
launching it would; those that would be kernels are counted, too. The driver's time for a launch is
not included. On a machine with a GPU the calls are also made there, with their kernels ("gpu"): the
queue is not waited for, so this is the host's time, too. "teachers": three teachers of a linear
head in a call each, and in one call.

Contenders take turns, and the best of many repetitions counts for each: disturbances only add time.
Time is the process's own, except for "gpu".
"""

import argparse
import collections
import functools
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "lib"))
from kd_losses import CE_WEIGHT, KD_WEIGHT, Batch, Provider, eager, make_batch
from results_csv import Row, append, hardware, versions

from rekindle.kernels.encoded import EncodedTargets
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.kernels.targets import DecodedTargets
from testlib.kernels.encoded_rows import encoded_rows
from testlib.kernels.launches import Step, counted_launches, launches

ROWS, VOCABULARY, HIDDEN, KEPT = 8, 64, 8, 4
REPEATS, CALLS = 40, 10
TAUGHT_ROWS, TEACHERS = 64, 3


def eager_linear(batch: Batch, x: Tensor) -> Tensor:
    return eager(batch, x @ batch.weight.t())


def ours(batch: Batch, z: Tensor, **given: Any) -> Tensor:
    return kd_loss(z, **given, **options(batch)).loss


def ours_linear(batch: Batch, x: Tensor, **given: Any) -> Tensor:
    return linear_kd_loss(x, batch.weight, **given, **options(batch)).loss


def options(batch: Batch) -> dict[str, Any]:
    weights = {"ce_weight": CE_WEIGHT, "kd_weight": KD_WEIGHT}
    return {"labels": batch.labels, "temperature": batch.tau, **weights}


def steps(device: str, tau: float, impl: str) -> dict[str, Step]:
    """Return the steps by task and provider."""
    shape = (ROWS, VOCABULARY, HIDDEN)
    batch = make_batch(ROWS, shape, KEPT, tau, device)
    x = batch.hidden.clone().requires_grad_()
    batch.weight.requires_grad_()
    z = (x @ batch.weight.t()).detach().requires_grad_()
    plain = {"target_ids": batch.ids, "target_probs": batch.probs, "tail_prob": batch.tail}
    given: dict[str, dict[str, Tensor | EncodedTargets]] = {
        "rekindle": plain,
        "rekindle-encoded": {"target_ids": encoded_rows(batch.ids, tau)},
    }
    tasks: dict[str, tuple[Provider, Tensor, tuple[Tensor, ...]]] = {
        "logits eager": (eager, z, (z,)),
        "linear eager": (eager_linear, x, (x, batch.weight)),
    }
    for name, targets in given.items():
        logits, linear = (
            functools.partial(function, impl=impl, **targets) for function in (ours, ours_linear)
        )
        tasks[f"logits {name}"] = logits, z, (z,)
        tasks[f"linear {name}"] = linear, x, (x, batch.weight)
    seed = torch.ones((), device=device)  # a step makes one, whatever its losses

    def step(function: Provider, student: Tensor, leaves: tuple[Tensor, ...]) -> object:
        return torch.autograd.grad(function(batch, student), leaves, seed)

    return {name: functools.partial(step, *task) for name, task in tasks.items()}


def best_seconds(
    contenders: dict[str, Step],
    clock: Callable[[], float],
    repeats: int = REPEATS,
    calls: int = CALLS,
) -> dict[str, float]:
    """Return the best seconds of a call of each, measured in turns."""
    best = dict.fromkeys(contenders, float("inf"))
    for repeat in range(repeats):
        for name, step in contenders.items():
            start = clock()
            for _ in range(calls):
                step()
            if repeat:
                best[name] = min(best[name], (clock() - start) / calls)
    return best


def teacher_steps(device: str) -> dict[str, Step]:
    """Return steps of a linear head with three teachers: a call each, and one call."""
    shape = (TAUGHT_ROWS, 30522, 256)
    batches = [make_batch(TAUGHT_ROWS, shape, 16 + t, 1.0, device) for t in range(TEACHERS)]
    x, w = batches[0].hidden.requires_grad_(), batches[0].weight.requires_grad_()
    each = [DecodedTargets(b.ids, b.probs, b.tail) for b in batches]

    def apart() -> object:
        return torch.autograd.grad(sum(linear_kd_loss(x, w, t).loss for t in each), (x, w))

    def together() -> object:
        return torch.autograd.grad(linear_kd_loss(x, w, [*each]).loss, (x, w))

    return {"a call each": apart, "one call": together}


def measure(add: Callable[[Row], None]) -> None:
    """Print a table; ``add`` takes its rows as they are found."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for path in ("cpu", "launches", *(["gpu"] if device == "cuda" else [])):
        for tau in (1.0, 2.0):
            for row in measured(path, tau):
                add(row)
    clock = time.perf_counter if device == "cuda" else time.process_time
    best = best_seconds(teacher_steps(device), clock, repeats=min(5, REPEATS), calls=1)
    case = f"teachers linear N={TAUGHT_ROWS} V=30522 H=256 T={TEACHERS}"
    for name, seconds in best.items():
        add((f"{case} {name}", "rekindle", "time", 1e3 * seconds, "ms"))
        print(f"{case} {name:12} {1e3 * seconds:8.1f} ms, {seconds / best['a call each']:.2f}")


def measured(path: str, tau: float) -> list[Row]:
    """Return the rows of all tasks on one path, and print them."""
    rows: list[Row] = []
    counts: collections.Counter[str] = collections.Counter()
    impl = "torch" if path == "cpu" else "triton"
    # other work on the processor is not counted; on a GPU, backward has its own thread
    clock = time.perf_counter if path == "gpu" else time.process_time
    with counted_launches(counts) if path == "launches" else nullcontext():
        contenders = steps("cuda" if path == "gpu" else "cpu", tau, impl)
        if path == "launches":
            contenders = {n: s for n, s in contenders.items() if "eager" not in n}
        best = best_seconds(contenders, clock, REPEATS, CALLS)
        made = {n: launches(s, counts) for n, s in contenders.items()}
    for name, seconds in best.items():
        task, provider = name.split()
        case = f"{path} {task} N={ROWS} V={VOCABULARY} H={HIDDEN} k={KEPT} tau={tau:g}"
        rows.append((case, provider, "host", 1e6 * seconds, "us"))
        line = f"{case:52} {provider:16} {1e6 * seconds:8.0f} us"
        if path == "launches":
            rows.append((case, provider, "launches", made[name].total(), ""))
            line += f"  {made[name].total()} launches: {dict(made[name])}"
        elif provider != "eager":
            ratio = seconds / best[f"{task} eager"]
            rows.append((case, provider, "host / eager", ratio, "x"))
            line += f"  {ratio:.2f} x eager"
        print(line, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true")
    record = parser.parse_args().record
    torch.set_num_threads(1)
    rows: list[Row] = []
    measure(rows.append)
    if record:
        append(rows, "host_cost", hardware(), versions("torch", "triton"))


if __name__ == "__main__":
    main()
