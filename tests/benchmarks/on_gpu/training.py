"""A student's training, plain and with cached KD, and the share of the time that the GPU
is busy.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from results_csv import Row
from train_setup import Bench, K, prepare
from train_variants import BARE, KD1, PLAIN, ours

import train  # noqa: TID251 (the benchmark beside this one)

NAMES = [PLAIN, KD1, BARE]
PROFILED = 20  # steps


def measure(toy: bool, add: Callable[[Row], None]) -> None:
    """Measure tokens per second of a few short runs in turns; then do one more, under the
    profiler.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher, steps, warm_up, rounds, batch = ("bert-base", "minilm-l6", 80, 20, 1, 256)
    if toy:
        student, teacher, steps, warm_up, rounds, batch = train.DEFAULTS["toy"]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), steps, warm_up, batch, 128, device)
        prepare(bench, student, teacher)
        case = f"{student} {batch}x128 k={K}, teacher {teacher}"
        found = train.measure(bench, NAMES, rounds)
        for name, segments in found.items():
            best = min(segment.step for segment in segments)
            add((case, name, "tokens/s", bench.tokens / best, "1/s"))
            add((case, name, "time of a step", train.ratio(found, name, PLAIN), "x ours, plain"))
        share, idle = profiled(bench)
        add((case, KD1, "device busy", share, "1"))
        add((case, KD1, "longest it waited", idle, "ms"))


def profiled(bench: Bench) -> tuple[float, float]:
    """Return the share of the time in which the device was busy, and its longest pause in ms."""
    on_gpu = bench.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[kind])
    last = min(bench.warm_up + PROFILED, bench.steps)

    def watch(done: int) -> None:
        if done == bench.warm_up:
            profiler.start()
        elif done == last:
            profiler.stop()

    ours(bench, 1.0, watch)
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events: Any = profiler.events()
    return busy(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == device
    )


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
