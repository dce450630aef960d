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
class FormerDefault:
    """Marks a key whose default used to be ``value``: work begun with that default keeps it."""

    value: object


def with_defaults(section: type[Settings], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded section with the defaults of younger keys, as in JSON.

    What this version would refuse, or does not know, is unchanged.
    """
    try:
        return parse_settings(section, recorded).model_dump(mode="json", by_alias=True)
    except InputError:
        values = dict(recorded)
    for name, field in section.model_fields.items():
        key, sections = field.alias or name, sections_in(field.annotation)
        if key not in values and not field.is_required():
            default = field.get_default(call_default_factory=True, validated_data=values)
            values[key] = to_jsonable_python(default, by_alias=True)
        elif len(sections) == 1:
            values[key] = _each(sections[0], values.get(key))
    return values


def with_every_key(section: type[Settings], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded section with null for each key that is recorded only if set."""
    keys = (field.alias or name for name, field in section.model_fields.items())
    return dict.fromkeys(keys) | dict(recorded)


def _each(section: type[Settings], value: object) -> object:
    """Apply ``with_defaults`` to a section, or each one of a list; other values are unchanged."""
    if isinstance(value, list):
        return [_each(section, one) for one in value]
    return with_defaults(section, value) if isinstance(value, Mapping) else value


def with_recorded_defaults(
    config: S, recorded: Mapping[str, Any], prefix: str = "", log_changes: bool = True
) -> S:
    """Return ``config`` with the former default of every key that it does not give, if that default
    is ``recorded``; with ``log_changes`` a line says so of each. ``prefix``: the section's own key,
    for the line.
    """
    changed: dict[str, object] = {}
    for name, field in type(config).model_fields.items():
        key, value = field.alias or name, getattr(config, name)
        path, recorded_value = f"{prefix}{key}", recorded.get(key)
        if isinstance(value, Settings) and isinstance(recorded_value, Mapping):
            section = with_recorded_defaults(value, recorded_value, f"{path}.", log_changes)
            changed |= {} if section is value else {name: section}
        is_given = name in config.model_fields_set
        for mark in [] if is_given else field.metadata:
            if isinstance(mark, FormerDefault) and recorded_value == mark.value != value:
                changed[name] = recorded_value
                if log_changes:
                    log.info(
                        "%s is not given: %s is used, as when it was begun (now %s)",
                        path,
                        recorded_value,
                        value,
                    )
    return config.model_copy(update=changed) if changed else config
