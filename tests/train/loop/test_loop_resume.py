"""The same run twice, and a run in two parts, are the same to the bit."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.storage.atomic import write_json
from rekindle.data.storage.seal import SEAL, seal
from rekindle.train.answers.judge import open_judge
from rekindle.train.export import finished
from rekindle.train.export.folder import export_head
from rekindle.train.model.folder import resolve_model
from testlib.loop import ALL, no_reader_left, run, stop_at, train_config
from testlib.students import metrics, same_weights, weights


def test_the_same_configuration_gives_the_same_weights_to_the_bit(masked_world, whole, tmp_path):
    result = run(masked_world, tmp_path / "again", train_config(ALL))
    assert same_weights(result.directory, whole.directory)
    assert metrics(result.directory) == metrics(whole.directory)
    other = run(masked_world, tmp_path / "other", train_config(ALL, seed=1))
    assert not same_weights(other.directory, whole.directory)


@pytest.mark.parametrize("step", [1, 4, 5, 10])
def test_an_interrupted_run_goes_on_to_the_same_bits(masked_world, whole, tmp_path, step):
    """Before the first checkpoint, at one (not yet saved), after it, and when all is done."""
    out, config = tmp_path / "run", train_config(ALL)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(masked_world, out, config, report=stop_at(step))
    assert no_reader_left()  # though the traceback still holds the loop's frame
    del caught
    assert not (out / "model.safetensors").exists()
    result = run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert result.coverage == whole.coverage
    assert result.evaluation == whole.evaluation


def test_where_a_student_is_wanted_a_run_that_was_interrupted_says_what_can_be_given(
    masked_world, tmp_path
):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, out, train_config(ALL), report=stop_at(9))
    checkpoint = out / "checkpoints" / "step-00000008"
    told = (
        f"{out} is not finished (step 8 of 10): go on with `pipeline train-student … --out {out} "
        "--resume`"
    )
    for ask in (resolve_model, open_judge, lambda model: export_head(model, str(tmp_path / "e"))):
        with pytest.raises(InputError) as refused:
            ask(str(out))
        assert str(refused.value) == f"{told}, or give a checkpoint of it: {checkpoint}"
    assert open_judge(str(checkpoint), "sense").labels
    for file in checkpoint.glob("tokenizer*"):  # as older versions left it
        file.unlink()
    with pytest.raises(InputError) as refused:
        resolve_model(str(out))
    assert str(refused.value) == told


def test_a_run_may_be_interrupted_again_and_again(masked_world, whole, tmp_path):
    out, config = tmp_path / "run", train_config(ALL)
    for step in (5, 7, 9):
        with pytest.raises(KeyboardInterrupt):
            run(masked_world, out, config, report=stop_at(step), resume=step > 5)
    trainer = out / "checkpoints/step-00000008/trainer.json"
    content = json.loads(trainer.read_text()) | {"seconds": 5000.0}
    trainer.write_bytes(seal({k: v for k, v in content.items() if k != SEAL}))
    result = run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert 5000 < result.seconds < 6000  # earlier parts are counted


def test_heads_of_the_family_go_on_to_the_same_bits(masked_world, tmp_path):
    """They are in checkpoints, learn in micro-batches, and are handed on to a later run."""
    config = train_config(ALL, steps=6, micro_batch_sequences=4)
    family = {"student": {"head": "family"}}
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, tmp_path / "run", config, report=stop_at(5), **family)
    run(masked_world, tmp_path / "run", config, resume=True, **family)
    run(masked_world, tmp_path / "whole", config, **family)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    later = train_config(ALL, steps=1, learning_rate=1e-30, warmup_steps=0)
    run(masked_world, tmp_path / "later", later, model=tmp_path / "run", **family)
    first, second = (weights(tmp_path / name) for name in ("run", "later"))
    assert any(".frame." in name for name in first)
    assert all(torch.allclose(values, second[name]) for name, values in first.items())
    with pytest.raises(CheckpointError, match=r"student\.head"):
        run(masked_world, tmp_path / "run", config, resume=True)


def test_an_interrupt_while_the_model_is_written(masked_world, whole, tmp_path, monkeypatch):
    out, config = tmp_path / "run", train_config(ALL)
    with monkeypatch.context() as patched:
        patched.setattr(finished, "write_json", stop_at_summary(write_json))
        with pytest.raises(KeyboardInterrupt):
            run(masked_world, out, config)
    result = run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert (result.coverage, result.evaluation) == (whole.coverage, whole.evaluation)
    assert not (out / ".final").exists()


def stop_at_summary(write):
    def patched(path, values):
        if "evaluation" in values:
            raise KeyboardInterrupt
        write(path, values)

    return patched


def test_a_finished_run_is_left_as_it_is(masked_world, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole.directory, out)
    for checkpoint in [*(out / "checkpoints").iterdir(), None]:
        before = {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))}
        result = run(masked_world, out, train_config(ALL), resume=True)
        assert result == replace(whole, directory=out, was_finished=True)
        assert {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))} == before
        if checkpoint:  # deleted for room
            shutil.rmtree(checkpoint)
    longer = (
        r"train\.steps.* It is finished\. To train .* another --out with student\.model: .*run$"
    )
    with pytest.raises(CheckpointError, match=longer):
        run(masked_world, out, train_config(ALL, steps=11), resume=True)
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match="its checkpoints are gone"):
        run(masked_world, out, train_config(ALL), resume=True)
    assert metrics(out) == metrics(whole.directory)


@pytest.mark.parametrize(("began", "now"), [(1000, 2), (2, 1000)])
def test_whether_there_were_checkpoints_is_recorded(masked_world, tmp_path, began, now):
    """Whatever checkpoint_every is when the run goes on."""
    out, kept = tmp_path / "run", tmp_path / "run/checkpoints"
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, out, train_config(checkpoint_every=began), report=stop_at(4))
    assert kept.exists() == (began == 2)
    shutil.rmtree(kept, ignore_errors=True)
    config = train_config(checkpoint_every=now)
    if began == 2:
        with pytest.raises(CheckpointError, match="its checkpoints are gone"):
            run(masked_world, out, config, resume=True)
        assert max(r["step"] for r in metrics(out)) == 4
    else:
        assert run(masked_world, out, config, resume=True).steps == 10


def test_resume_of_a_run_that_is_not_there_starts_it(masked_world, whole, tmp_path):
    run(masked_world, tmp_path / "run", train_config(ALL), resume=True)
    assert same_weights(tmp_path / "run", whole.directory)


def test_a_damaged_newest_checkpoint_is_passed_over(masked_world, whole, tmp_path, caplog):
    out, config = tmp_path / "run", train_config(ALL)
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, out, config, report=stop_at(9))
    newest = out / "checkpoints/step-00000008/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    with caplog.at_level(logging.INFO, logger="rekindle"):
        run(masked_world, out, config, resume=True)
    assert "step-00000008 is damaged (model.safetensors)" in caplog.text
    assert "at step 5" in caplog.text  # the best on what is held out
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)


KILLED = """
import json, sys, time
import torch
torch.set_num_threads(1)
if not torch.cuda.is_available():
    torch.set_deterministic_debug_mode("warn")  # as in the test itself: see testlib.kernels.memory
from pathlib import Path
from rekindle.data.cache import Cache
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student

given = json.loads(sys.argv[1])
def report(step, values):
    print(step, flush=True)
    time.sleep(0.05)
train_student(
    Cache.open(given["cache"]),
    StudentConfig.model_validate(given["student"]),
    TrainConfig.model_validate(given["train"]),
    Path(given["out"]),
    resume=True,
    report=report,
)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(masked_world, whole, tmp_path):
    """SIGKILL at several moments, among them while a checkpoint is being written."""
    out, config = tmp_path / "run", train_config(ALL)
    given = {
        "cache": str(masked_world.path),
        "student": {"model": str(masked_world.student)},
        "train": config.model_dump(mode="json", by_alias=True),
        "out": str(out),
    }
    command = [sys.executable, "-c", KILLED, json.dumps(given)]
    for step, wait in ((2, 0.0), (4, 0.06), (5, 0.0), (8, 0.07), (9, 0.05)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if int(line) >= step:
                time.sleep(wait)
                os.kill(process.pid, signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_student_is_known_by_its_files(
    masked_world, whole, tmp_path, monkeypatch, make_model, wordpiece, recorded
):
    """Not by how its path is written; what no file is known of, by its place."""
    out, config = tmp_path / "run", train_config(ALL)
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, out, config, report=stop_at(9))
    if not recorded:  # as runs of version 1
        about = json.loads((out / "run.json").read_text())
        del about["student_files"], about["version"]
        (out / "run.json").write_text(json.dumps(about))
    other = make_model("bert", "AutoModelForMaskedLM", wordpiece, seed=78)
    refusal = "the config and the weights differ" if recorded else r"\(student\.model"
    with pytest.raises(CheckpointError, match=refusal):
        run(masked_world, out, config, model=other, resume=True)
    moved = tmp_path / "moved"
    shutil.copytree(masked_world.student, moved)
    if not recorded:
        with pytest.raises(CheckpointError, match=refusal):
            run(masked_world, out, config, model=moved, resume=True)
        moved = masked_world.student
    monkeypatch.chdir(moved.parent)
    run(masked_world, out, config, model=f"./{moved.name}", resume=True)
    assert same_weights(out, whole.directory)
