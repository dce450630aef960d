"""Several students from one cache: each is the one trained alone, whatever happens on the way."""

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest
import yaml

from rekindle.data.errors import CacheFormatError, CheckpointError, InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import load_config
from rekindle.pipeline.processes import jobs
from rekindle.pipeline.processes import worker as devices_module
from rekindle.pipeline.processes.worker import Returned, Worker
from rekindle.pipeline.progress import Progress, ProgressTask
from rekindle.pipeline.sweep import run as module
from rekindle.pipeline.sweep.grid import plan_sweep
from rekindle.pipeline.sweep.run import SweepError, run_sweep
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.record.checkpoint import latest_checkpoint
from rekindle.train.record.run_folder import locked_folder
from testlib.command import run_main
from testlib.processes import Child, alive, descendants, until
from testlib.students import same_weights

TEMPERATURE = "train.objective.distill.0.temperature"
FIVE = (
    "train.objective.distill=[],[{teachers: [lm], temperature: 2.0}],"
    "[{teachers: [lm], temperature: 2.0, k: 2}],[{teachers: [lm], divergence: reverse_kl}],"
    "[{teachers: [expert]}]"
)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, small_corpus, wordpiece, make_model, make_teacher):
    """A run file whose cache is made, and whose teachers are gone."""
    home = tmp_path_factory.mktemp("sweep")
    made = [
        make_teacher("lm", "masked_lm", targets={"k": 8, "temperatures": [1.0, 2.0, 4.0]}),
        make_teacher("expert", "sequence_classification"),
    ]
    teachers = [t | {"model": shutil.copytree(t["model"], str(home / t["name"]))} for t in made]
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    student = make_model("bert", "AutoModelForMaskedLM", wordpiece, seed=5, **small)
    values = {
        "corpus": small_corpus | {"domain_field": None, "limit_sequences": 24},
        "cache": {"path": str(home / "cache"), "sequences_per_shard": 20, "replicas": 2},
        "teachers": teachers,
        "student": {"model": str(student), "from_scratch": True},
        "train": {
            "steps": 3,
            "batch_sequences": 4,
            "warmup_steps": 1,
            "learning_rate": 1e-2,
            "checkpoint_every": 1,
            "evaluate_every": 3,
            "held_out": 0.2,
            "objective": {"distill": [{"teachers": ["lm"]}]},
        },
    }
    path = home / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    cache_teachers(load_config(path))
    for teacher in teachers:
        shutil.rmtree(teacher["model"])
    return path


def losses(run):
    return json.loads((run / "summary.json").read_text())["evaluation"]


@pytest.fixture(scope="module")
def alone(run_file, tmp_path_factory):
    """alone(key=value, …) -> the directory of the student that --set trains by itself."""
    made = {}

    def train(*settings):
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("alone") / "run"
            train_from_config(load_config(run_file, list(settings)), made[settings])
        return made[settings]

    return train


# --- the same students ----------------------------------------------------------------------------


def test_five_students_of_one_cache_are_those_trained_alone(run_file, tmp_path, alone):
    """Without teachers: their directories are deleted."""
    runs = plan_sweep(run_file, [FIVE])
    assert run_sweep(runs, tmp_path / "out") == {}
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == sorted(
        run.name for run in runs
    )
    values = [losses(tmp_path / "out" / run.name) for run in runs]
    assert len({value["loss"] for value in values}) == 5
    assert ["kl/lm" in value for value in values] == [False, True, True, True, False]
    assert "kl/expert" in values[4]
    for run in runs:
        (setting,) = (f"{key}={value}" for key, value in run.values.items())
        assert same_weights(tmp_path / "out" / run.name, alone(setting))
        saved = load_config(tmp_path / "out" / run.name / "run.yaml")
        assert saved == run.config


def test_the_product_of_two_sweeps_and_what_is_written_down(run_file, tmp_path, alone):
    runs = plan_sweep(run_file, [f"{TEMPERATURE}=1,4", "train.seed=0,1"])
    assert run_sweep(runs, tmp_path) == {}
    assert len({losses(tmp_path / run.name)["loss"] for run in runs}) == 4
    assert same_weights(
        tmp_path / "temperature=4,seed=1", alone(f"{TEMPERATURE}=4", "train.seed=1")
    )
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [run["name"] for run in record["runs"]] == [run.name for run in runs]
    assert [run["values"] for run in record["runs"]] == [run.values for run in runs]
    assert [run["train"]["seed"] for run in record["runs"]] == [0, 1, 0, 1]
    about = json.loads((tmp_path / runs[0].name / "run.json").read_text())
    assert record["corpus"] == about["cache"]["corpus"]
    assert not list(tmp_path.glob(".*"))


def test_two_workers_make_the_same_students_as_one(run_file, tmp_path, alone):
    runs = plan_sweep(run_file, ["train.seed=0,1,2"])
    told = Recorder()
    assert run_sweep(runs, tmp_path, workers=2, progress=told) == {}
    for seed, run in enumerate(runs):
        assert same_weights(tmp_path / run.name, alone(f"train.seed={seed}"))
        assert told.steps[str(tmp_path / run.name)] == 3
        assert "loss" in told.notes[str(tmp_path / run.name)]
    assert not multiprocessing.active_children()


class Recorder(Progress):
    """Remembers what is told of every task, and calls ``heard`` at each advance."""

    def __init__(self, heard=lambda: None):
        super().__init__()
        self.steps, self.notes, self.heard = {}, {}, heard

    @contextmanager
    def task(self, name, unit, total=None):
        recorder = self

        class Told(ProgressTask):
            def advance(self, amount=1, **counts):
                super().advance(amount, **counts)
                recorder.steps[name] = self.done
                recorder.heard()

            def note(self, text):
                recorder.notes[name] = text

        yield Told(name, unit)


# --- interruptions --------------------------------------------------------------------------------


def interrupt_at(monkeypatch, number, error=KeyboardInterrupt):
    """Stop the ``number``-th student that is trained from here on; returns which were begun."""
    from rekindle.pipeline import train_student

    begun = []

    def train(config, out, **options):
        begun.append(out.name)
        if len(begun) == number:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ProgressTask, "note", stop)
                return train_from_config(config, out, **options)
        return train_from_config(config, out, **options)

    def stop(task, text):
        if task.done == 2:
            raise error

    monkeypatch.setattr(train_student, "train_from_config", train)
    return begun


def test_a_resumed_sweep_makes_only_what_is_missing(run_file, tmp_path, alone, monkeypatch):
    runs = plan_sweep(run_file, ["train.seed=0,1,2,3"])
    begun = interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(runs, tmp_path)
    assert begun == ["seed=0", "seed=1", "seed=2"]
    assert (tmp_path / "seed=2" / "run.json").is_file()
    assert not (tmp_path / "seed=2" / "summary.json").exists()

    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("seed=[01]/**/*")}
    begun = interrupt_at(monkeypatch, 100)
    told = Recorder()
    assert run_sweep(runs, tmp_path, resume=True, progress=told) == {}
    assert begun == ["seed=2", "seed=3"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("seed=[01]/**/*")} == before
    for seed, run in enumerate(runs):
        assert same_weights(tmp_path / run.name, alone(f"train.seed={seed}"))
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "seed=2" / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "train"
    ]
    assert steps == [1, 2, 3]

    begun = interrupt_at(monkeypatch, 100)
    assert run_sweep(runs, tmp_path, resume=True) == {}
    assert begun == []


def test_a_sweep_may_get_more_students(run_file, tmp_path, alone, monkeypatch):
    run_sweep(plan_sweep(run_file, ["train.seed=0,1"]), tmp_path)
    for file in ("model.safetensors", "config.json"):  # finished still, though the disk was short
        (tmp_path / "seed=0" / file).unlink()
    begun = interrupt_at(monkeypatch, 100)
    assert run_sweep(plan_sweep(run_file, ["train.seed=2,1,0"]), tmp_path, resume=True) == {}
    assert begun == ["seed=2"]
    assert same_weights(tmp_path / "seed=2", alone("train.seed=2"))
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [run["name"] for run in record["runs"]] == ["seed=2", "seed=1", "seed=0"]


def test_a_sweep_goes_on_with_less_memory_and_with_a_student_that_has_moved(run_file, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved"
    runs = plan_sweep(run_file, ["train.seed=0"])
    assert not run_sweep(runs, out)
    shutil.copytree(runs[0].config.student.model, moved)
    less = ["train.micro_batch_sequences=2", f"student.model={moved}"]
    assert not run_sweep(plan_sweep(run_file, ["train.seed=0,1"], less), out, resume=True)
    other = tmp_path / "other"
    shutil.copytree(moved, other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    changed = plan_sweep(run_file, ["train.seed=0,1"], [*less[:1], f"student.model={other}"])
    with pytest.raises(CheckpointError, match=r"student\.model"):
        run_sweep(changed, out, resume=True)


def test_a_killed_worker_is_one_failure_and_resumes(run_file, tmp_path, alone):
    killed = []

    def kill():
        if not killed:
            (first, *_) = multiprocessing.active_children()
            killed.append(first.pid)
            os.kill(first.pid, signal.SIGKILL)
            first.join()

    runs = plan_sweep(run_file, ["train.seed=0,1"], ["train.steps=40"])
    ((failed, error),) = run_sweep(runs, tmp_path, workers=2, progress=Recorder(kill)).items()
    told = SweepError({failed: error}, 2)
    assert f"failed. {failed}: its process was killed (exit code -9; " in str(told)
    assert str(told).endswith(
        "--resume tries the failed ones again (if memory is short, give fewer --workers)"
    )
    assert told.exit_code == 2
    other = next(run.name for run in runs if run.name != failed)
    assert (tmp_path / other / "summary.json").is_file()
    assert run_sweep(runs, tmp_path, resume=True) == {}
    assert same_weights(tmp_path / failed, alone("train.steps=40", f"train.{failed}"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_students_end_with_the_command(run_file, tmp_path, how):
    options = ["--sweep", "train.seed=0,1", "--workers", "2", "--set", "train.steps=100000"]

    def work():
        # The server of students that an earlier test has started is no child of this process.
        vars(forkserver._forkserver).update(vars(forkserver.ForkServer()))
        run_main("train-student", run_file, "--out", tmp_path, *options)

    process = Child(work)
    logs = [tmp_path / f"seed={seed}" / "metrics.jsonl" for seed in (0, 1)]
    begun = lambda: all(log.is_file() and log.stat().st_size for log in logs)  # noqa: E731
    assert until(lambda: process.ended() or begun(), 120)
    children = descendants(process.pid)
    assert len(children) >= 3  # two students, and the server that they were forked from
    os.kill(process.pid, how)
    assert process.wait() == (130 if how is signal.SIGINT else -signal.SIGKILL), process.errors
    if how is signal.SIGINT:
        line = process.errors.strip().splitlines()[-1]
        assert line.startswith("interrupted; 0 of 2 students are finished; ")
        for log in logs:
            step = json.loads(log.read_text().splitlines()[-1])["step"]
            assert f"{log.parent}: interrupted at step {step:,}; a checkpoint of it is" in line
            assert latest_checkpoint(log.parent)[1]["step"] == step
        for part in ("--sweep train.seed=0,1", "--set train.steps=100000", "--workers 2"):
            assert part in line
        assert line.endswith("--resume")
    # What is on the list of processes as ended waits for PID 1 to take it off, whenever it looks.
    assert until(lambda: not alive(children)), "a student was left behind"


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_student_stops_no_other(run_file, tmp_path, workers):
    rates = plan_sweep(run_file, ["train.learning_rate=1e30,1e-2,1e29"])
    failures = run_sweep(rates, tmp_path, workers=workers)
    assert list(failures) == ["learning_rate=1e30", "learning_rate=1e29"]
    assert {error.exit_code for error in failures.values()} == {2}
    assert all("loss" in str(e) or "grad_norm" in str(e) for e in failures.values())
    assert (tmp_path / "learning_rate=1e-2" / "summary.json").is_file()
    assert not (tmp_path / "learning_rate=1e30" / "summary.json").exists()


def test_an_error_of_ours_stops_no_other_either(run_file, tmp_path, monkeypatch, caplog):
    interrupt_at(monkeypatch, 1, ZeroDivisionError("oh"))
    failures = run_sweep(plan_sweep(run_file, ["train.seed=0,1"]), tmp_path)
    assert list(failures) == ["seed=0"]
    error = SweepError(failures, 2)
    assert "seed=0: ZeroDivisionError: oh. The others" in str(error)
    assert error.exit_code == 1
    assert "Traceback" in caplog.text
    assert (tmp_path / "seed=1" / "summary.json").is_file()


def test_an_error_of_ours_in_a_worker_is_told_as_in_this_process(
    run_file, tmp_path, monkeypatch, capfd
):
    """Workers are forked from here: only so do they have the bug."""
    from rekindle.pipeline import train_student

    class Unpicklable(Exception):
        pass

    def train(config, out, **options):
        raise Unpicklable("oh")

    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(train_student, "train_from_config", train)
    failures = run_sweep(plan_sweep(run_file, ["train.seed=0,1"]), tmp_path, workers=2)
    error = SweepError(failures, 2)
    assert "seed=0: Unpicklable: oh; seed=1: Unpicklable: oh. The others" in str(error)
    assert error.exit_code == 1
    at_once = capfd.readouterr().err
    for run in ("seed=0", "seed=1"):
        assert f"{tmp_path / run} failed; its message comes at the end" in at_once
    assert at_once.count("Traceback") == 2


def test_the_message_lists_what_failed_and_the_first_one_gives_the_code():
    error = SweepError({"a": CheckpointError("bad weights."), "b": InputError("nan")}, 5)
    assert error.exit_code == 3
    assert "2 of 5 students failed. a: bad weights; b: nan." in str(error)
    assert "--resume" in str(error)
    full = SweepError({"x": OSError(28, "No space left on device")}, 1)
    assert "x: [Errno 28] No space left on device" in str(full)
    assert full.exit_code == 2


# --- refusals -------------------------------------------------------------------------------------


def refused(error, runs, out, *words, **options):
    """Nothing is begun, and nothing in ``out`` is changed."""
    before = {p: p.stat().st_mtime_ns for p in out.glob("**/*")}
    with pytest.raises(error) as caught:
        run_sweep(runs, out, **options)
    for word in words:
        assert word in str(caught.value), caught.value
    assert {p: p.stat().st_mtime_ns for p in out.glob("**/*")} == before


@pytest.fixture
def swept(run_file, tmp_path, monkeypatch):
    """A sweep of two that has only been begun."""
    monkeypatch.setattr(module, "train_one", lambda run, out, progress: None)
    runs = plan_sweep(run_file, ["train.seed=0,1"])
    assert run_sweep(runs, tmp_path / "out") == {}
    return tmp_path / "out"


def test_a_used_directory_is_refused(run_file, swept, tmp_path):
    runs = plan_sweep(run_file, ["train.seed=0,1"])
    refused(InputError, runs, swept, "not empty", "--resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for resume in (False, True):
        refused(InputError, runs, tmp_path / "other", "holds no sweep", resume=resume)
    refused(InputError, runs, tmp_path / "other" / "file", "holds no sweep")


def test_a_second_process_on_a_sweep_is_refused(run_file, swept):
    with locked_folder(swept):
        runs = plan_sweep(run_file, ["train.seed=0,1"])
        refused(InputError, runs, swept, "another process works on", resume=True)
    assert run_sweep(runs, swept, resume=True) == {}


@pytest.mark.parametrize(
    ("sweep", "settings", "words"),
    [
        ("train.seed=0,2", [], ("another sweep", "seed=1")),
        ("train.seed=0", [], ("another sweep", "seed=1")),
        ("train.steps=3,4", [], ("another sweep", "seed=0")),
        ("train.seed=0,1", ["train.steps=4"], ("train.steps: 3 there, 4 here",)),
        ("train.seed=0,1", ["student.from_scratch=false"], ("student.from_scratch",)),
        ("train.seed=0,1", ["train.weight_decay=0.5"], ("train.weight_decay", "0.5 here")),
    ],
)
def test_another_sweep_in_the_directory_is_refused(run_file, swept, sweep, settings, words):
    runs = plan_sweep(run_file, [sweep], settings)
    refused(CheckpointError, runs, swept, *words, "--out", resume=True)


def test_a_sweep_of_an_older_version_which_had_not_every_key_goes_on(run_file, swept):
    record = json.loads((swept / "sweep.json").read_text())
    for run in record["runs"]:
        del run["train"]["schedule"], run["student"]["attention"]
    (swept / "sweep.json").write_text(json.dumps(record))
    assert run_sweep(plan_sweep(run_file, ["train.seed=0,1"]), swept, resume=True) == {}


def test_another_corpus_is_refused(run_file, swept):
    record = json.loads((swept / "sweep.json").read_text())
    (swept / "sweep.json").write_text(json.dumps(record | {"corpus": "other"}))
    runs = plan_sweep(run_file, ["train.seed=0,1"])
    refused(CheckpointError, runs, swept, "another cache", resume=True)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", "\xff"),
        '{"runs": [{}], "corpus": "a"}',
        '{"runs": [], "corpus": 1}',
        '{"runs": [{"name": "seed=0", "student": {}, "train": {}}], "corpus": "a"}',
        '{"runs": [{"name": "a", "values": {}, "student": 1, "train": {}}], "corpus": "a"}',
    ],
)
def test_a_damaged_definition_is_refused(run_file, swept, content):
    (swept / "sweep.json").write_text(content, encoding="latin-1")
    runs = plan_sweep(run_file, ["train.seed=0,1"])
    refused(CheckpointError, runs, swept, "sweep.json is damaged", resume=True)


def test_what_the_cache_does_not_have_is_refused_before_anything_is_written(run_file, tmp_path):
    out = tmp_path / "out"
    distill = "train.objective.distill=[],[{teachers: [absent]}]"
    refused(InputError, plan_sweep(run_file, [distill]), out, "absent", "lm", "student distill=")
    more = plan_sweep(run_file, [f"{TEMPERATURE}=1,3"])
    refused(InputError, more, out, "student temperature=3", "[1.0, 2.0, 4.0]")
    masks = plan_sweep(run_file, ["train.seed=0"], ["cache.seed=9"])
    refused(InputError, masks, out, "masked views")
    gone = plan_sweep(run_file, ["train.seed=0"], [f"cache.path={tmp_path / 'gone'}"])
    refused(CacheFormatError, gone, out, "gone")
    assert not out.exists()


def test_each_of_the_students_sections_is_checked(run_file, tmp_path):
    """The second has the model of the first, and would begin with weights that are not there."""
    home = Path(yaml.safe_load(run_file.read_text())["student"]["model"])
    model = shutil.copytree(home, tmp_path / "model")
    (model / "model.safetensors").unlink()
    runs = plan_sweep(run_file, ["student.from_scratch=true,false"], [f"student.model={model}"])
    refused(InputError, runs, tmp_path / "out", "student from_scratch=false", "no *.safetensors")
    assert not (tmp_path / "out").exists()


def test_torchrun_is_refused(run_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(InputError, plan_sweep(run_file, ["train.seed=0"]), tmp_path / "x", "torchrun")


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "workers", "shared"),
    [(["5", "3"], None, 1), (["5", "3"], 4, 2), (["5", "3", "1"], 2, 1), ([], 2, 2)],
)
def test_one_student_per_place_at_a_time(run_file, tmp_path, monkeypatch, devices, workers, shared):
    """More workers than devices share them; a device that is free takes the next student."""
    running, seen = [], []

    class Told(Worker):
        """A student that is finished as soon as it is asked for what it has to say."""

        def __init__(self, name, work, place, log_file):
            self.place = place
            self._connection, theirs = multiprocessing.Pipe()
            theirs.send(None)
            running.append(place.device)
            seen.append((Path(name).name, place.device))
            assert all(running.count(device) <= shared for device in running)
            assert len(running) <= (workers or len(devices))

        def receive(self):
            running.remove(self.place.device)
            return Returned(None)

    monkeypatch.setattr(jobs, "Worker", Told)
    monkeypatch.setattr(module, "visible_devices", lambda: devices)
    monkeypatch.setattr(devices_module, "visible_devices", lambda: devices)
    runs = plan_sweep(run_file, ["train.seed=0,1,2,3,4"])
    assert run_sweep(runs, tmp_path, workers=workers) == {}
    assert [name for name, _ in seen] == [run.name for run in runs]
    used = devices[: workers or len(devices)] or [None]
    assert {device for _, device in seen} == set(used)
