"""A run that nothing interrupted."""

import json

import pytest

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
