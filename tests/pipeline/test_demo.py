"""The demo: its list of jobs, and (slow) the whole of it, twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline.config import dump_config, load_config
from rekindle.pipeline.cycle.config import load_cycle
from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.students import students_of
from rekindle.pipeline.demo import (
    _ONE_STUDENT,
    FULL,
    QUICK,
    DemoSettings,
    closing_lines,
    cycle_config,
    run_demo,
    start_config,
    start_jobs,
)
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.report.significance import mean_interval
from testlib.cycles import TASKS, cycle, edit, scores_of

both = pytest.mark.parametrize("settings", [QUICK, FULL], ids=["quick", "full"])

# --- the plan -------------------------------------------------------------------------------------


@both
def test_what_makes_the_start_model_comes_one_after_another(
    settings: DemoSettings, tmp_path: Path
) -> None:
    """They write into one cache."""
    jobs = start_jobs(tmp_path, settings)
    for before, job in pairwise(jobs):
        assert job.after == (before.name,)
    assert len({job.output for job in jobs}) == len(jobs)
    assert all(tmp_path in job.output.parents for job in jobs)


@both
def test_the_configurations_are_files_that_the_commands_read(
    settings: DemoSettings, tmp_path: Path
) -> None:
    start, whole = start_config(tmp_path, settings), cycle_config(tmp_path, settings)
    (tmp_path / "start.yaml").write_text(dump_config(start))
    (tmp_path / "cycle.yaml").write_text(dump_config(whole))
    assert load_config(tmp_path / "start.yaml") == start
    assert load_cycle(tmp_path / "cycle.yaml") == whole
    # The text is tokenized once, and all teachers are in one cache.
    assert (start.corpus, start.cache.path) == (whole.corpus_of(""), whole.cache.path)
    assert [teacher.name for teacher in start.teachers] == ["base-lm"]
    # Guidance is held against all that could explain a gain without it.
    assert whole.primary is not None
    assert {whole.primary.arm, *whole.primary.against} == {*whole.arms}
    assert {"expert", "longer", "mlm"} == {*whole.primary.against}
    assert cycle_config(tmp_path, FULL).seeds == 5  # as --quick says
    assert whole.all_teach  # no seed of an expert is chosen, by dev or otherwise
    assert {
        name: (one.tasks, one.learns_masked_lm) for name, one in students_of(whole).items()
    } == {
        "mixture": (("part", "kind"), True),
        "mlm": ((), True),
    }


# --- what it says at its end ----------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "gains"), [(1, [0.1]), (3, [0.1, 0.2, -0.03])])
def test_the_closing_lines_have_the_interval_and_in_how_many_seeds_it_helped(
    seeds: int, gains: list[float], tmp_path: Path
) -> None:
    primary = {"arm": "kd", "against": ["expert"]}
    out = cycle(tmp_path, ("expert", "kd"), search={}, seeds=seeds, primary=primary)
    for task, (arm, place) in product(TASKS, (("expert", 0), ("kd", 1))):

        def scored(metrics: dict, task: str = task, place: int = place) -> None:
            for one, gain in zip(metrics["per_seed"], gains, strict=True):
                one["test_scores"] = scores_of(task, 0.5 + place * gain)

        edit(out / folder_of(arm, task) / "metrics.json", scored)
    head, line, *more = closing_lines(read_results(out))
    assert "mean over 3 tasks" in head
    assert line.startswith(f"  kd over expert: {100 * fmean(gains):+.2f}")
    if seeds == 1:
        (one_seed,) = more
        assert "one seed" in one_seed.lower()
        assert "`pipeline demo`" in one_seed
        return
    low, high = mean_interval(gains) or (0, 0)
    assert line.endswith(f"[{100 * low:+.2f} … {100 * high:+.2f}], higher in 2 of 3 seeds")
    assert more == [_ONE_STUDENT + "."]


# --- the directory --------------------------------------------------------------------------------


def test_a_directory_with_something_else_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no demo"):
        run_demo(tmp_path, quick=True, progress=Progress.silent())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="holds no demo"):
        run_demo(tmp_path / "file", quick=True, progress=Progress.silent())


def test_a_demo_of_the_other_size_is_refused(tmp_path: Path) -> None:
    """And so is one whose folder is laid out as earlier versions did."""
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
    for key in ("cost", "costs", "arm_costs", "settings"):
        del results[key]
    for one in results["cache"]["teachers"]:
        del one["seconds_per_view"]
    return results


@pytest.mark.slow
def test_the_whole_demo_and_again_after_an_interrupt(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "ended"  # as long: places stand in the cache
    process = start(whole)
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    for word in (
        "base-lm",
        "bytes/token",
        "the cache has paid for itself",
        "report.html",
        "mixture over mlm: ",
    ):
        assert word in text
    page = (whole / "report.html").read_text()
    assert "http" not in page
    for told in (text, page):
        assert "One seed (--quick) says nothing about chance" in told
    for directory in ("made/base", "experts/part", "students/mixture", "fine-tuned/mixture/kind"):
        assert (whole / directory / "model.safetensors").is_file()

    process = start(broken)
    while not (broken / "experts" / "part").exists():
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert re.search(r"interrupted; \d+ of \d+ jobs are finished", errors)
    finished = (broken / "made" / "base" / "model.safetensors").stat().st_mtime_ns

    process = start(broken)
    again, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert (broken / "made" / "base" / "model.safetensors").stat().st_mtime_ns == finished
    assert without_seconds(broken) == without_seconds(whole)
    table = again.split(" seconds of all")[0]
    assert table == text.split(" seconds of all")[0]

    began = time.monotonic()
    process = start(broken)
    assert process.communicate(timeout=60)[0] == again  # nothing is left to do
    assert time.monotonic() - began < 40
