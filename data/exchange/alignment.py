"""Detect rows that are shifted by one: their targets look like those of a neighbouring token."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError

ENOUGH = 100  # positions needed before anything is said
SURELY = 5.0  # standard errors by which another place must be better, besides being twice as good

BESIDE = {-1: "the token before", 1: "the token after"}


@dataclass
class Alignment:
    """Counts how often a position's candidates hold its own token, and its neighbours.

    Without ``gold_log_probs`` nothing else reveals rows that are a place off: the candidates of one
    position are as good a distribution as those of the next.
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
            truth = tokens[gold[inside] + offset][:, None]
            self.hits[offset] += int((ids[inside] == truth).any(axis=1).sum())

    def check(self) -> None:
        """Raise InputError if the candidates are a neighbour's, as far as that can be told."""
        if self.positions < ENOUGH:
            return
        share = {offset: hits / self.positions for offset, hits in self.hits.items()}
        best = max(BESIDE, key=lambda offset: share[offset])
        mean = (share[best] + share[0]) / 2
        error = (2 * mean * (1 - mean) / self.positions) ** 0.5
        if share[best] > max(2 * share[0], share[0] + SURELY * error):
            raise InputError(
                f"at {self.positions:,} positions the candidates hold their own token in "
                f"{share[0]:.1%}, and {BESIDE[best]} it in {share[best]:.1%}: the rows look "
                "shifted by one (for a causal LM, the numbers of position t belong to the token "
                "after it). Shift them; if they are right, give gold_log_probs, which prove it"
            )
