"""``pipeline schema``: what an editor underlines is wrong, and what is read is never underlined."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from rekindle.data.settings import Settings, parse_settings
from rekindle.data.settings_schema import KeysOf, schema_of
from rekindle.pipeline.cli import app
from rekindle.pipeline.init import read_recipe, recipes
from rekindle.pipeline.schema import file_schema
from rekindle.pipeline.yaml_text import parse_yaml
from testlib.pages.keys_page import PAGE, TASK, TEACHER, keys_of, least_of, page, refused, sections

VALUES = (None, True, 0, 1, 2, 99, -1, 0.5, 1e9, "", "a", "auto", "5 min", "a.jsonl")
VALUES += ([], ["a"], ["a", "b"], [0.9, 0.99], [1.0], [TEACHER], [TASK])
VALUES += ({}, {"from": 1.0}, {"a": 1}, "https://a/v1")


def check_of(section: type[Settings]) -> Draft202012Validator:
    return Draft202012Validator(schema_of(section, ""))


SECTIONS = pytest.mark.parametrize("section", sections(), ids=lambda one: one.__name__)


def cases(section: type[Settings]) -> Iterator[tuple[str, object, dict[str, Any]]]:
    for key in keys_of(section):
        for value in VALUES:
            yield key, value, least_of(section) | {key: value}


@SECTIONS
def test_what_is_read_is_never_underlined(section: type[Settings]) -> None:
    """No schema is narrower than the program, but for a number or a truth value written as text,
    and 0 and 1 for a truth value, which a reader should not have to guess.
    """
    assert not refused(section, least_of(section)), "the least of it must do"
    check = check_of(section)
    fields = section.model_fields.items()
    # Keys of another section, which the program looks at when that is made.
    later = {key for key, one in fields if any(isinstance(mark, KeysOf) for mark in one.metadata)}
    for key, value, values in cases(section):
        if refused(section, values) or (key in later and isinstance(value, dict)):
            continue
        stored = parse_settings(section, values).model_dump(mode="json", by_alias=True).get(key)
        if isinstance(stored, bool) == isinstance(value, bool):
            assert check.is_valid(values), (key, value)


@SECTIONS
def test_a_value_of_another_type_and_an_unknown_key_are_underlined(section: type[Settings]) -> None:
    check = check_of(section)
    strict = section.model_config["extra"] == "forbid"  # a method has settings of its own
    assert check.is_valid(least_of(section) | {"no_such_key": 1}) != strict
    for key, value, values in cases(section):
        told = refused(section, values)
        if f"{key}: Input should be" in told:
            assert not check.is_valid(values), (key, value, told)


def test_the_message_names_the_key() -> None:
    """Of a section, too: it is no choice between a section and nothing."""
    whole = {"corpus": {"source": "a", "tokenizer": "t"}, "cache": {"path": "c"}}
    check = Draft202012Validator(file_schema("run"))
    for wrong, told in (({"train": {"epoch": 1}}, "'epoch'"), ({"corpus": None}, "None is not")):
        [error] = check.iter_errors(whole | wrong)
        assert told in error.message


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_are_not_underlined(name: str) -> None:
    values = parse_yaml(read_recipe(name), name)
    check = Draft202012Validator(file_schema("cycle" if "tasks" in values else "run"))
    assert not [error.message for error in check.iter_errors(values)]
    assert not check.is_valid(values | {"trian": {}})


def test_the_command_prints_a_schema_with_meanings() -> None:
    for arguments, key in ([], "teachers"), (["cycle"], "tasks"):
        printed = CliRunner().invoke(app, ["schema", *arguments]).stdout
        found = json.loads(printed)
        Draft202012Validator.check_schema(found)
        assert all("description" in one for one in found["properties"].values())
        assert key in found["properties"]


def test_the_page_of_keys_is_what_the_classes_say() -> None:
    """Renew it with ``python tests/lib/testlib/pages/keys_page.py``."""
    assert PAGE.read_text(encoding="utf-8") == page()
