"""Evaluate a student on held-out documents: its loss, and its distance from each teacher.

``measures`` has the names of the values and the rules of measuring.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import (
    Batch,
    EmbeddingBatch,
    SequenceTargetBatch,
    TokenLabelBatch,
    TokenTargetBatch,
)
from rekindle.data.cache import Cache
from rekindle.data.targets.codec import STEP
from rekindle.data.targets.kinds.registry import vocabulary_kind
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import DistillTerm
from rekindle.train.device_batch import inputs_of, kd_targets, language_rows, sparse_targets
from rekindle.train.distributed import World
from rekindle.train.measures import EVALUATION_VERSION, TEACHER_VALUES_VERSION
from rekindle.train.method import Method
from rekindle.train.method_names import is_better_upwards
from rekindle.train.model.passes import SharedPasses
from rekindle.train.objective.held_out_loss import HeldOutLoss, Sums, add_sums, known_term
from rekindle.train.objective.language_loss import head_loss
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.selection import StepPlan, at_masked_positions
from rekindle.train.objective.task_pass import align_with_targets, run_heads
from rekindle.train.objective.vector_loss import vector_sums, vector_values
from rekindle.train.student import Student


@dataclass(frozen=True)
class EvaluationData:
    """What is evaluated: sequences, teachers and batch size per process."""

    cache: Cache
    index: NDArray[np.int64]
    teachers: tuple[str, ...]
    masked_view: str | None
    batch_sequences: int
    allow_missing: tuple[str, ...] = ()
    methods: tuple[Method, ...] = ()
    # also evaluated separately
    domains: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    terms: Mapping[str, DistillTerm] = field(default_factory=dict)  # by teacher
    objective: Objective | None = None  # defines `loss`; None: there is no such value
    evaluation_version: int = EVALUATION_VERSION  # the run's, which it keeps from its start
    longest_first: bool = False  # each process reads its share by length: batches are hardly padded

    @property
    def has_loss(self) -> bool:
        """Return whether the objective is measured; earlier runs called the cross-entropy
        `loss`.
        """
        return self.objective is not None and self.evaluation_version >= EVALUATION_VERSION

    @property
    def reads_text(self) -> bool:
        """Return whether the cross-entropy is measured: not if nothing trains the
        language model.
        """
        return self.objective is None or not self.has_loss or self.objective.trains_lm_head

    def at(self, plan: StepPlan) -> "EvaluationData":
        """Return what is evaluated after the step of ``plan``: its teachers and methods (those of
        weight 0 are no longer read), and those of the last step, which defines ``loss``.
        """
        plans = [plan]
        if self.objective is not None and self.has_loss:
            plans.append(self.objective.last)
        teachers = dict.fromkeys(name for one in plans for name in one.teachers)
        methods = {method.name: method for one in plans for method, _ in one.methods}
        return replace(self, teachers=tuple(teachers), methods=tuple(methods.values()))

    def batches(self) -> Iterator[Batch]:
        """Yield the batches."""
        for batch, _ in self.share(0, 1):
            yield batch

    def share(self, rank: int, world_size: int) -> Iterator[tuple[Batch, bool]]:
        """Yield a process's share of the batches, and whether each one counts.

        All processes have the same number of batches, as sharded students need; one that has run
        out reads the first sequence again. Shares are contiguous, so that each process opens few
        shards.
        """
        share = np.array_split(self.index, world_size)[rank]
        share = self.cache.longest_first(share) if self.longest_first else share
        longest = math.ceil(len(self.index) / world_size)
        for start in range(0, longest, self.batch_sequences):
            numbers = share[start : start + self.batch_sequences]
            batch = self.cache.gather(
                numbers if len(numbers) else self.index[:1],
                self.teachers,
                epoch=0,
                masked_view=self.masked_view,
                allow_missing=self.allow_missing,
            )
            yield batch, len(numbers) > 0


class Best(TypedDict):
    """The best value of an evaluation so far, and the step it was measured at."""

    step: int
    name: str
    value: float


def better_of(
    evaluation: Mapping[str, float], name: str | None, step: int, best: Best | None
) -> Best | None:
    """Return the better of ``best`` and the value measured at ``step``.

    Agreement is better if higher, everything else if lower; for a method's values ``Method.values``
    decides. A value beats any of another name; one that is not finite beats none.
    """
    value = evaluation.get(name or "", math.nan)
    if name is None or not math.isfinite(value):
        return best
    if best is not None and best["name"] == name:
        gain = value - best["value"] if is_better_upwards(name) else best["value"] - value
        if gain <= 0:
            return best
    return {"step": step, "name": name, "value": value}


def measured_values(info: TeacherInfo, terms: Sequence[DistillTerm]) -> list[str]:
    """Name what an evaluation measures beside a teacher of an objective with these ``terms``."""
    if info.kind == "embedding":
        return vector_values(terms, info.name)
    if info.is_vocabulary and vocabulary_kind(info).certainty_threshold >= 1:
        return ["kl"]
    measured = {"regression": ["mse"], "multi_label_classification": ["agreement"]}
    return measured.get(info.problem or "", ["kl", "agreement"])


Run = Callable[..., Sums]


@torch.no_grad()
def evaluate(
    student: Student,
    data: EvaluationData,
    device: torch.device,
    run: Run | None = None,
    world: World | None = None,
) -> dict[str, float]:
    """Return ``loss`` (the objective, with the last step's weights), ``ce`` (the cross-entropy on
    the text, in nats, if the student's language model is trained), per teacher ``kl/…`` and
    ``agreement/…`` or ``mse/…`` (of vectors ``cosine/…`` and ``mse/…``), and per method its own
    values as ``METHOD/…``.

    ``run(work, …)`` calls ``work(student, …)`` where the student's weights are gathered. Each
    process of a ``world`` evaluates its share and gets the values over all shares, bit-identical
    everywhere.

    KL is forward, at τ = 1, per position (vocabulary teachers, tail bucket) or per sequence. For a
    sample drawn at τ = 1 (threshold, random) it is an unbiased estimate of the KL to the teacher,
    using the teacher's stored entropy; for one drawn at another τ it is larger by a constant that
    does not depend on the student. Agreement is the share of positions with equal most likely
    outcomes, where the targets reveal the teacher's: for a threshold sample where an id has more
    than 1/k, for random draws nowhere (no value). Masked students see replica 0. Each of
    ``data.domains`` has ``ce/DOMAIN``, or ``loss/DOMAIN`` if no cross-entropy is measured. Empty if
    nothing is held out.
    """
    run = run or (lambda work, *arguments: work(student, *arguments))
    world = world or World.alone()
    training = student.training
    student.eval()
    try:
        values = _mean_values(data, device, run, world)
        for name, index in data.domains.items():
            domain_data = replace(data, index=index)
            if data.reads_text:
                domain_data = replace(domain_data, teachers=(), methods=(), objective=None)
            domain_values = _mean_values(domain_data, device, run, world)
            values |= {
                f"{value_name}/{name}": domain_values[value_name]
                for value_name in _domain_value_names(data, domain_values)
            }
    finally:
        student.train(training)
    return values


def _domain_value_names(data: EvaluationData, values: Mapping[str, float]) -> list[str]:
    """Return the name of a domain's one value, if it is there."""
    name = "ce" if data.reads_text and data.evaluation_version >= EVALUATION_VERSION else "loss"
    return [name] if name in values else []


def _mean_values(
    data: EvaluationData, device: torch.device, run: Run, world: World
) -> dict[str, float]:
    """Return every value, as a mean over what it counts in all processes."""
    own_sums: list[dict[str, NDArray[np.float64]]] = []
    loss = HeldOutLoss(data.objective) if data.objective is not None and data.has_loss else None
    for batch, counts in data.share(world.rank, world.size):
        batch_loss = loss if counts or loss is None else HeldOutLoss(loss.objective)
        sums = run(_batch_sums, batch, device, data, batch_loss, world)
        if counts:
            own_sums.append({name: np.array(pair, np.float64) for name, pair in sums.items()})
    totals = add_sums(world.gather(add_sums(own_sums)))
    if loss is not None:
        loss.join(world)
    means = {name: float(total / count) for name, (total, count) in totals.items() if count}
    loss_mean = None if loss is None else loss.mean()
    if data.evaluation_version < EVALUATION_VERSION and "ce" in means:
        loss_mean = means.pop("ce")
    return means if loss_mean is None else {"loss": loss_mean, **means}


def _batch_sums(
    student: Student,
    batch: Batch,
    device: torch.device,
    data: EvaluationData,
    loss: HeldOutLoss | None,
    world: World,
) -> Sums:
    """Return the sums of a batch, and add it to ``loss``: both share the student's passes."""
    # With a sharded student every process must make the same passes, whatever its texts.
    with student.through(SharedPasses(lambda known: not any(world.sum([not known])))):
        sums, term_sums = _model_sums(student, batch, device, data)
        for method in data.methods:
            values = method.evaluate(student, batch, device)
            sums |= {f"{method.name}/{name}": value for name, value in values.items()}
        if loss is not None:
            loss.add(student, batch, device, sums | term_sums)
    return sums


def _model_sums(
    student: Student, batch: Batch, device: torch.device, data: EvaluationData
) -> tuple[Sums, Sums]:
    """Return the sums of all values except the methods', and of the terms that these determine."""
    batch = at_masked_positions(batch) if student.task == "masked_lm" else batch
    sums, term_sums = Sums(), Sums()
    vocabulary = [
        (name, target)
        for name, target in batch.targets.items()
        if isinstance(target, TokenTargetBatch) and target.info.task == student.task
    ]
    if data.reads_text:
        rows = language_rows(batch, student.task, device)
        hidden = student(student.with_domains(rows.inputs, batch.domains), rows.select).hidden
        ce = head_loss(hidden, student.output_head, None, labels=rows.labels, ce_weight=1.0).ce
        sums["ce"] = (float(ce), len(hidden))
        for name, target in vocabulary:
            kd = 0.0
            if len(target.rows):
                places = rows.match(target, batch.input_ids.shape[1])
                target_hidden = hidden[torch.from_numpy(places).to(device)]
                target_sums, kd = _vocabulary_sums(
                    name, student, target_hidden, target, device, data
                )
                sums |= target_sums
            if (term := known_term(data.terms, name, target)) is not None:
                term_sums[term] = (kd, len(target.rows))
    for name, answers in batch.targets.items():
        if isinstance(answers, EmbeddingBatch):
            sums |= _vector_sums(name, student, batch, answers, device)
        if isinstance(answers, SequenceTargetBatch | TokenLabelBatch):
            sums |= _task_sums(name, student, batch, answers, device)
    return sums, term_sums


def _vocabulary_sums(
    name: str,
    student: Student,
    hidden: Tensor,
    target: TokenTargetBatch,
    device: torch.device,
    data: EvaluationData,
) -> tuple[Sums, float]:
    """Return the values for a vocabulary teacher, and the sum of the loss that it teaches."""
    head, by_first_rule = student.output_head, data.evaluation_version < TEACHER_VALUES_VERSION
    k = data.terms[name].k if name in data.terms and not by_first_rule else None
    temperature = target.kind.readable_temperature
    targets = kd_targets(target, temperature, k, device)
    kd = trained = head_loss(hidden, head, targets, temperature=temperature).kd
    sparse = sparse_targets(
        target, temperature, 1 if target.kind.has_all_probabilities else None, device
    )
    if target.kind.is_sample and temperature == 1.0 and not by_first_rule:
        kd = kd + torch.special.entr(sparse.probs.double()).sum() - _entropy(target)
    blocks = [head.logits(block).argmax(dim=1) for block in hidden.split(1024)]
    best = sparse.probs.max(dim=1)
    is_sure = best.values > (0.0 if by_first_rule else target.kind.certainty_threshold)
    top = sparse.ids.gather(1, best.indices[:, None])[:, 0]
    agree = int(((torch.cat(blocks) == top) & is_sure).sum())
    values = {
        f"kl/{name}": (float(kd), len(hidden)),
        f"agreement/{name}": (agree, int(is_sure.sum())),
    }
    return values, float(trained)


def _entropy(target: TokenTargetBatch) -> float:
    """Return the sum of the teacher's own entropies at τ = 1, in nats."""
    return float(target.columns["entropy"].sum(dtype=np.float64)) / STEP


def _task_sums(
    name: str,
    student: Student,
    batch: Batch,
    target: SequenceTargetBatch | TokenLabelBatch,
    device: torch.device,
) -> Sums:
    imitating = _imitating_head(name, student, target.info)
    if imitating is None:
        return {}
    head_name, classes = imitating
    inputs = inputs_of(batch, target.info.view, device)
    output = run_heads(student, inputs, batch, {head_name: target})
    logits, teacher_logits = align_with_targets(output.logits[head_name], target)
    logits = logits.float()[:, classes]
    count = len(logits)
    if not count:
        return {}
    if target.info.problem == "regression":
        error = (logits - teacher_logits).square().mean(dim=1).sum()
        return {f"mse/{name}": (float(error), count)}
    if target.info.problem == "multi_label_classification":
        agree = ((logits > 0) == (teacher_logits > 0)).float().mean(dim=1).sum()
        return {f"agreement/{name}": (float(agree), count)}
    teacher_log_probs, student_log_probs = (
        torch.log_softmax(teacher_logits, dim=1),
        torch.log_softmax(logits, dim=1),
    )
    kl = (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum()
    agree = (logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).sum()
    return {f"kl/{name}": (float(kl), count), f"agreement/{name}": (float(agree), count)}


def _vector_sums(
    name: str, student: Student, batch: Batch, target: EmbeddingBatch, device: torch.device
) -> Sums:
    if name not in student.head_configs:
        return {}
    inputs = inputs_of(batch, target.info.view, device)
    output = run_heads(student, inputs, batch, {name: target})  # in every process
    if not len(target.rows):
        return {}
    values = vector_sums(*align_with_targets(output.logits[name], target))
    return {
        f"{value_name}/{name}": (value, len(target.rows)) for value_name, value in values.items()
    }


def _imitating_head(name: str, student: Student, info: TeacherInfo) -> tuple[str, list[int]] | None:
    """Return the head that imitates the expert and the indices of its classes there, if any."""
    if name in student.head_configs:
        return name, list(range(info.num_labels or 0))
    for head, config in student.head_configs.items():
        if name in head.split("+"):  # a head over the union of several experts' labels
            names = config.label_names
            is_separate = f"{name}/{info.label_names[0]}" in names
            label_names = [f"{name}/{n}" if is_separate else n for n in info.label_names]
            return head, [names.index(n) for n in label_names]
    return None
