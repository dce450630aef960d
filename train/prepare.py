"""Check and build everything before the first step: loss, student, and the record that identifies
the run.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from rekindle.data.cache import Cache
from rekindle.data.corpus.config import content_ids
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.shared_ids import unshared_ids
from rekindle.data.corpus.tokenizer import Tokenizer, load_tokenizer
from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.data.errors import InputError
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.pairs import PairView, count_sequences, few_pairs_warning
from rekindle.data.views.reader import ViewReader
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.deferred.recording import Recording, recording, try_when_filled
from rekindle.train.distributed import World, compile_blocks
from rekindle.train.evaluate import EvaluationData, measured_values
from rekindle.train.export.plain import not_exportable
from rekindle.train.growth.student import grow_student
from rekindle.train.measures import EVALUATION_VERSION
from rekindle.train.method import MethodRun, add_module, make_methods
from rekindle.train.model.files import load_config
from rekindle.train.model.folder import resolve_model, tokenizer_folder
from rekindle.train.model.heads import describe_fresh_head
from rekindle.train.model.lora import describe_adapter, describe_missing_head
from rekindle.train.model.routers import describe_load_balancing, load_balancing_weight
from rekindle.train.model.student_config import lora_excludes
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.ready import BatchPreparer, SideStream
from rekindle.train.objective.terms import describe_interpolation
from rekindle.train.order.sequences import choose_sequences, evaluated_domains
from rekindle.train.order.stream import TrainingStream
from rekindle.train.record.coverage import check_covered
from rekindle.train.record.description import About, describe_run
from rekindle.train.schedules import is_used
from rekindle.train.student import Student, build_student, check_student

log = logging.getLogger("rekindle")


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its processes are joined."""

    about: About
    objective: Objective
    student: Student
    stream: TrainingStream
    held_out: EvaluationData
    tokenizer: Tokenizer  # read at the start: at the end the cache may be out of reach
    ungrown: Callable[[], Student] | None = None  # builds the student as it was before growing
    # the operations that give a student built on fake tensors its values
    deferred_init: Recording | None = None


def prepare(
    cache: Cache,
    student_config: StudentConfig,
    train_config: TrainConfig,
    masked_view: str | None,
    world: World,
    evaluation_version: int = EVALUATION_VERSION,
    deferred: bool = False,
    is_continued: bool = False,
) -> Prepared:
    """Check all that can be checked, and build the student; writes nothing, makes no collective
    call.

    ``evaluation_version``: how the run measures held-out values. ``deferred``: build the student on
    fake tensors, without allocating its parameters; raises Undeferrable if that is impossible.
    ``is_continued``: the run was begun before, so targets of its first steps may be gone.
    """
    if reason := lora_excludes(student_config, train_config):
        raise InputError(reason)
    mask_reader = student_masks(cache, student_config, masked_view)
    view = None if mask_reader is None else mask_reader.name
    objective = prepare_objective(cache, student_config, train_config, view)
    info = cache.corpus.info
    check_student(student_config, info["tokenizer"]["size"], info["config"]["sequence_length"])
    tokenizer = load_checked_tokenizer(cache.corpus, student_config)
    _check_best(cache, train_config, objective, evaluation_version)
    for name in objective.teachers:
        if world.main and not is_continued and name in objective.active_teachers:
            cache.teacher(name).check_files()
        if warning := _describe_few_pairs(cache.teacher(name)):
            log.warning("%s", warning)
    about = describe_run(cache, student_config, train_config, view, objective, evaluation_version)
    sequences = choose_sequences(cache, train_config)
    size = train_config.micro_batch_sequences or train_config.batch_sequences
    stream = TrainingStream(
        cache,
        sequences.order,
        lambda step: objective.plan(step).teachers,
        view,
        train_config.allow_missing,
        rank=world.rank,
        world_size=world.size,
        threads=train_config.prefetch_threads,
        longest_first=size < train_config.batch_sequences // world.size,
        ready=BatchPreparer(
            objective,
            train_config.micro_batch_sequences,
            SideStream(world.device) if world.device.type == "cuda" else None,
            partial(sequences.order.micro_batches, size=size, processes=world.size),
        ),
    )
    held_out = EvaluationData(
        cache,
        sequences.held_out,
        (),
        view,
        min(size, train_config.batch_sequences // world.size),
        train_config.allow_missing,
        domains=sequences.domains,
        terms={name: term for term in train_config.objective.distill for name in term.teachers},
        objective=objective,
        evaluation_version=evaluation_version,
        longest_first=train_config.batching == "similar_lengths",
    )
    with recording() if deferred else nullcontext() as deferred_init:
        student = _build_student(cache, student_config, train_config, objective)
    _set_up_student(student, student_config, train_config, world)
    if student.task == "causal_lm":
        objective.load_balancing_weight = load_balancing_weight(student.model)
    _check_head(student, student_config, train_config, objective)
    _log_not_exportable(student)
    build_ungrown = partial(_build_ungrown, cache, student_config, train_config, objective)
    return Prepared(
        about,
        objective,
        student,
        stream,
        held_out,
        tokenizer,
        ungrown=build_ungrown if student_config.grow is not None else None,
        deferred_init=deferred_init,
    )


def student_masks(
    cache: Cache, student_config: StudentConfig, masked_view: str | None
) -> ViewReader | None:
    """Return the masked view that a masked LM sees: the one of that name, or the only one. None if
    the corpus's tokenizer has no mask token; ``prepare_objective`` checks that none is needed.
    """
    if student_config.language_task != "masked_lm":
        return None
    if masked_view is None and cache.corpus.info["tokenizer"]["mask_id"] is None:
        return None
    return cache.masked_view(masked_view)


def prepare_objective(
    cache: Cache, student_config: StudentConfig, train_config: TrainConfig, masked_view: str | None
) -> Objective:
    """Make the loss, after checking that every teacher it names is in the cache, complete, and saw
    what the student will see.
    """
    task = student_config.language_task
    run = MethodRun(cache, task, masked_view, train_config.steps, train_config.seed)
    methods = make_methods(train_config.objective.methods_for(student_config.task), run)
    names = [name for term in train_config.objective.distill for name in term.teachers]
    names += [name for method in methods for name in method.teachers]
    teachers = {name: cache.teacher(name) for name in names}
    check_covered(teachers, train_config.allow_missing, "train.allow_missing")
    infos = {name: teacher.info for name, teacher in teachers.items()}
    _check_k(cache, train_config, infos)
    objective = Objective(
        train_config.objective,
        infos,
        task,
        train_config.steps,
        methods,
        head_steps=train_config.warm_head_steps,
        measure_every=train_config.log_gradients_every,
    )
    if task == "masked_lm" and masked_view is None and objective.reads_masks:
        raise InputError(
            f"the tokenizer of {cache.store.location} has no mask token, but the objective is a "
            "masked LM's. Set train.objective.hard.weight: 0 and learn from classifiers only, or "
            "make a cache with a tokenizer that has one"
        )
    for line in describe_interpolation(train_config.objective.distill, infos):
        log.info("%s", line)
    for name, info in infos.items():
        if info.view_class.masked and info.view != masked_view:
            raise InputError(
                f"teacher {name!r} saw the masks {info.view}, but the student would see "
                f"{masked_view}: its targets are for other inputs. Use the cache.mask and "
                "cache.seed it was cached with, or cache it with these"
            )
    return objective


def _check_k(cache: Cache, train_config: TrainConfig, infos: Mapping[str, TeacherInfo]) -> None:
    """Raise InputError if a distill term's ``k`` is larger than the run file's ``targets.k``,
    although the cache, made with a larger one, could serve it.
    """
    for number, term in enumerate(train_config.objective.distill):
        for name in term.teachers:
            requested, stored = cache.extent.targets.get(name), infos[name].k
            if requested and requested.k and stored and requested.k < (term.k or 0) <= stored:
                raise InputError(
                    f"train.objective.distill.{number}: k is {term.k}, but teacher {name!r} has "
                    f"targets.k: {requested.k}. Lower the first or raise the second"
                )


def _describe_few_pairs(teacher: TeacherReader) -> str | None:
    """Return a warning if an expert on pairs found too few of them in the cached part."""
    if not issubclass(teacher.info.view_class, PairView):
        return None
    shards = teacher.commits.shard_numbers()  # those that exist so far
    possible = count_sequences(teacher.corpus, teacher.info.domains, shards)
    kind = PairView.pairs_of(teacher.info.view)
    return few_pairs_warning(teacher.info.name, kind, teacher.positions, possible)


def _check_best(
    cache: Cache, train_config: TrainConfig, objective: Objective, evaluation_version: int
) -> None:
    """Check that ``keep_best`` names something that an evaluation can measure."""
    text_names = (
        ["ce"] if objective.trains_lm_head and evaluation_version >= EVALUATION_VERSION else []
    )
    names = ["loss", *text_names]
    per_domain = "ce" if text_names else "loss"
    names += [f"{per_domain}/{name}" for name in evaluated_domains(cache, train_config)]
    for name in objective.teachers:
        values = measured_values(objective.teachers[name], train_config.objective.distill)
        names += [f"{value}/{name}" for value in values]
    names += [f"{method.name}/{value}" for method in objective.methods for value in method.values]
    if train_config.keep_best is not None and train_config.keep_best not in names:
        untrained = train_config.keep_best.partition("/")[0] == "ce" and not text_names
        raise InputError(
            f"train.keep_best is {train_config.keep_best!r}; this run measures {', '.join(names)}"
            + (": nothing trains the language model's head, so it has no ce" if untrained else "")
        )


def load_checked_tokenizer(corpus: Corpus, student_config: StudentConfig) -> Tokenizer:
    """Return the student's tokenizer (the corpus's if they are equal or the student has none).

    It may have more tokens than the corpus's: they take no part in the loss. Raises InputError if a
    token id in the corpus means another token to the student.
    """
    model = resolve_model(student_config.model)
    directory = tokenizer_folder(model)
    if not has_tokenizer_files(directory):
        return corpus.tokenizer  # its vocabulary size is checked when it is built
    facts = corpus.info["tokenizer"]
    inserted_ids = np.zeros(0, np.int64)
    if student_config.language_task == "masked_lm" and facts["mask_id"] is not None:
        # Tokens that masking may insert.
        inserted_ids = np.append(content_ids(facts), facts["mask_id"]).astype(np.int64)
    advice = "Use a student with the cache's tokenizer, or make a cache with the student's"
    # Reading the tokenizer reads the configuration too, and would blame the tokenizer for it.
    load_config(model, attention=student_config.chosen_attention)
    student_tokenizer = load_tokenizer(str(directory))
    unshared_ids(
        corpus, student_tokenizer, inserted_ids, f"student {student_config.model!r}", advice
    )
    return corpus.tokenizer if student_tokenizer.digest == facts["digest"] else student_tokenizer


def _build_student(
    cache: Cache, student_config: StudentConfig, train_config: TrainConfig, objective: Objective
) -> Student:
    """Build the student, with everything that is trained."""
    student = _build_ungrown(cache, student_config, train_config, objective)
    if student_config.grow is not None:
        student = grow_student(student, student_config.grow)
    for method in objective.methods:
        add_module(type(method), method.settings, student)
    return student


def _set_up_student(
    student: Student,
    student_config: StudentConfig,
    train_config: TrainConfig,
    world: World,
) -> None:
    """Prepare the student to run as configured, on its device; on the CPU if it is to be sharded,
    because a device may not have room for all of it.
    """
    if student.adapter is not None:
        log.info("%s", describe_adapter(student, student.adapter, student_config.model))
    if world.size == 1 or train_config.parallel == "ddp":
        student.to(world.device)
    if train_config.gradient_checkpointing:
        student.checkpoint_activations()
    if train_config.compile:
        compile_blocks(student)
    routers = describe_load_balancing(student.model)
    facts = [routers] if routers else []
    facts += [f"{getattr(student.model.config, '_attn_implementation', None)} attention"]
    facts += [world.device.type]
    facts += [f"{world.size} processes ({train_config.parallel})"] if world.size > 1 else []
    facts += ["compiled blocks"] if train_config.compile else []
    facts += ["activations computed again"] if train_config.gradient_checkpointing else []
    log.info("student: %s", ", ".join(facts))


def _check_head(
    student: Student, student_config: StudentConfig, train_config: TrainConfig, objective: Objective
) -> None:
    """Explain a fresh language-model head, and refuse to train the head alone if there is none."""
    if train_config.warm_head_steps and not student.own_head:
        raise InputError(
            f"train.warm_head_steps: student {student_config.model!r} has no head of its own "
            "to train: its output matrix is its input embeddings, and nothing else comes after "
            "the body. Leave it out"
        )
    if not student.has_fresh_head or train_config.warm_head_steps:
        return
    if objective.trains_lm_head and student.adapter is not None:
        raise InputError(describe_missing_head(student_config.model))
    if not objective.trains_lm_head:
        log.info("student: nothing trains its fresh language-model head, which stays as it is")
        return
    uses_labels = is_used(train_config.objective.hard.weight)
    taught_by = "" if uses_labels else ", from its teachers' predictions alone"
    sizes = (student.vocabulary_size, train_config.steps)
    log.warning("%s", describe_fresh_head(student_config.model, *sizes, taught_by))


def _log_not_exportable(student: Student) -> None:
    """Log which heads cannot be exported, and why, now: after training it is too late."""
    with torch.random.fork_rng(devices=[]):  # trying heads draws their weights
        reasons = {name: not_exportable(student, name) for name in student.head_configs}
    problems = {name: why for name, why in reasons.items() if why is not None}
    if problems:
        first, *other_heads = problems
        also = f" (nor can {', '.join(map(repr, other_heads))})" if other_heads else ""
        log.info("student: %s%s", problems[first], also)


def _build_ungrown(
    cache: Cache, student_config: StudentConfig, train_config: TrainConfig, objective: Objective
) -> Student:
    """Build the student as it is before it grows."""
    info = cache.corpus.info
    size, length = info["tokenizer"]["size"], info["config"]["sequence_length"]
    domains = tuple(cache.corpus.domains) if student_config.domain_prompts else ()
    student = build_student(
        student_config,
        objective.heads,
        size,
        train_config.seed,
        length,
        domains,
        cache.corpus.tokenizer,
    )
    if cache.corpus.is_packed:
        try_when_filled(lambda: student.check_packed(length))
    return student
