"""A training run's identity and checkpoints: whole or not there, safetensors and JSON only.

``run.json`` says what the run is; a resume under another configuration is refused.

``checkpoints/step-00000200/`` is a student directory plus ``optimizer.safetensors`` and
``trainer.json``, which holds the position, the configuration, the cache's fingerprints, a sha256 of
each file and a checksum of itself. It is written under a temporary name and renamed, so a kill
leaves either the whole or nothing that is looked at. Weights are stored whole: a run may go on in
another number of processes.
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

from rekindle.data.errors import CacheFormatError, CheckpointError, InputError
from rekindle.data.settings import Settings, parse_settings
from rekindle.data.storage.seal import damage, seal, unseal
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import ParallelStudent, like, put, whole
from rekindle.train.method import find_method
from rekindle.train.student import MODEL, Student, own_weights

log = logging.getLogger("rekindle")

RUN_FILE = "run.json"
TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
SECTIONS: dict[str, type[Settings]] = {"student": StudentConfig, "train": TrainConfig}
# What may differ when a run goes on. The cache may have moved (its fingerprints say whether it is
# the same); the others decide how the run is made, not what it computes.
FREE = (
    *("path", "teacher_seconds"),
    *("parallel", "compile", "gradient_checkpointing", "prefetch_threads"),
    *("checkpoint_every", "keep_checkpoints", "keep_best", "explosion_factor"),
)


def open_run(run: Path, about: Mapping[str, Any], resume: bool) -> bool:
    """Whether ``run`` holds a run to go on with. Nothing is written yet.

    Raises InputError when the directory is in use for something else, or for a run that is not to
    be resumed; CheckpointError, naming the key, when the run in it is not the one of ``about``.
    """
    started = (run / RUN_FILE).is_file()
    if started and resume:
        _check_same(run, about)
        return True
    unborn = {f".{RUN_FILE}.tmp"}  # what a kill within `start_run` leaves
    if run.exists() and (not run.is_dir() or {p.name for p in run.iterdir()} - unborn):
        raise InputError(
            f"{run} is not empty. Give another --out, or --resume to go on with the run in it"
            if started
            else f"{run} is not empty and holds no run; give another --out"
        )
    return False


def _check_same(run: Path, about: Mapping[str, Any]) -> None:
    try:
        recorded = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
        parts = {name: (recorded[name], json.loads(json.dumps(about[name]))) for name in about}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run}/{RUN_FILE} is damaged ({error}); start a new run in another --out"
        ) from None
    for part, (old, new) in parts.items():
        old = _with_defaults(part, old)
        changed = sorted(k for k in new if k not in FREE and old.get(k) != new[k])
        if changed:
            raise CheckpointError(
                f"{run} is a run with another configuration ({part}.{changed[0]}: "
                f"{old.get(changed[0])!r} there, {new[changed[0]]!r} here). Resume it with its own "
                "configuration, or start a new run in another --out"
            )


def _with_defaults(part: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded section with the defaults of keys that are younger than the run."""
    section = SECTIONS.get(part)
    if section is None:
        return recorded
    try:
        values = parse_settings(section, recorded).model_dump(mode="json", by_alias=True)
        if part == "train":
            terms = values["objective"]["methods"]
            values["objective"]["methods"] = [_method_with_defaults(term) for term in terms]
        return values
    except InputError:
        return recorded


def _method_with_defaults(term: dict[str, Any]) -> dict[str, Any]:
    settings = find_method(term["method"]).Settings
    return parse_settings(settings, term).model_dump(mode="json", by_alias=True)


def start_run(run: Path, about: Mapping[str, Any]) -> None:
    """Record what the run in this directory is."""
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / f".{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, run / RUN_FILE)


def restore(
    run: Path, student: ParallelStudent, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load the newest sound checkpoint in every process; returns its state (empty without one)."""
    found = student.world.decide(lambda: latest_checkpoint(run))
    if found is None:
        log.info("no sound checkpoint in %s; starting from the beginning", run)
        return {}
    path, state = found
    load_checkpoint(path, student.student, optimizer)
    log.info("resuming %s at step %d", run, state["step"])
    return state


def save_checkpoint(
    run: Path,
    step: int,
    student: ParallelStudent,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` (steps done) and remove all but the last ``keep``, and the
    best, that of ``state["best"]["step"]``. Every process takes part, the main one writes.
    """
    weights = gather_weights(student.student) if student.sharded else None
    moments = _optimizer_tensors(student.student, optimizer)
    folder = run / "checkpoints"
    target = folder / f"step-{step:08d}"

    def write() -> Path:
        temporary = folder / f".step-{step:08d}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        student.student.save_pretrained(temporary, tensors=weights)
        save_file(moments, temporary / OPTIMIZER_FILE)
        digests = {f.name: _sha256(f) for f in sorted(temporary.iterdir()) if f.is_file()}
        content = dict(state) | {"step": step, "files": digests}
        (temporary / TRAINER_FILE).write_bytes(seal(content))
        for file in temporary.iterdir():
            _sync(file)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
        _sync(folder)
        best = (state.get("best") or {}).get("step")
        # A newer one is damaged, or it would have been gone on with: it must not take a place.
        done = [path for path in _checkpoints(run) if path.name <= target.name]
        for old in done[:-keep]:
            if best is None or old.name != f"step-{best:08d}":
                shutil.rmtree(old)
        return target

    return student.world.decide(write)


def latest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint and its state; damaged ones are passed over with a message."""
    for path in reversed(_checkpoints(run)):
        try:
            state = unseal(json.loads((path / TRAINER_FILE).read_bytes()), TRAINER_FILE)
            damaged = [n for n, digest in state["files"].items() if _sha256(path / n) != digest]
        except CacheFormatError as error:
            log.warning("checkpoint %s: %s; trying the one before", path, damage(error))
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
            continue
        if not damaged:
            return path, state
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, damaged[0])
    return None


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimiser state back in place, exactly; in shards where they are."""
    try:
        found = {MODEL + k: v for k, v in load_file(path / "model.safetensors").items()}
        found |= own_weights(path)
        moments = load_file(path / OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    own = student.state_dict(keep_vars=True)
    tied = {MODEL + k for k in getattr(student.model, "all_tied_weights_keys", None) or ()}
    wrong = sorted((own.keys() - found.keys() - tied) | (found.keys() - own.keys()))
    wrong += [k for k, v in found.items() if k in own and own[k].shape != v.shape]
    if wrong:
        raise CheckpointError(f"checkpoint {path} does not fit this student: {', '.join(wrong)}")
    for name, values in found.items():
        put(own[name], values)
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
