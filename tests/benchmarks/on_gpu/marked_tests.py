"""The tests of code that runs on a GPU, counted as far as they finish in time."""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from results_csv import Row

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 72  # a little less than the part may take
FILES = (  # those with tests marked `gpu`, and those of the kernels that take any device
    "tests/train/test_gpu.py",
    "tests/pipeline/caching/compute_unit/test_in_flight.py",
    "tests/kernels/test_no_waiting.py",
    "tests/kernels/test_ops.py",
    "tests/kernels/test_hidden.py",
    "tests/kernels/test_row_kernel.py",
    "tests/kernels/test_triton_rows.py",
)
OUTCOMES = {".": "passed", "F": "failed", "E": "failed", "s": "skipped", "x": "passed"}


def measure(toy: bool, add: Callable[[Row], None]) -> None:
    """Run them; raise SystemExit if one fails, or not all finish in time."""
    files = [name for name in FILES[: 2 if toy else None] if (ROOT / name).is_file()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu" if toy else "not slow", *files]
    with tempfile.TemporaryFile("w+") as out:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=out, timeout=SECONDS)
            failed = done.returncode != 0
        except subprocess.TimeoutExpired:
            failed = True
            print(f"not all are through within {SECONDS} s")
        out.seek(0)
        text = out.read()
    for name, count in sorted(counted(text).items()):
        add(("tests", "pytest", name, count, ""))
    if failed:
        print(text[-3000:])
        raise SystemExit(1)


def counted(text: str) -> Counter[str]:
    """Return the number of each outcome, by the letters that ``pytest -q`` prints as it runs."""
    found = Counter[str]()
    for line in text.splitlines():
        if letters := re.fullmatch(r"([.FEsxX]+)(\s+\[\s*\d+%\])?", line):
            found.update(OUTCOMES.get(letter, "failed") for letter in letters[1])
    return found
