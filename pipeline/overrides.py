"""Apply ``--set key.path=value`` to the plain values of a configuration."""

from typing import Any

from rekindle.data.errors import InputError, did_you_mean
from rekindle.pipeline.yaml_text import parse_yaml
from rekindle.train.step_config import LENGTHS


def set_value(values: dict[str, object], override: str) -> None:
    """Apply one ``a.b.0.c=value`` to nested dictionaries and lists, in place."""
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise InputError(f"--set takes key.path=value, got {override!r}")
    put_value(values, path, parse_yaml(text, f"--set {path}"))


def put_value(values: dict[str, object], path: str, value: object) -> None:
    """Set the value at the dotted ``path``, in place; list items are chosen by number or name."""
    container: Any = values
    *parents, last_part = path.strip().split(".")
    for part in parents:
        key = _key(container, part, path)
        if container[key] is None:
            container[key] = {}
        container = container[key]
    container[_key(container, last_part, path)] = value
    if parents[-1:] == ["train"] and last_part in LENGTHS and value is not None:
        for other in LENGTHS:  # a length replaces another one
            if other != last_part:
                container.pop(other, None)


def _key(container: object, part: str, path: str) -> str | int:
    """Return the key that ``part`` of an override's path selects in ``container``; a mapping gets a
    new key.
    """
    if isinstance(container, list):
        return _index(container, part, path)
    if not isinstance(container, dict):
        raise InputError(f"--set {path}: {part!r} is below a plain value, {container!r}")
    container.setdefault(part, None)
    return part


def _index(items: list, part: str, path: str) -> int:
    """Return the index of a list item, given as a number or as the item's ``name``."""
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    hint = did_you_mean(part, [str(name) for name in names if name])
    choices = ", ".join([f"0 to {len(items) - 1}"] * bool(items) + [str(n) for n in names if n])
    raise InputError(
        f"--set {path}: {part!r} is not an item of a list of {len(items)}{hint} (there are: "
        f"{choices})"
        if items
        else f"--set {path}: {part!r} is not an item of an empty list; set the whole list"
    )
