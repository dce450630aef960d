"""The base of every configuration section: typed, frozen, strict about its keys.

Each section lives beside the code that owns it; this module knows none of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from rekindle.data.errors import InputError, did_you_mean

S = TypeVar("S", bound="Settings")
T = TypeVar("T")


@dataclass(frozen=True)
class MayChange:
    """Marks a key that may differ when work goes on: it decides how the work is done, and not what
    comes of it. ``unless`` names a property of its section: where that is true, the key decides.
    """

    unless: str = ""


Free = Annotated[T, MayChange()]  # a key of that kind: ``threads: Free[int]``


class Settings(BaseModel):
    """A section of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=()
    )


def free_keys(section: Settings) -> Iterator[str]:
    """Yield the dotted keys of ``section`` that may differ when work goes on."""
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        marks = [mark for mark in field.metadata if isinstance(mark, MayChange)]
        if any(not mark.unless or not getattr(section, mark.unless) for mark in marks):
            yield key
        several = value if isinstance(value, tuple) else ()
        inside = {key: value} | {f"{key}.{number}": one for number, one in enumerate(several)}
        for where, one in inside.items():
            if isinstance(one, Settings):
                yield from (f"{where}.{below}" for below in free_keys(one))


def parse_settings(section: type[S], values: object, where: str = "") -> S:
    """Validate ``values`` (a mapping) into ``section``.

    Raises InputError with one line per problem: the key's full path, the rule it breaks, and for an
    unknown key the nearest known one. ``where`` is put before the lines (a file's name, say).
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = [_problem(section, found) for found in error.errors()]
        # A value that may be a number or a section fails as both; what is wrong inside says more.
        told = [
            p.message for p in problems if not any(_is_inside(o.keys, p.keys) for o in problems)
        ]
        lead = f"{where}: " if where else ""
        raise InputError(lead + "; ".join(dict.fromkeys(told))) from None


class _Problem(NamedTuple):
    keys: tuple[str, ...]
    message: str


def _problem(section: type[BaseModel], found: ErrorDetails) -> _Problem:
    unknown = found["type"] == "extra_forbidden"
    keys, sections = _walk(section, found["loc"][:-1] if unknown else found["loc"])
    if not unknown:
        given = found.get("input")
        shown = "" if isinstance(given, dict | list) else f" (given: {given!r})"
        rule = found["msg"].removeprefix("Value error, ")
        return _Problem(keys, f"{'.'.join(keys) or 'the configuration'}: {rule}{shown}")
    keys += (str(found["loc"][-1]),)
    known = sorted({f.alias or name for s in sections for name, f in s.model_fields.items()})
    told = f"unknown key {'.'.join(keys)!r}{did_you_mean(keys[-1], known)}"
    return _Problem(keys, f"{told} (known here: {', '.join(known)})")


def _is_inside(keys: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    return len(keys) > len(outer) and keys[: len(outer)] == outer


def _walk(
    section: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[tuple[str, ...], list[type[BaseModel]]]:
    """The keys on the way to pydantic's ``location``, and the sections that may stand there."""
    here: list[type[BaseModel]] = [section]
    keys: list[str] = []
    for part in location:
        fields = [f for s in here for name, f in s.model_fields.items() if part in (name, f.alias)]
        if fields or isinstance(part, int):
            keys.append(str(part))
            here = [s for f in fields for s in _sections_in(f.annotation)] if fields else here
        else:  # it names a branch of a union, which is no key
            here = [s for s in here if s.__name__ == part] or here
    return tuple(keys), here


def _sections_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [section for argument in arguments for section in _sections_in(argument)]
