"""The run with minutes of a GPU: its inputs, what is recorded, how it continues."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from rekindle.data.errors import InputError
from rekindle.pipeline.cycle.config import load_cycle
from rekindle.train.model.files import load_student_model
from testlib.compared.recorded import DRAWS, TASKS

BENCHMARKS = Path(__file__).parents[1]
MINILM_BYTES = 46_600_000  # 22.7 M parameters and a masked-LM head in half precision, a tokenizer


@pytest.fixture(scope="module")
def gpu(pages: ModuleType) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS / "glue"))
    try:
        import gpu
    finally:
        sys.path.remove(str(BENCHMARKS / "glue"))
    return gpu


@pytest.fixture
def start(make_model, wordpiece) -> Path:
    return Path(make_model("bert", "AutoModelForMaskedLM", wordpiece, 0))


def test_the_inputs_are_all_that_the_file_names_and_can_be_carried(
    gpu: ModuleType, shared: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "inputs"
    size = gpu.write_inputs(shared, start, out)
    assert size == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert size + MINILM_BYTES < gpu.MOST_BYTES
    config = load_cycle(BENCHMARKS / "glue" / "glue.yaml")
    files = [place for task in config.tasks for place in (task.train, task.test)]
    for place in (*files, *config.corpus.source, config.student.model, config.corpus.tokenizer):
        assert (out / place).exists()
    with pytest.raises(SystemExit, match="is there already"):
        gpu.write_inputs(shared, start, out)
    monkeypatch.setattr(gpu, "MOST_BYTES", size)
    with pytest.raises(SystemExit, match="less than 60"):
        gpu.write_inputs(shared, start, tmp_path / "more")


def test_the_start_model_is_the_same_in_half_precision(
    gpu: ModuleType, start: Path, tmp_path: Path
) -> None:
    gpu.halve(start, tmp_path / "half")
    whole, half = (load_student_model(one, "masked_lm").model for one in (start, tmp_path / "half"))
    for (name, own), (_, kept) in zip(
        whole.named_parameters(), half.named_parameters(), strict=True
    ):
        assert kept.dtype == torch.float32, name
        assert torch.equal(kept, own.half().float()), name
    assert gpu.size_of(tmp_path / "half") < 0.7 * gpu.size_of(start)


def test_draws_are_recorded_as_they_end_and_only_those_that_lack_are_run_again(
    gpu: ModuleType, record: ModuleType, make_table, make_run, tmp_path: Path
) -> None:
    table, made = make_table("glue", own_texts=False), make_run(own_texts=False)
    rows, begun = tmp_path / "rows", tmp_path / "begun"

    def command(table: Path, out: Path, draw: int, workers: int, broken: int = -1) -> list[str]:
        copy = f"mkdir -p {out}/draws && cp -r {made}/draws/{draw} {out}/{draw}"
        copy += f" && mv {out}/{draw} {out}/draws/{draw}"  # in one step, once all is written
        what = "exit 1" if draw == broken else copy
        return ["bash", "-c", f"echo {draw} >> {begun}; {what}"]

    def run(out: str, **how: object) -> tuple[bool, list[str]]:
        begun.write_text("")
        done = gpu.run(tmp_path, tmp_path / out, rows, table=table, **how)
        return done, begun.read_text().split()

    broken = lambda *given: command(*given, broken=1)  # noqa: E731
    assert run("first", command=broken, at_once=2) == (False, ["0", "1", "2", "1"])
    first = (rows / "cells.jsonl").read_text()
    cells = [(row["task"], row["draw"]) for row in map(json.loads, first.splitlines())]
    assert cells == [(task, draw) for task in TASKS for draw in (0, 2)]
    assert all(row["seconds_of"] == "all tasks" for row in record.read_rows(table))
    # On another machine, without the first folder.
    assert run("second", command=command) == (True, ["1"])
    assert len(record.read_rows(table)) == DRAWS * len(TASKS)
    assert set(first.splitlines()) < set((rows / "cells.jsonl").read_text().splitlines())
    assert run("third", command=command) == (True, [])


def test_when_the_time_is_over_a_draw_is_told_to_keep_what_it_has(
    gpu: ModuleType, make_table, tmp_path: Path
) -> None:
    table, kept = make_table("glue", own_texts=False), tmp_path / "kept"

    def command(table: Path, out: Path, draw: int, workers: int) -> list[str]:
        work = f"trap 'echo told > {kept}; exit' TERM; while true; do sleep 0.05; done"
        return ["bash", "-c", work]

    out, rows = tmp_path / "out", tmp_path / "rows"
    assert not gpu.run(tmp_path, out, rows, table=table, command=command, seconds=1.0)
    assert kept.read_text() == "told\n"


def test_no_draw_runs_on_where_rows_are_refused(
    gpu: ModuleType, make_table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, kept, out = make_table("glue", own_texts=False), tmp_path / "kept", tmp_path / "out"

    def command(table: Path, out: Path, draw: int, workers: int) -> list[str]:
        begun = out / "draws" / str(draw)
        work = f"trap 'echo told >> {kept}; exit' TERM; mkdir -p {begun}; touch {begun}/cycle.json"
        return ["bash", "-c", "true" if draw == 0 else f"{work}; while true; do sleep 0.05; done"]

    def refuse(*_: object) -> None:
        raise InputError("another table")

    monkeypatch.setattr(gpu, "keep", refuse)
    with pytest.raises(InputError, match="another table"):
        gpu.run(tmp_path, out, tmp_path / "rows", table=table, command=command, at_once=2)
    assert kept.read_text() == "told\n"


@pytest.mark.slow
def test_a_tiny_run_goes_on_from_what_the_real_command_left(
    gpu: ModuleType, record: ModuleType, shared: Path, start: Path, tmp_path: Path
) -> None:
    inputs, table = tmp_path / "inputs", tmp_path / "glue"
    gpu.write_inputs(shared, start, inputs)
    values = yaml.safe_load((BENCHMARKS / "glue" / "glue.yaml").read_text())
    values["tasks"] = values["tasks"][:2]
    for task in values["tasks"]:
        task |= {"train_examples": 24, "dev_examples": 24}
    values["corpus"] |= {"limit_sequences": 64}
    values["train"] |= {"steps": 4, "batch_sequences": 8, "warmup_steps": 1, "precision": "fp32"}
    values["finetune"] |= {"epochs": 1, "batch_size": 8, "precision": "fp32"}
    values["label_draws"] = 2
    table.mkdir()
    (table / "glue.yaml").write_text(yaml.safe_dump(values))
    out, rows = tmp_path / "out", tmp_path / "rows"
    how = {"table": table, "at_once": 1, "workers": 1}
    assert not gpu.run(inputs, out, rows, seconds=25, **how)
    there = set(out.rglob("metrics.json"))
    stamps = {file: file.stat().st_mtime_ns for file in there}
    assert there, "nothing was fine-tuned within the time: raise it"
    assert gpu.run(inputs, out, rows, **how)
    assert len(record.read_rows(table)) == 4
    assert {file: file.stat().st_mtime_ns for file in there} == stamps
