"""The task side of a step's loss: the student's heads imitate the experts' logits.

Shapes: R rows (sequences or positions), C classes of an expert, U labels of a union.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rekindle.data.batch import Batch
from rekindle.data.targets.schema import TeacherInfo
from rekindle.kernels.losses import kd_loss
from rekindle.train.config import MIXED, DistillTerm
from rekindle.train.device_batch import send
from rekindle.train.model.network import HeadConfig
from rekindle.train.objective.label_union import LabelUnion, certainty, expert_weights, margin
from rekindle.train.objective.pseudo_labels import pseudo_label_loss
from rekindle.train.objective.ranking import RankedRows, ranking_loss
from rekindle.train.objective.selection import Add, Counts, names_of
from rekindle.train.objective.task_pass import align_with_targets, mixture_rows, mixture_values
from rekindle.train.objective.vector_loss import vector_loss


def heads_of(term: DistillTerm, teachers: Mapping[str, TeacherInfo]) -> dict[str, HeadConfig]:
    """Return the task heads that a term needs: one per expert, or one over the union of their
    labels.
    """
    experts = [teachers[name] for name in term.teachers if not teachers[name].is_vocabulary]
    if term.combine not in MIXED or not experts:
        settings = term.of_vectors
        vector_options = (settings.projection, settings.needs_equal_sizes)  # only for vectors
        return {expert.name: HeadConfig.of(expert, *vector_options) for expert in experts}
    names = LabelUnion.of(experts, term.labels).names
    problem = "single_label_classification"
    head = HeadConfig(kind="sequence", num_labels=len(names), label_names=names, problem=problem)
    return {union_head(term): head}


def union_head(term: DistillTerm) -> str:
    """Return the name of the head over the union of the experts' labels."""
    return "+".join(term.teachers)


def add_task_losses(
    logits: Mapping[str, Tensor],
    batch: Batch,
    terms: Sequence[tuple[DistillTerm, float]],
    teachers: Mapping[str, TeacherInfo],
    counts: Counts,
    add: Add,
) -> None:
    """Call ``add(name, loss, shown)`` for the terms' losses; ``logits`` by head, of all rows."""
    for term, weight in terms:
        if term.combine in MIXED:
            losses = {
                term.teachers[0]: _mixture_loss(logits[union_head(term)], batch, term, teachers)
            }
        else:
            losses = {
                name: _expert_loss(logits[name], batch, teachers[name], term, counts)
                for name in term.teachers
            }
        for name, (loss, unweighted) in losses.items():
            loss_name = names_of(term)[name]
            # A ranking loss is over pairs too, and a mean already.
            scale = 1.0 if term.ranking is not None else 1.0 / max(counts.rows[loss_name], 1)
            add(loss_name, loss * (weight * scale), unweighted * scale)


def _expert_loss(
    logits: Tensor, batch: Batch, info: TeacherInfo, term: DistillTerm, counts: Counts
) -> tuple[Tensor, Tensor]:
    """Return the loss of a head against its expert (for rankings of scores, differences and
    groups), and the value to show.
    """
    student_rows, teacher_rows = align_with_targets(logits, batch.targets[info.name])
    if info.kind == "embedding":
        keys = batch.index[batch.targets[info.name].rows]
        return vector_loss(
            student_rows, teacher_rows, keys, counts.vectors.get(info.name), term.of_vectors
        )
    if term.ranking is None:
        return task_loss(student_rows.float(), teacher_rows, info, term)
    rows = RankedRows.of(batch, info.name, term.ranking.group)
    loss = ranking_loss(
        *(student_rows.float()[:, 0], teacher_rows[:, 0], rows, counts.groups[info.name]),
        *(counts.rows[names_of(term)[info.name]], term.ranking, term.temperature),
    )
    return loss, loss.detach()


def _mixture_loss(
    logits: Tensor, batch: Batch, term: DistillTerm, teachers: Mapping[str, TeacherInfo]
) -> tuple[Tensor, Tensor]:
    """Return Σ v·τ²·D(q ‖ p_S) with q = Σ_j w_j·pad_j(softmax(z_j/τ)) (MUKI), and Σ v·D.

    For ``concatenate``, q = pad(softmax((z_1, …, z_J)/τ)).
    """
    rows, count = mixture_rows(batch, term), len(term.teachers)
    values = mixture_values(batch, term, "logits")
    expert_logits = {name: send(each, logits.device) for name, each in values.items()}
    union = LabelUnion.of([teachers[name] for name in term.teachers], term.labels)
    weights = logits.new_full((len(rows), count), 1.0 / count, dtype=torch.float32)
    importance = None
    if term.combine == "uncertainty":
        means = mixture_values(batch, term, "mc_probs").values()
        certainties = torch.stack([certainty(send(each, logits.device)) for each in means], 1)
        weights = expert_weights(certainties, term.uncertainty)
        importance = margin(certainties) if term.uncertainty.margin else None
    if term.combine == "concatenate":
        mixture = union.concatenate(expert_logits, term.temperature)
    else:
        mixture = union.mix(expert_logits, weights, term.temperature)
    student_logits = logits[send(rows, logits.device)].float()
    return _distribution_loss(student_logits, mixture, term, importance)


def task_loss(
    logits: Tensor, teacher_logits: Tensor, info: TeacherInfo, term: DistillTerm
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a task head's logits [R,C], a scalar, and the same without τ² (the
    value to show).

    Regression and ``mse``: squared error, mean over outputs. ``pseudo_label``: cross-entropy on the
    expert's class. Multi-label: KL of each label's Bernoulli. Classification: the divergence
    between softmax(teacher/τ) and softmax(student/τ), times τ².
    """
    if term.divergence == "mse" or info.problem == "regression":
        loss = F.mse_loss(logits, teacher_logits, reduction="none").mean(dim=1).sum()
        return loss, loss.detach()
    if term.divergence == "pseudo_label":
        loss = pseudo_label_loss(logits, teacher_logits, info, term.confidence)
        return loss, loss.detach()
    tau = term.temperature
    if info.problem == "multi_label_classification":
        p = torch.sigmoid(teacher_logits / tau)
        entropy = F.binary_cross_entropy_with_logits(teacher_logits / tau, p, reduction="sum")
        cross = F.binary_cross_entropy_with_logits(logits / tau, p, reduction="sum")
        loss = (cross - entropy) / logits.shape[1]
        return loss * tau**2, loss.detach()
    return _distribution_loss(logits, torch.softmax(teacher_logits / tau, dim=1), term, None)


def _distribution_loss(
    logits: Tensor, probs: Tensor, term: DistillTerm, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return Σ rows of importance·τ²·D(probs ‖ softmax(logits/τ)), and of importance·D."""
    result = kd_loss(
        logits,
        torch.arange(logits.shape[1], device=logits.device).expand_as(logits),
        probs,
        tail_prob=torch.zeros(len(logits), device=logits.device),
        temperature=term.temperature,
        divergence=term.divergence,
        skew=term.skew,
        row_weight=importance,
        reduction="sum",
    )
    return result.loss, result.kd
