"""The lineage of a student: written beside its weights, read when it is cached as a teacher."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.seal import unseal
from rekindle.data.targets.lineage import Ancestor, Lineage, joined_lineage, with_weights
from rekindle.train.model.files import weights_fingerprint
from rekindle.train.model.folder import base_of, read_object, resolve_model
from rekindle.train.record.checkpoint import TRAINER_FILE
from rekindle.train.step_config import recorded_steps
from rekindle.train.student import ABOUT_FILE

LINEAGE = "lineage"  # the key in ABOUT_FILE, TRAINER_FILE and EXPORT_FILE
EXPORT_FILE = "export.json"  # beside an exported head


def lineage_of_run(about: Mapping[str, Any], cache: Cache) -> Lineage:
    """Return the lineage of the student that a run makes; ``about`` as from ``describe_run``.

    First the runs that made its teachers, then those that made its initial weights, then this one.
    """
    teachers = [cache.teacher(name).info.lineage for name in about["cache"]["teachers"]]
    initial: Lineage = ()
    if not about["student"]["from_scratch"]:
        initial = lineage_of_model(resolve_model(about["student"]["model"]))
    return joined_lineage([*teachers, initial, [_ancestor(about, recorded_steps(about))]])


def lineage_of_model(directory: Path, weights: str | None = None) -> Lineage:
    """Return the lineage of the model in ``directory``; empty unless it is a student of ours. For
    an adapter from elsewhere it is its base's.

    ``weights``: their fingerprint, if already known. Raises InputError if a student's record cannot
    be read.
    """
    try:
        recorded = _recorded_lineage(directory)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{directory}: the student's record of its training is damaged "
            f"({type(error).__name__}: {error})"
        ) from None
    if recorded:
        return with_weights(recorded, weights or weights_fingerprint(directory))
    base = base_of(directory)
    return () if base is None else lineage_of_model(base)


def _recorded_lineage(directory: Path) -> Lineage:
    """Return what is recorded in a run's directory, one of its checkpoints, or an export
    of either.
    """
    if (exported := directory / EXPORT_FILE).is_file():
        return _named_runs(exported, read_object(exported))
    path = directory / ABOUT_FILE
    about = read_object(path) if path.is_file() else {}
    trainer = directory / TRAINER_FILE
    steps = None
    if not about.get("made_by") and trainer.is_file():  # a checkpoint
        state = unseal(json.loads(trainer.read_bytes()), TRAINER_FILE)
        about, steps = {"made_by": state, LINEAGE: state.get(LINEAGE, [])}, state["step"]
        path = trainer
    if not (made_by := about.get("made_by")):
        return ()
    return (*_named_runs(path, about)[:-1], _ancestor(made_by, steps or recorded_steps(made_by)))


def _named_runs(path: Path, about: Mapping[str, Any]) -> Lineage:
    """Return the runs that a file names."""
    runs = about.get(LINEAGE, [])
    if not isinstance(runs, list):
        raise InputError(f"{path}: {LINEAGE} is {runs!r:.200}, not a list of runs")
    return tuple(parse_settings(Ancestor, run, f"{path}, {LINEAGE}") for run in runs)


def _ancestor(about: Mapping[str, Any], steps: int | None) -> Ancestor:
    assert steps is not None, "a run that has begun has its steps"
    return Ancestor(
        corpus=about["cache"]["corpus"],
        teachers=about["cache"]["teachers"],
        steps=steps,
        student=about["student"]["model"],
    )
