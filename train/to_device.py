"""Move a whole batch of a cache to a device: the losses' targets, the labels, the model's inputs.

This is the way from a cache to a loss for your own training loop; ours asks ``device_batch.py`` for
the same parts, term by term.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from rekindle.data.batch import (
    Batch,
    EmbeddingBatch,
    SequenceTargetBatch,
    TokenLabelBatch,
    TokenTargetBatch,
)
from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.kernels.checks import TargetObjects
from rekindle.kernels.hidden import DenseTargets
from rekindle.train.device_batch import (
    CLEAN_TEXT,
    Inputs,
    LanguageRows,
    clean_inputs,
    inputs_of,
    kd_targets,
    language_rows,
    masked_only,
    send,
)

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceTargets:
    """A language model's targets on a device: P of the student's rows, and the target of each."""

    info: TeacherInfo
    targets: (
        TargetObjects  # for ``target_ids`` of kd_loss and linear_kd_loss, as the cache stores them
    )
    temperature: float  # the one that the losses must use
    select: Tensor  # [P] the student's rows: flat indices into [B·S]
    labels: Tensor | None  # [P] the true tokens, for the cross-entropy; None for text without masks
    inputs: Inputs  # what the student sees


@dataclass(frozen=True)
class DeviceLogits:
    """An expert's logits on a device: R of the student's rows, and the answer for each."""

    info: TeacherInfo
    logits: Tensor  # [R,C] float32
    mc_probs: Tensor | None  # [R,C] means over Monte-Carlo passes, if there were any
    select: Tensor  # [R] sequences of [B]; for experts on tokens, flat indices into [B·S]
    inputs: Inputs  # what the student sees: the clean text, or the expert's own pairs of texts

    @property
    def targets(self) -> DenseTargets:
        """Return ``target_ids`` of kd_loss, for the student's logits [R,C], at any temperature.

        Raises InputError if the logits are not a distribution over classes.
        """
        if self.info.problem in ("regression", "multi_label_classification"):
            raise InputError(
                f"teacher {self.info.name!r} is a {self.info.problem} expert: kd_loss compares "
                "distributions over classes, and its logits are not one. Use `logits`: the mean "
                "squared error for scores, the binary cross-entropy for labels"
            )
        return DenseTargets(self.logits)


@dataclass(frozen=True)
class DeviceVectors:
    """A sentence encoder's vectors on a device: one for each of R of the student's rows."""

    info: TeacherInfo
    vectors: Tensor  # [R,D] float32
    select: Tensor  # [R] sequences of [B]
    inputs: Inputs  # what the student sees


@dataclass(frozen=True)
class DeviceBatch(LanguageRows):
    """A batch on a device: ``inputs`` of the language model, its rows, and every teacher's targets.

    ``select`` and ``labels`` [N] are the positions with an LM loss and their true tokens: masked
    positions, or (causal) every token but the last, with the next token as label. A teacher's own
    rows are among them, where it has a target.
    """

    targets: Mapping[str, DeviceTargets | DeviceLogits | DeviceVectors]  # by teacher


def to_device(
    batch: Batch,
    device: torch.device | str,
    *,
    task: str | None = None,
    temperature: float | Mapping[str, float] | None = None,
    k: int | Mapping[str, int] | None = None,
    temperature_between: Literal["refuse", "interpolate"] = "refuse",
) -> DeviceBatch:
    """Move a batch of a cache to a device, with targets that the losses take as they are.

    Targets are sent in stored form and decoded by the loss. A batch may come from another process
    (a DataLoader worker): it is pickled as plain arrays.

    Args:
        batch: from ``Cache.batches`` or ``Cache.gather``.
        device: where the tensors go.
        task: the student's task, masked_lm or causal_lm; None: the one the batch is made for.
        temperature: of the language models' targets, for all or by teacher; None, or a teacher that
            is not named: 1, or the one that a sample was drawn at. It is kept with the targets.
        temperature_between: interpolate, for ``topk`` targets at a temperature between three or
            more stored ones (``data/targets/interpolation.py`` gives the accuracy); refuse: an
            error.
        k: read only this many candidates, for all or by teacher; None: all that are stored.

    Raises: InputError for a temperature or a k that is not cached, for a name that is not a
    language
        model of the batch, for targets that do not fit the student's task, and for rows of several
        documents.
    """
    device = torch.device(device)
    if batch.document_numbers is not None:
        raise InputError(
            "the batch has rows of several documents (corpus.packing: packed), and many models "
            "ignore which token belongs to which document. `pipeline train-student` tests what "
            "its student understands; for your own loop use packing: document"
        )
    if task not in (None, "masked_lm", "causal_lm"):
        raise ValueError(f"task is {task!r}; it must be masked_lm or causal_lm")
    if temperature_between not in ("refuse", "interpolate"):
        raise ValueError(
            f"temperature_between is {temperature_between!r}; it must be refuse or interpolate"
        )
    task = task or _task_of(batch)
    language_models = [
        n for n, target in batch.targets.items() if isinstance(target, TokenTargetBatch)
    ]
    teachers_note = f"the batch has the language models {language_models or 'none'}"
    teachers_note += ". All logits of experts are stored: their temperature is the loss's"
    temperatures = by_name(temperature, language_models, "temperature", teachers_note)
    ks = by_name(k, language_models, "k", teachers_note)
    rows = _rows(batch, task, device)
    masked = batch.masked is not None and task == "masked_lm"
    # by view of sentence pairs, or CLEAN_TEXT
    inputs_by_view: dict[str, Inputs] = {} if masked else {CLEAN_TEXT: rows.inputs}
    targets: dict[str, DeviceTargets | DeviceLogits | DeviceVectors] = {}
    for name, target in batch.targets.items():
        if isinstance(target, TokenTargetBatch):
            target_temperature = temperatures.get(name, target.kind.readable_temperature)
            _check_task(target.info, task)
            target = target.interpolating(temperature_between == "interpolate")
            targets[name] = _device_targets(
                batch, target, rows, target_temperature, ks.get(name), device
            )
            continue
        assert isinstance(target, SequenceTargetBatch | TokenLabelBatch | EmbeddingBatch)
        view = target.info.view if target.info.view_class.paired else CLEAN_TEXT
        if view not in inputs_by_view:
            inputs_by_view[view] = inputs_of(batch, target.info.view, device)
        if isinstance(target, EmbeddingBatch):
            vectors, select = send(target.vectors, device), send(target.rows, device)
            targets[name] = DeviceVectors(target.info, vectors, select, inputs_by_view[view])
            continue
        targets[name] = _device_logits(
            target, batch.input_ids.shape[1], inputs_by_view[view], device
        )
    return DeviceBatch(rows.inputs, rows.select, rows.labels, rows.keys, targets)


def _rows(batch: Batch, task: str | None, device: torch.device) -> LanguageRows:
    """Return the rows of the LM loss; none for clean text that no causal LM reads."""
    if task == "causal_lm" or (task == "masked_lm" and batch.masked is not None):
        return language_rows(batch, task, device)
    clean = clean_inputs(batch, device)
    none = np.zeros(0, np.int64)
    return LanguageRows(clean, send(none, device), send(none, device), none)


def _check_task(info: TeacherInfo, task: str | None) -> None:
    if info.task != task:
        raise InputError(
            f"teacher {info.name!r} is a {info.task}; a {task} student has no loss at its "
            "positions. Read only teachers of the student's task, or set `task`"
        )


def _task_of(batch: Batch) -> str | None:
    """Return the student's task for this batch; None if all teachers are experts."""
    if batch.masked is not None:
        return "masked_lm"
    tasks = sorted({t.info.task for t in batch.targets.values() if t.info.is_vocabulary})
    if len(tasks) > 1:
        raise InputError(
            f"the batch has teachers that are {' and '.join(tasks)}, but no student has a loss at "
            "the positions of both: read only those of the student's task"
        )
    return tasks[0] if tasks else None


def by_name(
    value: T | Mapping[str, T] | None, names: Collection[str], setting: str, teachers_note: str
) -> dict[str, T]:
    """Return the value for each of the teachers ``names``; those without one are left out.
    ``teachers_note`` says in an error which teachers exist.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        if not names:
            raise InputError(f"{setting} is {value}; {teachers_note}")
        return dict.fromkeys(names, value)
    if unknown := sorted(value.keys() - {*names}):
        raise InputError(f"{setting} names {', '.join(map(repr, unknown))}; {teachers_note}")
    return dict(value)


def _device_targets(
    batch: Batch,
    target: TokenTargetBatch,
    rows: LanguageRows,
    temperature: float,
    k: int | None,
    device: torch.device,
) -> DeviceTargets:
    labels = None
    if batch.masked is not None or not target.info.sees_clean_text:
        if target.info.sees_clean_text:
            target = masked_only(target, batch)
        places = rows.match(target, batch.input_ids.shape[1])
        labels = rows.labels[send(places, device)]
    select = send(target.rows * batch.input_ids.shape[1] + target.positions, device)
    taught = kd_targets(target, temperature, k, device)
    return DeviceTargets(target.info, taught, temperature, select, labels, rows.inputs)


def _device_logits(
    target: SequenceTargetBatch | TokenLabelBatch,
    width: int,
    inputs: Inputs,
    device: torch.device,
) -> DeviceLogits:
    if isinstance(target, SequenceTargetBatch):
        select, logits = target.rows, target.logits[target.rows]
        mc = None if target.mc_probs is None else send(target.mc_probs[target.rows], device)
    else:
        select, logits, mc = target.rows * width + target.positions, target.logits, None
    return DeviceLogits(target.info, send(logits, device), mc, send(select, device), inputs)
