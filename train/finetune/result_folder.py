"""The directory that fine-tuning writes its result into, and replaces when it is its own."""

import json
from collections.abc import Mapping
from pathlib import Path

from rekindle.data.errors import InputError

WRITER = "rekindle finetune"  # marks a directory that this command may replace


def write_json(path: Path, content: Mapping[str, object]) -> None:
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
