"""What ``teacher.json`` says of a teacher that a server ran: there are no files whose fingerprint
would tell what it was.

What is known is the model's name there, and what it answered to a few fixed sequences, the probes.
A server that answers those otherwise runs another model. It gives the likeliest ids of a position
and their log-probabilities: tails are derived from these, and no entropy is known.

Caches with such a teacher are of format version 7.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from rekindle.data.settings import Settings

MISSING = 1.0  # nats that an id counts for which is no more among the likeliest


class Probe(Settings):
    """A sequence [S], and of each of its S − 1 predictions some ids and their log-probabilities:
    the likeliest, and the sequence's own.
    """

    input_ids: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]


class Served(Settings):
    """A server's model, as far as it can be told from others."""

    model: str = Field(description="its name there")
    probes: tuple[Probe, ...] = Field(description="what it answered when it was first asked")
    lacks: tuple[Literal["entropy"], ...] = Field(("entropy",), description="scalars not stored")

    @property
    def fingerprint(self) -> str:
        """A digest of the probes, in place of that of weights, which are not here."""
        return digest_of(self.probes)


def digest_of(probes: Sequence[Probe]) -> str:
    """The sha256 of what was asked and answered."""
    plain = [probe.model_dump(mode="json") for probe in probes]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()


def difference(then: Sequence[Probe], now: Sequence[Sequence[dict[int, float]]]) -> float:
    """Nats by which the log-probabilities of the ids in ``then`` are others ``now``, in the mean.

    ``now``: of each probe, and each of its predictions, all that the server says.
    """
    found = [
        abs(value - said[number]) if number in said else MISSING
        for probe, answers in zip(then, now, strict=True)
        for ids, values, said in zip(probe.ids, probe.log_probs, answers, strict=True)
        for number, value in zip(ids, values, strict=True)
    ]
    return sum(found) / max(len(found), 1)
