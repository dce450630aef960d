"""Stage 1 in children that are stopped at any step, and the required content of the disk.

Children are forked from the warm test process, because importing torch takes seconds. A child's
file system operations are noted in a journal, so it can be stopped at any of them.
"""

import builtins
import json
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rekindle.data.cache import Cache
from rekindle.data.storage import atomic as atomic_module
from rekindle.data.storage import shards as shards_module
from rekindle.pipeline.caching import make_unit
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.processes import worker
from rekindle.pipeline.processes.units import OnThisMachine
from testlib.caches import committed
from testlib.command import pipeline
from testlib.processes import Child

Teachers = list[dict[str, Any]]
Act = Callable[[], None]

CORPUS = {"limit_sequences": 8}
ATTEMPT = re.compile(r"-[0-9a-f]{8}\.arrow")
TEMPORARY = re.compile(r"/\.(.*)\.[0-9a-f]{8}\.tmp")


def contents(cache: Path) -> dict[str, bytes]:
    """Return the bytes of every committed data file by unit, and of the files beside them."""
    found = committed(cache)
    for name in names(cache):
        if not re.search(r"/data/|/commits/|(^|/)\..*\.tmp$", name):
            found[name] = (cache / name).read_bytes()
    return found


def names(cache: Path) -> list[str]:
    """Return the names of all files, including half-written ones."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


def roles(cache: Path) -> Counter[str]:
    """Count the files by role, without what differs between two attempts."""
    return Counter(ATTEMPT.sub("", name) for name in names(cache))


def units(cache: Path) -> set[str]:
    """Return the committed units of teachers."""
    found = cache.glob("targets/**/commits/[0-9]*.json")
    return {str(p.relative_to(cache)) for p in found}


# --- the steps of the protocol --------------------------------------------------------------------


class Journal:
    """Records a process's steps on a cache, and calls ``act`` at one of them."""

    def __init__(
        self, path: Path, cache: Path, at: int | str | None = None, act: Act = lambda: None
    ):
        self.path, self.cache, self.at, self.act = path, cache, at, act
        self.count = -1
        self.acted = False

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def note(self, label: str) -> None:
        self.count += 1
        descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(descriptor, f"{label}\n".encode())
        os.close(descriptor)
        if self.at in (self.count, label) and not self.acted:
            self.acted = True
            self.act()

    def name(self, path: Any) -> str | None:
        """Return the role of a path of the cache, without what differs between two attempts."""
        text = os.fspath(path)
        if not text.startswith(f"{self.cache}/"):
            return None
        name = text.removeprefix(str(self.cache))
        return TEMPORARY.sub(r"/temporary \1", ATTEMPT.sub("", name))

    def around(self, step: str, call: Callable, path_of: Callable) -> Callable:
        def noted(*arguments: Any, **named: Any) -> Any:
            name = self.name(path_of(*arguments))
            if name is None:
                return call(*arguments, **named)
            self.note(f"before {step} {name}")
            result = call(*arguments, **named)
            self.note(f"after {step} {name}")
            return result

        return noted

    def open(self, path: Any, mode: str = "r", **named: Any) -> Any:
        name = self.name(path)
        if "x" not in mode or name is None:
            return builtins.open(path, mode, **named)
        return Halved(path, self, name)

    def follow(self) -> None:
        """Follow this process from now on, permanently."""
        os.link = self.around("link", os.link, lambda source, to: to)
        os.replace = self.around("replace", os.replace, lambda source, to: to)
        by_descriptor = lambda number: os.readlink(f"/proc/self/fd/{number}")  # noqa: E731
        os.fsync = self.around("sync", os.fsync, by_descriptor)
        Path.unlink = self.around("unlink", Path.unlink, lambda path, **_: path)
        atomic_module.open = shards_module.open = self.open
        original = make_unit.run_unit

        def run(*arguments: Any, **named: Any) -> Any:
            self.note(f"begun {arguments[0].info.name} {arguments[1].name}")
            result = original(*arguments, **named)
            self.note(f"computed {arguments[0].info.name} {arguments[1].name}")
            return result

        make_unit.run_unit = run


class Halved:
    """A new file; half of it is on the disk when the journal records the step."""

    def __init__(self, path: Path, journal: Journal, name: str):
        self.file = builtins.open(path, "xb")  # noqa: SIM115
        self.journal, self.name = journal, name

    def write(self, data: Any) -> None:
        content = bytes(data)
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.journal.note(f"within {self.name}")
        self.file.write(content[len(content) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Halved":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(config: Any, journal: Journal, **named: Any) -> Child:
    """Fork a process that makes the cache of ``config`` and records its steps."""

    def work() -> None:
        journal.follow()
        cache_teachers(config, **named)

    return Child(work)


def assert_finished(cache: Path, config: Any, whole: Path, journal: Journal | None = None) -> None:
    """Check that the same command makes the rest, and leaves the cache of an uninterrupted run."""
    there = units(cache)
    planned = len(units(whole))
    done = cache_teachers(config)
    assert (done.units_done, done.units_present) == (planned - len(there), len(there))
    assert contents(cache) == contents(whole)
    report = verify_cache(str(cache))
    assert report.problems == []
    left = [n for n, count in (roles(cache) - roles(whole)).items() for _ in range(count)]
    assert report.orphans == sum("/data/" in name for name in left)
    collected(cache, len(left))
    assert roles(cache) == roles(whole)
    assert verify_cache(str(cache)).problems == []
    Cache.open(cache).example(0)


def collected(cache: Path, count: int) -> None:
    """Check that ``pipeline gc`` removes ``count`` files."""
    before = set(names(cache))
    result = pipeline("gc", cache, "--older-than", 0, "--json")
    removed = set(json.loads(result.stdout)["removed"])
    gone = before - set(names(cache))
    assert removed == gone
    hidden = [name for name in names(cache) if "/." in f"/{name}"]
    assert len(gone) == count, f"left over: {hidden}"


def killed_at(step: int | str, cache: Path, config: Any, folder: Path) -> Journal:
    """Run until the process kills itself at that step."""
    journal = Journal(folder / f"journal-{step}".replace("/", "_"), cache, step, die)
    child = forked(config, journal)
    assert child.wait() == -signal.SIGKILL, child.errors
    return journal


def assert_goes_on(step: int | str, config: Any, whole: Path, folder: Path) -> None:
    """Kill it at that step; check that almost nothing is lost and the same command makes
    the rest.
    """
    cache = Path(config.cache.path)
    journal = killed_at(step, cache, config, folder)
    assert_little_lost(journal, cache)
    assert_finished(cache, config, whole)


def assert_little_lost(journal: Journal, cache: Path, workers: int = 1) -> None:
    """Check that all computed units are committed, except at most one per worker."""
    computed = sum(line.startswith("computed") for line in journal.lines())
    assert computed - len(units(cache)) <= workers


# --- several processes ----------------------------------------------------------------------------


def slow(journal: Journal, seconds: float) -> None:
    """Make each unit take ``seconds``, so that others run in between."""
    original = make_unit.run_unit

    def run(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **named)

    make_unit.run_unit = run
    journal.follow()


def fork_workers() -> None:
    """Fork worker processes from this one, because a server needs seconds for its imports."""
    context = multiprocessing.get_context("fork")
    ours = vars(multiprocessing) | {"get_context": lambda method: context}
    worker.multiprocessing = SimpleNamespace(**ours)


def with_workers(config: Any, journal: Journal, seconds: float = 0.05) -> Child:
    def work() -> None:
        fork_workers()
        slow(journal, seconds)
        cache_teachers(config, executor=OnThisMachine(2))

    return Child(work)
