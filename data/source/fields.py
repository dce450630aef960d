"""The fields of a record, which may lie inside others: ``meta.text``. Knows no format."""

from collections.abc import Mapping

ABSENT = object()


def reach(values: Mapping[str, object], field: str) -> object:
    """The value of a field that may be inside others; ABSENT where there is none."""
    if field in values:
        return values[field]
    for at in range(len(field) - 1, 0, -1):  # the longest name that is there holds the rest
        inside = values.get(field[:at]) if field[at] == "." else None
        if isinstance(inside, Mapping):
            found = reach(inside, field[at + 1 :])
            if found is not ABSENT:
                return found
    return ABSENT
