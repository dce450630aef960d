"""The part of ``teacher.json`` about a teacher run by a server, without files to fingerprint.

It records the model's name on the server and its answers to a few fixed sequences, the probes. A
server that answers these differently runs another model. It gives the likeliest ids of a position
and their log-probabilities; tails are derived from these, and the entropy is unknown.

Caches with such a teacher have format version 7.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from rekindle.data.settings import Settings

MISSING_NATS = 1.0  # nats counted for an id that is no longer among the likeliest


class Probe(Settings):
    """A sequence [S] and, for each of its S − 1 predictions, some ids and their log-probabilities:
    the likeliest, and the sequence's own.
    """

    input_ids: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]


class Served(Settings):
    """A server's model, with what distinguishes it from others."""

    model: str = Field(description="its name on the server")
    probes: tuple[Probe, ...] = Field(description="its answers when first asked")
    lacks: tuple[Literal["entropy"], ...] = Field(("entropy",), description="scalars not stored")

    @property
    def fingerprint(self) -> str:
        """A digest of the probes, in place of the missing weights' digest."""
        return digest_of(self.probes)


def digest_of(probes: Sequence[Probe]) -> str:
    """Return the sha256 of the questions and answers."""
    plain = [probe.model_dump(mode="json") for probe in probes]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()


def difference(recorded: Sequence[Probe], current: Sequence[Sequence[dict[int, float]]]) -> float:
    """Return the mean difference in nats between the log-probabilities of the ids in ``recorded``
    and ``current``.

    ``current``: for each probe and each of its predictions, everything the server answers.
    """
    differences = [
        abs(value - answer[token]) if token in answer else MISSING_NATS
        for probe, answers in zip(recorded, current, strict=True)
        for ids, values, answer in zip(probe.ids, probe.log_probs, answers, strict=True)
        for token, value in zip(ids, values, strict=True)
    ]
    return sum(differences) / max(len(differences), 1)
