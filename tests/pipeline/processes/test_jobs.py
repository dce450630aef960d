"""Jobs: each after what it needs, once, at one place at a time; failures and Ctrl-C stop all."""

import logging
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline.processes import jobs as jobs_module
from rekindle.pipeline.processes.jobs import Job, run_counted, run_jobs
from rekindle.pipeline.processes.worker import Place
from rekindle.pipeline.progress import Progress
from rekindle.train.interrupts import Interrupted

WORK = """
import os, pathlib, time
from rekindle.data.errors import InputError

def write(path, needed, seconds, report):
    assert all(pathlib.Path(p).exists() for p in needed), needed
    time.sleep(seconds)
    report.advance(1)
    print("wrote", path)
    pathlib.Path(path).write_text(str(os.getpid()))

def threads(path, report):
    import torch
    pathlib.Path(path).write_text(str(torch.get_num_threads()))

def where(path, report):
    import torch
    begin = time.monotonic()
    time.sleep(0.2)
    told = [os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads(), begin, time.monotonic()]
    pathlib.Path(path).write_text(" ".join(map(str, told)))

def refuse(report):
    raise InputError("not like this")

def fail(report):
    raise KeyError("a bug")

def die(report):
    os._exit(9)

def deaf(path, report):
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path(path).write_text("")
    time.sleep(60)

def keep(parent, others, report, more=0):
    import signal
    from rekindle.train.interrupts import Interrupted, Stop
    with Stop.heard() as stop:
        stop.listen()
        while not all(pathlib.Path(other).exists() for other in others):
            time.sleep(0.01)
        os.kill(parent, signal.SIGINT)
        while not stop.is_requested:
            time.sleep(0.01)
        for _ in range(more):
            time.sleep(0.05)
            os.kill(parent, signal.SIGINT)
            time.sleep(0.2)
    raise Interrupted(" at step 3; a checkpoint of it is written")

def keep_told_twice(parent, report):
    keep(parent, [], report, more=1)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of jobs' functions that the jobs' processes can import as well."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "work_of_test_jobs.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "work_of_test_jobs", raising=False)
    import work_of_test_jobs  # type: ignore[import-not-found]

    return work_of_test_jobs


def run(jobs: list[Job], folder: Path) -> None:
    run_jobs(jobs, folder / "log", Progress.silent(), [Place(None, 1)] * 2)


def test_jobs_run_after_what_they_need_and_once(work: ModuleType, tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    jobs = [
        Job("c", work.write, (c, [a, b], 0.0), output=c, after=("a", "b")),
        Job("a", work.write, (a, [], 0.3), output=a),
        Job("b", work.write, (b, [a], 0.0), output=b, after=("a",)),
    ]
    run(jobs, tmp_path)
    wrote = {path: path.read_text() for path in (a, b, c)}
    assert len(set(wrote.values())) == 3  # processes
    assert str(os.getpid()) not in wrote.values()
    assert (tmp_path / "log").read_text().count("wrote") == 3

    c.unlink()
    run(jobs, tmp_path)
    assert a.read_text() == wrote[a]
    assert b.read_text() == wrote[b]
    assert c.read_text() != wrote[c]


def test_a_job_has_one_thread(work: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "threads"
    run([Job("threads", work.threads, (out,), output=out)], tmp_path)
    assert out.read_text() == "1"


def test_a_job_of_unknown_length_is_done_and_has_no_rate(work: ModuleType, tmp_path: Path, caplog):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO, "rekindle"):
        job = Job("expert on trec", work.write, (out, [], 0.0), output=out)
        run_jobs([job], tmp_path / "log", Progress(quiet=False))
    assert re.fullmatch(r"expert on trec: done in \d+\.\d s", caplog.messages[-1])


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("refuse", InputError, "^not like this$"),
        ("fail", RuntimeError, r"(?s)bad failed:.*KeyError: 'a bug'"),
        ("die", InputError, r"bad: its process was killed \(exit code 9; .*again$"),
    ],
)
def test_a_job_that_fails_stops_the_others(
    function: str, error: type[Exception], message: str, work: ModuleType, tmp_path: Path
) -> None:
    slow, later = tmp_path / "slow", tmp_path / "later"
    jobs = [
        Job("slow", work.write, (slow, [], 600.0), output=slow),
        Job("bad", getattr(work, function), (), output=tmp_path / "never"),
        Job("later", work.write, (later, [], 0.0), output=later, after=("bad",)),
    ]
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run(jobs, tmp_path)
    assert time.monotonic() - began < 300
    assert not slow.exists()
    assert not later.exists()


def test_an_interrupt_waits_for_what_jobs_keep_and_no_longer(
    work: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "STOP_WITHIN", 3.0)
    done, slow, deaf = (tmp_path / name for name in ("done", "slow", "deaf"))
    done.touch()
    jobs = [
        Job("done", work.write, (done, [], 0.0), output=done),
        Job("slow", work.write, (slow, [], 600.0), output=slow),
        Job("deaf", work.deaf, (deaf,), output=tmp_path / "never"),
        Job("keep", work.keep, (os.getpid(), [deaf]), output=tmp_path / "never"),
    ]
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        run_counted(jobs, tmp_path / "log", Progress.silent(), [Place(None, 1)] * 3)
    assert time.monotonic() - began < 300
    assert caught.value.message == (
        "; 1 of 4 jobs are finished; keep: interrupted at step 3; a checkpoint of it is written"
    )
    assert not slow.exists()


def test_a_signal_that_comes_twice_is_one(work: ModuleType, tmp_path: Path) -> None:
    """As where it is sent to a group and to its leader: what the jobs keep is waited for."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    jobs = [Job("keep", work.keep_told_twice, (os.getpid(),), output=None)]
    with pytest.raises(Interrupted) as caught:
        run(jobs, tmp_path)
    assert caught.value.message == "; keep: interrupted at step 3; a checkpoint of it is written"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_places_are_taken_one_by_one(work: ModuleType, tmp_path: Path) -> None:
    """Two places: never three jobs at once, and each job sees the device and threads of its own."""
    outs = [tmp_path / f"job-{number}" for number in range(5)]
    jobs = [Job(out.name, work.where, (out,), output=out) for out in outs]
    places = [Place("7", 1), Place("9", 2)]
    run_jobs(jobs, tmp_path / "log", Progress.silent(), places)
    seen = [out.read_text().split() for out in outs]
    assert {(device, threads) for device, threads, *_ in seen} == {("7", "1"), ("9", "2")}
    spans = [(float(begin), float(end)) for *_, begin, end in seen]
    for begin, _ in spans:
        assert sum(b <= begin < e for b, e in spans) <= 2
