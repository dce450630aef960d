"""`pipeline train-student` under torchrun, as a user starts it: killed, gone on with, refused."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import load_config
from rekindle.train.model.files import weights_fingerprint
from rekindle.train.record.checkpoint import latest_checkpoint
from rekindle.train.record.run_log import read_metrics
from testlib.students import metrics


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, small_corpus, wordpiece, make_model, make_teacher):
    """A run of 40 steps with dropout, and its cache."""
    home = tmp_path_factory.mktemp("torchrun")
    targets = {"kind": "topk", "k": 8, "temperatures": [2.0]}
    train = {
        "steps": 40,
        "batch_sequences": 4,
        "warmup_steps": 2,
        "checkpoint_every": 5,
        "evaluate_every": 10,
        "evaluate_sequences": 4,
        "held_out": 0.1,
        "objective": {"distill": [{"teachers": ["lm"], "temperature": 2.0}]},
    }
    values = {
        "corpus": small_corpus | {"domain_field": None, "limit_sequences": None},
        "cache": {"path": str(home / "cache"), "replicas": 2},
        "teachers": [make_teacher("lm", "masked_lm", targets=targets)],
        "student": {"model": str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 5))},
        "train": train,
    }
    path = home / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    cache_teachers(load_config(path))
    return path


def start(run_file, out, *options):
    """Two processes, as a user would start them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "rekindle.pipeline.cli", "train-student", str(run_file), "--out", str(out)]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process):
    """(exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def kill_all(process):
    """torchrun first, so that it tells nobody; its workers have sessions of their own."""
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    assert len(workers) == 2


def tell_to_end(process):
    """As a scheduler does: torchrun passes it on to its workers."""
    process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("end", [kill_all, pytest.param(tell_to_end, marks=pytest.mark.slow)])
def test_ended_processes_go_on_to_the_same_bits(run_file, tmp_path, end):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, out, err = finish(start(run_file, whole))
    assert code == 0, err
    assert out.count("40 steps in") == 1  # one of them talks
    assert [r["step"] for r in metrics(whole) if r["kind"] == "train"] == list(range(1, 41))
    process = start(run_file, broken)
    while process.poll() is None and len(read_metrics(broken)) < 12:
        time.sleep(0.005)
    end(process)
    _, _, err = finish(process)
    assert not (broken / "summary.json").exists()
    if end is tell_to_end:
        (step,) = re.findall(r"interrupted at step (\d+); a checkpoint of it is written\. To", err)
        assert latest_checkpoint(broken)[1]["step"] == int(step) == read_metrics(broken)[-1]["step"]
    code, out, err = finish(start(run_file, broken, "--resume"))
    assert code == 0, err
    assert "resuming" in err
    assert metrics(broken) == metrics(whole)
    for file in ("model.safetensors", "heads.safetensors"):
        ours, theirs = load_file(broken / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stages_are_cached_by_one_process_and_trained_by_all(run_file, tmp_path):
    values = yaml.safe_load(run_file.read_text())
    values["train"] |= {"steps": 4, "evaluate_every": 4, "checkpoint_every": 4}
    values["cache"]["path"] = str(tmp_path / "cache")
    second = {"teachers.0.model": "{first}", "cache.path": str(tmp_path / "second-cache")}
    values["stages"] = [{"name": "first"}, {"name": "second", "set": second}]
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    code, out, err = finish(start(path, tmp_path / "out"))
    assert code == 0, err
    assert out.count("4 steps in") == 2
    assert "another process works on" not in err
    cached = Cache.open(tmp_path / "second-cache").teacher("lm")
    assert cached.coverage == 1
    assert cached.fingerprint == weights_fingerprint(tmp_path / "out" / "first")
    assert (tmp_path / "out" / "second" / "run.yaml").is_file()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param("train.batch_sequences=3", "batch_sequences", marks=pytest.mark.slow),
        ("train.objective.distill.0.temperature=3", "stores the temperatures"),
    ],
)
def test_a_mistake_is_said_and_nothing_is_written(run_file, tmp_path, option, message):
    code, out, err = finish(start(run_file, tmp_path / "out", "--set", option))
    assert code != 0
    assert out == ""
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(said) == 1, err
    assert message in said[0]
    assert not (tmp_path / "out").exists()
