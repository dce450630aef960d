"""Prove that a refactoring changed nothing: compare digests of caches and students of two commits.

    python tests/benchmarks/digests.py record [--commit REV] --out FILE.json
    python tests/benchmarks/digests.py compare BASE [REV]

``record`` does all runs of ``digest_runs/`` with the code of a commit (or of the working tree) and
writes their digests. ``compare`` compares two commits; either may be a recorded file, and without
REV the second is the working tree. It exits with 0 if all are equal, with 1 and a line per
different digest, with 2 if there is nothing to compare: another processor, another torch, another
number of threads. A run of everything takes about 65 seconds of one core. A commit's code is used
only through the command line and the public paths, in a process of its own, so that its modules may
lie anywhere.

Of caches: each unit's Arrow file, byte by byte; its columns alone, which stay equal if only the
metadata changes; its commit record; every other file; what ``Cache`` decodes, by teacher. Of
students: the tensors of every safetensors file (weights, heads, the optimiser's in checkpoints),
metrics and all other JSON files, and the weights after ``Student`` loads and saves them. Of the
losses: values and gradients. Left out is what differs between two runs of one commit: seconds, and
checksums over them; names drawn for one attempt; TensorBoard's files.

``tests/golden/digests.json`` is such a file; ``tests/golden/test_digests.py`` compares the present
code with it. After changing numbers on purpose, record it again, and state in the commit's message
which digests changed and why. A new key of the configuration changes only the digests of settings:
``run.json`` and files that repeat it.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from digest_runs.material import write_material
from digest_runs.students import GROUPS, run_files, steps_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
THREADS = "1"
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "safetensors")
# in a record's ``about``; everything else there is about the machine
OF_THE_CODE = ("commit", "tree")
SHOWN = 40  # differences


class DigestsError(Exception):
    """An error that ends the program with exit code 2 and one message."""


def about_machine() -> dict[str, str]:
    """Return everything that may change numbers, except the code under test."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        known = {key.strip(): value.strip() for key, _, value in reversed(lines)}
        names = ("model name", "cpu family", "model")
        processor = " ".join(f"{known[name]}" for name in names if name in known) or processor
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": THREADS,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def git(*arguments: str) -> str:
    """Return the output of a git command in this repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise DigestsError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checkout_of(revision: str | None, folder: Path) -> Iterator[Path]:
    """Yield a folder with the code of a commit; None: the working tree as it is."""
    if revision is None:
        yield ROOT
        return
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    git("worktree", "add", "--detach", "--force", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def digests_of(checkout: Path, work: Path, groups: Sequence[str]) -> dict[str, str]:
    """Do the runs with the code in ``checkout``, in the folder ``work``; return the digests."""
    steps = work / "steps.json"
    steps.write_text(json.dumps(steps_of(groups)))
    for name in ("logs", "caches", "students"):
        (work / name).mkdir()
    # Commits from before the distribution was renamed ask for the version of `rekindle`.
    former = work / "former/rekindle-0.1.0.dist-info"
    former.mkdir(parents=True)
    (former / "METADATA").write_text("Metadata-Version: 2.1\nName: rekindle\nVersion: 0.1.0\n")
    alone = {f"{name}_NUM_THREADS": THREADS for name in ("OMP", "MKL", "OPENBLAS")}
    environment = os.environ | alone
    paths = (checkout / ".ns", former.parent)
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = work / "digests.json"
    command = [sys.executable, str(HERE / "digest_runs/subject.py"), str(checkout), str(steps)]
    done = subprocess.run([*command, str(result)], cwd=work, env=environment, stdout=2)
    if done.returncode:
        raise DigestsError(f"the runs of {checkout} ended with exit code {done.returncode}")
    found: dict[str, str] = json.loads(result.read_text())
    return found


def record(revision: str | None, groups: Sequence[str], keep: Path | None = None) -> dict:
    """Return the record of one commit: ``about`` it and the machine, and ``digests`` by name."""
    before = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="digests-") as temporary:
        work = Path(temporary) / "work"
        work.mkdir()
        write_material(work, run_files(groups))
        with checkout_of(revision, Path(temporary) / "checkout") as checkout:
            found = digests_of(checkout.resolve(), work, groups)
        if keep is not None:
            shutil.copytree(work, keep)
    commit = git("rev-parse", "--short", revision or "HEAD")
    about = about_machine() | {"commit": commit, "tree": "commit" if revision else "working tree"}
    print(f"{len(found)} digests in {time.monotonic() - before:.0f} s", file=sys.stderr)
    return {"about": about, "groups": list(groups), "digests": found}


def obstacle(base: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """Return why digests of two machines cannot be compared, if so; both are ``about`` of
    a record.
    """
    for name, value in base.items():
        if name not in OF_THE_CODE and other.get(name) != value:
            return f"{name}: {value} where the first was recorded, {other.get(name)} here"
    return None


def differences(base: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return a line per digest that differs."""
    found = []
    for name in sorted(base.keys() | other.keys()):
        if name not in other or name not in base:
            found.append(f"{'missing' if name not in other else 'new'}: {name}")
        elif base[name] != other[name]:
            found.append(f"differs: {name}")
    return found


def read_or_record(given: str | None, groups: Sequence[str]) -> dict:
    """Return the record in a file, or that of a commit or the working tree."""
    if given is not None and Path(given).is_file():
        read: dict = json.loads(Path(given).read_text())
        return read
    return record(given, groups)


def compare(base: str, revision: str | None, groups: Sequence[str] | None = None) -> list[str]:
    """Return the differences between two records, commits or the working tree (None).

    ``groups``: the runs of commits; None: those that ``base`` has, or all. With ``groups``, digests
    that only ``base`` has are no difference. Raises DigestsError if the two are of different
    machines.
    """
    first = read_or_record(base, groups or GROUPS)
    # Checked before minutes of runs are spent.
    if (reason := obstacle(first["about"], about_machine())) is not None:
        raise DigestsError(f"nothing to compare: {reason}")
    second = read_or_record(revision, groups or first["groups"])
    if (reason := obstacle(first["about"], second["about"])) is not None:
        raise DigestsError(f"nothing to compare: {reason}")
    theirs, ours = first["digests"], second["digests"]
    if groups is not None:
        theirs = {name: value for name, value in theirs.items() if name in ours}
    return differences(theirs, ours)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write the digests of one commit")
    recording.add_argument("--commit", help="default: the working tree")
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--keep", type=Path, help="also keep what was made, in a new folder")
    comparing = commands.add_parser("compare", help="compare two commits")
    comparing.add_argument("base", help="a recorded file or a commit")
    comparing.add_argument("revision", nargs="?", help="the same; default: the working tree")
    for command in (recording, comparing):
        command.add_argument("--only", nargs="+", choices=GROUPS, help="some of the runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    try:
        if given.command == "record":
            found = record(given.commit, given.only or GROUPS, given.keep)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            return 0
        different = compare(given.base, given.revision, given.only)
    except DigestsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    hidden = len(different) - SHOWN
    shown = different[:SHOWN] + ([f"… and {hidden} more"] if hidden > 0 else [])
    print("\n".join(shown or ["equal"]))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
