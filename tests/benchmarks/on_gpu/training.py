"""A student's training: plain, with cached KD, in a loop written by hand and by Hugging Face's
Trainer; and the share of the time that the GPU is busy.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from results_csv import Row
from train_setup import Bench, K, prepare
from train_variants import BARE, KD1, KD2, PLAIN, TRAINER, Segment, no_trainer, ours, run

import train  # noqa: TID251 (the benchmark beside this one)
from rekindle.train.record.watch import LATEST

OURS = (PLAIN, KD1, KD2)
SIZES = train.Defaults("bert-base", "minilm-l6", 45, 12, 2, 256)
PROFILED = 15  # steps


def measure(toy: bool, add: Callable[[Row], None], left: Callable[[], float]) -> None:
    """Measure tokens per second of a few short runs, whose rows are added as each ends: ours, one
    of them once more under the profiler, and the others. Ours are repeated if there is time.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = train.DEFAULTS["toy"] if toy else SIZES
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), sizes.steps, sizes.warm_up, sizes.batch, 128, device)
        prepare(bench, sizes.student, sizes.teacher)
        case = f"{sizes.student} {sizes.batch}x128 k={K}, teacher {sizes.teacher}"
        latest: dict[str, Segment] = {}
        longest = 0.0

        def measured(name: str) -> None:
            nonlocal longest
            began = time.perf_counter()
            found = latest[name] = run(name, bench)
            longest = max(longest, time.perf_counter() - began)
            add((case, name, "tokens/s", bench.tokens / found.step, "1/s"))
            ratio = found.step / latest[PLAIN].step
            add((case, name, "time of a step", ratio, "x ours, plain"))
            if not math.isnan(found.wait):
                add((case, name, "wait for data", 100 * found.wait, "% of the time"))
            add((case, name, "peak memory", found.peak / 2**20, "MiB"))

        for name in OURS:
            measured(name)
        share, idle = profiled(bench)
        add((case, KD1, "device busy", share, "1"))
        add((case, KD1, "longest it waited", idle, "ms"))
        if why := no_trainer():
            print(f"{TRAINER}: skipped, {why}", flush=True)
        else:
            measured(TRAINER)
        measured(BARE)
        for name in OURS * (sizes.rounds - 1):
            if left() < 1.5 * longest:
                print(f"no time to repeat {name}", flush=True)
                break
            measured(name)


def profiled(bench: Bench) -> tuple[float, float]:
    """Return the share of the time in which the device was busy, and its longest pause in ms."""
    on_gpu = bench.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[kind])
    last = bench.warm_up + PROFILED
    bench = replace(bench, steps=last + LATEST)

    def watch(done: int) -> None:
        if done == bench.warm_up:
            profiler.start()
        elif done == last:
            profiler.stop()

    ours(bench, 1.0, watch)
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return busy(spans_on(device, profiler.events()))


def spans_on(device: Any, events: Iterable[Any]) -> Iterator[tuple[float, float]]:
    """Yield when each of the device's operations began and ended, in microseconds; not what spans
    several of them and the pauses between, such as the optimiser's step.
    """
    for event in events:
        if event.device_type == device and not event.is_user_annotation:
            yield event.time_range.start, event.time_range.end


def busy(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return, for spans in microseconds, which may overlap, the share of their time that they
    cover, and the longest gap in ms. The first tenth is left out: a starting profiler delays
    everything.
    """
    ordered = sorted(spans)
    if not ordered:
        raise RuntimeError("the profiler saw nothing run on the device")
    first, end = ordered[0][0], max(stop for _, stop in ordered)
    begin = first + (end - first) / 10
    covered, longest, reached = 0.0, 0.0, begin
    for start, stop in ordered:
        start, stop = max(start, reached), max(stop, reached)
        longest = max(longest, start - reached)
        covered += stop - start
        reached = stop
    return covered / max(end - begin, 1e-9), longest / 1e3
