"""Stage 2: one readable loop from a cache to a student. Batches → forward → loss → backward → step.

The loop owns all side effects: checkpoints, metrics, evaluation. Every random draw depends on
(seed, step, process) alone, so a resumed run is bit-equal to an uninterrupted one on a CPU. Under
torchrun each process runs this same loop on its share of every batch.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle.data.batch import Batch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import new_files, write_json
from rekindle.data.targets.reading.extent import Extent, settle_extent
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.distributed import ParallelStudent, World
from rekindle.train.evaluate import Best, best_of, evaluate
from rekindle.train.export.card import CARD_FILE, student_card
from rekindle.train.growth_report import measure_growth, save_growth, saved_growth
from rekindle.train.interrupts import Interrupted, Stop, telling
from rekindle.train.measures import MEASURE, UNSEEN
from rekindle.train.model.unfinished import RUN_FILE, SUMMARY_FILE
from rekindle.train.objective.pulls import with_norms
from rekindle.train.objective.ranking import with_centres
from rekindle.train.objective.selection import StepPlan
from rekindle.train.optimizer import configured_adamw, set_learning_rate
from rekindle.train.order.length import in_steps
from rekindle.train.precision import autocast, chosen_precision, tell_slow
from rekindle.train.prepare import Prepared, prepare, student_masks
from rekindle.train.record.checkpoint import (
    checkpoint_folder,
    gather_weights,
    kept_of,
    left_by_interrupt,
    restore,
    save_checkpoint,
)
from rekindle.train.record.coverage import Coverage
from rekindle.train.record.identity import (
    STUDENT_FILES,
    begin_record,
    check_run,
    is_finished,
    keys_that_may_change,
    measure_of_run,
    read_summary,
    recorded_extent,
    refuse_grown,
    steps_of_run,
    student_files,
)
from rekindle.train.record.lineage import LINEAGE, lineage_of_run
from rekindle.train.record.occasions import Occasions
from rekindle.train.record.run_folder import open_folder, reading
from rekindle.train.record.run_log import RunLog, read_metrics
from rekindle.train.record.watch import LossWatch, recent_losses
from rekindle.train.running_out import less_memory, running_out

EVERYTHING = Extent()  # nothing is asked for
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
    best: Best | None = None  # the best evaluation, where one is looked for
    was_finished: bool = False  # before this call, which then did nothing

    def told_of_best(self) -> str:
        """Say which model this is, and where the best one lies."""
        if self.best is None:
            return f"the model is that of step {self.steps}, the last; no best one was looked for"
        step, name, value = self.best["step"], self.best["name"], self.best["value"]
        best = f"the best {name} {UNSEEN} was {value:.4f} at step {step}"
        if step == self.steps:
            return f"{best}, the last: that is the model"
        where = self.best_elsewhere
        return f"{best} ({where}); the model is that of step {self.steps}, the last"

    @property
    def best_elsewhere(self) -> Path | None:
        """The checkpoint with the best held-out value, where it is not that of the last step."""
        if self.best is None or self.best["step"] == self.steps:
            return None
        return checkpoint_folder(self.directory, self.best["step"])

    @classmethod
    def of(cls, run: Path) -> "TrainResult":
        """What the finished run in ``run`` says of itself."""
        found = read_summary(run)
        with reading(run / SUMMARY_FILE):
            known = {name: found[name] for name in ("steps", "seconds", "evaluation", "coverage")}
        return cls(run, **known, best=found.get("best"), was_finished=True)


@dataclass(frozen=True)
class Training:
    """Everything that a step of a run needs."""

    out: Path
    cache: Cache
    config: TrainConfig
    student: ParallelStudent
    optimizer: torch.optim.Optimizer
    prepared: Prepared
    lineage: list[dict[str, object]]  # of the student, as its files have it


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
    """Train a student from ``cache`` into ``out``, which afterwards is a Hugging Face model
    directory. ``world``: the processes that do so together (``distributed.join_world``). ``asked``:
    how much of the cache is read; what it does not say is what the run read before, or else what
    the cache has now, and is recorded. A run that is finished is left as it is.

    Raises InputError when the configuration asks for what the cache does not have or the loss
    explodes, ResumableError where memory or disk run out, CheckpointError when ``resume`` meets a
    run of another configuration or one without a sound checkpoint. Interrupted by Ctrl-C or
    SIGTERM; once a step is begun, when that is done and a checkpoint of it written.
    """
    world = world or World.alone()
    begun = world.decide(lambda: steps_of_run(out) if resume else None)
    world.decide(lambda: refuse_grown(out, cache.corpus) if resume else None)
    config = world.agree(lambda: in_steps(cache, config, begun))
    precision = chosen_precision(config.precision, world.device.type)
    advice, settings = less_memory(config, world.size, precision)
    with (
        telling(lambda: left_by_interrupt(out)),
        running_out(out, lambda: kept_of(out), advice, settings),
    ):
        cache = _within(cache, student_config, masked_view, asked, out if resume else None, world)
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
    """Prepare a run and do it, or what is left of it."""
    started = time.monotonic()
    measure = world.decide(lambda: measure_of_run(out) if resume else MEASURE)
    prepared = world.agree(
        lambda: prepare(cache, student_config, config, masked_view, world, measure)
    )
    files = world.decide(lambda: {STUDENT_FILES: student_files(student_config)})
    prepared.about.update(files)
    balanced = prepared.objective.balance > 0
    free = keys_that_may_change(student_config, config, balanced)

    def look() -> bool:
        return check_run(out, prepared.about, resume, free)

    if world.decide(lambda: resume and is_finished(out) and look()):
        return world.decide(lambda: TrainResult.of(out))
    with ExitStack() as held:  # by the main process: the folder, until the run is finished
        if balanced:  # what is said of others would lead to a refusal
            precision = chosen_precision(config.precision, world.device.type)
            advice, settings = less_memory(config, world.size, precision, balanced)
            held.enter_context(running_out(out, lambda: kept_of(out), advice, settings))
        resuming = world.decide(lambda: held.enter_context(open_folder(out, look)))
        if world.main:
            tell_slow({"train.precision: {}": config.precision}, world.device.type)
        # Measured before sharding and training; again where an earlier process died before it.
        growth = world.decide(lambda: measure_growth(out, prepared, world.device))
        student = ParallelStudent(prepared.student, world, config.parallel)
        optimizer = configured_adamw(student.student.parameters(), config)
        made_by = world.decide(lambda: lineage_of_run(prepared.about, cache))
        lineage = [run.model_dump(mode="json") for run in made_by]
        training = Training(out, cache, config, student, optimizer, prepared, lineage)
        world.decide(lambda: begin_record(out, prepared.about))
        world.decide(lambda: save_growth(out, growth))
        state = restore(out, student, optimizer, config.keep_checkpoints) if resuming else {}
        return _train(training, state, started, report)


def _within(
    cache: Cache,
    student: StudentConfig,
    masked_view: str | None,
    asked: Extent,
    run: Path | None,
    world: World,
) -> Cache:
    """The cache as far as the run reads it; ``run``: the directory of one that may go on."""

    def settled() -> Extent:
        before = EVERYTHING if run is None else recorded_extent(run)
        view = student_masks(cache, student, masked_view)
        found = settle_extent(asked, cache.teachers.values(), view, before)
        if run is not None and before == EVERYTHING and (run / RUN_FILE).is_file():
            read = {name: kept.k for name, kept in found.targets.items()}
            log.info(
                "%s was begun by an earlier version, which did not record how much of the cache it "
                "read; taken for it: replicas %s, k %s",
                *(run, found.replicas, read),
            )
        return found

    # The main process says it: the cache may grow while they look.
    return cache.within(world.decide(settled))


def _train(
    training: Training, state: Mapping[str, Any], started: float, report: Report
) -> TrainResult:
    """Take the steps that are left, and make the run's directory a model directory."""
    out, config, world = training.out, training.config, training.student.world
    student, prepared = training.student, training.prepared
    objective, stream = prepared.objective, prepared.stream
    first, earlier = state.get("step", 0), state.get("seconds", 0.0)
    coverage, best = Coverage(state.get("coverage")), state.get("best")
    replay = stream.order.replay
    if first < config.steps:
        replay.restore(state.get("order"))
    recent = world.decide(
        lambda: recent_losses(read_metrics(out), first, lambda done: objective.plan(done).weights)
    )
    watch = LossWatch(config.explosion_factor, recent)
    evaluation: dict[str, float] = {}
    student.student.train()
    # Left by an error or an interrupt, both must end at once: no thread reads on, no file is open.
    with (
        closing(RunLog(out, first, silent=not world.main)) as run_log,
        closing(stream.steps(first, config.steps)) as steps,
        Stop.heard() as stop,
    ):
        began, waited_before = time.monotonic(), 0.0
        occasions = Occasions(config.checkpoint_every, world, stop)
        for step, read in steps:
            if step == first:  # what is read before the first step has nothing to hide behind
                began, waited_before = time.monotonic(), stream.waited
                stop.listen()
            plan = objective.plan(step)
            batch = objective.select(read, plan)
            values = _step(training, batch, plan, watch)
            coverage.count(batch, objective.task, plan)
            replay.count(batch)
            done = step + 1
            waited = stream.waited - waited_before
            values["data_wait"] = waited / max(time.monotonic() - began, 1e-9)
            values["seconds"] = earlier + time.monotonic() - started
            run_log.write("train", done, values)
            if world.main:
                report(done, values)
            last = done == config.steps
            if last or done % config.evaluate_every == 0:
                evaluation = _evaluate(training, plan)
                replay.learn(done, evaluation, world.sum)
                run_log.write("evaluate", done, evaluation)
                best = best_of(evaluation, config.keep_best, done, best)
            is_best = best is not None and best["step"] == done
            due, ending = occasions.after(done)
            if last or due or is_best or ending:
                run_log.sync()
                taken = {"seconds": earlier + time.monotonic() - started}
                _save(training, done, taken | {"coverage": coverage.over(world.sum), "best": best})
                occasions.saved()
            if ending or (last and occasions.after(done)[1]):  # told while that was written
                raise Interrupted(f" at step {done:,}; a checkpoint of it is written")
    if first == config.steps:
        evaluation = _evaluate(training, objective.plan(first - 1))
    seconds = earlier + time.monotonic() - started
    result = TrainResult(out, config.steps, seconds, evaluation, coverage.over(world.sum), best)
    weights = gather_weights(student.student) if student.sharded else None
    world.decide(lambda: _finish(training, result, weights))
    return result


def _save(training: Training, done: int, state: dict[str, object]) -> None:
    """Write the checkpoint of ``done`` steps; every process takes part."""
    about, replay = training.prepared.about, training.prepared.stream.order.replay
    order = replay.state(training.student.world.sum)
    whole = about | state | {"order": order, LINEAGE: training.lineage}
    student, keep = training.student, training.config.keep_checkpoints
    tokenizer = training.prepared.tokenizer
    save_checkpoint(training.out, done, student, training.optimizer, whole, keep, tokenizer)


def _evaluate(training: Training, plan: StepPlan) -> dict[str, float]:
    """Evaluate after the step of ``plan``.

    The main process's values, in all: a last bit that differs from GPU to GPU must not make one of
    them save a checkpoint that the others do not.
    """
    data = training.prepared.held_out.at(plan)
    student, world = training.student, training.student.world
    with autocast(training.config.precision, world.device):
        found = evaluate(student.student, data, world.device, student.run)
    return world.decide(lambda: found)


def _step(training: Training, batch: Batch, plan: StepPlan, watch: LossWatch) -> dict[str, float]:
    """Do an optimiser step on this process's share of a batch; return what is shown and logged.

    Gradients are averaged over the processes, so each one's share is multiplied by their number.
    """
    began = time.perf_counter()
    config, world, objective = training.config, training.student.world, training.prepared.objective
    step, run = plan.step, training.student.run
    head_alone = step < config.warm_head_steps
    training.student.student.train_head_alone(head_alone)
    # Dropout depends on (seed, step, process) alone: a resumed run draws what the other one drew.
    torch.manual_seed((config.seed * 1_000_003 + step + 7_919 * world.rank) % 2**63)
    rate = set_learning_rate(training.optimizer, config, step)
    counts = objective.counts(batch, plan).over(world.sum)
    loss = nothing = torch.zeros((), device=world.device)
    terms: dict[str, Tensor] = {}
    parts = split_batch(batch, config.micro_batch_sequences or len(batch.index))
    with autocast(config.precision, world.device):
        counts = with_centres(counts, objective.task, parts, plan, world, run)
    for number, part in enumerate(parts):
        with training.student.accumulating(last=number == len(parts) - 1):
            with autocast(config.precision, world.device):
                total, shown = run(objective.loss, part, counts, plan, world.device)
            (total * world.size).backward()
        loss = loss + total.detach()
        for name, value in shown.items():
            terms[name] = terms.get(name, nothing) + value
    norm_here = training.student.clip(config.max_grad_norm or math.inf)
    names = objective.shown(counts, plan)
    shown_here = [norm_here, loss, *(terms.get(name, nothing) for name in names)]
    norm, *own = torch.stack([value.float() for value in shown_here]).tolist()  # waits for the GPU
    summed, *values, tokens = world.sum([*own, int(batch.lengths.sum())])
    complaint = watch.complaint(summed, norm, plan.weights)
    if complaint is not None:
        world.decide(lambda: _stop(training, step, complaint))
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    return (
        {"loss": summed, "learning_rate": rate, "grad_norm": norm}
        | with_norms(dict(zip(names, values, strict=True)))
        | ({"head_alone": 1.0} if head_alone else {})
        | {"tokens_per_second": tokens / seconds, "tokens": tokens}
    )


def _stop(training: Training, step: int, complaint: str) -> None:
    """Write the ids of the step's examples into a file; raise the InputError that says where."""
    index = training.prepared.stream.order.at(step)
    digests = [str(digest) for digest in training.cache.gather(index, []).digests]
    path = training.out / f"stopped-at-step-{step + 1:08d}.json"
    content = {"step": step + 1, "reason": complaint}
    write_json(path, content | {"sequences": index.tolist(), "digests": digests})
    raise InputError(
        f"{complaint} at step {step + 1}. Its {len(index)} examples are named in {path}; look at "
        f"one with `pipeline inspect {training.cache.store.location} --example {index[0]}`. Try a "
        "lower learning rate or a longer warm-up in another --out; a loss that is finite may go on "
        "with --resume and train.explosion_factor: null"
    )


def _finish(training: Training, result: TrainResult, weights: Mapping[str, Tensor] | None) -> None:
    """Make the run's directory a model directory; its summary, written last, says that it is."""
    left_out = ("directory", "was_finished")
    summary = {name: value for name, value in vars(result).items() if name not in left_out}
    summary |= saved_growth(result.directory)
    about = {"made_by": training.prepared.about, LINEAGE: training.lineage}
    student = training.student.student
    with new_files(result.directory) as staged:
        student.save_pretrained(staged, about, weights)
        training.prepared.tokenizer.save(str(staged))
        card = student_card(student, result.directory, result.best_elsewhere)
        (staged / CARD_FILE).write_text(card, encoding="utf-8")
    write_json(result.directory / SUMMARY_FILE, summary)
