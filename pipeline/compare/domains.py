"""The domains × stages matrix of ELLE: each stage's perplexity on each domain, held out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREFIX = "loss/"  # what an evaluation calls the loss of a domain


@dataclass(frozen=True)
class DomainMatrix:
    """Rows are runs (stages) in order, columns domains in the order in which they were learned."""

    runs: list[str]
    domains: list[str]
    perplexity: list[list[float | None]]  # [R][D] exp(loss in nats); None where not evaluated


def matrix_of(
    names: Sequence[str],
    evaluations: Sequence[Mapping[str, float]],
    trained: Sequence[Sequence[str]],
) -> DomainMatrix:
    """The matrix of the runs ``names`` from their last ``evaluations``; runs that have not
    evaluated by domain are left out. ``trained``: the domains that each was trained on (none: all).
    """
    kept = [n for n, found in enumerate(evaluations) if any(k.startswith(PREFIX) for k in found)]
    measured = {
        key.removeprefix(PREFIX) for n in kept for key in evaluations[n] if key.startswith(PREFIX)
    }
    learned = [name for domains in trained for name in domains if name in measured]
    domains = list(dict.fromkeys([*learned, *sorted(measured)]))
    values = [[_perplexity(evaluations[n].get(PREFIX + name)) for name in domains] for n in kept]
    return DomainMatrix([names[n] for n in kept], domains, values)


def _perplexity(loss: float | None) -> float | None:
    if loss is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf
