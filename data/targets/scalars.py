"""Read only the scalars of a unit: gold log-probability, gold rank and entropy per position.

A commit record carries a checksum over the columns digest, positions and these scalars, so they can
be trusted without reading the targets: the rest of a record batch is never touched.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.columns import list_views
from rekindle.data.storage.shards import Shard
from rekindle.data.targets.codec import STEP, Columns
from rekindle.data.targets.schema import POSITIONED_SCALARS

FACT = "scalars"  # the checksum's key in the facts of a commit record


@dataclass(frozen=True)
class PositionScalars:
    """Scalars of the positions of some rows. R rows, P positions."""

    offsets: NDArray[np.int64]  # [R+1] into the others
    positions: NDArray[np.int64]  # [P]
    gold_log_prob: NDArray[np.float32]  # [P] nats
    gold_rank: NDArray[np.int64]  # [P]
    entropy: NDArray[np.float32]  # [P] nats

    def losses(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield the positions of each row, and −log p of the true tokens there."""
        for part in (slice(*ends) for ends in pairwise(self.offsets)):
            yield self.positions[part], -self.gold_log_prob[part]


class ScalarChecksum:
    """Compute the checksum of the scalar columns of the batches that pass through."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self._has_scalars = False

    def pass_through(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the same batches, each included in the checksum."""
        for batch in batches:
            self.add(batch)
            yield batch

    def add(self, batch: pa.RecordBatch) -> None:
        """Include a batch, if it has the columns."""
        if not {*POSITIONED_SCALARS} <= {*batch.schema.names}:
            return
        self._has_scalars = True
        self._state.update("".join(batch["digest"].to_pylist()).encode())
        for name in POSITIONED_SCALARS:
            offsets, flat = list_views(batch[name], name)
            self._state.update((offsets - offsets[0]).tobytes())
            self._state.update(flat[offsets[0] : offsets[-1]].tobytes())

    def facts(self) -> dict[str, str]:
        """Return the facts for the commit record; empty for units without scalars."""
        return {FACT: self._state.hexdigest()} if self._has_scalars else {}


def read_scalars(shard: Shard) -> list[pa.RecordBatch]:
    """Return the columns digest, positions and scalars of a unit's record batches, verified.

    For units without such a checksum (format 1, the compact codec) everything is read.
    """
    names = ["digest", *POSITIONED_SCALARS]
    recorded = shard.commit.facts.get(FACT)
    if recorded is None:
        return [batch.select(names) for batch in shard.batches()]
    batches = shard.read_unverified(names)
    checksum = ScalarChecksum()
    for batch in batches:
        checksum.add(batch)
    if checksum.facts().get(FACT) != recorded:
        raise CacheFormatError(f"{shard.name}: its scalars are not those that were committed")
    return batches


def decode_scalars(offsets: NDArray[np.int32], columns: Columns) -> PositionScalars:
    """Return the scalars in nats and numbers; the unknown entropy of imported targets is NaN."""
    entropy = columns.get("entropy")
    if entropy is None:
        entropy = np.full(len(columns["positions"]), np.nan, np.float32)
    return PositionScalars(
        offsets.astype(np.int64),
        columns["positions"].astype(np.int64),
        -columns["gold_log_prob"].astype(np.float32) / np.float32(STEP),
        columns["gold_rank"].astype(np.int64),
        entropy.astype(np.float32) / np.float32(STEP),
    )
