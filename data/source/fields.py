"""The fields of a record, which may be inside others: ``meta.text``. Formats are unknown here."""

from collections.abc import Mapping

ABSENT = object()


def reach(values: Mapping[str, object], field: str) -> object:
    """Return the value of a field that may be inside others; ABSENT if there is none."""
    if field in values:
        return values[field]
    for at in range(len(field) - 1, 0, -1):  # the longest existing name contains the rest
        inside = values.get(field[:at]) if field[at] == "." else None
        if isinstance(inside, Mapping):
            found = reach(inside, field[at + 1 :])
            if found is not ABSENT:
                return found
    return ABSENT
