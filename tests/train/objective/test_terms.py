"""Terms of an objective that cannot be taught are refused, and the error says why."""

import shutil
from dataclasses import replace

import pytest

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import DistillTerm
from rekindle.train.objective.terms import check_terms
from testlib.objective.cases import term
from testlib.objective.setting import Setting


def lm_info(name, **about):
    kind = {"kind": "topk", "k": 8, "vocabulary_size": 99, "temperatures": (1.0, 2.0)}
    base = {"task": "masked_lm", "view": "masked-0", **kind}
    return TeacherInfo(name=name, **(base | about))


def expert_info(name, *labels, **about):
    base = {
        "task": "sequence_classification",
        "kind": "sequence",
        "view": "text",
        "num_labels": len(labels),
        "label_names": labels,
        "problem": "single_label_classification",
    }
    return TeacherInfo(name=name, **(base | about))


INFOS = [
    lm_info("big"),
    lm_info("wide", k=24),
    lm_info("odd", domains=("odd",)),
    lm_info("drawn", kind="random", temperatures=(1.0,)),
    lm_info("gpt", task="causal_lm", view="clean"),
    expert_info("sense", "good", "bad", monte_carlo_passes=4),
    expert_info("mood", "bad", "glad", monte_carlo_passes=4),
    expert_info("sure", "yes", "no"),
    expert_info("unnamed", "LABEL_0", "LABEL_1", monte_carlo_passes=4),
    expert_info("twice", "yes", "yes", monte_carlo_passes=4),
    expert_info("few", "yes", monte_carlo_passes=4, num_labels=2),
    expert_info("odd.sense", "oak", "rose", monte_carlo_passes=4, domains=("odd",)),
    expert_info("even.sense", "cat", "dog", monte_carlo_passes=4, domains=("even",)),
    expert_info("alone", "yes", monte_carlo_passes=4, num_labels=1),
    expert_info("topics", "a", "b", problem="multi_label_classification"),
    expert_info("score", "x", task="regression", problem="regression"),
    expert_info("scores", "x", "y", task="regression", problem="regression"),
    expert_info("pair", "yes", "no", view="pairs-adjacent-0", monte_carlo_passes=4),
    expert_info("tags", "x", "y", task="token_classification", kind="token", problem=None),
]
MIX, WEIGH = {"combine": "mixture"}, {"combine": "uncertainty"}


def refusal_of(terms, task="masked_lm"):
    """The whole message."""
    parsed = [parse_settings(DistillTerm, values) for values in terms]
    with pytest.raises(InputError) as caught:
        check_terms(parsed, {info.name: info for info in INFOS}, task)
    return str(caught.value)


REFUSED = [
    (term("big", "sense"), "vocabulary teachers and task experts need a term each"),
    (term("sense", "pair"), "sense, pair saw different views; use a term each"),
    (term("big", "gpt"), "big, gpt saw different views; use a term each"),
    (
        term("sense", entropy_fraction=0.5),
        "entropy_fraction is for vocabulary teachers, which sense are not",
    ),
    (term("pair", view="masked"), "view: masked, but pairs are shown clean; use clean"),
    (term("sense", positions="masked"), "positions: masked, but sense judge whole sequences"),
    (
        term("sense", "tags", combine="route"),
        "sense, tags judge sequences and tokens, which share no mean; use a term each",
    ),
    (term("sense", k=2), "k is for vocabulary teachers; all logits of sense are kept"),
    (
        term("sense", "alone", **WEIGH),
        "combine: uncertainty, but 'alone' has one class and is always certain",
    ),
    # vocabulary teachers together
    (term("big", divergence="mse"), "mse is for task logits; big predicts tokens"),
    (
        term("big", "wide", **WEIGH),
        "combine: uncertainty weighs classifiers, and big predicts tokens; use mixture, or route "
        "for teachers of different domains",
    ),
    (
        term("big", "odd", **MIX),
        "a mixture needs all its teachers at the same positions, and big, odd have different "
        "domains; use combine: route",
    ),
    (
        term("big", "wide", entropy_fraction=0.3, **MIX),
        "entropy_fraction cannot be used with combine: mixture",
    ),
    (
        term("big", "wide", combine="concatenate"),
        "combine: concatenate puts the logits of classifiers side by side, and big predicts "
        "tokens; use mixture",
    ),
    # scores and their order
    (
        term("sense", ranking={}),
        "ranking is for regression experts, whose score is an order, but 'sense' is a "
        "single_label_classification expert; leave ranking out",
    ),
    (
        term("scores", ranking={}),
        "ranking uses one score, but 'scores' gives 2 for each sequence; leave ranking out",
    ),
    (
        term("big", ranking={}),
        "ranking is for regression experts, whose score is an order, but 'big' is a masked_lm "
        "expert; leave ranking out",
    ),
    (
        term("score", ranking={}, combine="route"),
        "ranking compares the scores of one expert with each other, so combine: route has no "
        "pairs; use separate",
    ),
    (
        term("score", ranking={"pointwise": 0, "pairwise": 0}),
        "ranking: pointwise, pairwise and listwise are all 0; give one of them a weight",
    ),
    (
        term("score", ranking={"pairwise": 0, "pairs": "best"}),
        "ranking.pairs: best belongs to pairwise, which is 0; leave pairs out",
    ),
    (
        term("score", ranking={}, temperature=4.0),
        "temperature belongs to ranking.listwise, which is 0; leave temperature: 4.0 out",
    ),
    (
        term("score", ranking={}, divergence="jsd"),
        "ranking has its own losses; leave divergence: jsd out",
    ),
    # skewed distributions
    (
        term("sense", "score", divergence="skew_kl"),
        "skew_kl compares distributions over tokens or classes, but 'score' is a regression "
        "expert; leave divergence out",
    ),
    (
        term("topics", divergence="skew_kl"),
        "skew_kl compares distributions over tokens or classes, but 'topics' is a "
        "multi_label_classification expert; leave divergence out",
    ),
    # classes as labels
    (
        term("sense", confidence=0.8),
        "confidence is for divergence: pseudo_label, not forward_kl",
    ),
    (
        term("score", divergence="pseudo_label"),
        "pseudo_label is for classifiers, but 'score' is a regression expert; use mse or "
        "forward_kl",
    ),
    (
        term("big", divergence="pseudo_label"),
        "pseudo_label is for classifiers, but 'big' is a masked_lm expert; use mse or forward_kl",
    ),
    (
        term("sense", "mood", divergence="pseudo_label", **MIX),
        "pseudo_label takes a class from one expert; combine: mixture makes a distribution "
        "of several. Use separate, or route: the first that is sure",
    ),
    (
        term("sense", divergence="pseudo_label", temperature=2.0),
        "a pseudo-label has no temperature; leave temperature: 2.0 out",
    ),
    # classifiers together
    (
        term("sense", "score", combine="concatenate"),
        "combine: concatenate merges classifiers of sequences, and 'score' is a regression "
        "expert; use separate",
    ),
    (
        term("sense", "topics", **MIX),
        "combine: mixture merges classifiers of sequences, and 'topics' is a "
        "multi_label_classification expert; use separate",
    ),
    (
        term("sense", "score", **WEIGH),
        "combine: uncertainty merges classifiers of sequences, and 'score' is a regression "
        "expert; use separate",
    ),
    (
        term("sense", "tags", **MIX),
        "combine: mixture merges classifiers of sequences, and 'tags' is a token_classification "
        "expert; use separate",
    ),
    (
        term("sense", "sure", **WEIGH),
        "combine: uncertainty needs Monte-Carlo passes, and teacher 'sure' was cached without; "
        "cache it with monte_carlo: {passes: 16}",
    ),
    (term("sense", **WEIGH), "combine: uncertainty weighs at least two experts"),
    (
        term("sense", "mood", divergence="mse", **MIX),
        "a mixture is a distribution; mse is for separate experts",
    ),
    (
        term("sense", "unnamed", **WEIGH),
        "the classes of teacher 'unnamed' have no names (LABEL_0 …), but equal names would become "
        "one label. Name them (id2label in its config.json), or use labels: apart",
    ),
    (
        term("sense", "twice", labels="apart", **MIX),
        "teacher 'twice' has 2 classes and the label names ['yes', 'yes']: a union of label sets "
        "needs a different name for each class (id2label in the expert's config.json)",
    ),
    (
        term("sense", "few", **WEIGH),
        "teacher 'few' has 2 classes and the label names ['yes']: a union of label sets needs a "
        "different name for each class (id2label in the expert's config.json)",
    ),
    (
        term("odd.sense", "even.sense", **MIX),
        "a mixture teaches where all its experts know the text, but odd.sense, even.sense have no "
        "domain in common; use combine: route",
    ),
    # a vocabulary teacher by itself
    (
        term("gpt"),
        "teacher 'gpt' is a causal_lm; a masked_lm student has no loss at its positions: "
        "remove it from the term, or train a causal_lm student",
    ),
    (
        term("big", temperature=3.0),
        "teacher 'big' stores the temperatures [1.0, 2.0], not 3.0: the mass outside its top 8 is "
        "known at stored temperatures only. Add 3.0 to the teacher's targets.temperatures (if it "
        "is there, finish `pipeline cache-teachers`), or train at a stored one",
    ),
    (
        term("drawn", k=4),
        "teacher 'drawn' keeps a sample of 8 (random): a part of it would be biased. Leave k "
        "out, or cache a smaller sample",
    ),
    (term("big", k=9), "teacher 'big' keeps 8 candidates; k = 9 is not cached"),
    (term("wide", "big", k=9), "teacher 'big' keeps 8 candidates; k = 9 is not cached"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_impossible_terms_are_refused(given, message):
    assert refusal_of([given]) == f"train.objective.distill.0: {message}"
    fine = term("mood", weight=0.5) if "mood" not in given["teachers"] else term("sure")
    assert refusal_of([fine, given]) == f"train.objective.distill.1: {message}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            term("sense", view="masked"),
            "view: masked, but a causal_lm student has no masked view",
        ),
        (
            term("gpt", positions="masked"),
            "positions: masked, but a causal_lm student has no masked view",
        ),
        (
            term("big"),
            "teacher 'big' is a masked_lm; a causal_lm student has no loss at its positions: "
            "remove it from the term, or train a masked_lm student",
        ),
    ],
)
def test_impossible_terms_of_a_causal_student_are_refused(given, message):
    assert refusal_of([given], "causal_lm") == f"train.objective.distill.0: {message}"


@pytest.mark.parametrize(
    "terms",
    [
        [term("big"), term("wide"), term("big")],
        [term("big", "big", **MIX)],
        [term("big", "wide"), term("odd", "big", combine="route")],
    ],
)
def test_a_teacher_in_two_places_is_refused(terms):
    message = "teacher 'big' is in two distill terms; use one term per teacher"
    assert refusal_of(terms) == message


@pytest.mark.parametrize(
    "given",
    [
        term("big", "wide"),
        term("big", "odd", combine="route", entropy_fraction=0.3),
        term("big", "odd", entropy_fraction=1.0),
        term("wide", "big", k=8, **MIX),
        term("drawn", k=8),
        term("sense", "score", "topics", "tags", divergence="mse"),
        term("tags", positions="masked", view="masked"),
        term("sense", "mood", "odd.sense", labels="apart", **WEIGH),
        term("sense", "sure", divergence="tvd", **MIX),
        term("unnamed", "mood", labels="apart", **MIX),
        term("unnamed", **MIX),
        term("even.sense", "odd.sense", combine="route"),
        term("score", ranking={"group": "document"}, divergence="mse", temperature=1.0),
        term("score", ranking={"listwise": 1}, temperature=4.0),
        term("big", "odd", divergence="skew_kl", skew=0.5),
        term("sense", "tags", divergence="skew_kl"),
        term("sense", "mood", combine="concatenate"),
        term("sense", "topics", "tags", divergence="pseudo_label", confidence=1.0),
        term("sense", "mood", divergence="pseudo_label", combine="route"),
    ],
)
def test_possible_terms_are_not_refused(given):
    parsed = parse_settings(DistillTerm, given)
    check_terms([parsed], {info.name: info for info in INFOS}, "masked_lm")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skew": 0.1}, "skew is for divergence: skew_kl, not forward_kl; leave skew: 0.1 out"),
        ({"skew": 0.2, "divergence": "jsd"}, "skew_kl, not jsd"),
        ({"skew": 0.0, "divergence": "skew_kl"}, "skew: .*greater than 0"),
        ({"skew": 1.0, "divergence": "skew_kl"}, "skew: .*less than 1"),
    ],
)
def test_a_skew_that_says_nothing_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        parse_settings(DistillTerm, term("big", **given))


def test_the_error_names_the_term(masked_world):
    with pytest.raises(InputError, match=r"train\.objective\.distill\.1: "):
        Setting(masked_world, {"distill": [term("wide"), term("big", k=100)]})


def test_a_mixture_with_a_hole_in_one_teacher_is_refused(masked_world, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    (folder / "targets/wide/commits/00000-r001.json").unlink()
    distill = [term("big", "wide", combine="mixture")]
    world = replace(masked_world, path=folder)
    setting = Setting(world, {"distill": distill}, missing=("wide",), batch=range(30, 50))
    with pytest.raises(InputError, match="one has holes where another has none"):
        setting.run()


FALL_TO_ZERO = {"from": 1.0, "to": 0.0, "over": 0.5}


@pytest.mark.parametrize(
    "objective",
    [
        {"hard": {"weight": 0}},
        {"hard": {"weight": 0}, "distill": [term("big", weight=0)]},
        {"hard": {"weight": 0}, "distill": [term("big", weight=FALL_TO_ZERO)]},
        {"hard": {"weight": FALL_TO_ZERO}, "distill": [term("big", weight=FALL_TO_ZERO)]},
    ],
)
def test_an_objective_that_ends_as_nothing_is_refused(masked_world, objective):
    with pytest.raises(InputError, match="every weight is 0, so nothing is trained"):
        Setting(masked_world, objective)


def test_a_weight_that_falls_to_zero_at_the_very_end_is_no_such_objective(masked_world):
    fall = {"from": 1.0, "to": 0.0, "over": 1.0}
    distill = [term("big", weight=fall)]
    objective = Setting(masked_world, {"hard": {"weight": 0}, "distill": distill}).objective
    assert objective.plan(9).teachers == ("big",)
