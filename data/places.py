"""Places in files and on command lines: fill in ``~`` and ``$VARIABLES``.

A place is a path, or something used like one: a glob, a hub id, an address such as s3://…. Imports
no pydantic: the command line needs this module before anything is read.
"""

import glob
import os
import re
from pathlib import Path

from rekindle.data.errors import InputError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+([^/].*)")
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)


def expanded(place: str) -> str:
    """Return ``place`` with a leading ``~`` and every ``$NAME`` or ``${NAME}`` filled in.

    If something exists by the literal name with a ``$``, that is meant: older versions made such
    folders. Otherwise raises InputError for a variable that is not set or empty, and for an unknown
    user.
    """
    if "$" in place and os.path.lexists(os.path.expanduser(place)):
        return os.path.expanduser(place)

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if value_set := os.environ.get(name):
            return value_set
        state = "is not set" if value_set is None else "is empty"
        raise InputError(
            f"the environment variable {name} of {place!r} {state}; set it, write the path out, "
            "or, if that is its literal name, make that folder first"
        )

    try:
        home = os.path.expanduser(_VARIABLE.sub(value, place))
        if not home.startswith("~"):
            return home
        raise InputError(
            f"{place!r}: {home.partition('/')[0]!r} is not a user of this machine; write "
            f"./{place} for a file of that name"
        )
    except InputError:
        if os.path.lexists(place):
            return place
        raise


def address_of(path: Path) -> str | None:
    """Return the address (``s3://…``) that a path stands for; None for a local path.

    A command line turns addresses into paths, which merge two slashes into one. A folder of that
    literal name is meant if there is one.
    """
    match = _ADDRESS.fullmatch(str(path))
    if match is None or match[1] == "file" or os.path.lexists(f"{match[1]}:"):
        return None
    return f"{match[1]}://{match[2]}"


def same_place(one: object, other: object) -> bool:
    """Return whether two paths or globs, or lists of them, as written, mean the same files."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(same_place, one, other))
    if one == other or not isinstance(one, str) or not isinstance(other, str):
        return one == other
    try:
        first, second = map(expanded, (one, other))
        exists = first == second or glob.has_magic(first) or os.path.exists(first)
        return exists and Path(first).resolve() == Path(second).resolve()
    except (OSError, ValueError):  # not a path, or it has a variable that is not set here
        return False


def home() -> Path:
    """Return ``$REKINDLE_HOME``, or ``$XDG_CACHE_HOME/rekindle``, or ``~/.cache/rekindle``: where
    models that are made once are kept.
    """
    if own_folder := os.environ.get("REKINDLE_HOME"):
        path = Path(own_folder)
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rekindle"
    return Path(os.path.abspath(path.expanduser()))
