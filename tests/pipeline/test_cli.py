"""The command line as a user meets it: exit codes, one message each, stdout for results only."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rekindle.pipeline.cli import app
from rekindle.train.record.versions import package_versions
from testlib.command import pipeline

CLI = [sys.executable, "-m", "rekindle.pipeline.cli"]


@pytest.fixture
def run_file(tmp_path, small_corpus, make_teacher):
    """A run file on tiny models, and a function that writes it changed."""
    lm = make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 8})
    whole = {"domain_field": None, "sequence_length": 32, "limit_sequences": None}
    values = {
        "corpus": small_corpus | whole,
        "cache": {"path": str(tmp_path / "cache"), "sequences_per_shard": 40, "replicas": 2},
        "teachers": [
            lm,
            make_teacher("expert", "sequence_classification", config={"num_labels": 3}),
        ],
        "student": {"model": lm["model"], "from_scratch": True},
        "train": {
            "steps": 4,
            "batch_sequences": 8,
            "warmup_steps": 1,
            "evaluate_every": 4,
            "objective": {"distill": [{"teachers": ["lm"], "temperature": 2.0}]},
        },
    }

    def write(**sections: object) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values | sections))
        return path

    write.values = values
    return write


def fails(result: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """The one message of a failed command."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1, result.stderr
    for word in words:
        assert word in message[0], message[0]
    return message[0]


def test_both_stages_and_their_readers(run_file, tmp_path):
    path = run_file()
    first = pipeline("cache-teachers", path)
    assert first.returncode == 0, first.stderr
    assert "sequences" in first.stdout
    again = pipeline("cache-teachers", path)
    assert "0 units made" in again.stdout

    cache = tmp_path / "cache"
    checked = json.loads(pipeline("verify", cache, "--json").stdout)
    assert checked["sound"]
    assert checked["coverage"] == {"lm": 1.0, "expert": 1.0}
    facts = json.loads(pipeline("inspect", cache, "--json").stdout)
    assert set(facts["teachers"]) == {"lm", "expert"}
    shown = pipeline("inspect", cache, "--example", 3, "--teacher", "expert")
    assert "LABEL_" in shown.stdout

    trained = pipeline("train-student", path, "--out", tmp_path / "a", "--set", "train.seed=3")
    assert trained.returncode == 0, trained.stderr
    assert yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())["train"]["seed"] == 3
    fails(pipeline("train-student", path, "--out", tmp_path / "a"), 2, "not empty", "--resume")


def test_a_sweep_and_its_comparison(run_file, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # or the names are folded
    path, out = run_file(), tmp_path / "sweep"
    assert pipeline("cache-teachers", path).returncode == 0
    temperature = "train.objective.distill.0.temperature"
    options = ("train-student", path, "--out", out, "--set", "train.steps=2")
    swept = pipeline(*options, "--sweep", f"{temperature}=1,2", "--sweep", "train.seed=0,1")
    assert swept.returncode == 0, swept.stderr
    names = [f"temperature={t},seed={s}" for t in (1, 2) for s in (0, 1)]
    assert sorted(folder.name for folder in out.iterdir() if folder.is_dir()) == names
    assert [name for name in names if name in swept.stdout.split()] == names
    assert "kl/lm" in swept.stdout

    assert pipeline("compare", out).stdout == swept.stdout
    page = tmp_path / "pages" / "compare.html"
    found = pipeline("compare", out / names[0], out / names[2], "--json", "--out", page)
    runs = json.loads(found.stdout)["runs"]
    assert [run["settings"] for run in runs] == [{temperature: 1.0}, {temperature: 2.0}]
    assert names[2] in page.read_text()
    assert found.stderr.splitlines()[-1] == f"page: {page}"

    given = (*options, "--sweep", f"{temperature}=1,2", "--sweep", "train.seed=0,1")
    fails(pipeline(*given), 2, "not empty", "--resume")
    fails(pipeline(*given[:-1], "train.seed=0,2", "--resume"), 3, "seed=1", "another sweep")
    again = pipeline(*given, "--resume")
    assert again.returncode == 0
    assert again.stdout == swept.stdout


def test_a_sweep_says_at_its_end_what_failed(run_file, tmp_path):
    path, out = run_file(), tmp_path / "sweep"
    assert pipeline("cache-teachers", path).returncode == 0
    swept = pipeline(
        *("train-student", path, "--out", out, "--set", "train.warmup_steps=0"),
        *("--sweep", "train.learning_rate=1e30,1e-3"),
    )
    assert swept.returncode == 2
    (message,) = [line for line in swept.stderr.splitlines() if line.startswith("error: ")]
    assert "1 of 2 students failed. learning_rate=1e30: " in message
    assert "unfinished" in swept.stdout
    assert (out / "learning_rate=1e-3" / "summary.json").is_file()


def test_a_flipped_byte_is_exit_code_3_and_named(run_file, tmp_path):
    assert pipeline("cache-teachers", run_file()).returncode == 0
    victim = next((tmp_path / "cache" / "targets" / "lm" / "data").iterdir())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    result = pipeline("verify", tmp_path / "cache")
    assert result.returncode == 3
    assert victim.name in result.stdout


@pytest.mark.slow  # forked: caching/kill/test_kill_command.py
def test_ctrl_c_leaves_quickly_and_the_same_command_goes_on(run_file, tmp_path):
    teachers = run_file.values["teachers"]
    slow = run_file(
        teachers=[t | {"batch_tokens": 32} for t in teachers],
        cache=run_file.values["cache"] | {"sequences_per_shard": 10, "replicas": 8},
    )
    process = subprocess.Popen(
        [*CLI, "cache-teachers", str(slow)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    commits = tmp_path / "cache" / "targets" / "lm" / "commits"
    while process.poll() is None and len(list(commits.glob("*.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - began < 5  # a promise of two seconds, with room for a loaded machine
    assert "pipeline cache-teachers" in errors
    done = len(list(commits.glob("*.json")))
    again = pipeline("cache-teachers", slow)
    assert again.returncode == 0, again.stderr
    made, there = map(int, re.search(r"(\d+) units made, (\d+) were there", again.stdout).groups())
    assert made > 0
    assert there >= done  # the unit in flight may have been committed on the way out
    assert json.loads(pipeline("verify", tmp_path / "cache", "--json").stdout)["sound"]


def test_without_a_command_it_shows_its_help():
    result = pipeline()
    assert result.returncode == 2
    assert "Usage: pipeline" in result.stdout
    assert "cache-teachers" in result.stdout
    assert not result.stderr


def test_version_names_the_packages_and_needs_no_command():
    result = pipeline("--version")
    versions = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert (result.returncode, versions) == (0, package_versions())


def test_doctor_says_which_loss_runs_and_why():
    result = pipeline("doctor")
    assert result.returncode == 0
    assert "kd loss" in result.stdout


def test_the_command_line_is_frozen():
    """New knobs go into the configuration; a new option is a decision, made here."""
    import typer

    group = typer.main.get_command(app)
    options = {
        name: sorted(
            o for p in command.params for o in p.opts if o.startswith("--") and o != "--help"
        )
        for name, command in [("", group), *group.commands.items()]
    }
    assert options == {
        "": ["--version"],
        "demo": ["--out", "--quick"],
        "init": ["--list", "--out"],
        "schema": [],
        "finetune": [
            *("--dev", "--force", "--head", "--json", "--label-field", "--metric", "--out"),
            *("--seeds", "--set", "--text-field", "--train"),
        ],
        "export": ["--force", "--head", "--json", "--out"],
        "merge-adapter": ["--force", "--json", "--out"],
        "evaluate": [
            *("--force", "--head", "--json", "--label-field", "--metric", "--out", "--set"),
            *("--test", "--text", "--text-field"),
        ],
        "predict": ["--force", "--head", "--json", "--out", "--set", "--text", "--text-field"],
        "generate": ["--force", "--json", "--out", "--prompts", "--set"],
        "cache-teachers": [
            *("--address", "--check", "--executor", "--set", "--teacher", "--workers"),
        ],
        "plan": ["--assume", "--json", "--nodes", "--probe", "--set", "--texts", "--tokens"],
        "gc": ["--dry-run", "--json", "--older-than"],
        "verify": ["--audit", "--config", "--json"],
        "inspect": ["--example", "--json", "--teacher"],
        "teachers": ["--json", "--remove", "--rename", "--transcode", "--yes"],
        "import-targets": [
            *("--allow-missing", "--json", "--label", "--provenance", "--set", "--task"),
        ],
        "export-targets": ["--force", "--k", "--limit", "--out", "--teacher", "--view"],
        "train-student": ["--out", "--resume", "--set", "--sweep", "--workers"],
        "rekindle": ["--draw", "--json", "--out", "--searched", "--set", "--task", "--workers"],
        "compare": [
            *("--expert", "--json", "--label-field", "--metric", "--out", "--set", "--test"),
            "--text-field",
        ],
        "push": [
            *("--dry-run", "--json", "--message", "--private", "--revision", "--teacher"),
            *("--with-readable-targets", "--with-text"),
        ],
        "doctor": ["--set"],
    }


def test_help_needs_no_torch():
    code = "import sys, rekindle.pipeline.cli as c; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
