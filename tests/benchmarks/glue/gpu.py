"""Knowledge rekindle on GLUE with minutes of a GPU: packs the inputs and does the run.

    python tests/benchmarks/glue/gpu.py inputs shared/data models/minilm-mlm glue-inputs
    python tests/benchmarks/glue/gpu.py run glue-inputs --out runs/glue-gpu --rows rows

``inputs`` writes one folder with everything that glue.yaml names, below 60 MB: the start model in
half precision (every arm starts from that), the tasks' files, the beginning of the text. ``run``
needs only that folder and this repository. It works on several draws of the labels at a time; the
rows of each are recorded and copied to ``--rows`` as soon as it is finished. Run the same command
to continue: in the same ``--out`` it continues where it stopped, elsewhere with the draws that are
not recorded in ``cells.jsonl`` beside this file (bring the copied one back). ``--seconds`` ends it
cleanly.
"""

import argparse
import gzip
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "pages"))

from record import CELLS, Origin, plan_of, read_rows, record  # noqa: E402

from rekindle.data.errors import RekindleError  # noqa: E402
from rekindle.pipeline.cycle.search import DRAWS_FOLDER  # noqa: E402

MOST_BYTES = 60_000_000  # for all inputs
TEXT_BYTES = 12_000_000  # of the unlabelled text before it is packed: some 41,000 sequences of 64
MOST_ROWS = 20_000  # of a train set, of which each draw takes one or two thousand
TASKS = ("cola", "sst2", "mrpc", "stsb")
ENDS_WITHIN = 60.0  # seconds that a cycle has to save its work
COMMIT = "commit.txt"
MODEL_FILES = ("config.json", "token*", "vocab*", "merges*", "special_tokens*", "*.index.json")

Command = Callable[[Path, Path, int, int], Sequence[str]]


# --- what is carried ------------------------------------------------------------------------------


def write_inputs(shared: Path, model: Path, out: Path) -> int:
    """Write the folder of inputs; return its bytes. Raises SystemExit if they are too many."""
    if out.exists():
        raise SystemExit(f"{out} is there already; give another folder, or remove it")
    out.mkdir(parents=True)
    write_text(shared / "corpus" / "wiki_train.jsonl", out / "wiki.jsonl.gz")
    for task in TASKS:
        shutil.copy(shared / "glue" / f"{task}_dev.jsonl", out)
        lines = (shared / "glue" / f"{task}_train.jsonl").read_text(encoding="utf-8").splitlines()
        if len(lines) > MOST_ROWS:
            lines = random.Random(0).sample(lines, MOST_ROWS)
        text = "".join(f"{line}\n" for line in lines)
        (out / f"{task}_train.jsonl").write_text(text, encoding="utf-8")
    halve(model, out / "model")
    (out / COMMIT).write_text(Origin.here().commit + "\n")
    size = size_of(out)
    if size >= MOST_BYTES:
        raise SystemExit(
            f"{out} has {size / 1e6:.1f} MB, and is to have less than 60: cut the text"
        )
    return size


def write_text(source: Path, out: Path) -> None:
    """Write the first records of the text, packed; equal records give equal bytes."""
    left, kept = TEXT_BYTES, []
    with open(source, "rb") as file:
        for line in file:
            if (left := left - len(line)) < 0:
                break
            kept.append(line)
    out.write_bytes(gzip.compress(b"".join(kept), 9, mtime=0))


def halve(model: Path, out: Path) -> None:
    """Write the model with its weights in half precision: half the bytes."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for file in sorted(file for pattern in MODEL_FILES for file in model.glob(pattern)):
        shutil.copy(file, out)
    for file in model.glob("model*.safetensors"):  # an optimizer's state is not copied
        weights = load_file(file)
        small = {k: w.half() if w.dtype == torch.float32 else w for k, w in weights.items()}
        save_file(small, out / file.name, metadata={"format": "pt"})


def size_of(folder: Path) -> int:
    """Return the bytes of all files in the folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- the run --------------------------------------------------------------------------------------


def cycle_command(table: Path, out: Path, draw: int, workers: int) -> list[str]:
    """Return the command line of one draw of the labels."""
    start = [sys.executable, "-c", "from rekindle.pipeline.cli import main; main()", "rekindle"]
    where = [str(table / f"{table.name}.yaml"), "--out", str(out), "--draw", str(draw)]
    return [*start, *where, "--workers", str(workers)]


def run(
    inputs: Path,
    out: Path,
    rows: Path,
    *,
    at_once: int = 3,
    workers: int = 5,
    seconds: float | None = None,
    table: Path = HERE,
    command: Command = cycle_command,
) -> bool:
    """Run the draws that are not recorded, ``at_once`` at a time; return whether all are recorded
    then.

    A draw that fails is tried once more: two that begin at the same time may collide in the folder.
    """
    config, origin = plan_of(table), _origin(inputs)
    cells = {(one["draw"], one["task"]) for one in read_rows(table)}
    names = [task.name for task in config.tasks]
    draws = range(config.label_draws)
    waiting = [d for d in draws if any((d, name) not in cells for name in names)]
    until = None if seconds is None else time.monotonic() + seconds
    running: dict[subprocess.Popen[bytes], int] = {}
    failed: Counter[int] = Counter()
    rows.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                draw = waiting.pop(0)
                process = subprocess.Popen(command(table, out, draw, workers), cwd=inputs)
                running[process] = draw
                _wait_for(process, out / DRAWS_FOLDER / str(draw) / "cycle.json", until)
            for process in [one for one in running if one.poll() is not None]:
                draw = running.pop(process)
                keep(table, out, rows, origin)
                if process.returncode and not failed[draw]:
                    waiting.append(draw)
                failed[draw] += process.returncode != 0
            if until is not None and time.monotonic() > until:
                end(list(running))
                keep(table, out, rows, origin)
                break
            time.sleep(0.1)
    finally:  # whatever ends it, such as rows of another table
        end([one for one in running if one.poll() is None])
    return len(read_rows(table)) == len(draws) * len(names)


def _wait_for(process: "subprocess.Popen[bytes]", begun: Path, until: float | None) -> None:
    """Wait until the draw has begun, has ended, or the time is over."""
    while process.poll() is None and not begun.exists():
        if until is not None and time.monotonic() > until:
            return
        time.sleep(0.1)


def end(running: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Ask the processes to save their work; kill those that do not end in time."""
    for process in running:
        process.terminate()
    until = time.monotonic() + ENDS_WITHIN
    for process in running:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def keep(table: Path, out: Path, rows: Path, origin: Origin) -> None:
    """Record the finished cells, and copy all rows to a safe place."""
    if (out / DRAWS_FOLDER).is_dir():
        print("\n".join(record(table, out, origin)), flush=True)
    if (table / CELLS).exists():
        shutil.copy(table / CELLS, rows)


def _origin(inputs: Path) -> Origin:
    """Return this machine, and the commit that the inputs were written with: there may be no git
    here.
    """
    written = inputs / COMMIT
    origin = Origin.here()
    return replace(origin, commit=written.read_text().strip()) if written.exists() else origin


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True, dest="part")
    one = parts.add_parser("inputs", help="write the folder of inputs for the GPU")
    for name in ("shared", "model", "out"):
        one.add_argument(name, type=Path)
    one = parts.add_parser("run", help="run what is not yet recorded")
    one.add_argument("inputs", type=Path)
    one.add_argument("--out", type=Path, default=Path("runs/glue-gpu"))
    one.add_argument(
        "--rows", type=Path, required=True, help="where rows are copied as they are finished"
    )
    one.add_argument("--at-once", type=int, default=3, help="draws at a time")
    one.add_argument("--workers", type=int, default=5, help="jobs at a time of each draw")
    one.add_argument("--seconds", type=float, help="end cleanly after this many")
    given = parser.parse_args()
    if given.part == "inputs":
        size = write_inputs(given.shared, given.model, given.out)
        print(f"{given.out}: {size / 1e6:.1f} MB")
        return
    out, rows = given.out.resolve(), given.rows.resolve()
    how = {"at_once": given.at_once, "workers": given.workers, "seconds": given.seconds}
    try:
        done = run(given.inputs.resolve(), out, rows, **how)
    except RekindleError as error:
        sys.exit(f"error: {error}")
    if not done:
        sys.exit("not all draws are recorded: the same command goes on")
    print(json.dumps({"recorded": len(read_rows(HERE)), "rows": str(rows / CELLS)}))


if __name__ == "__main__":
    main()
