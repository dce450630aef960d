"""Stage 2 on a CUDA device: the student that a CPU trains, in float32; near it, in bf16."""

import json
import os
import subprocess
import sys

import pytest
import torch

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train import loop
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import World
from rekindle.train.loop import train_student
from rekindle.train.objective.objective import MicroBatchLoss, Objective
from rekindle.train.record.run_log import read_metrics
from testlib.models import STILL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU = torch.device("cpu")
EVERYTHING = [
    {"teachers": ["big"], "temperature": 2.0, "weight": {"over": 0.6}},
    {"teachers": ["whole"], "weight": 0.4, "divergence": "jsd"},
    {"teachers": ["wide"], "weight": 0.3, "entropy_fraction": 0.5},
    {"teachers": ["odd.lm", "even.lm"], "combine": "route", "weight": 0.3},
    {"teachers": ["sense", "tags"], "weight": 0.2},
    {"teachers": ["pair"], "weight": 0.2},
]


def values_of(**values):
    quick = {"steps": 8, "batch_sequences": 6, "warmup_steps": 2, "held_out": 0.1}
    quick |= {"learning_rate": 1e-3, "checkpoint_every": 3, "evaluate_every": 4}
    quick |= {"objective": {"distill": EVERYTHING}, "precision": "fp32"}
    return quick | values


def losses(out):
    return [r["loss"] for r in read_metrics(out)]


@pytest.fixture(scope="module")
def student(make_model, wordpiece):
    off = STILL | {"hidden_size": 16}
    return {"model": str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **off))}


@pytest.fixture
def train(masked_world, student, tmp_path):
    def run(name, world=None, **values):
        config = parse_settings(TrainConfig, values_of(**values))
        chosen = StudentConfig.model_validate(student)
        train_student(masked_world.open(), chosen, config, tmp_path / name, world=world)
        return losses(tmp_path / name)

    return run


def test_a_gpu_trains_the_student_of_a_cpu(train):
    on_cpu = train("cpu", World(0, 1, CPU, CPU))
    assert train("gpu") == pytest.approx(on_cpu, rel=2e-3)
    assert train("parts", micro_batch_sequences=2) == pytest.approx(on_cpu, rel=2e-3)


@pytest.mark.parametrize("option", ["compile", "gradient_checkpointing"])
def test_ways_to_run_it_change_nothing(train, option):
    assert train("with", **{option: True}) == pytest.approx(train("without"), rel=2e-3)


@pytest.fixture
def waits_for_nothing(monkeypatch):
    """waits_for_nothing(): from then on PyTorch refuses whatever would make the host wait while a
    step is given to the device.
    """
    take = loop.take_step

    def watched(*given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return take(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return lambda: monkeypatch.setattr(loop, "take_step", watched)


@pytest.mark.parametrize("values", [{"log_gradients_every": None}, {"log_gradients_every": 3}])
def test_a_step_waits_for_nothing(train, waits_for_nothing, values):
    expected = train("plain")
    waits_for_nothing()
    assert train("watched", **values) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("batch", [1, 6])  # full batches, padded ones
@pytest.mark.parametrize("prompts", [False, True])
def test_a_causal_student_waits_for_nothing(
    causal_world, tmp_path, waits_for_nothing, batch, prompts
):
    given = {"model": str(causal_world.student), "task": "causal_lm", "domain_prompts": prompts}
    objective = {"distill": [{"teachers": ["lm"], "temperature": 2.0}, {"teachers": ["sense"]}]}
    values = values_of(objective=objective, batch_sequences=batch)
    waits_for_nothing()
    student, config = StudentConfig.model_validate(given), parse_settings(TrainConfig, values)
    train_student(causal_world.open(), student, config, tmp_path / "run")
    assert len(losses(tmp_path / "run")) >= config.steps


def test_a_bad_step_changes_no_weight(train, monkeypatch):
    """It is read one step late; both are taken back on the device."""
    loss, weights = Objective.loss, []

    def broken(self, student, batch, counts, plan, device):
        weights.append([p.detach().clone() for p in student.parameters()])
        found = loss(self, student, batch, counts, plan, device)
        return MicroBatchLoss(found.total * (torch.nan if plan.step == 4 else 1.0), found.terms)

    monkeypatch.setattr(Objective, "loss", broken)
    with pytest.raises(InputError, match="the loss is nan at step 5"):
        train("broken", log_gradients_every=None)
    assert len(weights) == 6
    assert all(map(torch.equal, weights[4], weights[5]))
    assert not all(map(torch.equal, weights[3], weights[4]))


def test_bf16_is_near_float32(train):
    assert train("bf16", precision="bf16") == pytest.approx(train("fp32"), rel=0.05)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_with_nccl(masked_world, student, train, tmp_path, parallel):
    """As many processes as there are GPUs; one is enough to go through NCCL."""
    count = 2 if torch.cuda.device_count() > 1 else 1
    values = values_of(parallel=parallel)
    jobs = [{"student": student, "train": values, "out": str(tmp_path / "many")}]
    given = tmp_path / "jobs.json"
    given.write_text(json.dumps({"cache": str(masked_world.path), "jobs": jobs}))
    script = os.path.join(os.path.dirname(__file__), "torchrun_jobs.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={count}", script, str(given)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "many") == pytest.approx(train("one"), rel=2e-3)
