"""Whether rows look like those of the tokens beside their own: shifted by one."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rekindle.data.errors import InputError

ENOUGH = 100  # positions, before anything is said
SURELY = 5.0  # standard errors by which another place must be better, and twice as good

BESIDE = {-1: "the token before", 1: "the token after"}


@dataclass
class Alignment:
    """How often the candidates of a position hold the token that they are of, and its neighbours.

    Nothing else tells rows that are a place off where no ``gold_log_probs`` are given: candidates
    of one position are as good a distribution as those of the next.
    """

    positions: int = 0
    hits: dict[int, int] = field(default_factory=lambda: dict.fromkeys((-1, 0, 1), 0))

    def add(
        self, ids: NDArray[np.int64], tokens: NDArray[np.int32], gold: NDArray[np.int64]
    ) -> None:
        """Count candidates ``ids`` [P,W] of the tokens at ``gold`` [P] among ``tokens`` [S]."""
        inside = (gold > 0) & (gold + 1 < len(tokens))
        self.positions += int(inside.sum())
        for offset in self.hits:
            truth = tokens[gold[inside] + offset][:, None]
            self.hits[offset] += int((ids[inside] == truth).any(axis=1).sum())

    def check(self) -> None:
        """InputError where they are those of the neighbours, as far as that can be told."""
        if self.positions < ENOUGH:
            return
        share = {offset: hits / self.positions for offset, hits in self.hits.items()}
        best = max(BESIDE, key=lambda offset: share[offset])
        mean = (share[best] + share[0]) / 2
        error = (2 * mean * (1 - mean) / self.positions) ** 0.5
        if share[best] > max(2 * share[0], share[0] + SURELY * error):
            raise InputError(
                f"at {self.positions:,} positions the candidates hold the token that they should "
                f"be of in {share[0]:.1%}, and {BESIDE[best]} it in {share[best]:.1%}: the rows "
                "look shifted by one (of a causal LM, the numbers of position t are of the token "
                "after it). Shift them; if they are right, give gold_log_probs, which prove it"
            )
