"""Detect rows that are shifted by one: their targets look like those of a neighbouring token."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError

MIN_POSITIONS = 100  # positions needed for a verdict
MIN_STANDARD_ERRORS = (
    5.0  # a neighbour must be better by this many standard errors, and twice as good
)

NEIGHBOURS = {-1: "the token before", 1: "the token after"}


@dataclass
class Alignment:
    """Counts how often a position's candidates hold its own token, and its neighbours.

    Without ``gold_log_probs`` nothing else reveals rows that are one position off: the candidates
    of one position are as good a distribution as those of the next.
    """

    positions: int = 0
    hits: dict[int, int] = field(default_factory=lambda: dict.fromkeys((-1, 0, 1), 0))

    def add(
        self, ids: NDArray[np.int64], tokens: NDArray[np.int32], gold: NDArray[np.int64]
    ) -> None:
        """Count the candidates ``ids`` [P,W] for the tokens at ``gold`` [P] among
        ``tokens`` [S].
        """
        inside = (gold > 0) & (gold + 1 < len(tokens))
        self.positions += int(inside.sum())
        for offset in self.hits:
            tokens_there = tokens[gold[inside] + offset][:, None]
            self.hits[offset] += int((ids[inside] == tokens_there).any(axis=1).sum())

    def check(self) -> None:
        """Raise InputError if the candidates look like a neighbour's."""
        if self.positions < MIN_POSITIONS:
            return
        hit_shares = {offset: hits / self.positions for offset, hits in self.hits.items()}
        best = max(NEIGHBOURS, key=lambda offset: hit_shares[offset])
        mean = (hit_shares[best] + hit_shares[0]) / 2
        standard_error = (2 * mean * (1 - mean) / self.positions) ** 0.5
        if hit_shares[best] > max(
            2 * hit_shares[0], hit_shares[0] + MIN_STANDARD_ERRORS * standard_error
        ):
            raise InputError(
                f"at {self.positions:,} positions the candidates hold their own token in "
                f"{hit_shares[0]:.1%}, and {NEIGHBOURS[best]} it in {hit_shares[best]:.1%}: the "
                "rows look shifted by one (for a causal LM, the numbers of position t belong to "
                "the token "
                "after it). Shift them; if they are right, give gold_log_probs, which prove it"
            )
