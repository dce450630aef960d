"""Prepare a step's batch in the thread that reads it: select its targets, cut it into micro-batches
and, for a GPU, send them ahead while the step before runs.

Copies go from pinned memory on a stream of their own, so that neither the host nor the current step
waits for them. Sent ahead is all that is known of a micro-batch before its step: what its passes
show and their masks, labels, targets, and the rows that these belong to. What remains is sent when
the step makes it: what depends on the whole step (the groups of a ranking, vectors compared with
each other), on other terms (rows left to the cross-entropy alone), or on a method of one's own.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rekindle.data.batch import Batch, Ints, PairInputs, TargetBatch, TokenTargetBatch
from rekindle.train.config import MIXED, DistillTerm
from rekindle.train.device_batch import (
    CLEAN_TEXT,
    SENT_WHOLE,
    language_keys,
    language_labels,
    pair_mask,
    split_batch,
    split_evenly,
    text_mask,
)
from rekindle.train.objective.language_loss import owners, taught_places, taught_rows
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.selection import StepPlan
from rekindle.train.objective.task_pass import (
    expert_values,
    mixture_rows,
    mixture_values,
    student_rows,
)
from rekindle.train.order.ahead import SentArray, note_made

# The columns of vocabulary targets that a loss takes, whole or in part.
COLUMNS = {*SENT_WHOLE, "tail_log_odds", "ids", "counts", "log_probs", "hidden", "hidden_scale"}


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that a step can begin with."""

    plan: StepPlan
    batch: Batch  # with only the targets that the step uses
    parts: list[Batch]  # its micro-batches


class Copies(Protocol):
    """Sends arrays ahead."""

    def send(self, values: NDArray) -> NDArray:
        """Return the array with its copy on the way."""
        ...


class SideStream(Copies):
    """Copies to a GPU on a stream of its own; any thread may call it."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def send(self, values: NDArray) -> NDArray:
        """Return the array with its copy; the stream that takes the copy waits for it."""
        # Select the device in this thread too: its pinned memory would otherwise belong to the
        # first GPU.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            pinned = torch.from_numpy(np.ascontiguousarray(values)).pin_memory()
            on_device = pinned.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return SentArray.of(values, on_device, copied)


@dataclass(frozen=True)
class BatchPreparer:
    """Prepares batches; ``size``: sequences of a micro-batch; ``copies``: None on a CPU.
    ``count(step)``: micro-batches that each process makes; None: as many as its share needs.
    """

    objective: Objective
    size: int | None
    copies: Copies | None = None
    count: Callable[[int], int] | None = None

    def __call__(self, step: int, read: Batch) -> PreparedBatch:
        """Return the prepared batch of ``step`` from what was read for it."""
        plan = self.objective.plan(step)
        batch = self.objective.select_targets(read, plan)
        parts = split_batch(batch, self.size or len(batch.index))
        if self.size is not None and self.count is not None:
            count = self.count(step)
            parts = parts if len(parts) == count else split_evenly(batch, count)
        if self.copies is not None:
            parts = [_Sending(self.objective, plan, self.copies).part(part) for part in parts]
        return PreparedBatch(plan, batch, parts)


@dataclass(frozen=True)
class _Sending:
    """Sends what the step of ``plan`` takes of its micro-batches."""

    objective: Objective
    plan: StepPlan
    copies: Copies

    def part(self, part: Batch) -> Batch:
        """Return a micro-batch whose arrays are on their way."""
        send = self.copies.send
        reads_text, views = self.objective.shown(self.plan)
        shows_masked = reads_text and part.masked is not None
        shows_clean = (reads_text and not shows_masked) or CLEAN_TEXT in views
        changed: dict[str, object] = {}
        if shows_clean or self.plan.methods:
            changed["input_ids"] = send(part.input_ids)
        if part.masked is not None and shows_masked:
            ids, labels = send(part.masked.input_ids), send(part.masked.labels)
            changed["masked"] = replace(part.masked, input_ids=ids, labels=labels)
        if "input_ids" in changed or shows_masked:
            for name in ("token_types", "document_numbers"):
                if (values := getattr(part, name)) is not None:
                    changed[name] = send(values)
        pairs = {n: self._pairs(p) if n in views else p for n, p in part.pairs.items()}
        targets = {name: self._columns(target) for name, target in part.targets.items()}
        sent = replace(part, pairs=pairs, targets=targets, **changed)  # type: ignore[arg-type]
        arrays = {"mask": send(text_mask(part))} if "input_ids" in changed or shows_masked else {}
        if reads_text:
            arrays |= self._language(part)
        for term in self.plan.distilled:
            arrays |= self._experts(sent, term)
        note_made(sent, arrays)
        return sent

    def _pairs(self, pairs: PairInputs) -> PairInputs:
        send, mask = self.copies.send, pair_mask(pairs)
        ids, types = send(pairs.input_ids), send(pairs.token_types)
        sent = replace(pairs, input_ids=ids, token_types=types)
        note_made(sent, {"mask": send(mask)})
        return sent

    def _columns(self, target: TargetBatch) -> TargetBatch:
        if not isinstance(target, TokenTargetBatch):
            return copy(target)  # what is noted of it stays with this micro-batch
        send = self.copies.send
        columns = {n: send(one) if n in COLUMNS else one for n, one in target.columns.items()}
        return replace(target, columns=columns)

    def _language(self, part: Batch) -> dict[str, NDArray]:
        """Return the rows of the LM loss, and which of them each teacher teaches."""
        send, task = self.copies.send, self.objective.task
        keys = language_keys(part, task)
        arrays: dict[str, NDArray] = {"keys": send(keys)}
        if task != "masked_lm":
            arrays["labels"] = send(language_labels(part, task))
        parts_of_rows: list[Ints] = []  # several teachers at the same rows share a copy
        for term in self.plan.distilled:
            for name in term.teachers:
                if not self.objective.teachers[name].is_vocabulary:
                    continue
                rows = taught_rows(part, name, keys)
                if len(rows) != len(keys):
                    equal = (one for one in parts_of_rows if np.array_equal(one, rows))
                    if (known := next(equal, None)) is None:
                        parts_of_rows.append(known := send(rows))
                    rows = known
                arrays[f"rows of {name}"] = rows
                if (fraction := term.entropy_fraction) is not None:
                    arrays[f"sequences of {name}"] = send(owners(part, name))
                    arrays[f"taught of {name}"] = send(taught_places(part, name, fraction))
        return arrays

    def _experts(self, part: Batch, term: DistillTerm) -> dict[str, NDArray]:
        """Note on experts' targets what the loss takes of them; return what a mixture takes."""
        send = self.copies.send
        if self.objective.teachers[term.teachers[0]].is_vocabulary:
            return {}
        if term.combine not in MIXED:
            for target in (part.targets[name] for name in term.teachers):
                rows = send(student_rows(target, part.input_ids.shape[1]))
                note_made(target, {"rows": rows, "values": send(expert_values(target))})
            return {}
        arrays: dict[str, NDArray] = {f"rows of {term.teachers}": send(mixture_rows(part, term))}
        for column in ("logits", *(["mc_probs"] if term.combine == "uncertainty" else [])):
            for name, values in mixture_values(part, term, column).items():
                arrays[f"{column} of {name} in {term.teachers}"] = send(values)
        return arrays
