"""Batch rows of different lengths: which go together, and how they are padded."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def length_buckets(lengths: Ints, batch_tokens: int, equal: bool = False) -> list[Ints]:
    """Return batches of row numbers, longest first; each row with a length > 0 is in exactly one.

    rows × longest ≤ ``batch_tokens`` in every batch, except that a longer row is a batch by itself.
    The longest come first, so that a batch which does not fit into memory fails at once. ``equal``:
    the rows of a batch have the same length, for models that padding changes.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        count = max(1, batch_tokens // longest)
        if equal:
            count = min(count, int((lengths[order[start:]] == longest).sum()))
        batches.append(order[start : start + count])
        start += count
    return batches


def pad(
    flat: Sequence[NDArray[np.int32] | list[int]], lengths: Ints, fill: int
) -> NDArray[np.int32]:
    """Return rows of different lengths as [B, longest], with ``fill`` at the end."""
    out = np.full((len(flat), int(lengths.max(initial=1))), fill, dtype=np.int32)
    for row, values in enumerate(flat):
        out[row, : len(values)] = values
    return out
