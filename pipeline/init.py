"""The recipes: commented run files, one per method, that ``pipeline init`` hands out.

A recipe is a YAML file in the folder ``recipes`` and nothing else: its first comment line says what
it is for, and the comment lines above its first key that begin with ``pipeline`` are the commands
to run it. Reads no configuration and imports nothing heavy.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.storage.atomic import write_bytes

FOLDER = Path(__file__).parent / "recipes"
RUN_FILE = "run.yaml"  # what the commands in a recipe call it


def recipes() -> dict[str, str]:
    """The purpose of every recipe, by name."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return {name: next(_head(_text(name)), "") for name in names}


def read_recipe(name: str) -> str:
    """The text of a recipe. Raises InputError for an unknown one, with the nearest name."""
    known = list(recipes())
    if name not in known:
        hint = did_you_mean(name, known)
        raise InputError(f"there is no recipe {name!r}{hint} (there are: {', '.join(known)})")
    return _text(name)


def write_recipe(name: str, out: Path) -> list[str]:
    """Write a recipe to a new file; returns the commands that run it.

    Raises InputError for an unknown recipe, and for a file that exists: it is left as it is.
    """
    text = read_recipe(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_bytes(out, text.encode(), publish=os.link)
    except FileExistsError:
        raise InputError(
            f"{out} exists and is left as it is; give another --out, or remove it"
        ) from None
    return commands(text, out)


def commands(text: str, run_file: Path) -> list[str]:
    """The commands of a recipe's head, for a run file of this name."""
    found = [line for line in _head(text) if line.startswith("pipeline ")]
    return [line.replace(RUN_FILE, shlex.quote(str(run_file))) for line in found]


def _head(text: str) -> Iterator[str]:
    """The comment lines a recipe begins with."""
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").strip()


def _text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_bytes().decode()  # the ends of its lines as they are
