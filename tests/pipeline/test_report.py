"""The report: numbers from run directories, tables in text, a page that needs only itself."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.pipeline.report import (
    CacheFacts,
    Cost,
    Report,
    Run,
    TaskScores,
    TeacherFacts,
    as_html,
    as_percent,
    as_text,
    mean_scores,
    read_run,
    read_test_scores,
)
from rekindle.pipeline.report_figures import inline, pictures


def run_named(name: str, *teachers: str) -> Run:
    evaluations = [
        {"kind": "evaluate", "step": step, "loss": 6 - step / 100, "agreement/part": 0.5}
        | {f"kl/{teacher}": 1 / step for teacher in teachers}
        for step in (10, 20)
    ]
    return Run(name=name, steps=20, sequences=640, seconds=12.5, evaluations=evaluations)


def scores(task: str, *seeds: float) -> TaskScores:
    by_model = {
        model: [value + 0.01 * number for value in seeds]
        for number, model in enumerate(("expert", "student without KD", "student with KD"))
    }
    return TaskScores(task, f"what is {task}?", 800, 1440, 0.25, by_model)


@pytest.fixture
def report() -> Report:
    return Report(
        title="A title",
        lead="What it is about.",
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
    assert run.metrics == ["loss", "kl/part"]
    assert run.curve("loss") == [(2, 5.4)]
    assert run.curve("kl/other") == []


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


# --- numbers --------------------------------------------------------------------------------------

seconds = st.floats(0.01, 1e4)


@given(once=seconds, live=seconds, run=seconds)
def test_the_cache_pays_from_that_run_on_and_not_before(
    once: float, live: float, run: float
) -> None:
    cost = Cost({"a": once, "not used": 1e6}, ["a"], live, run)
    runs = cost.pays_after
    assert runs is not None
    slack = 1e-9 * (runs * (run + live) + once)
    assert cost.cached(runs) <= cost.with_live_teachers(runs) + slack
    if runs > 1:
        assert cost.cached(runs - 1) > cost.with_live_teachers(runs - 1) - slack


def test_teachers_that_cost_nothing_live_never_pay_for_a_cache() -> None:
    assert Cost({"a": 1.0}, ["a"], live=0.0, run=1.0).pays_after is None


def test_mean_and_spread() -> None:
    assert as_percent([0.5]) == "50.0"
    assert as_percent([0.5, 0.6]) == "55.0 ± 7.1"  # the sample deviation
    means = mean_scores([scores("part", 0.5, 0.6), scores("kind", 0.7, 0.7)])
    assert means["expert"] == pytest.approx([0.6, 0.65])


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


class Elements(HTMLParser):
    """All elements and attributes of a page; fails on tags that do not match."""

    VOID = frozenset({"meta", "link", "img", "br", "hr"})

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_refers_to_nothing_outside_itself(report: Report) -> None:
    page = as_html(report)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|<iframe", page, re.I)
    for _, attributes in Elements(page).found:
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))


def test_every_reference_of_a_picture_is_in_the_page(report: Report) -> None:
    elements = Elements(as_html(report)).found
    ids = {attributes["id"] for _, attributes in elements if "id" in attributes}
    used = {(a.get("xlink:href") or "#")[1:] for _, a in elements} - {""}
    used |= set(re.findall(r"url\(#([^)]*)\)", as_html(report)))
    assert used
    assert used <= ids


def test_the_page_is_for_dark_and_light_and_for_narrow_screens(report: Report) -> None:
    page = as_html(report)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    pictures_ = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(pictures_) == 4
    for svg in pictures_:
        opening = svg[: svg.index(">")]
        assert "viewBox" in opening
        assert " width=" not in opening
        assert "currentColor" in svg
        assert "#000000" not in svg  # would vanish in the dark
        assert "fill: white" not in svg
        assert "#ffffff" not in svg


def test_the_page_has_the_numbers_of_the_text(report: Report) -> None:
    page = as_html(report)
    for value in ("55.0 ± 7.1", "62.5 ± 3.5", "9,018", "34.09", "after 2 student runs", "A title"):
        assert value in page


def test_the_best_of_a_row_is_marked_once(report: Report) -> None:
    rows = re.findall(r"<tr[^>]*>.*?</tr>", as_html(report), re.S)
    marked = [re.findall(r'class="best">([^<]*)', row) for row in rows]
    assert [m for m in marked if m] == [["57.0 ± 7.1"], ["72.0 ± 0.0"], ["64.5 ± 3.5"]]


def test_names_cannot_write_into_the_page(report: Report) -> None:
    hostile = "<script>alert(1)</script>"
    tasks = [replace(report.tasks[0], task=hostile), report.tasks[1]]
    runs = [replace(report.runs[0], name=hostile), *report.runs[1:]]
    page = as_html(replace(report, title=hostile, tasks=tasks, runs=runs))
    assert "<script" not in page
    Elements(page)


def test_equal_reports_are_equal_pages(report: Report) -> None:
    assert as_html(report) == as_html(report)


def test_a_picture_has_a_line_for_each_run_and_expert(report: Report) -> None:
    by_caption = {picture.caption.split()[0]: str(picture.svg) for picture in pictures(report)}
    assert "student without KD" in by_caption["Masked-LM"]
    assert "student with KD" in by_caption["Masked-LM"]
    assert ">part<" in by_caption["KL"]
    assert ">kind<" in by_caption["KL"]
    assert "experts live" in by_caption["Seconds"]


def test_inlining_removes_what_only_a_file_needs() -> None:
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "x" "http://y"><svg xmlns="http://z" '
        'xmlns:xlink="http://w" width="10pt" height="5pt" viewBox="0 0 10 5"><metadata>http://m'
        '</metadata><path style="stroke: #010203" stroke-width="2"/></svg>'
    )
    expected = '<svg viewBox="0 0 10 5"><path style="stroke: currentColor" stroke-width="2"/></svg>'
    assert inline(svg) == expected
