"""A cycle: its jobs, its configurations, its directory; and the whole of it, killed on the way."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rekindle.data.errors import CacheMismatchError, CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline import job_functions as stages
from rekindle.pipeline.config import dump_config, load_config
from rekindle.pipeline.cycle.arms import DEFAULT_ARMS as ARMS
from rekindle.pipeline.cycle.config import CycleConfig, load_cycle
from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.inputs import read_tasks
from rekindle.pipeline.cycle.jobs import plan_jobs
from rekindle.pipeline.cycle.page import commands_of
from rekindle.pipeline.cycle.run import run_cycle
from rekindle.pipeline.cycle.run_files import configs
from rekindle.pipeline.cycle.students import students_of
from rekindle.pipeline.processes.jobs import Report
from rekindle.train.record import run_folder
from rekindle.train.record.run_folder import locked_folder
from rekindle.train.record.run_log import read_metrics
from testlib.command import pipeline

SMALL = {"hidden_size": 16, "intermediate_size": 24}
COLOURS = ["red", "green", "blue"]


def lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def labelled(count: int, seed: int, kind: str) -> list[dict]:
    draw = random.Random(seed)
    words = "river mountain city engine paper light water model teacher cache".split()  # noqa: SIM905
    texts = [" ".join(draw.choices(words, k=6)) for _ in range(2 * count)]
    if kind == "classes":
        return [{"text": t, "label": COLOURS["river" in t]} for t in texts[:count]]
    pairs = zip(texts[:count], texts[count:], strict=True)
    return [{"sentence1": a, "sentence2": b, "label": len({*a} & {*b}) / 4} for a, b in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cycle")


@pytest.fixture(scope="module")
def config(folder, corpus_file, wordpiece, make_model) -> CycleConfig:
    """Two tasks, classes of texts and scores of pairs; every arm; a search over two rates."""
    tasks = [
        {
            "name": name,
            "train": lines(folder / f"{name}-train.jsonl", labelled(24, 1, kind)),
            "test": lines(folder / f"{name}-test.jsonl", labelled(10, 2, kind)),
        }
        for name, kind in (("colour", "classes"), ("alike", "scores"))
    ]
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 3, **SMALL)
    values = {
        "corpus": {
            "source": [str(corpus_file)],
            "tokenizer": str(wordpiece),
            "domain_field": "domain",
            "sequence_length": 24,
            "limit_sequences": 24,
        },
        "cache": {"sequences_per_shard": 12, "replicas": 1},
        "student": {"model": str(model)},
        "train": {"steps": 3, "batch_sequences": 4, "warmup_steps": 1, "evaluate_every": 3},
        "tasks": tasks,
        "finetune": {"epochs": 1, "batch_size": 8, "max_length": 24, "learning_rate": 1e-3},
        "search": {"learning_rate": [1e-3, 3e-3]},
        "seeds": 2,
    }
    return parse_settings(CycleConfig, values)


@pytest.fixture(scope="module")
def tasks(config):
    return read_tasks(config)


# --- the plan -------------------------------------------------------------------------------------


def test_every_job_comes_after_what_it_needs_and_writes_its_own(config, tasks, tmp_path):
    jobs = {job.name: job for job in plan_jobs(tmp_path, config, tasks)}
    count = len(list(plan_jobs(tmp_path, config, tasks)))
    assert len(jobs) == len({job.output for job in jobs.values()}) == count
    assert all(tmp_path in job.output.parents for job in jobs.values())

    def before(name: str) -> set[str]:
        direct = set(jobs[name].after)
        return direct.union(*(before(other) for other in direct))

    for task in ("colour", "alike"):
        assert f"expert on {task}" in before(f"cache {task}")
        for arm in ("kd", "both", "mixture"):
            assert f"cache {task}" in before(f"{arm} on {task}")
        for arm in ARMS:
            ends = f" {arm} on {task}"
            searches = {n for n in jobs if n.startswith("search") and n.endswith(ends)}
            assert len(searches) == 2
            assert searches <= before(f"{arm} on {task}")
        assert not any("student" in name for name in before(f"longer on {task}"))
        assert not any("cache" in name for name in before(f"mlm on {task}"))
    assert {"cache colour", "cache alike"} <= before("mixture on alike")
    writers = ["corpus", "cache colour", "cache alike"]
    for number, name in enumerate(writers):  # one at a time, so that a teacher's time is its own
        assert set(writers[:number]) <= before(name)


def test_without_a_search_nothing_is_searched(config, tasks, tmp_path):
    plain = config.model_copy(update={"search": {}})
    assert not [job for job in plan_jobs(tmp_path, plain, tasks) if "search" in job.name]


def test_students_differ_in_who_teaches_them_and_in_masked_lm_alone(config, tasks, tmp_path):
    learned = {name: (one.tasks, one.learns_masked_lm) for name, one in students_of(config).items()}
    assert learned == {
        "mixture": (("colour", "alike"), True),
        "both-colour": (("colour",), True),
        "both-alike": (("alike",), True),
        "kd-colour": (("colour",), False),
        "kd-alike": (("alike",), False),
        "mlm": ((), True),
    }
    cache = config.cache.model_copy(update={"path": str(tmp_path / "cache")})
    runs = configs(tmp_path, config.model_copy(update={"cache": cache}), tasks)
    students = {Path(name).stem: run for name, run in runs.items() if name.startswith("students/")}
    assert set(students) == set(students_of(config))
    for name, run in students.items():
        taught, masked = learned[name]
        terms = run.train.objective.distill
        assert sorted(n for term in terms for n in term.teachers) == sorted(taught)
        assert {t.teachers[0]: t.divergence for t in terms} == {
            n: {"colour": "forward_kl", "alike": "mse"}[n] for n in taught
        }
        assert run.train.objective.hard.weight == (1.0 if masked else 0.0)
        same = run.train.model_copy(update={"objective": config.train.objective})
        assert same == config.train
        text = config.corpus_of("").model_copy(update={"without": run.corpus.without})
        assert (run.corpus, run.student) == (text, config.student)
        assert len(run.corpus.without) == 2  # the tests of both tasks
    assert [t.task for t in runs["stage1.yaml"].teachers] == [
        "sequence_classification",
        "regression",
    ]
    assert [t.pairs for t in runs["stage1.yaml"].teachers] == [None, "adjacent"]


# --- the directory --------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch):
    for name in ("run_counted", "warm_up"):
        monkeypatch.setattr(f"rekindle.pipeline.cycle.run.{name}", lambda *_, **__: None)


def test_the_files_it_leaves_are_run_files(config, tmp_path, nothing_runs):
    run_cycle(config, tmp_path / "out")
    out = tmp_path / "out"
    assert load_cycle(out / "run.yaml").cache.path == str(out / "cache")
    for name in ("corpus", "stage1", *(f"students/{s}" for s in students_of(config))):
        assert load_config(out / f"{name}.yaml").cache.path == str(out / "cache")
    about = json.loads((out / "cycle.json").read_text())
    assert about["tasks"]["colour"] | {"files": None} == {
        "metric": "accuracy",
        "regression": False,
        "pairs": None,
        "train": 20,
        "dev": 4,
        "test": 10,
        "test_in_train": 0,
        "held": {"train": 0},
        "chance": 0.7,  # seven of the ten are one colour
        "files": None,
    }
    assert about["arms"] == list(ARMS)


def test_what_can_be_done_by_hand_is_done_with_files_that_it_leaves(config, tmp_path, nothing_runs):
    run_cycle(config, tmp_path)
    config = load_cycle(tmp_path / "run.yaml")
    made = {"start", "cache", "students/mixture"}  # by jobs
    for _, line in commands_of(tmp_path, config, {}):
        words = [word for word in line.split() if word.startswith(str(tmp_path))]
        for path in (Path(word).relative_to(tmp_path) for word in words):
            assert path.parts[0] == "by-hand" or str(path) in made or (tmp_path / path).exists()
    page = (tmp_path / "report.html").read_text()
    assert "What was run" in page
    assert f"pipeline cache-teachers {tmp_path}/stage1.yaml" in page


def test_what_the_caller_has_put_there_is_not_something_else(config, tmp_path, nothing_runs):
    (tmp_path / "made").mkdir()
    with pytest.raises(InputError, match="is not empty and holds no cycle"):
        run_cycle(config, tmp_path)
    run_cycle(config, tmp_path, beside=("made",))


def test_a_cycle_of_an_older_version_goes_on(config, tmp_path, nothing_runs):
    """It has recorded no chance level, and what it is about was no setting; nor were others."""
    run_cycle(config, tmp_path)
    about = json.loads((tmp_path / "cycle.json").read_text())
    del about["settings"]["about"], about["settings"]["corpus"]["on_bad_record"]
    del about["settings"]["finetune"]["patience"], about["settings"]["train"]["schedule"]
    for task in about["settings"]["tasks"]:
        del task["about"], about["tasks"][task["name"]]["chance"]
    (tmp_path / "cycle.json").write_text(json.dumps(about))
    run_cycle(config.model_copy(update={"about": "colours"}), tmp_path)


def test_something_else_is_refused_and_left(config, tmp_path, nothing_runs):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no cycle"):
        run_cycle(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": 3}, "seeds: 2 there, 3 here"),
        ({"finetune": {"epochs": 2}}, r"finetune\.epochs: 1 there, 2 here"),
        ({"train": {"learning_rate": 1e-5}}, r"train\.learning_rate"),
        ({"arms": ["mlm"]}, "arm 'longer'"),
    ],
)
def test_another_cycle_is_refused(config, tmp_path, nothing_runs, change, words):
    run_cycle(config, tmp_path)
    before = (tmp_path / "cycle.json").read_text()
    values = config.model_dump(mode="json", by_alias=True)
    for key, value in change.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    with pytest.raises(CheckpointError, match=words):
        run_cycle(parse_settings(CycleConfig, values), tmp_path)
    assert (tmp_path / "cycle.json").read_text() == before


def test_other_labels_under_the_same_name_are_refused(config, tmp_path, nothing_runs):
    train = Path(config.tasks[0].train)
    run_cycle(config, tmp_path)
    kept = train.read_text()
    try:
        train.write_text(kept.replace("river", "brook", 1))
        with pytest.raises(CheckpointError, match=r"tasks\.colour\.files"):
            run_cycle(config, tmp_path)
    finally:
        train.write_text(kept)


def test_arms_may_be_added(config, tmp_path, nothing_runs):
    run_cycle(config.model_copy(update={"arms": ("expert", "mlm")}), tmp_path)
    run_cycle(config, tmp_path)
    assert json.loads((tmp_path / "cycle.json").read_text())["arms"] == list(ARMS)


def test_two_processes_do_not_work_on_one_cycle(config, tmp_path, nothing_runs):
    run_cycle(config, tmp_path)
    with locked_folder(tmp_path), pytest.raises(InputError, match="another process works on"):
        run_cycle(config, tmp_path)
    run_cycle(config, tmp_path)


def test_what_a_kill_left_half_made_is_removed(config, tmp_path, nothing_runs):
    run_cycle(config, tmp_path)
    left = [
        tmp_path / "experts" / ".colour.0a1b2c3d.new",
        tmp_path / "search" / "mlm" / "colour" / "x" / ".files.0a1b2c3d.new",
    ]
    done = tmp_path / "search" / "mlm" / "tmp-task" / "x" / "metrics.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    for one in left:
        one.mkdir(parents=True)
        (one / "model.safetensors").write_text("half")
    run_cycle(config, tmp_path)
    assert not any(one.exists() for one in left)
    assert done.exists()


def test_a_mixture_of_one_task_goes_on_where_it_was_begun(config, tmp_path, nothing_runs):
    old = config.model_copy(update={"tasks": config.tasks[:1], "arms": ("expert", "mixture")})
    run_cycle(old, tmp_path)
    about = json.loads((tmp_path / "cycle.json").read_text())
    assert about["arms"] == ["expert", "both"]
    (tmp_path / "cycle.json").write_text(json.dumps(about).replace('"both"', '"mixture"'))
    run_cycle(old, tmp_path)
    assert json.loads((tmp_path / "cycle.json").read_text())["arms"] == ["expert", "mixture"]


def test_a_cycle_without_students_has_a_report(config, tmp_path, nothing_runs):
    run_cycle(config.model_copy(update={"arms": ("expert", "longer")}), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert ">longer<" in page
    assert "2 tasks, 2 arms." in page


def test_a_kill_at_the_very_beginning_leaves_nothing_in_the_way(config, tmp_path, nothing_runs):
    for name in (".lock", ".cycle.json.tmp", ".cycle.json.0a1b2c3d.tmp"):
        (tmp_path / name).write_text("{")
    run_cycle(config, tmp_path)


def test_of_two_that_begin_at_once_one_is_refused(config, tmp_path, nothing_runs, monkeypatch):
    """The other one is between its look at the empty directory and its lock."""
    other = config.model_copy(update={"seeds": 3})

    def meanwhile(home):
        monkeypatch.setattr(run_folder, "locked_folder", locked_folder)
        run_cycle(other, home)
        return locked_folder(home)

    monkeypatch.setattr(run_folder, "locked_folder", meanwhile)
    with pytest.raises(CheckpointError, match="seeds: 3 there, 2 here"):
        run_cycle(config, tmp_path)
    assert json.loads((tmp_path / "cycle.json").read_text())["seeds"] == 3


def test_a_start_model_that_has_changed_is_refused(
    config, tmp_path, nothing_runs, make_model, wordpiece
):
    out, weights = tmp_path / "out", "model.safetensors"
    model = Path(shutil.copytree(config.student.model, tmp_path / "model"))
    student = config.student.model_copy(update={"model": str(model)})
    config = config.model_copy(update={"student": student})
    run_cycle(config, out)
    other = make_model("bert", "AutoModelForMaskedLM", wordpiece, 4, **SMALL)
    shutil.copy(other / weights, model / weights)
    with pytest.raises(CheckpointError, match="other weights"):
        run_cycle(config, out)
    about = json.loads((out / "cycle.json").read_text())
    del about["start"]  # as before it was recorded
    (out / "cycle.json").write_text(json.dumps(about))
    run_cycle(config, out)


def test_a_missing_text_is_said_before_the_directory_is_made(config, tmp_path, nothing_runs):
    """And not later on, when the cache has it."""
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    corpus = config.corpus.model_copy(update={"source": (str(text),)})
    config = config.model_copy(update={"corpus": corpus})
    with pytest.raises(InputError, match=r"text\.jsonl"):
        run_cycle(config, out)
    assert not out.exists()
    text.write_text('{"text": "a"}\n')
    run_cycle(config, out)
    text.unlink()
    run_cycle(config, out)


@pytest.mark.parametrize(
    ("student", "tokenizer", "words"),
    [
        ("/nowhere/model", None, "no such directory"),
        (None, "other", "has another tokenizer"),
        ("config alone", None, "safetensors"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_anything_runs(
    config, tmp_path, student, tokenizer, words, wordpiece
):
    if student == "config alone":
        student = str(shutil.copytree(config.student.model, tmp_path / "model"))
        (tmp_path / "model" / "model.safetensors").unlink()
    if tokenizer:
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        *some, one, two = (wordpiece / "vocab.txt").read_text().split()
        (tokenizer / "vocab.txt").write_text("\n".join([*some, two, one]))
    values = config.model_dump(mode="json", by_alias=True)
    values["student"]["model"] = student or values["student"]["model"]
    values["corpus"]["tokenizer"] = str(tokenizer or wordpiece)
    with pytest.raises(InputError, match=words):
        run_cycle(parse_settings(CycleConfig, values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the whole of it ------------------------------------------------------------------------------


def start(file: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rekindle.pipeline.cli", "rekindle", str(file)]
    return subprocess.Popen(
        [*command, "--out", str(out), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )


def scores(out: Path) -> dict[str, list]:
    """Every score of every fine-tuning, by its folder."""
    found = {}
    for path in sorted(out.glob("**/metrics.json")):
        metrics = json.loads(path.read_text())
        found[str(path.parent.relative_to(out))] = [
            (one["seed"], one["scores"], one["test_scores"]) for one in metrics["per_seed"]
        ]
    return found


@pytest.fixture(scope="module")
def file(config, folder):
    path = folder / "cycle.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.fixture(scope="module")
def whole(file, folder):
    out = folder / "whole"
    done = pipeline("rekindle", file, "--out", out, "--workers", 2)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_stage_leaves_a_directory_that_can_be_used_alone(whole, config, command, tmp_path):
    out, _ = whole
    for task in ("colour", "alike"):
        for arm in ARMS:
            folder = out / folder_of(arm, task)
            metrics = json.loads((folder / "metrics.json").read_text())
            assert [one["seed"] for one in metrics["per_seed"]] == [0, 1]
            assert all(one["test_scores"] for one in metrics["per_seed"])
            assert metrics["config"]["epochs"] == (2 if arm == "longer" else 1)
            start_model = metrics["model"]
            expected = str(out / "start") if arm in ("expert", "longer") else "students/"
            assert expected in start_model
            searched = sorted((out / "search" / arm / task).iterdir())
            assert [p.name for p in searched] == ["learning_rate=0.001", "learning_rate=0.003"]
            assert all([p.name for p in one.iterdir()] == ["metrics.json"] for one in searched)
            means = [json.loads((p / "metrics.json").read_text()) for p in searched]
            best = max(means, key=lambda m: m["mean"])
            assert metrics["config"]["learning_rate"] == best["config"]["learning_rate"]
            assert [one["seed"] for one in best["per_seed"]] == [2]
            assert best["per_seed"][0]["test_scores"] is None
    for name in students_of(config):
        steps = [r for r in read_metrics(out / "students" / name) if r["kind"] == "train"]
        taught = students_of(config)[name].tasks
        for task in ("colour", "alike"):
            assert any(task in key for key in steps[-1]) == (task in taught)
    assert command("verify", out / "cache")[0] == 0
    again = tmp_path / "again"
    run_file = out / "students" / "both-colour.yaml"
    assert command("train-student", run_file, "--out", again)[0] == 0
    one, other = (
        (folder / "model.safetensors").read_bytes()
        for folder in (again, out / "students" / "both-colour")
    )
    assert one == other


def cache_of(whole: Path, folder: Path, **teacher) -> Path:
    """A run file of the one teacher, on a copy of the finished cache."""
    shutil.copytree(whole / "cache", folder / "cache")
    values = yaml.safe_load((whole / "stage1.yaml").read_text())
    values["cache"]["path"] = str(folder / "cache")
    values["teachers"] = [values["teachers"][0] | teacher]
    (folder / "stage1.yaml").write_text(yaml.safe_dump(values))
    return folder / "stage1.yaml"


def files_of(teacher: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in teacher.glob("**/*") if p.is_file()}


def test_an_interrupted_teacher_goes_on(whole, tmp_path):
    file = cache_of(whole[0], tmp_path)
    teacher, marker = tmp_path / "cache" / "targets" / "colour", tmp_path / "done.json"
    (teacher / "commits" / "00001.json").unlink()
    left = {p.name: p.stat().st_ino for p in (teacher / "data").iterdir() if "00000-" in p.name}
    assert left
    stages.cache(file, ("colour",), marker, Report())
    assert marker.exists()
    assert {p.name for p in (teacher / "commits").iterdir()} >= {"00000.json", "00001.json"}
    assert {name: (teacher / "data" / name).stat().st_ino for name in left} == left


def test_another_cycles_expert_of_the_same_name_is_refused_and_left(whole, tmp_path):
    """``cache.path`` may name a cache that is there already."""
    other = str(whole[0] / folder_of("mlm", "colour"))
    file = cache_of(whole[0], tmp_path, model=other)
    teacher, marker = tmp_path / "cache" / "targets" / "colour", tmp_path / "done.json"
    before = files_of(teacher)
    with pytest.raises(CacheMismatchError, match="colour"):
        stages.cache(file, ("colour",), marker, Report())
    assert files_of(teacher) == before
    assert not marker.exists()


def test_the_report_shows_every_arm_and_student(whole, command, tmp_path):
    out, text = whole
    results = json.loads((out / "results.json").read_text())
    assert {(s["arm"], s["task"]) for s in results["scores"]} >= {
        (arm, task) for arm in ARMS for task in ("colour", "alike", "mean")
    }
    assert len(results["searched"]) == 2 * len(ARMS)
    page = (out / "report.html").read_text()
    for name in (*ARMS, *students_of(config_in(out))):
        assert f">{name}<" in page
    assert "http" not in page
    code, said, errors = command("compare", out, "--out", tmp_path / "page.html")
    assert code == 0, errors
    assert "both-colour" in said
    assert (tmp_path / "page.html").read_text() == page
    for arm in ARMS:
        assert arm in text


def test_an_arm_and_its_only_student_have_one_line_on_the_whole_page(whole):
    page = (whole[0] / "report.html").read_text()
    for name in ("mlm", "mixture"):
        before = re.findall(r"var\(--run-(\d)\)[^§]{0,400}?</svg>(?:<span>)?" + name, page)
        assert len(before) >= 4  # scores, runs, losses, cost
        assert set(before) == {str(list(ARMS).index(name))}


def config_in(out: Path) -> CycleConfig:
    return load_cycle(out / "run.yaml")


# What is there when a run is killed, and how it is.
MOMENTS = [
    ("experts/colour", signal.SIGKILL),
    ("costs/colour.json", signal.SIGINT),
    ("students/mixture/metrics.jsonl", signal.SIGKILL),
    ("search/mixture/colour/learning_rate=0.003", signal.SIGKILL),
]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_scores(whole, config, tmp_path):
    """With two of the arms; scores of a cell depend on nothing of the other arms."""
    out, file = tmp_path / "broken", tmp_path / "two-arms.yaml"
    file.write_text(dump_config(config.model_copy(update={"arms": ("expert", "mixture")})))
    for moment, how in MOMENTS:
        process = start(file, out)
        began = time.monotonic()
        while not (out / moment).exists():
            time.sleep(0.05)
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - began < 300
        os.killpg(process.pid, how)
        process.communicate(timeout=60)
        assert process.returncode == (130 if how == signal.SIGINT else -how)
    process = start(file, out)
    text, errors = process.communicate(timeout=560)
    assert process.returncode == 0, errors
    found, expected = scores(out), scores(whole[0])
    assert len(found) == 14  # two arms on two tasks, two points of a search for each, own heads
    assert found == {cell: expected[cell] for cell in found}
    process = start(file, out)
    assert process.communicate(timeout=120)[0] == text  # nothing is left to do


def test_a_wrong_file_ends_with_one_message(file, tmp_path, command):
    values = yaml.safe_load(file.read_text())
    values["tasks"][0]["train"] = "nowhere.jsonl"
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    code, _, told = command("rekindle", tmp_path / "wrong.yaml", "--out", tmp_path / "out")
    assert code == 2
    assert "nowhere.jsonl" in told
    assert not (tmp_path / "out").exists()
