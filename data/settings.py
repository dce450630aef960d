"""The base of every configuration section: typed, frozen, strict about its keys.

Each section is defined beside the code that owns it; none is known here.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.key_names import keys_with_alias
from rekindle.data.places import expanded

S = TypeVar("S", bound="Settings")
T = TypeVar("T")


def _check_named(place: str) -> str:
    """Return the place; raise ValueError if it is empty, which would mean the current folder."""
    if not place.strip() or "\0" in place:
        raise ValueError("must name a file, a folder or an id; give one, or leave the key out")
    return expanded(place)


Place = Annotated[str, AfterValidator(_check_named)]  # in a configuration
PlaceOrNone = Annotated[
    str, AfterValidator(lambda place: place and _check_named(place))
]  # "": left out


def as_list(value: object) -> object:
    """Return a single text as a list of one; other values unchanged."""
    return [value] if isinstance(value, str) else value


# A list of names; a single one may be given alone.
Names = Annotated[
    tuple[str, ...], BeforeValidator(as_list, json_schema_input_type=str | tuple[str, ...])
]


GGUF_FILE = "the llama.cpp (GGUF) file in `model`; `model: PLACE/FILE.gguf` means the same"


def with_gguf_file(values: object) -> object:
    """Return a section's values with its ``gguf_file`` joined to its ``model``."""
    if not isinstance(values, dict) or values.get("gguf_file") is None:
        return values
    model, file = values.get("model"), values["gguf_file"]
    if not isinstance(model, str) or not isinstance(file, str):
        return values  # pydantic says which of them is not text
    if not file.lower().endswith(".gguf") or "/" in file:
        raise ValueError(f"gguf_file {file!r}: give the name of a file in model that ends in .gguf")
    others = {name: value for name, value in values.items() if name != "gguf_file"}
    return others | {"model": f"{model.rstrip('/')}/{file}"}


@dataclass(frozen=True)
class MayChange:
    """Marks a key that may differ when work is resumed: it decides how the work is done, not its
    result. ``unless`` names a property of its section: while that is true, the key may not differ.
    """

    unless: str = ""


Changeable = Annotated[T, MayChange()]  # a key of that kind: ``threads: Free[int]``


class Settings(BaseModel):
    """A section of the configuration: immutable, and an unknown key is an error.

    Numbers must be finite, fit 64 bits, and not be booleans. A section, list or mapping without
    content (``train:`` with every line below it commented out) is empty, unless a number may stand
    in its place (``weight:``), which may have been forgotten.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _normalise(cls, value: object, info: ValidationInfo) -> object:
        choices = _choices(cls.model_fields[info.field_name or ""].annotation)
        if value is None and not choices & {NoneType, object, Any, int, float, bool, str}:
            return next((empty for kind, empty in _EMPTY if kind in _kinds(choices)), None)
        _check_numbers(value, choices)
        return value


_LARGEST = 2**63 - 1
_EMPTY: tuple[tuple[type, object], ...] = ((BaseModel, {}), (dict, {}), (tuple, ()))


def _choices(annotation: Any) -> set[Any]:
    """Return the types that a value may have, the members of a union separately."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _choices(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {choice for one in get_args(annotation) for choice in _choices(one)}
    return {annotation}


def _kinds(choices: set[Any]) -> set[Any]:
    kinds = {get_origin(choice) or choice for choice in choices}
    sections = {
        BaseModel for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)
    }
    return kinds | sections


def _check_numbers(value: object, choices: set[Any]) -> None:
    """Raise ValueError for a boolean in place of a number, and for a number too large."""
    if isinstance(value, list | tuple):
        inner = {c for one in choices for part in get_args(one) for c in _choices(part)}
        for item in value:
            _check_numbers(item, inner)
    elif isinstance(value, bool):
        if choices & {int, float} and not choices & {bool, object, Any}:
            raise ValueError("must be a number, not true or false")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"a number must lie between -{_LARGEST} and {_LARGEST} (2^63 - 1)")


def changeable_keys(section: Settings) -> Iterator[str]:
    """Yield the dotted keys of ``section`` that may differ when work is resumed."""
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        marks = [mark for mark in field.metadata if isinstance(mark, MayChange)]
        if any(not mark.unless or not getattr(section, mark.unless) for mark in marks):
            yield key
        items = value if isinstance(value, tuple) else ()
        values = {key: value} | {f"{key}.{number}": one for number, one in enumerate(items)}
        for prefix, one in values.items():
            if isinstance(one, Settings):
                yield from (f"{prefix}.{below}" for below in changeable_keys(one))


def parse_settings(section: type[S], values: object, label: str = "") -> S:
    """Validate ``values`` (a mapping) into ``section``.

    Raises InputError with one line per problem: the key's full path, the rule it breaks, and for an
    unknown key the nearest known one. ``label`` (such as a file's name) is put before the lines.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = [
            _problem(section, found)
            for found in error.errors()
            if found["type"] != "default_factory_not_called"  # a consequence of another problem
        ]
        # A value that may be a number or a section fails as both; the problem inside it says more.
        innermost = [p for p in problems if not any(_is_inside(o.keys, p.keys) for o in problems)]
        lead = f"{label}: " if label else ""
        raise InputError(lead + "; ".join(_messages(innermost))) from None


# Replaces messages that name pydantic's or Python's classes.
_RULES = {
    "model_type": "must be a section: lines of `key: value` below it",
    "dict_type": "must be a mapping: lines of `key: value` below it",
    "tuple_type": "must be a list",
    "string_type": "must be text; put quotes around text that looks like a number or true",
    "too_short": "must have at least 1 item",  # no section asks for more
    "missing": "is missing",
}


def _show_given(given: object) -> str:
    if given is None:
        return "nothing; give a value, or leave the key out"
    text = repr(given)
    return text if len(text) <= 200 else f"{text[:200]}…"


class _Problem(NamedTuple):
    keys: tuple[str, ...]
    lead: str  # the beginning of a message
    rule: str
    given: str = ""


def _messages(problems: Iterable[_Problem]) -> Iterator[str]:
    """Yield one message per problem; a single one for a value that breaks the rules of several
    types.
    """
    rules_by_value: dict[tuple[str, str], list[str]] = {}
    for one in problems:
        rules_by_value.setdefault((one.lead, one.given), []).append(one.rule)
    for (lead, given), rules in rules_by_value.items():
        first, *others = dict.fromkeys(rules)
        others_short = [rule.removeprefix("Input should be ") for rule in others]
        yield f"{lead}{', or '.join([first, *others_short])}{given}"


def _problem(section: type[BaseModel], found: ErrorDetails) -> _Problem:
    unknown = found["type"] == "extra_forbidden"
    keys, sections = _walk(section, found["loc"][:-1] if unknown else found["loc"])
    if not unknown:
        given = found.get("input")
        null = "; null means none" * _means_null(section, found)
        is_long = isinstance(given, dict | list | tuple)
        shown = "" if is_long else f" (given: {_show_given(given)}{null})"
        rule = _RULES.get(found["type"]) or found["msg"].removeprefix("Value error, ")
        if found["type"] == "missing":
            rule += _description_of(section, found)
        return _Problem(keys, f"{'.'.join(keys) or 'the configuration'}: ", rule, shown)
    keys += (str(found["loc"][-1]),)
    known = sorted({key for section in sections for key in _fields(section)})
    lead = f"unknown key {'.'.join(keys)!r}{_suggest_key(keys[-1], known, sections)}"
    return _Problem(keys, lead, f" (known here: {', '.join(known)})")


def _description_of(section: type[BaseModel], found: ErrorDetails) -> str:
    """Return a key's description, in brackets."""
    *parents, name = found["loc"]
    fields = [_fields(inside).get(str(name)) for inside in _walk(section, tuple(parents))[1]]
    descriptions = [one.description for one in fields if one is not None and one.description]
    return f" ({descriptions[0]})" if descriptions else ""


def _means_null(section: type[BaseModel], found: ErrorDetails) -> bool:
    """Return whether ``none`` is given where null is allowed."""
    if str(found.get("input")).strip().casefold() != "none":
        return False
    for end, part in reversed([*enumerate(found["loc"])]):
        fields = [
            _fields(inside).get(str(part)) for inside in _walk(section, found["loc"][:end])[1]
        ]
        if any(fields):
            return any(NoneType in _choices(field.annotation) for field in fields if field)
    return False


def _suggest_key(name: str, known: list[str], sections: list[type[BaseModel]]) -> str:
    """Return the end of a message about an unknown key: its name here, where it belongs, or the
    nearest one.
    """
    if own_names := keys_with_alias(name, known):
        return f"; it is called {' or '.join(map(repr, own_names))} here"
    if nested := [key for section in sections for key in keys_called(section, name)]:
        return f"; did you mean {' or '.join(map(repr, nested))}?"
    return did_you_mean(name, known)


def keys_called(section: type[BaseModel], name: str) -> list[str]:
    """Return the dotted keys of ``section`` that are called ``name``, or called so by other
    libraries: the least deep ones. For a list, the key in its first item.
    """
    plain = name.replace("-", "_")
    exact, others = ({plain}.intersection, partial(keys_with_alias, plain))
    return _shallowest(section, exact) or _shallowest(section, others)


def _shallowest(
    section: type[BaseModel], choose: Callable[[Collection[str]], Iterable[str]]
) -> list[str]:
    level: list[tuple[str, type[BaseModel]]] = [("", section)]
    seen: set[type[BaseModel]] = set()
    while level:
        if keys := [path + key for path, one in level for key in choose(_fields(one))]:
            return list(dict.fromkeys(keys))
        seen |= {one for _, one in level}
        level = [
            (f"{path}{key}." + "0." * (tuple in _kinds(_choices(field.annotation))), inner)
            for path, one in level
            for key, field in _fields(one).items()
            for inner in sections_in(field.annotation)
            if inner not in seen
        ]
    return []


def _fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields by the keys that users write."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _is_inside(keys: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    return len(keys) > len(outer) and keys[: len(outer)] == outer


def _walk(
    section: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[tuple[str, ...], list[type[BaseModel]]]:
    """Return the keys on the way to pydantic's ``location``, and the sections possible there."""
    sections: list[type[BaseModel]] = [section]
    keys: list[str] = []
    for part in location:
        fields = [
            f for s in sections for name, f in s.model_fields.items() if part in (name, f.alias)
        ]
        if fields or isinstance(part, int):
            keys.append(str(part))
            if fields:
                sections = [s for f in fields for s in sections_in(f.annotation)]
        else:  # it names a member of a union, which is not a key
            sections = [s for s in sections if s.__name__ == part] or sections
    return tuple(keys), sections


def sections_in(annotation: object) -> list[type[Any]]:
    """Return the sections that a value of this type may be, or hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [section for argument in arguments for section in sections_in(argument)]
