"""A row of the table of bad input, and the folder in which its command runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml


@dataclass(frozen=True)
class Place:
    """The folder of one row: run.yaml, text, labels, models, a cache and a run, to be damaged."""

    root: Path
    patch: pytest.MonkeyPatch

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def write(self, name: str, content: str | bytes) -> None:
        """Write a whole file, with its folder."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def rows(self, name: str, *rows: object) -> None:
        """Write a file of JSON lines."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def change(self, name: str, **values: Any) -> None:
        """Change keys of a JSON or YAML mapping file; a value of ... removes the key."""
        path = self.root / name
        read = json.loads if path.suffix == ".json" else yaml.safe_load
        found = read(path.read_text()) | values
        found = {key: value for key, value in found.items() if value is not ...}
        path.write_text(json.dumps(found))  # JSON is YAML as well

    def drop(self, name: str) -> None:
        """Remove a file or a folder."""
        path = self.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def cut(self, pattern: str, share: float = 0.5) -> None:
        """Keep the first ``share`` of the file that matches a pattern (of several, the first)."""
        path = min(self.root.glob(pattern))
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])


@dataclass(frozen=True)
class Bad:
    """One bad input: what was ``done``, the command line ``typed``, and the expected message.

    ``thing``, ``rule`` and ``way`` out are parts of the message: what is wrong, the rule, what to
    do (no ``way`` if the rule says what is allowed). ``spoil`` does what ``done`` describes.
    ``kept``: what may be written all the same, as work that a later run continues. ``loads``:
    whether the weights of a model must be read to notice.
    """

    done: str
    typed: str
    thing: str
    rule: str
    way: str = ""
    spoil: Callable[[Place], object] = lambda place: None
    code: int = 2
    kept: str = ""
    loads: bool = False

    def keeps(self, name: str) -> bool:
        """Return whether the path ``name`` below the test's folder may have been written."""
        return bool(self.kept) and f"{name}/".startswith(f"here/{self.kept}/")
