"""The result pages match the recorded rows, and rows match the cycles' folders."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from rekindle.data.errors import InputError
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.scores import MEAN, CycleResults
from rekindle.pipeline.report.significance import mean_interval
from testlib.compared.recorded import ARMS, PRIMARY, TASKS
from testlib.cycles import edit

BENCHMARKS = Path(__file__).parents[1]
ROOT = BENCHMARKS.parents[1]
TABLES = ["few_labels", "small_expert", "glue"]
MakeTable = MakeRun = Callable[..., Path]


# --- the pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["muki_clinc150", "real_model", *TABLES, "RESULTS", "README"])
def test_a_page_and_its_pictures_are_those_of_the_rows(pages: ModuleType, name: str) -> None:
    made, page = pages.MAKERS[name](), pages.page_of(name).read_text()
    again = "python tests/benchmarks/pages/make.py writes it anew"
    assert pages.replace_regions(page, made.regions) == page, again
    for file, drawing in made.pictures.items():
        there = (pages.PAGES / file).read_text()
        assert f"{file})" in page
        assert pages.pictures.mark_in(there) == pages.pictures.mark_in(drawing) != "", again
        assert len(there) < pages.pictures.MOST_BYTES


def glue_results() -> CycleResults:
    recorded = BENCHMARKS / "glue" / "glue_two_cores_results.json"
    return CycleResults.from_dict(json.loads(recorded.read_text()))


def test_the_page_of_glue_has_every_difference_and_every_score(pages: ModuleType) -> None:
    page, results = pages.page_of("glue").read_text(), glue_results()
    assert sum(line.startswith("| ") for line in page.splitlines()) == 4 + 7 + 55
    for one in results.differences:
        assert f"| {one.arm} | {one.task} | {100 * one.mean:+.2f} | {one.interval} |" in page
    for one in results.scores:
        spread = f" ± {100 * one.std:.2f}" if one.std is not None else ""
        assert f" {100 * one.mean:.2f}{spread} |" in page


def test_the_summaries_have_the_means_of_the_rows() -> None:
    mean = {one.arm: f"{100 * one.mean:.1f}" for one in glue_results().scores if one.task == MEAN}
    results, readme = ((ROOT / name).read_text() for name in ("RESULTS.md", "README.md"))
    for text in (results, readme):
        for arm in ("expert", "longer", "mlm", "kd", "both", "mixture"):
            assert mean[arm] in text
    assert re.findall(r"^(\d)\. ", results, re.MULTILINE) == ["1", "2", "3", "4", "5", "6"]


def test_the_page_of_clinc_has_the_recorded_values(pages: ModuleType) -> None:
    page = pages.page_of("muki_clinc150").read_text()
    rows = pages.muki_rows()
    assert len(rows) == 15
    for name, kind, found in rows:
        label = f"student: {name}" if kind == "student" else name
        spread = f" ± {100 * found['sd']:.2f}" if "sd" in found else ""
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {label} | ")]
        assert f"| {int(found['seeds'])} | {100 * found['accuracy']:.2f}{spread} |" in line
        if "targets" in found:
            assert line.endswith(f"| {100 * found['targets']:.1f} |")


def test_the_page_of_few_labels_has_the_hypothesis_over_its_own_cells(
    pages: ModuleType, record: ModuleType
) -> None:
    """LOG.md has it out of six cells; the other fourteen test it."""
    seen = {("trec", 0), ("trec", 1), ("trec", 2), ("sst2", 0), ("sst2", 1), ("mrpc", 0)}
    words = []
    for against in ("expert", "longer", "committee"):
        values = []
        for row in record.read_rows(BENCHMARKS / "few_labels"):
            if (row["task"], row["draw"]) not in seen:
                tests = {one["arm"]: fmean(one["test"]) for one in row["scores"]}
                values.append(100 * (tests["committee (own head)"] - tests[against]))
        assert len(values) == 14
        low, high = mean_interval(values) or (0, 0)
        words.append(f"{fmean(values):+.1f} [{low:.1f}, {high:.1f}]")
    page = " ".join(pages.page_of("few_labels").read_text().split())
    assert ", ".join(words) in page


def agreement_row(draw: int, point: str, test: float, where_wrong: float | None) -> dict[str, Any]:
    compared = {"test": test, "teacher": 0.5, "agreement": 0.75, "where_right": 1.0}
    where = {"cells": "few", "task": "trec", "draw": draw, "curve": "agreement", "point": point}
    origin = {"device": "a machine", "precision": "fp32", "date": "2026-12-01", "commit": "c"}
    return where | compared | {"where_wrong": where_wrong} | origin


def test_the_tables_of_why_have_means_over_draws(pages: ModuleType) -> None:
    rows = []
    for draw, (fresh, own, rate, tenth, wrong) in enumerate(
        [(0.6, 0.8, 0.7, 0.75, 0.25), (0.7, 0.8, 0.9, 0.85, None)]
    ):
        rows += [
            agreement_row(draw, "committee", fresh, wrong),
            agreement_row(draw, "committee (own head)", own, wrong),
        ]
        rows += [
            agreement_row(draw, point, 0, 0) | {"curve": "head", "fine-tuned": {"test": test}}
            for point, test in (("1.0", rate), ("0.1", tenth))
        ]
    text = pages.why_page.why("few_labels", rows)
    # A draw whose teacher makes no error has no share of errors: the mean is of the others.
    assert "| trec (2 draws) | committee | 65.0 | 50.0 | 75.0 | 100.0 | 25.0 |" in text
    assert "| trec 1 | committee | 70.0 | 50.0 | 75.0 | 100.0 | – |" in text
    assert "| trec 0 | 80.0 | 60.0 | 70.0 | 75.0 |" in text
    assert "| mean | 80.0 | 65.0 | 80.0 | 80.0 |" in text
    assert pages.why_page.why("small_expert", rows) == "No cell was looked into yet."


# --- the rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_recorded_cells_are_of_their_table_each_once_and_in_order(
    record: ModuleType, name: str
) -> None:
    config, rows = record.plan_of(BENCHMARKS / name), record.read_rows(BENCHMARKS / name)
    order = [(task.name, draw) for task in config.tasks for draw in range(config.label_draws)]
    cells = [(row["task"], row["draw"]) for row in rows]
    assert cells == [cell for cell in order if cell in cells]
    record.check_alike(rows)
    for row in rows:
        record.check_of_table(row, config)
        assert row["text"]["removed"]
        assert all(row[key] for key in ("device", "commit", "date", "versions", "precision"))
        by_arm = {one["arm"]: one for one in row["scores"]}
        assert {*config.arms} <= by_arm.keys()
        for one in row["scores"]:
            assert len(one["seeds"]) == len(one["test"])
            assert all(0 <= score <= 1 for score in one["test"])


@pytest.fixture
def table(make_table: MakeTable) -> Path:
    """Return a table of tasks with texts of their own, and no recorded cells."""
    return make_table("table", own_texts=True)


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Return a complete run, as `pipeline rekindle` leaves it."""
    return make_run(own_texts=True)


def recorded(record: ModuleType, table: Path, run: Path, device: str = "a machine") -> list[str]:
    return record.record(table, run, record.Origin(device, "abc", "2026-11-29"))


def test_rows_of_all_cells_say_what_the_cycle_says(
    pages: ModuleType, record: ModuleType, table: Path, run: Path
) -> None:
    assert recorded(record, table, run)[-1].startswith("6 of 6 cells")
    found = pages.results_of(record.plan_of(table), record.read_rows(table))
    known = read_results(run)
    assert found.differences == known.differences
    assert found.primary == known.primary
    assert {one.against for one in found.primary.differences} == {*PRIMARY["against"]}
    by_cell = {(one.arm, one.task, one.metric): one for one in known.scores}
    assert {(one.arm, one.task, one.metric) for one in found.scores} == by_cell.keys()
    for one in found.scores:
        assert one == by_cell[one.arm, one.task, one.metric]


def test_a_cell_is_added_once_it_is_finished_and_then_stays(
    record: ModuleType, table: Path, run: Path
) -> None:
    lacking = run / "draws" / "1" / "distilled" / "kd" / "mrpc"
    shutil.move(lacking, run / "aside")
    told = recorded(record, table, run)
    assert "draw 1, mrpc: not finished (kd (own head))" in told
    before = (table / "cells.jsonl").read_text().splitlines()
    assert len(before) == 5

    shutil.move(run / "aside", lacking)
    edit(run / "draws" / "0" / "experts" / "cola" / "metrics.json", lambda v: v.update(seconds=9))
    assert recorded(record, table, run, "another")[:-1] == ["added: draw 1, mrpc"]
    after = (table / "cells.jsonl").read_text().splitlines()
    assert [line for line in after if line in before] == before
    (new,) = [json.loads(line) for line in after if line not in before]
    assert (new["draw"], new["task"], new["device"]) == (1, "mrpc", "another")
    assert [(r["task"], r["draw"]) for r in record.read_rows(table)] == [*product(TASKS, range(3))]
    recorded(record, table, run)
    assert (table / "cells.jsonl").read_text().splitlines() == after


def test_a_mean_over_tasks_is_of_the_draws_that_have_all(
    pages: ModuleType, record: ModuleType, table: Path, run: Path
) -> None:
    for task, draw in (("cola", 2), ("mrpc", 0)):
        shutil.rmtree(run / "draws" / str(draw) / "experts" / task)
    recorded(record, table, run)
    config, rows = record.plan_of(table), record.read_rows(table)
    results = pages.results_of(config, rows)
    draws = {(o.arm, o.task): o.seeds for o in results.scores if o.arm in ARMS}
    assert draws == {
        (arm, task): numbers
        for arm in ARMS
        for task, numbers in (("cola", [0, 1]), ("mrpc", [1, 2]), (MEAN, [1]))
    }
    page = pages.cycle_page.measured("table", config, rows)
    assert "**4 of 6 cells are measured**" in page
    assert "**It is not complete**: the mean over tasks is over the draws that have all 2" in page
    assert "| cola | yes | yes | – |" in page
    only = [row for row in rows if row["task"] == "cola"]
    none = pages.cycle_page.measured("table", config, only)
    assert "on the mean over 2 tasks, is not known yet" in none
    assert "none so far" in none


def test_the_page_has_costs_and_removed_texts_of_the_rows(
    pages: ModuleType, record: ModuleType, table: Path, run: Path
) -> None:
    recorded(record, table, run)
    config, rows = record.plan_of(table), record.read_rows(table)
    # For one task: the student (40 to 42 s), its expert's search, fine-tunings and pass, its own.
    kinds = rows[0]["seconds"]["kd"]
    assert kinds["students"] == 40
    assert kinds["caching"] == 3
    assert {*kinds} == {"experts", "caching", "students", "search", "fine-tuning"}
    page = pages.cycle_page.measured("table", config, rows)
    mean = sum(sum(row["seconds"]["kd"].values()) for row in rows[:3]) / 3
    assert f"\n| kd | {mean:,.0f} |" in page
    assert "| cola | matthews | 8,000 | 551 | 1,043 | 2 + 1, removed | 0 |" in page
    assert "a machine; fp32;" in page
    assert "| kd | 5e-05 | 5e-05 |" in page


def test_a_cell_of_another_comparison_is_refused(
    record: ModuleType, table: Path, run: Path
) -> None:
    values = yaml.safe_load((table / "table.yaml").read_text())
    values["primary"]["against"] = ["mlm"]
    (table / "table.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"primary comparison .* of one file"):
        recorded(record, table, run)
    assert not (table / "cells.jsonl").exists()


def test_a_cell_that_was_run_with_other_settings_is_refused(
    record: ModuleType, table: Path, run: Path
) -> None:
    """Paths are no settings: rows come from several machines."""
    config = record.plan_of(table)
    for draw in range(3):
        own = config.of_draw(draw).model_dump(mode="json", by_alias=True)
        own["student"]["model"] = own["corpus"]["tokenizer"] = own["cache"]["path"] = f"/at/{draw}"
        edit(run / "draws" / str(draw) / "cycle.json", lambda v, own=own: v.update(settings=own))
    assert recorded(record, table, run)[-1].startswith("6 of 6 cells")
    rows = record.read_rows(table)
    assert {row["settings"]["seed"] for row in rows} == {0, 1, 2}
    assert {row["settings"]["cache"]["path"] for row in rows} == {""}
    (table / "cells.jsonl").unlink()
    change = {"epochs": 7}
    edit(run / "draws/1/cycle.json", lambda v: v["settings"]["finetune"].update(change))
    with pytest.raises(InputError, match=r"draw 1, cola: it was run with finetune.epochs 7, and"):
        recorded(record, table, run)
    assert not (table / "cells.jsonl").exists()


def test_rows_that_cannot_stand_in_one_table_are_refused(
    record: ModuleType, table: Path, run: Path
) -> None:
    """As from a machine that has searched on its own, or has made the start model again."""
    recorded(record, table, run)
    rows = record.read_rows(table)
    for key, other, words in (
        ("chosen", rows[4]["chosen"] | {"kd": {"learning_rate": 1.0}}, "mrpc: draw 1 has chosen"),
        ("files", ["other"], "mrpc: draw 1 has files"),
        ("start", {"weights": "other"}, "start .*give --searched its search.json"),
    ):
        ones = [row | {"start": {"weights": "w"}} for row in rows]
        record.check_alike(ones)
        ones[4] |= {key: other}
        with pytest.raises(InputError, match=words):
            record.check_alike(ones)


def test_what_draw_0_has_searched_is_kept_beside_the_rows(
    record: ModuleType, table: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = record.plan_of(table).of_draw(0).model_dump(mode="json")
    facts = dict.fromkeys(("metric", "regression", "pairs", "train", "dev", "test"), 1)
    tasks = {task: facts | {"files": {"place": task}} for task in TASKS}
    made = {
        "written_by": "rekindle search",
        "about": {"settings": settings, "start": {"weights": "w"}, "tasks": tasks},
        "texts": {"cola": [], "mrpc": []},
        "search": {"cola": {"kd": ["first"]}, "mrpc": {"kd": ["first"]}},
    }
    monkeypatch.setattr(record, "export_searches", lambda home: json.loads(json.dumps(made)))
    shutil.move(run / "draws/0/experts/mrpc", run / "aside")
    recorded(record, table, run)
    file = table / "search.json"
    assert json.loads(file.read_text())["search"] == {"cola": {"kd": ["first"]}}
    shutil.move(run / "aside", run / "draws/0/experts/mrpc")
    made["search"] = {"cola": {"kd": ["again"]}, "mrpc": {"kd": ["again"]}}
    recorded(record, table, run)
    found = record.read_search_file(file)
    assert found["search"] == {"cola": {"kd": ["first"]}, "mrpc": {"kd": ["again"]}}
    assert found["texts"] == made["texts"]
    made["about"]["start"] = {"weights": "other"}
    with pytest.raises(InputError, match=r"search.json belongs to another cycle: start.weights"):
        recorded(record, table, run)


def test_a_search_that_was_taken_over_is_told_on_the_page(
    pages: ModuleType, record: ModuleType, table: Path, run: Path
) -> None:
    (run / "draws/0/search/taken.json").write_text(json.dumps({"mrpc": "search.json"}))
    shutil.rmtree(run / "draws/0/experts")
    recorded(record, table, run)
    page = pages.cycle_page.measured("table", record.plan_of(table), record.read_rows(table))
    assert "taken over from search.json (`--searched`): mrpc 1, mrpc 2." in page


def test_the_file_of_small_experts_has_a_student_larger_than_them(record: ModuleType) -> None:
    config = record.plan_of(BENCHMARKS / "small_expert")
    other = record.plan_of(BENCHMARKS / "few_labels")
    assert config.has_other_experts
    assert {*config.arms} == {*other.arms, "start"}
    assert [task.name for task in config.tasks] == ["trec", "clinc"]
    for key in ("train", "finetune", "search", "seeds", "label_draws", "distill", "seed"):
        assert getattr(config, key) == getattr(other, key), key
    keys = ("train", "dev", "test", "train_examples", "train_per_class", "dev_examples", "corpus")
    keys += ("finetune",)
    for own, theirs in zip(config.tasks, other.tasks, strict=False):
        assert {key: getattr(own, key) for key in keys} == {k: getattr(theirs, k) for k in keys}


def test_a_cut_model_has_the_layers_that_are_named(make_model, wordpiece, tmp_path: Path) -> None:
    from transformers import AutoModel

    sys.path.insert(0, str(BENCHMARKS / "small_expert"))
    try:
        import cut
    finally:
        del sys.path[0]
    start = str(make_model("bert", "AutoModel", wordpiece, 0, num_hidden_layers=6))
    cut.cut(start, tmp_path / "small")
    whole, small = (AutoModel.from_pretrained(one) for one in (start, tmp_path / "small"))
    assert small.config.num_hidden_layers == len(small.encoder.layer) == 3
    for place, number in enumerate((0, 2, 4)):
        kept, own = (
            small.encoder.layer[place].state_dict(),
            whole.encoder.layer[number].state_dict(),
        )
        assert all(torch.equal(kept[name], own[name]) for name in own)
    words = small.embeddings.word_embeddings.weight
    assert torch.equal(words, whole.embeddings.word_embeddings.weight)
    with pytest.raises(SystemExit, match="layers 0 to 5"):
        cut.cut(start, tmp_path / "none", (6,))
