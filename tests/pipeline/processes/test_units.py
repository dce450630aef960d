"""Units: done once each, by processes that load what they need once; errors end all."""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from types import ModuleType

import pytest

from rekindle.data.corpus.in_order import BATCHES_AHEAD_PER_THREAD
from rekindle.data.errors import CacheError, InputError
from rekindle.pipeline.processes import units, worker
from rekindle.pipeline.processes.units import run_units, units_in_order
from rekindle.pipeline.processes.worker import Place

LOADS = """
import os, pathlib, time
from rekindle.data.errors import CacheError

def numbers(folder):
    (pathlib.Path(folder) / str(os.getpid())).touch()

    def do(number):
        time.sleep(0.05)
        return number, os.getpid()

    return do

def slower_at_first(folder):
    do = numbers(folder)
    return lambda number: time.sleep(0.1 / (1 + number)) or do(number)

class Ahead:
    # takes two units more before it gives the result of one

    def __call__(self, number):
        raise AssertionError("one at a time")

    def run_many(self, units):
        due = []
        for number in units:
            due.append((number, os.getpid()))
            if len(due) == 3:
                yield due.pop(0)
        yield from due

def refuses():
    raise CacheError("cannot be loaded")

def fails():
    def do(number):
        if number == 1:
            raise OSError(28, "No space left on device", "here")
        return number
    return do

def has_a_bug():
    return lambda number: 1 / number

def dies():
    return lambda number: os._exit(9)
"""


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of functions to load, which processes can import as well."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "loads_of_test_units.py").write_text(LOADS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "loads_of_test_units", raising=False)
    import loads_of_test_units  # type: ignore[import-not-found]

    return loads_of_test_units


def test_what_is_imported_ahead_exists() -> None:
    """The server passes over a name that it cannot import, and each process then takes seconds."""
    assert all(find_spec(name) for name in [*worker._PRELOADED, worker._FINE_TUNING])


def run(load: Callable[[], Callable[[int], object]], given: range, places: int) -> list[object]:
    results = list[object]()
    run_units("numbers", load, given, [Place(None, 1)] * places, results.append)
    return results


def test_each_unit_is_done_once_and_each_process_loads_once(
    loads: ModuleType, tmp_path: Path
) -> None:
    results = run(partial(loads.numbers, tmp_path), range(8), 2)
    assert sorted(number for number, _ in results) == list(range(8))  # type: ignore[misc, attr-defined]
    processes = {str(pid) for _, pid in results}  # type: ignore[misc, attr-defined]
    assert len(processes) == 2
    assert str(os.getpid()) not in processes
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == processes


def test_results_come_in_the_order_of_the_units(loads: ModuleType, tmp_path: Path) -> None:
    """Of any number of units: those are taken that are soon due."""
    load, taken = partial(loads.slower_at_first, tmp_path), count()
    found = units_in_order("numbers", load, taken, [Place(None, 1)] * 3)
    results = list(islice(found, 12))
    found.close()  # type: ignore[attr-defined]
    assert [number for number, _ in results] == list(range(12))
    assert len({pid for _, pid in results}) == 3
    assert 12 < next(taken) <= 12 + BATCHES_AHEAD_PER_THREAD * units.QUEUED_UNITS * 3 + 1
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 3


@pytest.mark.parametrize("count", [1, 3, 11])
def test_what_begins_units_ahead_has_them_at_hand(
    loads: ModuleType, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """In turns: few are shared out."""
    monkeypatch.setattr(units, "_units_in_progress", lambda place: units.UNITS_IN_PROGRESS)
    results = run(loads.Ahead, range(count), 2)
    assert sorted(number for number, _ in results) == list(range(count))  # type: ignore[misc, attr-defined]
    assert len({pid for _, pid in results}) == min(count, 2)  # type: ignore[misc, attr-defined]


def test_there_are_no_more_processes_than_units(loads: ModuleType, tmp_path: Path) -> None:
    assert len(run(partial(loads.numbers, tmp_path), range(1), 3)) == 1
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 1
    assert run(loads.refuses, range(0), 3) == []


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        ("refuses", CacheError, "^cannot be loaded$"),
        ("fails", OSError, "No space left on device: 'here'"),
        ("has_a_bug", RuntimeError, r"(?s)^numbers failed:.*ZeroDivisionError"),
        (
            "dies",
            InputError,
            r"^numbers: its process was killed \(exit code 9;.*again.*, .*--workers",
        ),
    ],
)
def test_an_error_ends_all(
    load: str, error: type[Exception], message: str, loads: ModuleType
) -> None:
    with pytest.raises(error, match=message):
        run(getattr(loads, load), range(4), 2)
    with pytest.raises(error, match=message):
        list(units_in_order("numbers", getattr(loads, load), range(4), [Place(None, 1)] * 2))
