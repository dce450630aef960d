"""ELLE's matrix of domains × stages: each stage's held-out perplexity on each domain."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREFIX = "ce/"  # key prefix of a domain's cross-entropy in an evaluation


@dataclass(frozen=True)
class DomainMatrix:
    """Rows are runs (stages) in order, columns are domains in the order of learning."""

    runs: list[str]
    domains: list[str]
    perplexity: list[list[float | None]]  # [R][D] exp(ce in nats); None if not evaluated


def matrix_of(runs: Sequence[tuple[str, Mapping[str, float], Sequence[str]]]) -> DomainMatrix:
    """Return the matrix of runs, each given as its name, its last evaluation, and its training
    domains (none: all). Runs that were not evaluated by domain are left out.
    """
    kept = [one for one in runs if any(key.startswith(PREFIX) for key in one[1])]
    every = [key for _, found, _ in kept for key in found]
    measured = {key.removeprefix(PREFIX) for key in every if key.startswith(PREFIX)}
    learned = [name for _, _, domains in runs for name in domains if name in measured]
    domains = list(dict.fromkeys([*learned, *sorted(measured)]))
    values = [[_perplexity(found.get(PREFIX + name)) for name in domains] for _, found, _ in kept]
    return DomainMatrix([name for name, _, _ in kept], domains, values)


def _perplexity(ce: float | None) -> float | None:
    if ce is None:
        return None
    return math.exp(ce) if ce < 700 else math.inf
