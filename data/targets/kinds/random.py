"""``random``: K draws per position with replacement, with the count of each drawn id.

On disk: ``distinct`` uint8 [P], the number of drawn ids; then, for all positions in sequence,
``ids`` uint16 (with ``ids_high`` uint8, bits 16 and up, when V > 65,536) and ``counts`` uint8. In
use: ``ids`` int32 [P,K], −1 where fewer were drawn, and ``counts`` [P,K].
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.columns import flat_lists
from rekindle.data.targets.codec import Columns, Floats, high_planes
from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.head import StoredHead
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.schema import MOST_DRAWS, SCALARS


class Random(VocabularyKind):
    """An unbiased sample of K draws per position, at one temperature."""

    name = "random"
    template = "a random sample of {k} of {vocabulary_size:,} tokens"
    needs = ("vocabulary_size", "k")
    largest_k = MOST_DRAWS
    needs_temperatures = is_sample = True
    is_copied_on_read = True

    @property
    def certainty_threshold(self) -> float:
        """1, i.e. never: the id drawn most often need not be the likeliest."""
        return 1.0

    def distribution_columns(self) -> Widths:
        """Return the columns of what is kept, as they are used."""
        return {"ids": (pa.int32(), self.k), "counts": (pa.uint8(), self.k)}

    def stored_columns(self) -> Widths:
        """Return the columns on disk that have one entry per position."""
        columns = super().stored_columns()
        scalars = {name: columns[name] for name in SCALARS}
        return {"positions": columns["positions"], "distinct": (pa.uint8(), None)} | scalars

    def entry_columns(self) -> dict[str, pa.DataType]:
        """Return the columns on disk that have one entry per drawn id."""
        high = {"ids_high": pa.uint8()} if high_planes(self.size) else {}
        return {"ids": pa.uint16(), **high, "counts": pa.uint8()}

    def _pack(self, columns: Columns) -> Columns:
        ids, counts = columns["ids"], columns["counts"]
        is_drawn = counts > 0
        return columns | {
            "distinct": is_drawn.sum(axis=1).astype(np.uint8),
            "ids": (ids[is_drawn] & 0xFFFF).astype(np.uint16),
            "ids_high": (ids[is_drawn] >> 16).astype(np.uint8),
            "counts": counts[is_drawn],
        }

    def read(self, batch: pa.RecordBatch) -> tuple[NDArray[np.int32], Columns]:
        """Return list offsets [R+1] and the columns [P,…] of a record batch, as they are used."""
        offsets, columns = super().read(batch)
        ends, drawn = flat_lists(batch, [*self.entry_columns()])
        distinct = columns.pop("distinct")
        rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        entries = np.bincount(rows, distinct, minlength=len(offsets) - 1)
        if not np.array_equal(entries, np.diff(ends)) or distinct.max(initial=0) > self.k:
            raise CacheFormatError("the drawn ids are not as many as their positions say")
        flat = drawn["ids"].astype(np.int32)
        if "ids_high" in drawn:
            flat |= drawn["ids_high"].astype(np.int32) << 16
        is_drawn = np.arange(self.k) < distinct[:, None]
        ids, counts = np.full(is_drawn.shape, -1, np.int32), np.zeros(is_drawn.shape, np.uint8)
        ids[is_drawn], counts[is_drawn] = flat, drawn["counts"]
        return offsets, columns | {"ids": ids, "counts": counts}

    def candidate_ids(self, columns: Columns) -> NDArray[np.int64]:
        """Return the drawn ids [P,K], −1 where fewer were drawn."""
        return columns["ids"].astype(np.int64)

    def decode(
        self, columns: Columns, head: StoredHead | None, temperature: float, k: int | None
    ) -> tuple[NDArray[np.int64], Floats, Floats]:
        """Return ids [P,K], the logarithms [P,K] of their relative frequencies, and log tail mass
        [P].

        Other ids are unknown, and no mass is left for them: averaged over draws, every id gets its
        probability.
        """
        self.slot(temperature, k)
        with np.errstate(divide="ignore"):
            log_probs = np.log(columns["counts"].astype(np.float32) / np.float32(self.k))
        tail = np.full(len(log_probs), -np.inf, np.float32)
        return self.candidate_ids(columns), log_probs, tail

    def problems(self, columns: Columns) -> Iterator[str]:
        """Yield what is wrong with columns that Rekindle cannot have written."""
        counts = columns["counts"].astype(np.int64)
        if columns["ids"].max(initial=0) >= self.size:
            yield "ids outside the vocabulary"
        if (counts.sum(axis=1) != self.k).any():
            yield f"positions whose counts are not {self.k} draws"
