"""Runs beside each other: what is read, what differs, what is best, what may not be compared."""

import json
import math
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.compare.matching import Curve, Point, match_cost, match_steps
from rekindle.pipeline.compare.page import comparison_html
from rekindle.pipeline.compare.runs import compare_runs
from rekindle.pipeline.compare.tables import NOTHING, as_text, columns_of, domain_matrix
from rekindle.train.config import StudentConfig, TrainConfig

LM = {"teachers": ["lm"], "temperature": 2.0}
KEYS = {"corpus", "runs", "best", "notes", "compared", "matched_steps", "matched_cost", "domains"}
RUN_KEYS = {
    *("name", "directory", "finished", "steps", "planned_steps", "seconds", "tokens_per_second"),
    *("data_wait", "evaluation", "coverage", "scores", "settings", "curve"),
}


def about(corpus="c1", view="masked-1", lm="f1", student=None, **train):
    """What ``run.json`` says of a run."""
    values = {"steps": 4, "objective": {"distill": [LM]}} | train
    model = parse_settings(StudentConfig, {"model": "m"} | (student or {}))
    return {
        "student": model.model_dump(mode="json"),
        "train": parse_settings(TrainConfig, values).model_dump(mode="json", by_alias=True),
        "cache": {"path": "p", "corpus": corpus, "masked_view": view, "teachers": {"lm": lm}},
        "evaluation": {"measure": 3},
    }


@pytest.fixture
def write(tmp_path):
    """write(name, loss=…, **about) -> a run's directory; ``done``: steps if it is unfinished."""

    def make(name, loss=5.0, done=None, evaluation=None, speed=100.0, **values):
        run = tmp_path / name
        run.mkdir(parents=True)
        content = about(**values)
        (run / "run.json").write_text(json.dumps(content))
        steps = content["train"]["steps"]
        evaluation = evaluation or {"loss": loss, "kl/lm": loss / 2, "agreement/lm": 1 / loss}
        lines = [
            # The second step has as many tokens again as the first, at half the speed.
            {"kind": "train", "step": step, "loss": 1.0, "tokens": tokens}
            | {"tokens_per_second": 2 * speed if step == 1 else speed, "data_wait": step / 100}
            for step, tokens in zip(range(1, 1 + (done or steps)), (200, 400, 0, 0), strict=False)
        ]
        lines.append({"kind": "evaluate", "step": len(lines)} | evaluation)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)
        if done is None:
            summary = {"steps": steps, "seconds": 12.34, "evaluation": evaluation}
            coverage = {
                **{"sequences_with_kd": 30, "sequences_ce_only": 10, "sequences_neither": 0},
                **{"positions_with_kd": 90, "positions_ce_only": 0, "positions_neither": 10},
            }
            (run / "summary.json").write_text(json.dumps(summary | {"coverage": coverage}))
        return run

    return make


def rows_of(text):
    """The text's table: title -> cells, stars kept."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    table = [re.split(r"\s{2,}", line.strip()) for line in (lines[rule - 1], *lines[rule + 1 :])]
    head, *rows = [cells for cells in table if len(cells) == len(table[0])]
    return {title: [row[number] for row in rows] for number, title in enumerate(head)}


# --- what is shown --------------------------------------------------------------------------------


def test_the_table_shows_what_differs_and_marks_the_best(write):
    runs = [write("a", loss=4.0), write("b", loss=5.0, seed=7, speed=200.0)]
    text = as_text(compare_runs(runs), 999)
    assert rows_of(text) == {
        "run": ["a", "b"],
        "seed": ["0", "7"],
        "steps": ["4", "4"],
        "seconds": ["12.3", "12.3"],
        "tokens/s": ["120", "240*"],
        "data wait": ["4.0%", "4.0%"],
        "loss": ["4.0000*", "5.0000"],
        "kl/lm": ["2.0000*", "2.5000"],
        "agreement/lm": ["0.2500*", "0.2000"],
        "KD sequences": ["75.0%", "75.0%"],
        "KD positions": ["90.0%", "90.0%"],
    }
    assert "* the best" in text


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
    assert table["loss"] == ["5.0000*", "1.0000", "6.0000"]
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
    assert table["temperature"] == ["2", "1"]
    assert table["weight"] == [
        "1",
        "{schedule: linear, from: 1.0, to: 0.0, over: 0.5}",
    ]
    none = write("c", objective={"distill": []})
    table = rows_of(as_text(compare_runs([one, none]), 999))
    assert table["distill"] == ["[{teachers: [lm], temperature: 2.0}]", "[]"]
    assert "temperature" not in table


def test_a_table_that_is_too_wide_lies_down(write):
    """A run is then a column; every cell that stood is there, best ones with their star."""
    runs = [write("a"), write("b", seed=1, learning_rate=0.5)]
    comparison = compare_runs(runs)
    upright, lying = (as_text(comparison, width) for width in (999, 60))
    assert max(map(len, lying.splitlines())) < 60 < max(map(len, upright.splitlines()))
    standing = rows_of(upright)
    lines = [line for line in lying.splitlines()[2:] if line.startswith("  ")]
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
    assert rows_of(as_text(comparison, 999))["cola matthews"] == ["0.5000", "0.7500*"]
    assert comparison.runs[0].scores == {"cola matthews": 0.5}
    assert comparison.best["scores/cola matthews"] == ["b"]


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
    assert page.count('class="best"') == 3


# --- equal steps, equal cost ---------------------------------------------------------------------


@pytest.fixture
def curve(write):
    """curve(name, {step: ce}, per_step=…, teacher=…, **about) -> a run's directory with these
    evaluations, ``per_step`` seconds a step (None: not recorded), its teacher's pass ``teacher``.
    """

    def make(name, losses, per_step=1.0, teacher=None, taught=True, **values):
        values |= {} if taught else {"objective": {"distill": []}}
        run = write(name, steps=max(losses), **values)
        recorded = json.loads((run / "run.json").read_text())
        if not taught:
            recorded["cache"]["teachers"] = {}
        recorded["cache"]["teacher_seconds"] = {"lm": teacher} if taught else {}
        (run / "run.json").write_text(json.dumps(recorded))
        lines = []
        for step in range(1, max(losses) + 1):
            time = {} if per_step is None else {"seconds": per_step * step}
            lines.append(
                {"kind": "train", "step": step, "tokens": 1, "tokens_per_second": 1} | time
            )
            if step in losses:
                lines.append({"kind": "evaluate", "step": step, "ce": losses[step]})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)
        return run

    return make


def matched(rows, what="loss"):
    return {row.at: [p and getattr(p, what) for p in row.points] for row in rows}


def test_losses_are_compared_at_the_steps_that_all_have_evaluated(curve):
    runs = [
        curve("a", {2: 5.0, 4: 4.0, 6: 3.0}, taught=False),
        curve("b", {3: 4.5, 4: 3.9, 6: 3.5}, teacher=1.0, seed=1),
    ]
    comparison = compare_runs(runs)
    assert matched(comparison.matched_steps) == {4: [4.0, 3.9], 6: [3.0, 3.5]}
    text = as_text(comparison, 999)
    shown = text[text.index("at equal steps") : text.index(" held-out ce at equal total")]
    assert rows_of(shown) == {
        "steps": ["4", "6"],
        "a": ["4.0000", "3.0000*"],
        "b": ["3.9000*", "3.5000"],
    }


def test_at_equal_cost_a_taught_run_has_paid_for_its_teacher(curve):
    """It has the loss of its last evaluation that had cost no more; nothing in between."""
    runs = [
        curve("alone", {2: 5.0, 4: 4.0, 6: 3.8}, taught=False),
        curve("taught", {2: 4.0, 4: 3.0, 6: 2.5}, per_step=1.5, teacher=2.5, seed=1),
    ]
    comparison = compare_runs(runs)
    # alone: 2, 4, 6 seconds; taught: 5.5, 8.5, 11.5.
    assert matched(comparison.matched_cost) == {
        2.0: [5.0, None],
        4.0: [4.0, None],
        6.0: [3.8, 4.0],
    }
    assert matched(comparison.matched_cost, "step")[6.0] == [6, 2]
    text = as_text(comparison, 999)
    table = rows_of(text[text.index("at equal total cost") :])
    assert table["seconds"] == ["2.0", "4.0", "6.0"]
    assert table["alone"] == ["5.0000 (2)", "4.0000 (4)", "3.8000 (6)*"]
    assert table["taught"] == [NOTHING, NOTHING, "4.0000 (2)"]
    assert "nothing is interpolated" in text
    page = comparison_html(comparison)
    assert "held-out ce at equal total cost" in page
    assert "4.0000 (2)" in page


@given(
    st.lists(
        st.tuples(
            st.floats(0, 20), st.dictionaries(st.integers(1, 9), st.floats(0.1, 5), min_size=1)
        ),
        min_size=2,
        max_size=4,
    )
)
def test_matched_rows_hold_for_any_curves(drawn):
    curves = []
    for teacher, seconds in drawn:
        steps, at = sorted(seconds), 0.0
        points = []
        for step in steps:
            at += seconds[step]
            points.append(Point(step, at, 1.0 / step))
        curves.append(Curve(teacher, points))
    for row in match_cost(curves):
        for one, point in zip(curves, row.points, strict=True):
            within = [p for p in one.points if one.teacher_seconds + p.seconds <= row.at]
            assert point == (within[-1] if within else None)
    ends = [one.teacher_seconds + one.points[-1].seconds for one in curves]
    assert match_cost(curves)[-1].at == min(ends)
    common = set.intersection(*({p.step for p in one.points} for one in curves))
    assert [row.at for row in match_steps(curves)] == sorted(common)


@pytest.mark.parametrize("unknown", [{"teacher": None}, {"teacher": 1.0, "per_step": None}])
def test_a_cost_that_is_not_recorded_is_unknown_never_nothing(curve, unknown):
    runs = [
        curve("a", {2: 5.0, 4: 4.0}, taught=False),
        curve("b", {2: 4.0, 4: 3.0}, seed=1, **unknown),
    ]
    assert compare_runs(runs).matched_cost == []
    for shown in (as_text(compare_runs(runs), 999), comparison_html(compare_runs(runs))):
        assert "not recorded (by older versions) for b" in shown
    assert matched(compare_runs(runs).matched_steps) == {2: [5.0, 4.0], 4: [4.0, 3.0]}
    comparison = compare_runs([*runs, curve("c", {2: 4.5, 4: 4.2}, taught=False, seed=2)])
    assert matched(comparison.matched_cost) == {2.0: [5.0, None, 4.5], 4.0: [4.0, None, 4.2]}
    assert "; unknown for b" in as_text(comparison, 999)


def test_long_curves_are_thinned_out_and_end_with_the_last(curve):
    losses = {step: 5.0 - step / 100 for step in range(1, 31)}
    comparison = compare_runs([curve("a", losses), curve("b", losses, seed=1)])
    assert len(comparison.matched_steps) == 30
    text = as_text(comparison, 999)
    steps = rows_of(text[text.index("at equal steps") :])["steps"]
    assert len(steps) == 8
    assert steps[-1] == "30"


def test_losses_of_other_positions_are_not_matched(curve):
    runs = [curve("a", {2: 5.0, 4: 4.0}), curve("b", {2: 4.0, 4: 3.0}, held_out=0.5)]
    comparison = compare_runs(runs)
    assert comparison.matched_steps == comparison.matched_cost == []


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
    assert comparison.best == {"tokens_per_second": ["a"]}


def test_values_of_another_measure_have_a_note_and_are_not_ranked(write):
    runs = [write("a", loss=4.0), write("b", speed=50.0)]
    record = json.loads((runs[0] / "run.json").read_text())
    record["cache"]["measured"] = {"lm": 2}
    (runs[0] / "run.json").write_text(json.dumps(record))
    comparison = compare_runs(runs)
    assert comparison.notes == [
        "kl/… and agreement/… of lm are measured otherwise in runs that older versions began: not "
        "ranked"
    ]
    assert comparison.best == {"loss": ["a"], "tokens_per_second": ["a"]}


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
        "loss is what each run trains, and they train different things: not ranked; ce can be "
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


def test_a_teacher_of_weight_0_costs_nothing(curve):
    """Its targets were never read; a cache that has not recorded the time is another matter."""
    one = curve("one", {1: 3.0, 2: 2.0}, teacher=5.0)
    about = json.loads((one / "run.json").read_text())
    about["cache"]["teachers"] = {"lm": "1", "idle": "2"}
    (one / "run.json").write_text(json.dumps(about))
    (cost,) = [run.curve.teacher_seconds for run in compare_runs([one]).runs]
    assert cost == 5.0
    about["cache"]["teacher_seconds"]["idle"] = None
    (one / "run.json").write_text(json.dumps(about))
    assert compare_runs([one]).runs[0].curve.teacher_seconds is None
