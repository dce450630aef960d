"""The order of training data: pure arithmetic from (seed, epoch), nothing stored, nothing read.

A sequence's place in an epoch is a permutation of 0..N-1 that is *computed*: a balanced Feistel
network over the next even power of two, repeated until the result falls below N. Memory is constant
for any N, and the order does not depend on the world size, on prefetching or on where a run was
resumed.
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

ROUNDS = 6


def sequence_numbers(index: NDArray[np.integer] | Sequence[int]) -> NDArray[np.int64]:
    """Return ``index`` as the numbers of a batch's sequences [B]; raise ValueError if it is not
    that.
    """
    found = np.asarray(index)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise ValueError(
            f"the sequences of a batch are {found.dtype} {list(found.shape)}; they must be "
            "numbers [B], integers in 0..len(cache) − 1"
        )
    return found.astype(np.int64)


def permute(index: NDArray[np.int64], size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the place of each ``index`` (int64, 0 ≤ index < size) in the epoch's order: a
    bijection.

    Raises ValueError for an index outside 0..size-1.
    """
    if len(index) and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"indices must lie in 0..{size - 1}, got {index.min()}..{index.max()}")
    half = max(1, ((max(size - 1, 1)).bit_length() + 1) // 2)
    names = [f"order\0{seed}\0{epoch}\0{r}".encode() for r in range(ROUNDS)]
    keys = [np.uint64(xxhash.xxh3_64_intdigest(name)) for name in names]
    out = _feistel(index.astype(np.uint64), half, keys)
    outside = out >= size
    while outside.any():  # cycle walking: at most a few rounds, the domain is < 4x size
        out[outside] = _feistel(out[outside], half, keys)
        outside = out >= size
    return out.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & mask)
    return (left << bits) | right


def _mix(value: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A 64-bit finaliser (the constants of SplitMix64, Steele et al. 2014); overflow is
    intended.
    """
    with np.errstate(over="ignore"):
        x = value + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def epoch_batch(
    number: int, size: int, batch: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Return batch ``number`` of one epoch for one rank; the epoch's last batch may be short.

    The ranks' parts of a batch are strided, so together they are a single process's batch.
    """
    places = np.arange(number * batch, min((number + 1) * batch, size), dtype=np.int64)
    return permute(places[rank::world_size], size, seed=seed, epoch=epoch)


def stream_part(
    start: int, stop: int, size: int, *, seed: int, first_epoch: int = 0
) -> NDArray[np.int64]:
    """Return the sequence indices at places ``start`` to ``stop`` of one endless stream of epochs,
    beginning with ``first_epoch``.

    Batches cut from it are all full: one that reaches past an epoch's end continues in the next, so
    each sequence is read exactly once per epoch whatever the batch size.
    """
    places = np.arange(start, stop, dtype=np.int64)
    epochs = places // size
    parts = [
        permute(places[epochs == e] % size, size, seed=seed, epoch=first_epoch + int(e))
        for e in np.unique(epochs)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])
