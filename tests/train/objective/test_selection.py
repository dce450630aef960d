"""Which targets a term uses and how many rows its mean is over, against plain loops."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.batch import (
    SequenceTargetBatch,
    TokenLabelBatch,
    TokenTargetBatch,
)
from rekindle.train.device_batch import split_batch
from rekindle.train.objective.selection import (
    Counts,
    common_rows,
    count_rows,
    names_of,
    select_targets,
    taught_per_sequence,
)
from testlib.batches import WIDTH, make_batch, sequences_in, term

KINDS = {"v": "vocabulary", "t": "token", "s": "sequence"}  # by a teacher's first letter
VOCABULARY, TOKEN, SEQUENCE = ("va", "vb", "vc"), ("ta", "tb"), ("sa", "sb", "sc")


def shown(target):
    """The sequences, or (sequence, position), of a target, as a set; its content is checked."""
    if isinstance(target, SequenceTargetBatch):
        return set(np.flatnonzero(target.present).tolist())
    found = list(zip(target.rows.tolist(), target.positions.tolist(), strict=True))
    assert found == sorted(set(found))
    expected = [row * WIDTH + position for row, position in found]
    columns = [target.logits[:, 0]] if isinstance(target, TokenLabelBatch) else []
    if isinstance(target, TokenTargetBatch):
        columns = [target.columns["values"][:, 0], target.columns["other"]]
    assert all(column.tolist() == expected for column in columns)
    return set(found)


@st.composite
def batches(draw):
    """Sequences with any masked positions, and any targets of eight teachers."""
    lengths = draw(st.lists(st.integers(1, WIDTH), min_size=1, max_size=5))
    every = [(row, position) for row, n in enumerate(lengths) for position in range(n)]
    some = st.sets(st.sampled_from(every))
    masked = draw(some)
    targets = {name: draw(some) for name in (*VOCABULARY, *TOKEN)}
    here = st.sets(st.integers(0, len(lengths) - 1))
    targets |= {name: draw(here) for name in SEQUENCE}
    return make_batch(lengths, masked, targets)


@st.composite
def term_lists(draw):
    """A term of each kind of teacher, of any number of them in any order."""
    terms = []
    for names in (VOCABULARY, TOKEN, SEQUENCE):
        chosen = draw(st.permutations(names))[: draw(st.integers(0, len(names)))]
        if not chosen:
            continue
        values = {
            "combine": draw(st.sampled_from(["separate", "route"])),
            "positions": draw(st.sampled_from(["all", "masked"])),
        }
        if names is VOCABULARY:
            values["entropy_fraction"] = draw(st.sampled_from([None, 0.1, 0.3, 0.5, 1.0]))
        terms.append(term(*chosen, **values))
    return terms


def expected_targets(batch, terms):
    """Teacher -> what is used of it, by plain loops."""
    masked = set(zip(batch.masked.rows.tolist(), batch.masked.positions.tolist(), strict=True))
    used = {name: shown(target) for name, target in batch.targets.items()}
    for one in terms:
        taken = set()
        for name in one.teachers:
            if one.positions == "masked" and name[0] != "s":
                used[name] = {place for place in used[name] if place in masked}
            if one.combine == "route":
                mine = sequences_in(used[name])
                used[name] = {p for p in used[name] if not sequences_in({p}) & taken}
                taken |= mine
    return used


def expected_rows(used, one):
    """Loss -> rows of a term of separate or routed teachers, by plain loops."""
    found = {}
    for name in one.teachers:
        loss = f"kd/{name}" if one.combine == "separate" else "kd/" + "+".join(one.teachers)
        count = len(used[name])
        if one.entropy_fraction is not None:
            per_sequence = [sum(place[0] == row for place in used[name]) for row in range(5)]
            fraction = Fraction(str(one.entropy_fraction))
            count = sum(math.ceil(fraction * n) for n in per_sequence)
        found[loss] = found.get(loss, 0) + count
    return found


@settings(deadline=None)
@given(batches(), term_lists())
def test_what_is_selected_is_what_plain_loops_select(batch, terms):
    before = {name: shown(target) for name, target in batch.targets.items()}
    selected = select_targets(batch, terms)
    found = {name: shown(target) for name, target in selected.targets.items()}
    assert found == expected_targets(batch, terms)
    assert {name: shown(target) for name, target in batch.targets.items()} == before
    assert selected.masked is batch.masked
    again = select_targets(selected, terms)
    assert {name: shown(target) for name, target in again.targets.items()} == found


@settings(deadline=None)
@given(batches(), term_lists())
def test_a_routed_sequence_has_one_teacher_and_all_it_says(batch, terms):
    selected = select_targets(batch, terms)
    for one in terms:
        if one.combine != "route":
            continue
        taught = [sequences_in(shown(selected.targets[name])) for name in one.teachers]
        assert sum(map(len, taught)) == len(set().union(*taught))
        if one.positions == "all":
            had = [sequences_in(shown(batch.targets[name])) for name in one.teachers]
            assert set().union(*taught) == set().union(*had)
            assert taught[0] == had[0]


@settings(deadline=None)
@given(batches(), term_lists(), st.sampled_from(["masked_lm", "causal_lm"]))
def test_counts_are_those_of_plain_loops(batch, terms, task):
    counts = count_rows(select_targets(batch, terms), task, terms)
    used = expected_targets(batch, terms)
    expected = {}
    for one in terms:
        expected |= expected_rows(used, one)
    assert counts.rows == expected
    labels = {"masked_lm": len(batch.masked.labels), "causal_lm": int((batch.lengths - 1).sum())}
    assert counts.labels == labels[task]


@settings(deadline=None)
@given(batches(), term_lists(), st.integers(1, 5))
def test_parts_of_a_batch_select_and_count_as_the_whole(batch, terms, size):
    whole = select_targets(batch, terms)
    counts = count_rows(whole, "masked_lm", terms)
    parts = split_batch(batch, size)
    labels, rows = 0, dict.fromkeys(counts.rows, 0)
    for part, of_selected in zip(parts, split_batch(whole, size), strict=True):
        selected = select_targets(part, terms)
        for name, target in selected.targets.items():
            a, b = target, of_selected.targets[name]
            if isinstance(a, SequenceTargetBatch):
                assert a.present.tolist() == b.present.tolist()
            else:
                assert a.rows.tolist() == b.rows.tolist()
                assert a.positions.tolist() == b.positions.tolist()
        found = count_rows(selected, "masked_lm", terms)
        labels += found.labels
        rows = {name: rows[name] + found.rows[name] for name in rows}
    assert (labels, rows) == (counts.labels, counts.rows)


@settings(deadline=None)
@given(batches(), st.sampled_from(["mixture", "uncertainty"]))
def test_a_mixture_is_counted_where_all_experts_know(batch, combine):
    one = term(*SEQUENCE, combine=combine)
    selected = select_targets(batch, [one])
    known = set.intersection(*[shown(batch.targets[name]) for name in SEQUENCE])
    assert common_rows([selected.targets[name] for name in SEQUENCE]).tolist() == sorted(known)
    assert count_rows(selected, "masked_lm", [one]).rows == {"kd/sa+sb+sc": len(known)}
    assert shown(selected.targets["sa"]) == shown(batch.targets["sa"])  # finding out hurts nobody


@settings(deadline=None)
@given(batches())
def test_a_mixture_of_language_models_is_counted_once(batch):
    found = {name: shown(batch.targets["va"]) for name in VOCABULARY}
    same = make_batch(batch.lengths, [], found)
    one = term(*VOCABULARY, combine="mixture")
    rows = count_rows(select_targets(same, [one]), "masked_lm", [one]).rows
    assert rows == {"kd/va+vb+vc": len(found["va"])}


def test_nothing_is_copied_where_nothing_is_left_out():
    everything = [(0, 1), (1, 2)]
    batch = make_batch([3, 4], everything, {"va": everything, "ta": everything, "sa": [0]})
    terms = [term("va", positions="masked"), term("ta", positions="masked"), term("sa")]
    selected = select_targets(batch, terms)
    assert all(selected.targets[name] is batch.targets[name] for name in batch.targets)


def test_names_of_losses():
    assert names_of(term("sa", "sb")) == {"sa": "kd/sa", "sb": "kd/sb"}
    for combine in ("route", "mixture", "uncertainty"):
        assert names_of(term("sa", "sb", combine=combine)) == {"sa": "kd/sa+sb", "sb": "kd/sa+sb"}
    assert names_of(term("sa", combine="route")) == {"sa": "kd/sa"}


# --- the fraction of a sequence's positions ---

per_sequence = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(deadline=None)
@given(per_sequence, st.integers(1, 1000))
def test_a_fraction_is_rounded_up_in_each_sequence(counts, thousandths):
    rows = np.repeat(np.arange(len(counts)) * 3, counts)  # sequences without a position between
    found = taught_per_sequence(rows, thousandths / 1000)
    expected = [math.ceil(Fraction(thousandths, 1000) * n) for n in counts]
    assert found.tolist() == np.repeat(expected, counts).tolist()


@given(st.integers(1, 40), st.floats(0, 1, exclude_min=True))
def test_at_least_one_and_at_most_all_positions_are_taught(count, fraction):
    found = taught_per_sequence(np.zeros(count, np.int64), fraction)
    assert 1 <= found[0] <= count
    assert found[0] >= fraction * count - 1e-6
    assert found[0] <= fraction * count + 1


@pytest.mark.parametrize("count", [1, 10, 30, 70, 128, 511, 4096, 131_072])
def test_tenths_of_round_numbers_are_exact(count):
    rows = np.zeros(count, np.int64)
    for tenths in range(1, 11):
        assert taught_per_sequence(rows, tenths / 10)[0] == -(-count * tenths // 10)


# --- counts of several processes ---


@given(st.lists(st.tuples(*[st.integers(0, 10**9)] * 4), min_size=1, max_size=4))
def test_counts_over_processes_are_their_sums(values):
    """Of losses that have nothing in some processes, too; whatever order a process names them."""
    names = ["kd/b", "kd/a+c", "kd/a"]
    each = [
        Counts(own[0], dict(list(zip(names, own[1:], strict=True))[:: 1 if r % 2 else -1]))
        for r, own in enumerate(values)
    ]
    sent = []
    for counts in each:
        counts.over(lambda v: sent.append(list(v)) or v)
    total = [float(sum(column)) for column in zip(*sent, strict=True)]
    found = [counts.over(lambda v: total) for counts in each]
    expected = Counts(
        sum(own[0] for own in values),
        {name: sum(own[1 + i] for own in values) for i, name in enumerate(names)},
    )
    assert all(f == expected for f in found)
    assert all(isinstance(v, int) for v in (found[0].labels, *found[0].rows.values()))
