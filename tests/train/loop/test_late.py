"""Steps that are read late, as on a GPU: nothing is waited for, and nothing else changes."""

import json
from functools import partial

import pytest
import torch

from rekindle.data.errors import CheckpointError, InputError
from rekindle.train import loop, prepare
from rekindle.train.objective.objective import MicroBatchLoss, Objective
from rekindle.train.objective.ready import BatchPreparer
from rekindle.train.steps.take import Judge
from testlib.loop import ALL, run, stop_at, train_config
from testlib.objective.ahead import Noted, Sends
from testlib.students import metrics, same_weights


@pytest.fixture
def late(monkeypatch):
    """As if the device were a GPU: a step is read when the next one was given to it."""
    made = []

    def judge(training, recent):
        made.append(Judge(training, recent, late=True))
        return made[-1]

    monkeypatch.setattr(loop, "Judge", judge)
    return made


def test_a_run_read_late_is_the_same_to_the_bit(masked_world, whole, tmp_path, late):
    """Its weights, what is logged of each step, and where it goes on."""
    out, seen = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, out, train_config(ALL), report=stop_at(7))
    config = train_config(ALL)
    result = run(
        masked_world, out, config, resume=True, report=lambda done, values: seen.append(done)
    )
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert (result.coverage, result.evaluation) == (whole.coverage, whole.evaluation)
    assert seen == list(range(6, 11))  # evaluated at 5, and the best so far
    assert len(late) == 2


def broken_at(step, spoil):
    """The loss of a step, spoilt."""
    loss = Objective.loss

    def broken(self, student, batch, counts, plan, device):
        found = loss(self, student, batch, counts, plan, device)
        return MicroBatchLoss(spoil(found.total), found.terms) if plan.step == step else found

    return broken


def of_optimizer(optimizer):
    """All that it knows of each parameter."""
    states = optimizer.state_dict()["state"].values()
    return [value.clone() for state in states for value in state.values()]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda total: total * torch.nan, "the loss is nan at step 7"),
        (lambda total: total + (total * 0).sqrt() * 0, "the grad_norm is nan at step 7"),
        (lambda total: total * 1000, "more than 10 times the first step's"),
    ],
)
def test_a_bad_step_changes_nothing(masked_world, tmp_path, monkeypatch, late, spoil, told):
    """Nor does the one after it, which was given to the device before it was known."""
    distill = [{"teachers": ["big"]}, {"teachers": ["sense"]}]
    config = train_config(distill, checkpoint_every=10, evaluate_every=20, keep_best=None)
    monkeypatch.setattr(Objective, "loss", broken_at(6, spoil))
    before, apply = {}, Judge.apply

    def noting(judge, *given):
        student, optimizer = judge.training.student.student, judge.training.optimizer
        before[len(before)] = [p.detach().clone() for p in student.parameters()] + of_optimizer(
            optimizer
        )
        apply(judge, *given)

    monkeypatch.setattr(Judge, "apply", noting)
    with pytest.raises(InputError, match=told) as late_error:
        run(masked_world, tmp_path / "late", config)
    assert len(before) == 8  # two steps were given to the device: the bad one, and the next
    training = late[0].training
    after = [p.detach() for p in training.student.student.parameters()]
    after += of_optimizer(training.optimizer)
    for now, then, still in zip(after, before[6], before[7], strict=True):
        assert torch.equal(now, then)
        assert torch.equal(still, then)
    assert [r["step"] for r in metrics(tmp_path / "late")] == list(range(1, 7))
    monkeypatch.setattr(loop, "Judge", partial(Judge, late=False))
    before.clear()
    with pytest.raises(InputError, match=told) as error:
        run(masked_world, tmp_path / "once", config)
    assert len(before) == 7
    assert str(error.value).replace("once", "late") == str(late_error.value)
    name = "stopped-at-step-00000007.json"
    late_suspects, suspects = (tmp_path / which / name for which in ("late", "once"))
    assert json.loads(late_suspects.read_text()) == json.loads(suspects.read_text())


def test_batches_of_similar_lengths_go_on_to_the_same_bits(masked_world, tmp_path):
    """Also in micro-batches, and beside replay; the evaluation is in order of length, too."""
    more = {"batching": "similar_lengths", "micro_batch_sequences": 4, "steps": 6}
    config = train_config(ALL, domains=["odd"], replay={"domains": ["even"]}, **more)
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, tmp_path / "run", config, report=stop_at(5))
    run(masked_world, tmp_path / "run", config, resume=True)
    run(masked_world, tmp_path / "whole", config)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"train\.batching"):
        run(masked_world, tmp_path / "run", train_config(ALL, steps=6), resume=True)


def test_batches_that_were_sent_ahead_teach_the_same(masked_world, whole, tmp_path, monkeypatch):
    """And every copy that is sent is what the loss takes: none is made again."""
    copies, sends = Noted(), Sends(monkeypatch)
    monkeypatch.setattr(
        prepare,
        "BatchPreparer",
        lambda objective, size, _, count: BatchPreparer(objective, size, copies, count),
    )
    out = run(masked_world, tmp_path / "run", train_config(ALL)).directory
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert len(copies.sent) > 200
    assert not sends.unused(copies)
