"""One command for a GPU: parts that fail or are late do not affect the others; what is counted."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1]
ROW = ("a case", "rekindle", "time", 1.5, "ms")


@pytest.fixture(scope="module")
def command(benchmarks: None) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_command", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def good(toy: bool, add: Any, left: Any) -> None:
    add(ROW)


def bad(toy: bool, add: Any, left: Any) -> None:
    add(ROW)
    raise RuntimeError("no such kernel")


def test_a_part_that_fails_is_a_line_and_the_others_go_on(command, monkeypatch, capsys):
    made = {"bad": command.Part(1, bad), "good": command.Part(1, good)}
    monkeypatch.setattr(command, "parts", lambda: made)
    assert command.main(["--toy"]) == 1
    told = capsys.readouterr().out
    assert "bad          0 s  FAILED: RuntimeError: no such kernel" in told
    assert "good         0 s  done" in told
    assert told.count("a case") == 2
    assert command.main(["--toy", "--only", "good"]) == 0


def test_rows_are_appended_as_parts_are_done(command, monkeypatch, tmp_path):
    """Including those of a failed part."""
    outcomes = iter([command.Outcome("bad", 1.0, [ROW], "late"), command.Outcome("x", 1, [], None)])
    monkeypatch.setattr(command, "parts", lambda: {n: command.Part(1, good) for n in ("bad", "x")})
    monkeypatch.setattr(command, "run", lambda *_: next(outcomes))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "hardware", lambda: "a GPU")
    assert command.main(["--csv", str(tmp_path / "rows.csv")]) == 1
    (row,) = csv.DictReader((tmp_path / "rows.csv").open())
    assert (row["benchmark"], row["device"], row["case"]) == ("gpu bad", "a GPU", "a case")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(command, capsys):
    assert command.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_line_that_was_cut_off_is_no_row(command, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('["a case", "rekindle", "time", 1.5, "ms"]\n["a case", "rek')
    assert command.rows_of(path) == [ROW]


def test_a_line_of_the_table_is_what_one_did_in_a_case(command):
    rows = [ROW, (*ROW[:2], "share of copy", 0.4, "1"), ("b", "rekindle", "passed", 3.0, "")]
    told = command.table([command.Outcome("x", 2.0, rows, None)]).splitlines()
    assert [line.split() for line in told[1:]] == [
        ["a", "case", "rekindle", "time", "1.5", "ms;", "share", "of", "copy", "0.4"],
        ["b", "rekindle", "passed", "3"],
    ]


def test_parts_and_the_start_have_less_than_six_minutes(command):
    assert command.START_SECONDS + sum(part.seconds for part in command.parts().values()) <= 345


def test_what_a_part_leaves_is_for_those_after_it(command):
    """And what it takes too long, they have less: the end stays where it is."""
    shares = {"a": 9, "b": 20, "c": 30, "d": 40}
    known = {name: command.Part(seconds, good) for name, seconds in shares.items()}
    spent, times, found = {"a": 2.0, "c": 45.0, "d": 33.0}, [100.0], {}
    for name, seconds in command.limits("acd", known, lambda: times[-1]):
        found[name] = seconds
        times.append(times[-1] + spent[name])
    assert found == {"a": 9, "c": 37, "d": 32}


def test_a_part_knows_what_is_left_of_its_time(command, monkeypatch, tmp_path):
    """It is to end itself before it is ended."""
    told = []
    monkeypatch.setattr(
        command, "parts", lambda: {"x": command.Part(9, lambda toy, add, left: told.append(left()))}
    )
    monkeypatch.setattr(command, "run_within", lambda given, seconds: command.main(given[2:]))
    command.run("x", 30.0, tmp_path)
    assert 20 < told[0] <= 30 - command.SPARE_SECONDS


@pytest.mark.slow
def test_the_whole_runs_on_any_machine(command, capsys):
    assert command.main(["--toy"]) == 0, capsys.readouterr().out[-3000:]
