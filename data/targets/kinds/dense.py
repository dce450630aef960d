"""``dense``: the whole distribution of each position: ``log_probs`` float32 [P,V] at τ = 1."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.targets.codec import Columns, Floats
from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.head import StoredHead
from rekindle.data.targets.kinds.base import VocabularyKind


class Dense(VocabularyKind):
    """Every probability of a position."""

    name = "dense"
    template = "all {vocabulary_size:,} log-probabilities"
    has_all_probabilities = True

    def distribution_columns(self) -> Widths:
        """Return the columns of what is kept, as they are used."""
        return {"log_probs": (pa.float32(), self.size)}

    def log_probs(self, columns: Columns, head: StoredHead | None) -> Floats:
        """Return the log-probabilities [P,V] at τ = 1."""
        return columns["log_probs"]

    def decode(
        self, columns: Columns, head: StoredHead | None, temperature: float, k: int | None
    ) -> tuple[NDArray[np.int64], Floats, Floats]:
        """Return ids [P,k], log-probabilities [P,k] at ``temperature`` and log tail mass [P]: the
        whole vocabulary in the order of ids, or the likeliest ``k`` and the remaining mass.
        """
        tempered = self.log_probs(columns, head) / np.float32(temperature)
        top = tempered.max(axis=1, keepdims=True)
        tempered = tempered - top - np.log(np.exp(tempered - top).sum(axis=1, keepdims=True))
        count, size = tempered.shape
        if k is None or k == size:
            ids = np.broadcast_to(np.arange(size), (count, size))
            return ids, tempered, np.full(count, -np.inf, np.float32)
        order = np.argsort(-tempered, axis=1, kind="stable")
        ordered = np.take_along_axis(tempered, order, axis=1)
        log_tail = np.logaddexp.reduce(ordered[:, k:], axis=1)  # −inf if all ids are kept
        return order[:, :k], ordered[:, :k], log_tail.astype(np.float32)

    def problems(self, columns: Columns) -> Iterator[str]:
        """Yield what is wrong with columns that Rekindle cannot have written."""
        # −inf is probability 0, but a row needs some probability.
        best = columns["log_probs"].max(axis=1, initial=-np.inf)
        if not ((best > -np.inf) & (best < 1e-3)).all():  # also for a row with NaN
            yield "log-probabilities that are none"
