"""AdamW as the configuration wants it."""

import pytest
import torch
from torch import nn

from rekindle.data.errors import CheckpointError, InputError
from rekindle.train.optimizer import adamw
from testlib.loop import run, stop_at, train_config
from testlib.students import same_weights


def test_betas_and_eps_are_as_given_and_by_default_those_of_ever():
    given = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    (one, two) = adamw(given, 0.1, 0.01, (0.8, 0.95), 1e-6).param_groups
    assert (one["betas"], one["eps"]) == (two["betas"], two["eps"]) == ((0.8, 0.95), 1e-6)
    plain = adamw(given, 0.1, 0.01).param_groups[0]
    assert (plain["betas"], plain["eps"]) == ((0.9, 0.999), 1e-8)
    with pytest.raises(InputError, match=r"betas\.1.*less than 1"):
        train_config(betas=[0.9, 1.0])


def test_they_are_part_of_what_a_run_is(masked_world, tmp_path):
    short = {"steps": 3, "checkpoint_every": 2, "evaluate_every": 3}
    run(masked_world, tmp_path / "usual", train_config(**short))
    other = train_config(**short, betas=[0.5, 0.9], eps=1e-4)
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, tmp_path / "run", other, report=stop_at(2))
    with pytest.raises(CheckpointError, match=r"train\.betas"):
        run(masked_world, tmp_path / "run", train_config(**short), resume=True)
    run(masked_world, tmp_path / "run", other, resume=True)
    assert not same_weights(tmp_path / "run", tmp_path / "usual")
