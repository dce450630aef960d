"""Several runs in one folder: what its record says of each, and which of them are finished.

OUT/stages.json or OUT/sweep.json   the definition: every run's configuration
OUT/NAME/                           a run as ``pipeline train-student`` leaves it
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rekindle.data.errors import CheckpointError
from rekindle.train.record.run_folder import FREE, check_same, read_record, reading

STAGES_FILE, SWEEP_FILE = "stages.json", "sweep.json"
SECTIONS = ("student", "train")  # of a run's configuration: they say which student it is
Recorded = Mapping[str, Mapping[str, Any]]  # what is recorded of each run, by its name


def read_runs(directory: Path, file: str) -> Recorded | None:
    """What the definition ``file`` says of each run in ``directory``; None where there is none.

    Raises CheckpointError when it is damaged.
    """
    path, advice = directory / file, "start again in another --out"
    if (found := read_record(path, advice)) is None:
        return None
    with reading(path, advice):
        if file == STAGES_FILE:
            return {str(stage["name"]): dict(stage) for stage in found["stages"]}
        return {
            run["name"]: {"corpus": found["corpus"], **{key: run[key] for key in SECTIONS}}
            for run in found["runs"]
        }


def check_same_runs(out: Path, before: Recorded, now: Recorded, stranger: str, rule: str) -> None:
    """Raise CheckpointError unless the runs ``now`` are those that were begun ``before``, and more.

    ``stranger`` says what ``{name}`` is that is none of them, ``rule`` what to do.
    """
    for name, recorded in before.items():
        if name not in now:
            raise CheckpointError(f"{out} {stranger.format(name=name)}. {rule}")
        check_same(out / name, recorded, now[name], rule, FREE)


def is_finished(directory: Path) -> bool:
    """Whether ``directory`` has all that a finished run leaves; its run.yaml is written last."""
    from rekindle.train.student import ABOUT_FILE

    files = ("config.json", ABOUT_FILE, "summary.json", "run.yaml")
    weights = any(directory.glob("*.safetensors"))
    return weights and all((directory / name).is_file() for name in files)
