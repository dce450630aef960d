"""Whether a model's name can be an id on a hub, and the error for one that can only be a path."""

import re
from contextlib import suppress
from pathlib import Path

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.hub.places import HUB

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WAY_OUT = "give a directory written by save_pretrained, or an id that is on the hub"


def may_be_hub_id(name: str) -> bool:
    """Return whether ``name`` may be an id on the hub: NAME or OWNER/NAME, where nothing of that
    name, and no folder OWNER, is here.
    """
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists() and not _owner(name)


def no_such_model(name: str) -> InputError:
    """Return the error for a model's ``name`` that is no directory and cannot be a hub id."""
    path = Path(name).expanduser()
    if path.is_file():
        return InputError(f"model {name!r}: is a file; {_WAY_OUT}")
    why, way_out = "and not a hub id", _WAY_OUT
    if owner := _owner(name):
        why += f", because a folder {owner} is here"
        way_out += f" (as {HUB}{name})"
    return InputError(f"model {name!r}: no such directory ({why}); {way_out}{_nearest_path(path)}")


def _owner(name: str) -> str:
    """Return OWNER of OWNER/NAME if a folder of that name is here; else an empty string."""
    owner, slash, _ = name.partition("/")
    return owner if slash and _HUB_ID.fullmatch(name) and Path(owner).is_dir() else ""


def _nearest_path(path: Path) -> str:
    """Return the end of the message: the entry like the first part of ``path`` that is missing."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    with suppress(OSError):  # a folder that may not be read
        names = {one.name for one in missing.parent.iterdir()} - {missing.name}
        prefix = str(missing).removesuffix(missing.name)
        return did_you_mean(missing.name, sorted(names), prefix)
    return ""
