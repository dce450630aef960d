"""A student's run whose folder is in an object store: a real S3 server, in a process of its own."""

import errno
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rekindle.data.errors import InputError
from rekindle.data.places import address_of
from rekindle.data.storage.copies import FOLDER_VARIABLE, GIGABYTES_VARIABLE
from rekindle.data.storage.object_store import ObjectStore
from rekindle.train.model.folder import resolve_model
from rekindle.train.record import stored_run
from rekindle.train.record.working_copy import local_folder
from rekindle.train.student import Student
from testlib.command import pipeline
from testlib.servers.faulty_s3 import faulty_server

STEPS = 8


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, configure, make_model, wordpiece, one_thread) -> Path:
    """A run without teachers, its cache made; a checkpoint at every second step, two are kept."""
    from testlib.servers.plain_runs import write_run

    folder = tmp_path_factory.mktemp("run")
    train = {"steps": STEPS, "batch_sequences": 4, "warmup_steps": 2, "checkpoint_every": 2}
    train |= {"evaluate_every": 4, "keep_checkpoints": 2, "keep_best": None, "held_out": 0.2}
    student = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    file = write_run(folder, configure(folder / "cache", []), student, train)
    assert pipeline("cache-teachers", file).returncode == 0
    return file


@pytest.fixture(scope="module")
def local(run_file) -> Path:
    """What the run is in a local folder, uninterrupted."""
    out = run_file.parent / "local"
    done = pipeline("train-student", run_file, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def names(store: ObjectStore) -> list[str]:
    found = store.names("")
    for folder in store.folders("checkpoints"):
        found += [f"checkpoints/{name}" for name in store.names(f"checkpoints/{folder}")]
    return found


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)


def committed(store: ObjectStore) -> list[str]:
    return [name for name in store.names("checkpoints") if name.endswith(".json")]


def test_a_run_in_a_store_leaves_what_a_local_one_does(s3, run_file, local, corpus_file):
    address = f"{s3}/runs/whole"
    done = pipeline("train-student", run_file, "--out", address)
    assert done.returncode == 0, done.stderr
    store = ObjectStore(address)
    assert set(store.names("")) == {path.name for path in local.iterdir() if path.is_file()}
    assert committed(store) == [f"step-{step:08d}.json" for step in (STEPS - 2, STEPS)]
    assert len(store.folders("checkpoints")) == 2
    assert store.names("tensorboard")
    assert address in done.stdout
    place = local_folder(Path(address))
    assert str(place.parent) not in done.stdout + store.read_bytes("README.md").decode()
    assert not place.exists()

    found = resolve_model(address)  # as any command does
    assert same_weights(found, local)
    step = resolve_model(f"{address}/checkpoints/step-{STEPS - 2:08d}")
    assert same_weights(step, local / "checkpoints" / f"step-{STEPS - 2:08d}")
    told = [
        json.loads(pipeline("evaluate", model, "--text", corpus_file, "--json").stdout)
        for model in (local, address)
    ]
    assert told[0]["perplexity"] == told[1]["perplexity"]

    again = pipeline("train-student", run_file, "--out", address)
    assert again.returncode == 2
    assert f"{address} is not empty. Give another --out, or --resume" in again.stderr
    finished = pipeline("train-student", run_file, "--out", address, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert f"{address}: was finished" in finished.stdout


def test_an_upload_that_was_killed_never_counts(s3, run_file, local, corpus_file, monkeypatch):
    address = f"{s3}/runs/killed"
    store, create = ObjectStore(address), ObjectStore.create

    def killed(self: ObjectStore, name: str, content: bytes) -> bool:
        if name == "checkpoints/step-00000006.json":
            raise InputError("killed")
        return create(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "create", killed)
        assert pipeline("train-student", run_file, "--out", address).returncode == 2
    assert committed(store) == ["step-00000002.json", "step-00000004.json"]
    assert len(store.folders("checkpoints")) == 3
    refused = pipeline("evaluate", address, "--text", corpus_file)
    assert refused.returncode == 2
    assert f"{address} is not finished (step 4 of {STEPS})" in refused.stderr
    # What is damaged is passed over.
    damaged = json.loads(store.read_bytes("checkpoints/step-00000004.json"))["folder"]
    store.replace(f"{damaged}/model.safetensors", b"damaged")
    done = pipeline("train-student", run_file, "--out", address, "--resume")
    assert done.returncode == 0, done.stderr
    assert "checkpoint step-00000004 is damaged" in done.stderr
    assert f"resuming {address} at step 2" in done.stderr
    assert same_weights(resolve_model(address), local)
    assert committed(store) == ["step-00000006.json", "step-00000008.json"]
    assert len(store.folders("checkpoints")) == 2


def test_two_processes_do_not_mix_their_checkpoints(s3, run_file, monkeypatch):
    address = f"{s3}/runs/two"
    store, write = ObjectStore(address), stored_run.upload_checkpoint

    def after_another(checkpoint: Path, files: dict[str, str]) -> None:
        name = f"checkpoints/{checkpoint.name}.json"
        store.create(name, stored_run.seal({"folder": "checkpoints/theirs", "files": {}}))
        write(checkpoint, files)

    monkeypatch.setattr("rekindle.train.record.checkpoint.upload_checkpoint", after_another)
    done = pipeline("train-student", run_file, "--out", address)
    assert done.returncode == 2
    assert f"another process works on {address}" in done.stderr


def test_a_run_outlives_a_server_that_is_away(s3, run_file, local, monkeypatch):
    outage(f"{s3}/runs/away", run_file, local, monkeypatch, seconds=2.0)


@pytest.mark.slow
def test_a_run_outlives_a_server_that_is_away_for_twenty_seconds(s3, run_file, local, monkeypatch):
    outage(f"{s3}/runs/long-away", run_file, local, monkeypatch, seconds=20.0)


@pytest.mark.slow
def test_two_nodes_share_a_run_in_a_store(s3, run_file, tmp_path):
    """Each with copies of its own: one writes, and both go on from what is written."""
    address = f"{s3}/runs/several"
    store = ObjectStore(address)
    for launch in ((), ("--resume",)):
        done = nodes(run_file, address, tmp_path / f"copies{len(launch)}", *launch)
        assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
        if not launch:  # as if both had been killed in the last checkpoint
            whole = load_file(resolve_model(address) / "model.safetensors")
            for name in (
                *stored_run.MARKS_FINISHED,
                "model.safetensors",
                f"checkpoints/step-{STEPS:08d}.json",
            ):
                store.discard(name)
    assert f"resuming {address} at step {STEPS - 2}" in done[0].stderr
    assert (done[0].stdout.count(address), done[1].stdout) == (1, "")
    assert committed(store) == [f"step-{step:08d}.json" for step in (STEPS - 2, STEPS)]
    resumed = load_file(resolve_model(address) / "model.safetensors")
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, rtol=1e-4, atol=1e-6)


def nodes(
    run_file: Path, address: str, copies_of: Path, *more: str
) -> list[subprocess.CompletedProcess[str]]:
    """What the processes say that torchrun starts on two machines, one on each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rekindle.pipeline.cli", "train-student", str(run_file)]
    ones = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    ones |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "one"}
    running = [
        subprocess.Popen(
            [*command, "--out", address, *more],
            env=os.environ
            | ones
            | {"RANK": f"{rank}", FOLDER_VARIABLE: str(copies_of / f"node-{rank}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [one.communicate(timeout=900) for one in running]
    return [
        subprocess.CompletedProcess(one.args, one.returncode, *texts)
        for one, texts in zip(running, said, strict=True)
    ]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_in_mid_training_costs_nothing(
    s3, run_file, local, monkeypatch, tmp_path
):
    """The copies of the cache cannot grow: it is read without. Then a checkpoint cannot be written:
    that is said, and the run goes on from what the store has.
    """
    address = f"{s3}/runs/full"
    settings = ["--set", f"cache.path={stored_cache(address, run_file)}"]
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "disk"))
    fetch, save, fetched = ObjectStore._fetch, Student.save_pretrained, list[str]()

    def full_from_the_second(self: ObjectStore, name: str, *given: Any) -> None:
        fetched.append(name)
        if len(fetched) > 1:  # in a thread that reads ahead, whose limits are those of all
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fetch(self, name, *given)

    def full_at_six(self: Student, directory: Path, *given: Any, **more: Any) -> None:
        with full_disk() if "step-00000006" in str(directory) else nullcontext():
            save(self, directory, *given, **more)

    monkeypatch.setattr(ObjectStore, "_fetch", full_from_the_second)
    with monkeypatch.context() as patch:
        patch.setattr(Student, "save_pretrained", full_at_six)
        full = pipeline("train-student", run_file, "--out", address, *settings)
    assert full.returncode == 2
    assert len(fetched) > 1
    assert "no room for local copies" in full.stderr
    kept = f"Kept: {address}/checkpoints/step-00000004; make room on that disk first"
    assert kept in full.stderr, full.stderr
    done = pipeline("train-student", run_file, "--out", address, *settings, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resuming {address} at step 4" in done.stderr
    assert same_weights(resolve_model(address), local)


def stored_cache(address: str, run_file: Path) -> str:
    """The address of a copy of the run's cache."""
    ours = run_file.parent / "cache"
    for path in sorted(ours.rglob("*")):
        if path.is_file():
            ObjectStore(f"{address}-cache").upload(path, str(path.relative_to(ours)))
    return f"{address}-cache"


def outage(address: str, run_file: Path, local: Path, monkeypatch, seconds: float) -> None:
    """The server goes in the middle of a checkpoint, and comes back; the cache is there, too."""
    cache = stored_cache(address, run_file)
    with faulty_server(monkeypatch) as server:
        upload, seen = ObjectStore.upload, list[str]()

        def away(self: ObjectStore, file: Path, name: str) -> None:
            if "step-00000004" in name and name.endswith("optimizer.safetensors"):
                seen.append(name)
                server.away(seconds)
            upload(self, file, name)

        monkeypatch.setattr(ObjectStore, "upload", away)
        settings = ["--set", f"cache.path={cache}"]
        done = pipeline("train-student", run_file, "--out", address, *settings)
        assert done.returncode == 0, done.stderr
        assert len(seen) == 1
        assert "is overloaded or away" in done.stderr
        assert same_weights(resolve_model(address), local)


@pytest.mark.parametrize(
    ("out", "address"),
    [
        ("s3:/bucket/runs/a", "s3://bucket/runs/a"),
        ("gs:/bucket", "gs://bucket"),
        ("runs/a", None),
        ("/s3:/a", None),
        ("./a:/b", None),
        ("file:/tmp/a", None),
    ],
)
def test_which_folders_are_in_a_store(out, address):
    """A path has made one slash of two."""
    assert address_of(Path(out)) == address


def test_a_model_that_is_not_there_and_one_there_is_no_room_for(s3, corpus_file, monkeypatch):
    done = pipeline("evaluate", f"{s3}/no-model", "--text", corpus_file)
    assert done.returncode == 2
    assert f"model '{s3}/no-model': there is no such folder" in done.stderr
    ObjectStore(f"{s3}/model").replace("config.json", b"{}" * 100)
    monkeypatch.setenv(GIGABYTES_VARIABLE, "0")
    done = pipeline("evaluate", f"{s3}/model", "--text", corpus_file)
    assert done.returncode == 2
    assert f"no room for a local copy of {s3}/model" in done.stderr
    assert FOLDER_VARIABLE in done.stderr


def test_an_address_of_this_machine_is_a_path(tmp_path):
    """And no folder that is called file:."""
    done = pipeline(
        "train-student", tmp_path / "run.yaml", "--out", f"file://{tmp_path}/a", "--resume"
    )
    assert done.returncode == 2
    assert f"nothing to go on with in {tmp_path}/a" in done.stderr


@pytest.mark.parametrize(
    "typed",
    [
        ("rekindle", "cycle.yaml", "--out", "s3://bucket/a"),
        ("predict", "model", "--text", "rows.jsonl", "--out", "s3://bucket/a"),
        ("compare", "runs/a", "--out", "s3://bucket/a"),
    ],
)
def test_what_writes_to_this_machine_alone_says_so_before_anything(typed):
    done = pipeline(*typed)
    assert done.returncode == 2
    assert f"--out s3://bucket/a: {typed[0]} writes to this machine only" in done.stderr
    assert not Path("s3:").exists()


def test_a_bucket_that_is_not_there(s3, run_file):
    done = pipeline("train-student", run_file, "--out", "s3://no-such-bucket/a")
    assert done.returncode == 2
    assert "there is no bucket 'no-such-bucket'" in done.stderr
