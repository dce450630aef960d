"""The directory that a command writes its result into: it appears whole or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rekindle.data.errors import InputError

WRITER = "rekindle finetune"  # marks a directory that this command may replace


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON; ValueError for a number that is not finite."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def check_out(out: Path) -> None:
    """Raise InputError where ``out`` is something that must not be replaced."""
    if not out.exists() or (out.is_dir() and (not any(out.iterdir()) or _is_earlier_result(out))):
        return
    raise InputError(
        f"{str(out)!r} exists and is not a result of this command; it is left as it is: give "
        "another directory, or remove it"
    )


def _is_earlier_result(out: Path) -> bool:
    try:
        return bool(json.loads((out / "metrics.json").read_text())["written_by"] == WRITER)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that takes its place at the end, or vanishes on any exception."""
    out = out.resolve()
    name = f".{out.name}.{uuid.uuid4().hex[:8]}"
    staging, replaced = out.parent / f"{name}.new", out.parent / f"{name}.old"
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            out.rename(replaced)
        staging.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
