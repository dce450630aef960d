"""Chooses the positive one of a task's two classes, for its F1."""

import re
from collections.abc import Mapping, Sequence

from rekindle.data.errors import InputError
from rekindle.train.finetune.labels import SHOWN, Raw, read_label

_POSITIVE: Mapping[str, tuple[str, ...]] = {
    "1": ("0", "-1"),
    "true": ("false",),
    "yes": ("no",),
    "positive": ("negative",),
    "pos": ("neg",),
}


def positive_class(names: Sequence[str], requested: Raw | None) -> str | None:
    """Return the class for F1: ``requested``, or that of two which means yes.

    1 beside 0 or −1, true, yes, positive and pos beside their opposites, x beside not_x; None if
    neither means yes. Raises InputError for ``requested`` outside the two classes.
    """
    if requested is not None:
        text = str(requested).strip()
        name = text if text in names else _read_name(requested)
        if len(names) != 2 or name not in names:
            raise InputError(
                f"positive is {name!r}, but the labels are "
                f"{', '.join(names[:SHOWN]) or 'scores'}; "
                "name one of two classes (the F1 of more classes is their mean)"
            )
        return name
    if len(names) != 2:
        return None
    for name, other in (names, names[::-1]):
        yes, no = (_read_name(one).casefold() for one in (name, other))
        if no in _POSITIVE.get(yes, ()) or re.sub("[ _-]", "", no) in (f"not{yes}", f"non{yes}"):
            return name
    return None


def _read_name(raw: Raw) -> str:
    try:
        return read_label(raw).name
    except ValueError:  # a class as it is written, or none
        return str(raw)
