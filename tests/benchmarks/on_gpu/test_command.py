"""One command for a GPU: parts that fail or are late do not affect the others; what is counted."""

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1]
ROW = ("a case", "rekindle", "time", 1.5, "ms")


@pytest.fixture(scope="module")
def command() -> Iterator[ModuleType]:
    before = [*sys.path]
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("gpu_command", BENCHMARKS / "gpu.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before


def good(toy: bool, add: Any) -> None:
    add(ROW)


def bad(toy: bool, add: Any) -> None:
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


def test_a_late_command_is_ended_with_what_it_began(command, tmp_path):
    begun = tmp_path / "begun"
    late = f"import os, time; os.fork(); open({str(begun)!r}, 'a').write('x'); time.sleep(60)"
    assert command.run_within([sys.executable, "-c", late], 2) == "not done within 2 s"
    assert begun.read_text() == "xx"
    assert command.run_within([sys.executable, "-c", "raise SystemExit(3)"], 60) == (
        "ended with exit code 3"
    )


def test_a_line_that_was_cut_off_is_no_row(command, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('["a case", "rekindle", "time", 1.5, "ms"]\n["a case", "rek')
    assert command.rows_of(path) == [ROW]


def test_busy_is_what_spans_cover_together(command):
    import training

    spans = [(0, 10), (15, 40), (30, 50), (35, 36), (80, 100)]  # the first tenth is left out
    assert training.busy(spans) == (pytest.approx((35 + 20) / 90), 0.03)
    with pytest.raises(RuntimeError, match="nothing run"):
        training.busy([])


def test_letters_of_pytest_are_counted(command):
    import marked_tests

    text = (
        "..F.sE [ 50%]\n.x                        [100%]\n=== FAILURES ===\nEnd. F\n2 failed in 3s"
    )
    assert marked_tests.counted(text) == {"passed": 5, "failed": 2, "skipped": 1}


@pytest.mark.slow
def test_the_whole_runs_on_any_machine(command, capsys):
    assert command.main(["--toy"]) == 0, capsys.readouterr().out[-3000:]
