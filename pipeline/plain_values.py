"""Walk plain values (nested dictionaries and lists) and prepare them for JSON."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


def values_in(value: object) -> Iterator[object]:
    """Yield the value and all values inside it, without keys, in order."""
    yield value
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from values_in(item)


def strings_in(value: object) -> Iterator[str]:
    """Yield every string among the values."""
    return (item for item in values_in(value) if isinstance(item, str))


def with_strings(value: Any, change: Callable[[str], str], leave: str | None = None) -> Any:
    """Return a copy with ``change`` applied to every string; values of the key ``leave`` stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k == leave else with_strings(v, change, leave) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [with_strings(item, change, leave) for item in value]
    return value


def for_json(value: object) -> object:
    """Return a copy for JSON: arrays become lists, and numbers that are not finite become null."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
