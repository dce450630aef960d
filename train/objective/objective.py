"""The loss of a training step: w · CE + Σ weight · τ² · divergence + Σ weight · method, from one
batch and one student.

Every mean is over the whole step (all micro-batches, all processes): ``Objective.counts`` is
computed from the step's batch before it is split, so gradient accumulation changes only rounding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rekindle.data.batch import Batch
from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import DistillTerm, ObjectiveConfig
from rekindle.train.device_batch import CLEAN_TEXT, inputs_of, language_rows
from rekindle.train.measures import GRADIENT
from rekindle.train.method import Method
from rekindle.train.model.network import HeadConfig, StudentOutput
from rekindle.train.model.passes import RecordedPasses
from rekindle.train.objective.language_loss import LanguageLoss
from rekindle.train.objective.selection import Add, Counts, StepPlan, count_rows, select_targets
from rekindle.train.objective.task_loss import add_task_losses, heads_of
from rekindle.train.objective.task_pass import run_heads
from rekindle.train.objective.term_gradients import squared_gradient_norms
from rekindle.train.objective.terms import check_terms
from rekindle.train.schedules import Schedule, Weight, weight_at
from rekindle.train.student import Student

Weighted = Sequence[tuple[DistillTerm, float]]


class MicroBatchLoss(NamedTuple):
    """A micro-batch's share of the step's loss.

    ``terms`` (detached, unweighted) add up over micro-batches. At steps that measure gradients,
    ``terms`` also has each term's squared gradient norm, under GRADIENT and its name; these add up
    too.
    """

    total: Tensor
    terms: dict[str, Tensor]


ROUTER = "router"  # the name of the load-balancing loss of mixture-of-experts students


class _Passes(NamedTuple):
    """The terms of a step with their weights, by the forward pass that they need."""

    language: list[tuple[DistillTerm, float]]
    joined: list[tuple[DistillTerm, float]]  # task terms that share the pass of the LM loss
    by_view: dict[str, list[tuple[DistillTerm, float]]]  # of sentence pairs, or CLEAN_TEXT

    def reads_text(self, hard: float) -> bool:
        """Return whether there is a pass for the LM loss, with weight ``hard``."""
        return hard > 0 or bool(self.language or self.joined)


@dataclass
class Objective:
    """The configured loss for one student task and the teachers of one cache."""

    config: ObjectiveConfig
    teachers: Mapping[str, TeacherInfo]
    task: str
    steps: int
    methods: Sequence[Method] = ()
    load_balancing_weight: float = 0.0  # of the student's load-balancing loss, once it is built
    head_steps: int = 0  # the first steps, which train only the language model's own head
    measure_every: int | None = None  # steps between two measurements of the terms' gradients

    def __post_init__(self) -> None:
        check_terms(self.config.distill, self.teachers, self.task)
        _check_shared(self.config.distill, self.methods, self.teachers)
        if self.head_steps and not any(self.plan(0).weights):
            raise InputError(
                "train.warm_head_steps trains only the language model's own head, but no loss "
                "reaches that head: hard.weight is 0 at the first step, and no vocabulary teacher "
                "has a weight. Leave warm_head_steps out"
            )
        for step, when in self._steps_to_check():
            if not any(self.plan(step).weights):
                raise InputError(
                    f"train.objective: {when} every weight is 0, so nothing is trained. Give "
                    "hard.weight, a distill term or a method a weight above 0, or end the run "
                    "earlier"
                )

    def _steps_to_check(self) -> Iterator[tuple[int, str]]:
        """Yield the steps at which all weights could have become 0, with their names in messages:
        the last step, and the first after each schedule or the head's steps end.

        Step 2 is the first with a weight that rises from 0.
        """
        yield self.steps - 1, "at the end of the run"
        if self.head_steps:
            yield self.head_steps, f"at step {self.head_steps + 1}"
        for weight in self._weights():
            if isinstance(weight, Schedule) and weight.schedule != "constant":
                step = math.ceil(weight.over * self.steps - 1e-9) + 1
                if step < self.steps:
                    yield step, f"at step {step + 1}"
        if self.steps > 1:
            yield 1, "at step 2"

    def _weights(self) -> list[Weight]:
        """Return the weights of the cross-entropy, of each term and of each method."""
        weights = [self.config.hard.weight, *(term.weight for term in self.config.distill)]
        return weights + [method.settings.weight for method in self.methods]

    @property
    def heads(self) -> dict[str, HeadConfig]:
        """Return the task heads that the student needs."""
        each = [heads_of(term, self.teachers) for term in self.config.distill]
        return {name: head for heads in each for name, head in heads.items()}

    @property
    def active_teachers(self) -> set[str]:
        """Return the teachers with a weight above 0 at some step."""
        plans = self._end_plans
        methods = {method.name: method for plan in plans for method, _ in plan.methods}
        of_methods = {name for method in methods.values() for name in method.teachers}
        return of_methods.union(*(term.teachers for plan in plans for term in plan.distilled))

    @property
    def reads_masks(self) -> bool:
        """Return whether any of its losses is on masked text, if the student is a masked LM."""
        return any(
            plan.methods
            or self._group_by_pass(plan).reads_text(plan.hard)
            or any(term.positions == "masked" for term in plan.distilled)
            for plan in self._end_plans
        )

    def plan(self, step: int) -> StepPlan:
        """Return what ``step`` (0-based) reads and learns from."""
        hard, *weights = (weight_at(weight, step, self.steps) for weight in self._weights())
        split = len(self.config.distill)
        terms = zip(self.config.distill, weights[:split], strict=True)
        methods = zip(self.methods, weights[split:], strict=True)
        plan = StepPlan(
            step,
            hard,
            tuple((term, weight) for term, weight in terms if weight > 0),
            tuple((method, weight) for method, weight in methods if weight > 0),
            (hard, *weights),
        )
        return self._head_only(plan) if step < self.head_steps else plan

    def _head_only(self, plan: StepPlan) -> StepPlan:
        """Return the part of a plan that trains the language model's own head."""
        trains_head = [self.teachers[t.teachers[0]].is_vocabulary for t in self.config.distill]
        trains_head += [False] * len(self.methods)
        weights = [
            w if keep else 0.0 for w, keep in zip(plan.weights[1:], trains_head, strict=True)
        ]
        terms = tuple(
            (term, weight)
            for term, weight in plan.terms
            if self.teachers[term.teachers[0]].is_vocabulary
        )
        return replace(plan, terms=terms, methods=(), weights=(plan.hard, *weights))

    @property
    def _end_plans(self) -> list[StepPlan]:
        """Return the plans of the first step, of the first after ``head_steps``, and of the last.

        Schedules are monotonic, so a part with weight 0 in all three is never used.
        """
        return [self.plan(0), self.plan(self.head_steps), self.last]

    @property
    def last(self) -> StepPlan:
        """Return the plan of the last step, by which the run is judged."""
        return self.plan(self.steps - 1)

    @property
    def trains_lm_head(self) -> bool:
        """Return whether the language model's own head is trained at some step, by the
        cross-entropy or by vocabulary teachers. If not, its cross-entropy would be that of an
        untrained head.
        """
        return any(plan.hard > 0 or self._group_by_pass(plan).language for plan in self._end_plans)

    def select_targets(self, batch: Batch, plan: StepPlan) -> Batch:
        """Return the batch with only the targets that the step's terms use."""
        return select_targets(batch, plan.distilled)

    def counts(self, batch: Batch, plan: StepPlan) -> Counts:
        """Count the rows that the step's means are over, in a batch of selected targets."""
        counts = count_rows(batch, self.task, plan.distilled)
        rows = dict(counts.rows)
        for method, _ in plan.methods:
            rows |= {f"{method.name}/{name}": n for name, n in method.count(batch).items()}
        # The load-balancing loss is divided among micro-batches by their tokens.
        if self.load_balancing_weight and self._group_by_pass(plan).reads_text(plan.hard):
            rows[ROUTER] = int(batch.lengths.sum())
        return replace(counts, rows=rows)

    def loss_names(self, counts: Counts, plan: StepPlan) -> list[str]:
        """Return the names of the losses that the step has rows for, in a fixed order, and of their
        gradients if they are measured.
        """
        names = ["ce"] if plan.hard > 0 and counts.labels else []
        names += [name for name, rows in sorted(counts.rows.items()) if rows]
        return names + [GRADIENT + name for name in names if self._measures_gradients(plan)]

    def loss(
        self, student: Student, batch: Batch, counts: Counts, plan: StepPlan, device: torch.device
    ) -> MicroBatchLoss:
        """Return the loss of one micro-batch; ``counts`` are the whole step's.

        Runs the student once per view that a term needs. The plan alone decides which passes are
        made, never a micro-batch: all processes make the same ones. The total always has a
        gradient: if no row here has a loss, another process's may have one, and all must take part
        in its backward pass.
        """
        if not self._measures_gradients(plan):
            return self._loss(student, batch, counts, plan, device)
        recorded = RecordedPasses()
        with student.through(recorded):
            micro_batch_loss = self._loss(student, batch, counts, plan, device)

        def form_terms(add: Add) -> None:
            self._add_each(student, batch, counts, plan, device, add, separate=True)

        norms = squared_gradient_norms(student, recorded.passes, form_terms, device)
        return micro_batch_loss._replace(terms=micro_batch_loss.terms | norms)

    def _measures_gradients(self, plan: StepPlan) -> bool:
        return self.measure_every is not None and plan.step % self.measure_every == 0

    def _loss(
        self, student: Student, batch: Batch, counts: Counts, plan: StepPlan, device: torch.device
    ) -> MicroBatchLoss:
        total, terms = torch.zeros((), device=device), dict[str, Tensor]()

        def add(name: str, loss: Tensor | None, shown: Tensor) -> None:
            nonlocal total
            total = total if loss is None else total + loss
            terms[name] = terms.get(name, torch.zeros_like(shown)) + shown.detach()

        self._add_each(student, batch, counts, plan, device, add)
        if not total.requires_grad:
            embeddings = student.model.get_input_embeddings().weight
            trained = next(iter(student.own_head.values()), embeddings)
            total = total + 0.0 * (trained if plan.step < self.head_steps else embeddings)[0].sum()
        return MicroBatchLoss(total, terms)

    def _add_each(
        self,
        student: Student,
        batch: Batch,
        counts: Counts,
        plan: StepPlan,
        device: torch.device,
        add: Add,
        separate: bool = False,
    ) -> None:
        """Call ``add(name, loss, shown)`` for all terms of a plan, including its methods'."""
        self.add_terms(student, batch, counts, plan, device, add, separate)
        for method, weight in plan.methods:
            for name, loss, shown in method.losses(student, batch, plan.step, device):
                scale = 1.0 / max(counts.rows[f"{method.name}/{name}"], 1)
                add(f"{method.name}/{name}", loss * (weight * scale), shown * scale)

    def add_terms(
        self,
        student: Student,
        batch: Batch,
        counts: Counts,
        plan: StepPlan,
        device: torch.device,
        add: Add,
        separate: bool = False,
    ) -> None:
        """Call ``add(name, loss, shown)`` for the cross-entropy and the terms of a plan, without
        its methods. ``separate``: do not fuse the cross-entropy with a distillation term;
        add each as a loss of its own.
        """
        passes = self._group_by_pass(plan)
        if passes.reads_text(plan.hard):
            rows = language_rows(batch, self.task, device)
            output = self._run_task_heads(
                student, rows.inputs, batch, passes.joined, counts, add, rows.select
            )
            assert output.hidden is not None
            language_loss = LanguageLoss(batch, rows, output.hidden, student.output_head, counts)
            language_loss.add_all(plan.hard, passes.language, add, separate)
            # Only once, for this pass; it is not a loss of what a head reads.
            balancing_loss = output.load_balancing_loss
            if self.load_balancing_weight and balancing_loss is not None and not separate:
                tokens = int(batch.lengths.sum())
                share = balancing_loss * (tokens / max(counts.rows[ROUTER], 1))
                add(ROUTER, share * self.load_balancing_weight, share)
        for view, view_terms in sorted(passes.by_view.items()):
            inputs = inputs_of(batch, view, device)
            self._run_task_heads(student, inputs, batch, view_terms, counts, add)

    def shown(self, plan: StepPlan) -> tuple[bool, frozenset[str]]:
        """Return whether a step has a pass for the LM loss, and what its other passes show: views
        of sentence pairs, or CLEAN_TEXT.
        """
        passes = self._group_by_pass(plan)
        return passes.reads_text(plan.hard), frozenset(passes.by_view)

    def _group_by_pass(self, plan: StepPlan) -> "_Passes":
        passes = _Passes([], [], {})
        for term, weight in plan.terms:
            teacher = self.teachers[term.teachers[0]]
            paired = teacher.view_class.paired
            if teacher.is_vocabulary:
                passes.language.append((term, weight))
            elif not paired and (term.view == "masked" or self.task == "causal_lm"):
                passes.joined.append((term, weight))
            else:
                passes.by_view.setdefault(teacher.view if paired else CLEAN_TEXT, []).append(
                    (term, weight)
                )
        return passes

    def _run_task_heads(
        self,
        student: Student,
        inputs: Mapping[str, Tensor],
        batch: Batch,
        terms: Weighted,
        counts: Counts,
        add: Add,
        select: Tensor | None = None,
    ) -> StudentOutput:
        """Run the student once, add its experts' losses, and return its output."""
        names = [name for term, _ in terms for name in heads_of(term, self.teachers)]
        heads = {name: batch.targets.get(name) for name in names}  # None: over a union of labels
        output = run_heads(student, inputs, batch, heads, select)
        add_task_losses(output.logits, batch, terms, self.teachers, counts, add)
        return output


def _check_shared(
    terms: Sequence[DistillTerm], methods: Sequence[Method], teachers: Mapping[str, TeacherInfo]
) -> None:
    """Check that no method reads a teacher whose targets a distill term reduces."""
    reduced_teachers = {
        name
        for term in terms
        for name in term.teachers
        if term.combine == "route"
        or term.positions == "masked"
        or term.divergence == "pseudo_label"
        or teachers[name].sees_clean_text
    }
    for method in methods:
        for name in sorted(reduced_teachers & set(method.teachers)):
            raise InputError(
                f"train.objective: the method {method.name!r} reads teacher {name!r}, but a "
                "distill term uses only a part of its targets (combine: route, positions: masked, "
                "what a pseudo-label is sure of, or the masked positions of view: clean). Cache "
                "the teacher again under another name, or leave one of the two out"
            )
