"""The part of ``teacher.json`` about targets made elsewhere, without a model run here.

An engine, an API or a loop of the user's own made them; ``data/exchange/`` checks them and writes
them like stage 1. Caches with such a teacher have format version 4: it may lack scalars, and its
temperatures may exclude 1 (``data/exchange/tails.py``). In that case ``log_prob_max`` belongs to
the softmax over the candidates at τ = 1; the differences are as usual.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from rekindle.data.settings import Settings

EXPECTED = "expected"  # fact in an imported unit's record: the number of targets it could have
Scalar = Literal["gold_log_prob", "gold_rank", "entropy"]


class Imported(Settings):
    """Where targets come from, and which values of a position are unknown."""

    provenance: dict[str, Any] = Field(description="as given: model, engine, revision, …")
    lacks: tuple[Scalar, ...] = Field((), description="scalars that are not stored")

    @property
    def fingerprint(self) -> str:
        """A digest of the provenance, in place of the missing weights' digest."""
        canonical = json.dumps(self.provenance, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def summary(self) -> str:
        """Return the provenance as a line, the model first."""
        ordered = sorted(self.provenance, key=lambda key: (key != "model", key))
        return ", ".join(f"{key} {self.provenance[key]}" for key in ordered)
