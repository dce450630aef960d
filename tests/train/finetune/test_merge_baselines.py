"""Ways to merge classifiers without a student: a worked example in plain numpy, labels by name."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.finetune.config import MergeConfig
from rekindle.train.finetune.merge_baselines import (
    bare_names,
    merge_scores,
    merged_probabilities,
    scores_by_name,
)
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.objective.label_union import LabelUnion


def expert(name, *labels):
    about = {"task": "sequence_classification", "kind": "sequence", "view": "text"}
    return TeacherInfo(name=name, num_labels=len(labels), label_names=labels, **about)


A, B = expert("A", "cat", "dog"), expert("B", "dog", "bird", "cat")
# Of the first text A is sure (cat); of the second B is (bird).
LOGITS = {
    "A": np.log(np.array([[3.0, 1.0], [1.0, 1.0]])),
    "B": np.log(np.array([[2.0, 1.0, 1.0], [1.0, 8.0, 1.0]])),
}
MEANS = {
    "A": np.array([[0.9, 0.1], [0.5, 0.5]]),
    "B": np.array([[0.4, 0.3, 0.3], [0.1, 0.8, 0.1]]),
}
WAYS = ["A alone", "B alone", "uniform mixture", "concatenated logits", "MUKI, soft", "MUKI, hard"]


def by_hand(row):
    """Probabilities of cat, dog, bird by every way, with numpy alone (MUKI)."""
    a, b = np.exp(LOGITS["A"][row]), np.exp(LOGITS["B"][row])
    alone_a = np.array([*a, 0]) / a.sum()
    alone_b = np.array([b[2], b[0], b[1]]) / b.sum()
    side_by_side = np.array([a[0] + b[2], a[1] + b[0], b[1]]) / (a.sum() + b.sum())
    s = []
    for mean in (MEANS["A"][row], MEANS["B"][row]):
        s.append(1 + (mean * np.log(mean)).sum() / np.log(len(mean)))
    w = np.exp(np.array(s) / 0.2) / np.exp(np.array(s) / 0.2).sum()
    hard = alone_a if s[0] > s[1] else alone_b
    soft = w[0] * alone_a + w[1] * alone_b
    both = (alone_a + alone_b) / 2
    return dict(zip(WAYS, [alone_a, alone_b, both, side_by_side, soft, hard], strict=True))


def tensors(arrays):
    return {name: torch.from_numpy(values).float() for name, values in arrays.items()}


def test_every_way_is_as_by_hand():
    union = LabelUnion.of([A, B], "merge")
    assert union.names == ("cat", "dog", "bird")
    found = merged_probabilities(union, tensors(LOGITS), tensors(MEANS))
    assert list(found) == WAYS
    for row in (0, 1):
        for way, expected in by_hand(row).items():
            assert found[way][row].numpy() == pytest.approx(expected, abs=1e-6), way
    hard = found["MUKI, hard"].argmax(dim=1).tolist()
    assert [union.names[place] for place in hard] == ["cat", "bird"]


def test_sharpness_reaches_the_soft_merge_alone():
    union = LabelUnion.of([A, B], "merge")
    sharp = merged_probabilities(union, tensors(LOGITS), tensors(MEANS), sharpness=1e-3)
    blunt = merged_probabilities(union, tensors(LOGITS), tensors(MEANS), sharpness=1e3)
    assert torch.allclose(sharp["MUKI, soft"], sharp["MUKI, hard"], atol=1e-5)
    assert torch.allclose(blunt["MUKI, soft"], blunt["uniform mixture"], atol=1e-3)
    assert not torch.allclose(blunt["MUKI, hard"], blunt["uniform mixture"], atol=0.1)


def test_without_monte_carlo_means_muki_is_left_out():
    union = LabelUnion.of([A, B], "merge")
    assert list(merged_probabilities(union, tensors(LOGITS))) == WAYS[:4]


TRUTH = TaskData(["x", "y"], None, np.array([1, 0]), ("bird", "cat"))  # cat, then bird


@pytest.mark.parametrize("labels", ["merge", "apart"])
def test_scores_are_matched_by_name(labels):
    """A knows no bird and says cat or dog: half right. B takes the first for a dog."""
    found = merge_scores([A, B], LOGITS, MEANS, TRUTH, labels)
    accuracy = {way: scores["accuracy"] for way, scores in found.items()}
    assert accuracy["A alone"] == accuracy["B alone"] == 0.5
    assert accuracy["MUKI, hard"] == accuracy["MUKI, soft"] == 1.0


def test_the_program_of_the_recipe_says_the_same():
    """docs/recipes/muki.md, with a cache that holds the worked example."""
    page = Path(__file__).parents[3] / "docs" / "recipes" / "muki.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    experts = {"A": SimpleNamespace(info=A), "B": SimpleNamespace(info=B)}
    targets = {n: SimpleNamespace(logits=LOGITS[n], mc_probs=MEANS[n]) for n in experts}

    class Cache:
        teacher = staticmethod(experts.__getitem__)

        def __len__(self):
            return 2

        def gather(self, rows, names):
            assert (rows.tolist(), names) == ([0, 1], ["A", "B"])
            return SimpleNamespace(targets=targets)

    found = {"cache": Cache(), "names": ["A", "B"], "np": np, "data": TRUTH}
    exec(program, found)
    assert found["scores"] == merge_scores([A, B], LOGITS, MEANS, TRUTH)


def test_the_overlap_rule_decides_a_case():
    """Merged, two experts' dogs outweigh one cat; apart, the cat is the largest single one."""
    experts = [expert("A", "cat", "dog"), expert("B", "bird", "dog")]
    logits = {"A": np.log([[0.55, 0.45]]), "B": np.log([[0.5, 0.5]])}
    truth = TaskData(["x"], None, np.array([0]), ("dog", "cat"))
    merged = merge_scores(experts, logits, None, truth, "merge")["uniform mixture"]
    apart = merge_scores(experts, logits, None, truth, "apart")["uniform mixture"]
    assert (merged["accuracy"], apart["accuracy"]) == (1.0, 0.0)


def test_names_lose_their_experts_only_if_all_have_one():
    assert bare_names(["A/cat", "B/cat", "B/dog"], ["A", "B"]) == ("cat", "cat", "dog")
    assert bare_names(["A/cat", "dog"], ["A", "B"]) == ("A/cat", "dog")
    assert bare_names(["cat", "dog"], ["A"]) == ("cat", "dog")


def test_equal_names_are_one_label_with_the_largest_value():
    values = np.array([[0.3, 0.4, 0.3], [0.1, 0.2, 0.7]])
    data = TaskData(["x", "y"], None, np.array([0, 1]), ("dog", "cat"))
    assert scores_by_name(values, ("cat", "dog", "cat"), data)["accuracy"] == 1.0


def test_an_answer_that_the_task_does_not_have_is_wrong():
    data = TaskData(["x", "y"], None, np.array([0, 1]), ("dog", "cat"))
    values = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 2.0]])
    assert scores_by_name(values, ("cat", "dog", "bird"), data)["accuracy"] == 0.5


def test_labels_that_nobody_knows_are_refused():
    data = TaskData(["x", "y"], None, np.array([0, 1]), ("dog", "fish"))
    with pytest.raises(InputError, match="the labels fish; the experts together know cat, dog, b"):
        merge_scores([A, B], LOGITS, None, data)
    scores = TaskData(["x"], None, np.array([0.5], np.float32), ())
    with pytest.raises(InputError, match="scores, not classes"):
        merge_scores([A, B], LOGITS, None, scores)


def test_the_settings_want_experts():
    with pytest.raises(InputError, match="experts"):
        parse_settings(MergeConfig, {"experts": []})
