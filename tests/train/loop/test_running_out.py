"""Memory or disk that does not suffice: told as such, with what is kept; and gone on from there."""

import errno
import os
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError

from rekindle.data.errors import CheckpointError, InputError, ResumableError
from rekindle.data.storage.store import LocalStore
from rekindle.train import loop
from rekindle.train import student as student_module
from rekindle.train.export import finished
from rekindle.train.record import checkpoint, run_log
from rekindle.train.record.checkpoint import latest_checkpoint
from testlib.loop import ALL, run, train_config
from testlib.students import metrics, same_weights

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 412316860416 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError(),
]


@contextmanager
def failing(monkeypatch, owner, name, number, error):
    """The ``number``-th call of ``owner.name`` raises; yields how many calls there were."""
    real, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "number", "error"),
    [
        ("take_step", 7, 0),
        ("take_step", 7, 1),
        ("take_step", 7, 2),
        ("evaluate", 2, 0),
        ("configured_adamw", 1, 1),
    ],
)
def test_out_of_memory_says_what_takes_less(
    masked_world, tmp_path, monkeypatch, where, number, error
):
    out, config, error = tmp_path / "run", train_config(ALL), OUT_OF_MEMORY[error]
    # A CPU without instructions for bf16 would take many times as long in it: no advice there.
    has = {"avx512_bf16": where != "evaluate"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    with failing(monkeypatch, loop, where, number, error), pytest.raises(ResumableError) as caught:
        run(masked_world, out, config)
    told = str(caught.value)
    assert told.startswith("out of memory (")
    assert "train.micro_batch_sequences (now null, the 6 of the batch)" in told
    assert "train.gradient_checkpointing: true (now false)" in told
    assert told.count("train.precision bf16 (now fp32)") == (where != "evaluate")
    assert caught.value.settings == ("train.micro_batch_sequences=3",)
    kept = {"take_step": "Kept: .*step-00000005$", "evaluate": "Kept: .*step-00000008$"}
    assert caught.match(kept.get(where, "There is no checkpoint yet"))


def test_what_takes_less_may_change_when_the_run_goes_on(
    masked_world, whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    error = OUT_OF_MEMORY[0]
    with failing(monkeypatch, loop, "take_step", 7, error), pytest.raises(ResumableError):
        run(masked_world, out, train_config(ALL))
    for key, value in (("batch_sequences", 3), ("precision", "bf16"), ("evaluate_every", 2)):
        with pytest.raises(CheckpointError, match=rf"\(train\.{key}: "):
            run(masked_world, out, train_config(ALL, **{key: value}), resume=True)
    less = {"micro_batch_sequences": 3, "gradient_checkpointing": True, "checkpoint_every": 3}
    run(masked_world, out, train_config(ALL, **less), resume=True)
    found, expected = metrics(out), metrics(whole.directory)
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    assert [r["tokens"] for r in found if "tokens" in r] == [
        r["tokens"] for r in expected if "tokens" in r
    ]


def test_the_next_thing_to_try_depends_on_what_was_tried(masked_world, tmp_path, monkeypatch):
    tried = {"micro_batch_sequences": 1}
    for more, next_one in (
        ({}, ("train.gradient_checkpointing=true",)),
        (
            {"gradient_checkpointing": True},
            (),
        ),
    ):
        config, out = train_config(ALL, **tried, **more), tmp_path / str(len(more))
        failure = failing(monkeypatch, loop, "take_step", 1, OUT_OF_MEMORY[2])
        with failure, pytest.raises(ResumableError) as caught:
            run(masked_world, out, config)
        assert caught.value.settings == next_one


# --- the disk -------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
# As safetensors says it, which is no OSError.
FULL_IN_RUST = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)
WRITERS = [
    *((checkpoint, "save_file", FULL_IN_RUST, number) for number in (1, 4)),
    *((student_module, "save_file", FULL_IN_RUST, number) for number in (1, 5)),
    *((os, "fsync", FULL, number) for number in (1, 20, 40)),
    *((run_log.RunLog, "write", FULL, number) for number in (1, 12)),
    (os, "rename", FULL, 2),
    (finished, "write_json", FULL, 1),
]


@pytest.mark.covering
@pytest.mark.parametrize(("owner", "name", "error", "number"), WRITERS)
def test_a_full_disk_is_told_and_costs_nothing_that_was_finished(
    masked_world, whole, tmp_path, monkeypatch, owner, name, error, number
):
    out, config = tmp_path / "run", train_config(ALL)
    with failing(monkeypatch, owner, name, number, error):
        with pytest.raises(InputError, match=r"cannot be written: .*No space left on device"):
            run(masked_world, out, config)
        before = latest_checkpoint(out)
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]
    assert not (out / "summary.json").exists()
    run(masked_world, out, config, resume=before is not None or (out / "run.json").exists())
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)


def test_the_cache_may_be_out_of_reach_when_the_model_is_written(
    masked_world, whole, tmp_path, monkeypatch
):
    """All that is taken of it was read before."""
    make = loop.make_model_directory

    def unreachable(*arguments):
        raise OSError("the store is gone")

    def alone(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "read_bytes", unreachable)
            make(*arguments)

    monkeypatch.setattr(loop, "make_model_directory", alone)
    run(masked_world, tmp_path / "run", train_config(ALL))
    assert same_weights(tmp_path / "run", whole.directory)
    assert (tmp_path / "run/tokenizer.json").is_file()
