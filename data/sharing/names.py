"""Names of models, files and records for other readers: nothing of this machine."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rekindle.data.hub.places import hub_place, is_hub

TAGS = ["rekindle", "knowledge-distillation"]
LICENCE = (
    "Nobody has yet stated the licence under which this may be used: it follows from the "
    "licences of {}. Put `license: …` into the block above before you share it."
)
# A path of this machine (/home/me/x, ~/x, ./x, ../x, C:\\x, C:/x, \\\\server\\x), or an address
# (s3://…, http://…).
_PLACE = re.compile(r"(?:~[\w-]*/|\.{1,2}/|/|[A-Za-z]:[\\/]|\\\\|[a-z][a-z0-9+.-]+:/{1,3})[^\n]+")


def is_place(text: str) -> bool:
    """Return whether ``text`` is a path that only this machine has, or an address not on a hub."""
    return bool(_PLACE.fullmatch(text)) and not is_hub(text)


def shown_model(model: str) -> str:
    """Return a model's name for a card: a hub id, or the last part of a local folder."""
    if is_hub(model):
        return hub_place(model).repo
    return last_part(model) if is_local(model) else model


def is_local(model: str) -> bool:
    """Return whether a model is a local folder."""
    return is_place(model) or Path(model).exists()


def last_part(place: str) -> str:
    """Return the last part of a path or an address."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def portable(value: Any) -> Any:
    """Return a JSON value with paths and addresses shortened to their last parts: all that begin
    with ``/``, ``~``, ``./``, a drive or a scheme. Includes the keys of objects.
    """
    if isinstance(value, str):
        return last_part(value) if is_place(value) else value
    if isinstance(value, Mapping):
        return {portable(key): portable(one) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [portable(one) for one in value]
    return value


def places_in(value: Any) -> list[str]:
    """Return all paths and addresses in a JSON value."""
    if isinstance(value, str):
        return [value] if is_place(value) else []
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = [*value, *value.values()]
    elif isinstance(value, Sequence):
        parts = [*value]
    return [place for part in parts for place in places_in(part)]
