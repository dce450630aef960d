"""When a run is stopped: losses that are no numbers, and losses that explode."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.train.record.watch import EARLIEST, LATEST, WINDOW, LossWatch, recent_losses

calm = st.lists(st.floats(0.5, 3.0), min_size=EARLIEST, max_size=300)


@given(calm)
def test_a_calm_run_is_never_stopped(losses):
    watch = LossWatch(10.0)
    assert all(watch.complaint(loss, 1.0) is None for loss in losses)


@given(calm, st.floats(31.0, 1e30))
def test_an_explosion_is_seen_at_once(losses, last):
    watch = LossWatch(10.0)
    for loss in losses:
        watch.complaint(loss, 1.0)
    assert "more than 10 times the median" in watch.complaint(last, 1.0)
    assert LossWatch(None, [(loss, ()) for loss in losses]).complaint(last, 1.0) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stops_at_any_step(value):
    assert "the loss is" in LossWatch(10.0).complaint(value, 1.0)
    assert "the grad_norm is" in LossWatch(None).complaint(1.0, value)


def test_next_to_nothing_times_twenty_is_no_explosion():
    watch = LossWatch(10.0, [(0.001, ())] * 50)
    assert watch.complaint(0.5, 1.0) is None
    assert watch.complaint(1.2, 1.0) is not None


@pytest.mark.parametrize("before", [1, 5, 60])
def test_steps_that_taught_nothing_are_not_the_usual_ones(before):
    """Where no token of a whole batch is masked, the loss is exactly 0."""
    watch = LossWatch(10.0)
    assert all(watch.complaint(loss, 1.0) is None for loss in [0.0] * before + [7.0, 0.0, 8.0])
    assert watch.complaint(80.0, 1.0).endswith("the first step's, 7")


def test_early_losses_are_held_against_the_first():
    watch = LossWatch(10.0)
    assert all(watch.complaint(loss, 1.0) is None for loss in [8.0, 20.0, 70.0, 3.0])
    assert watch.complaint(81.0, 1.0).endswith("more than 10 times the first step's, 8")


def test_a_term_whose_weight_jumps_is_no_explosion():
    """`schedule: step` lets a cross-entropy of 8 nats join a divergence of 0.05."""
    watch = LossWatch(10.0)
    assert all(watch.complaint(0.05, 1.0, (0.0, 1.0)) is None for _ in range(100))
    assert all(watch.complaint(8.05, 1.0, (1.0, 1.0)) is None for _ in range(EARLIEST))
    assert "the median" in watch.complaint(90.0, 1.0, (1.0, 1.0))


def test_a_loss_may_begin_at_nothing_and_rise():
    """As a term's does whose weight begins at 0."""
    watch = LossWatch(10.0)
    assert all(watch.complaint(0.2 * step, 1.0) is None for step in range(200))


@given(st.lists(st.floats(0.5, 30.0), min_size=1, max_size=250), st.integers(0, 250))
def test_a_resumed_watch_knows_what_the_other_knew(losses, at):
    """Whatever step a run is resumed at, it is stopped by what would have stopped it."""
    at = min(at, len(losses))
    whole, answers = LossWatch(3.0), []
    for loss in losses:
        answers.append(whole.complaint(loss, 1.0))
        if answers[-1] is not None:
            return  # a stopped run is not resumed past its stop
    records = [{"kind": "train", "step": n + 1, "loss": x} for n, x in enumerate(losses)]
    records.append({"kind": "evaluate", "step": at, "loss": 1e9})
    resumed = LossWatch(3.0, recent_losses(records, at))
    assert [resumed.complaint(loss, 1.0) for loss in losses[at:]] == answers[at:]
    assert len(recent_losses(records, at)) == min(at, WINDOW + LATEST)


@given(st.lists(st.floats(0.5, 30.0), min_size=1, max_size=60), st.integers(0, 60), st.data())
def test_a_late_watch_judges_alike_wherever_it_is_asked_or_goes_on(losses, at, data):
    """Of the step before nothing is known when a step begins, though it may have been read."""
    whole, limits = LossWatch(3.0, late=1), []
    for step in range(len(losses)):
        limits.append(whole.usual())
        if step:
            whole.complaint(losses[step - 1], 1.0, usual=limits[step - 1])
    if any(loss > usual.limit for loss, usual in zip(losses, limits, strict=True)):
        return  # a stopped run is not resumed past its stop
    at = min(at, len(losses))
    resumed, unread = LossWatch(3.0, [(loss, ()) for loss in losses[:at]], late=1), []
    for step in range(at, len(losses)):
        unread.append((losses[step], resumed.usual()))
        assert unread[-1][1] == limits[step]
        for loss, usual in unread[: len(unread) - data.draw(st.integers(0, 1))]:  # a checkpoint
            resumed.complaint(loss, 1.0, usual=usual)
            del unread[0]
