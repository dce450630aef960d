"""Runs at equal steps and at equal total cost."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.pipeline.compare.matching import Curve, Point, match_cost, match_steps
from rekindle.pipeline.compare.page import comparison_html
from rekindle.pipeline.compare.runs import compare_runs
from rekindle.pipeline.compare.tables import as_text
from testlib.compared.runs import rows_of


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
    shown = text[text.index("at equal steps") : text.index("at equal total")]
    assert rows_of(shown) == {
        "steps": ["4", "6"],
        "a": ["4.0000", "3.0000"],
        "b": ["3.9000", "3.5000"],
    }


def test_at_equal_cost_a_taught_run_has_paid_for_its_teacher(curve):
    """It has the loss of its last evaluation that had cost no more; nothing in between."""
    runs = [
        curve("alone", {2: 5.0, 4: 4.0, 6: 3.8}, taught=False),
        curve("taught", {2: 4.0, 4: 3.0, 6: 2.5}, per_step=1.5, teacher=2.5, seed=1),
    ]
    comparison = compare_runs(runs)
    # alone: 2, 4, 6 seconds; taught: 5.5, 8.5, 11.5.
    # Before that there is nothing to compare.
    assert matched(comparison.matched_cost) == {6.0: [3.8, 4.0]}
    assert matched(comparison.matched_cost, "step")[6.0] == [6, 2]
    text = as_text(comparison, 999)
    table = rows_of(text[text.index("at equal total cost") :])
    assert table["seconds"] == ["6.0"]
    assert table["alone"] == ["3.8000 (6)"]
    assert table["taught"] == ["4.0000 (2)"]
    assert "without interpolation" in text
    page = comparison_html(comparison)
    assert "ce on sequences held out of training, at equal total cost" in page
    assert "4.0000 (2)" in page


def test_where_no_two_runs_meet_at_a_cost_there_is_no_table_but_a_sentence(curve):
    runs = [
        curve("alone", {2: 5.0, 4: 4.0}, taught=False),
        curve("taught", {2: 4.0, 4: 3.0}, teacher=99.0, seed=1),
    ]
    comparison = compare_runs(runs)
    assert comparison.matched_cost == []
    assert "no run was evaluated before another had already cost more" in as_text(comparison, 999)
    cheap = curve("third", {2: 4.1, 4: 3.5}, taught=False, seed=2)
    table = rows_of(
        (text := as_text(compare_runs([*runs, cheap]), 999))[text.index("at equal total") :]
    )
    assert list(table) == ["seconds", "alone", "third"]
    assert "at their first evaluation: taught" in text


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
        assert sum(point is not None for point in row.points) > 1
    end = min(one.teacher_seconds + one.points[-1].seconds for one in curves)
    begun = [one for one in curves if one.teacher_seconds + one.points[0].seconds <= end]
    assert [row.at for row in match_cost(curves)[-1:]] == [end] * (len(begun) > 1)
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
