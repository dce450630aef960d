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
from rekindle.train.model.folder import base_of, resolve_model
from rekindle.train.record.checkpoint import TRAINER_FILE
from rekindle.train.step_config import recorded_steps
from rekindle.train.student import ABOUT_FILE

LINEAGE = "lineage"  # the key in ABOUT_FILE, TRAINER_FILE and EXPORT_FILE
EXPORT_FILE = "export.json"  # beside a student's head that was exported


def lineage_of_run(about: Mapping[str, Any], cache: Cache) -> Lineage:
    """The lineage of the student that a run makes; ``about`` as ``describe_run`` has it.

    The runs that made its teachers, then those that made the weights it starts from, then this one.
    """
    taught = [cache.teacher(name).info.lineage for name in about["cache"]["teachers"]]
    begun: Lineage = ()
    if not about["student"]["from_scratch"]:
        begun = lineage_of_model(resolve_model(about["student"]["model"]))
    return joined_lineage([*taught, begun, [_ancestor(about, recorded_steps(about))]])


def lineage_of_model(directory: Path, weights: str | None = None) -> Lineage:
    """The lineage of the model in ``directory``; empty for one that is not a student of ours. Of an
    adapter of others it is that of its base.

    ``weights``: their fingerprint, where it is known already. Raises InputError when what a student
    says of itself cannot be read.
    """
    try:
        found = _recorded(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{directory}: what the student says of its training is damaged "
            f"({type(error).__name__}: {error})"
        ) from None
    if found:
        return with_weights(found, weights or weights_fingerprint(directory))
    base = base_of(directory)
    return () if base is None else lineage_of_model(base)


def _recorded(directory: Path) -> Lineage:
    """What a run's directory, one of its checkpoints, or an export of either says."""
    where = str(directory)
    if (exported := directory / EXPORT_FILE).is_file():
        runs = json.loads(exported.read_text(encoding="utf-8"))[LINEAGE]
        return tuple(parse_settings(Ancestor, run, where) for run in runs)
    path = directory / ABOUT_FILE
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    trainer = directory / TRAINER_FILE
    steps = None
    if not about.get("made_by") and trainer.is_file():  # a checkpoint
        state = unseal(json.loads(trainer.read_bytes()), TRAINER_FILE)
        about, steps = {"made_by": state, LINEAGE: state.get(LINEAGE, [])}, state["step"]
    if not (made_by := about.get("made_by")):
        return ()
    earlier = [parse_settings(Ancestor, one, where) for one in about.get(LINEAGE, [])[:-1]]
    return (*earlier, _ancestor(made_by, steps or recorded_steps(made_by)))


def _ancestor(about: Mapping[str, Any], steps: int | None) -> Ancestor:
    assert steps is not None, "a run that has begun has its steps"
    return Ancestor(
        corpus=about["cache"]["corpus"],
        teachers=about["cache"]["teachers"],
        steps=steps,
        student=about["student"]["model"],
    )
