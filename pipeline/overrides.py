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
    here: Any = values
    *above, last = path.strip().split(".")
    for part in above:
        key = _key(here, part, path)
        if here[key] is None:
            here[key] = {}
        here = here[key]
    here[_key(here, last, path)] = value
    if above[-1:] == ["train"] and last in LENGTHS and value is not None:
        for other in LENGTHS:  # a length replaces another one
            if other != last:
                here.pop(other, None)


def _key(here: object, part: str, path: str) -> str | int:
    """Return the key that ``part`` of an override's path selects in ``here``; a mapping gets a new
    key.
    """
    if isinstance(here, list):
        return _index(here, part, path)
    if not isinstance(here, dict):
        raise InputError(f"--set {path}: {part!r} is below a plain value, {here!r}")
    here.setdefault(part, None)
    return part


def _index(here: list, part: str, path: str) -> int:
    """Return the index of a list item, given as a number or as the item's ``name``."""
    if part.isdecimal() and int(part) < len(here):
        return int(part)
    names = [item.get("name") if isinstance(item, dict) else None for item in here]
    if part in names:
        return names.index(part)
    hint = did_you_mean(part, [str(name) for name in names if name])
    given = ", ".join([f"0 to {len(here) - 1}"] * bool(here) + [str(n) for n in names if n])
    raise InputError(
        f"--set {path}: {part!r} is not an item of a list of {len(here)}{hint} (there are: {given})"
        if here
        else f"--set {path}: {part!r} is not an item of an empty list; set the whole list"
    )
