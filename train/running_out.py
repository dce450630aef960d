"""Turn out-of-memory, full-disk and lost-process errors into messages that say what was kept and
what to change.

torch, safetensors, TensorBoard and pyarrow each raise their own errors for these.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rekindle.data.errors import RekindleError, ResumableError, first_words
from rekindle.train.config import TrainConfig
from rekindle.train.precision import bf16_saves, chosen_precision

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
_PEER_GONE = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "nccl error")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that a device or the machine ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(
        words in message for words in _NO_MEMORY
    )


def is_disk_full(error: BaseException) -> bool:
    """Return whether ``error`` means that a file could not be written for lack of room."""
    if isinstance(error, OSError):
        return error.errno in FULL
    # Rust's number, as in safetensors' message
    number = re.search(r"\(os error (\d+)\)", str(error))
    return number is not None and int(number[1]) in FULL


@contextmanager
def report_shortage(
    out: Path, describe_kept: Callable[[], str], advice: str, settings: tuple[str, ...] = ()
) -> Iterator[None]:
    """Turn a lack of memory or disk into a ResumableError.

    ``describe_kept`` says what exists of the work in ``out``. ``advice`` says what takes less
    memory, and ``settings`` are such keys with values, for the command that continues.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RekindleError):
            raise
        reason = first_words(error, 200) or type(error).__name__
        if is_out_of_memory(error):
            raise ResumableError(
                f"out of memory ({reason}). {advice}. {describe_kept()}", settings
            ) from None
        if is_disk_full(error):
            path = getattr(error, "filename", None) or out
            cause = getattr(error, "strerror", None) or reason
            raise ResumableError(
                f"{path} cannot be written: {cause}. {describe_kept()}; make room on that "
                "disk first"
            ) from None
        if isinstance(error, RuntimeError) and any(w in reason.lower() for w in _PEER_GONE):
            raise RekindleError(
                "another process of this run has ended or cannot be reached; its own message "
                f"gives the reason ({reason})"
            ) from error
        raise


def memory_advice(
    config: TrainConfig, world_size: int, device_type: str, has_load_balancing: bool = False
) -> tuple[str, tuple[str, ...]]:
    """Return what takes less memory in training, with the current values; and what to try first.

    ``has_load_balancing``: the student has a load-balancing loss, which micro_batch_sequences
    changes too.
    """
    own_sequences = config.batch_sequences // world_size
    size = min(config.micro_batch_sequences or own_sequences, own_sequences)
    settings: tuple[str, ...] = ()
    if size > 1 and not has_load_balancing:
        settings = (f"train.micro_batch_sequences={-(-size // 2)}",)
    elif not config.gradient_checkpointing:
        settings = ("train.gradient_checkpointing=true",)
    micro_batch = config.micro_batch_sequences or f"null, the {own_sequences} of the batch"
    fewer_sequences = f"train.micro_batch_sequences (now {micro_batch})"
    recomputing = (
        f"set train.gradient_checkpointing: true (now {str(config.gradient_checkpointing).lower()})"
    )
    precision = chosen_precision(config.precision, device_type)
    other_ways = "a shorter corpus.sequence_length"
    if bf16_saves(precision, device_type):
        other_ways = f"a student in train.precision bf16 (now {precision}), or {other_ways}"
    if has_load_balancing:
        return (
            f"To continue with --resume, {recomputing}: it changes no batch. In another --out: "
            f"a lower {fewer_sequences}, which changes the load-balancing loss of this student, "
            f"{other_ways}"
        ), settings
    return (
        f"Lower {fewer_sequences}, or {recomputing}: neither changes a batch, and both may be "
        f"changed with --resume. In another --out: {other_ways}"
    ), settings
