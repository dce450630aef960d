"""Stage 2: one readable loop from a cache to a student. Batches → forward → loss → backward → step.

The loop owns all side effects: checkpoints, metrics, evaluation. Every random draw depends only on
(seed, step, process), so on a CPU a resumed run is bit-identical to an uninterrupted one. Under
torchrun each process runs this same loop on its share of every batch.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rekindle.data.cache import Cache
from rekindle.data.targets.reading.extent import Extent, settle_extent
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import ParallelStudent, World, build_in_shards
from rekindle.train.evaluate import Best, better_of, evaluate
from rekindle.train.export.finished import make_model_directory
from rekindle.train.export.provenance import Provenance
from rekindle.train.growth_report import measure_growth, save_growth, saved_growth
from rekindle.train.interrupts import Interrupted, Stop, reporting_interrupts
from rekindle.train.measures import EVALUATION_VERSION, UNSEEN
from rekindle.train.model.unfinished import RUN_FILE, SUMMARY_FILE
from rekindle.train.objective.selection import StepPlan
from rekindle.train.optimizer import configured_adamw
from rekindle.train.order.length import in_steps
from rekindle.train.precision import autocast, warn_of_slow_precision
from rekindle.train.prepare import prepare, student_masks
from rekindle.train.record.checkpoint import (
    checkpoint_folder,
    describe_kept,
    describe_left,
    restore,
    save_checkpoint,
)
from rekindle.train.record.checkpoint_schedule import CheckpointSchedule
from rekindle.train.record.coverage import Coverage
from rekindle.train.record.disk_room import DiskRoom, folder_size
from rekindle.train.record.identity import (
    SECTIONS,
    STUDENT_FILES,
    begin_record,
    check_corpus_not_grown,
    check_run,
    evaluation_version_of_run,
    is_finished,
    keys_that_may_change,
    recorded_extent,
    steps_of_run,
    student_files,
)
from rekindle.train.record.lineage import LINEAGE, lineage_of_run
from rekindle.train.record.run_folder import open_folder, reading_record
from rekindle.train.record.run_log import RunLog, read_metrics
from rekindle.train.record.sharded import check_shared_folder
from rekindle.train.record.stored_run import upload_new_run
from rekindle.train.record.summary import read_summary
from rekindle.train.record.trackers import check_trackers
from rekindle.train.record.watch import recent_losses
from rekindle.train.record.working_copy import store_of
from rekindle.train.running_out import memory_advice, report_shortage
from rekindle.train.steps.take import Judge, Training, take_step

EVERYTHING = Extent()  # no limits are asked for
log = logging.getLogger("rekindle")

Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    directory: Path
    steps: int
    seconds: float
    evaluation: dict[str, float]
    coverage: dict[str, int]
    best: Best | None = None  # the best evaluation, if the run looks for one
    was_finished: bool = False  # before this call, which then did nothing

    def describe_best(self) -> str:
        """Return which step the model is from, and where the best one is."""
        if self.best is None:
            return f"the model is that of step {self.steps}, the last; no best one was looked for"
        step, name, value = self.best["step"], self.best["name"], self.best["value"]
        best = f"the best {name} {UNSEEN} was {value:.4f} at step {step}"
        if step == self.steps:
            return f"{best}, the last: that is the model"
        checkpoint = self.best_elsewhere
        return f"{best} ({checkpoint}); the model is that of step {self.steps}, the last"

    @property
    def best_elsewhere(self) -> Path | None:
        """Return the checkpoint with the best held-out value, unless it is that of the
        last step.
        """
        if self.best is None or self.best["step"] == self.steps:
            return None
        return checkpoint_folder(self.directory, self.best["step"])

    @classmethod
    def of(cls, run: Path) -> "TrainResult":
        """Return the result recorded by the finished run in ``run``."""
        summary = read_summary(run, "remove it and resume: it is made again")
        with reading_record(run / SUMMARY_FILE):
            results = {
                name: summary[name] for name in ("steps", "seconds", "evaluation", "coverage")
            }
        return cls(run, **results, best=summary.get("best"), was_finished=True)


def train_student(
    cache: Cache,
    student_config: StudentConfig,
    config: TrainConfig,
    out: Path,
    *,
    masked_view: str | None = None,
    asked: Extent = EVERYTHING,
    resume: bool = False,
    report: Report = lambda step, values: None,
    world: World | None = None,
) -> TrainResult:
    """Train a student from ``cache`` into ``out``, which then is a Hugging Face model directory.

    ``world``: the processes that train together (``distributed.join_world``). ``asked``: how much
    of the cache to read; what it leaves open is what the run read before, or else what the cache
    has now, and is recorded. A finished run is left as it is.

    Raises InputError if the configuration asks for what the cache lacks or the loss explodes,
    ResumableError if memory or disk run out, CheckpointError if ``resume`` meets a run of another
    configuration or one without a sound checkpoint. Interrupted by Ctrl-C or SIGTERM: during a
    step, after it is finished and its checkpoint written.
    """
    world = world or World.alone()
    steps_before = world.decide(lambda: steps_of_run(out) if resume else None)
    world.decide(lambda: check_corpus_not_grown(out, cache.corpus) if resume else None)
    config = world.agree(lambda: in_steps(cache, config, steps_before))
    advice, settings = memory_advice(config, world.size, world.device.type)
    with (
        reporting_interrupts(lambda: describe_left(out)),
        report_shortage(out, lambda: describe_kept(out), advice, settings),
    ):
        cache = _limit_cache(
            cache, student_config, masked_view, asked, out if resume else None, world
        )
        return _begin(cache, student_config, config, out, masked_view, resume, report, world)


def _begin(
    cache: Cache,
    student_config: StudentConfig,
    config: TrainConfig,
    out: Path,
    masked_view: str | None,
    resume: bool,
    report: Report,
    world: World,
) -> TrainResult:
    """Prepare a run and do what is left of it."""
    started = time.monotonic()
    world.decide(lambda: check_trackers(config.report_to))
    evaluation_version = world.decide(
        lambda: evaluation_version_of_run(out) if resume else EVALUATION_VERSION
    )
    mesh = world.mesh(config.parallel)

    run_settings = (cache, student_config, config, masked_view, world, evaluation_version)
    build = partial(prepare, *run_settings, is_continued=resume)
    grows = student_config.grow is not None
    if mesh is None:
        prepared, in_shards = world.agree(lambda: build(False)), None
    else:
        prepared, in_shards = build_in_shards(build, world, mesh, grows)
    files = world.decide(lambda: {STUDENT_FILES: student_files(student_config)})
    prepared.about.update(files)
    has_load_balancing = prepared.objective.load_balancing_weight > 0
    free = keys_that_may_change(student_config, config, has_load_balancing)

    def inspect() -> bool:
        return check_run(out, prepared.about, resume, free)

    if world.decide(lambda: resume and is_finished(out) and inspect()):
        return world.decide(lambda: TrainResult.of(out))
    with ExitStack() as resources:  # the main process holds the folder until the run is finished
        if has_load_balancing:  # advice for other students would lead to a refusal
            advice, settings = memory_advice(
                config, world.size, world.device.type, has_load_balancing
            )
            resources.enter_context(
                report_shortage(out, lambda: describe_kept(out), advice, settings)
            )
        resuming = world.decide(lambda: resources.enter_context(open_folder(out, inspect)))
        # A run in a store is copied to each node, to continue from.
        is_uploaded = world.decide(lambda: store_of(out) is not None)
        if config.parallel == "fsdp" or (resuming and not is_uploaded):
            check_shared_folder(out, world)
        if world.main:
            warn_of_slow_precision({"train.precision: {}": config.precision}, world.device.type)
        # Measured before sharding and training; done again if an earlier process died before that.
        growth = world.decide(lambda: measure_growth(out, prepared))
        student = in_shards or ParallelStudent(prepared.student, world, mesh)
        optimizer = configured_adamw(student.student.parameters(), config)
        made_by = world.decide(lambda: lineage_of_run(prepared.about, cache))
        lineage = [run.model_dump(mode="json") for run in made_by]
        training = Training(out, cache, config, student, optimizer, prepared, lineage)
        world.decide(lambda: begin_record(out, prepared.about))
        world.decide(lambda: save_growth(out, growth))
        world.decide(lambda: upload_new_run(out, resuming))
        state = restore(out, student, optimizer, config.keep_checkpoints) if resuming else {}
        return _train(training, state, started, report)


def _limit_cache(
    cache: Cache,
    student: StudentConfig,
    masked_view: str | None,
    requested: Extent,
    run: Path | None,
    world: World,
) -> Cache:
    """Return the part of the cache that the run reads; ``run``: the directory of one to
    continue.
    """

    def settle() -> Extent:
        recorded = EVERYTHING if run is None else recorded_extent(run)
        view = student_masks(cache, student, masked_view)
        extent = settle_extent(requested, cache.teachers.values(), view, recorded)
        if run is not None and recorded == EVERYTHING and (run / RUN_FILE).is_file():
            read_k = {name: targets.k for name, targets in extent.targets.items()}
            log.info(
                "%s was begun by an earlier version, which did not record how much of the cache "
                "it read; assumed: replicas %s, k %s",
                *(run, extent.replicas, read_k),
            )
        return extent

    # The main process decides: the cache may grow while the others look.
    return cache.within(world.decide(settle))


def _train(
    training: Training, state: Mapping[str, Any], started: float, report: Report
) -> TrainResult:
    """Take the remaining steps, and make the run's directory a model directory."""
    out, config, world = training.out, training.config, training.student.world
    student, prepared = training.student, training.prepared
    objective, stream = prepared.objective, prepared.stream
    first, earlier_seconds = state.get("step", 0), state.get("seconds", 0.0)
    coverage, best = Coverage(state.get("coverage")), state.get("best")
    replay = stream.order.replay
    if first < config.steps:
        replay.restore(state.get("order"))
    recent_losses_before = world.decide(
        lambda: recent_losses(read_metrics(out), first, lambda done: objective.plan(done).weights)
    )
    judge = Judge(training, recent_losses_before)
    evaluation: dict[str, float] = {}
    sections = {name: prepared.about[name] for name in SECTIONS}
    student.student.train()
    # On an error or interrupt both must end at once: no thread still reading, no open file.
    with (
        RunLog(out, first, not world.main, config.report_to, sections) as run_log,
        closing(stream.steps(first, config.steps)) as steps,
        Stop.heard() as stop,
    ):

        def log_steps(finished: Iterable[tuple[int, dict[str, float]]]) -> None:
            for steps_done, values in finished:
                run_log.write("train", steps_done, values)
                if world.main:
                    report(steps_done, values)

        began, waited_before = time.monotonic(), 0.0
        schedule = CheckpointSchedule(config.checkpoint_every, world, stop)
        room = DiskRoom(out, "checkpoint")
        for step, ready in steps:
            if step == first:  # reading before the first step cannot overlap with anything
                began, waited_before = time.monotonic(), stream.waited
                stop.listen()
            pending = take_step(training, ready, judge)
            coverage.count(ready.batch, objective.task, ready.plan)
            replay.count(ready.batch)
            done = step + 1
            waited = stream.waited - waited_before
            pending.other_values["data_wait"] = waited / max(time.monotonic() - began, 1e-9)
            pending.other_values["seconds"] = earlier_seconds + time.monotonic() - started
            log_steps(judge.finished_steps())
            last = done == config.steps
            if last or done % config.evaluate_every == 0:
                log_steps(judge.finished_steps(everything=True))
                evaluation = _evaluate(training, ready.plan)
                replay.learn(done, evaluation, world.sum)
                run_log.write("evaluate", done, evaluation)
                best = better_of(evaluation, config.keep_best, done, best)
            is_best = best is not None and best["step"] == done
            due, ending = schedule.after(done)
            if last or due or is_best or ending:
                # nothing is saved of a step that may not count
                log_steps(judge.finished_steps(everything=True))
                run_log.sync()
                spent = {"seconds": earlier_seconds + time.monotonic() - started}
                _save(
                    training,
                    done,
                    spent | {"coverage": coverage.sum_over_processes(world.sum), "best": best},
                )
                schedule.saved()
                if world.main and not last:
                    room.after(folder_size(checkpoint_folder(out, done)))
            if ending or (last and schedule.after(done)[1]):  # the signal came during that write
                raise Interrupted(f" at step {done:,}; a checkpoint of it is written")
    if first == config.steps:
        evaluation = _evaluate(training, objective.plan(first - 1))
    seconds = earlier_seconds + time.monotonic() - started
    result = TrainResult(
        out, config.steps, seconds, evaluation, coverage.sum_over_processes(world.sum), best
    )
    left_out = ("directory", "was_finished")
    summary = {name: value for name, value in vars(result).items() if name not in left_out}
    about = {"made_by": prepared.about, LINEAGE: training.lineage}
    make_model_directory(
        *(out, student, about, prepared.tokenizer, result.best_elsewhere),
        summary | world.decide(lambda: saved_growth(out)),
        Provenance.of(prepared.about, training.cache, evaluation, objective.trains_lm_head),
    )
    return result


def _save(training: Training, done: int, state: dict[str, object]) -> None:
    """Write the checkpoint after ``done`` steps; every process takes part."""
    description, replay = training.prepared.about, training.prepared.stream.order.replay
    replay_state = replay.state(training.student.world.sum)
    whole_state = description | state | {"order": replay_state, LINEAGE: training.lineage}
    student, keep = training.student, training.config.keep_checkpoints
    tokenizer = training.prepared.tokenizer
    save_checkpoint(training.out, done, student, training.optimizer, whole_state, keep, tokenizer)


def _evaluate(training: Training, plan: StepPlan) -> dict[str, float]:
    """Evaluate after the step of ``plan``, each process its share; all get the same values."""
    data = training.prepared.held_out.at(plan)
    student, world = training.student, training.student.world
    with autocast(training.config.precision, world.device):
        return evaluate(student.student, data, world.device, student.run, world)
