"""The results of a cycle: read from what its stages leave, refused where that does not fit."""

import json
import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy import stats

from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.results import CycleResults, read_results
from rekindle.pipeline.cycle.scores import MEAN, SELECTED
from rekindle.pipeline.cycle.tables import as_markdown, as_text, tables_of
from rekindle.pipeline.report.significance import holm

ARMS = ["expert", "longer", "mlm", "kd", "both", "mixture"]
TASKS = {
    "cola": {"metric": "matthews", "train": 8000, "dev": 551, "test": 1043, "pairs": False},
    "mrpc": {"metric": "f1", "train": 3300, "dev": 368, "test": 408, "pairs": True},
    "stsb": {"metric": "pearson", "train": 5000, "dev": 749, "test": 1500, "pairs": True},
}
GRID = {"learning_rate": [2e-5, 5e-5, 1e-4]}
SEEDS = 5
CONFIG = {
    "epochs": 3,
    "max_steps": None,
    "batch_size": 32,
    "learning_rate": 5e-5,
    "schedule": "linear",
    "warmup": 0.1,
    "weight_decay": 0.01,
    "max_length": 128,
    "precision": "auto",
    "patience": None,
    "head": None,
    "merge": None,
}


def test_score(arm, task, seed):
    """Anything that is neither equal nor in order."""
    gain = 0.01 * ARMS.index(arm) * (1 + list(TASKS).index(task))
    return 0.5 + gain + 0.011 * math.sin(17 * seed + 5 * ARMS.index(arm)) + 0.003 * seed


test_score.__test__ = False  # the name is the field's


def scores_of(task, main):
    if task == "stsb":
        return {"pearson": main, "spearman": main - 0.01}
    return {"accuracy": main + 0.2, "f1": main, "matthews": main}


def metrics_of(out, arm, task, *, seeds=SEEDS, config=None, test=True, dev=None):
    """What `pipeline finetune` writes (FinetuneResult.as_dict), with the scores above."""
    splits = ("train", "dev", "test") if test else ("train", "dev")
    dev = dev or [0.4 + 0.05 * ((3 * seed + 1) % 5) for seed in range(seeds)]
    per_seed = [
        {
            "seed": seed,
            "scores": scores_of(task, dev[seed]),
            "test_scores": scores_of(task, test_score(arm, task, seed)) if test else None,
            "epochs": [],
            "seconds": 1.5,
        }
        for seed in range(seeds)
    ]
    regression = task == "stsb"
    config = CONFIG | (config or {})
    if arm == "longer":
        config["epochs"] *= 2
    return {
        "written_by": "rekindle finetune",
        "model": "start" if arm in ("expert", "longer") else str(out / "students" / arm),
        "files": {split: str(out / "tasks" / task / f"{split}.jsonl") for split in splits},
        "problem": "regression" if regression else "single_label_classification",
        "label_names": [] if regression else ["no", "yes"],
        "metric": TASKS[task]["metric"],
        "per_seed": per_seed,
        "mean": fmean(dev),
        "std": stdev(dev) if seeds > 1 else None,
        "test_mean": None,
        "best_seed": dev.index(max(dev)),
        "seconds": 1.5 * seeds,
        "precision": "fp32",
        "config": config,
        "versions": {"rekindle": "0.1.0", "torch": "2.13"},
        "baselines": None,
    }


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def finetuned(out, arm, task, **changes):
    write(out / folder_of(arm, task) / "metrics.json", metrics_of(out, arm, task, **changes))


def searched(out, arm, task, **changes):
    """The middle one, which CONFIG has, is the best on dev."""
    for value, dev in zip(GRID["learning_rate"], (0.45, 0.55, 0.5), strict=True):
        metrics = metrics_of(
            out,
            arm,
            task,
            **{"seeds": 2, "test": False, "dev": [dev, dev - 0.1]} | changes,
            config={"learning_rate": value},
        )
        write(out / "search" / arm / task / f"{value:g}" / "metrics.json", metrics)


def about(arms=ARMS, tasks=TASKS, search=GRID, seeds=SEEDS):
    return {
        "written_by": "rekindle cycle",
        "arms": list(arms),
        "tasks": {name: TASKS[name] for name in tasks},
        "search": search,
        "seeds": seeds,
        "finetune": {"epochs": 3},
        "teacher_of": {"mixture": list(tasks)},
    }


def cycle(out, arms=ARMS, tasks=TASKS, search=GRID, seeds=SEEDS):
    write(out / "cycle.json", about(arms, tasks, search, seeds))
    for arm, task in product(arms, tasks):
        if search:
            searched(out, arm, task)
        finetuned(out, arm, task, seeds=seeds)
    return out


def student(out, name, seconds, **passes):
    home = out / "students" / name
    write(home / "summary.json", {"steps": 10, "seconds": seconds})
    write(home / "run.json", {"cache": {"teachers": {}, "teacher_seconds": passes}})


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = cycle(tmp_path_factory.mktemp("cycles") / "whole")
    student(out, "mlm", 40.0)
    student(out, "kd-cola", 50.0, cola=7.0)
    student(out, "mixture", 60.0, cola=7.0, mrpc=8.0, stsb=None)
    return out


@pytest.fixture(scope="module")
def results(made):
    return read_results(made)


@pytest.fixture
def out(made, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


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
    expected = [test_score(arm, task, seed) for seed in range(SEEDS)]
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
        [fmean(test_score(arm, task, seed) for task in TASKS) for seed in range(SEEDS)]
    )


def test_the_expert_that_teaches_has_its_own_score(results):
    """Seed 1 is the best on dev, see ``metrics_of``: (3·1 + 1) % 5 = 4."""
    one = one_score(results, SELECTED, "cola", "matthews")
    assert (one.seeds, one.scores) == ([1], [test_score("expert", "cola", 1)])
    assert (one.std, one.low, one.high) == (None, None, None)
    mean = one_score(results, SELECTED, MEAN, MEAN)
    assert mean.mean == pytest.approx(fmean(test_score("expert", task, 1) for task in TASKS))
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
    first, second = ([test_score(a, task, s) for s in range(SEEDS)] for a in (against, arm))
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
            score = test_score("expert", "cola", run["seed"]) + 0.125
            run["test_scores"]["matthews"] = score

    edit(out / "fine-tuned/mlm/cola/metrics.json", gain)
    results = read_results(out)
    assert results.differences[0].p is None
    assert any("mlm − expert on cola" in n and "no test can be made" in n for n in results.notes)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 4), ("batch_size", 16), ("warmup", 0.2), ("patience", 2), ("max_steps", 100)],
)
def test_another_budget_is_refused_with_both_folders(out, key, value):
    path = out / "fine-tuned/kd/mrpc/metrics.json"
    edit(path, lambda metrics: metrics["config"].update({key: value}))
    with pytest.raises(CheckpointError, match=rf"experts/mrpc and .*kd/mrpc .*{key}"):
        read_results(out)


def test_longer_must_be_twice_as_long(out):
    path = out / "fine-tuned/longer/cola/metrics.json"
    for epochs in (3, 5, 12):
        edit(path, lambda metrics, epochs=epochs: metrics["config"].update(epochs=epochs))
        with pytest.raises(CheckpointError, match=r"epochs \(longer: halved\)"):
            read_results(out)


def test_longer_has_twice_the_steps_where_they_are_limited(tmp_path):
    out = cycle(tmp_path / "c", ARMS[:2], ["cola"], search={})
    for arm, steps in (("expert", 50), ("longer", 100)):
        path = out / folder_of(arm, "cola") / "metrics.json"
        edit(path, lambda metrics, steps=steps: metrics["config"].update(max_steps=steps))
    assert read_results(out).differences
    edit(path, lambda metrics: metrics["config"].update(max_steps=50))
    with pytest.raises(CheckpointError, match="max_steps"):
        read_results(out)


def test_what_test_shares_with_train_is_told(out):
    assert not any("also in train" in note for note in read_results(out).notes)
    edit(out / "cycle.json", lambda m: m["tasks"]["mrpc"].update(test_in_train=1234))
    results = read_results(out)
    assert "test examples whose text is also in train: 1,234 of mrpc" in results.notes
    assert CycleResults.from_dict(json.loads(json.dumps(results.as_dict()))) == results


def test_a_precision_that_was_searched_may_differ_between_arms(tmp_path):
    for name, search in (("searched", {"precision": ["fp32", "bf16"]}), ("not", {})):
        out = cycle(tmp_path / name, ARMS[:2], ["cola"], search={})
        for arm, precision in zip(ARMS[:2], ("fp32", "bf16"), strict=True):
            path = out / folder_of(arm, "cola") / "metrics.json"
            edit(path, lambda m, p=precision: m.update(precision=p))
            edit(path, lambda m, p=precision: m["config"].update(precision=p))
            for value, dev in (("fp32", 0.5), ("bf16", 0.5)) if search else ():
                tried = metrics_of(
                    out, arm, "cola", seeds=1, test=False, dev=[dev], config={"precision": value}
                )
                write(out / f"search/{arm}/cola/{value}/metrics.json", tried | {"precision": value})
        edit(out / "cycle.json", lambda m, search=search: m.update(search=search))
        if search:
            assert {one.chosen["precision"] for one in read_results(out).searched} == {
                "fp32",
                "bf16",
            }
        else:
            with pytest.raises(CheckpointError, match="precision"):
                read_results(out)


def test_a_setting_that_only_one_has_is_refused(out):
    edit(out / "fine-tuned/kd/cola/metrics.json", lambda m: m["config"].pop("warmup"))
    with pytest.raises(CheckpointError, match="warmup"):
        read_results(out)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["files"].update(train="other/cola/train.jsonl"), "files"),
        (lambda m: m.update(precision="bf16"), "precision in use"),
        (lambda m: m.update(label_names=["yes", "no"]), "label_names"),
        (lambda m: m.update(metric="accuracy"), "metric"),
        (lambda m: m["per_seed"][0].update(seed=9), "seeds"),
        (lambda m: m["per_seed"].pop(), "4 seeds"),
        (lambda m: [run.update(test_scores=None) for run in m["per_seed"]], "no test scores"),
        (lambda m: m["per_seed"][2].update(seed=0), "seeds"),
        (lambda m: m.update(best_seed=0), "not the best on dev"),
        (lambda m: m.update(best_seed=77), "finetune"),
        (lambda m: m["per_seed"][0]["test_scores"].pop("matthews"), "matthews"),
        (lambda m: m["per_seed"][0]["test_scores"].update(matthews="0.5"), "finetune"),
        (lambda m: m["per_seed"][0]["test_scores"].update(matthews=math.nan), "NaN"),
        (lambda m: m.pop("config"), "config"),
        (lambda m: m.update(written_by="someone"), "someone"),
        (lambda m: m.update(per_seed=3), "finetune"),
    ],
)
def test_doubtful_data_is_refused(out, change, told):
    edit(out / "fine-tuned/both/cola/metrics.json", change)
    with pytest.raises(CheckpointError, match=told) as caught:
        read_results(out)
    assert "both/cola" in str(caught.value)


def test_seeds_must_be_the_same_across_tasks(tmp_path):
    """Or else the mean over tasks would be over runs that have nothing in common."""
    out = cycle(tmp_path / "c", ARMS[:2], ["cola", "mrpc"], search={})
    for arm in ARMS[:2]:
        path = out / folder_of(arm, "mrpc") / "metrics.json"
        edit(path, lambda m: [run.update(seed=run["seed"] + 5) for run in m["per_seed"]])
        edit(path, lambda m: m.update(best_seed=m["best_seed"] + 5))
    with pytest.raises(CheckpointError, match=r"cola and .*mrpc .* seeds"):
        read_results(out)


def test_an_arm_that_was_searched_otherwise_is_refused(out):
    searched(out, "both", "cola", seeds=3, dev=[0.5, 0.4, 0.3])
    with pytest.raises(CheckpointError, match=r"search/.*seeds"):
        read_results(out)


def test_an_arm_that_was_searched_less_is_refused(out):
    shutil.rmtree(out / "search/both/cola/0.0001")
    with pytest.raises(CheckpointError, match=r"lacks learning_rate 0\.0001"):
        read_results(out)


def test_a_setting_outside_the_search_is_refused(out):
    metrics = metrics_of(
        out, "both", "cola", seeds=2, test=False, dev=[0.5, 0.4], config={"learning_rate": 1e-3}
    )
    write(out / "search/both/cola/0.001/metrics.json", metrics)
    with pytest.raises(CheckpointError, match="not of this search"):
        read_results(out)


def test_a_choice_that_dev_did_not_make_is_refused(out):
    """Such as one by test scores."""
    finetuned(out, "both", "cola", config={"learning_rate": 1e-4})
    with pytest.raises(CheckpointError, match="not what its search"):
        read_results(out)


@pytest.mark.parametrize(
    "name",
    [
        "cycle.json",
        "experts/cola/metrics.json",
        "search/kd/cola/5e-05/metrics.json",
        "students/mlm/summary.json",
    ],
)
@pytest.mark.parametrize("content", ["", '{"cut off', "[1]", '{"mean": NaN}'])
def test_damaged_json_is_named(out, name, content):
    (out / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_results(out)
    assert name in str(caught.value)


def test_what_is_no_cycle_is_the_users_mistake(tmp_path):
    with pytest.raises(InputError, match="no directory of"):
        read_results(tmp_path / "nowhere")
    write(tmp_path / "cycle.json", {"written_by": "another"})
    with pytest.raises(InputError, match="no directory of"):
        read_results(tmp_path)


@pytest.mark.parametrize("name", ["../cola", "a/b", "", "..", MEAN])
def test_names_stay_in_the_cycles_directory(tmp_path, name):
    write(tmp_path / "cycle.json", about() | {"tasks": {name: TASKS["cola"]}})
    with pytest.raises(CheckpointError, match="is no name"):
        read_results(tmp_path)


def test_a_task_without_its_sizes_is_damage(tmp_path):
    write(tmp_path / "cycle.json", about() | {"tasks": {"cola": {"metric": "matthews"}}})
    with pytest.raises(CheckpointError, match="train"):
        read_results(tmp_path)


def test_a_cycle_may_be_moved_and_resumed(out):
    """Its paths in metrics.json are then of two places."""
    path = out / "fine-tuned/both/cola/metrics.json"
    edit(path, lambda m: m["files"].update(train="elsewhere/tasks/cola/train.jsonl"))
    assert read_results(out).differences


def test_other_packages_are_told(out):
    path = out / "fine-tuned/both/cola/metrics.json"
    edit(path, lambda metrics: metrics["versions"].update(torch="2.12"))
    assert any("same torch" in note for note in read_results(out).notes)


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
    row = next(row for row in scores.rows if row[0] == "both")
    cells = dict(zip(scores.head, row, strict=True))
    assert cells["mrpc accuracy"] == f"{100 * one.mean:.2f} ± {100 * one.std:.2f}"
    assert cells["seeds"] == "5"
    selected = next(row for row in scores.rows if row[0] == SELECTED)
    assert selected[1] == "1"
    assert not any("±" in cell for cell in selected)
    difference = one_difference(results, "longer", "expert", "cola")
    assert against_expert.rows[0][:3] == ["longer", "cola", f"{100 * difference.mean:+.2f}"]


def test_the_chosen_setting_has_a_star(results):
    (search,) = [table for table in tables_of(results) if table.title.startswith("search")]
    assert search.head[2:] == ["2e-05", "5e-05", "0.0001"]
    assert {tuple(row[2:]) for row in search.rows} == {("40.00 ", "50.00*", "45.00 ")}


def test_text_and_markdown_have_the_same_cells(results):
    text, markdown = as_text(results, 500), as_markdown(results)
    for table in tables_of(results):
        assert table.title in text
        for row in table.rows:
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
