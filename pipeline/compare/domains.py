"""ELLE's matrix of domains × stages: each stage's held-out perplexity on each domain."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREFIX = "ce/"  # key prefix of a domain's cross-entropy in an evaluation


@dataclass(frozen=True)
class DomainMatrix:
    """Rows are runs (stages) in order, columns are domains in the order of training."""

    runs: list[str]
    domains: list[str]
    perplexity: list[list[float | None]]  # [R][D] exp(ce in nats); None if not evaluated


def matrix_of(runs: Sequence[tuple[str, Mapping[str, float], Sequence[str]]]) -> DomainMatrix:
    """Return the matrix of runs, each given as its name, its last evaluation, and its training
    domains (none: all). Runs that were not evaluated by domain are left out.
    """
    evaluated = [one for one in runs if any(key.startswith(PREFIX) for key in one[1])]
    keys = [key for _, evaluation, _ in evaluated for key in evaluation]
    measured = {key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)}
    trained_first = [name for _, _, domains in runs for name in domains if name in measured]
    domains = list(dict.fromkeys([*trained_first, *sorted(measured)]))
    values = [
        [_perplexity(evaluation.get(PREFIX + name)) for name in domains]
        for _, evaluation, _ in evaluated
    ]
    return DomainMatrix([name for name, _, _ in evaluated], domains, values)


def _perplexity(ce: float | None) -> float | None:
    if ce is None:
        return None
    return math.exp(ce) if ce < 700 else math.inf
