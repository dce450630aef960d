"""What ``teacher.json`` says of targets that came from elsewhere: no model was run for them here.

An engine, an API or somebody's own loop made them; ``data/exchange/`` checks them and writes them
as stage 1 writes a teacher's. Caches with such a teacher are of format version 4: it may lack
scalars, and be of temperatures of which 1 is none (``data/exchange/tails.py``). ``log_prob_max`` is
that of the candidates alone then, of their softmax at 1; the differences are as ever.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from rekindle.data.settings import Settings

EXPECTED = "expected"  # a fact of an imported unit's record: the targets that it could have
Scalar = Literal["gold_log_prob", "gold_rank", "entropy"]


class Imported(Settings):
    """Where targets come from, and what of a position is not known."""

    provenance: dict[str, Any] = Field(description="as it was given: model, engine, revision, …")
    lacks: tuple[Scalar, ...] = Field((), description="scalars that are not stored")

    @property
    def fingerprint(self) -> str:
        """A digest of the provenance, in place of that of weights, which are not here."""
        canonical = json.dumps(self.provenance, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def told(self) -> str:
        """The provenance in a line, the model first."""
        ordered = sorted(self.provenance, key=lambda key: (key != "model", key))
        return ", ".join(f"{key} {self.provenance[key]}" for key in ordered)
