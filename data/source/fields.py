"""The fields of a record, which may be inside others: ``meta.text``. Formats are unknown here."""

from collections.abc import Mapping

ABSENT = object()


def reach(values: Mapping[str, object], field: str) -> object:
    """Return the value of a field that may be inside others; ABSENT if there is none."""
    if field in values:
        return values[field]
    for dot in range(len(field) - 1, 0, -1):  # `a.b.c`: `a.b` -> `c`, then `a` -> `b.c`
        outer = values.get(field[:dot]) if field[dot] == "." else None
        if isinstance(outer, Mapping):
            found = reach(outer, field[dot + 1 :])
            if found is not ABSENT:
                return found
    return ABSENT
