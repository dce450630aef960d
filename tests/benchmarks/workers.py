"""Compares stage 1 with two worker processes and with one, where the teacher is the bottleneck.

    python tests/benchmarks/workers.py [--toy] [--csv PATH]

A masked LM (6 layers, hidden 384, random) on sequences of 128, 15 % of them masked, top-k of 64; 32
units. Each process has one thread. Both in turns in one run, on two idle cores. "units" is the time
between the first and the last commit, without one-time costs (starting processes, loading the
model): for a long run that is all.

Prediction before the first run: 1.9 x. The processes share only memory bandwidth and the file
system.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from cache_rows import VOCABULARY, make_corpus, save_masked_lm
from results_csv import RESULTS, Row, append, processor, versions

from rekindle.data.storage.shards import Commit
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig
from rekindle.pipeline.caching.compute_unit import Unit
from rekindle.pipeline.caching.make_unit import Loader
from rekindle.pipeline.caching.teachers import plan_teacher
from rekindle.pipeline.caching.views import Views
from rekindle.pipeline.processes.units import OnThisMachine, Work
from rekindle.pipeline.teacher_config import TargetsConfig, TeacherConfig


def measure(folder: Path, toy: bool) -> list[Row]:
    """Return seconds with one and two processes, in turns."""
    layers, width, units, rows = (1, 32, 6, 8) if toy else (6, 384, 32, 32)
    corpus = make_corpus(folder, units * rows, 128, rows)
    masked = MaskedView(corpus, MaskConfig(), 0, 1)
    masked.build()
    model = folder / "tokenizer"  # the model beside its tokenizer
    save_masked_lm(model, layers, width, width // 32)
    kept = TargetsConfig(kind="topk", k=64)
    teacher = TeacherConfig(name="teacher", model=str(model), task="masked_lm", targets=kept)
    plan = plan_teacher(teacher, corpus, Views(masked), 0)
    case = f"{units} units of {rows} x 128, L={layers} H={width} k=64 V={VOCABULARY}"
    times: dict[tuple[int, str], list[float]] = {}
    for turn in range(2 if toy else 3):
        for processes in (1, 2):
            torch.set_num_threads(processes)  # all available threads, for all of them
            named = plan.info.model_copy(update={"name": f"teacher-{turn}-{processes}"})
            commits = list[float]()

            def report(_: dict[str, Commit], commits: list[float] = commits) -> None:
                commits.append(time.perf_counter())

            load = Loader((replace(plan, info=named),), corpus)
            began = time.perf_counter()
            work = Work("teacher", load, [Unit(number, 0) for number in range(units)])
            OnThisMachine(processes).run(work, report)
            times.setdefault((processes, "whole"), []).append(time.perf_counter() - began)
            times.setdefault((processes, "units"), []).append(commits[-1] - commits[0])
    results: list[Row] = []
    for part in ("units", "whole"):
        one, two = times[1, part], times[2, part]
        ratio = statistics.median(a / b for a, b in zip(one, two, strict=True))
        print(
            f"{part}: {statistics.median(one):.2f} s, {statistics.median(two):.2f} s, {ratio:.2f} x"
        )
        results.append((case, f"2 workers, {part}", "time", statistics.median(two), "s"))
        results.append((case, f"2 workers, {part}", "ratio to one worker", ratio, "1"))
    return results


def main() -> None:
    """Measure, print, and append to the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="some seconds; its figures mean nothing")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.toy)
    if not options.toy:
        about = versions("torch", "transformers", "pyarrow")
        append(rows, "workers", processor(), about, options.csv)


if __name__ == "__main__":
    main()
