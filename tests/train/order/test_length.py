"""A run's length in epochs or tokens: so many steps, said and kept."""

import json

import numpy as np
import pytest

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.overrides import set_value
from rekindle.train.config import TrainConfig
from rekindle.train.order.length import in_steps
from rekindle.train.order.sequences import choose_sequences
from rekindle.train.record.identity import steps_of_run
from rekindle.train.record.run_log import read_metrics
from testlib.loop import run, stop_at, train_config


def of(**values):
    return parse_settings(TrainConfig, {"batch_sequences": 6, "held_out": 0.1} | values)


@pytest.mark.parametrize("epochs", [0.5, 1, 1.25, 3])
@pytest.mark.parametrize(
    "more", [{}, {"domains": ["even"]}, {"domains": ["odd"], "replay": {"domains": ["even"],
     "fraction": 0.25, "choose": "uniform"}}],
)  # fmt: skip
def test_epochs_are_over_when_so_many_of_the_sequences_have_been_read(masked_world, epochs, more):
    cache = masked_world.open()
    config = in_steps(cache, of(epochs=epochs, **more))
    order = choose_sequences(cache, config).order
    own = set(order.sequences.select(np.arange(len(order.sequences))).tolist())
    read = [sum(n in own for n in order.at(s).tolist()) for s in range(config.steps)]
    assert sum(read[:-1]) < epochs * len(own) <= sum(read) + 1


def test_tokens_are_those_of_all_processes(masked_world):
    cache = masked_world.open()
    config = in_steps(cache, of(tokens=2000))
    mean = cache.corpus.tokens / len(cache)
    assert (config.steps - 1) * 6 * mean < 2000 <= config.steps * 6 * mean


def test_what_follows_from_the_steps_follows(masked_world):
    """The warm-up, and what is refused."""
    cache = masked_world.open()
    config = in_steps(cache, of(epochs=10))
    assert config.warmup_steps == config.steps // 10 > 0
    assert "warmup_steps" not in config.model_fields_set
    assert in_steps(cache, config) is config
    with pytest.raises(InputError, match=r"1 epoch = \d+ steps here; warmup_steps 90"):
        in_steps(cache, of(epochs=1, warmup_steps=90))
    assert of().steps == 1000
    assert of(epochs=2).model_dump(mode="json")["steps"] is None
    assert parse_settings(TrainConfig, of(epochs=2).model_dump(mode="json")) == of(epochs=2)


@pytest.mark.parametrize("given", [{}, {"warm_head_steps": 100}, {"warmup_steps": 7}])
def test_a_file_that_is_written_before_the_steps_are_known_reads_the_same_again(given):
    config = parse_settings(TrainConfig, {"tokens": 10_000_000} | given)
    again = parse_settings(TrainConfig, config.model_dump(mode="json", by_alias=True))
    for steps in (500, 2000):
        assert again.of_steps(steps).warmup_steps == config.of_steps(steps).warmup_steps


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 10, "epochs": 2}, "steps and epochs are given"),
        ({"epochs": 2, "tokens": 100}, "epochs and tokens are given"),
        ({"steps": None}, "nothing else says how long"),
        ({"steps": 0}, "without steps"),
        ({"epochs": 0}, "greater than 0"),
    ],
)
def test_a_length_is_given_once(given, words):
    with pytest.raises(InputError, match=words) as refused:
        of(**given)
    assert "factory" not in str(refused.value)  # of what would have followed


@pytest.mark.parametrize("name", ["epochs", "tokens", "steps"])
def test_an_override_of_one_takes_the_place_of_the_others(name):
    values = {"train": {"steps": 10, "tokens": 5, "seed": 1}, "corpus": {"steps": 1}}
    set_value(values, f"train.{name}=2")
    assert values == {"train": {name: 2, "seed": 1}, "corpus": {"steps": 1}}


def test_a_run_records_its_steps_and_keeps_them(masked_world, tmp_path, caplog, monkeypatch):
    """They are counted once; another length is another run."""
    values = {"warmup_steps": 1, "checkpoint_every": 1, "held_out": 0.5, "evaluate_sequences": 2}
    plain = train_config([], **values).model_dump(mode="json")
    config = parse_settings(TrainConfig, plain | {"steps": None, "epochs": 0.75})
    with caplog.at_level("INFO", logger="rekindle"), pytest.raises(KeyboardInterrupt):
        run(masked_world, tmp_path / "run", config, report=stop_at(2))
    about = json.loads((tmp_path / "run/run.json").read_text())
    steps = about["length"]["steps"]
    assert about["train"]["steps"] is None
    assert f"train: 0.75 epochs = {steps} steps of 6 sequences" in caplog.text
    assert steps_of_run(tmp_path / "run") == steps > 2
    monkeypatch.setattr("rekindle.train.order.length.steps_of", lambda *_: 10**6)
    other = parse_settings(TrainConfig, plain | {"steps": None, "epochs": 1})
    with pytest.raises(CheckpointError, match=r"train\.epochs: 0\.75 there, 1\.0 here"):
        run(masked_world, tmp_path / "run", other, resume=True)
    result = run(masked_world, tmp_path / "run", config, resume=True)
    assert result.steps == steps
    assert [r["step"] for r in read_metrics(result.directory) if r["kind"] == "train"] == list(
        range(1, steps + 1)
    )
