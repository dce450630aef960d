"""A cycle's page: what `pipeline compare CYCLE` and the cycle's own report show."""

import json
import re
from dataclasses import replace

import pytest

from rekindle.data.settings import parse_settings
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.notes import UNHELPFUL, UNLEARNED
from rekindle.pipeline.cycle.page import (
    commands_of,
    cycle_section,
    facts_of,
    printed,
    settings_used,
)
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.scores import ArmScores as Scores
from rekindle.pipeline.cycle.scores import CycleResults, TaskFacts, differences_of
from rekindle.pipeline.report.cache import CacheFacts, TeacherFacts
from rekindle.pipeline.report.cost import Cost
from rekindle.pipeline.report.page import Facts, Figures, Note, Page, as_html
from rekindle.pipeline.report.table import Table
from testlib.cycles import cycle, edit, finetuned

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
    notes = [UNFINISHED, UNHELPFUL, "one student per arm was pre-trained"]
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
        assert f"{100 * one.mean:+.2f}" in text
    assert "&lt;b&gt;sst2" in page
    assert "<b>sst2" not in page


def test_what_is_unfinished_is_said_first_and_the_rest_below(results):
    section = cycle_section(results)
    notes = of(section, Note)
    assert notes[0].warns
    assert notes[0].text.startswith("Unfinished, not there yet")
    assert notes[1].warns
    assert notes[1].text.startswith("Guidance is not shown to help")
    quiet = next(note for note in notes if note.text.startswith("One student per arm"))
    assert not quiet.warns
    assert section.blocks.index(quiet) > section.blocks.index(of(section, Table)[0])


def test_the_results_file_alone_gives_the_same_section(results):
    again = CycleResults.from_dict(json.loads(json.dumps(results.as_dict())))
    assert as_html(Page("t", "l", [cycle_section(again)])) == as_html(
        Page("t", "l", [cycle_section(results)])
    )


def test_chance_and_what_a_task_asks_are_told(results):
    asked = replace(results.tasks[1], chance=0.125, about="is it good?")
    section = cycle_section(replace(results, tasks=[results.tasks[0], asked]))
    names, cola, sst2, *_ = of(section, Table)[0].columns
    assert names.cells[-1] == "chance"
    assert (cola.cells[-1], sst2.cells[-1]) == ("–", "12.50")
    told = "is it good? 9 examples to train on, 7 to test"
    assert ("<b>sst2", told) in of(section, Facts)[1].facts


def test_what_is_printed_has_cache_cost_and_paths(results, tmp_path):
    teacher = TeacherFacts("cola", "2 logits", 9018, 654_321, 343_210, 0.0015)
    saved = replace(
        results,
        cache=CacheFacts(9018, 343_210, 4000, [teacher]),
        cost=Cost({"cola": 7.5}, ["cola"], live=5.0, run=30.0),
    )
    text = printed(tmp_path, saved)
    for value in ("the cache: 9,018 sequences, 343,210 tokens", "72.6", "1.91", "1.50"):
        assert value in text
    assert "after 2 student runs" in text
    assert f"{tmp_path}/report.html" in text
    assert CycleResults.from_dict(json.loads(json.dumps(saved.as_dict()))) == saved
    assert "student run" not in printed(tmp_path, results)  # not known


def test_the_text_has_no_colours_even_on_a_terminal(results, tmp_path, monkeypatch):
    plain = printed(tmp_path, results)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert printed(tmp_path, results) == plain
    assert "\x1b" not in plain


def ran(out, rates, arms=("expert", "mlm"), used=()):
    """What the page says of a cycle's fine-tuning that has searched ``rates``, and its lines; an
    arm's own rate where ``used`` has it.
    """
    tasks = [{"name": name, "train": "a", "test": "b"} for name in ("cola", "mrpc")]
    tasks[1]["finetune"] = {"epochs": 5}
    values = {
        "corpus": {"source": ["text.txt"], "tokenizer": "m"},
        "student": {"model": "m"},
        "tasks": tasks,
        "arms": list(arms),
        "search": {"learning_rate": rates},
    }
    config = parse_settings(CycleConfig, values)
    for (arm, task), rate in dict(used).items():
        epochs = {"cola": 3, "mrpc": 5}[task]
        finetuned(out, arm, task, config={"learning_rate": rate, "epochs": epochs})
    found = settings_used(out, config)
    lines = [line for _, line in commands_of(out, config, found) if " finetune " in line]
    return dict(facts_of(config, found))["fine-tuning"], lines


def test_the_learning_rate_that_is_told_is_the_one_that_was_used(tmp_path):
    told, lines = ran(tmp_path, [1e-3])
    assert told.startswith("epochs 3 (cola), 5 (mrpc); learning rate 0.001; seeds: 5")
    for line in lines:  # also what is usual in a cycle, and not in finetune
        for option in ("learning_rate=0.001", "epochs=3", "batch_size=32", "patience=null"):
            assert f"--set {option} " in line
    told, lines = ran(tmp_path, [1e-3, 5e-5])
    assert "; learning rate not chosen yet; " in told
    rates = [0.001, 5e-05, 5e-05, 5e-05]
    cells = [(arm, task) for task in ("cola", "mrpc") for arm in ("expert", "mlm")]
    told, lines = ran(tmp_path, [1e-3, 5e-5], used=zip(cells, rates, strict=True))
    assert "rate 0.001 (expert on cola), 5e-05 (mlm on cola; mrpc), chosen on dev; seeds" in told
    assert ["learning_rate=0.001" in line for line in lines] == [True, False]
    told, _ = ran(tmp_path, [1e-3, 5e-5], used=dict.fromkeys(cells, 1e-3).items())
    assert "; learning rate 0.001, chosen on dev; " in told


def test_where_next_to_nothing_was_learned_the_page_and_what_is_printed_name_it(tmp_path):
    home = cycle(tmp_path, ["expert", "mlm"], ["cola"], search={}, seeds=2)
    file = home / folder_of("mlm", "cola") / "metrics.json"
    edit(file, lambda found: found["per_seed"][1].update(warning="warning: seed 1: …"))
    results = read_results(home)
    (note,) = (note for note in results.notes if note.startswith(UNLEARNED))
    assert "learned by mlm on cola (seed 1): on dev" in note
    assert "mlm on cola (seed 1)" in " ".join(printed(home, results).split())
    assert of(cycle_section(results), Note)[0].warns
