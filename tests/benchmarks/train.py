"""Compares a student's training by Rekindle's loop, by loops written by hand, and by Hugging Face's
Trainer, in one run.

    python tests/benchmarks/train.py [--student bert-mini] [--teacher minilm-l12] [--csv [PATH]]
    python tests/benchmarks/train.py --memory      # peak of a process of its own for each, on a CPU
    python tests/benchmarks/train.py --toy         # tiny sizes, to see that it runs

Masked LM on sequences of 128 tokens, all full, 15 % masked, V = 30,522, k = 64, random weights. The
text is the shared Wikipedia if available (REKINDLE_SHARED), else Python's documentation. Rekindle's
loop reads the cache while it trains, checks every loss and writes its log; the others
(train_variants.py) get batches from memory, read and decoded beforehand. A round is a run of every
contender, in another order each round. Times are from one step of a run to a later one, without
start, evaluation and checkpoints. Ratios are within a round; medians over the rounds are printed.

"Wait" is reported by Rekindle's loop itself, without the first batch, which nothing can hide. Peak
memory is the GPU's; on a CPU, --memory gives the peak of a separate process, libraries (about 0.5
GB) included.

Trainer: AutoModelForMaskedLM with labels of −100, whose head sees every token, and its own defaults
(fused AdamW, its loader). It needs accelerate; --peers puts folders on the import path first (``pip
install --no-deps --target FOLDER accelerate psutil``). "Head on masked rows" is the Trainer around
a model that does what Rekindle's student does.

Goals: cached KD at most 5 % slower than plain masked LM on a CPU, 3 % on an H200; wait below 1 %;
a live teacher's step at least (T+S)/S times Rekindle's, from the bare forward pass T and the bare
plain step S; the Trainer not faster.

Predictions before the first run (CPU, bert-mini and minilm-l12): KD +2 % at τ = 1, +6 % at τ = 2,
naive KD +30 %; wait 0.2 %; T/S = 1.6, so 2.6 × against the live teacher; Trainer 2.5 × Rekindle's
time, equal to it with its head on masked rows only.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from results_csv import RESULTS, append, hardware, versions
from train_setup import SHAPES, VOCABULARY, Bench, K, prepare
from train_variants import (
    BARE,
    FORWARD,
    KD1,
    KD2,
    LIVE,
    PLAIN,
    TRAINER,
    VARIANTS,
    Segment,
    no_trainer,
    run,
)

from rekindle.train.record.watch import LATEST

MEMORY_STEPS = 3  # nothing grows after the second

Rounds = dict[str, list[Segment]]


class Defaults(NamedTuple):
    """Default sizes."""

    student: str
    teacher: str
    steps: int
    warm_up: int
    rounds: int
    batch: int


DEFAULTS = {
    "toy": Defaults("toy", "toy", 5, 2, 2, 8),
    "cpu": Defaults("bert-mini", "minilm-l12", 20, 4, 5, 32),
    "cuda": Defaults("minilm-l6", "bert-base", 330, 30, 5, 256),
}


class Check(NamedTuple):
    """A goal, and the value found."""

    goal: str
    found: float
    limit: float
    most: bool  # whether the limit is an upper one, or a lower one

    @property
    def passed(self) -> bool:
        return self.found <= self.limit if self.most else self.found >= self.limit

    @property
    def verdict(self) -> str:
        sign = "at most" if self.most else "at least"
        return f"{'PASS' if self.passed else 'FAIL'}, goal {sign} {self.limit:.4g}"


# ---- measuring
# ---------------------------------------------------------------------------------------------


def measure(bench: Bench, names: list[str], rounds: int) -> Rounds:
    """Measure a segment of every contender a round; each round begins with another one."""
    found: Rounds = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(run(name, bench))
            rate = bench.tokens / found[name][-1].step
            print(f"{turn + 1}/{rounds} {name}: {rate:.0f} tokens/s", file=sys.stderr, flush=True)
    return found


def peaks(bench: Bench, names: list[str], options: argparse.Namespace) -> dict[str, int]:
    """Return the peak bytes of a separate process for each contender."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, "--child", name, "--folder", str(bench.folder)]
        command += ["--batch", str(bench.batch), "--steps", str(MEMORY_STEPS), "--peers"]
        command += map(str, options.peers)
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = int(done.stdout.splitlines()[-1])
    return found


# ---- what came out
# ---------------------------------------------------------------------------------------------


def ratio(found: Rounds, name: str, other: str) -> float:
    """Return the time of a step of one over that of the other: the median over rounds."""
    pairs = zip(found[name], found[other], strict=True)
    return statistics.median(a.step / b.step for a, b in pairs)


def median_of(segments: list[Segment], of: Callable[[Segment], float]) -> float:
    return statistics.median(map(of, segments))


def checks(found: Rounds, device: torch.device) -> list[Check]:
    """Return the goals of the docstring."""
    slower = 1.05 if device.type == "cpu" else 1.03
    waits = [median_of(found[name], lambda s: s.wait) for name in (PLAIN, KD1, KD2)]
    bare = zip(found[FORWARD], found[BARE], strict=True)
    expected = statistics.median((t.step + s.step) / s.step for t, s in bare)
    results = [
        Check("cached KD at τ=1, time x plain", ratio(found, KD1, PLAIN), slower, True),
        Check("cached KD at τ=2, time x plain", ratio(found, KD2, PLAIN), slower, True),
        Check("share of the time spent waiting for data", max(waits), 0.01, True),
        Check("live teacher, time x cached KD: (T+S)/S", ratio(found, LIVE, KD1), expected, False),
    ]
    if TRAINER in found:
        trainer = ratio(found, TRAINER, PLAIN)
        results.append(Check("Trainer, time x ours", trainer, 1.0, False))
    return results


Row = tuple[str, str, float, str]


def table(found: Rounds, bench: Bench) -> list[Row]:
    """Print the table; return the same as rows: provider, metric, value, unit."""
    columns = f"{'tokens/s':>10}{'min':>10}{'max':>10}{'x plain':>9}{'wait':>8}"
    print(f"{'':32}{columns}{'peak':>10}" if bench.device.type == "cuda" else f"{'':32}{columns}")
    rows: list[Row] = []
    for name, segments in found.items():
        rates = [bench.tokens / s.step for s in segments]
        times = ratio(found, name, PLAIN)
        wait = median_of(segments, lambda s: s.wait)
        line = f"{name:32}{statistics.median(rates):10.0f}{min(rates):10.0f}{max(rates):10.0f}"
        line += f"{times:9.3f}" + (" " * 8 if math.isnan(wait) else f"{wait:8.2%}")
        rows += [(name, "tokens/s", statistics.median(rates), "1/s")]
        rows += [(name, "time of a step", times, "x ours, plain")]
        if not math.isnan(wait):
            rows.append((name, "wait for data", 100 * wait, "% of the time"))
        if bench.device.type == "cuda":
            peak = median_of(segments, lambda s: s.peak)
            line += f"{peak / 2**20:7.0f} MB"
            rows.append((name, "peak memory", peak / 2**20, "MiB"))
        print(line)
    return rows


def timed_rows(bench: Bench, names: list[str], rounds: int) -> list[Row]:
    """Measure; print the table and the goals."""
    found = measure(bench, names, rounds)
    rows = table(found, bench)
    for check in checks(found, bench.device):
        print(f"{check.goal:44}{check.found:8.4f}  {check.verdict}")
        rows.append(("goal", check.goal, check.found, check.verdict))
    return rows


def memory_rows(bench: Bench, names: list[str], options: argparse.Namespace) -> list[Row]:
    found = peaks(bench, names, options)
    print(f"{'':32}{'peak of the process':>20}{'x plain':>9}")
    for name, size in found.items():
        print(f"{name:32}{size / 2**20:17.0f} MB{size / found[PLAIN]:9.3f}")
    return [(name, "peak memory", size / 2**20, "MiB of a process") for name, size in found.items()]


# ---- the run
# ---------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", choices=SHAPES)
    parser.add_argument("--teacher", choices=SHAPES)
    parser.add_argument("--steps", type=int, help="of every run")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--memory", action="store_true", help="peak memory on a CPU, no times")
    parser.add_argument("--csv", type=Path, nargs="?", const=RESULTS, help="append the results")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="import from here first")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in DEFAULTS["toy" if options.toy else kind]._asdict().items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    options.warm_up = min(options.warm_up, options.steps - LATEST - 1)
    if options.warm_up < 1:
        least = LATEST + 2
        parser.error(f"--steps must be at least {least}: the first and last are not measured")
    return options


def bench_of(options: argparse.Namespace, folder: Path) -> Bench:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Bench(folder, options.steps, options.warm_up, options.batch, 128, device)


def contenders() -> list[str]:
    """Return those that can run here; print why the others cannot."""
    why = no_trainer()
    if why is None:
        return list(VARIANTS)
    print(f"{TRAINER}: skipped, {why}")
    return [name for name in VARIANTS if not name.startswith(TRAINER)]


def main() -> None:
    options = parsed()
    sys.path[1:1] = [str(path.resolve()) for path in options.peers]
    if options.child:
        print(int(run(options.child, bench_of(options, options.folder)).peak))
        return
    print(f"{hardware()}; {torch.get_num_threads()} threads; load average {os.getloadavg()[0]:.2f}")
    about = versions("torch", "transformers", "accelerate", "numpy", "pyarrow")
    print(about)
    names = contenders()
    with tempfile.TemporaryDirectory() as folder:
        bench = bench_of(options, Path(folder))
        prepare(bench, options.student, options.teacher)
        case = f"{options.student} {bench.batch}x{bench.length} k={K} V={VOCABULARY}"
        case += f" teacher {options.teacher}"
        print(f"{case}; {bench.steps} steps, {bench.warm_up + LATEST} of them not measured")
        if options.memory:
            rows = memory_rows(bench, names, options)
        else:
            rows = timed_rows(bench, names, options.rounds)
    if options.csv:
        name = f"train{' --memory' * options.memory}{' --toy' * options.toy}"
        append([(case, *row) for row in rows], name, hardware(), about, options.csv)


if __name__ == "__main__":
    main()
