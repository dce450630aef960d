"""Walks over the plain values of a configuration: dictionaries and lists within each other."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def strings_in(value: object) -> Iterator[str]:
    """Yield every string among the values (not the keys), in the order in which they stand."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inside in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(inside)


def with_strings(value: Any, change: Callable[[str], str], leave: str | None = None) -> Any:
    """Return a copy with ``change`` applied to every string; values of the key ``leave`` stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k == leave else with_strings(v, change, leave) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [with_strings(inside, change, leave) for inside in value]
    return value
