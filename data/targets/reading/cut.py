"""How much of the text an expert does not see, because its model takes no more tokens.

The commit record of an expert's unit contains the fact ``cut``: the numbers of texts and tokens
(the expert's own tokens, including special ones) and of those cut or lost. It depends only on the
texts and the model, and no data depends on it.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from rekindle.data.storage.commits import Commits
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.schema import TeacherInfo

FACT = "cut"


@dataclass(frozen=True)
class Counts:
    """Texts and tokens of a unit: all, and those cut or lost."""

    texts: int
    cut: int
    tokens: int
    lost: int

    @classmethod
    def of(cls, lengths: NDArray[np.int64], limit: int) -> "Counts":
        """Count from the lengths in tokens of the uncut texts; 0 means no text."""
        excess = np.maximum(lengths - limit, 0)
        texts, cut = int((lengths > 0).sum()), int((excess > 0).sum())
        return cls(texts, cut, int(lengths.sum()), int(excess.sum()))

    def facts(self, has_short_context: bool) -> dict[str, dict[str, int]]:
        """Return the facts for the commit record. ``has_short_context``: the expert takes
        less than a sequence; for others nothing is recorded if nothing is cut.
        """
        return {FACT: asdict(self)} if self.cut or has_short_context else {}


@dataclass(frozen=True)
class Truncation:
    """Shares of an expert's texts and tokens that are cut or lost."""

    sequences: float
    tokens: float

    def as_text(self, name: str, limit: int | None = None) -> str:
        """Return a sentence; ``limit``: the number of tokens at which texts are cut."""
        limit_text = f" at the {limit} tokens that its model takes" if limit else ""
        return (
            f"{name} does not see all: {self.sequences:.1%} of its texts are cut{limit_text}, "
            f"{self.tokens:.1%} of their tokens are lost"
        )


def truncation_of(info: TeacherInfo, commits: Commits) -> Truncation | None:
    """Return the shares over units; None if nothing is cut (or an older version did not record it).

    Units without a record count with the corpus's tokens.
    """
    if not commits.has_fact(FACT):
        return None
    texts_per_unit = (
        commits.number_facts("positions") if kind_of(info).per_sequence else commits.rows
    )
    sizes = (texts_per_unit, commits.number_facts("tokens"))
    uncut = [np.nan_to_num(numbers).astype(int).tolist() for numbers in sizes]
    units = [
        Counts(texts, 0, tokens, 0) if counts is None else Counts(**counts)
        for counts, texts, tokens in zip(commits.counts_by_name(FACT), *uncut, strict=True)
    ]
    texts, cut = sum(unit.texts for unit in units), sum(unit.cut for unit in units)
    tokens, lost = sum(unit.tokens for unit in units), sum(unit.lost for unit in units)
    return Truncation(cut / texts, lost / tokens) if cut else None
