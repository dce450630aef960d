"""Check and build everything before the first step: loss, student, the run's description."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from rekindle.data.cache import Cache
from rekindle.data.corpus.config import content_ids
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.shared_ids import unshared_ids
from rekindle.data.corpus.tokenizer import Tokenizer, load_tokenizer
from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.data.errors import InputError
from rekindle.data.targets.kinds.registry import vocabulary_kind
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
from rekindle.train.measures import MEASURE, SECTION, TEACHERS_SINCE
from rekindle.train.method import MethodRun, add_module, make_methods
from rekindle.train.model.files import load_config
from rekindle.train.model.folder import resolve_model, tokenizer_folder
from rekindle.train.model.heads import describe_fresh_head
from rekindle.train.model.lora import describe_adapter, describe_missing_head
from rekindle.train.model.routers import balance_weight, describe_load_balancing
from rekindle.train.model.student_config import lora_excludes
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.ready import BatchPreparer, SideStream
from rekindle.train.objective.terms import describe_interpolation
from rekindle.train.order.sequences import choose_sequences, evaluated_domains
from rekindle.train.order.stream import TrainingStream
from rekindle.train.record.coverage import check_covered
from rekindle.train.schedules import is_used
from rekindle.train.step_config import LENGTH
from rekindle.train.student import Student, build_student, check_student

log = logging.getLogger("rekindle")

About = dict[str, Any]  # a run's description as JSON: see ``describe_run``
DATA_ORDER = 2  # rises when the same seed would give another split or order


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
    recorded: Recording | None = None  # how to fill a student that has no memory yet


def prepare(
    cache: Cache,
    student_config: StudentConfig,
    config: TrainConfig,
    masked_view: str | None,
    world: World,
    measure: int = MEASURE,
    deferred: bool = False,
    is_continued: bool = False,
) -> Prepared:
    """Check all that can be checked, and build the student; writes nothing, waits for nobody.

    ``measure``: the rule by which the run measures held-out values. ``deferred``: build the student
    without memory; raises Undeferrable if that is impossible. ``is_continued``: the run was begun
    before, so targets of its first steps may be gone.
    """
    if reason := lora_excludes(student_config, config):
        raise InputError(reason)
    mask_reader = student_masks(cache, student_config, masked_view)
    view = None if mask_reader is None else mask_reader.name
    objective = prepare_objective(cache, student_config, config, view)
    info = cache.corpus.info
    check_student(student_config, info["tokenizer"]["size"], info["config"]["sequence_length"])
    tokenizer = check_tokenizer(cache.corpus, student_config)
    _check_best(cache, config, objective, measure)
    for name in objective.teachers:
        if world.main and not is_continued and name in objective.taught_teachers:
            cache.teacher(name).check_files()
        if warning := _describe_few_pairs(cache.teacher(name)):
            log.warning("%s", warning)
    about = describe_run(cache, student_config, config, view, objective, measure)
    sequences = choose_sequences(cache, config)
    size = config.micro_batch_sequences or config.batch_sequences
    stream = TrainingStream(
        cache,
        sequences.order,
        lambda step: objective.plan(step).teachers,
        view,
        config.allow_missing,
        rank=world.rank,
        world_size=world.size,
        threads=config.prefetch_threads,
        longest_first=size < config.batch_sequences // world.size,
        ready=BatchPreparer(
            objective,
            config.micro_batch_sequences,
            SideStream(world.device) if world.device.type == "cuda" else None,
            partial(sequences.order.micro_batches, size=size, processes=world.size),
        ),
    )
    held_out = EvaluationData(
        cache,
        sequences.held_out,
        (),
        view,
        min(size, config.batch_sequences // world.size),
        config.allow_missing,
        domains=sequences.domains,
        terms={name: term for term in config.objective.distill for name in term.teachers},
        objective=objective,
        measure=measure,
        longest_first=config.batching == "similar_lengths",
    )
    with recording() if deferred else nullcontext() as recorded:
        student = _build_student(cache, student_config, config, objective)
    _set_up_student(student, student_config, config, objective, world)
    _check_head(student, student_config, config, objective)
    _log_not_exportable(student)
    build_ungrown = partial(_build_ungrown, cache, student_config, config, objective)
    ungrown = build_ungrown if student_config.grow is not None else None
    parts = (about, objective, student, stream, held_out, tokenizer, ungrown)
    return Prepared(*parts, recorded)


def student_masks(
    cache: Cache, student: StudentConfig, masked_view: str | None
) -> ViewReader | None:
    """Return the masked view that a masked LM sees: the one of that name, or the only one. None if
    the corpus's tokenizer has no mask token; ``prepare_objective`` checks that none is needed.
    """
    if student.language_task != "masked_lm":
        return None
    if masked_view is None and cache.corpus.info["tokenizer"]["mask_id"] is None:
        return None
    return cache.masked_view(masked_view)


def prepare_objective(
    cache: Cache, student: StudentConfig, config: TrainConfig, masked_view: str | None
) -> Objective:
    """Make the loss, after checking that every teacher it names is in the cache, complete, and saw
    what the student will see.
    """
    task = student.language_task
    run = MethodRun(cache, task, masked_view, config.steps, config.seed)
    methods = make_methods(config.objective.methods_for(student.task), run)
    names = [name for term in config.objective.distill for name in term.teachers]
    names += [name for method in methods for name in method.teachers]
    teachers = {name: cache.teacher(name) for name in names}
    check_covered(teachers, config.allow_missing, "train.allow_missing")
    infos = {name: teacher.info for name, teacher in teachers.items()}
    _check_k(cache, config, infos)
    objective = Objective(
        *(config.objective, infos, task, config.steps, methods),
        head_steps=config.warm_head_steps,
        measure_every=config.log_gradients_every,
    )
    if task == "masked_lm" and masked_view is None and objective.reads_masks:
        raise InputError(
            f"the tokenizer of {cache.store.location} has no mask token, but the objective is a "
            "masked LM's. Set train.objective.hard.weight: 0 and learn from classifiers only, or "
            "make a cache with a tokenizer that has one"
        )
    for line in describe_interpolation(config.objective.distill, infos):
        log.info("%s", line)
    for name, info in infos.items():
        if info.view_class.masked and info.view != masked_view:
            raise InputError(
                f"teacher {name!r} saw the masks {info.view}, but the student would see "
                f"{masked_view}: its targets are for other inputs. Use the cache.mask and "
                "cache.seed it was cached with, or cache it with these"
            )
    return objective


def _check_k(cache: Cache, config: TrainConfig, infos: Mapping[str, TeacherInfo]) -> None:
    """Refuse a term's k that the cache has but the run does not ask for."""
    for number, term in enumerate(config.objective.distill):
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


def _check_best(cache: Cache, config: TrainConfig, objective: Objective, measure: int) -> None:
    """Check that ``keep_best`` names something that an evaluation can measure."""
    text_names = ["ce"] if objective.trains_text and measure >= MEASURE else []
    names = ["loss", *text_names]
    names += [f"{names[-1]}/{name}" for name in evaluated_domains(cache, config)]
    for name in objective.teachers:
        values = measured_values(objective.teachers[name], config.objective.distill)
        names += [f"{value}/{name}" for value in values]
    names += [f"{method.name}/{value}" for method in objective.methods for value in method.values]
    if config.keep_best is not None and config.keep_best not in names:
        untrained = config.keep_best.partition("/")[0] == "ce" and not text_names
        raise InputError(
            f"train.keep_best is {config.keep_best!r}; this run measures {', '.join(names)}"
            + (": nothing trains the language model's head, so it has no ce" if untrained else "")
        )


def check_tokenizer(corpus: Corpus, config: StudentConfig) -> Tokenizer:
    """Refuse a student for which an id of the corpus's text is another token; return its tokenizer.

    It may have more tokens than the corpus's: they take no part in the loss.
    """
    model = resolve_model(config.model)
    directory = tokenizer_folder(model)
    if not has_tokenizer_files(directory):
        return corpus.tokenizer  # its vocabulary size is checked when it is built
    facts = corpus.info["tokenizer"]
    inserted_ids = np.zeros(0, np.int64)
    if config.language_task == "masked_lm" and facts["mask_id"] is not None:
        # Tokens that masking may insert.
        inserted_ids = np.append(content_ids(facts), facts["mask_id"]).astype(np.int64)
    advice = "Use a student with the cache's tokenizer, or make a cache with the student's"
    # Reading the tokenizer reads the configuration too, and would blame the tokenizer for it.
    load_config(model, attention=config.chosen_attention)
    student_tokenizer = load_tokenizer(str(directory))
    unshared_ids(corpus, student_tokenizer, inserted_ids, f"student {config.model!r}", advice)
    return corpus.tokenizer if student_tokenizer.digest == facts["digest"] else student_tokenizer


def _build_student(
    cache: Cache, config: StudentConfig, train: TrainConfig, objective: Objective
) -> Student:
    """Build the student, with everything that is trained."""
    student = _build_ungrown(cache, config, train, objective)
    if config.grow is not None:
        student = grow_student(student, config.grow)
    for method in objective.methods:
        add_module(type(method), method.settings, student)
    return student


def _set_up_student(
    student: Student,
    config: StudentConfig,
    train: TrainConfig,
    objective: Objective,
    world: World,
) -> None:
    """Prepare the student to run as configured, on its device; on the CPU if it is to be sharded,
    because a device may not have room for all of it.
    """
    if student.adapter is not None:
        log.info("%s", describe_adapter(student, student.adapter, config.model))
    if world.size == 1 or train.parallel == "ddp":
        student.to(world.device)
    if train.gradient_checkpointing:
        student.checkpoint_activations()
    if train.compile:
        compile_blocks(student)
    objective.balance = balance_weight(student.model) if student.task == "causal_lm" else 0.0
    routers = describe_load_balancing(student.model)
    facts = [routers] if routers else []
    facts += [f"{getattr(student.model.config, '_attn_implementation', None)} attention"]
    facts += [world.device.type]
    facts += [f"{world.size} processes ({train.parallel})"] if world.size > 1 else []
    facts += ["compiled blocks"] if train.compile else []
    facts += ["activations computed again"] if train.gradient_checkpointing else []
    log.info("student: %s", ", ".join(facts))


def _check_head(
    student: Student, config: StudentConfig, train: TrainConfig, objective: Objective
) -> None:
    """Explain a fresh language-model head, and refuse to train the head alone if there is none."""
    if train.warm_head_steps and not student.own_head:
        raise InputError(
            f"train.warm_head_steps: student {config.model!r} has no head of its own to train: "
            "its output matrix is its input embeddings, and nothing else comes after the body. "
            "Leave it out"
        )
    if not student.has_fresh_head or train.warm_head_steps:
        return
    if objective.trains_text and student.adapter is not None:
        raise InputError(describe_missing_head(config.model))
    if not objective.trains_text:
        log.info("student: nothing trains its fresh language-model head, which stays as it is")
        return
    taught_by = (
        "" if is_used(train.objective.hard.weight) else ", from its teachers' predictions alone"
    )
    sizes = (student.vocabulary_size, train.steps)
    log.warning("%s", describe_fresh_head(config.model, *sizes, taught_by))


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
    cache: Cache, config: StudentConfig, train: TrainConfig, objective: Objective
) -> Student:
    """Build the student as it is before it grows."""
    info = cache.corpus.info
    size, length = info["tokenizer"]["size"], info["config"]["sequence_length"]
    domains = tuple(cache.corpus.domains) if config.domain_prompts else ()
    corpus_settings = (length, domains, cache.corpus.tokenizer)
    student = build_student(config, objective.heads, size, train.seed, *corpus_settings)
    if cache.corpus.is_packed:
        try_when_filled(lambda: student.check_packed(length))
    return student


def _rules_of(config: TrainConfig, objective: Objective) -> dict[str, int]:
    """Return the rule of measuring for each teacher that has several."""
    with_k = {name for term in config.objective.distill if term.k for name in term.teachers}
    return {
        name: TEACHERS_SINCE
        for name, info in sorted(objective.teachers.items())
        if info.is_vocabulary and (name in with_k or vocabulary_kind(info).is_sample)
    }


def describe_run(
    cache: Cache,
    student: StudentConfig,
    config: TrainConfig,
    masked_view: str | None,
    objective: Objective,
    measure: int = MEASURE,
) -> About:
    """Describe a run: enough to refuse resuming it as another one, and to use its model as a
    teacher later.
    """
    train = config.model_dump(mode="json", by_alias=True)
    has_other_length = config.epochs is not None or config.tokens is not None
    train |= {"steps": None} if has_other_length else {}  # it follows from the cache at that time
    dumped = [one.settings.model_dump(mode="json", by_alias=True) for one in objective.methods]
    train["objective"]["methods"] = dumped  # with the defaults of their files
    names = [*objective.teachers]
    names += [config.curriculum.teacher] if config.curriculum is not None else []
    teachers = {name: cache.teacher(name) for name in names}
    taught = [
        name
        for name in names
        if name in objective.taught_teachers or name not in objective.teachers
    ]
    replicas = {} if masked_view is None else {"replicas": cache.masked_view(masked_view).replicas}
    targets = {name: one for name, one in cache.extent.targets.items() if name in teachers}
    views = {name: t.view for name, t in objective.teachers.items() if t.sees_clean_text}
    return {
        "student": student.model_dump(mode="json", by_alias=True),
        "train": train,
        "cache": {
            "path": cache.store.location,
            "corpus": cache.corpus.fingerprint,
            "masked_view": masked_view,
            "data_order": DATA_ORDER,
            "teachers": {name: teacher.fingerprint for name, teacher in teachers.items()},
            # Only of teachers whose targets are used: the others have weight 0 at every step.
            "teacher_seconds": {name: teachers[name].seconds for name in taught},
            **({"measured": _rules_of(config, objective)} if measure >= TEACHERS_SINCE else {}),
            **replicas,
            "targets": {name: one.model_dump() for name, one in sorted(targets.items())},
            **({"teacher_views": views} if views else {}),
        },
        **({SECTION: {"measure": measure}} if measure >= MEASURE else {}),
        **({LENGTH: {"steps": config.steps}} if has_other_length else {}),
    }
