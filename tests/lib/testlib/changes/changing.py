"""Change a cache's teachers, and compare the caches before and after."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.data.cache import Cache
from rekindle.data.changes.carry_out import change_teacher
from rekindle.data.storage.store import LocalStore, open_store
from testlib.caches import examples
from testlib.killing import ATTEMPT
from testlib.processes import Child

Asked = tuple[str, ...]  # action, teacher, argument
WRITES = ("create", "replace", "finish", "discard", "remove_folder")


def change(cache: Path | str, asked: Asked) -> bool:
    return change_teacher(open_store(cache), *asked)  # type: ignore[arg-type]


def said(cache: Path | str) -> dict[str, list[Any]]:
    """Return all targets of each teacher, for every sequence."""
    found: dict[str, list[Any]] = {}
    for example in examples(Cache.open(cache)):
        for name, targets in example.targets.items():
            found.setdefault(name, []).extend(vars(target) for target in targets)
    return found


def same(one: Any, other: Any) -> bool:
    """Return whether both are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    numbers = getattr(one, "dtype", None) is not None and one.dtype.kind == "f"
    return bool(np.array_equal(one, other, equal_nan=numbers))  # NaN: an unknown scalar


def listed(cache: Path) -> list[str]:
    """List all files and folders, including hidden ones, without what differs between attempts."""
    return sorted(ATTEMPT.sub(".arrow", str(p.relative_to(cache))) for p in cache.rglob("*"))


def _counted(at: int | None, kind: type = LocalStore) -> list[str]:
    """Record each write to the disk in this process from now on; die before number ``at``."""
    done: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **named: Any) -> Any:
            if len(done) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(name)
            return call(*arguments, **named)

        return write

    for name in WRITES:
        setattr(kind, name, noted(name, getattr(kind, name)))
    return done


def killed_before(cache: Path | str, asked: Asked, at: int, kind: type = LocalStore) -> None:
    """Change the cache in a process that is killed before write number ``at``."""

    def work() -> None:
        _counted(at, kind)
        change(cache, asked)

    child = Child(work)
    assert child.wait() == -signal.SIGKILL, child.errors


def writes_of(cache: Path, asked: Asked, folder: Path) -> list[str]:
    """Return the writes of an uninterrupted change in order, made on a copy."""
    shutil.copytree(cache, folder / "counted")
    notes = folder / "writes"

    def work() -> None:
        done = _counted(None)
        change(folder / "counted", asked)
        notes.write_text("\n".join(done))

    child = Child(work)
    assert child.wait() == 0, child.errors
    return notes.read_text().split("\n")
