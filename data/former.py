"""Read configurations recorded by older versions in terms of this one."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic_core import to_jsonable_python

from rekindle.data.errors import InputError
from rekindle.data.settings import Settings, parse_settings, sections_in

log = logging.getLogger("rekindle")

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Formerly:
    """Marks a key whose default used to be ``value``: work begun with that default keeps it."""

    value: object


def with_defaults(section: type[Settings], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded section with the defaults of younger keys, as in JSON.

    What this version would refuse, or does not know, is unchanged.
    """
    try:
        return parse_settings(section, recorded).model_dump(mode="json", by_alias=True)
    except InputError:
        found = dict(recorded)
    for name, field in section.model_fields.items():
        key, inside = field.alias or name, sections_in(field.annotation)
        if key not in found and not field.is_required():
            default = field.get_default(call_default_factory=True, validated_data=found)
            found[key] = to_jsonable_python(default, by_alias=True)
        elif len(inside) == 1:
            found[key] = _each(inside[0], found.get(key))
    return found


def with_every_key(section: type[Settings], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded section with null for each key that is recorded only if set."""
    keys = (field.alias or name for name, field in section.model_fields.items())
    return dict.fromkeys(keys) | dict(recorded)


def _each(section: type[Settings], value: object) -> object:
    """Apply ``with_defaults`` to a section, or each one of a list; other values are unchanged."""
    if isinstance(value, list):
        return [_each(section, one) for one in value]
    return with_defaults(section, value) if isinstance(value, Mapping) else value


def as_begun(config: S, recorded: Mapping[str, Any], where: str = "", say: bool = True) -> S:
    """Return ``config`` with the former default of every key that it does not give, if that default
    is ``recorded``; ``say`` so in a line each. ``where``: the section's own key, for the line.
    """
    changed: dict[str, object] = {}
    for name, field in type(config).model_fields.items():
        key, value = field.alias or name, getattr(config, name)
        path, there = f"{where}{key}", recorded.get(key)
        if isinstance(value, Settings) and isinstance(there, Mapping):
            begun = as_begun(value, there, f"{path}.", say)
            changed |= {} if begun is value else {name: begun}
        given = name in config.model_fields_set
        for mark in [] if given else field.metadata:
            if isinstance(mark, Formerly) and there == mark.value != value:
                changed[name] = there
                if say:
                    log.info(
                        "%s is not given: %s is used, as when it was begun (now %s)",
                        path,
                        there,
                        value,
                    )
    return config.model_copy(update=changed) if changed else config
