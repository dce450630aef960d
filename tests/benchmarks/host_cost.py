"""Measures the fixed cost of a call of the losses: the time of a call of few rows, forward and
backward.

    python tests/benchmarks/host_cost.py            # a table
    python tests/benchmarks/host_cost.py --record   # and rows of results.csv

"cpu": N = 8, V = 64, H = 8, k = 4 in PyTorch on one thread, compared with eager PyTorch from the
same logits (or hidden states). "launches": the same calls as a GPU makes them, up to the launches.
Every Triton kernel is replaced by a counter and every other operation runs on the CPU, where a
small one takes about as long as launching it would; those that would be kernels are counted, too.
The driver's time for a launch is not included. On a machine with a GPU the calls are also made
there, with their kernels ("gpu"): the queue is not waited for, so this is the host's time, too.
"teachers": three teachers of a linear head in a call each, and in one call.

Contenders take turns, and the best of many repetitions counts for each: disturbances only add time.
Time is the process's own, except for "gpu".
"""

import argparse
import collections
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from kd_losses import CE_WEIGHT, KD_WEIGHT, Batch, Provider, eager, make_batch
from results_csv import Row, append, hardware, versions
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.kernels.targets import DecodedTargets

ROWS, VOCABULARY, HIDDEN, KEPT = 8, 64, 8, 4
REPEATS, CALLS = 40, 10
TAUGHT_ROWS, TEACHERS = 64, 3
Step = Callable[[], object]  # one call, forward and backward

# operations of torch that launch nothing: they take memory, or view it differently
NO_KERNEL = (
    "promote_types",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "set_",
    "_local_scalar_dense",
)


def eager_linear(batch: Batch, x: Tensor) -> Tensor:
    return eager(batch, x @ batch.weight.t())


def ours(batch: Batch, z: Tensor, impl: str) -> Tensor:
    return kd_loss(z, batch.ids, batch.probs, **options(batch, impl)).loss


def ours_linear(batch: Batch, x: Tensor, impl: str) -> Tensor:
    return linear_kd_loss(x, batch.weight, batch.ids, batch.probs, **options(batch, impl)).loss


def options(batch: Batch, impl: str) -> dict[str, Any]:
    weights = {"ce_weight": CE_WEIGHT, "kd_weight": KD_WEIGHT}
    given = {"tail_prob": batch.tail, "labels": batch.labels, "temperature": batch.tau}
    return {"impl": impl, **given, **weights}


def steps(device: str, tau: float, impl: str) -> dict[str, Step]:
    """Return the steps by task and provider."""
    shape = (ROWS, VOCABULARY, HIDDEN)
    batch = make_batch(ROWS, shape, KEPT, tau, device)
    x = batch.hidden.clone().requires_grad_()
    batch.weight.requires_grad_()
    z = (x @ batch.weight.t()).detach().requires_grad_()
    tasks: dict[str, tuple[Provider, Tensor, tuple[Tensor, ...]]] = {
        "logits eager": (eager, z, (z,)),
        "logits rekindle": (functools.partial(ours, impl=impl), z, (z,)),
        "linear eager": (eager_linear, x, (x, batch.weight)),
        "linear rekindle": (functools.partial(ours_linear, impl=impl), x, (x, batch.weight)),
    }
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


@contextmanager
def counted_launches(counts: collections.Counter[str]) -> Iterator[None]:
    """Let Triton's kernels only count their launches; impl triton is taken on a CPU, and the values
    of tensors are looked at no more than on a GPU.
    """
    checks = importlib.import_module("rekindle.kernels.checks")
    looked, checks._raise_or_find_full = checks._raise_or_find_full, lambda *_: None
    ops = importlib.import_module("rekindle.kernels.ops")
    module = importlib.import_module("rekindle.kernels.triton_rows")
    scaled, ops._scale_ = (
        ops._scale_,
        lambda gradients, factor: [  # as on a GPU
            module.scale_unless_one(each, factor) for each in gradients
        ],
    )
    interpreted = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    kernels = {
        name: value
        for name, value in vars(module).items()
        if hasattr(value, "arg_names") or type(value).__name__ == "InterpretedFunction"
    }
    for name in kernels:
        setattr(module, name, _Counter(name, counts))
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
        checks._raise_or_find_full, ops._scale_ = looked, scaled
        del os.environ["TRITON_INTERPRET"]
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


class _Counter:
    """Replaces a kernel."""

    def __init__(self, name: str, counts: collections.Counter[str]):
        self.name, self.counts = name, counts

    def __getitem__(self, grid: object) -> "_Counter":
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        self.counts[self.name] += 1


class _Operations(TorchDispatchMode):
    """Counts the operations of torch that would be kernels on a GPU."""

    def __init__(self, counts: collections.Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in (*NO_KERNEL, "detach"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def launches(step: Step, counts: collections.Counter[str]) -> collections.Counter[str]:
    """Return the launches of one call."""
    step()
    counts.clear()
    with _Operations(counts):
        step()
    return collections.Counter(counts)


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
        line = f"{case:52} {provider:9} {1e6 * seconds:8.0f} us"
        if path == "launches":
            rows.append((case, provider, "launches", made[name].total(), ""))
            line += f"  {made[name].total()} launches: {dict(made[name])}"
        elif provider == "rekindle":
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
