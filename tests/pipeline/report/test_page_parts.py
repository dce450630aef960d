"""The page's sections: their numbers, and what they say of what is not known."""

import math
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.pipeline.compare.page import settings_section
from rekindle.pipeline.report.cache import CacheFacts, KnownCache, TeacherFacts, cache_section
from rekindle.pipeline.report.cost import Cost, StudentCost, cost_section, typical_cost
from rekindle.pipeline.report.losses import (
    MOST_SMALL,
    RunCurves,
    curves_of,
    losses_section,
    running_means,
    thin_out,
)
from rekindle.pipeline.report.page import Figures, Legend, Note
from rekindle.pipeline.report.scores import (
    TaskScores,
    interval_words,
    mean_scores,
    percent,
    scores_section,
)
from rekindle.pipeline.report.significance import Difference
from rekindle.pipeline.report.svg import picture
from rekindle.pipeline.report.table import Table


def notes_of(section) -> str:
    return " ".join(
        b.text if isinstance(b, Note) else getattr(b, "note", "") for b in section.blocks
    )


def tables_of(section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


def figures_of(section) -> list:
    return [f for block in section.blocks if isinstance(block, Figures) for f in block.figures]


def svg_of(figure):
    return picture(figure.draw, figure.size)


# --- losses ---------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6)


LOSSES = st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(LOSSES, max_size=50), st.integers(1, 20))
def test_thinned_curves_are_means_of_all_that_are_numbers(values, most):
    points = list(enumerate(values, 1))
    found = thin_out(points, most)
    assert len(found) == min(most, len(points))
    steps = [step for step, _ in found]
    assert steps == sorted(set(steps))
    assert steps[-1:] == [len(points)] * bool(points)
    first = 0
    for step, value in found:
        known = [v for v in values[first:step] if math.isfinite(v)]
        first = step
        assert math.isnan(value) if not known else math.isclose(value, mean(known), abs_tol=1e-300)


@given(st.lists(numbers, min_size=1, max_size=90))
def test_running_means_look_back_only(values):
    points = list(enumerate(values, 1))
    found = running_means(points)
    assert [step for step, _ in found] == [step for step, _ in points]
    width = max(1, len(points) // 20)
    for n, (_, value) in enumerate(found):
        assert value == pytest.approx(mean(values[max(0, n - width + 1) : n + 1]), abs=1e-6)


def test_curves_have_every_value_that_was_evaluated():
    records = [
        {"kind": "train", "step": 1, "loss": 3.0, "ce": 2.0},
        {"kind": "evaluate", "step": 1, "loss": 2.5, "kl/lm": None},
        {"kind": "train", "step": 2, "loss": 2.0},
        {"kind": "evaluate", "step": 2, "loss": 2.25, "kl/lm": 0.5},
    ]
    curves = curves_of("a", records)
    assert curves.objective == [(1, 3.0), (2, 2.0)]
    assert curves.cross_entropy == [(1, 2.0)]
    assert curves.held_out["loss"] == [(1, 2.5), (2, 2.25)]
    assert math.isnan(curves.held_out["kl/lm"][0][1])
    assert "Gaps in lines" in notes_of(losses_section([curves]))


def test_runs_of_any_number_have_one_legend_with_their_own_lines():
    curve = [(1, 3.0), (2, 2.0)]
    runs = [RunCurves(f"run {n}", held_out={"loss": curve}) for n in range(30)]
    runs[1] = RunCurves("not begun")
    section = losses_section(runs)
    legend = next(block for block in section.blocks if isinstance(block, Legend))
    assert legend.names == [run.name for n, run in enumerate(runs) if n != 1]
    assert legend.samples == [n for n in range(30) if n != 1]
    assert len(figures_of(section)) == 1


def test_a_run_that_has_not_evaluated_is_named():
    runs = [
        RunCurves("evaluated", held_out={"loss": [(1, 3.0)]}),
        RunCurves("trained", objective=[(1, 3.0)]),
    ]
    assert "Nothing is measured yet on sequences held out of training: trained." in notes_of(
        losses_section(runs)
    )
    assert "No run has recorded a step" in notes_of(losses_section([RunCurves("a")]))


def test_other_values_are_small_pictures_up_to_a_number():
    curve = [(1, 3.0), (2, 2.0)]
    held_out = {"loss": curve} | {f"ce/domain-{n:02}": curve for n in range(MOST_SMALL + 2)}
    held_out["kl/once"] = [(2, 1.0)]  # no curve
    section = losses_section([RunCurves("a", held_out=held_out)])
    captions = [figure.caption for figure in figures_of(section)]
    assert len(captions) == 1 + MOST_SMALL
    assert "cross-entropy on domain domain-00, in nats" in captions[1]
    assert "2 more values are in the table" in notes_of(section)


def test_gradients_are_drawn_over_that_of_the_cross_entropy_where_there_is_one():
    def captions(*names):
        step = {"kind": "train", "loss": 1.0} | dict.fromkeys(names, 0.5)
        run = curves_of("a", [step | {"step": 1}, {"kind": "train", "step": 2}, step | {"step": 3}])
        assert all(points == [(1, 0.5), (3, 0.5)] for points in run.gradients.values())
        return [f.caption for f in figures_of(losses_section([run])) if "radient" in f.caption]

    (over,) = captions("gradient/ce", "gradient/kd/lm", "gradient_ratio/kd/lm")
    assert over.startswith("Gradient of kd/lm, over the cross-entropy's")
    (norm,) = captions("gradient/kd/lm")
    assert norm.startswith("Norm of the weighted gradient of kd/lm")


def test_the_cross_entropy_is_drawn_where_it_is_not_the_objective():
    curve, other = [(1, 3.0), (2, 2.0)], [(1, 2.5), (2, 1.5)]
    alone = losses_section([RunCurves("a", curve, curve)])
    both = losses_section([RunCurves("a", curve, curve), RunCurves("b", curve, other)])
    assert len(figures_of(alone)) == 1
    assert len(figures_of(both)) == 2


# --- scores ---------------------------------------------------------------------------------------


def test_mean_spread_and_interval():
    assert percent([0.5]) == "50.00"
    assert percent([0.5, 0.6]) == "55.00 ± 7.07"  # the sample deviation
    assert percent([]) == "–"
    # t of 97.5 % with 2 degrees of freedom is 4.303: 4.3027 * 0.1 / sqrt(3) = 0.2484.
    assert interval_words([0.4, 0.5, 0.6]) == "25.16 … 74.84, n=3"
    assert interval_words([0.4]) == "1 seed"


def test_scores_say_task_metric_split_and_what_is_best_beyond_chance():
    tasks = [
        TaskScores("cola", "matthews", "test", {"a": [0.4, 0.5], "b": [0.6, 0.6]}),
        TaskScores("mrpc", "f1", "dev", {"b": [0.8]}),
    ]
    section = scores_section(["a", "b"], tasks, best={"cola matthews (test)": "b"})
    (table,) = tables_of(section)
    assert [c.title for c in table.columns] == ["model", "cola matthews (test)", "mrpc f1 (dev)"]
    assert table.columns[1].cells == ["45.00 ± 7.07", "60.00 ± 0.00"]
    assert table.columns[1].best == {1}
    assert table.columns[2].cells == ["–", "80.00"]
    assert not table.columns[2].best
    (unsure,) = tables_of(scores_section(["a", "b"], tasks))
    assert not unsure.columns[1].best  # the highest mean may be chance
    assert len(figures_of(section)) == 2
    assert ">a</text>" not in svg_of(figures_of(section)[1])


def test_a_mean_of_tasks_needs_all_of_them():
    whole = [TaskScores(t, "f1", "dev", {"a": [0.4, 0.6], "b": [0.5, 0.5]}) for t in "xy"]
    assert mean_scores(["a", "b"], whole) == {"a": [0.4, 0.6], "b": [0.5, 0.5]}
    assert mean_scores(["a", "b", "c"], whole) is None
    broken = TaskScores("z", "f1", "dev", {"a": [0.4, math.nan], "b": [0.5, 0.5]})
    assert mean_scores(["a", "b"], [*whole, broken]) is None
    assert broken.of("a") == [0.4]
    scores_section(["a", "b"], [broken])  # is drawn


def test_differences_have_their_intervals_and_both_p():
    ones = [
        Difference("kd", "expert", "cola", 0.02, 0.01, 0.03, 0.0004, 0.0123, 5),
        Difference("mlm", "expert", "cola", -0.02, None, None, None, None, 1),
    ]
    section = scores_section([], [], ones)
    (table,) = tables_of(section)
    assert "differences to expert" in table.title
    assert [c.cells for c in table.columns] == [
        ["kd", "mlm"],
        ["cola", "cola"],
        ["+2.00", "-2.00"],
        ["< 0.001", "–"],
        ["0.012", "–"],
        ["5", "1"],
    ]
    assert table.columns[2].below == ["+1.00 … +3.00", ""]  # in sight on a telephone
    (figure,) = figures_of(section)
    assert "difference to expert" in figure.caption


# --- cost -----------------------------------------------------------------------------------------

seconds = st.floats(0.01, 1e4)


@given(once=seconds, live=seconds, run=seconds)
def test_the_cache_pays_from_that_run_on_and_not_before(once, live, run):
    cost = Cost({"a": once, "not used": 1e6}, ["a"], live, run)
    runs = cost.pays_after
    assert runs is not None
    slack = 1e-9 * (runs * (run + live) + once)
    assert cost.cached(runs) <= cost.with_live_teachers(runs) + slack
    if runs > 1:
        assert cost.cached(runs - 1) > cost.with_live_teachers(runs - 1) - slack


def test_teachers_that_cost_nothing_live_never_pay_for_a_cache():
    assert Cost({"a": 1.0}, ["a"], live=0.0, run=1.0).pays_after is None


def test_a_typical_student_is_the_mean_of_those_that_are_taught_and_known():
    students = [
        StudentCost("plain", 100.0, (), 0.0),
        StudentCost("one", 10.0, ("a",), 4.0),
        StudentCost("two", 20.0, ("a", "b"), 6.0),
        StudentCost("going on", None, ("a",), 6.0),
    ]
    cost, note = typical_cost({"a": 5.0, "b": 7.0, "c": 99.0}, students)
    assert cost == Cost({"a": 5.0, "b": 7.0}, ["a", "b"], live=5.0, run=15.0)
    assert cost.once == 12.0
    assert "like one, two, on average. Left out, of unknown cost: going on" in note


@pytest.mark.parametrize(
    ("teachers", "student", "words"),
    [
        ({}, StudentCost("s", 1.0, (), 0.0), "No run learns from a teacher"),
        ({"a": None}, StudentCost("s", 1.0, ("a",), 1.0), "what caching a took is not recorded"),
        ({"a": 1.0}, StudentCost("s", None, ("a",), 1.0), "Unknown: the time of s"),
        ({"a": 1.0}, StudentCost("s", 1.0, ("a",), None), "Unknown: the time of s"),
    ],
)
def test_what_is_unknown_is_said_and_not_drawn(teachers, student, words):
    cost, note = typical_cost(teachers, [student])
    assert cost is None
    assert words in note
    section = cost_section(teachers, [student], cost, [note])
    assert words in notes_of(section)
    assert not figures_of(section)
    cells = [cell for table in tables_of(section) for c in table.columns for cell in c.cells]
    assert ("unknown" in cells) == (None in teachers.values() or student.live is None)


@pytest.mark.parametrize(("live", "unit"), [(1.0, "seconds"), (600.0, "minutes"), (9e4, "hours")])
def test_the_picture_of_cost_has_a_unit_that_fits(live, unit):
    cost = Cost({"a": 3 * live}, ["a"], live, live)
    (figure,) = figures_of(cost_section({"a": 3 * live}, [], cost, []))
    assert f"in {unit} of computing" in figure.caption
    assert "from 3 on" in figure.caption
    assert f">{unit}</text>" in svg_of(figure)


# --- caches ---------------------------------------------------------------------------------------


def test_a_cache_is_told_by_its_numbers():
    teachers = [
        TeacherFacts("part", "8 logits", 9018, 654_321, 343_210, 0.0015),
        TeacherFacts("old", "2 logits", 9018, 654_321, 343_210),
    ]
    facts = CacheFacts(9018, 343_210, 4000, teachers)
    section = cache_section([KnownCache("/there", facts, changed=["teacher part"])])
    (table,) = tables_of(section)
    assert [column.cells[0] for column in table.columns] == [
        *("part", "8 logits", "9,018", "654,321", "72.6", "1.91", "1.50"),
    ]
    assert table.columns[-1].cells[1] == "–"
    assert "Changed since the runs read it: teacher part" in notes_of(section)


def test_a_cache_that_is_gone_is_told():
    section = cache_section([KnownCache("/gone", problem="there is none")])
    assert "/gone cannot be read any more (there is none)" in notes_of(section)
    assert cache_section([]).blocks == []


# --- configuration --------------------------------------------------------------------------------


def test_what_is_unlike_the_most_common_value_is_marked():
    section = settings_section(["a", "b", "c"], {"lr": ["1", "2", "1"], "seed": ["0", "1", "2"]})
    (table,) = tables_of(section)
    assert [column.title for column in table.columns] == ["setting", "a", "b", "c"]
    assert [set(column.unlike) for column in table.columns] == [set(), set(), {0, 1}, {1}]


@given(st.lists(st.sampled_from("abc"), min_size=2))
def test_the_most_common_is_the_first_of_several(values):
    (table,) = tables_of(settings_section([*map(str, range(len(values)))], {"lr": values}))
    most = max(map(values.count, values))
    usual = next(value for value in values if values.count(value) == most)
    assert [bool(column.unlike) for column in table.columns[1:]] == [v != usual for v in values]


def test_one_run_has_nothing_to_differ_from():
    assert settings_section(["a"], {}).blocks == []
    assert "the same" in notes_of(settings_section(["a", "b"], {}))
