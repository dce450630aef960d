"""A cycle's page: what `pipeline compare CYCLE` and the cycle's own report show."""

import json
import re

import pytest

from rekindle.pipeline.cycle.page import cycle_section
from rekindle.pipeline.cycle.results import CycleResults, TaskFacts
from rekindle.pipeline.cycle.scores import ArmScores as Scores
from rekindle.pipeline.cycle.scores import differences_of
from rekindle.pipeline.report.page import Facts, Figures, Note, Page, as_html
from rekindle.pipeline.report.table import Table

ARMS = ["expert", "mlm", "both"]
METRICS = {"cola": "matthews", "<b>sst2": "accuracy"}
UNFINISHED = "unfinished, not there yet: mlm on cola"


@pytest.fixture
def results():
    scores = [
        Scores(arm, task, metric, [0, 1], [0.1 * n, 0.1 * n + 0.02], 0.1 * n + 0.01, 0.01, 0.0, 0.9)
        for n, arm in enumerate(ARMS, start=2)
        for task, metric in METRICS.items()
    ]
    tasks = [TaskFacts(task, metric, 9, 8, 7) for task, metric in METRICS.items()]
    differences = differences_of(ARMS, METRICS, scores)
    notes = [UNFINISHED, "one student per arm was pre-trained"]
    return CycleResults(ARMS, tasks, scores, differences, [], {"experts/cola": 3.0}, notes, {})


def of(section, kind):
    return [block for block in section.blocks if isinstance(block, kind)]


def test_every_arm_task_and_difference_is_there(results):
    section = cycle_section(results)
    assert [what for what, _ in of(section, Facts)[0].facts] == ARMS
    first = of(section, Table)[0]
    assert first.columns[0].cells == ARMS
    assert len(of(section, Figures)[0].figures) == len(METRICS)
    page = as_html(Page("t", "l", [section]))
    text = re.sub(r"<svg.*?</svg>|<[^>]*>", " ", page, flags=re.S)
    for one in results.differences:
        assert f"{100 * one.mean:+.1f}" in text
    assert "&lt;b&gt;sst2" in page
    assert "<b>sst2" not in page


def test_what_is_unfinished_is_said_first_and_the_rest_below(results):
    section = cycle_section(results)
    notes = of(section, Note)
    assert notes[0].warns
    assert notes[0].text.startswith("Unfinished, not there yet")
    quiet = next(note for note in notes if note.text.startswith("One student per arm"))
    assert not quiet.warns
    assert section.blocks.index(quiet) > section.blocks.index(of(section, Table)[0])


def test_the_results_file_alone_gives_the_same_section(results):
    again = CycleResults.from_dict(json.loads(json.dumps(results.as_dict())))
    assert as_html(Page("t", "l", [cycle_section(again)])) == as_html(
        Page("t", "l", [cycle_section(results)])
    )
