"""What a model says of a row, as it is written."""

import datetime
import decimal
import io
import json

import numpy as np
import pytest

from rekindle.data.errors import InputError
from rekindle.train.finetune.predictions import Answers, add_answers, labels_of, write_rows

SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"
LOGITS = np.array([0.5, 2.0, -1.0], np.float32)


def test_each_problem_has_its_columns():
    names = ("a", "b", "c")
    one = Answers(SINGLE, names).of(LOGITS)
    assert (one["label"], [*one["probabilities"]]) == ("b", [*names])
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert [*one["probabilities"].values()] == pytest.approx(expected, abs=1e-6)
    assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    several = Answers(SEVERAL, names).of(LOGITS)
    assert several["labels"] == ["a", "b"]
    assert [*several["probabilities"].values()] == pytest.approx(1 / (1 + np.exp(-LOGITS)))
    assert Answers("regression", ("x",)).of(LOGITS[:1]) == {"score": 0.5}
    assert Answers("regression", names).of(LOGITS) == {"scores": [0.5, 2.0, -1.0]}
    assert [labels_of(answer) for answer in (one, several, {"score": 1.0})] == [
        ["b"],
        ["a", "b"],
        [],
    ]


def test_numbers_are_the_float32_in_its_fewest_digits():
    value = np.float32(0.1)
    said = Answers("regression", ("x",)).of(np.array([value]))["score"]
    assert repr(said) == "0.1"
    assert np.float32(said) == value


def test_own_columns_stay_and_those_that_are_taken_get_another_name():
    answer = {"label": "b", "probabilities": {}}
    row = {"label": "gold", "text": "t", "n": 1}
    found = next(add_answers([row], [answer], "f"))
    assert [*found.items()] == [
        *{"given_label": "gold", "text": "t", "n": 1}.items(),
        *answer.items(),
    ]
    with pytest.raises(InputError, match="f, row 7: it has the columns 'label' and 'given_label'"):
        [*add_answers([{"label": 1, "given_label": 2}], [answer], "f", 7)]


def written(row, **how):
    file = io.BytesIO()
    write_rows([row], file, **how)
    return file.getvalue()


def test_every_line_is_json():
    row = {"t": "é\x1b\u2028", "when": datetime.date(2024, 2, 3), "d": decimal.Decimal("1.50")}
    row |= {"n": [float("nan"), {"i": float("inf")}], "half": "\ud800"}
    expected = row | {"when": "2024-02-03", "d": "1.50", "n": [None, {"i": None}]}
    for how in ({}, {"ascii_only": True}):
        line = written(row, **how)
        assert json.loads(line, parse_constant=pytest.fail) == expected
        assert line.count(b"\n") == 1
    assert "é".encode() in written({"t": "é"})
    assert written({"t": "é\x7f"}, ascii_only=True).isascii()
    with pytest.raises(InputError, match="row 1: a column holds bytes"):
        written({"b": b"x"})
