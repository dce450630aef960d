"""Teach a student from a cache in your own training loop: λ·τ²·divergence + μ·cross-entropy.

The losses are those of ``rekindle.kernels.losses``. Every mean is over the whole step, all its
micro-batches and processes, if their counts are given. B sequences, S positions, V vocabulary, H
hidden; P rows with a loss.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.corpus.config import content_ids
from rekindle.data.corpus.shared_ids import unshared_ids
from rekindle.data.corpus.tokenizer import wrap_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.targets.kinds.registry import vocabulary_kind
from rekindle.data.targets.schema import TeacherInfo
from rekindle.kernels.call import StudentLogits
from rekindle.kernels.losses import kd_loss
from rekindle.kernels.targets import read_number
from rekindle.train.config import DistillTerm
from rekindle.train.hf.collator import TargetCollator
from rekindle.train.hf.given import (
    check_allowed,
    check_cache,
    check_moved,
    check_names,
    check_rows,
)
from rekindle.train.model.fitting import AUTO_CLASSES, CLASS_TASKS
from rekindle.train.model.split_model import OutputHead
from rekindle.train.objective.language_loss import IGNORED, head_loss
from rekindle.train.objective.selection import Counts
from rekindle.train.objective.terms import check_terms, describe_interpolation
from rekindle.train.record.coverage import check_covered
from rekindle.train.to_device import DeviceBatch, DeviceTargets, by_name, to_device

log = logging.getLogger("rekindle")

# return the loss's input from the student at the given rows
Rows = Callable[[Tensor], Tensor | StudentLogits]


class StepShare(NamedTuple):
    """A micro-batch's share of a step's loss; all micro-batches' and processes' shares add up."""

    loss: Tensor  # μ·ce + Σ λ·τ²·kd; only this carries a gradient
    ce: Tensor
    kd: dict[str, Tensor]  # by teacher


class Distillation:
    """Teachers of a cache, how they teach, and their weights beside the cross-entropy."""

    def __init__(
        self,
        cache: Cache,
        teachers: Sequence[str],
        *,
        task: str | None = None,
        kd_weight: float | Mapping[str, float] = 1.0,
        ce_weight: float = 1.0,
        temperature: float | Mapping[str, float] | None = None,
        temperature_between: str = "refuse",
        divergence: str = "forward_kl",
        skew: float | None = None,
        tail: str = "bucket",
        k: int | Mapping[str, int] | None = None,
        masked_view: str | None = None,
        allow_missing: Sequence[str] = (),
    ):
        """Choose what is taught; nothing is read yet.

        Args:
            cache: a cache with the teachers' targets.
            teachers: names of language models in it.
            task: the student's task, masked_lm or causal_lm; None: the teachers'.
            kd_weight: λ, for all or by teacher. A teacher with weight 0 is not read.
            ce_weight: μ, the weight of the cross-entropy on the text.
            temperature: τ, for all or by teacher; None: 1, or the one a sample was drawn at.
            temperature_between: refuse, or interpolate, for ``topk`` targets at a temperature
                between three or more stored ones (``data/targets/interpolation.py`` gives the
                accuracy).
            divergence: as for ``kd_loss``.
            skew: α of the divergence skew_kl; None: 0.1.
            tail: as for ``kd_loss``.
            k: read only this many candidates, for all or by teacher; None: all that are stored.
            masked_view: for masked LMs the student's masks; None: the only ones in the cache.
            allow_missing: teachers that may lack targets; sequences without them train without KD.

        Raises InputError for what cannot be taught: another task, other masks than a teacher's, a
        temperature or k that is not stored, a divergence that a sample cannot teach, incomplete
        targets.
        """
        check_cache(cache)
        check_names(cache, teachers)
        check_allowed(allow_missing, teachers)
        self.cache, self.ce_weight = cache, ce_weight
        self._collators: list[TargetCollator] = []  # they learn from here that a loss is computed
        self._compared = False  # whether the student's tokenizer was compared with the cache's
        self.infos = {name: cache.teacher(name).info for name in teachers}
        teachers_task = _task_of(self.infos)
        self.task = task or teachers_task
        self.masked_view = _masks(cache, self.infos, self.task, masked_view)
        known_teachers = f"the teachers are {list(self.infos)}"
        weights = by_name(kd_weight, self.infos, "kd_weight", known_teachers)
        if without_weight := [name for name in self.infos if name not in weights]:
            raise InputError(
                f"kd_weight is {kd_weight} and leaves out {without_weight}. Give one number for "
                "all, or one for each teacher: 0 for a teacher that should not teach"
            )
        temperatures = by_name(temperature, self.infos, "temperature", known_teachers)
        ks = by_name(k, self.infos, "k", known_teachers)
        term_settings = [
            {
                "teachers": [name],
                "weight": weights[name],
                "temperature": temperatures.get(name, vocabulary_kind(info).readable_temperature),
                "temperature_between": temperature_between,
                "divergence": divergence,
                "skew": skew,
                "tail": tail,
                "k": ks.get(name),
            }
            for name, info in self.infos.items()
        ]
        terms = [parse_settings(DistillTerm, term) for term in term_settings]
        check_terms(terms, self.infos, self.task, "teachers")
        self.terms = {term.teachers[0]: term for term in terms if weights[term.teachers[0]] > 0}
        for line in describe_interpolation([*self.terms.values()], self.infos):
            log.info(line)
        self.temperature_between = terms[0].temperature_between
        self.weights = {name: float(weights[name]) for name in self.terms}
        self.allow_missing = tuple(allow_missing)
        taught = {name: cache.teacher(name) for name in self.terms}
        check_covered(taught, self.allow_missing, "allow_missing")
        ce_weight = read_number("ce_weight", ce_weight)
        if not 0 <= ce_weight < math.inf or not (ce_weight or self.terms):
            raise InputError(
                f"ce_weight is {ce_weight} and kd_weight {kd_weight}: weights must be 0 or more, "
                "and at least one above 0, or nothing is trained"
            )

    @property
    def vocabulary_size(self) -> int:
        """Return V of the corpus; a student's further rows are not tokens and take no part in a
        loss.
        """
        return int(self.cache.corpus.info["tokenizer"]["size"])

    def collator(self) -> TargetCollator:
        """Return the collator that makes batches from a data set's places."""
        collator = TargetCollator(
            self.cache, list(self.terms), self.task, self.masked_view, self.allow_missing
        )
        self._collators.append(collator)
        return collator

    def check_student(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Raise InputError for a student without a vocabulary, or with another task or vocabulary
        than the targets'.

        Without the student's tokenizer, here or in an earlier call, only its number of rows can be
        compared, and a warning says so.
        """
        student: Any = model
        base = student.get_base_model() if hasattr(student, "get_base_model") else student
        kind = type(base).__name__
        task = next((task for form, task in CLASS_TASKS.items() if re.search(form, kind)), None)
        if task not in (None, self.task):
            raise InputError(
                f"the student is a {kind}, a {task}; the targets are for a {self.task}. Use a "
                "student of the teachers' task, or teachers of the student's task"
            )
        output = base.get_output_embeddings()
        if output is None and task is None:
            raise InputError(
                f"the student is a {kind}, which has no output over the vocabulary. Load it as a "
                f"language model, with {AUTO_CLASSES[self.task]}"
            )
        rows = base.config.get_text_config().vocab_size if output is None else len(output.weight)
        if rows < self.vocabulary_size:
            raise InputError(
                f"the student has another vocabulary than the targets: it has {rows:,} rows, the "
                f"cache's tokenizer {self.vocabulary_size:,} ids. Use a student with the cache's "
                "tokenizer, or make a cache with the student's"
            )
        if rows > self.vocabulary_size:
            log.info(
                "the student has %d rows, the cache's tokenizer %d ids: the extra rows are not "
                "tokens, and take no part in the loss",
                *(rows, self.vocabulary_size),
            )
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            facts, compared_ids = self.cache.corpus.info["tokenizer"], np.zeros(0, np.int64)
            if self.task == "masked_lm" and facts["mask_id"] is not None:
                compared_ids = np.append(content_ids(facts), facts["mask_id"]).astype(np.int64)
            wrapped = wrap_tokenizer(tokenizer, str(getattr(tokenizer, "name_or_path", "")))
            advice = "Use a student with the cache's tokenizer, or make a cache with the student's"
            unshared_ids(self.cache.corpus, wrapped, compared_ids, "the student", advice)
            self._compared = True
        elif not self._compared:
            log.warning(
                "the student's tokenizer is not known, so it is not checked that its ids mean "
                "what the cache's do. Give a fast tokenizer: as the Trainer's processing_class, "
                "or to check_student"
            )

    def counts(self, batches: Sequence[tuple[Batch, Tensor]]) -> Counts:
        """Return how many rows each mean is over, from the micro-batches of a step with their
        ``labels`` [B,S]. ``Counts.over`` sums them over processes.
        """
        labels, rows = 0, dict.fromkeys(self.terms, 0)
        for batch, batch_labels in batches:
            next_labels = batch_labels[:, 1:] if self.task == "causal_lm" else batch_labels
            labels += int((next_labels != IGNORED).sum())
            for name in rows:
                rows[name] += len(batch.targets[name].rows)
        return Counts(labels, rows)

    def to_device(self, batch: Batch, device: torch.device | str) -> DeviceBatch:
        """Send a batch's targets to a device, in their stored form."""
        temperature = {name: term.temperature for name, term in self.terms.items()}
        k = {name: term.k for name, term in self.terms.items() if term.k is not None}
        return to_device(
            batch,
            device,
            task=self.task,
            temperature=temperature,
            k=k,
            temperature_between=self.temperature_between,
        )

    def loss(
        self,
        logits: Tensor,
        batch: Batch | DeviceBatch,
        labels: Tensor | None = None,
        counts: Counts | None = None,
    ) -> StepShare:
        """Return the loss of a micro-batch from the student's logits [B,S,V].

        Args:
            logits: for the inputs that the collator gave; V may be padded.
            batch: the collator's, sent to the logits' device here or earlier.
            labels: [B,S] as the collator gave them; None: the text's own. −100 has no
                cross-entropy, but its targets are still learnt.
            counts: of the whole step; None: of this batch alone.
        """
        size = self.vocabulary_size
        check_rows(logits, logits.shape[-1], size, batch, labels)

        def rows(select: Tensor) -> Tensor:
            return logits.flatten(0, 1)[select][:, :size]

        return self._loss(rows, logits, batch, labels, counts, None)

    def hidden_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        batch: Batch | DeviceBatch,
        labels: Tensor | None = None,
        counts: Counts | None = None,
        *,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> StepShare:
        """Return the same loss from the input of the output matrix, hidden [B,S,H], and the matrix
        ``weight`` [V,H] (and ``bias`` [V]); only a bounded block of logits is held at a time.
        """
        size = self.vocabulary_size
        check_rows(hidden, len(weight), size, batch, labels)
        head = OutputHead(weight, bias, softcap, logit_scale).cut(size)

        def rows(select: Tensor) -> StudentLogits:
            return StudentLogits(hidden.flatten(0, 1)[select], head.weight, head.bias)

        return self._loss(rows, hidden, batch, labels, counts, head)

    def _loss(
        self,
        rows: Rows,
        output: Tensor,
        batch: Batch | DeviceBatch,
        labels: Tensor | None,
        counts: Counts | None,
        head: OutputHead | None,
    ) -> StepShare:
        """Run each position through the head once if possible: the first teacher with a target at
        every row computes the cross-entropy in its call.
        """
        for collator in self._collators:
            collator.is_used = True
        sent = batch if isinstance(batch, DeviceBatch) else self.to_device(batch, output.device)
        row_labels = sent.labels if labels is None else self._at(labels, sent.select)
        counts = counts or self._count_rows(sent, row_labels)
        scale = self.ce_weight / max(counts.labels, 1)
        ce = total = output.new_zeros((), dtype=torch.float32)
        needs_ce, kd = self.ce_weight > 0, dict[str, Tensor]()
        options: dict[str, Any] = {"reduction": "sum"}
        if head is not None:
            options |= {"softcap": head.softcap, "logit_scale": head.logit_scale}
        for name, term in self.terms.items():
            target = sent.targets[name]
            assert isinstance(target, DeviceTargets)
            check_moved(name, target, term.temperature)
            row_count, kd[name] = max(counts.rows[name], 1), torch.zeros_like(ce)
            if not len(target.select):
                continue
            with_ce = needs_ce and len(target.select) == len(sent.select)
            result = kd_loss(
                rows(target.select),
                target.targets,
                labels=row_labels if with_ce else None,
                temperature=target.temperature,
                ce_weight=scale if with_ce else 0.0,
                kd_weight=self.weights[name] / row_count,
                divergence=term.divergence,
                tail=term.tail,
                skew=term.skew,
                ignore_index=IGNORED,
                **options,
            )
            total, kd[name] = total + result.loss, result.kd / row_count
            if with_ce:
                ce, needs_ce = result.ce / max(counts.labels, 1), False
        if needs_ce and len(sent.select):
            ce_sum = _cross_entropy(rows(sent.select), row_labels, head)
            total, ce = total + scale * ce_sum, ce_sum.detach() / max(counts.labels, 1)
        # nothing here has a loss, but other processes' passes need a gradient
        if not total.requires_grad:
            total = total + 0.0 * output.flatten()[0].float()
        return StepShare(total, ce, kd)

    def _at(self, labels: Tensor, select: Tensor) -> Tensor:
        """Return the labels [P] of the rows ``select``."""
        if self.task == "causal_lm":
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return labels.to(select.device).flatten()[select]

    def _count_rows(self, sent: DeviceBatch, labels: Tensor) -> Counts:
        rows = {name: len(sent.targets[name].select) for name in self.terms}
        return Counts(int((labels != IGNORED).sum()), rows)


def _cross_entropy(rows: Tensor | StudentLogits, labels: Tensor, head: OutputHead | None) -> Tensor:
    if isinstance(rows, StudentLogits):
        assert head is not None
        return head_loss(rows.inputs, head, None, labels=labels, ce_weight=1.0).loss
    return F.cross_entropy(rows.float(), labels, ignore_index=IGNORED, reduction="sum")


def _task_of(infos: Mapping[str, TeacherInfo]) -> str:
    """Return the task of a student of all the teachers."""
    for info in infos.values():
        if not info.is_vocabulary:
            raise InputError(
                f"teacher {info.name!r} is a {info.task} expert: its logits need a head of their "
                "own on the student, which `pipeline train-student` adds (in your own loop: "
                "rekindle.train.to_device). Name language models"
            )
    tasks = sorted({info.task for info in infos.values()})
    if len(tasks) > 1:
        raise InputError(
            f"the teachers are {' and '.join(tasks)}, but no student has a loss at the positions "
            "of both: name those of the student's task"
        )
    return tasks[0]


def _masks(
    cache: Cache, infos: Mapping[str, TeacherInfo], task: str, chosen: str | None
) -> str | None:
    """Return the student's masked view: the named one, its teachers', or the only one."""
    if task != "masked_lm":
        if chosen is not None:
            raise InputError(f"masked_view is {chosen!r}, but a {task} student is shown no masks")
        return None
    views = sorted({info.view for info in infos.values() if info.view_class.masked})
    view = cache.masked_view(chosen or (views[0] if len(views) == 1 else None)).name
    for info in infos.values():
        if info.view_class.masked and info.view != view:
            raise InputError(
                f"teacher {info.name!r} saw the masks {info.view}, but the student would see "
                f"{view}: its targets are for other inputs. Name teachers that saw the same "
                "masks, or leave masked_view out"
            )
    return view
