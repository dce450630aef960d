"""The base of every configuration section: typed, frozen, strict about its keys.

Each section lives beside the code that owns it; this module knows none of them.
"""

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rekindle.data.errors import InputError

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """A section of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=()
    )


def parse_settings(section: type[S], values: Any, where: str = "") -> S:
    """Validate ``values`` (a mapping) into ``section``.

    Raises InputError with one line per problem: the key's full path, the rule it breaks, and for an
    unknown key the nearest known one. ``where`` is put before the lines (a file's name, say).
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [_explain(section, problem) for problem in error.errors()]
        lead = f"{where}: " if where else ""
        raise InputError(lead + "; ".join(dict.fromkeys(lines))) from None


def _explain(section: type[BaseModel], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        given = problem.get("input")
        shown = "" if isinstance(given, dict | list) else f" (given: {given!r})"
        return f"{path or 'the configuration'}: {problem['msg']}{shown}"
    unknown = str(problem["loc"][-1])
    known = known_keys(section, problem["loc"][:-1])
    nearest = difflib.get_close_matches(unknown, known, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown key {path!r}{hint} (known here: {', '.join(known)})"


def known_keys(section: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at ``path`` below ``section``."""
    here: list[type[BaseModel]] = [section]
    for part in path:
        if isinstance(part, int):
            continue
        below = [child for model in here for child in _sections_at(model, part)]
        here = below or here  # a part that names a union's branch, not a key
    return sorted({key for model in here for key in _keys(model)})


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _sections_at(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    for name, field in model.model_fields.items():
        if key in (name, field.alias):
            return _sections_in(field.annotation)
    return []


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [section for argument in arguments for section in _sections_in(argument)]
