"""What a run with a grown student says of the growth, and that it grows once."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.train import growth_report as module
from rekindle.train.config import GrowConfig, StudentConfig, TrainConfig
from rekindle.train.growth.grow import grow
from rekindle.train.growth_report import saved_growth
from rekindle.train.loop import train_student
from rekindle.train.order.held_out import split_corpus
from rekindle.train.student import Student
from testlib.models import STILL

QUICK = {
    "steps": 4,
    "batch_sequences": 6,
    "warmup_steps": 0,
    "checkpoint_every": 2,
    "held_out": 0.1,
    "evaluate_sequences": 8,
}


def train(world, out, grow_config, resume=False, stop_at=None, **values):
    cache = world.open()
    task = "masked_lm" if any("masked" in view for view in cache.views) else "causal_lm"
    student = StudentConfig(model=str(world.student), task=task, grow=grow_config)

    def report(step, values):
        if step == stop_at:
            raise KeyboardInterrupt

    config = TrainConfig.model_validate(QUICK | values)
    return train_student(cache, student, config, out, resume=resume, report=report)


def logits_and_labels(world, model, masked, index):
    """Of one held-out sequence, from the whole model's full logits."""
    cache = world.open()
    batch = cache.gather(
        np.array([index]), [], epoch=0, masked_view=cache.masked_view().name if masked else None
    )
    if masked:
        ids, places, labels = (
            batch.masked.input_ids,
            batch.masked.positions,
            batch.masked.labels,
        )
    else:
        ids, places = batch.input_ids, np.arange(batch.lengths[0] - 1)
        labels = ids[0, 1 : batch.lengths[0]]
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()).logits[0, places]
    size = cache.corpus.info["tokenizer"]["size"]
    return logits[:, :size], torch.from_numpy(labels).long()


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_the_report_is_what_the_models_say(masked_world, causal_world, tmp_path, kind):
    """Logits and losses once more, sequence by sequence."""
    world = masked_world if kind == "masked" else causal_world
    size = {"layers": 3, "hidden_size": 24}  # far from exact
    config = GrowConfig(**size, noise_std=0.01, measure_sequences=5)
    result = train(world, tmp_path / "run", config, steps=1)
    report = json.loads((tmp_path / "run/growth.json").read_text())
    factory = AutoModelForMaskedLM if kind == "masked" else AutoModelForCausalLM
    before = factory.from_pretrained(world.student).eval()
    after = grow(before, config)
    held_out = split_corpus(world.open(), 0.1).held_out.spread(8)
    chosen = held_out[[i * len(held_out) // 5 for i in range(5)]]
    changes, losses = [], ([], [])
    for index in chosen.tolist():
        found = [logits_and_labels(world, m, kind == "masked", index) for m in (before, after)]
        changes.append((found[1][0] - found[0][0]).abs())
        for (logits, labels), own in zip(found, losses, strict=True):
            own.append(F.cross_entropy(logits, labels, reduction="none"))
    change = torch.cat(changes)
    assert (report["sequences"], report["positions"]) == (5, len(change))
    assert report["max_logit_change"] == pytest.approx(float(change.max()), rel=1e-4)
    assert report["mean_logit_change"] == pytest.approx(float(change.mean()), rel=1e-4)
    assert report["mean_logit_change"] > 0.1
    for name, own in zip(("before", "after"), losses, strict=True):
        loss = float(torch.cat(own).mean())
        assert report[name]["ce"] == pytest.approx(loss, rel=1e-4)
        assert report[name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert report["from"]["layers"] == 2
    assert (report["to"]["layers"], report["to"]["hidden_size"]) == (3, 24)
    for name, model in (("from", before), ("to", after)):
        assert report[name]["parameters"] == sum(p.numel() for p in model.parameters())
    assert json.loads((result.directory / "summary.json").read_text())["growth"] == report


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_exact_growth_is_measured_as_such(masked_world, causal_world, tmp_path, kind):
    world = masked_world if kind == "masked" else causal_world
    train(world, tmp_path / "run", GrowConfig(layers=3, heads=4, preserve="exact"), steps=1)
    report = saved_growth(tmp_path / "run")["growth"]
    assert report["max_logit_change"] < 1e-4
    assert report["after"]["ce"] == pytest.approx(report["before"]["ce"], abs=1e-5)
    factory = AutoModelForMaskedLM if kind == "masked" else AutoModelForCausalLM
    model, info = factory.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info.values()), info
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (3, 4)
    assert Student.from_pretrained(tmp_path / "run").model.config.hidden_size == 32


@pytest.mark.parametrize(
    ("grown", "told"),
    [
        ({"intermediate_size": 70}, True),
        ({"intermediate_size": 70, "noise_std": 0.01}, False),
        ({"layers": 3}, False),  # nothing is divided
    ],
)
def test_copies_that_would_stay_equal_are_told_of(causal_world, tmp_path, caplog, grown, told):
    train(causal_world, tmp_path / "run", GrowConfig.model_validate(grown), steps=1)
    assert ("Set student.grow.noise_std (0.01" in caplog.text) == told
    assert saved_growth(tmp_path / "run")["growth"]["noise_std"] == grown.get("noise_std", 0)


def test_the_former_noise_is_refused_but_for_none():
    assert GrowConfig.model_validate({"layers": 3, "noise": 0.0}) == GrowConfig(layers=3)
    with pytest.raises(InputError, match=r"noise: 0.1 was a multiple of .* Set noise_std, and"):
        parse_settings(GrowConfig, {"layers": 3, "noise": 0.1})


def test_a_resumed_run_grows_nothing_twice(masked_world, tmp_path, monkeypatch):
    config = GrowConfig(layers=3, hidden_size=24, noise_std=0.01)
    train(masked_world, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        train(masked_world, tmp_path / "cut", config, stop_at=3)
    first = (tmp_path / "cut/growth.json").read_text()
    assert (tmp_path / "cut/checkpoints/step-00000002").is_dir()
    monkeypatch.setattr(module, "compare_students", None)  # measured again, it would fail
    train(masked_world, tmp_path / "cut", config, resume=True)
    assert (tmp_path / "cut/growth.json").read_text() == first
    one, other = (
        Student.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert json.loads((tmp_path / "cut/summary.json").read_text())["growth"] == json.loads(first)


def test_a_report_that_a_kill_prevented_is_made_after_all(masked_world, tmp_path, monkeypatch):
    config = GrowConfig(layers=3)
    train(masked_world, tmp_path / "whole", config)
    with monkeypatch.context() as patched:
        patched.setattr("rekindle.train.loop.save_growth", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(masked_world, tmp_path / "cut", config)
    assert not (tmp_path / "cut/growth.json").exists()
    train(masked_world, tmp_path / "cut", config, resume=True)
    assert saved_growth(tmp_path / "cut") == saved_growth(tmp_path / "whole")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.slow  # quick: a grown student among those of test_distributed
def test_two_processes_grow_and_train_the_student_of_one(
    masked_world, make_model, wordpiece, tmp_path
):
    """In shards, with prompts and without dropout, whose noise is drawn per process."""
    still = STILL | {"hidden_size": 16}
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **still)
    grown = {"layers": 3, "hidden_size": 32, "noise_std": 0.1, "preserve": "exact"}
    student = {"model": str(model), "grow": grown, "domain_prompts": True}
    values = QUICK | {"batch_sequences": 4, "parallel": "fsdp"}
    jobs = [{"student": student, "train": values, "out": str(tmp_path / "two")}]
    (tmp_path / "jobs.json").write_text(json.dumps({"cache": str(masked_world.path), "jobs": jobs}))
    script = Path(__file__).with_name("torchrun_jobs.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(script), str(tmp_path / "jobs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    config = TrainConfig.model_validate(values)
    wanted = StudentConfig.model_validate(student)
    train_student(masked_world.open(), wanted, config, tmp_path / "one")
    assert saved_growth(tmp_path / "two") == saved_growth(tmp_path / "one")
    assert saved_growth(tmp_path / "one")["growth"]["max_logit_change"] < 1e-4
    one, two = (Student.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=5e-5)
    left = [{p.name for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert left[0] == left[1]
    assert {"growth.json", "prompts.safetensors"} <= left[0]


def test_a_run_of_another_growth_is_not_resumed(masked_world, tmp_path):
    train(masked_world, tmp_path / "run", GrowConfig(layers=3), steps=1)
    with pytest.raises(CheckpointError, match="another configuration"):
        train(masked_world, tmp_path / "run", GrowConfig(layers=4), steps=1, resume=True)


def test_without_held_out_text_nothing_is_measured(masked_world, tmp_path):
    train(masked_world, tmp_path / "run", GrowConfig(layers=3), steps=1, held_out=0.0)
    report = saved_growth(tmp_path / "run")["growth"]
    assert (report["sequences"], report["max_logit_change"]) == (0, None)
    assert report["before"] == {"ce": None, "perplexity": None}


def test_a_run_without_growth_says_nothing_of_it(masked_world, tmp_path):
    train(masked_world, tmp_path / "run", None, steps=1)
    assert not (tmp_path / "run/growth.json").exists()
    assert "growth" not in json.loads((tmp_path / "run/summary.json").read_text())


def test_what_cannot_grow_is_refused_before_anything_is_written(masked_world, tmp_path):
    with pytest.raises(InputError, match="layers would shrink"):
        train(masked_world, tmp_path / "run", GrowConfig(layers=1))
    assert not (tmp_path / "run").exists()


def test_a_damaged_report_is_named(tmp_path):
    (tmp_path / "growth.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"growth.json is damaged.*resume"):
        saved_growth(tmp_path)
