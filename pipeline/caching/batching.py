"""Group a teacher's sequences into batches, and halve a batch that does not fit into memory.

Sequences are sorted by length and cut into batches of a limited number of tokens, padding included.
The plan depends only on the lengths and the budget, so a shard that is made again is made from the
same batches.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.counted import counted
from rekindle.data.errors import InputError, first_words
from rekindle.data.padding import length_buckets, pad
from rekindle.data.targets.codec import Columns
from rekindle.pipeline.caching.in_flight import Pending
from rekindle.pipeline.caching.teachers import Teacher
from rekindle.train.host.known import note
from rekindle.train.model.padding import set_padding
from rekindle.train.running_out import is_out_of_memory

log = logging.getLogger("rekindle")

Rows = NDArray[np.int64]
Result = TypeVar("Result")


def padded_inputs(teacher: Teacher, sequences: list[NDArray]) -> dict[str, Tensor]:
    """Return the sequences as ``input_ids`` and ``attention_mask``."""
    lengths = np.array([len(s) for s in sequences])
    ids = pad(sequences, lengths, _padding_id(teacher, sequences))
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    attention_mask = note(teacher.tensor(mask), mask)
    return {"input_ids": teacher.tensor(ids), "attention_mask": attention_mask}


def padded(teacher: Teacher, lists: list[NDArray], fill: int) -> Tensor:
    """Return what goes with the tokens of each sequence as one tensor, ``fill`` beside padding."""
    values = pad(lists, np.array([len(one) for one in lists]), fill)
    return note(teacher.tensor(values), values)


def _padding_id(teacher: Teacher, sequences: list[NDArray]) -> int:
    """Return the model's own padding token, or else a token that no sequence ends with.

    Classifiers on causal models read the last token that is not padding.
    """
    if teacher.pad_id is not None:
        return teacher.pad_id
    last_ids = {int(sequence[-1]) for sequence in sequences}
    pad_id = next(i for i in range(len(last_ids) + 1) if i not in last_ids)
    config: Any = teacher.model.config
    set_padding(config, pad_id)
    return pad_id


def run_batches(
    teacher: Teacher, lengths: NDArray[np.int64], forward: Callable[[Rows], Pending]
) -> Iterator[tuple[Rows, Columns] | bool]:
    """Run ``forward`` over batches of the rows with a length > 0. Yield each batch with its results
    and, after each call of ``forward``, whether it was the last.

    On a device that runs beside the host, up to ``teacher.transfer.max_in_flight`` batches are in
    flight: the results of one are fetched while the next is computed. A batch that runs out of
    memory loses what came of it so far. If others were in flight, it is run once more when these
    have come back. One that runs out of memory alone is halved, and with it the teacher's
    ``batch_tokens``; the rest of this unit and later units start from there.
    """
    transfer = teacher.transfer
    batches = length_buckets(lengths, teacher.batch_tokens, teacher.equal_lengths)
    in_flight = deque[tuple[Rows, Pending, range]]()  # with its fetches
    tried_alone: Rows | None = None
    while batches or in_flight:
        if batches and len(in_flight) < transfer.max_in_flight:
            rows, batches, begun = batches[0], batches[1:], transfer.fetches
            pending = _unless_out_of_memory(teacher, lambda rows=rows: forward(rows), rows)  # type: ignore[misc]
            fetches = range(begun, transfer.fetches)
            if pending is not None:
                in_flight.append((rows, pending, fetches))
                yield not batches
                continue
        else:
            rows, pending, fetches = in_flight.popleft()
            columns = _unless_out_of_memory(teacher, pending, rows)
            if columns is not None:
                yield rows, columns
                continue
        transfer.drop(fetches)
        if teacher.config.tp_plan:
            raise InputError(
                f"teacher {teacher.info.name!r}: {counted(len(rows), 'sequence')} do not fit into "
                "memory, and the other processes of tp_plan run the same batch: give it "
                f"batch_tokens below {len(rows) * int(lengths[rows].max())}"
            )
        # A copy that the host has no memory for stays on its way, for its own batch to read.
        if rows is not tried_alone and (
            _unless_out_of_memory(teacher, transfer.drain, rows) is not False
        ):
            log.info(
                "teacher %s: out of memory beside what was in flight; once more without it",
                teacher.info.name,
            )
            tried_alone, batches = rows, [rows, *batches]
            _free_unused_memory()
            continue
        if len(rows) == 1:
            raise InputError(
                f"teacher {teacher.info.name!r}: a single sequence of {lengths[rows[0]]} tokens "
                "does not fit into memory. Use a smaller teacher, a shorter "
                "corpus.sequence_length, or a lower precision"
            )
        teacher.batch_tokens = len(rows) * int(lengths[rows].max()) // 2
        log.warning(
            "teacher %s: out of memory with %d sequences; continuing with batches of %d tokens",
            teacher.info.name,
            len(rows),
            teacher.batch_tokens,
        )
        remaining = np.zeros_like(lengths)
        for batch in (rows, *batches):
            remaining[batch] = lengths[batch]
        batches = length_buckets(remaining, teacher.batch_tokens, teacher.equal_lengths)
        _free_unused_memory()


def _free_unused_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _unless_out_of_memory(
    teacher: Teacher, function: Callable[[], Result], rows: Rows
) -> Result | None:
    """Return ``function()`` for a batch, or None if it runs out of memory (which is free then).

    Raises InputError for a model that fails on this batch. Bugs of Rekindle do not show as torch's
    RuntimeErrors, nor do indices outside a model's tables.
    """
    try:
        return function()
    except (torch.cuda.OutOfMemoryError, RuntimeError, MemoryError, IndexError) as error:
        if not is_out_of_memory(error):
            reason = first_words(error) or repr(error)
            raise InputError(
                f"teacher {teacher.info.name!r} failed on a batch of "
                f"{counted(len(rows), 'sequence')} (rows "
                f"{', '.join(map(str, sorted(rows.tolist())[:5]))} … of the shard): {reason}. "
                "When the model is repaired, run the same command to continue"
            ) from error
        return None


def joined_columns(parts: list[Columns]) -> Columns:
    """Return columns one after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
