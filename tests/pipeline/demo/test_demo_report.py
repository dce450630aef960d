"""The demo's report: numbers from run directories, tables in text, and the same on the page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline.demo.report import (
    DemoTask,
    Report,
    Run,
    as_page,
    as_text,
    read_run,
    read_test_scores,
)
from rekindle.pipeline.demo.results import write_results
from rekindle.pipeline.report.cache import CacheFacts, TeacherFacts
from rekindle.pipeline.report.cost import Cost
from rekindle.pipeline.report.page import as_html
from rekindle.pipeline.report.scores import TaskScores

MODELS = ["expert", "student without KD", "student with KD"]


def run_named(name: str, *teachers: str) -> Run:
    evaluations = [
        {"kind": "evaluate", "step": step, "loss": 6 - step / 100, "agreement/part": 0.5}
        | {f"kl/{teacher}": 1 / step for teacher in teachers}
        for step in (10, 20)
    ]
    steps = [{"kind": "train", "step": step, "loss": 7.0, "ce": 6.0} for step in range(1, 21)]
    settings = {"train": {"seed": 0, "distill": list(teachers)}}
    return Run(name, 20, 640, seconds=12.5, settings=settings, records=[*steps, *evaluations])


def scores(task: str, *seeds: float) -> DemoTask:
    by_model = {
        model: [value + 0.01 * number for value in seeds] for number, model in enumerate(MODELS)
    }
    scored = TaskScores(task, "accuracy", "test", by_model, 0.25, f"what is {task}?")
    return DemoTask(f"what is {task}?", 800, 1440, scored)


@pytest.fixture
def report() -> Report:
    return Report(
        title="A title",
        lead="What it is about.",
        models=MODELS,
        tasks=[scores("part", 0.5, 0.6), scores("kind", 0.7, 0.7)],
        runs=[run_named("student without KD"), run_named("student with KD", "part", "kind")],
        cache=CacheFacts(
            sequences=9018,
            tokens=343_210,
            vocabulary=4000,
            teachers=[
                TeacherFacts("part", "8 logits", 9018, 654_321, 343_210),
                TeacherFacts("lm", "16 of 4,000 log-probabilities", 150_000, 11_700_000, 343_210),
            ],
        ),
        cost=Cost(teachers={"part": 7.5, "lm": 40.0}, used=["part"], live=5.0, run=30.0),
        facts=[("text", "some documents")],
        commands=[("stage 1", "pipeline cache-teachers stage1.yaml")],
    )


# --- reading --------------------------------------------------------------------------------------


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[], Path]:
    def write() -> Path:
        records = [
            {"kind": "train", "step": 1, "tokens": 1000, "tokens_per_second": 500.0, "loss": 6.0},
            {"kind": "train", "step": 2, "tokens": 900, "tokens_per_second": 300.0, "loss": 5.5},
            {"kind": "evaluate", "step": 2, "loss": 5.4, "kl/part": 0.3},
        ]
        (tmp_path / "run.json").write_text(json.dumps({"train": {"batch_sequences": 32}}))
        (tmp_path / "summary.json").write_text(json.dumps({"steps": 2, "seconds": 99.0}))
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "metrics.jsonl").write_text(lines)
        return tmp_path

    return write


def test_a_run_is_read_with_the_seconds_of_its_steps(write_run: Callable[[], Path]) -> None:
    run = read_run(write_run(), "a student")
    assert (run.name, run.steps, run.sequences) == ("a student", 2, 64)
    assert run.seconds == pytest.approx(1000 / 500 + 900 / 300)
    assert [record["kind"] for record in run.records] == ["train", "train", "evaluate"]


def test_a_run_without_a_name_is_called_as_its_directory(write_run: Callable[[], Path]) -> None:
    directory = write_run()
    assert read_run(directory).name == directory.name


@pytest.mark.parametrize("missing", ["run.json", "summary.json", "metrics.jsonl"])
def test_what_is_no_finished_run_is_the_users_mistake(
    missing: str, write_run: Callable[[], Path]
) -> None:
    directory = write_run()
    (directory / missing).unlink()
    with pytest.raises(InputError, match=rf"no finished run .*{missing}"):
        read_run(directory)


def test_the_test_scores_are_those_of_the_metric(tmp_path: Path) -> None:
    seeds = [{"test_scores": {"accuracy": a, "f1": 0.1}} for a in (0.5, 0.75)]
    (tmp_path / "metrics.json").write_text(json.dumps({"metric": "accuracy", "per_seed": seeds}))
    assert read_test_scores(tmp_path) == [0.5, 0.75]


# --- text -----------------------------------------------------------------------------------------


def test_the_text_has_every_score_and_cost(report: Report) -> None:
    text = as_text(report)
    assert all(len(line) <= 96 and line == line.rstrip() for line in text.splitlines())
    first = next(line.split() for line in text.splitlines() if line.split()[:1] == ["part"])
    assert first == [
        "part",
        "55.0",
        "±",
        "7.1",
        "56.0",
        "±",
        "7.1",
        "57.0",
        "±",
        "7.1",
        "25.0",
        "1,440",
    ]
    for value in ("70.0 ± 0.0", "62.5 ± 3.5"):
        assert value in text
    for value in ("9,018", "343,210", "1.91", "72.6", "78.0", "34.09", "7.5", "40.0"):
        assert value in text
    assert "after 2 student runs" in text


def test_the_text_has_no_colours_even_on_a_terminal(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = as_text(report)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    assert as_text(report) == plain
    assert "\x1b" not in plain


# --- the page -------------------------------------------------------------------------------------


def test_the_page_has_the_numbers_of_the_text(report: Report) -> None:
    page = as_html(as_page(report))
    for value in ("55.0 ± 7.1", "62.5 ± 3.5", "9,018", "34.09", "after 2 student runs", "A title"):
        assert value in page
        assert value in as_text(report) or value == "A title"


def test_the_best_of_each_task_is_marked_once(report: Report) -> None:
    marked = re.findall(r'class="best">([^<]*)', as_html(as_page(report)))
    assert marked == ["57.0 ± 7.1", "72.0 ± 0.0", "64.5 ± 3.5"]


def test_a_student_has_one_line_on_the_whole_page(report: Report) -> None:
    """The experts have the first line of the scores; the students' are the others everywhere."""
    page = as_html(as_page(report))
    for name in MODELS[1:]:
        before = re.findall(r"var\(--run-(\d)\)[^§]{0,400}?</svg>(?:<span>)?" + name, page)
        assert len(before) >= 3
        assert set(before) == {str(MODELS.index(name))}


def test_the_page_says_what_sets_the_students_apart(report: Report) -> None:
    page = as_html(as_page(report))
    part = page[page.index("What sets the students apart") :]
    assert "train.<wbr>distill" in part
    assert "≠ [part,<wbr> kind]" in part


def test_results_have_all_but_single_steps(report: Report, tmp_path: Path) -> None:
    text = write_results(report, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cost"]["live"] == 5.0
    assert [e["kl/part"] for e in results["runs"][1]["evaluations"]] == [0.1, 0.05]
    assert "records" not in results["runs"][0]
    assert f"{tmp_path}/report.html" in text
    assert (tmp_path / "report.html").read_text() == as_html(as_page(report))
