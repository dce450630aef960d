"""Runs beside each other: what is read, what differs, what is best, what may not be compared."""

import json
import math
import re
import shutil

import pytest

from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.compare.page import comparison_html
from rekindle.pipeline.compare.runs import compare_runs
from rekindle.pipeline.compare.tables import NOTHING, as_text, columns_of, domain_matrix
from testlib.compared.runs import LM, about, rows_of

KEYS = {
    "corpus",
    "runs",
    "best",
    "notes",
    "compared",
    "matched_steps",
    "matched_cost",
    "domains",
    "tasks",
}
RUN_KEYS = {
    *("name", "directory", "finished", "steps", "planned_steps", "seconds", "tokens_per_second"),
    *("data_wait", "evaluation", "coverage", "scores", "settings", "heads", "curve"),
}


# --- what is shown --------------------------------------------------------------------------------


def test_the_table_shows_what_differs_and_marks_nothing_that_may_be_chance(write):
    runs = [write("a", loss=4.0), write("b", loss=5.0, seed=7, speed=200.0)]
    text = as_text(compare_runs(runs), 999)
    assert rows_of(text) == {
        "run": ["a", "b"],
        "seed": ["0", "7"],
        "steps": ["4", "4"],
        "seconds": ["12.3", "12.3"],
        "tokens/s": ["120", "240"],
        "data wait": ["4.0%", "4.0%"],
        "loss": ["4.0000", "5.0000"],
        "kl/lm": ["2.0000", "2.5000"],
        "agreement/lm": ["0.2500", "0.2000"],
        "KD sequences": ["75.0%", "75.0%"],
        "KD tokens": ["90.0%", "90.0%"],
    }
    assert "*" not in text


def test_tokens_that_no_expert_teaches_have_no_line(write):
    """0 % of the tokens would look as if the distillation had not worked."""
    run = write("a")
    summary = json.loads((run / "summary.json").read_text())
    summary["coverage"]["positions_with_kd"] = 0
    (run / "summary.json").write_text(json.dumps(summary))
    shown = rows_of(as_text(compare_runs([run, write("b")]), 999))
    assert shown["KD tokens"] == ["0.0%", "90.0%"]
    shown = rows_of(as_text(compare_runs([run]), 999))
    assert "KD sequences" in shown
    assert "KD tokens" not in shown


def test_json_has_everything(write):
    found = compare_runs([write("a", loss=4.0), write("b", seed=7)]).as_dict()
    assert found.keys() == KEYS
    assert [run.keys() for run in found["runs"]] == [RUN_KEYS, RUN_KEYS]
    first, second = found["runs"]
    assert first["tokens_per_second"] == pytest.approx(600 / (200 / 200 + 400 / 100))
    assert first["settings"] == {"train.seed": 0}
    assert second["settings"] == {"train.seed": 7}
    assert first["coverage"]["sequences_with_kd"] == 30
    assert found["best"] == {"loss": ["a"], "kl/lm": ["a"], "agreement/lm": ["a"]}
    assert found["notes"] == []
    assert found["corpus"] == "c1"


def test_a_run_of_an_older_version_differs_in_no_key_that_it_had_not(write):
    runs = [write(name, student={"grow": {"layers": 4}}) for name in ("old", "new")]
    recorded = json.loads((runs[0] / "run.json").read_text())
    del recorded["student"]["grow"]["noise_std"], recorded["train"]["keep_best"]
    recorded["student"]["grow"]["noise"] = 0.0
    (runs[0] / "run.json").write_text(json.dumps(recorded))
    assert [run.settings for run in compare_runs(runs).runs] == [{}, {}]


def test_a_single_run_has_no_best_and_nothing_differs(write):
    text = as_text(compare_runs([write("a")]), 999)
    assert list(rows_of(text))[:2] == ["run", "steps"]
    assert "*" not in text


def test_equals_are_not_marked_and_all_of_the_best_are(write):
    runs = [write("a", loss=4.0), write("b", loss=4.0, seed=1), write("c", loss=5.0, seed=2)]
    best = compare_runs(runs).best
    assert best["loss"] == ["a", "b"]
    assert "tokens_per_second" not in best


def test_an_unfinished_run_is_shown_but_is_never_the_best(write):
    runs = [write("a", loss=5.0), write("b", loss=1.0, done=2, seed=1), write("c", seed=2, loss=6)]
    comparison = compare_runs(runs)
    table = rows_of(as_text(comparison, 999))
    assert table["steps"] == ["4", "unfinished at 2 of 4", "4"]
    assert table["seconds"][1] == NOTHING
    assert table["loss"] == ["5.0000", "1.0000", "6.0000"]
    assert not comparison.runs[1].finished


def test_a_run_before_its_first_step_is_shown(write):
    run = write("a", done=1)
    (run / "metrics.jsonl").unlink()
    comparison = compare_runs([run, write("b", seed=1)])
    assert rows_of(as_text(comparison, 999))["steps"] == ["unfinished at 0 of 4", "4"]
    assert comparison.runs[0].evaluation == {}


def test_terms_are_compared_one_by_one_or_as_a_whole(write):
    cooler = {"distill": [LM | {"temperature": 1.0, "weight": {"over": 0.5}}]}
    one, other = write("a"), write("b", objective=cooler)
    table = rows_of(as_text(compare_runs([one, other]), 999))
    assert table["distill.0.temperature"] == ["2", "1"]
    assert table["distill.0.weight"] == [
        "1",
        "{schedule: linear, from: 1.0, to: 0.0, over: 0.5}",
    ]
    none = write("c", objective={"distill": []})
    table = rows_of(as_text(compare_runs([one, none]), 999))
    assert table["objective.distill"] == ["[{teachers: [lm], temperature: 2.0}]", "[]"]
    assert not any("temperature" in name for name in table)


def test_a_table_that_is_too_wide_lies_down(write):
    """A run is then a column; every cell that stood is there, best ones with their star."""
    runs = [write("a"), write("b", seed=1, learning_rate=0.5)]
    comparison = compare_runs(runs)
    upright, lying = (as_text(comparison, width) for width in (999, 60))
    assert max(map(len, lying.splitlines())) <= 60 < max(map(len, upright.splitlines()))
    standing = rows_of(upright)
    lines = lying.split(" loss (what")[0].splitlines()[2:]
    found = {line[2:].split("  ")[0]: line.split()[-2:] for line in lines}
    assert found == {name: cells for name, cells in standing.items() if name != "run"}
    assert lying.splitlines()[0].split()[1:] == ["a", "b"]


def test_steps_have_one_column(write):
    table = rows_of(as_text(compare_runs([write("a"), write("b", steps=3)]), 999))
    assert table["steps"] == ["4", "3"]
    assert list(table)[1] == "steps"


def test_scores_of_fine_tuning_below_a_run(write):
    one, other = write("a"), write("b", seed=1)
    for run, score in ((one, 0.5), (other, 0.75)):
        (run / "cola").mkdir()
        metrics = {"metric": "matthews", "mean": score, "per_seed": []}
        (run / "cola" / "metrics.json").write_text(json.dumps(metrics))
    comparison = compare_runs([one, other])
    assert comparison.runs[0].scores == {"cola matthews": 0.5}
    assert comparison.standings == []  # of no seed


def test_task_scores_stand_first_with_a_verdict_and_a_star_for_what_is_no_chance(write):
    """Of the folders below the runs; only the best by more than chance has a star."""

    def scored(name, scores, seed):
        run = write(name, seed=seed)
        for task, more in (("trec", 0.0), ("mood", 0.2 * (name == "b"))):
            own = [{"scores": {}, "test_scores": {"accuracy": s + more}} for s in scores]
            per_seed = [{"seed": n} | one for n, one in enumerate(own)]
            (run / task).mkdir()
            metrics = {"metric": "accuracy", "mean": 0.5, "per_seed": per_seed}
            (run / task / "metrics.json").write_text(json.dumps(metrics))
        return run

    runs = [scored("a", [0.7, 0.72, 0.71], 0), scored("b", [0.71, 0.7, 0.73], 1)]
    comparison = compare_runs(runs)
    text = as_text(comparison, 999)
    first, second = text.splitlines()[:2]
    assert first.strip().startswith("b is best on mood by 0.203 [0.152, 0.255] over a (accuracy ")
    assert second.strip().startswith("No run is shown to be best on trec: b has the highest score")
    parts = text.split("\n\n")
    mood, trec = (rows_of(next(p for p in parts if f" {t} (test)" in p)) for t in ("mood", "trec"))
    assert (mood["run"], mood["accuracy"]) == (["b", "a"], ["0.9133*", "0.7100"])
    assert trec["accuracy"] == ["0.7133", "0.7100"]
    assert text.index("trec (test)") < text.index("tokens/s")
    assert [*mood][2:4] == ["b better by", "interval"]
    page = comparison_html(comparison)
    assert re.search(r"0\.2033<small>0\.15\d\d … 0\.25\d\d</small>", page)  # seen on a telephone
    assert page.index("b is best on mood") < page.index(">Scores<") < page.index(">Runs<")
    assert [one["is_best"] for one in comparison.as_dict()["tasks"]] == [True, False]


def test_a_score_on_dev_says_what_dev_has_chosen_and_an_f1_what_it_is_of(write):
    """Where the best epoch on dev is kept; the recorded name is still that of the metric."""
    runs = [write("a"), write("b", seed=1)]
    for run, patience in zip(runs, (5, None), strict=True):
        for task, names in (("trec", ["x", "y", "z"]), ("mood", ["no", "yes"])):
            seeds = [{"seed": 0, "scores": {"f1": 0.5 + 0.1 * (run == runs[0])}, "kept_epoch": 2}]
            metrics = {"metric": "f1", "per_seed": seeds, "label_names": names}
            config = {"patience": patience if task == "trec" else None}
            metrics |= {"problem": "single_label_classification", "config": config}
            (run / task).mkdir()
            (run / task / "metrics.json").write_text(json.dumps(metrics))
    comparison = compare_runs(runs)
    text = as_text(comparison, 999)
    chosen = "dev, which also chose the epochs"
    assert f"trec (macro f1 0.6000 on {chosen})" in text
    assert f" trec ({chosen})" in text
    assert "mood (f1 0.6000 on dev)" in text
    assert [one["metric"] for one in comparison.as_dict()["tasks"]] == ["f1", "f1"]


@pytest.mark.parametrize(("names", "shown"), [("xyz", "macro f1"), ("xy", "f1")])
def test_a_score_of_an_older_version_is_compared_with_one_that_says_what_its_f1_is_of(
    write, names, shown
):
    for run, told in ((write("a"), None), (write("b", seed=1), [*names])):
        seeds = [{"seed": n, "scores": {"f1": 0.5 + 0.01 * n}} for n in range(5)]
        metrics = {"metric": "f1", "per_seed": seeds}
        if told:
            metrics |= {"problem": "single_label_classification", "label_names": told}
        (run / "trec").mkdir()
        (run / "trec" / "metrics.json").write_text(json.dumps(metrics))
    (standing,) = compare_runs([run.parent / "a", run.parent / "b"]).standings
    assert [*standing.scores.scores] == ["a", "b"]
    assert standing.scores.measured == shown


def test_runs_with_heads_and_no_score_say_how_one_gets_it(write):
    runs = [write("a"), write("b", seed=1)]
    assert "`pipeline finetune RUN … --out RUN/TASK`" in as_text(compare_runs(runs), 999)
    assert "finetune" not in as_text(compare_runs(runs[:1]), 999)
    for run in runs:
        (run / "rekindle_student.json").write_text('{"heads": {"trec": {}}}')
    told = as_text(compare_runs(runs), 999)
    assert "`--test trec=FILE` scores the runs' heads (trec)" in told


def test_what_is_no_number_is_null_and_never_the_best(write):
    runs = [write("a", evaluation={"loss": math.nan}), write("b", seed=1), write("c", 6.0, seed=2)]
    comparison = compare_runs(runs)
    assert comparison.best["loss"] == ["b"]
    shown = json.dumps(comparison.as_dict(), allow_nan=False)
    assert json.loads(shown)["runs"][0]["evaluation"] == {"loss": None}


def test_names_are_the_ends_that_tell_directories_apart(write, monkeypatch, tmp_path):
    runs = [write("x/a"), write("y/a", seed=1), write("b", seed=2)]
    assert [run.name for run in compare_runs(runs).runs] == ["x/a", "y/a", "b"]
    monkeypatch.chdir(runs[0])
    (only,) = compare_runs([runs[0], type(runs[0])(".")]).runs  # the same directory twice
    assert only.name == "a"


def test_the_page_stands_alone_and_escapes(write):
    runs = [write("a", loss=4.0), write("<b>&", student={"model": "<script>"})]
    comparison = compare_runs(runs)
    page = comparison_html(comparison)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page
    for column in columns_of(comparison):
        title = "student.model" if column.title == "model" else column.title
        assert f">{title}</div>" in page.replace("<wbr>", "")
    assert page.count('class="best"') == 0


# --- domains × stages -----------------------------------------------------------------------------


def test_the_domain_matrix_has_stages_as_rows_in_their_order(write):
    first = {"loss": 3.0, "ce/old": 3.0, "ce/new": 5.0}
    second = {"loss": 3.5, "ce/old": 3.25, "ce/new": 3.5}
    runs = [
        write("elle/1-old", domains=["old"], evaluation=first),
        write("elle/2-grow", domains=["old"], evaluation={"loss": 3.1}),
        write("elle/3-new", domains=["new"], evaluation=second),
    ]
    comparison = compare_runs(runs)
    assert comparison.domains.runs == ["1-old", "3-new"]
    assert comparison.domains.domains == ["old", "new"]
    for found, losses in zip(comparison.domains.perplexity, (first, second), strict=True):
        assert found == pytest.approx([math.exp(losses["ce/old"]), math.exp(losses["ce/new"])])
    text = domain_matrix(runs)
    assert rows_of(text) == {
        "run": ["1-old", "3-new"],
        "old": ["20.09", "25.79"],
        "new": ["148.41", "33.12"],
    }
    other = write("pcp/prompted", corpus="c2", domains=["old"], evaluation=first)
    assert domain_matrix([*runs, other]).startswith(text)
    assert "prompted" in domain_matrix([*runs, other])
    whole = as_text(comparison, 999)
    assert text in whole
    assert "ce/old" not in whole
    assert "148.41" in comparison_html(comparison)
    assert comparison.as_dict()["domains"]["runs"] == ["1-old", "3-new"]


def test_a_domain_that_a_stage_did_not_evaluate_is_a_hole(write):
    runs = [
        write("a", evaluation={"loss": 1.0, "ce/x": 1.0}),
        write("b", evaluation={"loss": 1.0, "ce/x": math.nan, "ce/y": 800.0}, seed=1),
    ]
    found = compare_runs(runs).as_dict()["domains"]
    assert found["domains"] == ["x", "y"]
    assert found["perplexity"] == [[pytest.approx(math.e), None], [None, None]]
    assert domain_matrix([write("c", evaluation={"loss": 1.0})]) == ""


# --- sweeps ---------------------------------------------------------------------------------------


def test_a_sweep_is_its_runs_in_order_begun_or_not(write, tmp_path):
    names = ["seed=2", "seed=1", "seed=0"]
    records = [about(seed=int(name[-1])) for name in names]
    for name in names[:2]:
        write(f"out/{name}", seed=int(name[-1]))
    runs = [{"name": n, "values": {}} | r for n, r in zip(names, records, strict=True)]
    (tmp_path / "out" / "sweep.json").write_text(json.dumps({"corpus": "c1", "runs": runs}))
    alone = write("alone", seed=3)
    comparison = compare_runs([tmp_path / "out", alone, tmp_path / "out" / "seed=1"])
    assert [run.name for run in comparison.runs] == [*names, "alone"]
    assert [run.settings["train.seed"] for run in comparison.runs] == [2, 1, 0, 3]
    assert [run.finished for run in comparison.runs] == [True, True, False, True]
    assert comparison.runs[2].planned_steps == 4
    assert comparison.notes == []
    shutil.rmtree(tmp_path / "out" / "seed=2")
    shutil.rmtree(tmp_path / "out" / "seed=1")
    assert not any(run.finished for run in compare_runs([tmp_path / "out"]).runs)


# --- what may not be compared ---------------------------------------------------------------------


def test_other_directories_are_refused_by_name(write, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        compare_runs([tmp_path / "empty", write("a"), tmp_path / "gone", tmp_path / "a/run.json"])
    for name in ("empty", "gone", "run.json"):
        assert str(tmp_path / name).replace("/run", "/a/run") in str(caught.value)
    assert f"{tmp_path / 'a'}," not in str(caught.value)


def test_runs_of_other_corpora_are_refused(write):
    runs = [write("a"), write("b", corpus="c2"), write("c")]
    with pytest.raises(InputError) as caught:
        compare_runs(runs)
    assert f"{runs[0]}, {runs[2]} (corpus c1); {runs[1]} (corpus c2)" in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_damaged_run_is_named(write, name, content):
    run = write("a")
    (run / name).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=name):
        compare_runs([run])


@pytest.mark.parametrize("change", [{"student": 1}, {"train": None}, {"cache": {}}])
def test_a_run_without_its_parts_is_damaged(write, change):
    run = write("a")
    (run / "run.json").write_text(json.dumps(about() | change))
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        compare_runs([run])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"view": "masked-2"}, "different masks"),
        ({"held_out": 0.5}, "train.held_out differ"),
        ({"evaluate_sequences": 3}, "train.evaluate_sequences differ"),
        ({"domains": ["x"]}, "train.domains differ"),
        ({"student": {"task": "causal_lm"}}, "student.task differ"),
        ({"lm": "f2"}, "not the same teacher in all runs: lm"),
    ],
)
def test_values_that_do_not_compare_have_a_note_and_no_best(write, values, words):
    comparison = compare_runs([write("a", loss=4.0), write("b", **values, speed=50.0)])
    (note,) = comparison.notes
    assert words in note
    assert f"note: {note}" in as_text(comparison, 999)
    assert comparison.best == {}


def test_values_of_another_measure_have_a_note_and_are_not_ranked(write):
    runs = [write("a", loss=4.0), write("b", speed=50.0)]
    record = json.loads((runs[0] / "run.json").read_text())
    record["cache"]["measured"] = {"lm": 2}
    (runs[0] / "run.json").write_text(json.dumps(record))
    comparison = compare_runs(runs)
    assert comparison.notes == [
        "kl/… and agreement/… of lm were measured differently in runs begun by older versions: not "
        "ranked"
    ]
    assert comparison.best == {"loss": ["a"]}


def test_losses_of_different_objectives_are_not_ranked_but_what_they_share_is(write):
    """Each is what its run trains: the cross-entropy is the same thing in all."""
    seen = [{"loss": 1.0, "ce": 5.0}, {"loss": 4.0, "ce": 4.0, "kl/lm": 2.0}]
    runs = [
        write("kd", evaluation=seen[0], objective={"distill": [LM]}),
        write("mlm", evaluation=seen[1], objective={"distill": []}),
    ]
    comparison = compare_runs(runs)
    assert comparison.compared == "ce"
    assert comparison.notes == [
        "loss is the objective of each run, and these objectives differ: not ranked; ce can be "
        "compared"
    ]
    assert comparison.best == {"ce": ["mlm"]}
    assert [point.loss for point in comparison.matched_steps[0].points] == [5.0, 4.0]
    alike = compare_runs([runs[0], write("kd 2", evaluation=seen[1], seed=1)])
    assert (alike.compared, alike.notes) == ("loss", [])
    assert alike.best["loss"] == ["kd"]
    alone = write("experts", evaluation={"loss": 0.5, "agreement/lm": 1.0}, seed=2)
    assert compare_runs([runs[1], alone]).compared is None
    assert "task scores can be compared" in as_text(compare_runs([runs[1], alone]))


def test_what_older_versions_called_loss_is_shown_as_what_it_was(write):
    """The cross-entropy, beside runs that measure it too: by that they compare."""
    runs = [
        write("old", evaluation={"loss": 3.0, "loss/law": 2.0}),
        write("new", evaluation={"loss": 5.0, "ce": 2.5, "ce/law": 1.0}, seed=1),
    ]
    record = json.loads((runs[0] / "run.json").read_text())
    del record["evaluation"]
    (runs[0] / "run.json").write_text(json.dumps(record))
    comparison = compare_runs(runs)
    assert comparison.runs[0].evaluation == {"ce": 3.0, "ce/law": 2.0}
    assert comparison.folders[0].records[-1]["ce"] == 3.0
    assert comparison.folders[0].records[0]["loss"] == 1.0  # in training it was the objective
    assert comparison.compared == "ce"
    assert comparison.best == {"ce": ["new"], "ce/law": ["new"]}
    assert comparison.domains.perplexity == [[pytest.approx(math.e**2)], [pytest.approx(math.e)]]


def test_a_task_with_the_same_language_loss_compares(write):
    student = {"task": "replaced_token_detection"}
    comparison = compare_runs([write("a", loss=4.0), write("b", student=student)])
    assert comparison.notes == []
    assert comparison.best["loss"] == ["a"]


def test_what_methods_say_of_their_values_counts(write):
    better = {"replaced_tokens/f1": 0.5, "replaced_tokens/loss": 1.0, "ce/f1": 1.0}
    worse = {"replaced_tokens/f1": 0.25, "replaced_tokens/loss": 2.0, "ce/f1": 2.0}
    best = compare_runs([write("a", evaluation=better), write("b", evaluation=worse)]).best
    assert {best[name] == ["a"] for name in better} == {True}


# --- differences ----------------------------------------------------------------------------------


def test_of_lists_the_items_that_differ_are_named(write):
    runs = [write("a", domains=["x", "y"]), write("b", domains=["x", "z"])]
    settings = [run.settings for run in compare_runs(runs).runs]
    assert settings == [{"train.domains.1": "y"}, {"train.domains.1": "z"}]
