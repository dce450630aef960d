"""Stage 2 in two processes with gloo: DDP and FSDP2 train the student that one process trains."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student
from rekindle.train.record.run_log import read_metrics
from testlib.models import NARROW, STILL
from testlib.several.forked import end_well, forked_world
from testlib.students import assert_same_run, assert_same_weights, weights

SCRIPT = Path(__file__).with_name("torchrun_jobs.py")
EVERYTHING = [
    {"teachers": ["big"], "temperature": 2.0, "weight": {"over": 0.6}},
    {"teachers": ["odd.lm", "even.lm"], "combine": "route", "weight": 0.3},
    {"teachers": ["sense", "tags"], "weight": 0.2},
    {"teachers": ["pair"], "weight": 0.2},
    {
        "teachers": ["score"],
        "ranking": {"group": "domain", "pairs": "best", "listwise": 2.0},
        "weight": 0.05,
    },
]
SHORT = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 2}
JOBS = {
    "ddp": {"parallel": "ddp"} | SHORT,
    "fsdp": {"parallel": "fsdp"} | SHORT,
    "ddp-micro": {"parallel": "ddp", "micro_batch_sequences": 1, "prefetch_threads": 3} | SHORT,
    "fsdp-micro": {"parallel": "fsdp", "micro_batch_sequences": 2, "gradient_checkpointing": True}
    | SHORT,
}
# One sequence a process and a teacher of half of them: some steps have no row in one process, or
# in none.
SPARSE = {
    "batch_sequences": 2,
    "objective": {"hard": {"weight": 0}, "distill": [{"teachers": ["odd.lm"]}]},
}
# The same of a method, with a head of its own.
REPLACED = {
    "batch_sequences": 2,
    "objective": {"methods": [{"method": "replaced_tokens", "teacher": "odd.lm"}]},
}
# What methods bring, all in one run: a grown student with domain prompts, choice of sequences.
TOGETHER = SHORT | {
    "held_out": 0.4,
    "evaluate_domains": True,
    "domains": ["even"],
    "replay": {"domains": ["odd"], "fraction": 0.5},
    "curriculum": {"teacher": "big", "until": 0.5},
    "micro_batch_sequences": 1,
    "objective": {
        "distill": [
            {"teachers": ["score"], "ranking": {"group": "domain"}, "weight": 0.05},
            {"teachers": ["pair"], "weight": 0.2},
            {"teachers": ["sense"], "divergence": "pseudo_label", "confidence": 0.4},
        ],
        "methods": [{"method": "replaced_tokens", "teacher": "big"}],
    },
}
FAMILY = {"head": "family"}
RTD = {"task": "replaced_token_detection"}
GROWN = {
    "task": "replaced_token_detection",
    "domain_prompts": True,
    "grow": {"layers": 4, "preserve": "exact"},
}
# What is replayed follows evaluations: every process must learn the same of them.
REPLAY = {
    "domains": ["odd"],
    "replay": {"domains": ["even"], "fraction": 0.3, "choose": "loss_change"},
    "evaluate_domains": True,
    "steps": 6,  # the weights of three of them follow losses
    "checkpoint_every": 6,
    "evaluate_every": 1,
    "held_out": 0.2,
    "objective": {"distill": []},
}


def train_config(**values):
    quick = {
        "steps": 8,
        "batch_sequences": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "checkpoint_every": 4,
        "evaluate_every": 4,
        "evaluate_sequences": 8,
        "held_out": 0.1,
        "objective": {"distill": EVERYTHING},
    }
    return quick | values


def written(folder, cache, jobs, **more):
    """The file that ``SCRIPT`` is to be given."""
    given = folder / "jobs.json"
    given.write_text(json.dumps({"cache": str(cache), "jobs": jobs} | more))
    return given


@pytest.fixture(scope="module")
def student(masked_world, make_model, wordpiece):
    """No dropout: its noise is drawn per process."""
    return {
        "model": str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **NARROW, **STILL))
    }


def alone(world, student, train, out):
    config = parse_settings(TrainConfig, train)
    train_student(world.open(), StudentConfig.model_validate(student), config, out)
    return out


# Jobs with another student than the rest have, or with other steps.
TRAINS = {name: (None, values) for name, values in JOBS.items()}
TRAINS |= {f"sparse-{p}": (None, SPARSE | {"parallel": p}) for p in ("ddp", "fsdp")}
TRAINS |= {f"rtd-{p}": (RTD, REPLACED | {"parallel": p}) for p in ("ddp", "fsdp")}
TRAINS |= {f"all-{p}": (GROWN, TOGETHER | {"parallel": p}) for p in ("ddp", "fsdp")}
WARM = SHORT | {"warm_head_steps": 2, "warmup_steps": 1, "keep_checkpoints": 4}
TRAINS |= {f"warm-{p}": (None, WARM | {"parallel": p}) for p in ("ddp", "fsdp")}
TRAINS |= {"replay-ddp": (None, REPLAY | {"parallel": "ddp"})}
TRAINS |= {f"family-{p}": (FAMILY, JOBS["ddp-micro"] | {"parallel": p}) for p in ("ddp", "fsdp")}
# What another job shows with the other way of sharing a student, with more beside it (fsdp-micro,
# all-fsdp), or without processes: tests/train/objective/test_objective_parts.py has steps in which
# a process has no rows.
SLOW = {"ddp-micro", "fsdp", "sparse-ddp", "sparse-fsdp", "rtd-ddp", "rtd-fsdp", "all-ddp"}
SLOW |= {"warm-ddp", "family-ddp", "family-fsdp"}


def named(*names):
    return [pytest.param(n, marks=pytest.mark.slow if n in SLOW else []) for n in names]


def in_two_processes(world, student, folder, names):
    jobs = []
    for name in names:
        more, values = TRAINS[name]
        job = {"student": student | (more or {}), "train": train_config(**values)}
        jobs.append(job | {"out": str(folder / name)})
    given = written(folder, world.path, jobs)

    def work():
        sys.argv = [str(SCRIPT), str(given)]
        runpy.run_path(str(SCRIPT), run_name="__main__")

    end_well(forked_world(work))


@pytest.fixture(scope="module")
def quick_runs(masked_world, student, tmp_path_factory):
    """Jobs in two processes, and each kind of them in one."""
    folder = tmp_path_factory.mktemp("torchrun")
    in_two_processes(masked_world, student, folder, [n for n in TRAINS if n not in SLOW])
    in_one(masked_world, student, folder, "ddp", "all-ddp", "warm-ddp", "replay-ddp")
    return folder


def in_one(world, student, folder, *names):
    for name in names:
        more, values = TRAINS[name]
        out = folder / name.replace("ddp", "alone")
        alone(world, student | (more or {}), train_config(**values), out)


@pytest.fixture(scope="module")
def slow_runs(masked_world, student, quick_runs):
    in_two_processes(masked_world, student, quick_runs, SLOW)
    in_one(masked_world, student, quick_runs, "sparse-ddp", "rtd-ddp", "family-ddp")
    return quick_runs


@pytest.fixture
def runs(request):
    """The folder of all jobs."""
    slow = request.node.get_closest_marker("slow")
    return request.getfixturevalue("slow_runs" if slow else "quick_runs")


@pytest.mark.parametrize("name", named(*JOBS))
def test_two_processes_train_the_student_of_one(runs, name):
    assert_same_run(runs / name, runs / "alone")


@pytest.mark.parametrize("name", named("warm-ddp", "warm-fsdp"))
def test_a_head_is_trained_alone_in_every_process(runs, student, name):
    assert_same_run(runs / name, runs / "warm-alone")
    begun = load_file(f"{student['model']}/model.safetensors")
    warm = load_file(runs / name / "checkpoints/step-00000002/model.safetensors")
    moved = {key for key in begun if not torch.equal(begun[key], warm[key])}
    assert moved
    assert all(key.startswith("cls.") for key in moved)


@pytest.mark.parametrize("name", named("rtd-ddp", "rtd-fsdp"))
def test_a_method_does_not_see_the_processes(runs, name):
    """The same replacements, rows and head; in some steps a process has no row of its own."""
    steps = [r for r in read_metrics(runs / "rtd-alone") if r["kind"] == "train"]
    assert len({"replaced_tokens/loss" in r for r in steps}) == 2
    assert any(key.startswith("heads.method:") for key in weights(runs / name))
    assert_same_run(runs / name, runs / "rtd-alone")


@pytest.mark.parametrize("name", named("all-ddp", "all-fsdp"))
def test_all_that_methods_bring_does_not_see_the_processes(runs, name):
    assert "prompts.vectors.weight" in weights(runs / name)
    assert (runs / name / "growth.json").is_file()
    assert_same_run(runs / name, runs / "all-alone")


@pytest.mark.parametrize("name", named("sparse-ddp", "sparse-fsdp"))
def test_processes_without_any_row_take_part(runs, name):
    steps = [r for r in read_metrics(runs / "sparse-alone") if r["kind"] == "train"]
    assert len({"kd/odd.lm" in r for r in steps}) == 2  # some steps had no row at all
    assert_same_run(runs / name, runs / "sparse-alone")


def test_processes_replay_what_one_does(runs):
    assert_same_run(runs / "replay-ddp", runs / "replay-alone")


@pytest.mark.parametrize("name", named("family-ddp", "family-fsdp"))
def test_a_familys_heads_do_not_see_the_processes(runs, name):
    assert any(".frame.classifier." in key for key in weights(runs / name))
    assert_same_run(runs / name, runs / "family-alone")


@pytest.mark.parametrize("name", ["ddp", "fsdp-micro"])
def test_what_they_leave_behind_is_that_of_one(runs, name):
    left = sorted(p.name for p in (runs / name).iterdir() if p.name != "tensorboard")
    assert left == sorted(p.name for p in (runs / "alone").iterdir() if p.name != "tensorboard")
    one, other = (json.loads((runs / n / "summary.json").read_text()) for n in (name, "alone"))
    assert one["coverage"] == other["coverage"]
    AutoModelForMaskedLM.from_pretrained(runs / name)
    for step in (2, 4):
        folder = f"checkpoints/step-{step:08d}/model.safetensors"
        assert_same_weights(load_file(runs / name / folder), load_file(runs / "alone" / folder))


@pytest.mark.slow
def test_one_process_out_of_memory_ends_all(masked_world, student, tmp_path):
    """It says what takes less; the others do not wait, and have no traceback of their own."""
    job = {"student": student, "train": train_config(**JOBS["ddp"]), "out": str(tmp_path / "run")}
    given = written(tmp_path, masked_world.path, [job], out_of_memory=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(SCRIPT), str(given)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,  # who waits for another does so for thirty minutes
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: out of memory")]
    assert len(told) == 1, done.stderr[-3000:]
    assert "train.micro_batch_sequences (now null, the " in told[0]
    assert "step-00000002" in told[0]
    assert "MemoryError" not in done.stderr.replace("(MemoryError)", "")
