"""The results of a cycle: read from what its stages leave, told as tables."""

import json
import shutil
from dataclasses import replace
from itertools import product
from statistics import fmean, stdev

import pytest
from scipy import stats

from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.scores import MEAN, SELECTED, CycleResults
from rekindle.pipeline.cycle.tables import as_text, tables_of
from rekindle.pipeline.report.significance import holm
from testlib.cycles import (
    ARMS,
    GRID,
    SEEDS,
    TASKS,
    about,
    as_markdown,
    cycle,
    edit,
    finetuned,
    metrics_of,
    rows_of,
    score,
    write,
)


def one_score(results, arm, task, metric):
    (one,) = [s for s in results.scores if (s.arm, s.task, s.metric) == (arm, task, metric)]
    return one


def one_difference(results, arm, against, task):
    (one,) = [d for d in results.differences if (d.arm, d.against, d.task) == (arm, against, task)]
    return one


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arm", "task"), list(product(ARMS, TASKS)))
def test_the_scores_are_those_on_test_by_seed(results, arm, task):
    one = one_score(results, arm, task, TASKS[task]["metric"])
    expected = [score(arm, task, seed) for seed in range(SEEDS)]
    assert (one.seeds, one.scores) == (list(range(SEEDS)), expected)
    assert one.mean == pytest.approx(fmean(expected))
    assert one.std == pytest.approx(stdev(expected))
    interval = stats.t.interval(0.95, SEEDS - 1, fmean(expected), stats.sem(expected))
    assert (one.low, one.high) == pytest.approx(interval)


def test_glues_second_metrics_stand_beside_the_main_ones(results):
    columns = list(dict.fromkeys((one.task, one.metric) for one in results.scores))
    assert columns == [
        ("cola", "matthews"),
        ("mrpc", "f1"),
        ("mrpc", "accuracy"),
        ("stsb", "pearson"),
        ("stsb", "spearman"),
        (MEAN, MEAN),
    ]
    second = one_score(results, "kd", "stsb", "spearman")
    assert second.mean == pytest.approx(one_score(results, "kd", "stsb", "pearson").mean - 0.01)


@pytest.mark.parametrize("arm", ARMS)
def test_the_mean_over_tasks_is_taken_seed_by_seed(results, arm):
    one = one_score(results, arm, MEAN, MEAN)
    assert one.scores == pytest.approx(
        [fmean(score(arm, task, seed) for task in TASKS) for seed in range(SEEDS)]
    )


def test_the_expert_that_teaches_has_its_own_score(results):
    """Seed 1 is the best on dev, see ``metrics_of``: (3·1 + 1) % 5 = 4."""
    one = one_score(results, SELECTED, "cola", "matthews")
    assert (one.seeds, one.scores) == ([1], [score("expert", "cola", 1)])
    assert (one.std, one.low, one.high) == (None, None, None)
    mean = one_score(results, SELECTED, MEAN, MEAN)
    assert mean.mean == pytest.approx(fmean(score("expert", task, 1) for task in TASKS))
    gain = 100 * (one_score(results, "kd", "cola", "matthews").mean - one.mean)
    told = f"mean of kd − {SELECTED}, in points: {gain:+.2f} on cola"
    assert any(note.startswith(told) for note in results.notes)


# --- differences ----------------------------------------------------------------------------------


def test_what_is_compared_with_what(results):
    expected = [
        *((arm, "expert", task) for arm in ARMS[1:] for task in (*TASKS, MEAN)),
        *((arm, "mlm", task) for arm in ("kd", "both", "mixture") for task in (*TASKS, MEAN)),
        *((arm, "longer", task) for arm in ("kd", "both", "mixture") for task in (*TASKS, MEAN)),
    ]
    assert [(d.arm, d.against, d.task) for d in results.differences] == expected


@pytest.mark.parametrize(
    ("arm", "against", "task"), [("both", "mlm", "cola"), ("longer", "expert", "mrpc")]
)
def test_a_difference_is_paired_by_seed(results, arm, against, task):
    one = one_difference(results, arm, against, task)
    first, second = ([score(a, task, s) for s in range(SEEDS)] for a in (against, arm))
    test = stats.ttest_rel(second, first)
    assert one.mean == pytest.approx(fmean(second) - fmean(first))
    assert one.p == pytest.approx(test.pvalue)
    assert (one.low, one.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert one.n == SEEDS


@pytest.mark.parametrize(("against", "tests"), [("expert", 20), ("mlm", 12), ("longer", 12)])
def test_p_is_adjusted_over_all_tests_against_the_same_arm(results, against, tests):
    family = [one for one in results.differences if one.against == against]
    assert len(family) == tests
    assert [one.p_adjusted for one in family] == holm([one.p for one in family])
    assert any(f"{tests} against {against}" in note for note in results.notes)


def test_seeds_are_paired_by_their_number_not_by_chance(out):
    """The same runs, written in another order, are no longer the same seeds in the same order."""
    edit(out / "fine-tuned/kd/cola/metrics.json", lambda m: m["per_seed"].reverse())
    with pytest.raises(CheckpointError, match="seeds"):
        read_results(out)


# --- search, costs, settings ----------------------------------------------------------------------


def test_the_search_is_told_with_all_that_it_tried(results):
    assert [(one.arm, one.task) for one in results.searched] == list(product(ARMS, TASKS))
    for one in results.searched:
        assert one.chosen == {"learning_rate": 5e-5}
        assert [point.settings["learning_rate"] for point in one.tried] == GRID["learning_rate"]
        assert [point.mean for point in one.tried] == pytest.approx([0.4, 0.5, 0.45])
        assert one.tried[1].dev_scores == [0.55, 0.55 - 0.1]
        assert one.tried[1].seeds == [0, 1]


def test_every_stage_has_its_seconds(results):
    costs = results.costs
    assert costs["experts/cola"] == costs["fine-tuned/kd/stsb"] == 7.5
    assert costs["search/longer/mrpc"] == 3 * 3.0
    assert (costs["students/mlm"], costs["students/mixture"]) == (40, 60)
    assert (costs["cache/cola"], costs["cache/mrpc"]) == (7, 8)
    assert "cache/stsb" not in costs  # not recorded
    assert len(costs) == 6 * 3 * 2 + 3 + 2


def test_the_settings_are_those_of_the_cycle(results):
    assert results.settings["seeds"] == SEEDS
    assert results.settings["search"] == GRID
    assert "tasks" not in results.settings


def test_without_a_search_nothing_is_told_of_one(tmp_path):
    results = read_results(cycle(tmp_path / "c", ARMS[:2], ["cola"], search={}))
    assert results.searched == []
    assert not any("chosen on dev" in note for note in results.notes)


def test_a_choice_at_the_edge_is_told(out):
    for value, dev in ((2e-5, 0.7), (5e-5, 0.55)):
        path = out / f"search/kd/cola/{value:g}/metrics.json"
        write(
            path,
            metrics_of(
                out,
                "kd",
                "cola",
                seeds=2,
                test=False,
                dev=[dev, dev - 0.1],
                config={"learning_rate": value},
            ),
        )
    finetuned(out, "kd", "cola", config={"learning_rate": 2e-5})
    notes = read_results(out).notes
    assert [note for note in notes if "at an edge" in note and note.endswith("kd on cola")]


# --- unfinished -----------------------------------------------------------------------------------


def test_a_cycle_that_has_only_begun(tmp_path):
    write(tmp_path / "cycle.json", about())
    results = read_results(tmp_path)
    assert (results.scores, results.differences, results.searched) == ([], [], [])
    assert results.notes[0].startswith("unfinished, not there yet: expert on cola, mrpc, stsb")
    assert "tasks and their examples" in as_text(results)


def test_what_is_missing_is_named_and_the_rest_compared(out):
    shutil.rmtree(out / "fine-tuned/mixture/stsb")
    shutil.rmtree(out / "fine-tuned/mlm")
    shutil.rmtree(out / "search/mlm/stsb")
    results = read_results(out)
    assert results.notes[0] == (
        "unfinished, not there yet: mlm on cola, mrpc, stsb; mixture on stsb: these arms have no "
        "mean over tasks"
    )
    assert {one.task for one in results.differences if one.arm == "mixture"} == {"cola", "mrpc"}
    assert not any(one.against == "mlm" for one in results.differences)
    assert not any(one.arm == "mlm" for one in results.scores)
    (mlm, *_) = [one for one in results.searched if one.arm == "mlm"]
    assert (len(mlm.tried), mlm.chosen) == (3, None)


def test_a_search_under_way(out):
    """Before the arm is fine-tuned, the search may be of fewer settings."""
    shutil.rmtree(out / "fine-tuned/kd/cola")
    shutil.rmtree(out / "search/kd/cola/5e-05")
    (one,) = [s for s in read_results(out).searched if (s.arm, s.task) == ("kd", "cola")]
    assert [point.settings["learning_rate"] for point in one.tried] == [2e-5, 1e-4]


def test_one_task_has_no_mean_over_tasks(tmp_path):
    results = read_results(cycle(tmp_path / "c", ARMS[:2], ["cola"]))
    assert {one.task for one in results.scores} == {one.task for one in results.differences}
    assert {one.task for one in results.scores} == {"cola"}


def test_a_single_seed_has_no_interval_and_no_test(tmp_path):
    results = read_results(cycle(tmp_path / "c", ARMS[:2], ["cola"], seeds=1))
    (one,) = results.differences
    assert (one.low, one.p, one.p_adjusted, one.n) == (None, None, None, 1)
    assert any("fewer than 5 seeds" in note for note in results.notes)
    assert "–" in as_text(results)


def test_the_same_gain_with_every_seed_is_told(tmp_path):
    out = cycle(tmp_path / "c", ["expert", "mlm"], ["cola"])

    def gain(metrics):
        for run in metrics["per_seed"]:
            run["test_scores"]["matthews"] = score("expert", "cola", run["seed"]) + 0.125

    edit(out / "fine-tuned/mlm/cola/metrics.json", gain)
    results = read_results(out)
    assert results.differences[0].p is None
    assert any("mlm − expert on cola" in n and "no test can be made" in n for n in results.notes)


# --- tables ---------------------------------------------------------------------------------------


def test_the_json_gives_the_same_tables_again(results):
    told = json.loads(json.dumps(results.as_dict() | {"more": 1}, allow_nan=False))
    again = CycleResults.from_dict(told)
    assert again == results
    assert as_markdown(again) == as_markdown(results)
    assert as_text(again, 120) == as_text(results, 120)


@pytest.mark.parametrize("wrong", [{}, {"arms": []}])
def test_what_are_no_results_is_refused(wrong):
    with pytest.raises(InputError, match="not the results of a cycle"):
        CycleResults.from_dict(wrong)


def test_the_cells_are_percent_as_in_glue(results):
    scores, against_expert, *_ = tables_of(results)
    one = one_score(results, "both", "mrpc", "accuracy")
    row = next(row for row in rows_of(scores) if row[0] == "both")
    cells = dict(zip([column.title for column in scores.columns], row, strict=True))
    assert cells["mrpc accuracy"] == f"{100 * one.mean:.2f} ± {100 * one.std:.2f}"
    assert cells["seeds"] == "5"
    selected = next(row for row in rows_of(scores) if row[0] == SELECTED)
    assert selected[1] == "1"
    assert not any("±" in cell for cell in selected)
    difference = one_difference(results, "longer", "expert", "cola")
    assert rows_of(against_expert)[0][:3] == (*("longer", "cola", f"{100 * difference.mean:+.2f}"),)


def test_the_chosen_setting_has_a_star(results):
    (search,) = [table for table in tables_of(results) if table.title.startswith("search")]
    assert [column.title for column in search.columns[2:]] == ["2e-05", "5e-05", "0.0001"]
    assert {row[2:] for row in rows_of(search)} == {("40.00 ", "50.00*", "45.00 ")}


def test_text_and_markdown_have_the_same_cells(results):
    text, markdown = as_text(results, 500), as_markdown(results)
    for table in tables_of(results):
        assert table.title in text
        for row in rows_of(table):
            for cell in row:
                assert cell.strip() in text
                assert cell.strip().replace("*", "\\*").replace("<", "\\<") in markdown
    for note in results.notes:
        assert f"note: {note}" in text


def test_every_line_of_a_markdown_table_has_as_many_cells(results):
    blocks = as_markdown(results).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == len(tables_of(results))
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_where_the_scores_do_not_fit_an_arm_is_a_column(results):
    few = replace(results, scores=[one for one in results.scores if one.arm in ARMS[:2]])
    assert as_text(few, 400).splitlines()[1].split()[:2] == ["arm", "seeds"]
    lines = as_text(few, 70).splitlines()
    assert lines[1].split() == ["arm", *ARMS[:2]]
    assert any(line.split()[:2] == ["mrpc", "accuracy"] for line in lines)


def test_what_must_be_said_is_said(results):
    told = "\n".join(results.notes)
    for needed in (
        "44 paired t-tests",
        "Holm",
        "one student per arm was pre-trained",
        "best of its seeds on dev",
        "twice the epochs",
        "chosen on dev",
    ):
        assert needed in told
