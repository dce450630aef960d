"""``topk``: the K likeliest ids of each position, and the mass outside them, in one of the codecs.

On disk: the columns of the codec (``codec.py``, ``codec_precise.py``, ``codec_compact.py``).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rekindle.data.targets.codec import Columns, Floats, decode_ids
from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.head import StoredHead
from rekindle.data.targets.interpolation import odds_between
from rekindle.data.targets.kinds.base import VocabularyKind


class TopK(VocabularyKind):
    """K candidates per position by falling probability."""

    name = "topk"
    template = "{k} of {vocabulary_size:,} log-probabilities and the tail"
    needs = ("vocabulary_size", "k")
    codecs = ("default", "precise", "compact")
    needs_temperatures = has_tail = can_grow = True

    def distribution_columns(self) -> Widths:
        """Return the columns of what is kept, as they are used."""
        return self.codec.widths(self.size, self.k, len(self.info.temperatures))

    def candidate_ids(self, columns: Columns) -> NDArray[np.int64]:
        """Return the kept ids [P,K]."""
        return decode_ids(columns, self.size)

    def decode(
        self, columns: Columns, head: StoredHead | None, temperature: float, k: int | None
    ) -> tuple[NDArray[np.int64], Floats, Floats]:
        """Return ids [P,k], log-probabilities [P,k] at ``temperature`` and log tail mass [P]."""
        slot = self.slot(temperature, k)
        log_probs, log_tail = self.codec.decode(columns, temperature, slot, k)
        return self.candidate_ids(columns)[:, :k], log_probs, log_tail

    def interpolated(self, columns: Columns, temperature: float) -> tuple["TopK", Columns]:
        """Return the columns as if ``temperature`` had been stored, and their kind.

        For a temperature that ``interpolates`` accepts; see ``targets/interpolation.py``.
        """
        slots = list(self.slots(temperature, interpolate=True))
        at = [self.info.temperatures[slot] for slot in slots]
        relative = self.codec.decode(columns, at[0], slots[0], None)[0] * np.float32(at[0])
        odds = odds_between(relative, columns["tail_log_odds"][:, slots], at, temperature)
        info = self.info.model_copy(update={"temperatures": (temperature,)})
        return type(self)(info), columns | {"tail_log_odds": odds[:, None]}

    def problems(self, columns: Columns) -> Iterator[str]:
        """Yield what is wrong with columns that Rekindle cannot have written."""
        if self.candidate_ids(columns).max(initial=0) >= self.size:
            yield "ids outside the vocabulary"
        # These are stored negated, as -log p in 1/1024 nat, so min >= max is the valid order.
        if self.codec.stores_span and (columns["log_prob_min"] < columns["log_prob_max"]).any():
            yield "rising probabilities"
