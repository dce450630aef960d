"""The union of label sets and MUKI's weights: a worked example, and what holds of all of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import UncertaintyConfig
from rekindle.train.objective.label_union import (
    FLOOR,
    LabelUnion,
    certainty,
    expert_weights,
    margin,
)

NAMES = ["cat", "dog", "bird", "fish", "sun", "rain"]


def expert(name, *labels, count=None):
    return TeacherInfo(
        name=name,
        task="sequence_classification",
        kind="sequence",
        view="text",
        num_labels=len(labels) if count is None else count,
        label_names=labels,
    )


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


# --- a worked example: A knows cat and dog and is sure; B knows dog, bird and cat and is not ---

A, B = expert("A", "cat", "dog"), expert("B", "dog", "bird", "cat")
LOGITS = {
    "A": rows([math.log(3), 0.0]),  # 3/4, 1/4
    "B": rows([math.log(5), math.log(2), math.log(3)]),  # 5/10, 2/10, 3/10
}
# H(0.9, 0.1) = 0.325083 of log 2 = 0.693147; H(0.6, 0.3, 0.1) = 0.897946 of log 3 = 1.098612
S_A, S_B = 0.5310044, 0.1826546


def worked_certainties():
    return torch.stack([certainty(rows([0.9, 0.1])), certainty(rows([0.6, 0.3, 0.1]))], 1)


def test_the_worked_example_is_as_certain_as_by_hand():
    assert worked_certainties()[0].tolist() == pytest.approx([S_A, S_B], abs=1e-6)
    assert margin(worked_certainties()).tolist() == pytest.approx([0.3483508], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.8509091, 0.1490909]),  # 1 / (1 + exp(−0.3483498 / 0.2))
        ({"sharpness": 1.0}, [0.5862174, 0.4137826]),
        ({"selection": "hard"}, [1.0, 0.0]),
    ],
)
def test_the_worked_example_weighs_as_by_hand(settings, expected):
    found = expert_weights(worked_certainties(), UncertaintyConfig(**settings))
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        # cat ¾·w + 3/10·(1−w), dog ¼·w + 5/10·(1−w), bird 2/10·(1−w), with w = 0.8509091
        (1.0, [0.6829091, 0.2872727, 0.0298182]),
        # A is √3 : 1, B is √5 : √2 : √3
        (2.0, [0.5874327, 0.3733936, 0.0391738]),
    ],
)
def test_the_worked_example_mixes_as_by_hand(temperature, expected):
    union = LabelUnion.of([A, B], "merge")
    assert union.names == ("cat", "dog", "bird")
    assert union.places == {"A": (0, 1), "B": (1, 2, 0)}
    weights = expert_weights(worked_certainties(), UncertaintyConfig())
    found = union.mix(LOGITS, weights, temperature)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_worked_example_apart():
    union = LabelUnion.of([A, B], "apart")
    assert union.names == ("A/cat", "A/dog", "B/dog", "B/bird", "B/cat")
    assert union.places == {"A": (0, 1), "B": (2, 3, 4)}
    found = union.mix(LOGITS, rows([0.5, 0.5]), 1.0)
    assert found[0].tolist() == pytest.approx([0.375, 0.125, 0.25, 0.1, 0.15], abs=1e-6)


# --- label sets ---

label_sets = st.lists(
    st.lists(st.sampled_from(NAMES), min_size=1, unique=True).map(tuple), min_size=1, max_size=4
)


@given(label_sets)
def test_merged_labels_are_one_place_each(sets):
    experts = [expert(f"e{j}", *labels) for j, labels in enumerate(sets)]
    union = LabelUnion.of(experts, "merge")
    assert set(union.names) == set().union(*sets)
    assert len(set(union.names)) == len(union.names)
    for info in experts:
        assert [union.names[place] for place in union.places[info.name]] == list(info.label_names)
    firsts = [next(j for j, labels in enumerate(sets) if name in labels) for name in union.names]
    assert firsts == sorted(firsts)  # in the order of the experts


@given(label_sets)
def test_labels_kept_apart_fill_all_places_in_order(sets):
    experts = [expert(f"e{j}", *labels) for j, labels in enumerate(sets)]
    union = LabelUnion.of(experts, "apart")
    everywhere = [place for info in experts for place in union.places[info.name]]
    assert everywhere == list(range(sum(map(len, sets)))) == list(range(len(union.names)))
    named = [f"{info.name}/{label}" for info in experts for label in info.label_names]
    assert list(union.names) == named


@pytest.mark.parametrize(
    ("experts", "overlap", "message"),
    [
        (
            [A, expert("C", "LABEL_0", "LABEL_1")],
            "merge",
            r"the classes of teacher 'C' have no names \(LABEL_0 …\), but equal names would become "
            r"one label\. Name them \(id2label in its config\.json\), or use labels: apart",
        ),
        (
            [expert("C", "LABEL_0", "LABEL_1"), expert("D", "LABEL_0", "LABEL_1", "LABEL_2")],
            "merge",
            "the classes of teacher 'C' have no names",
        ),
        (
            [A, expert("C", "yes", "no", "yes")],
            "merge",
            r"teacher 'C' has 3 classes and the label names \['yes', 'no', 'yes'\]: a union of "
            "label sets needs a different name for each class",
        ),
        ([A, expert("C", "yes", "yes")], "apart", "'C' has 2 classes and the label names"),
        ([A, expert("C", "yes", count=2)], "merge", r"'C' has 2 classes .* \['yes'\]"),
        ([A, expert("C", "yes", "no", count=1)], "apart", "'C' has 1 classes"),
        ([A, expert("C", count=2)], "merge", r"'C' has 2 classes and the label names \[\]"),
    ],
)
def test_labels_without_a_union_are_refused(experts, overlap, message):
    with pytest.raises(InputError, match=message):
        LabelUnion.of(experts, overlap)


def test_classes_without_names_may_stand_alone_or_apart():
    unnamed = [expert("C", "LABEL_0", "LABEL_1"), expert("D", "LABEL_0", "LABEL_1")]
    assert LabelUnion.of(unnamed[:1], "merge").names == ("LABEL_0", "LABEL_1")
    assert len(LabelUnion.of(unnamed, "apart").names) == 4


def test_names_that_only_begin_like_numbered_ones_are_names():
    named = [A, expert("C", "LABEL_red", "LABEL_0")]
    assert LabelUnion.of(named, "merge").names == ("cat", "dog", "LABEL_red", "LABEL_0")


# --- weights and mixtures ---


@st.composite
def distributions(draw, classes):
    """Probabilities of ``classes`` outcomes, some of them zero."""
    parts = draw(st.lists(st.floats(0, 1), min_size=classes, max_size=classes))
    if sum(parts) < 1e-3:
        parts[draw(st.integers(0, classes - 1))] = 1.0
    return [part / sum(parts) for part in parts]


@given(st.integers(2, 8).flatmap(lambda c: st.lists(distributions(c), min_size=1, max_size=4)))
def test_certainty_lies_between_nothing_and_all(means):
    found = certainty(torch.tensor(means, dtype=torch.float32))
    assert len(found) == len(means)
    assert float(found.min()) > -1e-5
    assert float(found.max()) <= 1.0
    for value, mean in zip(found.tolist(), means, strict=True):
        entropy = -sum(p * math.log(p) for p in mean if p > 0)
        assert value == pytest.approx(1 - entropy / math.log(len(mean)), abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_certainty_at_its_ends(classes):
    ends = torch.stack([torch.full((classes,), 1 / classes), torch.eye(classes)[-1]])
    assert certainty(ends).tolist() == pytest.approx([0.0, 1.0], abs=1e-5)


certainties = st.integers(2, 5).flatmap(
    lambda j: st.lists(st.lists(st.floats(0, 1, width=32), min_size=j, max_size=j), min_size=1)
)


@given(certainties, st.sampled_from(["soft", "hard"]), st.floats(0.01, 10))
def test_weights_are_a_distribution_that_prefers_the_certain(values, selection, sharpness):
    s = torch.tensor(values)
    found = expert_weights(s, UncertaintyConfig(selection=selection, sharpness=sharpness))
    assert found.shape == s.shape
    assert torch.allclose(found.sum(1), torch.ones(len(s)), atol=1e-5)
    assert bool((found >= 0).all())
    for own, weights in zip(values, found.tolist(), strict=True):
        assert weights[own.index(max(own))] == max(weights)
        if selection == "hard":
            assert sorted(weights)[-2:] == [0.0, 1.0]
        else:
            powers = [math.exp((value - max(own)) / sharpness) for value in own]
            assert weights == pytest.approx([p / sum(powers) for p in powers], abs=1e-5)


@given(certainties)
def test_a_margin_is_never_nothing(values):
    found = margin(torch.tensor(values)).tolist()
    assert all(v >= FLOOR * (1 - 1e-6) for v in found)
    for own, v in zip(values, found, strict=True):
        best, second = sorted(own, reverse=True)[:2]
        assert v == pytest.approx(best - second + 1e-6, abs=1e-7)


@given(label_sets, st.sampled_from(["merge", "apart"]), st.integers(0, 999), st.floats(0.5, 8))
def test_a_mixture_is_a_distribution_over_the_union(sets, overlap, seed, temperature):
    draw = torch.Generator().manual_seed(seed)
    experts = [expert(f"e{j}", *labels) for j, labels in enumerate(sets)]
    union = LabelUnion.of(experts, overlap)
    logits = {e.name: 5 * torch.randn(3, len(e.label_names), generator=draw) for e in experts}
    weights = torch.softmax(torch.randn(3, len(sets), generator=draw), 1)
    found = union.mix(logits, weights, temperature)
    assert found.shape == (3, len(union.names))
    assert torch.allclose(found.sum(1), torch.ones(3), atol=1e-5)
    expected = torch.zeros(3, len(union.names))
    for j, e in enumerate(experts):
        for c, place in enumerate(union.places[e.name]):
            probs = torch.softmax(logits[e.name] / temperature, 1)
            expected[:, place] += weights[:, j] * probs[:, c]
    assert torch.allclose(found, expected, atol=1e-6)


def test_an_expert_of_weight_0_says_nothing():
    union = LabelUnion.of([A, B], "merge")
    found = union.mix(LOGITS, rows([1.0, 0.0]), 1.0)
    assert found[0].tolist() == pytest.approx([0.75, 0.25, 0.0])


def test_no_row_makes_no_mixture():
    union = LabelUnion.of([A, B], "merge")
    logits = {"A": torch.zeros(0, 2), "B": torch.zeros(0, 3)}
    assert union.mix(logits, torch.zeros(0, 2), 2.0).shape == (0, 3)
    assert certainty(torch.zeros(0, 3)).shape == (0,)
    assert margin(torch.zeros(0, 2)).shape == (0,)
    assert expert_weights(torch.zeros(0, 2), UncertaintyConfig(selection="hard")).shape == (0, 2)
