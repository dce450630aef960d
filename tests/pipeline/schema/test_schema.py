"""``pipeline schema``: what an editor underlines is wrong, and what is read is never underlined."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings, sections_in
from rekindle.data.settings_schema import KeysOf, schema_of
from rekindle.pipeline.cli import app
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.init import read_recipe, recipes
from rekindle.pipeline.schema import file_schema
from rekindle.pipeline.yaml_text import parse_yaml

CORPUS = {"source": ["a.txt"], "tokenizer": "t"}
TEACHER = {"name": "a", "model": "m", "task": "causal_lm"}
TASK = {"name": "a", "train": "a.jsonl", "test": "b.jsonl"}
# What must be said of a section that needs anything.
LEAST: dict[str, dict[str, Any]] = {
    "CacheConfig": {"path": "c"},
    "CorpusConfig": CORPUS,
    "CurriculumConfig": {"teacher": "a"},
    "CycleConfig": {"corpus": CORPUS, "student": {"model": "s"}, "tasks": [TASK]},
    "CycleCorpusConfig": {"tokenizer": "t"},
    "CycleTask": TASK,
    "DistillTerm": {"teachers": ["a"]},
    "MergeConfig": {"experts": ["a"]},
    "MethodTerm": {"method": "replaced_tokens"},
    "PrimaryConfig": {"arm": "kd", "against": ["longer"]},
    "PromptsConfig": {"teacher": "a", "to": "p.jsonl"},
    "ReplayConfig": {"domains": ["d"]},
    "RunConfig": {"corpus": CORPUS, "cache": {"path": "c"}},
    "ServedConfig": {"url": "http://a/v1", "model": "m"},
    "SourceEntry": {"path": "a", "format": "text"},
    "StageConfig": {"name": "one"},
    "StudentConfig": {"model": "s"},
    "TeacherConfig": TEACHER,
}
VALUES = (None, True, 0, 1, 2, 99, -1, 0.5, 1e9, "", "a", "auto", "5 min", "a.jsonl")
VALUES += ([], ["a"], ["a", "b"], [0.9, 0.99], [1.0], [TEACHER], [TASK])
VALUES += ({}, {"from": 1.0}, {"a": 1}, "https://a/v1")


def sections() -> list[type[Settings]]:
    """Each section of both files, once."""
    found: dict[type[Settings], None] = {}
    new: list[Any] = [RunConfig, CycleConfig]
    while new:
        one = new.pop()
        if one not in found:
            found[one] = None
            for field in one.model_fields.values():
                new += sections_in(field.annotation)
                new += [mark.section for mark in field.metadata if isinstance(mark, KeysOf)]
    return list(found)


def keys_of(section: type[Settings]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def least_of(section: type[Settings]) -> dict[str, Any]:
    return LEAST.get(section.__name__, {})


def check_of(section: type[Settings]) -> Draft202012Validator:
    return Draft202012Validator(schema_of(section, ""))


def refused(section: type[Settings], values: object) -> str:
    """Why the program refuses ``values``; nothing where it takes them."""
    try:
        parse_settings(section, values)
    except InputError as error:
        return str(error)
    return ""


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
