"""The train-student command: open the cache, find the student's view, train, show progress."""

import logging
from collections.abc import Mapping
from pathlib import Path

from rekindle.data.cache import Cache
from rekindle.data.corpus.remarks import describe_text_difference
from rekindle.data.counted import counted
from rekindle.data.storage.atomic import write_text
from rekindle.data.storage.manifest import refuse_without_text
from rekindle.data.targets.reading.extent import Extent, TeacherExtent
from rekindle.data.targets.reading.hard_masks import HardMaskedView
from rekindle.data.views.masked import MaskedView
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.config import RunConfig, dump_config
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.train.distributed import join_world
from rekindle.train.loop import EVERYTHING, TrainResult, train_student
from rekindle.train.measures import GRADIENT, GRADIENT_RATIO
from rekindle.train.objective.term_gradients import describe_gradients
from rekindle.train.order.length import in_steps
from rekindle.train.record.identity import recorded_extent, steps_of_run, with_former_defaults
from rekindle.train.record.stored_run import upload_finished
from rekindle.train.record.working_copy import shown_folder

log = logging.getLogger("rekindle")

RUN_YAML = "run.yaml"  # the whole configuration, in a run's folder


def train_from_config(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress = SILENT,
    began: Extent = EVERYTHING,
) -> TrainResult:
    """Train the configured student from the configured cache into ``out``; save the configuration
    there last. ``began``: how much of the cache the runs it is compared with have read, if the file
    does not say.
    """
    config.check_single()
    student = config.needed_student()
    cache = Cache.open(config.cache.path)
    refuse_without_text(cache.store)
    if warning := describe_text_difference(config.corpus, cache.corpus):
        log.warning("%s", warning)
    make_missing(student)  # in every process: another machine has its own home
    total = in_steps(cache, config.train, steps_of_run(out) if resume else None).steps
    with (
        cache.store.reading(),
        join_world() as world,
        progress.task(shown_folder(out), unit="steps", total=total) as task,
    ):
        gradients = ""  # as last measured

        def report(step: int, values: Mapping[str, float]) -> None:
            nonlocal gradients
            gradients = describe_gradients(values) or gradients
            if not task.done:  # start-up and the steps of an earlier call do not count as speed
                task.begin(step)
                return
            task.advance(step - task.done, tokens=values["tokens"])
            speed = filter(None, [task.rates()])
            losses = {
                k: v for k, v in values.items() if not k.startswith((GRADIENT, GRADIENT_RATIO))
            }
            terms = [f"{k} {v:.3f}" for k, v in losses.items() if k == "ce" or "/" in k]
            wait = f"wait {values['data_wait']:.1%}"
            parts = [f"loss {values['loss']:.3f}", *speed, wait, *terms, gradients]
            task.note(" · ".join(filter(None, parts)))

        if resume:
            unresumed_config = config
            config = world.decide(lambda: with_former_defaults(unresumed_config, out))
        result = train_student(
            cache,
            config.needed_student(),
            config.train,
            out,
            masked_view=student_view(cache, config),
            asked=requested_extent(config).with_defaults(began),
            resume=resume,
            report=report,
            world=world,
        )
        if world.main and not (result.was_finished and (out / RUN_YAML).is_file()):
            write_text(out / RUN_YAML, dump_config(_with_extent(config, recorded_extent(out))))
            upload_finished(out)
    return result


def _with_extent(config: RunConfig, read_extent: Extent) -> RunConfig:
    """Return ``config`` with defaults replaced by how much was read of the cache, so that the file
    reads the same again.
    """
    cache_config = config.cache
    if read_extent.replicas is not None:
        cache_config = cache_config.model_copy(update={"replicas": read_extent.replicas})
    teachers = []
    for teacher in config.teachers:
        read_targets = read_extent.targets.get(teacher.name)
        if read_targets is not None and read_targets.k is not None:
            targets = teacher.targets.model_copy(update={"k": read_targets.k})
            teacher = teacher.model_copy(update={"targets": targets})
        teachers.append(teacher)
    return config.model_copy(update={"cache": cache_config, "teachers": tuple(teachers)})


def requested_extent(config: RunConfig) -> Extent:
    """Return how much of the cache the file asks for explicitly, ignoring defaults."""
    masks, targets = config.cache, {}
    for teacher in config.teachers:
        if teacher.vocabulary and "k" in teacher.targets.model_fields_set:
            targets[teacher.name] = TeacherExtent(k=teacher.targets.k)
    states_replicas = "replicas" in masks.model_fields_set
    return Extent(replicas=masks.masked_replicas if states_replicas else None, targets=targets)


def describe_result(result: TrainResult) -> str:
    """Describe a finished run: its time, its held-out values, and what it was trained with."""
    values = ", ".join(f"{name} {value:.4f}" for name, value in result.evaluation.items())
    finished_note = "was finished, and is left as it is: " if result.was_finished else ""
    summary = f"{counted(result.steps, 'step')} in {result.seconds:.0f} s"
    summary += f"; {values}" if values else ""
    lines = [f"{result.directory}: {finished_note}{summary}"]
    # Counted again each time it is read; a position is a predicted token.
    for unit, noun in (("sequences", "sequences"), ("positions", "tokens")):
        kd, ce_only, neither = (
            result.coverage[f"{unit}_{share}"] for share in ("with_kd", "ce_only", "neither")
        )
        neither_note = f", {neither:,} with neither" if neither else ""
        # A student that learns from experts alone predicts no token.
        if kd + ce_only or (neither and unit == "sequences"):
            lines.append(
                f"{noun} trained: {kd:,} with KD (a teacher's targets), {ce_only:,} with "
                f"cross-entropy alone{neither_note}"
            )
    lines.append(result.describe_best())
    return "\n".join(lines).replace(str(result.directory), shown_folder(result.directory))


def student_view(cache: Cache, config: RunConfig) -> str | None:
    """Return the name of the masked view that the student sees, as a cache may hold several. None
    for a causal LM, and if nothing is masked.
    """
    if config.student is None or config.student.language_task != "masked_lm":
        return None
    masks = config.cache
    if cache.corpus.info["tokenizer"]["mask_id"] is None:
        return None  # the objective is checked for what needs masks
    view: MaskedView
    if masks.mask.policy == "hard":
        teacher = cache.teacher(masks.mask.teacher or "").parts[0].info
        view = HardMaskedView(cache.corpus, masks.mask, masks.seed, teacher)
    else:
        view = MaskedView(cache.corpus, masks.mask, masks.seed, masks.replicas)
    return cache.masked_view(view.name).name
