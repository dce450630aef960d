"""Checkpoints of a training run: whole or not there, safetensors and JSON only.

``checkpoints/step-00000200/`` is a student directory plus ``optimizer.safetensors`` and ``trainer.json``. It is
written under a temporary name and renamed, so a kill leaves either the whole or nothing that is looked at.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rekindle.data.errors import CheckpointError
from rekindle.train.student import HEADS_FILE, Student

log = logging.getLogger("rekindle")

TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"


def save_checkpoint(
    run: Path,
    step: int,
    student: Student,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` (steps done) and remove all but the last ``keep``."""
    folder = run / "checkpoints"
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    student.save_pretrained(temporary)
    save_file(_optimizer_tensors(student, optimizer), temporary / OPTIMIZER_FILE)
    digests = {f.name: _sha256(f) for f in sorted(temporary.iterdir()) if f.is_file()}
    content = dict(state) | {"step": step, "files": digests}
    (temporary / TRAINER_FILE).write_text(json.dumps(content, indent=1) + "\n")
    for file in temporary.iterdir():
        _sync(file)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    _sync(folder)
    for old in _checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint and its state; damaged ones are passed over with a message."""
    for path in reversed(_checkpoints(run)):
        try:
            state = json.loads((path / TRAINER_FILE).read_text())
            damaged = [n for n, digest in state["files"].items() if _sha256(path / n) != digest]
        except (OSError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
            continue
        if not damaged:
            return path, state
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, damaged[0])
    return None


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimiser state back in place, exactly."""
    try:
        weights = load_file(path / "model.safetensors")
        missing, unexpected = student.model.load_state_dict(weights, strict=False)
        tied = set(getattr(student.model, "all_tied_weights_keys", None) or ())
        if set(missing) - tied or unexpected:
            raise KeyError(sorted(set(missing) - tied) + unexpected)
        student.heads.load_state_dict(load_file(path / HEADS_FILE))
        moments = load_file(path / OPTIMIZER_FILE)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit this student: {error}") from None
    for name, parameter in student.named_parameters():
        found = {k.split("\0")[1]: v for k, v in moments.items() if k.split("\0")[0] == name}
        if found:
            optimizer.state[parameter] = {k: v.to(_home(k, parameter)) for k, v in found.items()}


def _home(name: str, parameter: Tensor) -> torch.device:
    return torch.device("cpu") if name == "step" and not parameter.is_cuda else parameter.device


def _optimizer_tensors(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}\0{key}"] = value.detach().clone().contiguous()
    return tensors


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
