"""The folder of an unfinished training run: what to report if it is given as a model."""

import json
import re
import shlex
from pathlib import Path

from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.train.step_config import recorded_steps

RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"
_CHECKPOINT_NAME = re.compile(r"step-\d{8,}")  # the names of checkpoints


def checkpoints_of(run: Path) -> list[Path]:
    """Return the run's own checkpoints, the newest last. Other things beside them, a copy or an
    archive, are the user's.
    """
    folders = (run / "checkpoints").glob("step-*")
    return sorted(
        path for path in folders if _CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
    )


def describe_unfinished(run: Path) -> str | None:
    """Return how far a run came and how to continue it; None if it is not a run, or is finished."""
    if not (run / RUN_FILE).is_file() or (run / SUMMARY_FILE).is_file():
        return None
    try:
        steps = recorded_steps(json.loads((run / RUN_FILE).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        steps = None  # --resume reports what is wrong with it
    checkpoints = checkpoints_of(run)
    total = f" of {steps}" if steps else ""
    progress = (
        f"step {int(checkpoints[-1].name[5:])}{total}" if checkpoints else "no checkpoint yet"
    )
    resume_command = f"`pipeline train-student … --out {shlex.quote(str(run))} --resume`"
    return f"{run} is not finished ({progress}): go on with {resume_command}"


def usable_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint if it is a model with its tokenizer: older versions
    saved none.
    """
    checkpoints = checkpoints_of(run)
    return checkpoints[-1] if checkpoints and has_tokenizer_files(checkpoints[-1]) else None
