"""Pseudo-labels: who is sure enough, what the loss is, and that the unsure are in no count."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.batch import Batch, SequenceTargetBatch, TokenLabelBatch
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import DistillTerm
from rekindle.train.objective.pseudo_labels import confident_only, pseudo_label_loss, sure_rows
from rekindle.train.objective.selection import StepPlan, count_rows, select_targets
from rekindle.train.record.coverage import Coverage

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def info_of(problem=SINGLE, kind="sequence", labels=3):
    task = {"sequence": "sequence_classification", "token": "token_classification"}[kind]
    about = {"name": "t", "task": task, "kind": kind, "view": "text", "num_labels": labels}
    return TeacherInfo(**about, problem=problem if kind == "sequence" else None)


def logits_of(*probs):
    return np.log(np.array(probs, np.float32))


values = st.floats(-30, 30, width=32)
rows_of_logits = st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=6)


@settings(deadline=None)
@given(rows_of_logits, st.sampled_from([0.0, 0.4, 0.9, 0.99]), st.sampled_from([SINGLE, MULTI]))
def test_the_sure_are_those_whose_probability_reaches_the_confidence(rows, least, problem):
    found = sure_rows(np.array(rows, np.float32), info_of(problem), least).tolist()
    for row, sure in zip(rows, found, strict=True):
        if problem == SINGLE:
            p = 1 / sum(math.exp(z - max(row)) for z in row)
        else:
            p = max(1 / (1 + math.exp(-abs(z))) for z in row)
        assert sure == (p >= least) or p == pytest.approx(least, abs=1e-6)


def test_the_confidence_is_09_unless_given_and_reaching_it_is_enough():
    # ½ and ½ are exact in floating point, and so is their softmax.
    halves = np.zeros((1, 2), np.float32)
    assert sure_rows(halves, info_of(labels=2), 0.5).tolist() == [True]
    assert sure_rows(halves, info_of(labels=2), 0.5001).tolist() == [False]
    logits = logits_of([0.89, 0.1, 0.01], [0.91, 0.05, 0.04])
    assert sure_rows(logits, info_of(), None).tolist() == [False, True]
    wide = np.array([[2.0, -2.1, 0.0], [2.3, 0.0, 0.0], [-2.3, 0.0, 0.0]], np.float32)
    assert sure_rows(wide, info_of(MULTI), None).tolist() == [False, True, True]  # σ(2.3) = 0.909


def test_the_loss_is_the_cross_entropy_on_the_experts_class():
    """By hand: −log ½ and −log ¼, whatever the expert gives the other classes."""
    student = torch.tensor(logits_of([0.5, 0.3, 0.2], [0.5, 0.25, 0.25]), requires_grad=True)
    expert = torch.tensor(logits_of([0.95, 0.03, 0.02], [0.01, 0.01, 0.98]))
    loss = pseudo_label_loss(student, expert, info_of(), None)
    assert float(loss.detach()) == pytest.approx(math.log(2) + math.log(4), rel=1e-6)
    loss.backward()
    expected = [[-0.5, 0.3, 0.2], [0.5, 0.25, -0.75]]  # p − one-hot
    assert student.grad.numpy() == pytest.approx(np.array(expected), abs=1e-6)


def test_labels_that_the_expert_is_not_sure_of_have_no_loss():
    student = torch.zeros(1, 3, requires_grad=True)
    expert = torch.tensor([[4.0, 0.5, -4.0]])
    loss = pseudo_label_loss(student, expert, info_of(MULTI), 0.9)
    assert float(loss.detach()) == pytest.approx(2 * math.log(2) / 3)
    loss.backward()
    assert student.grad[0].tolist() == pytest.approx([-0.5 / 3, 0.0, 0.5 / 3])


def batch_of(target):
    count = 4
    ids = np.zeros((count, 5), np.int32)
    lengths, index = np.full(count, 5), np.arange(count)
    return Batch(index, ["d"] * count, [None] * count, ids, lengths, None, {}, {"t": target})


FOUR = logits_of([0.95, 0.03, 0.02], [0.5, 0.3, 0.2], [0.02, 0.96, 0.02], [0.1, 0.1, 0.8])
TERM = DistillTerm(teachers=("t",), divergence="pseudo_label", confidence=0.9)


def test_the_unsure_are_neither_counted_nor_covered():
    present = np.array([True, True, True, True])
    batch = batch_of(SequenceTargetBatch(info_of(), present, FOUR, None))
    chosen = select_targets(batch, [TERM])
    assert chosen.targets["t"].present.tolist() == [True, False, True, False]
    assert batch.targets["t"].present.all()  # what was read stays as it was
    assert count_rows(chosen, "causal_lm", [TERM]).rows == {"kd/t": 2}
    coverage = Coverage()
    coverage.count(chosen, "causal_lm", StepPlan(0, 1.0, ((TERM, 1.0),), (), ()))
    found = coverage.sum_over_processes(list)
    assert (found["sequences_with_kd"], found["sequences_ce_only"]) == (2, 2)


def test_absent_rows_stay_absent():
    present = np.array([False, True, True, True])
    target = SequenceTargetBatch(info_of(), present, FOUR, None)
    assert confident_only(target, 0.9).present.tolist() == [False, False, True, False]


def test_tokens_of_which_the_expert_is_not_sure_are_left_out():
    rows, positions = np.array([0, 0, 1, 3]), np.array([1, 2, 0, 4])
    found = confident_only(TokenLabelBatch(info_of(kind="token"), rows, positions, FOUR), 0.9)
    assert (found.rows.tolist(), found.positions.tolist()) == ([0, 1], [1, 0])
    assert (found.logits == FOUR[[0, 2]]).all()
