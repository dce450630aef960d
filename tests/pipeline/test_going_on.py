"""How a command ends that can go on, and that the line it prints does go on."""

import os
import re
import resource
import shlex
import signal
import sys

import pytest
import typer
import yaml

from rekindle.pipeline import exits
from rekindle.pipeline.cli import app
from rekindle.pipeline.progress import Progress
from rekindle.train import loop
from rekindle.train.finetune import run
from rekindle.train.record.checkpoint import latest_checkpoint
from rekindle.train.record.run_log import read_metrics
from testlib.command import pipeline, run_main
from testlib.processes import Child, before_call

LINE = re.compile(r"To (?:go on|begin again|run it again): (pipeline .*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, small_corpus, make_teacher, make_cache):
    """A run of eight short steps, its cache made."""
    home = tmp_path_factory.mktemp("going on")
    lm = make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 8})
    config = make_cache(home / "cache", [lm])
    train = {"steps": 8, "batch_sequences": 4, "warmup_steps": 1, "checkpoint_every": 2}
    train |= {
        "evaluate_every": 4,
        "held_out": 0.2,
        "objective": {"distill": [{"teachers": ["lm"]}]},
    }
    values = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    path = home / "run.yaml"
    path.write_text(yaml.safe_dump(values | {"student": {"model": lm["model"]}, "train": train}))
    return path


def child(*arguments, before=lambda: None):
    """The command in a process of its own; ``before`` runs there first."""

    def work():
        before()
        run_main(*arguments)

    return Child(work)


def end_of(process, code):
    """What it said; it has ended with ``code``, and without a traceback."""
    assert process.wait() == code, process.errors
    assert "Traceback" not in process.errors
    return process.errors


# --- the line -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_one_goes_on_with_all_its_options(run_file, tmp_path, number):
    from rekindle.pipeline.caching.make_unit import UnitRunner

    path = tmp_path / "another cache"
    typed = ["cache-teachers", str(run_file), "--set", f"cache.path={path}", "--teacher", "lm"]

    def interrupt():
        before_call(UnitRunner, "make", 2, lambda: os.kill(os.getpid(), number))

    said = end_of(child(*typed, before=interrupt), 130)
    assert re.search(r"\ninterrupted; made and kept: \d files? of the corpus, 1 file of lm\.", said)
    (line,) = LINE.findall(said)
    assert shlex.split(line) == ["pipeline", *typed]
    done = pipeline(*shlex.split(line)[1:])
    assert done.returncode == 0
    assert re.search(r"\d units made, 1 were there", done.stdout)


@pytest.mark.parametrize(("step", "resumed"), [(3, ["--resume"]), (None, [])])
def test_an_interrupted_student_goes_on_with_the_line(run_file, tmp_path, step, resumed):
    """Also where it was interrupted before there was anything to go on with."""
    out = tmp_path / "my run"
    typed = ["train-student", str(run_file), "--out", str(out), "--set", "train.seed=3"]
    where = (loop, "prepare", 1) if step is None else (loop, "take_step", step)

    def interrupt():
        before_call(*where, lambda: os.kill(os.getpid(), signal.SIGTERM))

    said = end_of(child(*typed, before=interrupt), 130)
    told = "; there is no checkpoint yet. To begin again: "
    if step is not None:
        told = f" at step {step}; a checkpoint of it is written. To go on: "
        assert latest_checkpoint(out)[1]["step"] == step
    assert f"\ninterrupted{told}" in said
    (line,) = LINE.findall(said)
    assert shlex.split(line) == ["pipeline", *typed, *resumed]
    done = pipeline(*shlex.split(line)[1:])
    assert (done.returncode, "8 steps" in done.stdout) == (0, True), done.stderr


COMMANDS = ("cache-teachers", "demo", "finetune", "rekindle", "train-student")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_is_what_was_typed_with_every_option(name, monkeypatch):
    """A new option, too: it is found among the command's own."""

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "to_terminal", interrupt)
    monkeypatch.setattr(run, "finetune", interrupt)
    monkeypatch.setattr(exits, "leave", sys.exit)
    known = {"set_": "epochs=1", "metric": "f1", "seeds": "2", "workers": "2", "draw": "1"}
    known |= {"executor": "local"}
    typed = [name]
    for one in typer.main.get_command(app).commands[name].params:
        value = known.get(one.name, f"the {one.name}'s")
        if one.opts == [one.name]:  # an argument
            typed.append(value)
        elif one.name not in ("help", "address"):  # that is of an executor which is not here
            typed += [one.opts[0], *([] if one.is_flag else [value])] * (1 + one.multiple)
    done = pipeline(*typed)
    assert done.returncode == 130, done.stderr
    (line,) = LINE.findall(done.stderr)
    assert shlex.split(line) == ["pipeline", *typed]
    # Nothing was begun; what goes on by itself has not looked yet.
    how = "begin" if name == "train-student" else "run it"
    assert f"\ninterrupted. To {how} again: " in done.stderr


def test_a_student_out_of_memory_goes_on_with_the_line(run_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    typed = ["train-student", str(run_file), "--out", str(out)]
    with monkeypatch.context() as patch:

        def no_memory(*arguments):
            raise MemoryError

        patch.setattr(loop, "_evaluate", no_memory)
        done = pipeline(*typed)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"Kept: {out}/checkpoints/step-00000002. To go on: " in done.stderr
    (line,) = LINE.findall(done.stderr)
    more = ["--resume", "--set", "train.micro_batch_sequences=2"]
    assert shlex.split(line) == ["pipeline", *typed, *more]
    assert pipeline(*shlex.split(line)[1:]).returncode == 0


# --- nothing to go on with ------------------------------------------------------------------------


def test_resume_where_nothing_was_begun_is_refused(run_file, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, why in (("mistyped", "there is no such directory"), ("empty", "nothing was begun")):
        out = tmp_path / name
        for more in ((), ("--sweep", "train.seed=1,2")):
            done = pipeline("train-student", run_file, "--out", out, "--resume", *more)
            assert done.returncode == 2
            told = f"error: --resume: nothing to go on with in {out} ({why}"
            assert done.stderr.startswith(told)
            assert "Leave --resume out to begin" in done.stderr
        assert not out.exists() or not [*out.iterdir()]


def test_a_finished_student_is_said_to_be_so(run_file, tmp_path):
    out = tmp_path / "run"
    typed = ["train-student", run_file, "--out", out]
    first = pipeline(*typed)
    assert "the best loss on sequences held out of training was " in first.stdout
    before = {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))}
    done = pipeline(*typed, "--resume")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{out}: was finished, and is left as it is: 8 steps")
    assert {p: p.stat().st_mtime_ns for p in (out, *out.rglob("*"))} == before


# --- two processes, and a full disk, as they are --------------------------------------------------


def test_a_second_process_is_told_who_trains_there(run_file, tmp_path):
    out = tmp_path / "run"
    typed = ["train-student", str(run_file), "--out", str(out)]
    ready, go = os.pipe(), os.pipe()

    def wait():
        def hold():
            os.write(ready[1], b".")
            os.read(go[0], 1)

        before_call(loop, "take_step", 3, hold)

    first = child(*typed, before=wait)
    try:
        os.read(ready[0], 1)
        who = f"another process works on {out} (process {first.pid} on {os.uname().nodename})"
        for more in ((), ("--resume",)):
            assert who in end_of(child(*typed, *more), 2)
    finally:
        os.write(go[1], b".")
        end_of(first, 0)
    steps = [r["step"] for r in read_metrics(out) if r["kind"] == "train"]
    assert steps == list(range(1, 9))
    # Killed, it lets go.
    other = tmp_path / "other"
    killed = child(
        *typed[:-1],
        str(other),
        before=lambda: before_call(
            loop, "take_step", 5, lambda: os.kill(os.getpid(), signal.SIGKILL)
        ),
    )
    assert killed.wait() == -signal.SIGKILL
    end_of(child(*typed[:-1], str(other), "--resume"), 0)


@pytest.mark.parametrize("size", [1_500, 20_000, 120_000])
def test_files_may_grow_no_further(run_file, tmp_path, size):
    """A real limit: what metrics, TensorBoard and safetensors each make of it."""
    out = tmp_path / "run"
    typed = ["train-student", str(run_file), "--out", str(out)]

    def limit():
        def now():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        before_call(loop, "take_step", 6, now)

    said = end_of(child(*typed, before=limit), 2)
    assert re.search(r"error: .* cannot be written: .*File too large", said)
    (line,) = LINE.findall(said)
    assert latest_checkpoint(out)[1]["step"] == 4
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]
    assert pipeline(*shlex.split(line)[1:]).returncode == 0
