"""`pipeline train-student` in two processes: killed, gone on with, refused; and under torchrun."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
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
from testlib.command import run_main
from testlib.processes import until
from testlib.several.forked import end_well, forked_world
from testlib.students import metrics


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, small_corpus, wordpiece, make_model, make_teacher, one_thread):
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


def typed(run_file, out, *options):
    return ["train-student", str(run_file), "--out", str(out), *options]


def start(run_file, out, *options):
    """Two processes, as a user would start them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, "-m", "rekindle.pipeline.cli", *typed(run_file, out, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process):
    """(exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def fork(run_file, out, *options):
    """The two without torchrun; what they print is in the file ``out`` with .said."""

    def work():
        with open(f"{out}.said", "a") as said, redirect_stdout(said):
            run_main(*typed(run_file, out, *options))

    return forked_world(work)


def assert_same_bits(ours, theirs):
    assert metrics(ours) == metrics(theirs)
    for file in ("model.safetensors", "heads.safetensors"):
        found, expected = load_file(ours / file), load_file(theirs / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def whole(run_file, tmp_path_factory):
    """A run of nobody's end."""
    out = tmp_path_factory.mktemp("whole") / "whole"
    end_well(fork(run_file, out))
    assert Path(f"{out}.said").read_text().count("40 steps in") == 1  # one of them talks
    assert [r["step"] for r in metrics(out) if r["kind"] == "train"] == list(range(1, 41))
    return out


def test_killed_processes_go_on_to_the_same_bits(run_file, whole, tmp_path):
    broken = tmp_path / "broken"
    children = fork(run_file, broken)
    until(lambda: len(read_metrics(broken)) >= 12 or any(child.ended() for child in children))
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    assert [child.wait() for child in children] == [-signal.SIGKILL] * 2
    assert not (broken / "summary.json").exists()
    children = fork(run_file, broken, "--resume")
    end_well(children)
    assert "resuming" in children[0].errors
    assert_same_bits(broken, whole)


def kill_all(process):
    """torchrun first, so that it tells nobody; its workers have sessions of their own."""
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    assert len(workers) == 2


@pytest.mark.slow  # forked, above
def test_torchrun_and_its_workers_that_are_killed_go_on_to_the_same_bits(run_file, whole, tmp_path):
    broken = tmp_path / "broken"
    process = start(run_file, broken)
    while process.poll() is None and len(read_metrics(broken)) < 12:
        time.sleep(0.005)
    kill_all(process)
    code, out, _ = finish(process)
    assert (code, out) == (-signal.SIGKILL, "")
    assert not (broken / "summary.json").exists()
    code, out, err = finish(start(run_file, broken, "--resume"))
    assert code == 0, err
    assert out.count("40 steps in") == 1
    assert "resuming" in err
    assert_same_bits(broken, whole)


@pytest.mark.slow
def test_two_nodes_begin_again_by_themselves_when_a_process_is_killed(run_file, tmp_path):
    """As docs/clusters.md starts them, one torchrun a node, whose line resumes where it can: that
    of docs/students.md.
    """
    out = tmp_path / "run"
    program = shlex.join([sys.executable, "-m", "rekindle.pipeline.cli", *typed(run_file, out)])
    line = f"[ -e {out}/run.json ] && again=--resume; exec {program} --set train.parallel=fsdp"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"--rdzv-endpoint=127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", place, "--rdzv-id=a", "--local-addr=127.0.0.1"]
    command += ["--max-restarts=2", "--no-python", "bash", "-c", f"{line} $again"]
    settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    nodes = [subprocess.Popen(command, **options, env=os.environ | settings) for _ in range(2)]
    until(lambda: len(read_metrics(out)) >= 12 or any(n.poll() is not None for n in nodes), 200)
    workers = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    ended = [finish(node) for node in nodes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert sum("resuming" in err for _, _, err in ended) == 1
    assert [r["step"] for r in metrics(out) if r["kind"] == "train"] == list(range(1, 41))
    assert (out / "summary.json").is_file()


@pytest.mark.slow
def test_processes_that_are_told_to_end_go_on_to_the_same_bits(run_file, whole, tmp_path):
    """As a scheduler does: torchrun passes it on to its workers."""
    broken = tmp_path / "broken"
    process = start(run_file, broken)
    while process.poll() is None and len(read_metrics(broken)) < 12:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, _, err = finish(process)
    assert not (broken / "summary.json").exists()
    (step,) = re.findall(r"interrupted at step (\d+); a checkpoint of it is written\. To", err)
    assert latest_checkpoint(broken)[1]["step"] == int(step) == read_metrics(broken)[-1]["step"]
    code, _, err = finish(start(run_file, broken, "--resume"))
    assert code == 0, err
    assert_same_bits(broken, whole)


@pytest.fixture
def stages_file(run_file, tmp_path):
    """Two stages of four steps; the second's teacher is the first's student."""
    values = yaml.safe_load(run_file.read_text())
    values["train"] |= {"steps": 4, "evaluate_every": 4, "checkpoint_every": 4}
    values["cache"]["path"] = str(tmp_path / "cache")
    second = {"teachers.0.model": "{first}", "cache.path": str(tmp_path / "second-cache")}
    values["stages"] = [{"name": "first"}, {"name": "second", "set": second}]
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def check_stages(folder, said, err):
    assert said.count("4 steps in") == 2
    assert "another process works on" not in err
    cached = Cache.open(folder / "second-cache").teacher("lm")
    assert cached.coverage == 1
    assert cached.fingerprint == weights_fingerprint(folder / "out" / "first")
    assert (folder / "out" / "second" / "run.yaml").is_file()


def test_stages_are_cached_by_one_process_and_trained_by_all(stages_file, tmp_path):
    children = fork(stages_file, tmp_path / "out")
    end_well(children)
    err = "".join(child.errors for child in children)
    check_stages(tmp_path, (tmp_path / "out.said").read_text(), err)


@pytest.mark.slow  # forked, above
def test_torchrun_caches_stages_in_one_process_and_trains_in_all(stages_file, tmp_path):
    code, out, err = finish(start(stages_file, tmp_path / "out"))
    assert code == 0, err
    check_stages(tmp_path, out, err)


@pytest.mark.slow  # forked, below
def test_torchrun_says_a_mistake_once(run_file, tmp_path):
    option = ("--set", "train.batch_sequences=3")
    code, out, err = finish(start(run_file, tmp_path / "out", *option))
    assert (code != 0, out) == (True, "")
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(said) == 1, err
    assert "batch_sequences" in said[0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.batch_sequences=3", "batch_sequences"),
        ("train.objective.distill.0.temperature=3", "stores the temperatures"),
    ],
)
def test_a_mistake_is_said_and_nothing_is_written(run_file, tmp_path, option, message):
    children = fork(run_file, tmp_path / "out", "--set", option)
    assert all(child.wait() == 2 for child in children)
    assert (tmp_path / "out.said").read_text() == ""
    err = "".join(child.errors for child in children)
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(said) == 1, err
    assert message in said[0]
    assert not (tmp_path / "out").exists()
