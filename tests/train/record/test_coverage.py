"""With KD, with cross-entropy alone, with neither: counted by plain loops."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.train.device_batch import split_batch
from rekindle.train.objective.selection import StepPlan, select_targets
from rekindle.train.record.coverage import NAMES, Coverage
from testlib.batches import WIDTH, make_batch, sequences_in, term

VOCABULARY, EXPERTS = ("va", "vb"), ("ta", "sa", "sb")


@st.composite
def steps(draw):
    """(masked positions, teacher -> sequences it has targets for) of a few sequences."""
    count = draw(st.integers(1, 5))
    lengths = [draw(st.integers(2, WIDTH)) for _ in range(count)]
    every = [(row, place) for row, n in enumerate(lengths) for place in range(n - 1)]
    masked = draw(st.sets(st.sampled_from(every)))
    here = st.sets(st.integers(0, count - 1))
    known = {name: draw(here) for name in (*VOCABULARY, *EXPERTS)}
    targets = {name: known[name] for name in ("sa", "sb")}
    targets["ta"] = draw(st.sets(st.sampled_from(every)))
    # A vocabulary teacher has all of a sequence's masked positions, or none of them.
    targets |= {name: {p for p in masked if p[0] in known[name]} for name in VOCABULARY}
    return make_batch(lengths, masked, targets), masked, targets


def plan_of(terms, hard=1.0):
    return StepPlan(0, hard, tuple((term, 1.0) for term in terms), (), ())


def count(batch, terms, hard=1.0, task="masked_lm"):
    coverage = Coverage()
    coverage.count(select_targets(batch, terms), task, plan_of(terms, hard))
    return coverage.sum_over_processes(list)


@settings(deadline=None)
@given(steps(), st.sets(st.sampled_from((*VOCABULARY, *EXPERTS))), st.sampled_from([0.0, 0.5]))
def test_a_separate_term_for_each_teacher(step, chosen, hard):
    batch, masked, targets = step
    found = count(batch, [term(name) for name in sorted(chosen)], hard)
    with_kd = set().union(*[sequences_in(targets[name]) for name in chosen])
    places_kd = set().union(*[targets[name] for name in chosen if name in VOCABULARY])
    rest = "ce_only" if hard else "neither"
    expected = dict.fromkeys(NAMES, 0) | {
        "sequences_with_kd": len(with_kd),
        f"sequences_{rest}": len(batch.lengths) - len(with_kd),
        "positions_with_kd": len(places_kd),
        f"positions_{rest}": len(masked) - len(places_kd),
    }
    assert found == expected


@settings(deadline=None)
@given(steps(), st.sampled_from(["separate", "route"]))
def test_several_teachers_in_a_term(step, combine):
    batch, masked, targets = step
    terms = [term(*VOCABULARY, combine=combine), term("sb", "sa", combine=combine)]
    found = count(batch, terms)
    used = ("va", "vb", "sb", "sa")
    with_kd = set().union(*[sequences_in(targets[name]) for name in used])
    assert found["sequences_with_kd"] == len(with_kd)
    assert found["positions_with_kd"] == len(targets["va"] | targets["vb"])
    assert found["positions_ce_only"] == len(masked - targets["va"] - targets["vb"])


@settings(deadline=None)
@given(steps(), st.sampled_from(["mixture", "uncertainty"]))
def test_a_mixture_of_experts_teaches_where_all_of_them_know(step, combine):
    batch, _, targets = step
    found = count(batch, [term("sa", "sb", combine=combine)])
    assert found["sequences_with_kd"] == len(targets["sa"] & targets["sb"])
    assert found["sequences_ce_only"] == len(batch.lengths) - len(targets["sa"] & targets["sb"])


def wanted(found, fraction):
    """Of each sequence's positions the fraction, rounded up; which they are does not matter as
    long as they are the same for all that ask for as many.
    """
    rows = sorted({row for row, _ in found})
    own = {row: sorted(p for p in found if p[0] == row) for row in rows}
    return {p for places in own.values() for p in places[: -int(-len(places) * fraction // 1)]}


@settings(deadline=None)
@given(steps(), st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from(["separate", "route"]))
def test_positions_where_the_student_is_least_certain(step, fraction, combine):
    """Two teachers of one sequence pick the same positions."""
    batch, masked, targets = step
    found = count(batch, [term(*VOCABULARY, combine=combine, entropy_fraction=fraction)])
    either = wanted(targets["va"] | targets["vb"], fraction)
    assert found["positions_with_kd"] == len(either)
    assert found["positions_ce_only"] == len(masked) - len(either)
    assert found["sequences_with_kd"] == len(sequences_in(either))


@settings(deadline=None)
@given(steps(), st.sampled_from([None, 0.25, 0.5, 1.0]))
def test_two_terms_that_pick_positions(step, other):
    """In a sequence that both teach the larger fraction holds the smaller one's positions."""
    batch, masked, targets = step
    terms = [term("va", entropy_fraction=0.5), term("vb", entropy_fraction=other)]
    found = count(batch, terms)
    either = wanted(targets["va"], 0.5) | wanted(targets["vb"], other or 1.0)
    assert found["positions_with_kd"] == len(either)
    assert found["positions_ce_only"] == len(masked) - len(either)


@settings(deadline=None)
@given(steps())
def test_a_causal_students_positions_are_all_but_the_last(step):
    batch, _, _ = step
    found = count(batch, [], task="causal_lm")
    assert found["positions_ce_only"] == sum(n - 1 for n in batch.lengths.tolist())
    assert found["sequences_ce_only"] == len(batch.lengths)


@settings(deadline=None)
@given(steps(), st.integers(1, 4))
def test_all_processes_and_steps_add_up(step, size):
    batch, _, _ = step
    terms = [term(*VOCABULARY, combine="route", entropy_fraction=0.5), term("ta"), term("sa")]
    whole = count(batch, terms)
    parts = split_batch(batch, size)
    one_after_another, apart = Coverage(), []
    for part in parts:
        one_after_another.count(select_targets(part, terms), "masked_lm", plan_of(terms))
        apart.append(Coverage())
        apart[-1].count(select_targets(part, terms), "masked_lm", plan_of(terms))
    assert one_after_another.sum_over_processes(list) == whole
    sent = []
    for coverage in apart:
        coverage.sum_over_processes(lambda values: sent.append(list(values)) or values)
    total = [float(sum(column)) for column in zip(*sent, strict=True)]
    assert all(coverage.sum_over_processes(lambda _: total) == whole for coverage in apart)


def test_a_resumed_run_goes_on_counting():
    batch = make_batch([3, 4], [(0, 1)], {"va": [(0, 1)]})
    first = count(batch, [term("va")])
    resumed = Coverage(first)
    assert resumed.sum_over_processes(list) == first
    resumed.count(batch, "masked_lm", plan_of([term("va")]))
    assert resumed.sum_over_processes(list) == {name: 2 * value for name, value in first.items()}
    both = resumed.sum_over_processes(
        lambda values: [2 * v for v in values]
    )  # another process like this one
    assert both == {name: 3 * value for name, value in first.items()}


@pytest.mark.parametrize(("hard", "rest"), [(0.0, "neither"), (1e-9, "ce_only")])
def test_what_is_not_taught_has_cross_entropy_or_nothing(hard, rest):
    batch = make_batch([3, 4], [(0, 1), (1, 2), (1, 3)], {"va": [(1, 2)]})
    found = count(batch, [term("va")], hard)
    expected = {"with_kd": 1, rest: 1}
    assert {n: v for n, v in found.items() if v} == {
        **{f"sequences_{how}": v for how, v in expected.items()},
        "positions_with_kd": 1,
        f"positions_{rest}": 2,
    }
