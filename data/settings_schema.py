"""The JSON Schema of a configuration file, which editors take to complete and underline its keys.

It refuses no file that is read: rules between several keys are not in it, and what a key may be in
other words (a text for a list of one, nothing for an empty section) is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def one_or_many(schema: Schema) -> None:
    """Let a list of the schema of a key stand as its only item, too: for ``json_schema_extra``."""
    listed = {key: schema.pop(key) for key in [*schema] if key in _OF_LISTS}
    schema["anyOf"] = [listed["items"], listed]


_OF_LISTS = ("type", "items", "minItems", "maxItems")


@dataclass(frozen=True)
class KeysOf:
    """Marks a mapping that holds keys of ``section``, none of which must be there; with ``lists``
    several values of each.
    """

    section: type[BaseModel]
    lists: bool = False

    def __get_pydantic_json_schema__(
        self, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        whole = handler.resolve_ref_schema(handler(self.section.__pydantic_core_schema__))
        keys: Schema = {**whole["properties"]}
        if self.lists:
            keys = {key: {"type": "array", "items": one} for key, one in keys.items()}
        return {"type": "object", "properties": keys, "additionalProperties": False}


def schema_of(section: type[BaseModel], title: str) -> Schema:
    """Return the JSON Schema of files that hold ``section``; ``title``: what an editor calls it."""
    found = section.model_json_schema(by_alias=True, schema_generator=_Generator)
    return {"$schema": DIALECT} | found | {"title": title}


class _Generator(GenerateJsonSchema):
    """Writes what pydantic does, less its titles, and lets sections and lists be left empty."""

    def generate(self, schema: Any, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        found = super().generate(schema, mode)
        _mend(found)
        return found


def _mend(schema: Any) -> None:
    """Take the titles out of ``schema``, and let each key be what it may be in a file."""
    if isinstance(schema, list):
        for one in schema:
            _mend(one)
    if not isinstance(schema, dict):
        return
    for one in schema.values():
        _mend(one)
    _limit_lists(schema)
    for section in (schema, *schema.get("$defs", {}).values()):
        if "properties" in section:
            section.pop("title", None)
            keys = section["properties"]
            section["properties"] = {key: _or_nothing(one) for key, one in keys.items()}
            if section.get("type") == "object" and not section.get("required"):
                section["type"] = ["object", "null"]  # one that needs nothing may be left empty


def _or_nothing(schema: Mapping[str, Any]) -> Schema:
    """The schema of a key, without its title: nothing is an empty section, list or mapping."""
    found = {key: value for key, value in schema.items() if key != "title"}
    if found.get("type") in ("array", "object"):
        found["type"] = [found["type"], "null"]
    if {"type": "null"} not in found.get("anyOf", [{"type": "null"}]):
        for one in found["anyOf"]:  # where a number may stand in its place, a section is none
            one |= {"type": "object"} if "$ref" in one else {}
    if _lists(found) and {"type": "null"} not in found["anyOf"]:
        found["anyOf"] = [*found["anyOf"], {"type": "null"}]
    return found


def _limit_lists(schema: Schema) -> None:
    """Give a list what pydantic says of it as if it were the text that may stand in its place."""
    for one in _lists(schema):
        for name, of_list in (("minLength", "minItems"), ("maxLength", "maxItems")):
            if name in schema:
                one[of_list] = schema.pop(name)


def _lists(schema: Schema) -> list[Schema]:
    return [one for one in schema.get("anyOf", ()) if one.get("type") == "array"]
