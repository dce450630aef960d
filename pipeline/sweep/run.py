"""Train several students from one cache, one after another or one per device.

  DIR/sweep.json                   the definition: every student's values and configuration
  DIR/temperature=2,seed=1/        a run as ``pipeline train-student`` leaves it

Every student is checked against the cache before the first one is trained.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rekindle.data.cache import Cache
from rekindle.data.errors import CheckpointError, InputError, RekindleError, naming
from rekindle.data.former import with_recorded_defaults
from rekindle.data.storage.atomic import write_json
from rekindle.data.targets.reading.extent import Extent, settle_extent
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.processes.jobs import Job, Report, StepReports, run_jobs
from rekindle.pipeline.processes.worker import WorkerKilled, places_for, visible_devices
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.pipeline.several_runs import (
    RUN_FILE,
    SECTIONS,
    SWEEP_FILE,
    check_same_runs,
    is_finished,
    read_runs,
)
from rekindle.pipeline.sweep.grid import SweepRun
from rekindle.train.interrupts import Interrupted
from rekindle.train.launch import current_launch
from rekindle.train.record.run_folder import is_continued, open_folder
from rekindle.train.record.stored_run import upload_definition

log = logging.getLogger("rekindle")


class SweepError(RekindleError):
    """Some students failed; the others are finished. The exit code is that of the first failed
    student's run alone.
    """

    def __init__(self, failures: Mapping[str, Exception], count: int):
        messages = [f"{name}: {str(error).rstrip('.')}" for name, error in failures.items()]
        was_killed = any(isinstance(error, WorkerKilled) for error in failures.values())
        super().__init__(
            f"{len(failures)} of {count} students failed. {'; '.join(messages)}. The others are "
            "finished; --resume tries the failed ones again"
            + (" (if memory is short, give fewer --workers)" if was_killed else "")
        )
        first = next(iter(failures.values()))
        default = InputError.exit_code if isinstance(first, OSError) else RekindleError.exit_code
        self.exit_code = getattr(first, "exit_code", default)


# --- the directory --------------------------------------------------------------------------------


def _check_folder(out: Path, runs: Sequence[SweepRun], corpus: str, resume: bool) -> None:
    """Check that ``out`` is free, or holds the sweep to continue, perhaps with added students.

    Raise InputError if the directory is in use, CheckpointError if it holds another sweep.
    """
    if not is_continued(out, SWEEP_FILE, "sweep", resume):
        return
    recorded = read_runs(out, SWEEP_FILE) or {}
    rule = "Resume it with its own definition (more values may be added), or give another --out"
    if any(run["corpus"] != corpus for run in recorded.values()):
        raise CheckpointError(f"{out} is a sweep over the corpus of another cache. {rule}")
    sections = set(SECTIONS)
    now = {r.name: r.config.model_dump(mode="json", by_alias=True, include=sections) for r in runs}
    unknown = f"is another sweep: its student {{name}} is not in this one ({', '.join(now)})"
    check_same_runs(out, recorded, now, unknown, rule, {run.name: run.config for run in runs})


# --- training -------------------------------------------------------------------------------------


def run_sweep(
    runs: Sequence[SweepRun],
    out: Path,
    *,
    resume: bool = False,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Exception]:
    """Train every student of ``plan_sweep`` into a folder of ``out``. Return the errors of failed
    students by name.

    ``workers`` students run at a time (None: one per CUDA device, or one), each in its own process
    if more than one. A failed student does not stop the others. ``resume`` leaves finished runs
    alone and continues interrupted ones.
    """
    if current_launch().world_size > 1:
        raise InputError(
            "--sweep trains each student in one process; start it without torchrun, and with "
            "--workers for several students at a time"
        )
    if resume and (begun := read_runs(out, SWEEP_FILE)) is not None:
        first = next(iter(begun.values()), {})  # new students get the defaults of those begun
        runs = [
            replace(r, config=with_recorded_defaults(r.config, begun.get(r.name, first)))
            for r in runs
        ]
    corpus = _check_cache(runs, out)
    with open_folder(out, lambda: _check_folder(out, runs, corpus, resume)):
        write_json(out / SWEEP_FILE, {"corpus": corpus, "runs": [run.record for run in runs]})
        upload_definition(out / SWEEP_FILE, resume)
        return _train_missing(runs, out, workers, progress)


def _train_missing(
    runs: Sequence[SweepRun], out: Path, workers: int | None, progress: Progress
) -> dict[str, Exception]:
    missing = [run for run in runs if not is_finished(out / run.name, model=False)]
    if len(missing) < len(runs):
        log.info("%s: %d of %d students are finished", out, len(runs) - len(missing), len(runs))
    workers = min(workers or max(1, len(visible_devices())), len(missing))
    results: Mapping[str, object]
    with _counting_finished(runs, out):
        if workers <= 1:
            results = {run.name: _train_here(run, out, progress) for run in missing}
        else:
            results = _train_side_by_side(missing, out, workers, progress)
    return {name: error for name, error in results.items() if isinstance(error, Exception)}


def _train_here(run: SweepRun, out: Path, progress: Progress) -> Exception | None:
    try:
        return train_one(run, out, progress)
    except Interrupted as error:
        raise Interrupted(
            f"; {out / run.name}: interrupted{error.message}", error.is_saved
        ) from None


def _train_side_by_side(
    runs: Sequence[SweepRun], out: Path, workers: int, progress: Progress
) -> dict[str, object]:
    jobs = []
    for run in runs:
        name, steps = str(out / run.name), run.config.train.steps or None
        jobs.append(Job(name, _train, (run, out), output=None, steps=steps))
    results = run_jobs(jobs, None, progress, places_for(workers), keep_going=True)
    return {run.name: results[job.name] for run, job in zip(runs, jobs, strict=True)}


@contextmanager
def _counting_finished(runs: Sequence[SweepRun], out: Path) -> Iterator[None]:
    """Add to an interrupt how many students are finished."""
    try:
        yield
    except Interrupted as error:
        finished = sum(is_finished(out / run.name, model=False) for run in runs)
        message = f"; {finished} of {len(runs)} students are finished{error.message}"
        raise Interrupted(message, is_saved=error.is_saved or finished > 0) from None


def _train(run: SweepRun, out: Path, report: Report) -> Exception | None:
    """Run ``train_one`` as a job in its own process."""
    return train_one(run, out, StepReports(report))


def common_extent(out: Path) -> Extent:
    """Return how much of the cache the begun students read; all of them read the same amount."""
    from rekindle.train.record.identity import recorded_extent

    extent = Extent()
    for path in sorted(out.glob(f"*/{RUN_FILE}")):
        extent = extent.with_defaults(recorded_extent(path.parent))
    return extent


def train_one(run: SweepRun, out: Path, progress: Progress) -> Exception | None:
    """Train one student in this process, or continue it. Return its error, if it failed; a bug,
    which may not be picklable, becomes a RekindleError with its name.
    """
    from rekindle.pipeline.train_student import train_from_config

    folder = out / run.name
    try:
        began = common_extent(out)
        train_from_config(run.config, folder, resume=True, progress=progress, began=began)
    except Exception as error:
        is_bug = not isinstance(error, RekindleError | OSError)
        log.warning("%s failed; its message comes at the end", folder, exc_info=is_bug)
        return RekindleError(f"{type(error).__name__}: {error}") if is_bug else error
    return None


def _check_cache(runs: Sequence[SweepRun], out: Path) -> str:
    """Check that the cache has what every student needs. Return its corpus's fingerprint."""
    from rekindle.pipeline.train_student import requested_extent, student_view
    from rekindle.train.prepare import load_checked_tokenizer, prepare_objective
    from rekindle.train.student import check_student

    cache = Cache.open(runs[0].config.cache.path)
    students = {run.name: run.config.needed_student() for run in runs}
    for run in runs:
        with naming(f"student {run.name}"):
            view = student_view(cache, run.config)
            requested = requested_extent(run.config).with_defaults(common_extent(out))
            masks = None if view is None else cache.masked_view(view)
            extent = settle_extent(requested, cache.teachers.values(), masks, Extent())
            part = cache.within(extent)
            prepare_objective(part, students[run.name], run.config.train, view)
    make_missing(*students.values())
    unique = {s.model_dump_json(): name for name, s in reversed(students.items())}
    for name in unique.values():  # most students have the same section: each is checked once
        with naming(f"student {name}"):
            check_student(students[name])
            load_checked_tokenizer(cache.corpus, students[name])
    return cache.corpus.fingerprint
