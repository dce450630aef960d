"""Processes of their own, which know of the hub by their environment alone, as a user's do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testlib.servers.hub_double import HubDouble

CLI = [sys.executable, "-m", "rekindle.pipeline.cli"]
TOKEN = "hf_write0123456789"


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    double = HubDouble()
    yield double
    double.close()


@pytest.fixture
def environment(hub: HubDouble, tmp_path: Path) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    own |= {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "REKINDLE_COPIES": str(tmp_path / "c"),
    }
    return os.environ | own | {"TMPDIR": str(tmp_path)}


@pytest.fixture
def cache(tmp_path: Path, make_cache: Any, make_teacher: Any) -> Path:
    lm = make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 8})
    expert = make_teacher("expert", "sequence_classification", config={"num_labels": 3})
    make_cache(tmp_path / "cache", [lm, expert], {"limit_sequences": 60})
    return tmp_path / "cache"


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*CLI, *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_a_killed_push_goes_on_and_sends_nothing_twice(hub, environment, cache):
    def slow(method: str, path: str) -> int:
        time.sleep(0.2 if method == "PUT" else 0)
        return 0

    hub.refuse = slow
    words = [*CLI, "push", str(cache), "me/a", "--with-text"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(hub.stored) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(hub.stored)
    assert before >= 3
    assert "cache.json" not in hub.files("datasets/me/a")
    hub.refuse = lambda method, path: 0
    done = run(environment, "push", cache, "me/a", "--with-text", "--json")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert set(json.loads(done.stdout)["sent"]) == {*hub.files("datasets/me/a")}
    assert len(hub.stored) <= len({*hub.stored}) + 1  # the one that was on its way
    checked = run(environment, "verify", "hf://datasets/me/a", "--json")
    assert json.loads(checked.stdout)["sound"]


def test_a_model_is_used_without_a_network_once_it_was_fetched(hub, environment, cache, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(_model_of(cache), model)
    assert run(environment, "push", model, "me/expert", "--private").returncode == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the model guides the student"}\n')
    asked = ("predict", "hf://me/expert", "--text", rows, "--out")
    first = run(environment, *asked, tmp_path / "1.jsonl")
    assert first.returncode == 0, first.stderr
    hub.close()
    again = run(environment | {"HF_HUB_OFFLINE": "1"}, *asked, tmp_path / "2.jsonl")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    nobody = {name: value for name, value in environment.items() if name != "HF_TOKEN"}
    nobody["HF_HOME"] = str(tmp_path / "other")
    refused = run(nobody | {"HF_HUB_OFFLINE": "1"}, *asked, tmp_path / "3.jsonl")
    assert refused.returncode == 2
    assert "HF_HUB_OFFLINE is set" in refused.stderr


def _model_of(cache: Path) -> Path:
    about = json.loads((cache / "targets" / "expert" / "teacher.json").read_text())
    return Path(about["model"])
