"""Losses of students' vectors against sentence encoders', over a step split in any way.

The losses themselves are in ``embedding/losses/``. A loss that compares the rows of a step covers
all its rows, however they are split among micro-batches and processes: every part forms the loss of
the whole step, in which its own rows carry the gradient and the others come from a pass without
gradient. The gradients of all parts then add up to that of the whole. A step of one micro-batch on
one process has its rows at hand; any other costs one more forward pass of the student, without
gradient, for these teachers only (and its dropout is drawn anew). R rows of a micro-batch, N of a
step, D numbers of a vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rekindle.data.batch import Batch, EmbeddingBatch, Ints
from rekindle.train.config import DistillTerm
from rekindle.train.device_batch import inputs_of, language_rows, send
from rekindle.train.distributed import World
from rekindle.train.objective.embedding.base import unit
from rekindle.train.objective.embedding.config import VectorTerm
from rekindle.train.objective.selection import Counts, StepPlan, StepVectors, names_of
from rekindle.train.objective.task_pass import align_with_targets, run_heads
from rekindle.train.student import Student

Run = Callable[..., Tensor]
HELD_OUT_SET = 1024  # held-out texts that are compared with each other


def vector_loss(
    student_vectors: Tensor,
    teacher_vectors: Tensor,
    keys: Ints,
    step: StepVectors | None,
    term: VectorTerm,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of a term's losses, summed over the rows, and the same to show.

    ``student_vectors`` and ``teacher_vectors`` [R,D] are those of the sequences ``keys`` [R];
    ``step``: those of the whole step, None if these are all. Computed in at least 32 bits.
    """
    with torch.autocast(student_vectors.device.type, enabled=False):
        wide = (
            student_vectors if student_vectors.dtype == torch.float64 else student_vectors.float()
        )
        total = wide.sum() * 0.0
        for loss in term.losses.values():
            if loss.compares_rows and step is not None:
                part = _loss_in_step(wide, keys, step, loss.rows)
            else:
                part = loss.rows(wide, teacher_vectors.to(wide.dtype)).sum()
            total = total + loss.settings.weight * part
    return total, total.detach()


def _loss_in_step(
    student_vectors: Tensor, keys: Ints, step: StepVectors, rows: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the sum of the losses of a part's rows, with the gradient of the whole step's loss
    with respect to them.
    """
    places = send(step_rows(keys, step.keys), student_vectors.device)
    device, dtype = student_vectors.device, student_vectors.dtype
    students, teachers = step.student.to(dtype), send(step.teacher, device).to(dtype)
    row_losses = rows(students.index_copy(0, places, student_vectors), teachers)
    total = row_losses.sum()
    return total - total.detach() + row_losses.detach()[places].sum()


def step_rows(keys: Ints, step_keys: Ints) -> Ints:
    """Return the place in ``step_keys`` [N], ascending, of each of ``keys`` [R]: among equal ones
    the first at the first place, and so on.
    """
    order = np.argsort(keys, kind="stable")
    ascending = keys[order]
    earlier = np.arange(len(keys)) - np.searchsorted(ascending, ascending)  # of the same key
    places = np.empty(len(keys), np.int64)
    places[order] = np.searchsorted(step_keys, ascending) + earlier
    return places


def with_vectors(
    counts: Counts,
    task: str,
    parts: Sequence[Batch],
    plan: StepPlan,
    world: World,
    run: Run,
) -> Counts:
    """Return ``counts`` with the vectors of every teacher of the step whose rows are compared.

    ``parts``: this process's micro-batches. ``run(work, …)`` calls ``work(student, …)`` where the
    student's weights are whole; every process makes the same passes.
    """
    if world.size == 1 and len(parts) == 1:
        return counts
    vectors: dict[str, StepVectors] = {}
    for term in plan.distilled:
        for name in term.teachers:
            if not _compares(term, parts[0], name):
                continue
            with torch.no_grad():
                each = [run(embed_sequences, task, p, term, name, world.device) for p in parts]
            targets = [teacher_vectors_of(part, name) for part in parts]
            own = [np.concatenate(column) for column in zip(*targets, strict=True)]
            keys, teachers = zip(*world.gather(own), strict=True)  # by process
            students = world.gather_rows(torch.cat(each).float(), [len(one) for one in keys])
            vectors[name] = sort_vectors(np.concatenate(keys), students, np.concatenate(teachers))
    return replace(counts, vectors=vectors)


def _compares(term: DistillTerm, part: Batch, name: str) -> bool:
    is_vector = isinstance(part.targets.get(name), EmbeddingBatch)
    return is_vector and term.of_vectors.compares_rows


def sort_vectors(keys: Ints, students: Tensor, teachers: np.ndarray) -> StepVectors:
    """Sort the vectors [N,D] of rows by ascending ``keys`` [N], whichever process found them."""
    order = np.argsort(keys, kind="stable")
    return StepVectors(keys[order], students[send(order, students.device)], teachers[order])


def teacher_vectors_of(batch: Batch, name: str) -> tuple[Ints, np.ndarray]:
    """Return a teacher's vectors [R,D] in a batch and the numbers [R] of their sequences."""
    target = batch.targets[name]
    assert isinstance(target, EmbeddingBatch)
    return batch.index[target.rows], target.vectors


def embed_sequences(
    student: Student,
    task: str,
    batch: Batch,
    term: DistillTerm,
    name: str,
    device: torch.device,
) -> Tensor:
    """Return the student's vectors [R,D] of the sequences that have a target of the teacher."""
    target = batch.targets[name]
    if term.view == "masked":
        inputs = language_rows(batch, task, device).inputs
    else:
        inputs = inputs_of(batch, target.info.view, device)
    output = run_heads(student, inputs, batch, {name: target})
    return align_with_targets(output.logits[name], target)[0].float()


def vector_values(terms: Sequence[DistillTerm], name: str) -> list[str]:
    """Return the names of the values that an evaluation measures for the sentence encoder ``name``;
    none if only similarities are learnt, as the vectors may differ in size.
    """
    term = next((term for term in terms if name in term.teachers), None)
    comparable = term is None or term.of_vectors.needs_equal_sizes
    return ["cosine", "mse"] if comparable else []


def vector_sums(student_vectors: Tensor, teacher_vectors: Tensor) -> dict[str, float]:
    """Return the summed cosines of vectors [R,D] and their summed mean squared errors; nothing if
    the sizes differ.
    """
    if student_vectors.shape != teacher_vectors.shape:
        return {}
    students, teachers = student_vectors.double(), teacher_vectors.double()
    return {
        "cosine": float((unit(students) * unit(teachers)).sum()),
        "mse": float((students - teachers).square().mean(dim=1).sum()),
    }


class HeldOutVectors:
    """Vectors of held-out sequences whose losses compare them with each other: collected batch by
    batch, and compared at the end in sets of at most ``HELD_OUT_SET``, by their numbers.
    """

    def __init__(self) -> None:
        self.collected: dict[str, list[tuple[Ints, np.ndarray, np.ndarray]]] = {}  # by teacher

    def add(
        self, student: Student, task: str, batch: Batch, term: DistillTerm, device: torch.device
    ) -> None:
        """Add a batch."""
        for name in term.teachers:
            students = embed_sequences(student, task, batch, term, name, device).cpu().numpy()
            keys, teachers = teacher_vectors_of(batch, name)
            self.collected.setdefault(name, []).append((keys, students, teachers))

    def join(self, others: Sequence["HeldOutVectors"]) -> None:
        """Take what all processes have collected, including this one."""
        names = dict.fromkeys(name for one in others for name in one.collected)
        self.collected = {
            n: [part for one in others for part in one.collected.get(n, [])] for n in names
        }

    def mean(self, term: DistillTerm) -> float | None:
        """Return the term's loss without its weight; None if it has no row."""
        loss_names, sums = names_of(term), dict[str, tuple[float, int]]()
        for name in term.teachers:
            total, rows = sums.get(loss_names[name], (0.0, 0))
            if parts := self.collected.get(name):
                keys, students, teachers = map(np.concatenate, zip(*parts, strict=True))
                step = sort_vectors(keys, torch.from_numpy(students), teachers)
                total, rows = total + _held_out_loss(step, term.of_vectors), rows + len(step.keys)
            sums[loss_names[name]] = total, rows
        means = [total / rows for total, rows in sums.values() if rows]
        return sum(means) if means else None


def _held_out_loss(step: StepVectors, term: VectorTerm) -> float:
    total = 0.0
    for start in range(0, len(step.keys), HELD_OUT_SET):
        part = slice(start, start + HELD_OUT_SET)
        students, teachers = (
            step.student[part].double(),
            torch.from_numpy(step.teacher[part]).double(),
        )
        total += float(vector_loss(students, teachers, step.keys[part], None, term)[1])
    return total
