"""Places as people write them, in files and on command lines: ``~`` and ``$VARIABLES`` filled in.

A place is a path, or something that may stand for one: a glob, a hub id, an address such as s3://….
"""

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from rekindle.data.errors import InputError

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)


def expanded(place: str) -> str:
    """Return ``place`` with a leading ``~`` and every ``$NAME`` or ``${NAME}`` filled in.

    Raises InputError for a variable that is not set, or empty, and for a user that is not there:
    a folder of that very name is never meant, unless it is there.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if told := os.environ.get(name):
            return told
        state = "is not set" if told is None else "is empty"
        raise InputError(
            f"the environment variable {name} of {place!r} {state}; set it, or write the path out"
        )

    try:
        home = os.path.expanduser(_VARIABLE.sub(value, place))
        if not home.startswith("~"):
            return home
        raise InputError(
            f"{place!r}: {home.partition('/')[0]!r} is no user of this machine; write ./{place} "
            "for a file of that name"
        )
    except InputError:
        if os.path.lexists(place):
            return place
        raise


Place = Annotated[str, AfterValidator(expanded)]  # of a configuration
