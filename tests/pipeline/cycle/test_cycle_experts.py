"""A cycle whose experts are of another model: who teaches whom, and the whole of it."""

import json
import random
from collections.abc import Sequence

import pytest

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import read_tasks
from rekindle.pipeline.cycle.jobs import plan_jobs
from rekindle.pipeline.cycle.run import run_cycle
from rekindle.pipeline.cycle.run_files import configs
from rekindle.pipeline.processes.jobs import Job, Report

TINY = {"hidden_size": 16, "intermediate_size": 24}
ARMS = ["pseudo", "kd", "committee"]


def run_here(jobs: Sequence[Job], *_) -> None:
    """What ``run_counted`` does, without processes of their own; jobs stand in an order that they
    can be done in.
    """
    names = {job.name for job in jobs}
    done: set[str] = set()
    while names - done:
        for job in jobs:
            if job.name not in done and done.issuperset(job.after):
                assert job.output is not None
                if not job.output.exists():
                    job.function(*job.arguments, Report())
                assert job.output.exists(), job.name
                done.add(job.name)


@pytest.fixture(scope="module")
def here():
    """Jobs are done in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rekindle.pipeline.cycle.run.run_counted", run_here)
        patch.setattr("rekindle.pipeline.cycle.run.warm_up", lambda: None)
        yield


def task_files(folder, name, labels=("red", "green")):
    draw, words = random.Random(name), ["river", "mountain", "city", "engine", "paper", "light"]
    files = {}
    for split, count in (("train", 24), ("dev", 8), ("test", 10)):
        texts = [" ".join(draw.choices(words, k=6)) for _ in range(count)]
        rows = [{"text": text, "label": labels["river" in text]} for text in texts]
        files[split] = str(folder / f"{name}-{split}.jsonl")
        with open(files[split], "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return {"name": name, **files}


@pytest.fixture(scope="module")
def values(tmp_path_factory, corpus_file, wordpiece, bytelevel, make_model):
    """A task, and experts of another size and tokenizer."""
    folder = tmp_path_factory.mktemp("experts")
    student = make_model("bert", "AutoModelForMaskedLM", wordpiece, 3, **TINY)
    other = make_model("roberta", "AutoModelForMaskedLM", bytelevel, 4, **TINY)
    return {
        "corpus": {
            "source": [str(corpus_file)],
            "tokenizer": str(student),
            "sequence_length": 24,
            "limit_sequences": 16,
        },
        "cache": {"replicas": 1},
        "student": {"model": str(student)},
        "experts": {"model": str(other)},
        "train": {"steps": 2, "batch_sequences": 4, "evaluate_every": 2, "warmup_steps": 1},
        "tasks": [task_files(folder, "colour")],
        "arms": ARMS,
        "finetune": {"epochs": 1, "batch_size": 8, "max_length": 24, "learning_rate": 1e-3},
        "seeds": 2,
    }


def config_of(values, **changes):
    return parse_settings(CycleConfig, values | changes)


# --- the plan -------------------------------------------------------------------------------------


def test_each_student_waits_for_what_teaches_it(values, tmp_path):
    config = config_of(values)
    jobs = {job.name: job for job in plan_jobs(tmp_path, config, read_tasks(config))}
    for arm, teachers in (
        ("pseudo", ["colour"]),
        ("kd", ["colour"]),
        ("committee", ["colour.0", "colour.1"]),
    ):
        needed = ("corpus", *(f"cache {name}" for name in teachers))
        assert jobs[f"student {arm}-colour"].after == needed
    assert jobs["expert on colour"].after == ("start-expert",)
    assert jobs["start on colour"].after == ("start",)
    together = config_of(values, arms=["kd"], experts={"teacher": "all"})
    jobs = {job.name: job for job in plan_jobs(tmp_path, together, read_tasks(together))}
    assert [name for name in jobs if name.startswith("cache")] == [
        "cache colour.0",
        "cache colour.1",
    ]


def test_the_seeds_of_an_expert_are_teachers_of_their_own(values, tmp_path):
    config = config_of(values, cache={"path": str(tmp_path / "cache")})
    runs = configs(tmp_path, config, read_tasks(config))
    teachers = {one.name: one.model for one in runs["stage1.yaml"].teachers}
    assert teachers == {
        "colour": str(tmp_path / "experts" / "colour"),
        "colour.0": str(tmp_path / "experts" / "colour" / "seeds" / "seed-0"),
        "colour.1": str(tmp_path / "experts" / "colour" / "seeds" / "seed-1"),
    }
    for arm in ARMS:
        objective = runs[f"students/{arm}-colour.yaml"].train.objective
        assert objective.hard.weight == 0
        (term,) = objective.distill
        assert term.combine == ("mixture" if arm == "committee" else "separate")


# --- the whole of it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory, here):
    out = tmp_path_factory.mktemp("experts") / "whole"
    return out, run_cycle(config_of(values), out)


def test_every_arm_is_fine_tuned_from_its_own_model(whole):
    out, results = whole
    for arm, expected in (("start", "start"), *((arm, f"students/{arm}-colour") for arm in ARMS)):
        metrics = json.loads((out / "fine-tuned" / arm / "colour" / "metrics.json").read_text())
        assert metrics["model"] == str(out / expected)
        assert metrics["config"]["epochs"] == 1
    expert = json.loads((out / "experts" / "colour" / "metrics.json").read_text())
    assert (expert["model"], expert["config"]["epochs"]) == (str(out / "start-expert"), 1)
    shapes = [
        json.loads((out / name / "config.json").read_text())["model_type"]
        for name in ("start", "start-expert", "experts/colour/seeds/seed-1")
    ]
    assert shapes == ["bert", "roberta", "roberta"]
    assert {one.arm for one in results.scores} >= {"expert", "start", *ARMS}


def test_a_finished_cycle_is_left_as_it_is_and_its_models_are_held_to(
    whole, values, make_model, bytelevel
):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.glob("**/model.safetensors")}
    run_cycle(config_of(values), out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = make_model("roberta", "AutoModelForMaskedLM", bytelevel, 9, **TINY)
    for changed, words in (
        ({"model": str(other)}, "other weights of .*its experts"),
        (values["experts"] | {"finetune": {"epochs": 3}}, r"experts\.finetune\.epochs: None there"),
        (values["experts"] | {"teacher": "all"}, r"experts\.teacher: 'best' there"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run_cycle(config_of(values, experts=changed), out)


# --- what is refused before anything runs ---------------------------------------------------------


def test_scores_have_no_class_to_teach(values, tmp_path):
    task = task_files(tmp_path, "score", (0.5, 1.5))
    for arms, words in (
        (["pseudo"], "has no class that is most likely"),
        (["committee"], "only classifiers of one label teach together.*leave it out of arms"),
    ):
        with pytest.raises(InputError, match=words):
            run_cycle(config_of(values, tasks=[task], arms=arms), tmp_path / "out")
    together = values["experts"] | {"teacher": "all"}
    with pytest.raises(InputError, match=r"the arm kd.*give experts\.teacher: best"):
        run_cycle(config_of(values, tasks=[task], arms=["kd"], experts=together), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_expert_can_be_of_is_refused(values, tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        run_cycle(config_of(values, experts={"model": "/nowhere"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
