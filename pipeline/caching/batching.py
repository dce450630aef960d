"""Which sequences a teacher sees together: pure index arithmetic, no tensors.

Sequences are sorted by length and cut into batches of at most so many tokens, padding included. The
plan depends on the lengths and the budget alone, so a shard that is made again is made from the
same batches.
"""

import numpy as np
from numpy.typing import NDArray


def length_buckets(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Batches of row numbers, longest first; each row with a length > 0 stands in exactly one.

    rows × longest ≤ ``batch_tokens`` in every batch, except that a single longer row is a batch by
    itself. The longest come first, so that a batch which does not fit into memory shows at once.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches = []
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches
