"""The demo: its list of jobs, and (slow) the whole of it, twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline.config import load_config
from rekindle.pipeline.demo.run import configs, plan_jobs, run_demo, write_configs
from rekindle.pipeline.demo.settings import FULL, QUICK, DemoSettings
from rekindle.pipeline.progress import Progress

both = pytest.mark.parametrize("settings", [QUICK, FULL], ids=["quick", "full"])

# --- the plan -------------------------------------------------------------------------------------


@both
def test_every_job_comes_after_what_it_needs(settings: DemoSettings, tmp_path: Path) -> None:
    jobs = list(plan_jobs(tmp_path, settings))
    seen: set[str] = set()
    for job in jobs:
        assert set(job.after) <= seen
        seen.add(job.name)
    assert len(seen) == len(jobs)
    assert len({job.output for job in jobs}) == len(jobs)
    assert all(tmp_path in job.output.parents for job in jobs)


@both
def test_no_two_jobs_write_into_the_cache_at_once(settings: DemoSettings, tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan_jobs(tmp_path, settings)}

    def all_before(name: str) -> set[str]:
        return set(jobs[name].after).union(*(all_before(a) for a in jobs[name].after))

    writers = [name for name in jobs if name == "base" or name.startswith("cache ")]
    assert len(writers) == 5
    for number, name in enumerate(writers):
        assert set(writers[:number]) <= all_before(name)


@both
def test_the_configurations_are_files_that_both_commands_read(
    settings: DemoSettings, tmp_path: Path
) -> None:
    write_configs(tmp_path, settings)
    for name, config in configs(tmp_path, settings).items():
        assert load_config(tmp_path / f"{name}.yaml") == config
    stage1 = load_config(tmp_path / "stage1.yaml")
    assert [t.name for t in stage1.teachers] == ["part", "kind", "next", "base-lm"]
    without, with_kd = (load_config(tmp_path / f"stage2-{s}-kd.yaml") for s in ("without", "with"))
    assert not without.train.objective.distill
    assert [t.teachers for t in with_kd.train.objective.distill] == [("part", "kind"), ("next",)]
    for config in (without, with_kd):
        assert (config.corpus, config.cache) == (stage1.corpus, stage1.cache)
    same = without.train.model_copy(update={"objective": with_kd.train.objective})
    assert same == with_kd.train  # the students differ in nothing else


# --- the directory --------------------------------------------------------------------------------


def test_a_directory_with_something_else_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        run_demo(tmp_path, quick=True, progress=Progress.silent())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="something else"):
        run_demo(tmp_path / "file", quick=True, progress=Progress.silent())


def test_a_demo_of_the_other_size_is_refused(tmp_path: Path) -> None:
    about = {"written_by": "rekindle demo", "python": "3.11.0", "settings": {}}
    (tmp_path / "demo.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="another demo"):
        run_demo(tmp_path, quick=True, progress=Progress.silent())


# --- the whole of it ------------------------------------------------------------------------------


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rekindle.pipeline.cli", "demo", "--quick", "--out", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def without_seconds(out: Path) -> dict:
    """What must be the same on every run."""
    results = json.loads((out / "results.json").read_text())
    for key in ("cost", "facts", "commands"):
        del results[key]
    for one in results["runs"]:
        del one["seconds"]
    for one in results["cache"]["teachers"]:
        del one["seconds_per_view"]
    return results


@pytest.mark.slow
def test_the_whole_demo_and_again_after_an_interrupt(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(whole)
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    for word in ("student with KD", "bytes/token", "the cache has paid for itself", "report.html"):
        assert word in text
    page = (whole / "report.html").read_text()
    assert "http" not in page
    for directory in ("base", "experts/part", "students/with-kd", "fine-tuned/with-kd/next"):
        assert (whole / directory / "model.safetensors").is_file()

    process = start(broken)
    while not (broken / "experts" / "part").exists():
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    finished = (broken / "base" / "model.safetensors").stat().st_mtime_ns

    process = start(broken)
    again, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert (broken / "base" / "model.safetensors").stat().st_mtime_ns == finished
    assert without_seconds(broken) == without_seconds(whole)
    table = again.split("The cache")[0]
    assert table == text.split("The cache")[0]

    began = time.monotonic()
    process = start(broken)
    assert process.communicate(timeout=60)[0] == again  # nothing is left to do
    assert time.monotonic() - began < 40
