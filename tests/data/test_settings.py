"""Strict sections: an unknown key names the nearest one with its path, wrong types the rule."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.settings import Settings, parse_settings


class Schedule(Settings):
    schedule: Literal["linear", "cosine"] = "linear"
    start: float = Field(1.0, alias="from")
    to: float = 0.0


class Step(Settings):
    at: int
    factor: float = 1.0


class Term(Settings):
    teachers: tuple[str, ...]
    weight: float | Schedule | tuple[Step, ...] = 1.0
    temperature: float = Field(1.0, gt=0)


class Shares(Settings):
    first: float = 0.5
    second: float = 0.5

    @model_validator(mode="after")
    def _sum(self):
        if self.first + self.second > 1:
            raise ValueError("first + second must not exceed 1")
        return self


class Run(Settings):
    name: str
    terms: tuple[Term, ...] = ()
    shares: Shares = Field(default_factory=Shares)
    by_name: dict[str, Step] = Field(default_factory=dict)
    limit: int | Literal["all"] | None = None


def message(values, where=""):
    with pytest.raises(InputError) as caught:
        parse_settings(Run, values, where)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_good_values_are_taken():
    run = parse_settings(
        Run, {"name": "r", "terms": [{"teachers": ["a"], "weight": {"from": 2, "to": 1}}]}
    )
    assert run.terms[0].weight == Schedule.model_validate({"from": 2, "to": 1})
    assert run.limit is None


UNKNOWN = [
    ({"nam": "r"}, "'nam'", "'name'"),
    ({"name": "r", "share": {}}, "'share'", "'shares'"),
    ({"name": "r", "shares": {"frist": 1}}, "'shares.frist'", "'first'"),
    ({"name": "r", "terms": [{"teachers": [], "weigth": 1}]}, "'terms.0.weigth'", "'weight'"),
    (
        {"name": "r", "terms": [{"teachers": []}, {"teachers": [], "temprature": 1}]},
        "'terms.1.temprature'",
        "'temperature'",
    ),
    # Inside a value that may be a number, a section or a list of sections.
    (
        {"name": "r", "terms": [{"teachers": [], "weight": {"form": 1}}]},
        "'terms.0.weight.form'",
        "'from'",
    ),
    (
        {"name": "r", "terms": [{"teachers": [], "weight": [{"at": 1, "facter": 2}]}]},
        "'terms.0.weight.0.facter'",
        "'factor'",
    ),
]


@pytest.mark.parametrize(("values", "path", "nearest"), UNKNOWN)
def test_an_unknown_key_has_its_full_path_and_names_the_nearest(values, path, nearest):
    text = message(values)
    assert f"unknown key {path}" in text
    assert f"did you mean {nearest}?" in text


def test_a_key_that_lies_elsewhere_or_has_another_name_is_named():
    assert "unknown key 'second'; did you mean 'shares.second'?" in message({"second": 1})
    assert "; did you mean 'terms.0.temperature'?" in message({"name": "r", "temp": 2})
    where = {"name": "r", "terms": [{"teachers": [], "tau": 2}]}
    assert "unknown key 'terms.0.tau'; it is called 'temperature' here (" in message(where)


def test_a_value_of_several_types_has_one_message_with_all_rules():
    told = message({"name": "r", "limit": "many"})
    assert told.endswith(", or 'all' (given: 'many')")
    assert told.count("given") == told.count("limit: ") == 1


def test_nothing_is_meant_where_nothing_is_near():
    assert "unknown key 'qqq' (known here: " in message({"name": "r", "qqq": 1})
    assert did_you_mean("label", ["text", "gold"]) == ""
    assert did_you_mean("Label", ["text", "label"]) == "; did you mean 'label'?"
    assert did_you_mean("prob", ["policy", "probability"]) == "; did you mean 'probability'?"


def test_the_known_keys_are_listed_by_the_names_that_are_written():
    text = message({"name": "r", "terms": [{"teachers": [], "weight": {"x": 1}}]})
    assert "(known here: from, schedule, to)" in text
    assert "start" not in text


def test_what_is_wrong_inside_a_union_is_not_buried_under_the_other_branches():
    text = message({"name": "r", "terms": [{"teachers": [], "weight": {"shedule": "linear"}}]})
    assert text.count(";") == 1  # only the one before "did you mean"
    assert "valid number" not in text
    assert "Schedule" not in text


WRONG = [
    ({"name": 3}, "name", "must be text"),
    ({"name": "r", "limit": "many"}, "limit", "integer"),
    ({"name": "r", "limit": 1.5}, "limit", "integer"),
    ({"name": "r", "terms": 5}, "terms", "list"),
    ({"name": "r", "terms": [7]}, "terms.0", "Term"),
    ({"name": "r", "terms": [{"teachers": "a"}]}, "terms.0.teachers", "list"),
    ({"name": "r", "terms": [{"teachers": [], "temperature": -1}]}, "terms.0.temperature", "> 0"),
    ({"name": "r", "terms": [{"teachers": [], "weight": "big"}]}, "terms.0.weight", "number"),
    ({"name": "r", "terms": [{"teachers": [], "weight": None}]}, "terms.0.weight", "nothing"),
    ({"name": "r", "shares": {"first": 0.9}}, "shares", "first + second must not exceed 1"),
    ({"name": "r", "shares": 1}, "shares", "section"),
    ({}, "name", "is missing"),
]


@pytest.mark.parametrize(("values", "path", "rule"), WRONG)
def test_a_wrong_value_names_its_place_and_the_rule(values, path, rule):
    text = message(values).replace("greater than 0", "> 0")
    assert text.startswith(f"{path}: ")
    assert rule.lower() in text.lower()
    assert "Value error" not in text


def test_the_value_that_was_given_is_shown():
    assert "(given: 'many')" in message({"name": "r", "limit": "many"})


def test_none_is_told_to_be_null_where_null_may_stand():
    assert message({"name": "r", "limit": "none"}).endswith("(given: 'none'; null means none)")
    assert "null" not in message({"name": "r", "terms": [{"teachers": [], "weight": "none"}]})


@pytest.mark.parametrize("values", [None, [], 3, "text"])
def test_something_else_than_a_mapping(values):
    assert message(values, "run.yaml").startswith("run.yaml: the configuration: ")


def test_every_problem_is_told_once():
    text = message({"nam": 1, "limit": "x", "shares": {"frist": 1}}, "run.yaml")
    assert text.startswith("run.yaml: ")
    for part in ("'nam'", "limit: ", "'shares.frist'", "name: is missing"):
        assert text.count(part) == 1


def test_sections_are_frozen():
    run = parse_settings(Run, {"name": "r"})
    with pytest.raises(ValidationError):
        run.name = "other"
