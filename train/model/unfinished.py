"""The folder of an unfinished training run: what to report if it is given as a model."""

import json
import re
import shlex
from pathlib import Path

from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.train.step_config import recorded_steps

RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"
_OWN = re.compile(r"step-\d{8,}")  # the names of checkpoints


def checkpoints_of(run: Path) -> list[Path]:
    """Return the run's own checkpoints, the newest last. Other things beside them, a copy or an
    archive, are the user's.
    """
    found = (run / "checkpoints").glob("step-*")
    return sorted(path for path in found if _OWN.fullmatch(path.name) and path.is_dir())


def unfinished(run: Path) -> str | None:
    """Return how far a run came and how to continue it; None if it is not a run, or is finished."""
    if not (run / RUN_FILE).is_file() or (run / SUMMARY_FILE).is_file():
        return None
    try:
        steps = recorded_steps(json.loads((run / RUN_FILE).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        steps = None  # --resume reports what is wrong with it
    found = checkpoints_of(run)
    of = f" of {steps}" if steps else ""
    far = f"step {int(found[-1].name[5:])}{of}" if found else "no checkpoint yet"
    again = f"`pipeline train-student … --out {shlex.quote(str(run))} --resume`"
    return f"{run} is not finished ({far}): go on with {again}"


def usable_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint if it is a model with its tokenizer: older versions
    saved none.
    """
    found = checkpoints_of(run)
    return found[-1] if found and has_tokenizer_files(found[-1]) else None
