"""Entities in tags, against conlleval: the cases were put together by its rules, by hand."""

import numpy as np
import pytest

from rekindle.train.finetune.entities import complete_tags, entities, entity_f1, tags_entities
from rekindle.train.finetune.metrics import scores_of
from rekindle.train.finetune.task_data import TaskData


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-A I-A O", {("A", 1, 3)}),
        ("B-A B-A I-A", {("A", 0, 1), ("A", 1, 3)}),
        ("I-A I-A O I-A", {("A", 0, 2), ("A", 3, 4)}),  # an I where none goes on begins one
        ("B-A I-B I-B", {("A", 0, 1), ("B", 1, 3)}),  # of another type: another one
        ("I-A B-A", {("A", 0, 1), ("A", 1, 2)}),  # IOB1
        ("B-A I-A E-A S-A S-A", {("A", 0, 3), ("A", 3, 4), ("A", 4, 5)}),  # BIOES
        ("B-A L-A U-A O", {("A", 0, 2), ("A", 2, 3)}),  # BILOU
        ("E-A I-A", {("A", 0, 1), ("A", 1, 2)}),  # what ended does not go on
        ("S-A E-A", {("A", 0, 1), ("A", 1, 2)}),
        ("B I O B", {("", 0, 2), ("", 3, 4)}),  # of one type that has no name
        ("B-A-x I-A-x", {("A-x", 0, 2)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_which_tokens_belong_together(tags, found):
    assert entities(tags.split()) == found


def test_a_token_without_a_tag_ends_an_entity():
    assert entities(["B-A", None, "I-A"]) == {("A", 0, 1), ("A", 2, 3)}


def test_an_entity_counts_if_its_type_and_its_tokens_are_right():
    true = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"], ["O"]]
    own = [["B-A", "I-A", "O", "B-A"], ["B-A", "I-A"], ["O"]]
    assert entity_f1(own, true) == pytest.approx(2 * 1 / (3 + 3))
    assert entity_f1(true, true) == 1.0
    assert entity_f1([["O"]], [["O"]]) == 0.0


def test_an_entity_does_not_go_on_in_the_next_text():
    assert entity_f1([["B-A"], ["I-A"]], [["B-A"], ["B-A"]]) == 1.0


def test_tags_are_of_entities_if_all_say_how_one_goes_on():
    assert tags_entities(["O", "B-A", "I-A"])
    assert tags_entities(["O", "B", "I"])
    assert not tags_entities(["NOUN", "VERB", "O"])
    assert not tags_entities(["B-A", "I-A"])
    assert complete_tags(["O", "B-A", "I-B"]) == {"O", "B-A", "I-A", "B-B", "I-B"}
    assert complete_tags(["O", "S-A", "E-B"]) >= {"B-A", "I-A", "E-A", "S-B"}
    assert complete_tags(["NOUN", "VERB"]) == {"NOUN", "VERB"}


def test_a_word_that_is_not_read_is_outside_and_wrong():
    words = [["a", "b", "c"], ["d"]]
    names = ("B-A", "I-A", "O")
    data = TaskData(["a b c", "d"], None, np.array([0, 1, 2, 0]), names, words=words)
    logits = np.eye(3, dtype=np.float32)[data.labels]
    assert scores_of(data, logits) == {"f1": 1.0, "accuracy": 1.0}
    logits[3] = np.nan
    assert scores_of(data, logits) == {"f1": pytest.approx(2 / 3), "accuracy": 0.75}
    wider = np.insert(logits, 1, [-1.0, -1.0, -1.0, np.nan], axis=1)
    assert scores_of(data, wider, ["B-A", "B-Z", "I-A", "O"]) == scores_of(data, logits)
