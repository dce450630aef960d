"""All GPU measurements, in one command of at most six minutes.

    python tests/benchmarks/gpu.py               # all parts, each within its time
    python tests/benchmarks/gpu.py --only stage1 --only training
    python tests/benchmarks/gpu.py --toy         # the same path end to end on any machine

The tests of the kernels, and those that need a GPU; the losses compared with eager PyTorch, at k =
64, and the row kernel's shapes compared with a copy; the host's cost of a call (`host_cost.py`); a
BERT-base-like student's training, plain, with cached KD and by Hugging Face's Trainer, with the
share of the time that the GPU was busy (torch.profiler); stage 1 compared with the bare forward
loop with its head on the masked rows. Each part is a separate process. What it leaves of its time
is for those after it. One that fails, or does not finish in time, is a line of the table at the
end, with its measurements so far; the others continue. Measurements are appended to results.csv.

What has to be installed: the package's own dependencies with Triton, a C compiler and Python's
headers (Triton and torch.compile call it), and pytest >= 8.4 and hypothesis for the tests. Used
where they are: pytest-xdist (without it there is one process, and not all tests are done in time),
pytest-timeout, accelerate (the Trainer), and the shared text (REKINDLE_SHARED; else Python's
documentation is the text). The package itself need not be installed: PYTHONPATH=.ns, the links in
this repository, is set where it is not found.

Exit code: 0 if every part is done, 1 if one is not, 2 without a GPU.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from results_csv import RESULTS, Row, append, hardware, versions

sys.path.insert(1, str(Path(__file__).resolve().parent / "on_gpu"))
from processes import run_within

LINKS = Path(__file__).resolve().parents[2] / ".ns"  # rekindle, as links
START_SECONDS = 12  # of this process before its first part: torch is imported
SPARE_SECONDS = 4  # of a part's time: it is to end itself before it is ended

# Measures one thing; takes whether to do a toy of it, a function that takes the rows, and one that
# returns the seconds that are left.
Measure = Callable[[bool, Callable[[Row], None], Callable[[], float]], None]


class Part(NamedTuple):
    """A part of the whole."""

    seconds: int  # its time, besides what those before it leave
    measure: Measure


class Outcome(NamedTuple):
    """The outcome of a part."""

    name: str
    seconds: float
    rows: list[Row]
    failed: str | None  # why it is not done


def parts() -> dict[str, Part]:
    """Return the parts by name, in the order of the table. With this process's start they have 345
    seconds, so that a slow end of some is within the six minutes.
    """
    return {
        "tests": Part(118, of("marked_tests")),
        "losses": Part(71, of("losses")),
        "host": Part(26, of("losses", "measure_host")),
        "training": Part(79, of("training")),
        "stage1": Part(39, of("stage_one")),
    }


def of(module: str, function: str = "measure") -> Measure:
    """Return the function that measures a part, from a module imported only then, so that a part
    does not wait for another's imports.
    """

    def measure(toy: bool, add: Callable[[Row], None], left: Callable[[], float]) -> None:
        getattr(importlib.import_module(module), function)(toy, add, left)

    return measure


def run(name: str, seconds: float, folder: Path) -> Outcome:
    """Run a part in a process, and end it if it takes too long."""
    found, began = folder / f"{name}.jsonl", time.perf_counter()
    until = time.monotonic() + seconds - SPARE_SECONDS  # the clock of every process
    command = [sys.executable, __file__, "--part", name, "--rows", str(found)]
    failed = run_within([*command, "--until", str(until)], seconds)
    return Outcome(name, time.perf_counter() - began, rows_of(found), failed)


def limits(
    chosen: Sequence[str], known: dict[str, Part], now: Callable[[], float]
) -> Iterator[tuple[str, float]]:
    """Yield each part with its seconds: what is left of the time of all but that of those after
    it.
    """
    end = now() + sum(known[name].seconds for name in chosen)
    for number, name in enumerate(chosen):
        later = sum(known[other].seconds for other in chosen[number + 1 :])
        yield name, end - now() - later


def run_here(name: str, part: Part) -> Outcome:
    """Run a part's toy in this process."""
    rows: list[Row] = []
    failed, began = None, time.perf_counter()
    try:
        part.measure(True, rows.append, lambda: math.inf)
    except (Exception, SystemExit) as error:  # the other parts continue
        traceback.print_exc()
        failed = f"{type(error).__name__}: {error}"
    return Outcome(name, time.perf_counter() - began, rows, failed)


def measure(name: str, found: Path, until: float) -> None:
    """Do the work of a part's process, until a time of the monotonic clock."""
    with open(found, "a", encoding="utf-8") as file:

        def add(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        parts()[name].measure(False, add, lambda: until - time.monotonic())


def rows_of(found: Path) -> list[Row]:
    """Return the rows that a part has written; if it was ended within a line, those before."""
    lines = found.read_text(encoding="utf-8").split("\n")[:-1] if found.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table of all measurements and failures: a line for what one provider did in a
    case.
    """
    lines = []
    for name, seconds, rows, failed in outcomes:
        lines.append(f"{name:9} {seconds:4.0f} s  {f'FAILED: {failed}' if failed else 'done'}")
        for (case, provider), found in itertools.groupby(rows, lambda row: row[:2]):
            measures = (f"{m} {v:.4g} {'' if u == '1' else u}".strip() for *_, m, v, u in found)
            lines.append(f"    {case:48} {provider:24} {'; '.join(measures)}")
    return "\n".join(lines)


def find_package() -> None:
    """Take the package from this repository where none is installed; so do processes begun here."""
    if find_spec("rekindle") is None:
        sys.path.append(str(LINKS))
        given = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(LINKS), *([given] if given else [])])


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
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    find_package()
    if options.part:
        measure(options.part, options.rows, options.until)
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
        for name, seconds in limits(chosen, known, time.monotonic):
            print(f"--- {name}, at most {seconds:.0f} s", flush=True)
            if options.toy:
                outcomes.append(run_here(name, known[name]))
                continue
            outcomes.append(run(name, seconds, Path(folder)))
            about = versions("torch", "triton", "transformers")
            append(outcomes[-1].rows, f"gpu {name}", hardware(), about, options.csv)
    print(f"\n{hardware()}; {versions('torch', 'triton', 'transformers')}\n{table(outcomes)}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
