"""Check which divergences may be learnt from samples of a teacher's distributions.

A sample is an unbiased estimate of the distribution: an expression linear in the probabilities is
right on average over draws, any other would teach something else. The kinds
(``data/targets/kinds/``) define the samples, ``kernels/divergences.py`` what is linear; the pairs
are in ``docs/targets.md``. Imports no torch: a run file is checked with it before any work.
"""

from collections.abc import Iterator, Mapping, Sequence

from rekindle.data.errors import InputError, naming
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.kinds.registry import VOCABULARY_KINDS
from rekindle.kernels.divergences import LINEAR, LINEAR_DIVERGENCES
from rekindle.train.config import DistillTerm


def serves(kind: type[VocabularyKind], divergence: str) -> bool:
    """Return whether a divergence may be learnt from targets of the kind."""
    return LINEAR[divergence] or not kind.is_sample


def check_estimates(terms: Sequence[DistillTerm], kinds: Mapping[str, VocabularyKind]) -> None:
    """Raise InputError, naming the term, for what samples cannot give.

    ``kinds``: the known vocabulary teachers' kinds, by name; the others are checked later.
    """
    for number, term in enumerate(terms):
        with naming(f"train.objective.distill.{number}"):
            known = [kinds[name] for name in term.teachers if name in kinds]
            for problem in estimate_problems(term, known):
                raise InputError(problem)
            for kind in known:
                if kind.is_sample:
                    kind.slot(term.temperature, term.k)


def estimate_problems(term: DistillTerm, kinds: Sequence[VocabularyKind]) -> Iterator[str]:
    """Yield what a term asks of samples that they cannot give, whatever their temperature and k."""
    samples = [kind for kind in kinds if kind.is_sample]
    for kind in samples:
        if term.divergence in LINEAR and not serves(type(kind), term.divergence):
            yield (
                f"divergence: {term.divergence} is not linear in the teacher's probabilities, and "
                f"{kind.info.name!r} keeps a sample of them (targets.kind: {kind.name}): a token "
                "that was not drawn would count as one that the teacher rules out. Use "
                f"{' or '.join(LINEAR_DIVERGENCES)}, or cache it under another name with "
                f"targets.kind: {kinds_that_serve(term.divergence)}"
            )
    tails = [kind for kind in kinds if _has_tail(kind, term)]
    if term.combine == "mixture" and term.tail == "bucket" and samples and tails:
        yield (
            f"a mixture of a sample ({samples[0].info.name!r}) and of targets with a tail "
            f"({tails[0].info.name!r}): the tail would be compared with whatever the sample did "
            "not draw. Use combine: separate, whose mean is the same, or targets of one kind"
        )


def kinds_that_serve(divergence: str) -> str:
    """Return the names of the kinds from which a divergence may be learnt."""
    serving = [kind for kind in VOCABULARY_KINDS.values() if serves(kind, divergence)]
    return ", ".join(f"{k.name} (with tail: bucket)" if k.has_tail else k.name for k in serving)


def _has_tail(kind: VocabularyKind, term: DistillTerm) -> bool:
    """Return whether some of its mass lies outside the ids that the term reads."""
    return kind.has_tail or (kind.has_all_probabilities and term.k is not None)
