"""The JSON Schema of a configuration file, which editors use to complete and underline keys.

It accepts every file that Rekindle reads: rules between several keys are left out, and other forms
of a value (a text for a list of one, nothing for an empty section) are included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]


def one_or_many(schema: Schema) -> None:
    """Let the single item of a list stand alone as well: for ``json_schema_extra``."""
    list_schema = {key: schema.pop(key) for key in [*schema] if key in _LIST_KEYS}
    schema["anyOf"] = [list_schema["items"], list_schema]


_LIST_KEYS = ("type", "items", "minItems", "maxItems")


@dataclass(frozen=True)
class KeysOf:
    """Marks a mapping of keys of ``section``, all optional; with ``lists``, several
    values of each.
    """

    section: type[BaseModel]
    lists: bool = False

    def __get_pydantic_json_schema__(
        self, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(self.section.__pydantic_core_schema__))
        keys: Schema = {**schema["properties"]}
        if self.lists:
            keys = {key: {"type": "array", "items": one} for key, one in keys.items()}
        return {"type": "object", "properties": keys, "additionalProperties": False}


def schema_of(section: type[BaseModel], title: str) -> Schema:
    """Return the JSON Schema of files that hold ``section``; ``title``: its name in an editor."""
    found = section.model_json_schema(by_alias=True, schema_generator=_Generator)
    return {"$schema": DIALECT} | found | {"title": title}


class _Generator(GenerateJsonSchema):
    """Generates pydantic's schema without titles, and allows empty sections and lists."""

    def generate(self, schema: Any, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        found = super().generate(schema, mode)
        _adapt(found)
        return found


def _adapt(schema: Any) -> None:
    """Remove the titles from ``schema``, and let each key take all forms it has in files."""
    if isinstance(schema, list):
        for one in schema:
            _adapt(one)
    if not isinstance(schema, dict):
        return
    for one in schema.values():
        _adapt(one)
    _limit_lists(schema)
    for section in (schema, *schema.get("$defs", {}).values()):
        if "properties" in section:
            section.pop("title", None)
            keys = section["properties"]
            section["properties"] = {key: _or_null(one) for key, one in keys.items()}
            if section.get("type") == "object" and not section.get("required"):
                section["type"] = ["object", "null"]  # a section that needs nothing may be empty


def _or_null(schema: Mapping[str, Any]) -> Schema:
    """Return the schema of a key without title, with nothing for an empty section, list
    or mapping.
    """
    found = {key: value for key, value in schema.items() if key != "title"}
    if found.get("type") in ("array", "object"):
        found["type"] = [found["type"], "null"]
    if {"type": "null"} not in found.get("anyOf", [{"type": "null"}]):
        # if a number may stand in its place, nothing is not an empty section
        for one in found["anyOf"]:
            one |= {"type": "object"} if "$ref" in one else {}
    if _lists(found) and {"type": "null"} not in found["anyOf"]:
        found["anyOf"] = [*found["anyOf"], {"type": "null"}]
    return found


def _limit_lists(schema: Schema) -> None:
    """Move pydantic's length limits to the list, where they stand at the text that may
    replace it.
    """
    for one in _lists(schema):
        for name, of_list in (("minLength", "minItems"), ("maxLength", "maxItems")):
            if name in schema:
                one[of_list] = schema.pop(name)


def _lists(schema: Schema) -> list[Schema]:
    return [one for one in schema.get("anyOf", ()) if one.get("type") == "array"]
