"""A training run's checkpoints: complete or absent, safetensors and JSON only.

``checkpoints/step-00000200/`` is a student directory with its tokenizer, plus
``optimizer.safetensors`` and ``trainer.json``, which has the position, the configuration, the
cache's fingerprints, a sha256 of each file and a checksum of itself. It is written under a
temporary name and renamed, so a kill leaves a complete checkpoint or none. Tensors are stored
whole, so a run may continue with another number of processes. A large sharded student is stored in
several files (``sharded``).

Version 1 (without a number) used the tensor names of the family's published files, which for some
families differ from the student's, and one file of moments.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import CacheFormatError, CheckpointError, InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.data.storage.addresses import sha256_of
from rekindle.data.storage.atomic import new_folder, remove, remove_leftovers
from rekindle.data.storage.seal import describe_damage, seal, unseal
from rekindle.train.distributed import ParallelStudent, World
from rekindle.train.model.unfinished import SUMMARY_FILE, checkpoints_of
from rekindle.train.record.identity import had_checkpoint, note_checkpoint
from rekindle.train.record.run_log import read_metrics
from rekindle.train.record.sharded import (
    check_visible,
    checkpoint_file_size,
    read_rows,
    write_files,
    write_student,
)
from rekindle.train.record.stored_run import remove_other_checkpoints, upload_checkpoint
from rekindle.train.student import SavedTensor, Student, saved_tensors

log = logging.getLogger("rekindle")

TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
MOMENTS = (OPTIMIZER_FILE, "optimizer-*-of-*.safetensors")
VERSION = 2


class _Best(Settings):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    step: int = Field(ge=0)
    name: str = ""
    value: float = 0.0


class _Record(Settings):
    """The types of a checkpoint's record; older ones have fewer keys."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    step: int = Field(ge=0)
    files: dict[str, str]
    seconds: float = 0.0
    coverage: dict[str, int] | None = None
    best: _Best | None = None


def restore(
    run: Path, student: ParallelStudent, optimizer: torch.optim.Optimizer, keep: int
) -> dict[str, Any]:
    """Load the newest sound checkpoint in every process; return its state, which is empty for a run
    that was interrupted before its first one. Of the older checkpoints the last ``keep`` stay, as
    in ``save_checkpoint``: a kill may have come before it removed the others.

    Raises CheckpointError if there were checkpoints and none is left or sound: their steps would
    silently be trained again.
    """
    newest = _newest_checkpoint(run, student.world)
    if newest is None:
        log.info("no sound checkpoint in %s; starting from the beginning", run)
        return {}
    path, state = newest
    load_checkpoint(path, student.student, optimizer)
    student.world.decide(lambda: _remove_older(path, state, keep))
    log.info("resuming %s at step %d", run, state["step"])
    return state


def save_checkpoint(
    run: Path,
    step: int,
    student: ParallelStudent,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write the checkpoint of ``step`` (steps done), including the ``tokenizer``, so that it is a
    complete model; remove all but the last ``keep`` and the best, ``state["best"]["step"]``. Every
    process takes part; the main one writes, and each one writes its files of a sharded student.
    """
    wrapped, world, target = student.student, student.world, checkpoint_folder(run, step)
    with ExitStack() as resources:  # the main process holds the folder until it has its name
        staged = world.decide(lambda: resources.enter_context(new_folder(target)))
        written: dict[str, str] = {}
        if student.sharded:
            limit = checkpoint_file_size(wrapped.state_dict().values(), world)
            written = write_student(student, staged, as_held=True, limit=limit)
            units = [{key: value} for key, value in _moments(wrapped, optimizer).items()]
            written |= write_files(world, units, limit, staged / OPTIMIZER_FILE, save_file)
        digests = {name: one for found in world.gather(written) for name, one in found.items()}

        def finish() -> Path:
            check_visible(staged, digests)
            if not student.sharded:
                wrapped.save_pretrained(staged, as_held=True)
                moments = _moments(wrapped, optimizer)
                save_file({k: v.contiguous() for k, v in moments.items()}, staged / OPTIMIZER_FILE)
            if tokenizer is not None:
                tokenizer.save(str(staged))
            unlisted = [f for f in staged.iterdir() if f.is_file() and f.name not in digests]
            files = digests | {f.name: sha256_of(f) for f in unlisted}
            record = {"version": VERSION, "step": step, "files": dict(sorted(files.items()))}
            (staged / TRAINER_FILE).write_bytes(seal(dict(state) | record))
            files[TRAINER_FILE] = sha256_of(staged / TRAINER_FILE)
            resources.close()
            note_checkpoint(run)
            upload_checkpoint(target, files)
            remove_leftovers(target.parent)
            _remove_older(target, state, keep)
            return target

        return world.decide(finish)


def _remove_older(newest: Path, state: Mapping[str, Any], keep: int) -> None:
    """Keep the last ``keep`` checkpoints, and the best."""
    best, run = (state.get("best") or {}).get("step"), newest.parents[1]
    # A newer one is damaged, or the run would have continued from it; it must not count among them.
    checkpoints = [path for path in checkpoints_of(run) if path.name <= newest.name]
    for old in checkpoints[:-keep]:
        if best is None or old != checkpoint_folder(run, best):
            remove(old)
    remove_other_checkpoints(
        newest, keep, None if best is None else checkpoint_folder(run, best).name
    )


def _newest_checkpoint(run: Path, world: World) -> tuple[Path, dict[str, Any]] | None:
    world.decide(lambda: remove_leftovers(run / "checkpoints"))
    newest = latest_checkpoint(run, world)
    if newest is None:
        world.decide(lambda: _check_none_lost(run))
    return newest


def _check_none_lost(run: Path) -> None:
    """Raise CheckpointError if there were checkpoints."""
    damaged = ", ".join(path.name for path in checkpoints_of(run))
    steps = max((r["step"] for r in read_metrics(run) if r["kind"] == "train"), default=0)
    if not damaged and not had_checkpoint(run, steps) and not (run / SUMMARY_FILE).exists():
        return
    problem = (
        f"none of its checkpoints is sound ({damaged})" if damaged else "its checkpoints are gone"
    )
    raise CheckpointError(
        f"{run} cannot continue: {problem}; metrics.jsonl records {steps} steps. Restore a "
        "checkpoint from a copy, or train again from the beginning: in another --out, or after "
        f"removing {run}"
    )


def latest_checkpoint(run: Path, world: World | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest sound checkpoint and its state; skip damaged ones with a warning.

    Each process of a ``world`` reads a share of the files. Raises CheckpointError for one written
    by a newer version.
    """
    world = world or World.alone()
    for path in world.decide(lambda: checkpoints_of(run)[::-1]):
        state, problem = world.decide(partial(_state_of, path))
        if not problem:
            names = sorted(state["files"])[world.rank :: world.size]
            problem = next(filter(None, world.gather(_damage_of(path, state, names))), "")
        if not problem:
            return path, state
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, problem)
    return None


def _state_of(path: Path) -> tuple[dict[str, Any], str]:
    """Return a checkpoint's record, or what is wrong with it."""
    try:
        state = unseal(json.loads((path / TRAINER_FILE).read_bytes()), TRAINER_FILE)
        version = state.get("version", 1)
        dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, str(error) or type(error).__name__
    except CacheFormatError as error:
        return {}, describe_damage(error)
    if version not in range(1, VERSION + 1):
        raise CheckpointError(
            f"checkpoint {path} has version {version!r}; this version of Rekindle reads up to "
            f"{VERSION}. Continue with the newer Rekindle that wrote it"
        )
    try:
        parse_settings(_Record, state)
    except InputError as error:
        return {}, f"{TRAINER_FILE}: {error}"
    if path != checkpoint_folder(path.parents[1], state["step"]):
        return {}, f"{TRAINER_FILE} is of step {state['step']}"
    return state, ""


def _damage_of(path: Path, state: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return which of a checkpoint's files differs from what was written, if any."""
    try:
        return next((n for n in names if sha256_of(path / n) != state["files"][n]), "")
    except OSError as error:
        return str(error)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return run / "checkpoints" / f"step-{step:08d}"


def describe_kept(run: Path) -> str:
    """Return what a run can continue from."""
    checkpoints = checkpoints_of(run)
    return (
        f"Kept: {checkpoints[-1]}" if checkpoints else "There is no checkpoint yet: it starts again"
    )


def describe_left(run: Path) -> tuple[str, bool]:
    """Return what is left of ``run`` after an interrupt without a checkpoint, and whether it is
    anything.
    """
    checkpoints = checkpoints_of(run)
    if not checkpoints:
        return "there is no checkpoint yet", False
    return f"kept: {checkpoints[-1]}", True


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights and optimiser state exactly; for a sharded student only the rows that this
    process holds are read.
    """
    weights = student.own_weights()
    try:
        stored = saved_tensors(path)
        files = [file for pattern in MOMENTS for file in sorted(path.glob(pattern))]
        moments = {key: saved for file in files for key, saved in SavedTensor.all_in(file).items()}
        if not files:
            raise InputError(f"it has no {OPTIMIZER_FILE}")
        tied = {f"model.{k}" for k in getattr(student.model, "all_tied_weights_keys", None) or ()}
        misfits = sorted((weights.keys() - stored.keys() - tied) | (stored.keys() - weights.keys()))
        misfits += [k for k, v in stored.items() if k in weights and weights[k].shape != v.shape]
        if misfits:
            names = ", ".join(misfits)
            raise CheckpointError(f"checkpoint {path} does not fit this student: {names}")
        read_rows(stored, weights)
        read_rows(moments, _optimizer_tensors(moments, student, optimizer))
    except (OSError, InputError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None


def _optimizer_tensors(
    moments: Mapping[str, SavedTensor], student: Student, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Make room in the optimiser for its stored state: like the parameter, and sharded if it is
    (AdamW's ``step`` is one number).
    """
    parameters, tensors = dict(student.named_parameters()), dict[str, Tensor]()
    for key, saved in moments.items():
        name, kind = key.split("\0")
        parameter = parameters[name].detach()
        is_like_parameter = saved.shape == parameter.shape and kind != "step"
        tensors[key] = (
            torch.zeros_like(parameter)
            if is_like_parameter
            else torch.zeros(saved.shape, device=parameter.device)
        )
        optimizer.state[parameters[name]][kind] = tensors[key]
    return tensors


def _moments(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's tensors, sharded where the parameters are."""
    return {
        f"{name}\0{key}": value.detach()
        for name, parameter in student.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
