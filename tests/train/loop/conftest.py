"""A run that nothing interrupted, and what the steps of a run read from their device."""

import json
from functools import partial

import pytest

from rekindle.train import loop
from rekindle.train.steps.take import Judge
from testlib.host.reads import Reads, counting_copies
from testlib.loop import ALL, run, train_config


@pytest.fixture(scope="session")
def whole(masked_world, tmp_path_factory):
    """An uninterrupted run with everything in it, dropout on, and its result."""
    out = tmp_path_factory.mktemp("whole") / "run"
    config = json.loads((masked_world.student / "config.json").read_text())
    assert config["hidden_dropout_prob"] > 0
    seen = []
    result = run(
        masked_world, out, train_config(ALL), report=lambda step, values: seen.append(step)
    )
    assert seen == list(range(1, 11))
    return result


@pytest.fixture
def reads_of_steps(monkeypatch):
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
