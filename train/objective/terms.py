"""Check what a distillation term asks for, before the first step and not at the 3,000th.

``Cache.teacher`` has already refused names that the cache lacks.
"""

from collections.abc import Iterator, Mapping, Sequence

from rekindle.data.errors import InputError, naming
from rekindle.data.targets.interpolation import expected_error, knots
from rekindle.data.targets.kinds.registry import kind_of, vocabulary_kind
from rekindle.data.targets.schema import TeacherInfo
from rekindle.kernels.divergences import SKEWED
from rekindle.train.config import MIXED, DistillTerm
from rekindle.train.objective.estimates import estimate_problems
from rekindle.train.objective.label_union import LabelUnion


def check_terms(
    terms: Sequence[DistillTerm],
    teachers: Mapping[str, TeacherInfo],
    task: str,
    key: str = "train.objective.distill",
) -> None:
    """Raise InputError, naming the term below ``key``, for a term that cannot be computed."""
    names = [name for term in terms for name in term.teachers]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise InputError(f"teacher {repeated!r} is in two distill terms; use one term per teacher")
    for number, term in enumerate(terms):
        with naming(f"{key}.{number}"):
            infos = [teachers[name] for name in term.teachers]
            for problem in _problems(term, infos, task):
                raise InputError(problem)


def describe_interpolation(
    terms: Sequence[DistillTerm], teachers: Mapping[str, TeacherInfo]
) -> Iterator[str]:
    """Yield a line for each teacher that is read at a temperature between its stored ones: from
    which ones it is interpolated, and the error to expect.
    """
    for term in terms:
        for info in (teachers[name] for name in term.teachers if term.interpolates):
            tau, stored = term.temperature, info.temperatures
            if info.is_vocabulary and vocabulary_kind(info).interpolates(tau):
                at = ", ".join(f"{stored[slot]:g}" for slot in knots(tau, stored))
                yield (
                    f"teacher {info.name}: at temperature {tau:g} the mass outside its top "
                    f"{info.k} is interpolated from those stored at {at}; expect errors of up to "
                    f"{expected_error(tau, stored, info.k or 1):.1g} nats of KL (docs/targets.md)"
                )


def _problems(term: DistillTerm, infos: Sequence[TeacherInfo], task: str) -> Iterator[str]:
    """Yield what cannot be computed of a term."""
    kinds = {"vocabulary" if i.is_vocabulary else i.kind for i in infos}
    names = ", ".join(term.teachers)
    yield from _vector_problems(term, infos)
    yield from _ranking_problems(term, infos)
    yield from _pseudo_label_problems(term, infos)
    yield from _skew_problems(term, infos)
    if "vocabulary" in kinds and len(kinds) > 1:
        yield "vocabulary teachers and task experts need a term each"
    if len({i.view for i in infos}) > 1:
        yield f"{names} saw different views; use a term each"
    if term.positions == "masked" and task != "masked_lm":
        yield f"positions: masked, but a {task} student has no masked view"
    if term.positions == "masked" and kinds & {"sequence", "embedding"}:
        yield f"positions: masked, but {names} judge whole sequences"
    if term.combine == "route" and len(kinds) > 1:
        yield f"{names} judge sequences and tokens, which share no mean; use a term each"
    if term.k is not None and kinds != {"vocabulary"}:
        yield f"k is for vocabulary teachers; all logits of {names} are kept"
    if term.interpolates and kinds != {"vocabulary"}:
        yield (
            f"temperature_between is for vocabulary teachers; {names} can be read at any "
            "temperature, so leave it out"
        )
    if term.entropy_fraction is not None and kinds != {"vocabulary"}:
        yield f"entropy_fraction is for vocabulary teachers, which {names} are not"
    if kinds == {"vocabulary"}:
        yield from _vocabulary_problems(term, infos, task)
        return
    if term.view == "masked" and infos[0].view_class.paired:
        yield "view: masked, but pairs are shown clean; use clean"
    if term.view == "masked" and task != "masked_lm":
        yield f"view: masked, but a {task} student has no masked view"
    if term.combine in MIXED:
        yield from _mixture_problems(term, infos)


def _vocabulary_problems(
    term: DistillTerm, infos: Sequence[TeacherInfo], task: str
) -> Iterator[str]:
    if term.divergence == "mse":
        yield f"mse is for task logits; {term.teachers[0]} predicts tokens"
    if term.combine == "uncertainty":
        yield (
            f"combine: uncertainty weighs classifiers, and {term.teachers[0]} predicts tokens; use "
            "mixture, or route for teachers of different domains"
        )
    if term.combine == "concatenate":
        yield (
            "combine: concatenate puts the logits of classifiers side by side, and "
            f"{term.teachers[0]} predicts tokens; use mixture"
        )
    if term.combine == "mixture" and len({i.domains for i in infos}) > 1:
        yield (
            "a mixture needs all its teachers at the same positions, and "
            f"{', '.join(term.teachers)} have different domains; use combine: route"
        )
    if term.combine == "mixture" and term.entropy_fraction is not None:
        yield "entropy_fraction cannot be used with combine: mixture"
    for info in infos:
        if info.task != task:
            yield (
                f"teacher {info.name!r} is a {info.task}; a {task} student has no loss at its "
                f"positions: remove it from the term, or train a {info.task} student"
            )
        vocabulary_kind(info).slots(term.temperature, term.k, term.interpolates)
    yield from estimate_problems(term, [vocabulary_kind(info) for info in infos])


def _mixture_problems(term: DistillTerm, infos: Sequence[TeacherInfo]) -> Iterator[str]:
    for info in infos:
        others = ("regression", "multi_label_classification")
        if not kind_of(info).per_sequence or info.problem in others:
            yield (
                f"combine: {term.combine} merges classifiers of sequences, and {info.name!r} is a "
                f"{info.problem or info.task} expert; use separate"
            )
        if term.combine == "uncertainty" and info.num_labels == 1:
            yield f"combine: uncertainty, but {info.name!r} has one class and is always certain"
        if term.combine == "uncertainty" and not info.monte_carlo_passes:
            yield (
                f"combine: uncertainty needs Monte-Carlo passes, and teacher {info.name!r} was "
                "cached without; cache it with monte_carlo: {passes: 16}"
            )
    if term.combine == "uncertainty" and len(infos) < 2:
        yield "combine: uncertainty weighs at least two experts"
    if term.divergence == "mse":
        yield "a mixture is a distribution; mse is for separate experts"
    shared = set.intersection(*[set(i.domains) for i in infos if i.domains is not None] or [{""}])
    if not shared:
        yield (
            "a mixture teaches where all its experts know the text, but "
            f"{', '.join(term.teachers)} have no domain in common; use combine: route"
        )
    LabelUnion.of(infos, term.labels)


def _vector_problems(term: DistillTerm, infos: Sequence[TeacherInfo]) -> Iterator[str]:
    """Yield the problems of vectors: a term of sentence encoders must have no other teachers and
    ask for nothing of distributions; any other term must ask for nothing of vectors.
    """
    encoders = [info for info in infos if info.kind == "embedding"]
    other = next((info for info in infos if info.kind != "embedding"), None)
    if other is not None and term.embedding is not None:
        yield (
            "embedding configures how the vectors of sentence encoders (task: embedding) are "
            "learnt, but "
            f"{other.name!r} is a {other.problem or other.task} teacher; leave embedding out"
        )
    if not encoders:
        return
    name = encoders[0].name
    if other is not None:
        yield f"{name!r} gives vectors and {other.name!r} does not; use one term for each"
    if term.divergence != "forward_kl":
        yield (
            f"divergence: {term.divergence} is for distributions or logits, but {name!r} gives "
            "vectors; set their losses with embedding: {cosine: 1.0, mse: 0.5, …}"
        )
    if term.temperature != 1:
        yield (
            f"temperature is for distributions, but {name!r} gives vectors; that of their "
            "similarities is embedding.similarity.temperature"
        )
    if term.combine in MIXED:
        yield (
            f"combine: {term.combine} makes one target of several distributions, but {name!r} "
            "gives vectors, each in a space of its own; use separate, or route"
        )


def _ranking_problems(term: DistillTerm, infos: Sequence[TeacherInfo]) -> Iterator[str]:
    """Yield the problems of a ranking term: teachers without scores to rank by."""
    if term.ranking is None:
        return
    other = next((i for i in infos if i.problem != "regression"), None)
    if other is not None:
        yield (
            f"ranking is for regression experts, whose score is an order, but {other.name!r} is a "
            f"{other.problem or other.task} expert; leave ranking out"
        )
    several = next((i for i in infos if (i.num_labels or 1) > 1), None)
    if other is None and several is not None:
        yield (
            f"ranking uses one score, but {several.name!r} gives {several.num_labels} for each "
            "sequence; leave ranking out"
        )
    if term.combine != "separate":
        yield (
            "ranking compares the scores of one expert with each other, so combine: "
            f"{term.combine} has no pairs; use separate"
        )
    if not any(term.ranking.weights):
        yield "ranking: pointwise, pairwise and listwise are all 0; give one of them a weight"
    if term.ranking.pairs != "all" and term.ranking.pairwise == 0:
        yield (
            f"ranking.pairs: {term.ranking.pairs} belongs to pairwise, which is 0; leave pairs out"
        )
    if term.temperature != 1 and term.ranking.listwise == 0:
        yield (
            "temperature belongs to ranking.listwise, which is 0; leave temperature: "
            f"{term.temperature} out"
        )
    if term.divergence not in ("forward_kl", "mse"):
        yield f"ranking has its own losses; leave divergence: {term.divergence} out"


def _skew_problems(term: DistillTerm, infos: Sequence[TeacherInfo]) -> Iterator[str]:
    """Yield the problems of a skewed divergence: targets that are not distributions over
    outcomes.
    """
    if term.divergence != SKEWED:
        return
    for info in infos:
        if info.problem in ("regression", "multi_label_classification"):
            yield (
                f"{SKEWED} compares distributions over tokens or classes, but {info.name!r} is a "
                f"{info.problem} expert; leave divergence out"
            )


def _pseudo_label_problems(term: DistillTerm, infos: Sequence[TeacherInfo]) -> Iterator[str]:
    """Yield the problems of pseudo-labels: teachers without classes to be sure of."""
    if term.divergence != "pseudo_label":
        if term.confidence is not None:
            yield f"confidence is for divergence: pseudo_label, not {term.divergence}"
        return
    for info in infos:
        if info.is_vocabulary or info.problem == "regression":
            yield (
                f"pseudo_label is for classifiers, but {info.name!r} is a "
                f"{info.problem or info.task} expert; use mse or forward_kl"
            )
    if term.combine not in ("separate", "route"):
        yield (
            f"pseudo_label takes a class from one expert; combine: {term.combine} makes a "
            "distribution of several. Use separate, or route: the first that is sure"
        )
    if term.temperature != 1:
        yield f"a pseudo-label has no temperature; leave temperature: {term.temperature} out"
