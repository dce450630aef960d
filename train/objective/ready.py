"""Prepare a step's batch in the thread that reads it: select its targets, cut it into micro-batches
and, for a GPU, send them ahead while the step before runs.

Copies go from pinned memory on a stream of their own, so that neither the host nor the current step
waits for them. What a loss makes of a batch on the host (masks, places of rows) is sent when it is
made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rekindle.data.batch import Batch, TokenTargetBatch
from rekindle.train.device_batch import ENCODED, SentArray, split_batch, split_evenly
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.selection import StepPlan

D = TypeVar("D")
# By class, the arrays that a loss takes unchanged.
COLUMNS = {*ENCODED, "ids", "counts", "log_probs", "hidden", "hidden_scale"} - {"tail_log_odds"}
ARRAYS = {"input_ids", "token_types", "labels"}


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
            parts = [_send_part(part, self.copies) for part in parts]
        return PreparedBatch(plan, batch, parts)


def _send_part(part: Batch, copies: Copies) -> Batch:
    """Return a micro-batch whose large arrays are on their way."""
    masked = part.masked and _send_arrays(part.masked, copies)
    pairs = {name: _send_arrays(pair, copies) for name, pair in part.pairs.items()}
    targets = dict(part.targets)
    for name, target in targets.items():
        if isinstance(target, TokenTargetBatch):
            columns = _send_columns(target.columns, copies)
            targets[name] = replace(target, columns=columns)
    ids = part.input_ids if masked is not None else copies.send(part.input_ids)
    return replace(part, masked=masked, pairs=pairs, targets=targets, input_ids=ids)


def _send_columns(columns: Mapping[str, NDArray], copies: Copies) -> dict[str, NDArray]:
    return {n: copies.send(one) if n in COLUMNS else one for n, one in columns.items()}


def _send_arrays(arrays: D, copies: Copies) -> D:
    """Return a dataclass of arrays with those of ``ARRAYS`` on their way."""
    record: Any = arrays
    names = [field.name for field in fields(record) if field.name in ARRAYS]
    changed: D = replace(record, **{name: copies.send(getattr(record, name)) for name in names})
    return changed
