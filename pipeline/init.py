"""Recipes: commented run files, one per method, written by ``pipeline init``.

A recipe is just a YAML file in the folder ``recipes``. Its first comment line says what it is for;
the comment lines above its first key that begin with ``pipeline`` are the commands to run it. Reads
no configuration and imports nothing heavy.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.storage.atomic import write_bytes

FOLDER = Path(__file__).parent / "recipes"
RUN_FILE = "run.yaml"  # its name in the commands of a recipe


def recipes() -> dict[str, str]:
    """Return the purpose of every recipe, by name."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return {name: next(_head(_text(name)), "") for name in names}


def read_recipe(name: str) -> str:
    """Return the text of a recipe. Raise InputError for an unknown one, with the nearest name."""
    names = list(recipes())
    if name not in names:
        hint = did_you_mean(name, names)
        raise InputError(f"there is no recipe {name!r}{hint} (there are: {', '.join(names)})")
    return _text(name)


def write_recipe(name: str, out: Path) -> list[str]:
    """Write a recipe to a new file; return the commands that run it.

    Raise InputError for an unknown recipe, and for an existing file, which is left alone.
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
    """Return the commands at the top of a recipe, for a run file of this name."""
    lines = [line for line in _head(text) if line.startswith("pipeline ")]
    return [line.replace(RUN_FILE, shlex.quote(str(run_file))) for line in lines]


def _head(text: str) -> Iterator[str]:
    """Yield the comment lines at the top of a recipe."""
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").strip()


def _text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_bytes().decode()  # with its line ends unchanged
