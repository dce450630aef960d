"""The tests of code that runs on a GPU: those of the kernels, then those marked `gpu`."""

import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from processes import run_within
from results_csv import Row

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNELS = "tests/kernels"
KERNEL_TESTS = (KERNELS, f"--ignore={KERNELS}/test_distributed.py")  # its processes use the CPU
KERNEL_SECONDS = 65  # of the part's time; what they leave is for the others
MOST_PROCESSES = 8
ADDOPTS = "addopts=--import-mode=importlib --strict-markers"  # without --strict-config: see options
LAST_CHARACTERS = 3000  # of what pytest said, if it failed and no test did


class Record(NamedTuple):
    """What is known of the tests of a call of pytest, though it was ended."""

    outcomes: Counter[str]
    failures: dict[str, str]  # why, by test
    unfinished: list[str]  # they had begun


def measure(toy: bool, add: Callable[[Row], None], left: Callable[[], float]) -> None:
    """Run them; raise SystemExit if one fails, or not all finish in time."""
    calls: dict[str, Sequence[str]] = {
        "kernels": ("-m", "not slow", *([f"{KERNELS}/test_merge.py"] if toy else KERNEL_TESTS)),
        "gpu": ("-m", "gpu and not slow", *files_marked_gpu()),
    }
    wrong = False
    for name, chosen in calls.items():
        seconds = min(left(), KERNEL_SECONDS) if name == "kernels" else left()
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path, said = Path(folder) / "record.jsonl", Path(folder) / "said"
            why = run_tests([*options(processes(toy)), *chosen], seconds, path, said)
            record = read_record(path)
            output = said.read_text(encoding="utf-8", errors="replace")
        for outcome, count in sorted(record.outcomes.items()):
            add(("tests", name, outcome, count, ""))
        add(("tests", name, "time", time.perf_counter() - began, "s"))
        for test, reason in record.failures.items():
            add((test, name, "failed", 1, ""))
            print(f"FAILED {test}\n{reason}", flush=True)
        for test in record.unfinished:
            add((test, name, "begun, not done", 1, ""))
        if why:
            print(f"tests, {name}: {why}", flush=True)
        if why and not record.failures:
            print(output[-LAST_CHARACTERS:], flush=True)
        wrong = wrong or why is not None
    if wrong:
        raise SystemExit(1)


def run_tests(arguments: Sequence[str], seconds: float, record: Path, said: Path) -> str | None:
    """Run pytest within a time; return why it failed."""
    command = [sys.executable, str(HERE / "recorded_tests.py"), str(record), *arguments]
    with open(said, "w", encoding="utf-8") as out:
        return run_within(command, seconds, cwd=ROOT, stdout=out, stderr=out)


def options(workers: int) -> list[str]:
    """Return pytest's options for tests in so many processes.

    A kernel is compiled once for all of them where Triton's cache has it, and neighbours, which
    share kernels, stay in one process. The project's own options would refuse `timeout`, which it
    sets, where pytest-timeout is not installed.
    """
    spread = ["-n", str(workers), "--dist", "worksteal"] if find_spec("xdist") else []
    return ["-q", "-o", ADDOPTS, "-p", "no:cacheprovider", *spread]


def processes(toy: bool) -> int:
    """Return how many processes run tests, apart from pytest's own; 0 for its own alone."""
    cores = len(os.sched_getaffinity(0))
    return 0 if toy or cores < 2 else min(MOST_PROCESSES, cores)


def files_marked_gpu(root: Path = ROOT) -> list[str]:
    """Return the test files with a test marked `gpu`, told by their text: collecting all of the
    tests takes ten seconds. Without those of the kernels, all of which are run.
    """
    found = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(f"{KERNELS}/") and re.search(r"\bmark\.gpu\b", path.read_text()):
            found.append(name)
    return found


def read_record(path: Path) -> Record:
    """Return what pytest wrote; of a line that was cut off, nothing."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return recorded(json.loads(line) for line in lines)


def recorded(lines: Iterable[tuple[str, str, str]]) -> Record:
    """Return the outcomes by test: failed if anything of it did, its fixtures included."""
    chosen, begun, outcomes, failures = set[str](), dict[str, None](), dict[str, str](), {}
    for what, test, why in lines:
        if what == "chosen":
            chosen.add(test)
        elif what == "begun":
            begun[test] = None
        elif outcomes.get(test) != "failed":
            outcomes[test] = what
        if what == "failed":
            failures.setdefault(test, why)
    counts = Counter(outcomes.values())
    if missing := len(chosen - outcomes.keys()):
        counts["not done"] = missing
    return Record(counts, failures, [test for test in begun if test not in outcomes])
