"""The loss of a training step: hard · CE + Σ weight · τ² · divergence + Σ weight · method, from one
batch and one student.

Every mean is over the whole step (all micro-batches, all processes): ``Objective.counts`` is taken
from the step's batch before it is split, so gradient accumulation changes nothing but rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rekindle.data.batch import Batch, TokenLabelBatch
from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.registry import view_kind
from rekindle.train.config import DistillTerm, ObjectiveConfig
from rekindle.train.device_batch import language_rows, model_inputs, send
from rekindle.train.method import Method
from rekindle.train.model.network import HeadConfig, StudentOutput
from rekindle.train.objective.language_loss import LanguageLoss
from rekindle.train.objective.selection import Counts, count_rows, select_targets
from rekindle.train.objective.task_loss import add_task_losses, heads_of
from rekindle.train.objective.terms import check_terms
from rekindle.train.schedules import weight_at
from rekindle.train.student import Student

Weighted = Sequence[tuple[DistillTerm, float]]


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
        self,
        config: ObjectiveConfig,
        teachers: Mapping[str, TeacherInfo],
        task: str,
        steps: int,
        methods: Sequence[Method] = (),
    ):
        self.config, self.teachers, self.task, self.steps = config, teachers, task, steps
        self.methods = methods
        check_terms(config.distill, teachers, task)
        _check_shared(config.distill, methods, teachers)
        if not any(self.weights(steps - 1)):
            raise InputError(
                "train.objective: at the end of the run every weight is 0, so nothing is trained. "
                "Give hard.weight, a distill term or a method a weight above 0, or end the run "
                "earlier"
            )

    @property
    def heads(self) -> dict[str, HeadConfig]:
        """The task heads the student needs."""
        found: dict[str, HeadConfig] = {}
        for term in self.config.distill:
            found |= heads_of(term, self.teachers)
        return found

    def active(self, step: int) -> list[tuple[DistillTerm, float]]:
        """The distillation terms with a weight above 0 at ``step``, with that weight."""
        weighted = [
            (term, weight_at(term.weight, step, self.steps)) for term in self.config.distill
        ]
        return [(term, weight) for term, weight in weighted if weight > 0]

    def hard_weight(self, step: int) -> float:
        """The weight of the cross-entropy at ``step``."""
        return weight_at(self.config.hard.weight, step, self.steps)

    def weights(self, step: int) -> tuple[float, ...]:
        """The weights of the cross-entropy, of every distillation term and method at ``step``."""
        weights = [term.weight for term in self.config.distill]
        weights += [method.settings.weight for method in self.methods]
        return (self.hard_weight(step), *(weight_at(w, step, self.steps) for w in weights))

    def active_methods(self, step: int) -> list[tuple[Method, float]]:
        """The methods with a weight above 0 at ``step``, with that weight."""
        weighted = [(m, weight_at(m.settings.weight, step, self.steps)) for m in self.methods]
        return [(method, weight) for method, weight in weighted if weight > 0]

    def teachers_at(self, step: int) -> list[str]:
        """The teachers whose targets are read at ``step``."""
        names = [name for term, _ in self.active(step) for name in term.teachers]
        names += [name for m, _ in self.active_methods(step) for name in m.teachers_at(step)]
        return list(dict.fromkeys(names))

    def terms(self, step: int) -> list[DistillTerm]:
        """The distillation terms with a weight above 0 at ``step``."""
        return [term for term, _ in self.active(step)]

    def users(self, step: int) -> list[DistillTerm]:
        """Who uses targets at ``step``: its terms, and each method as if it were one."""
        read = [tuple(method.teachers_at(step)) for method, _ in self.active_methods(step)]
        return [*self.terms(step), *(DistillTerm(teachers=names) for names in read if names)]

    def select(self, batch: Batch, step: int) -> Batch:
        """The batch with only those targets that the terms of ``step`` use."""
        return select_targets(batch, self.terms(step))

    def counts(self, batch: Batch, step: int) -> Counts:
        """How many rows the means of ``step`` are over, in a batch of selected targets."""
        counts = count_rows(batch, self.task, self.terms(step))
        rows = dict(counts.rows)
        for method, _ in self.active_methods(step):
            rows |= {f"{method.name}/{name}": n for name, n in method.count(batch).items()}
        return replace(counts, rows=rows)

    def shown(self, counts: Counts, step: int) -> list[str]:
        """The names of the losses that ``step`` has rows for, in a fixed order."""
        names = ["ce"] if self.hard_weight(step) > 0 and counts.labels else []
        return names + [name for name, rows in sorted(counts.rows.items()) if rows]

    def loss(
        self, student: Student, batch: Batch, counts: Counts, step: int, device: torch.device
    ) -> StepLoss:
        """The loss of one micro-batch at ``step``; ``counts`` are the whole step's.

        One forward pass of the student per view that a term needs. Which passes are made depends
        on the step alone, never on a micro-batch: all processes make the same ones.
        """
        hard, terms = self.hard_weight(step), self.active(step)
        result = StepLoss(torch.zeros((), device=device))
        language = [(t, w) for t, w in terms if self.teachers[t.teachers[0]].is_vocabulary]
        task = [(t, w) for t, w in terms if not self.teachers[t.teachers[0]].is_vocabulary]
        joined = [(t, w) for t, w in task if self._joins_language_pass(t)]
        if hard > 0 or language or joined:
            self._language_pass(student, batch, counts, hard, language, joined, result, device)
        apart = [(t, w) for t, w in task if not self._joins_language_pass(t)]
        by_view: dict[str, list[tuple[DistillTerm, float]]] = {}
        for term, weight in apart:
            info = self.teachers[term.teachers[0]]
            by_view.setdefault(info.view if info.shown.paired else "", []).append((term, weight))
        for view, own in sorted(by_view.items()):
            inputs = inputs_of(student, batch, view, device)
            output = self._run(student, inputs, batch, own, None)
            add_task_losses(output.logits, batch, own, self.teachers, counts, result.add)
        for method, weight in self.active_methods(step):
            for name, loss, shown in method.losses(student, batch, step, device):
                scale = 1.0 / max(counts.rows[f"{method.name}/{name}"], 1)
                result.add(f"{method.name}/{name}", loss * (weight * scale), shown * scale)
        return result

    def _joins_language_pass(self, term: DistillTerm) -> bool:
        """Whether the student imitates these logits in the very pass that the LM loss uses."""
        paired = self.teachers[term.teachers[0]].shown.paired
        return not paired and (term.view == "masked" or self.task == "causal_lm")

    def _language_pass(
        self,
        student: Student,
        batch: Batch,
        counts: Counts,
        hard: float,
        language: Weighted,
        joined: Weighted,
        result: StepLoss,
        device: torch.device,
    ) -> None:
        rows = language_rows(batch, self.task, device)
        output = self._run(student, rows.inputs, batch, joined, rows.select)
        add_task_losses(output.logits, batch, joined, self.teachers, counts, result.add)
        assert output.hidden is not None
        language_loss = LanguageLoss(batch, rows, output.hidden, student.output_head, counts)
        language_loss.add_all(hard, language, result.add)

    def _run(
        self,
        student: Student,
        inputs: Mapping[str, Tensor],
        batch: Batch,
        terms: Weighted,
        select: Tensor | None,
    ) -> StudentOutput:
        """One forward pass with the heads that the terms ask for."""
        sequence: list[str] = []
        tokens: dict[str, Tensor] = {}
        for term, _ in terms:
            for name, head in heads_of(term, self.teachers).items():
                if head.kind == "sequence":
                    sequence.append(name)
                    continue
                target = batch.targets[name]
                assert isinstance(target, TokenLabelBatch)
                flat = target.rows * batch.input_ids.shape[1] + target.positions
                tokens[name] = send(flat, inputs["input_ids"].device)
        shown = student.with_domains(inputs, batch.domains)
        output: StudentOutput = student(shown, select, sequence, tokens)
        return output


def _check_shared(
    terms: Sequence[DistillTerm], methods: Sequence[Method], teachers: Mapping[str, TeacherInfo]
) -> None:
    """That no method reads targets of which a distill term takes some away."""
    picked = {
        name
        for term in terms
        for name in term.teachers
        if term.combine == "route"
        or term.positions == "masked"
        or term.divergence == "pseudo_label"
        or teachers[name].sees_clean_text
    }
    for method in methods:
        for name in sorted(picked & set(method.teachers)):
            raise InputError(
                f"train.objective: the method {method.name!r} reads teacher {name!r}, of whose "
                "targets a distill term takes a part (combine: route, positions: masked, what a "
                "pseudo-label is sure of, or what is masked of a view: clean). Cache the teacher "
                "again under another name, or leave one of the two out"
            )


def inputs_of(
    student: Student, batch: Batch, view: str, device: torch.device
) -> Mapping[str, Tensor]:
    """What the student sees beside an expert that saw ``view``: the sentence pairs of that view,
    or the clean text.
    """
    if not view_kind(view).paired:
        return model_inputs(batch.input_ids, batch.lengths, device)
    pairs = batch.pairs[view]
    # Sequences without a pair are shown as one padding token and carry no weight.
    lengths = np.maximum(pairs.lengths, 1)
    types = getattr(student.model.config, "type_vocab_size", 0) >= 2
    return model_inputs(pairs.input_ids, lengths, device, pairs.token_types if types else None)
