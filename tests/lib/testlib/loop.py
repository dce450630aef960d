"""Short runs of stage 2, and the comparison of two runs."""

import threading

import pytest
import torch

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student

CPU = torch.device("cpu")
ALL = [
    {"teachers": ["big"], "temperature": 2.0, "weight": {"over": 0.6}},
    {"teachers": ["odd.lm"], "weight": 0.3},
    {"teachers": ["sense", "tags"], "weight": 0.2},
    {"teachers": ["pair"], "weight": 0.2},
]


def train_config(distill=(), **values):
    """Return ten short steps; ``hard`` goes into the objective."""
    steps = values.get("steps", 10)
    hard = {"hard": {"weight": values.pop("hard")}} if "hard" in values else {}
    quick = {
        "steps": 10,
        "batch_sequences": 6,
        "learning_rate": 1e-3,
        "warmup_steps": min(2, steps - 1),
        "checkpoint_every": 4,
        "evaluate_every": 5,
        "evaluate_sequences": 8,
        "held_out": 0.1,
        "objective": {**hard, "distill": list(distill)},
    }
    return parse_settings(TrainConfig, quick | values)


def run(world, out, config=None, **options):
    """Train the world's student; ``student``: more of its configuration."""
    cache = options.pop("cache", None) or world.open()
    task = "masked_lm" if any("masked" in v for v in cache.views) else "causal_lm"
    about = {"model": str(options.pop("model", world.student)), "task": task}
    student = StudentConfig.model_validate(about | options.pop("student", {}))
    return train_student(cache, student, config or train_config(), out, **options)


def sequences(result):
    """Return how many sequences were trained with what."""
    return {n: result.coverage[f"sequences_{n}"] for n in ("with_kd", "ce_only", "neither")}


def stop_at(step, error=KeyboardInterrupt):
    def report(done, values):
        if done == step:
            raise error

    return report


def no_reader_left():
    return not [t for t in threading.enumerate() if t.name == "prefetch" and t.is_alive()]


def refused(world, tmp_path, message, config=None, error=InputError, **options):
    out = tmp_path / "refused"
    with pytest.raises(error, match=message):
        run(world, out, config, **options)
    assert not out.exists()  # the next try, with the mistake fixed, finds a free directory
