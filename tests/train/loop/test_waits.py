"""A step given to a device waits for nothing that the device must say."""

from functools import partial

import pytest

from rekindle.train import loop
from rekindle.train.steps.take import Judge
from testlib.host.reads import Reads, counting_copies
from testlib.loop import ALL, run, train_config

STEPS = 4
FOUND = {"method": "replaced_tokens", "teacher": "big"}
CAUSAL = [{"teachers": ["lm"], "temperature": 2.0}, {"teachers": ["sense"]}]


@pytest.fixture
def watched(monkeypatch):
    """What each step reads, as if the device were a GPU: [before it, in it]."""
    monkeypatch.setattr(loop, "Judge", partial(Judge, late=True))
    take, found, copied = loop.take_step, [], counting_copies(monkeypatch)

    def take_step(*given):
        before = dict(+copied)
        copied.clear()
        with Reads() as reads:
            taken = take(*given)
        found.append((before, dict(+reads.found + copied)))
        copied.clear()
        return taken

    monkeypatch.setattr(loop, "take_step", take_step)
    return found


@pytest.mark.parametrize(
    ("world", "distill", "student", "values"),
    [
        ("masked_world", ALL, {}, {}),
        ("masked_world", ALL, {}, {"micro_batch_sequences": 4}),
        ("masked_world", ALL, {}, {"log_gradients_every": 1}),
        ("masked_world", ALL, {"domain_prompts": True}, {"log_gradients_every": 1}),
        ("masked_world", [], {}, {"log_gradients_every": 1, "objective": {"methods": [FOUND]}}),
        ("causal_world", CAUSAL, {}, {"log_gradients_every": 1}),  # padded batches
        ("causal_world", CAUSAL, {}, {"batch_sequences": 1}),  # full ones
        ("causal_world", CAUSAL, {"domain_prompts": True}, {}),
    ],
)
def test_a_step_reads_nothing_from_its_device(
    request, tmp_path, watched, world, distill, student, values
):
    world = request.getfixturevalue(world)
    config = train_config(
        distill, **{"steps": STEPS, "evaluate_every": 9, "log_gradients_every": None} | values
    )
    run(world, tmp_path / "run", config, student=student)
    assert [inside for _, inside in watched] == [{}] * STEPS
    # what was left by the step before is read outside it, once
    assert [before for before, _ in watched[1:]] == [{}, {"tolist": 1}, {"tolist": 1}]
