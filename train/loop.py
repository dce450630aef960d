"""Stage 2: one readable loop from a cache to a student. Batches → forward → loss → backward → step.

The loop owns all side effects: checkpoints, metrics, evaluation. Every random draw depends on
(seed, step) alone, so a resumed run is bit-equal to an uninterrupted one on a CPU.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle.data.batch import Batch, SequenceTargetBatch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.tokenizer import has_tokenizer_files, load_tokenizer
from rekindle.train.checkpoint import open_run, restore, save_checkpoint, start_run
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.evaluate import EvaluationData, evaluate, spread
from rekindle.train.models import resolve_model
from rekindle.train.objective import Counts, Objective
from rekindle.train.run_log import RunLog
from rekindle.train.schedules import learning_rate_factor
from rekindle.train.stream import TrainingStream, split_corpus
from rekindle.train.student import Student, build_student

log = logging.getLogger("rekindle")

Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    directory: Path
    steps: int
    seconds: float
    evaluation: dict[str, float]
    coverage: dict[str, int]


def train_student(
    cache: Cache,
    student_config: StudentConfig,
    config: TrainConfig,
    out: Path,
    *,
    masked_view: str | None = None,
    resume: bool = False,
    report: Report = lambda step, values: None,
) -> TrainResult:
    """Train a student from ``cache`` into ``out``, which afterwards is a Hugging Face model
    directory.

    Raises InputError when the configuration asks for what the cache does not have, CheckpointError
    when ``resume`` meets a run of another configuration.
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    masked = student_config.task == "masked_lm"
    view = cache.masked_view(masked_view).name if masked else None
    objective = _objective(cache, student_config, config, view)
    check_tokenizer(cache, student_config)
    about = _about(cache, student_config, config, view)
    resuming = open_run(out, about, resume)
    student = build_student(
        student_config,
        objective.heads,
        cache.corpus.info["tokenizer"]["size"],
        config.seed,
        cache.corpus.info["config"]["sequence_length"],
    ).to(device)
    optimizer = make_optimizer(student, config, device)
    state = restore(out, student, optimizer) if resuming else start_run(out, about)
    first, earlier = state.get("step", 0), state.get("seconds", 0.0)
    coverage = state.get("coverage", {"with_kd": 0, "ce_only": 0, "neither": 0})
    stream, held_out = _data(cache, objective, config, view)
    evaluation: dict[str, float] = {}
    student.train()
    # Left by an error or an interrupt, both must end at once: no thread reads on, no file is open.
    with (
        closing(RunLog(out, first)) as run_log,
        closing(stream.steps(first, config.steps)) as steps,
    ):
        began = time.monotonic()
        for step, batch in steps:
            values = _step(student, optimizer, objective, batch, step, config, device)
            _count_coverage(coverage, objective, batch, step)
            done = step + 1
            values["data_wait"] = stream.waited / max(time.monotonic() - began, 1e-9)
            run_log.write("train", done, values)
            report(done, values)
            if done % config.evaluate_every == 0 or done == config.steps:
                evaluation = _evaluate(student, held_out, objective, step, device)
                run_log.write("evaluate", done, evaluation)
            if done % config.checkpoint_every == 0 or done == config.steps:
                spent = {"seconds": earlier + time.monotonic() - started, "coverage": coverage}
                save_checkpoint(
                    out, done, student, optimizer, about | spent, config.keep_checkpoints
                )
    if first == config.steps:
        evaluation = _evaluate(student, held_out, objective, first - 1, device)
    result = TrainResult(
        out, config.steps, earlier + time.monotonic() - started, evaluation, coverage
    )
    _finish(result, student, cache, about)
    return result


def _data(
    cache: Cache, objective: Objective, config: TrainConfig, view: str | None
) -> tuple[TrainingStream, EvaluationData]:
    """What is trained on, and what is held out for evaluation."""
    split = split_corpus(cache, config.held_out)
    stream = TrainingStream(
        cache,
        split.train,
        config.batch_sequences,
        config.seed,
        objective.teachers_at,
        view,
        config.allow_missing,
    )
    size = config.micro_batch_sequences or config.batch_sequences
    index = spread(split.held_out, config.evaluate_sequences)
    return stream, EvaluationData(cache, index, (), view, size, config.allow_missing)


def _evaluate(
    student: Student, data: EvaluationData, objective: Objective, step: int, device: torch.device
) -> dict[str, float]:
    """Evaluate against the teachers of ``step`` alone: one of weight 0 is not read any more."""
    return evaluate(student, replace(data, teachers=tuple(objective.teachers_at(step))), device)


def _step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batch: Batch,
    step: int,
    config: TrainConfig,
    device: torch.device,
) -> dict[str, float]:
    """One optimiser step. Returns what is shown and logged."""
    began = time.perf_counter()
    # Dropout depends on (seed, step) alone: a resumed run draws what the uninterrupted one drew.
    torch.manual_seed(config.seed * 1_000_003 + step)
    factor = learning_rate_factor(config.schedule, step, config.steps, config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor
    counts = Counts.of(batch, student.task)
    terms: dict[str, Tensor] = {}
    loss = torch.zeros((), device=device)
    for part in split_batch(batch, config.micro_batch_sequences or len(batch.index)):
        with autocast(config.precision, device):
            result = objective.loss(student, part, counts, step, device)
        if result.total.requires_grad:
            result.total.backward()
        loss = loss + result.total.detach()
        for name, value in result.terms.items():
            terms[name] = terms.get(name, torch.zeros((), device=device)) + value
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm or math.inf)
    values = {
        "loss": float(loss),
        "learning_rate": config.learning_rate * factor,
        "grad_norm": float(norm),
    }
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise InputError(
                f"the {name} is {values[name]} at step {step + 1} (sequences "
                f"{', '.join(str(i) for i in batch.index[:8])} …). Try a lower learning rate or a "
                "longer warm-up; the last checkpoint is kept"
            )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    tokens = int(batch.lengths.sum())
    return (
        values
        | {name: float(value) for name, value in terms.items()}
        | {"tokens_per_second": tokens / seconds, "tokens": tokens}
    )


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16 autocast where ``precision`` asks for it; ``auto`` means a GPU that has bf16."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def make_optimizer(
    student: Student, config: TrainConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=device.type == "cuda")


def _objective(
    cache: Cache, student: StudentConfig, config: TrainConfig, masked_view: str | None
) -> Objective:
    """The loss, after checking that every teacher it names is in the cache, complete, and saw what
    the student will see.
    """
    names = [name for term in config.objective.distill for name in term.teachers]
    for name in names:
        teacher = cache.teacher(name)
        if teacher.coverage < 1 and name not in config.allow_missing:
            raise InputError(
                f"teacher {name!r} has targets for {teacher.coverage:.1%} of the cache. Finish it "
                "with `pipeline cache-teachers`, or name it in train.allow_missing to train its "
                "holes without KD"
            )
    infos = {name: cache.teacher(name).info for name in names}
    objective = Objective(config.objective, infos, student.task, config.steps)
    for name, info in infos.items():
        if info.view.startswith("masked-") and info.view != masked_view:
            raise InputError(
                f"teacher {name!r} saw the masks {info.view}, the student would see {masked_view}: "
                "its targets are for other inputs. Use the cache.mask and cache.seed it was cached "
                "with, or cache it with these"
            )
    return objective


def check_tokenizer(cache: Cache, config: StudentConfig) -> None:
    """Refuse a student that has another tokenizer than the cache."""
    directory = resolve_model(config.model)
    if not has_tokenizer_files(directory):
        return  # its vocabulary size is checked when it is built
    theirs = load_tokenizer(str(directory))
    if theirs.digest != cache.tokenizer_digest:
        raise InputError(
            f"student {config.model!r} has another tokenizer than the cache {cache.store.location} "
            f"({theirs.size:,} tokens against {cache.corpus.info['tokenizer']['size']:,}, or "
            "other tokens under the same ids): the cached ids would mean other words. Use a "
            "student of the cache's tokenizer, or make a cache with this one"
        )


def _about(
    cache: Cache, student: StudentConfig, config: TrainConfig, masked_view: str | None
) -> dict[str, Any]:
    """What a run is: enough to refuse to resume it as another, and to make its model a teacher
    later.
    """
    return {
        "student": student.model_dump(mode="json"),
        "train": config.model_dump(mode="json", by_alias=True),
        "cache": {
            "path": cache.store.location,
            "corpus": cache.corpus.fingerprint,
            "masked_view": masked_view,
            "teachers": {
                name: cache.teacher(name).fingerprint
                for term in config.objective.distill
                for name in term.teachers
            },
        },
    }


def _finish(result: TrainResult, student: Student, cache: Cache, about: Mapping[str, Any]) -> None:
    """Make the run's directory a model directory."""
    staged = result.directory / ".final"
    shutil.rmtree(staged, ignore_errors=True)
    student.save_pretrained(staged, {"made_by": about})
    cache.corpus.tokenizer.save(str(staged))
    summary = {name: value for name, value in vars(result).items() if name != "directory"}
    (staged / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for file in staged.iterdir():
        file.replace(result.directory / file.name)
    staged.rmdir()


def _count_coverage(
    coverage: dict[str, int], objective: Objective, batch: Batch, step: int
) -> None:
    """Count sequences by what they were trained with."""
    active = objective.teachers_at(step)
    covered = torch.zeros(len(batch.index), dtype=torch.bool)
    for name in active:
        target = batch.targets[name]
        if isinstance(target, SequenceTargetBatch):
            covered |= torch.from_numpy(target.present)
        else:
            covered[torch.from_numpy(target.rows).unique()] = True
    kd = int(covered.sum())
    hard = objective.hard_weight(step) > 0
    coverage["with_kd"] += kd
    coverage["ce_only" if hard else "neither"] += len(batch.index) - kd
