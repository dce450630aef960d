"""The loss of a training step: hard · CE + Σ weight · τ² · divergence, from one batch and one
student.

Every mean is over the whole step (all micro-batches, all processes): ``Counts`` is taken from the
step's batch before it is split, so gradient accumulation changes nothing but rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rekindle.data.batch import Batch, SequenceTargetBatch, TokenLabelBatch, TokenTargetBatch
from rekindle.data.errors import InputError
from rekindle.data.targets import SAMPLED, TeacherInfo
from rekindle.kernels.losses import kd_loss, linear_kd_loss, merge_targets
from rekindle.train.config import DistillTerm, ObjectiveConfig
from rekindle.train.device_batch import (
    LanguageRows,
    SparseTargets,
    as_arguments,
    kd_targets,
    language_rows,
    model_inputs,
    sparse_targets,
)
from rekindle.train.schedules import weight_at
from rekindle.train.student import HeadConfig, Student, StudentOutput


@dataclass(frozen=True)
class Counts:
    """How many rows each mean is over: positions with a label, rows with a target per teacher."""

    labels: int
    targets: Mapping[str, int]

    @classmethod
    def of(cls, batch: Batch, task: str) -> "Counts":
        """The counts of a step's batch."""
        masked = batch.masked
        labels = int(np.maximum(batch.lengths - 1, 0).sum())
        if task == "masked_lm":
            assert masked is not None
            labels = len(masked.labels)
        return cls(labels, {name: _target_rows(target) for name, target in batch.targets.items()})


def _target_rows(target: object) -> int:
    if isinstance(target, SequenceTargetBatch):
        return int(target.present.sum())
    assert isinstance(target, TokenTargetBatch | TokenLabelBatch)
    return len(target.rows)


@dataclass
class StepLoss:
    """A micro-batch's share of the step's loss. ``terms`` are detached and sum up over
    micro-batches.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, loss: Tensor | None, shown: Tensor) -> None:
        """Add a term to the loss, and its unweighted value to what is shown."""
        if loss is not None:
            self.total = self.total + loss
        self.terms[name] = self.terms.get(name, torch.zeros_like(shown)) + shown.detach()


class Objective:
    """The configured loss for one student task and the teachers of one cache."""

    def __init__(
        self, config: ObjectiveConfig, teachers: Mapping[str, TeacherInfo], task: str, steps: int
    ):
        self.config, self.teachers, self.task, self.steps = config, teachers, task, steps
        for number, term in enumerate(config.distill):
            _check_term(number, term, teachers, task)
        if self.hard_weight(steps - 1) == 0 and not self.active(steps - 1):
            raise InputError(
                "train.objective: at the end of the run every weight is 0, so nothing is trained. "
                "Give hard.weight or a distill term a weight above 0, or end the run earlier"
            )
        twice = _twice([name for term in config.distill for name in term.teachers])
        if twice:
            raise InputError(
                f"teacher {twice!r} stands in two distill terms; use one term per teacher"
            )

    @property
    def heads(self) -> dict[str, HeadConfig]:
        """The task heads the student needs."""
        names = [name for term in self.config.distill for name in term.teachers]
        return {
            name: HeadConfig.of(self.teachers[name])
            for name in names
            if self.teachers[name].kind in ("sequence", "token")
        }

    def active(self, step: int) -> list[tuple[DistillTerm, float]]:
        """The distillation terms with a weight above 0 at ``step``, with that weight."""
        weighted = [
            (term, weight_at(term.weight, step, self.steps)) for term in self.config.distill
        ]
        return [(term, weight) for term, weight in weighted if weight > 0]

    def hard_weight(self, step: int) -> float:
        """The weight of the cross-entropy at ``step``."""
        return weight_at(self.config.hard.weight, step, self.steps)

    def teachers_at(self, step: int) -> list[str]:
        """The teachers whose targets are read at ``step``."""
        return [name for term, _ in self.active(step) for name in term.teachers]

    def loss(
        self, student: Student, batch: Batch, counts: Counts, step: int, device: torch.device
    ) -> StepLoss:
        """The loss of one micro-batch at ``step``; ``counts`` are the whole step's.

        One forward pass of the student per view that a term needs.
        """
        hard, terms = self.hard_weight(step), self.active(step)
        result = StepLoss(torch.zeros((), device=device))
        language = [(t, w) for t, w in terms if self.teachers[t.teachers[0]].is_vocabulary]
        masked = [(t, w) for t, w in terms if (t, w) not in language and self._joins_lm_pass(t)]
        if hard > 0 or language or masked:
            self._language_pass(student, batch, counts, hard, language, masked, result, device)
        rest = [(t, w) for t, w in terms if (t, w) not in language and (t, w) not in masked]
        self._clean_pass(student, batch, counts, rest, result, device)
        self._pair_passes(student, batch, counts, rest, result, device)
        return result

    def _joins_lm_pass(self, term: DistillTerm) -> bool:
        """Whether the student imitates these logits in the very pass that the LM loss uses."""
        paired = self.teachers[term.teachers[0]].view.startswith("pairs-")
        return not paired and (term.view == "masked" or self.task == "causal_lm")

    def _language_pass(
        self,
        student: Student,
        batch: Batch,
        counts: Counts,
        hard: float,
        language: Sequence[tuple[DistillTerm, float]],
        task_terms: Sequence[tuple[DistillTerm, float]],
        result: StepLoss,
        device: torch.device,
    ) -> None:
        rows = language_rows(batch, self.task, device)
        output = _run(student, rows.inputs, batch, task_terms, self.teachers, rows.select)
        self._task_losses(output, batch, counts, task_terms, result, device)
        assert output.hidden is not None
        width, head = batch.input_ids.shape[1], student.output_head
        for term, weight in language:
            targets, found, count = self._language_targets(term, batch, counts, rows, width, device)
            whole = hard > 0 and len(found) == len(rows.keys)
            fused = hard / max(counts.labels, 1) if whole else 0.0
            index = None if whole else torch.from_numpy(found).to(device)
            loss = linear_kd_loss(
                output.hidden if index is None else output.hidden[index],
                head.weight,
                **targets,
                bias=head.bias,
                labels=rows.labels if whole else None,
                temperature=term.temperature,
                ce_weight=fused,
                kd_weight=weight / max(count, 1),
                divergence=term.divergence,
                tail=term.tail,
                reduction="sum",
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
            result.add("kd/" + "+".join(term.teachers), loss.loss, loss.kd / max(count, 1))
            if whole:
                result.add("ce", None, loss.ce / max(counts.labels, 1))
                hard = 0.0
        if hard > 0:
            self._cross_entropy(student, output.hidden, rows, counts, hard, result)

    def _cross_entropy(
        self,
        student: Student,
        hidden: Tensor,
        rows: LanguageRows,
        counts: Counts,
        hard: float,
        result: StepLoss,
    ) -> None:
        head = student.output_head
        nothing = torch.full((len(hidden), 1), -1, device=hidden.device)
        loss = linear_kd_loss(
            hidden,
            head.weight,
            nothing,
            torch.zeros(nothing.shape, device=hidden.device),
            bias=head.bias,
            labels=rows.labels,
            ce_weight=hard / max(counts.labels, 1),
            kd_weight=0.0,
            reduction="sum",
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        result.add("ce", loss.loss, loss.ce / max(counts.labels, 1))

    def _language_targets(
        self,
        term: DistillTerm,
        batch: Batch,
        counts: Counts,
        rows: LanguageRows,
        width: int,
        device: torch.device,
    ) -> tuple[dict[str, Any], np.ndarray, int]:
        """The term's target as arguments of the loss, its LM rows, how many the step has."""
        named = [batch.targets[name] for name in term.teachers]
        batches = [target for target in named if isinstance(target, TokenTargetBatch)]
        places = [rows.match(target, width) for target in batches]
        settings = (term.temperature, term.k, device)
        if len(batches) == 1:
            only = kd_targets(batches[0], *settings)
            return as_arguments(only), places[0], counts.targets[term.teachers[0]]
        if any(not np.array_equal(place, places[0]) for place in places):
            raise InputError(
                f"the mixture of {', '.join(term.teachers)} needs all of them at the same "
                "positions, and one has holes where another has none. Finish them with `pipeline "
                "cache-teachers`, or give each its own term"
            )
        decoded = [sparse_targets(target, *settings) for target in batches]
        weights = torch.full((len(decoded),), 1.0 / len(decoded), device=device)
        merged = merge_targets([(d.ids, d.probs, d.tail) for d in decoded], weights)
        mixture = as_arguments(SparseTargets(*merged))
        return mixture, places[0], counts.targets[term.teachers[0]]

    def _clean_pass(
        self,
        student: Student,
        batch: Batch,
        counts: Counts,
        terms: Sequence[tuple[DistillTerm, float]],
        result: StepLoss,
        device: torch.device,
    ) -> None:
        clean = [
            (t, w) for t, w in terms if not self.teachers[t.teachers[0]].view.startswith("pairs-")
        ]
        if clean:
            inputs = model_inputs(batch.input_ids, batch.lengths, device)
            output = _run(student, inputs, batch, clean, self.teachers, None)
            self._task_losses(output, batch, counts, clean, result, device)

    def _pair_passes(
        self,
        student: Student,
        batch: Batch,
        counts: Counts,
        terms: Sequence[tuple[DistillTerm, float]],
        result: StepLoss,
        device: torch.device,
    ) -> None:
        for view, pairs in batch.pairs.items():
            mine = [(t, w) for t, w in terms if self.teachers[t.teachers[0]].view == view]
            if not mine or not pairs.lengths.any():
                continue
            # Sequences without a pair are shown as one padding token and carry no weight.
            lengths = np.maximum(pairs.lengths, 1)
            types = pairs.token_types if _takes_token_types(student) else None
            inputs = model_inputs(pairs.input_ids, lengths, device, types)
            output = _run(student, inputs, batch, mine, self.teachers, None)
            self._task_losses(output, batch, counts, mine, result, device)

    def _task_losses(
        self,
        output: StudentOutput,
        batch: Batch,
        counts: Counts,
        terms: Sequence[tuple[DistillTerm, float]],
        result: StepLoss,
        device: torch.device,
    ) -> None:
        for term, weight in terms:
            for name in term.teachers:
                target = batch.targets[name]
                if isinstance(target, SequenceTargetBatch):
                    keep = torch.from_numpy(target.present).to(device)
                    logits = output.logits[name][keep]
                    wanted = torch.from_numpy(target.logits[target.present]).to(device)
                else:
                    assert isinstance(target, TokenLabelBatch)
                    logits = output.logits[name]
                    wanted = torch.from_numpy(np.ascontiguousarray(target.logits)).to(device)
                if not len(logits):
                    continue
                scale = 1.0 / max(counts.targets[name], 1)
                loss, shown = task_loss(logits.float(), wanted, self.teachers[name], term)
                result.add(f"kd/{name}", loss * (weight * scale), shown * scale)


def task_loss(
    logits: Tensor, wanted: Tensor, info: TeacherInfo, term: DistillTerm
) -> tuple[Tensor, Tensor]:
    """Sum over rows of a task head's loss [R,C], and of the bare divergence (for show).

    Regression and ``mse``: squared error, mean over outputs. Multi-label: KL of each label's
    Bernoulli. Classification: the divergence between softmax(teacher/τ) and softmax(student/τ),
    times τ².
    """
    if term.divergence == "mse" or info.problem == "regression":
        loss = F.mse_loss(logits, wanted, reduction="none").mean(dim=1).sum()
        return loss, loss.detach()
    tau = term.temperature
    if info.problem == "multi_label_classification":
        p = torch.sigmoid(wanted / tau)
        entropy = F.binary_cross_entropy_with_logits(wanted / tau, p, reduction="sum")
        cross = F.binary_cross_entropy_with_logits(logits / tau, p, reduction="sum")
        loss = (cross - entropy) / logits.shape[1]
        return loss * tau**2, loss.detach()
    ids = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    result = kd_loss(
        logits,
        ids,
        torch.softmax(wanted / tau, dim=1),
        tail_prob=torch.zeros(len(logits), device=logits.device),
        temperature=tau,
        divergence=term.divergence,
        reduction="sum",
    )
    return result.loss, result.kd


def _run(
    student: Student,
    inputs: dict[str, Tensor],
    batch: Batch,
    terms: Sequence[tuple[DistillTerm, float]],
    teachers: Mapping[str, TeacherInfo],
    select: Tensor | None,
) -> StudentOutput:
    """One forward pass with the heads that the terms ask for."""
    names = [name for term, _ in terms for name in term.teachers]
    sequence = [name for name in names if teachers[name].kind == "sequence"]
    tokens: dict[str, Tensor] = {}
    for name in names:
        target = batch.targets[name]
        if isinstance(target, TokenLabelBatch):
            flat = target.rows * batch.input_ids.shape[1] + target.positions
            tokens[name] = torch.from_numpy(flat).to(inputs["input_ids"].device)
    output: StudentOutput = student(inputs, select, sequence, tokens)
    return output


def _takes_token_types(student: Student) -> bool:
    return getattr(student.model.config, "type_vocab_size", 0) >= 2


def _twice(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _check_term(
    number: int, term: DistillTerm, teachers: Mapping[str, TeacherInfo], task: str
) -> None:
    """InputError for a term that cannot be computed: better now than at its first step."""
    where = f"train.objective.distill.{number}"
    infos = [teachers[name] for name in term.teachers]
    kinds = {"vocabulary" if i.is_vocabulary else "task" for i in infos}
    if len(kinds) > 1:
        raise InputError(f"{where}: vocabulary teachers and task experts need a term each")
    if len({i.view for i in infos}) > 1:
        raise InputError(
            f"{where}: {', '.join(term.teachers)} saw different views; use a term each"
        )
    if kinds == {"task"}:
        if term.combine == "mixture":
            raise InputError(f"{where}: combine: mixture is for vocabulary teachers; use separate")
        if term.view == "masked" and infos[0].view.startswith("pairs-"):
            raise InputError(f"{where}: view: masked, but pairs are shown clean; use clean")
        if term.view == "masked" and task != "masked_lm":
            raise InputError(f"{where}: view: masked, but a {task} student has no masked view")
        return
    if term.divergence == "mse":
        raise InputError(f"{where}: mse is for task logits; {term.teachers[0]} predicts tokens")
    if term.combine == "mixture" and len({i.domains for i in infos}) > 1:
        raise InputError(
            f"{where}: a mixture needs all its teachers at the same positions, and "
            f"{', '.join(term.teachers)} are for different domains; give each its own term"
        )
    if len(infos) > 1 and term.combine == "separate":
        raise InputError(
            f"{where}: several vocabulary teachers in one term must be a mixture; for separate "
            "losses give each its own term"
        )
    for info in infos:
        if info.task != task:
            raise InputError(
                f"{where}: teacher {info.name!r} is a {info.task}; a {task} student has no loss "
                "at its positions"
            )
        if info.temperatures and term.temperature not in info.temperatures:
            raise InputError(
                f"{where}: teacher {info.name!r} stores the temperatures "
                f"{list(info.temperatures)}, not "
                f"{term.temperature}. Train at a stored one, or cache it with this one"
            )
        if term.k is not None and info.kind in SAMPLED and term.k != info.k:
            raise InputError(
                f"{where}: teacher {info.name!r} keeps a sample of {info.k}; a part of it would be "
                "biased. Leave k out"
            )
        if term.k is not None and info.k is not None and term.k > info.k:
            raise InputError(
                f"{where}: k = {term.k}, but teacher {info.name!r} keeps {info.k} candidates"
            )
