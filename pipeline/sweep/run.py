"""Several students from one cache, one after another or one per device.

    DIR/sweep.json                   the definition: every student's values and configuration
    DIR/temperature=2,seed=1/        a run as ``pipeline train-student`` leaves it

Every student is held against the cache before the first one is trained.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rekindle.data.cache import Cache
from rekindle.data.errors import CheckpointError, InputError, RekindleError, naming
from rekindle.data.storage.atomic import write_json
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.processes.devices import places_for, visible_devices
from rekindle.pipeline.processes.jobs import Job, Report, StepReports, run_jobs
from rekindle.pipeline.processes.worker import WorkerKilled
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.sweep.grid import SWEPT_SECTIONS, SweepRun
from rekindle.train.record.run_folder import check_same, goes_on, open_folder, read_record, reading

log = logging.getLogger("rekindle")

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Failure:
    """A student that could not be trained, and the exit code that its run alone would have had."""

    name: str
    message: str
    exit_code: int

    @classmethod
    def of(cls, name: str, error: Exception) -> "Failure":
        """The failure that ``error`` means; what only a bug raises is logged with its traceback."""
        if isinstance(error, RekindleError):
            return cls(name, str(error), error.exit_code)
        if isinstance(error, OSError):
            return cls(name, str(error), InputError.exit_code)
        log.error("%s failed", name, exc_info=error)
        return cls(name, f"{type(error).__name__}: {error}", RekindleError.exit_code)


class SweepError(RekindleError):
    """Some students failed; the others are finished. Ends with the first one's exit code."""

    def __init__(self, failures: Sequence[Failure], count: int):
        told = "; ".join(f"{failure.name}: {failure.message.rstrip('.')}" for failure in failures)
        super().__init__(
            f"{len(failures)} of {count} students failed. {told}. The others are finished; "
            "--resume tries the failed ones again"
        )
        self.exit_code = failures[0].exit_code


# --- the directory --------------------------------------------------------------------------------


def read_sweep(directory: Path) -> dict[str, Any] | None:
    """The definition of the sweep in ``directory``; None where there is none.

    Raises CheckpointError when it is damaged.
    """
    path, advice = directory / SWEEP_FILE, "start a new sweep in another --out"
    if (found := read_record(path, advice)) is None:
        return None
    with reading(path, advice):
        sound = all({"name", "values", *SWEPT_SECTIONS} <= run.keys() for run in found["runs"])
        if not sound or not isinstance(found["corpus"], str):
            raise ValueError("it has not the keys of a sweep")
    return found


def _look(out: Path, runs: Sequence[SweepRun], corpus: str, resume: bool) -> None:
    """Check that ``out`` is free, or holds the sweep to go on with. It may have got more students.

    Raises InputError when the directory is in use, CheckpointError when the sweep in it is another.
    """
    if not goes_on(out, SWEEP_FILE, "sweep", resume):
        return
    recorded = read_sweep(out) or {}
    rule = "Resume it with its own definition (more values may be added), or give another --out"
    if recorded["corpus"] != corpus:
        raise CheckpointError(f"{out} is a sweep over the corpus of another cache. {rule}")
    ours = {run.name: run.config.model_dump(mode="json", by_alias=True) for run in runs}
    for run in recorded["runs"]:
        mine = ours.get(run["name"])
        if mine is None:
            raise CheckpointError(
                f"{out} is another sweep: its student {run['name']} is none of this one's "
                f"({', '.join(ours)}). {rule}"
            )
        # What only the record has is of an older version.
        before = {s: {k: run[s].get(k) for k in mine[s]} for s in SWEPT_SECTIONS}
        check_same(out, before, {s: mine[s] for s in SWEPT_SECTIONS}, rule)


# --- training -------------------------------------------------------------------------------------


def run_sweep(
    runs: Sequence[SweepRun],
    out: Path,
    *,
    resume: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Failure]:
    """Train every student of ``plan_sweep`` into a folder of ``out``; returns those that failed.

    ``workers`` students at a time (None: one per CUDA device, or one), each in a process of its own
    where that is more than one. A failed student stops no other. ``resume`` leaves finished runs as
    they are and goes on with interrupted ones.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--sweep trains each student in one process; start it without torchrun, and with "
            "--workers for several students at a time"
        )
    progress = progress or Progress.silent()
    corpus = _check_cache(runs)
    with open_folder(out, lambda: _look(out, runs, corpus, resume)):
        write_json(out / SWEEP_FILE, {"corpus": corpus, "runs": [run.record for run in runs]})
        return _train_missing(runs, out, workers, progress)


def _train_missing(
    runs: Sequence[SweepRun], out: Path, workers: int | None, progress: Progress
) -> list[Failure]:
    missing = [run for run in runs if not _is_finished(out / run.name)]
    if len(missing) < len(runs):
        log.info("%s: %d of %d students are finished", out, len(runs) - len(missing), len(runs))
    if not missing:
        return []
    workers = min(workers or max(1, len(visible_devices())), len(missing))
    if workers == 1:
        found = [train_one(run, out, progress) for run in missing]
    else:
        found = _train_in_processes(missing, out, workers, progress)
    return [failure for failure in found if failure is not None]


def _train_in_processes(
    runs: Sequence[SweepRun], out: Path, workers: int, progress: Progress
) -> list[Failure | None]:
    """What ``train_one`` returns for each of ``runs``, each in a process of its own."""
    jobs = [
        Job(str(out / run.name), _train_one, (run, out), None, steps=run.config.train.steps)
        for run in runs
    ]
    ended = run_jobs(jobs, None, progress, places_for(workers), failed=_failed)
    return [cast(Failure | None, ended[job.name]) for job in jobs]


def _train_one(run: SweepRun, out: Path, report: Report) -> Failure | None:
    return train_one(run, out, StepReports(report))


def _failed(job: Job, error: Exception) -> Failure:
    """The failure of a student whose process could not say what went wrong."""
    if isinstance(error, WorkerKilled):
        error = InputError(f"{error}. If memory is short, give fewer --workers")
    return Failure.of(Path(job.name).name, error)


def train_one(run: SweepRun, out: Path, progress: Progress) -> Failure | None:
    """Train one student in this process, or go on with it. Returns why it failed, if it did."""
    from rekindle.pipeline.train_student import train_from_config

    try:
        train_from_config(run.config, out / run.name, resume=True, progress=progress)
    except Exception as error:
        log.warning("%s failed; its message comes at the end", out / run.name)
        return Failure.of(run.name, error)
    return None


def _check_cache(runs: Sequence[SweepRun]) -> str:
    """That the cache has what every student needs; returns its corpus's fingerprint."""
    from rekindle.pipeline.train_student import student_view
    from rekindle.train.prepare import check_tokenizer, prepare_objective

    cache = Cache.open(runs[0].config.cache.path)
    for run in runs:
        with naming(f"student {run.name}"):
            view = student_view(cache, run.config)
            prepare_objective(cache, run.student, run.config.train, view)
    make_missing(*(run.student for run in runs))
    one_of_each = {run.student.model: run for run in reversed(runs)}  # most share a tokenizer
    for run in one_of_each.values():
        with naming(f"student {run.name}"):
            check_tokenizer(cache, run.student)
    return cache.corpus.fingerprint


def _is_finished(directory: Path) -> bool:
    """A run's configuration is the last file that is written into its directory."""
    return all((directory / name).is_file() for name in ("summary.json", "run.yaml"))
