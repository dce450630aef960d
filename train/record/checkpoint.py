"""A training run's checkpoints: whole or not there, safetensors and JSON only.

``checkpoints/step-00000200/`` is a student directory with its tokenizer, plus
``optimizer.safetensors`` and ``trainer.json``, which holds the position, the configuration, the
cache's fingerprints, a sha256 of each file and a checksum of itself. It is written under a
temporary name and renamed, so a kill leaves either the whole or nothing that is looked at. Weights
are stored whole: a run may go on in another number of processes.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import CacheFormatError, CheckpointError, InputError
from rekindle.data.storage.atomic import new_folder, remove, remove_leftovers
from rekindle.data.storage.seal import damage, seal, unseal
from rekindle.train.distributed import ParallelStudent, like, whole
from rekindle.train.model.unfinished import SUMMARY_FILE, checkpoints_of
from rekindle.train.record.identity import had_checkpoint, note_checkpoint
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student, saved_weights

log = logging.getLogger("rekindle")

TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"


def restore(
    run: Path, student: ParallelStudent, optimizer: torch.optim.Optimizer, keep: int
) -> dict[str, Any]:
    """Load the newest sound checkpoint in every process; returns its state, which is empty for a
    run that was interrupted before its first one. Of the older ones the last ``keep`` stay, as
    ``save_checkpoint`` leaves them: a kill may have come before it had removed the others.

    Raises CheckpointError where there were some, and none is left or sound: what they held would be
    trained again, without a word.
    """
    found = student.world.decide(lambda: _newest(run))
    if found is None:
        log.info("no sound checkpoint in %s; starting from the beginning", run)
        return {}
    path, state = found
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
    """Write the checkpoint of ``step`` (steps done), with the ``tokenizer`` that makes it a model
    of its own; remove all but the last ``keep``, and the best, that of ``state["best"]["step"]``.
    Every process takes part, the main one writes.
    """
    weights = gather_weights(student.student) if student.sharded else None
    moments = _optimizer_tensors(student.student, optimizer)
    target = checkpoint_folder(run, step)

    def write() -> Path:
        with new_folder(target) as staged:
            student.student.save_pretrained(staged, tensors=weights)
            if tokenizer is not None:
                tokenizer.save(str(staged))
            save_file(moments, staged / OPTIMIZER_FILE)
            digests = {f.name: _sha256(f) for f in sorted(staged.iterdir()) if f.is_file()}
            content = dict(state) | {"step": step, "files": digests}
            (staged / TRAINER_FILE).write_bytes(seal(content))
        note_checkpoint(run)
        remove_leftovers(target.parent)
        _remove_older(target, state, keep)
        return target

    return student.world.decide(write)


def _remove_older(newest: Path, state: Mapping[str, Any], keep: int) -> None:
    """Leave the last ``keep`` checkpoints, and the best."""
    best, run = (state.get("best") or {}).get("step"), newest.parents[1]
    # A newer one is damaged, or it would have been gone on with: it must not take a place.
    done = [path for path in checkpoints_of(run) if path.name <= newest.name]
    for old in done[:-keep]:
        if best is None or old != checkpoint_folder(run, best):
            remove(old)


def _newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    remove_leftovers(run / "checkpoints")
    found = latest_checkpoint(run)
    if found is not None:
        return found
    damaged = ", ".join(path.name for path in checkpoints_of(run))
    steps = max((r["step"] for r in read_metrics(run) if r["kind"] == "train"), default=0)
    if not damaged and not had_checkpoint(run, steps) and not (run / SUMMARY_FILE).exists():
        return None
    told = (
        f"none of its checkpoints is sound ({damaged})" if damaged else "its checkpoints are gone"
    )
    raise CheckpointError(
        f"{run} cannot go on: {told}; metrics.jsonl tells of {steps} steps. Put a copy of a "
        f"checkpoint back, or train again from the beginning: in another --out, or after removing "
        f"{run}"
    )


def latest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint and its state; damaged ones are passed over with a message."""
    for path in reversed(checkpoints_of(run)):
        try:
            state = unseal(json.loads((path / TRAINER_FILE).read_bytes()), TRAINER_FILE)
            damaged = [n for n, digest in state["files"].items() if _sha256(path / n) != digest]
            if not damaged:
                return path, state
            problem = damaged[0]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = str(error)
        except CacheFormatError as error:
            problem = damage(error)
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, problem)
    return None


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def kept_of(run: Path) -> str:
    """Say what there is of a run to go on from."""
    found = checkpoints_of(run)
    return f"Kept: {found[-1]}" if found else "There is no checkpoint yet: it begins again"


def left_by_interrupt(run: Path) -> tuple[str, bool]:
    """What an interrupt that wrote no checkpoint of ``run`` leaves, and whether it is anything."""
    found = checkpoints_of(run)
    if not found:
        return "there is no checkpoint yet", False
    return f"kept: {found[-1]}", True


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimiser state back in place, exactly; in shards where they are."""
    try:
        found = saved_weights(path)
        moments = load_file(path / OPTIMIZER_FILE)
    except (OSError, InputError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    own = student.state_dict(keep_vars=True)
    tied = {f"model.{k}" for k in getattr(student.model, "all_tied_weights_keys", None) or ()}
    wrong = sorted((own.keys() - found.keys() - tied) | (found.keys() - own.keys()))
    wrong += [k for k, v in found.items() if k in own and own[k].shape != v.shape]
    if wrong:
        raise CheckpointError(f"checkpoint {path} does not fit this student: {', '.join(wrong)}")
    for name, values in found.items():
        own[name].detach().copy_(like(own[name], values))
    for name, parameter in student.named_parameters():
        kept = {k.split("\0")[1]: v for k, v in moments.items() if k.split("\0")[0] == name}
        if kept:
            optimizer.state[parameter] = {k: like(parameter, v, k) for k, v in kept.items()}


def gather_weights(student: Student) -> dict[str, Tensor]:
    """All weights put together, on the CPU; every process takes part. Tied ones stay tied."""
    made: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            made[id(tensor)] = whole(tensor.detach()).cpu()
        weights[name] = made[id(tensor)]
    return weights


def _optimizer_tensors(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found = whole(value.detach())
            # Put together one at a time: twice the whole student has no room on a device of many.
            found = found if found is value else found.cpu()
            tensors[f"{name}\0{key}"] = found.contiguous()
    return tensors


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
