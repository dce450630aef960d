"""All GPU measurements, in one command of at most six minutes.

    python tests/benchmarks/gpu.py               # all parts, each within its time
    python tests/benchmarks/gpu.py --only stage1 --only training
    python tests/benchmarks/gpu.py --toy         # the same path end to end on any machine

The tests that need a GPU; the losses compared with eager PyTorch, at k = 64; the host's cost of a
call (`host_cost.py`); a BERT-base-like student's training, plain and with cached KD, with the share
of the time that the GPU was busy (torch.profiler); stage 1 compared with the bare forward loop with
its head on the masked rows. Each part is a separate process. One that fails, or does not finish in
time, is a line of the table at the end, with its measurements so far; the others continue.
Measurements are appended to results.csv.

Exit code: 0 if every part is done, 1 if one is not, 2 without a GPU.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from results_csv import RESULTS, Row, append, hardware, versions

sys.path.insert(1, str(Path(__file__).resolve().parent / "on_gpu"))


# Measures one thing; takes whether to do a toy of it, and a function that takes the rows.
Measure = Callable[[bool, Callable[[Row], None]], None]


class Part(NamedTuple):
    """A part of the whole."""

    seconds: int  # its time limit
    measure: Measure


class Outcome(NamedTuple):
    """The outcome of a part."""

    name: str
    seconds: float
    rows: list[Row]
    failed: str | None  # why it is not done


def parts() -> dict[str, Part]:
    """Return the parts by name, in the order of the table. Together 360 seconds."""
    return {
        "tests": Part(80, of("marked_tests")),
        "losses": Part(90, of("losses")),
        "host": Part(40, of("losses", "measure_host")),
        "training": Part(90, of("training")),
        "stage1": Part(60, of("stage_one")),
    }


def of(module: str, function: str = "measure") -> Measure:
    """Return the function that measures a part, from a module imported only then, so that a part
    does not wait for another's imports.
    """

    def measure(toy: bool, add: Callable[[Row], None]) -> None:
        getattr(importlib.import_module(module), function)(toy, add)

    return measure


def run(name: str, seconds: int, folder: Path) -> Outcome:
    """Run a part in a process, and end it if it takes too long."""
    found, began = folder / f"{name}.jsonl", time.perf_counter()
    failed = run_within([sys.executable, __file__, "--part", name, "--rows", str(found)], seconds)
    return Outcome(name, time.perf_counter() - began, rows_of(found), failed)


def run_within(command: Sequence[str], seconds: float) -> str | None:
    """Return why a command failed; None if it is done. A late command is ended, with all the
    processes it has started.
    """
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
        return f"ended with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return f"not done within {seconds} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_here(name: str, part: Part) -> Outcome:
    """Run a part's toy in this process."""
    rows: list[Row] = []
    failed, began = None, time.perf_counter()
    try:
        part.measure(True, rows.append)
    except (Exception, SystemExit) as error:  # the other parts continue
        traceback.print_exc()
        failed = f"{type(error).__name__}: {error}"
    return Outcome(name, time.perf_counter() - began, rows, failed)


def measure(name: str, found: Path) -> None:
    """Do the work of a part's process."""
    with open(found, "a", encoding="utf-8") as file:

        def add(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        parts()[name].measure(False, add)


def rows_of(found: Path) -> list[Row]:
    """Return the rows that a part has written; if it was ended within a line, those before."""
    lines = found.read_text(encoding="utf-8").split("\n")[:-1] if found.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table of all measurements and failures."""
    lines = []
    for name, seconds, rows, failed in outcomes:
        lines.append(f"{name:9} {seconds:4.0f} s  {f'FAILED: {failed}' if failed else 'done'}")
        lines += [f"    {c:52} {p:24} {m:26} {v:10.4g} {u}" for c, p, m, v, u in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes, no rows; with a GPU or without"
    )
    parser.add_argument("--only", action="append", help="a part; may be given several times")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        measure(options.part, options.rows)
        return 0
    if not torch.cuda.is_available() and not options.toy:
        print("no GPU here: this measures what a GPU does (--toy runs anywhere)", file=sys.stderr)
        return 2
    known = parts()
    chosen = options.only or list(known)
    if unknown := sorted({*chosen} - {*known}):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            print(f"--- {name}, at most {known[name].seconds} s", flush=True)
            if options.toy:
                outcomes.append(run_here(name, known[name]))
                continue
            outcomes.append(run(name, known[name].seconds, Path(folder)))
            about = versions("torch", "triton", "transformers")
            append(outcomes[-1].rows, f"gpu {name}", hardware(), about, options.csv)
    print(f"\n{hardware()}; {versions('torch', 'triton', 'transformers')}\n{table(outcomes)}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
