"""Plan a corpus that can be read, its views and its teachers."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.columns import trained_content
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import naming
from rekindle.data.storage.shards import ROWS_PER_BATCH
from rekindle.data.targets.reading.files import is_described
from rekindle.data.targets.reading.hard_masks import HardMaskedView, hard_tokens
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.base import StoredView
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.caching.first_checks import check_files
from rekindle.pipeline.caching.hard_view import mask_teacher
from rekindle.pipeline.caching.teachers import TeacherPlan, slow_pass_warning
from rekindle.pipeline.caching.views import Views, build_views, few_pairs_warnings
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.describing.encoders import check_of
from rekindle.pipeline.plan.figures import CorpusPlan, Padding, TeacherWork, ViewPlan
from rekindle.pipeline.plan.sample import CorpusSurvey, survey_corpus
from rekindle.pipeline.plan.scale import Scale
from rekindle.pipeline.plan.teacher import (
    describe_local,
    local_model,
    plan_all_teachers,
    plan_local_teachers,
)
from rekindle.pipeline.plan.work import work_of
from rekindle.pipeline.progress import Progress
from rekindle.train.model.files import place
from rekindle.train.model.headers import has_fresh_head
from rekindle.train.model.heads import describe_fresh_head
from rekindle.train.order.sequences import describe_too_few
from rekindle.train.order.similar_lengths import padding_ratios
from rekindle.train.precision import describe_slow_precision
from rekindle.train.schedules import is_used


class Surveyed(NamedTuple):
    """The plan of a readable corpus; ``warnings`` in words."""

    corpus: CorpusPlan
    views: tuple[ViewPlan, ...]
    teachers: tuple[TeacherWork, ...]
    warnings: tuple[str, ...]


def survey_all(config: RunConfig, probe: bool, scale: Scale | None) -> Surveyed:
    """Plan the corpus, its views and the teachers from a sample in a temporary folder."""
    _check_files(config, probe)
    view_config = config
    # replicas drawn the same way have the same size: one is enough
    if config.cache.mask.policy != "cover":
        cache = config.cache.model_copy(update={"replicas": 1})
        view_config = config.model_copy(update={"cache": cache})
    with tempfile.TemporaryDirectory(prefix="rekindle-plan-") as folder:
        survey = survey_corpus(config, Path(folder), scale)
        views = build_views(survey.probe_corpus, view_config, Progress.silent())
        views = replace(views, masked=_assumed_masks(config, survey, probe) or views.masked)
        per_sequence = survey.reference.commits_by_unit.bytes / len(survey.reference)
        corpus = CorpusPlan(
            source=config.corpus.places,
            sequences=survey.sequences,
            tokens=survey.tokens,
            estimated=survey.estimated,
            basis=survey.basis,
            bytes=round(survey.new_sequences * per_sequence),
            sequence_length=config.corpus.sequence_length,
            texts=survey.texts,
            sequences_per_shard=config.cache.sequences_per_shard or survey.shard_size,
            padding=_padding(config, survey),
            trained=_trained_share(survey.reference),
            full=survey.reference.full,
        )
        stored_views = [view for view in (views.masked, *views.pairs.values()) if view is not None]
        view_plans = tuple(_view_plan(config, survey, view) for view in stored_views)
        plans = plan_local_teachers(config, survey, views, is_required=probe)
        teachers = plan_all_teachers(config, plans, survey, views, probe)
        slow = _slow_precision_warnings(config, survey, plans, teachers)
        unseen = _unseen_warnings(config, plans, teachers)
        warnings = (*unseen, *survey.warnings, *_corpus_warnings(config, survey, views), *slow)
    return Surveyed(corpus, view_plans, teachers, warnings)


def _padding(config: RunConfig, survey: CorpusSurvey) -> Padding | None:
    """Estimate the padding of the student's batches from a sample of the sequences."""
    train, probe_corpus = config.train, survey.probe_corpus
    if config.student is None:
        return None
    lengths = [
        probe_corpus.lengths(s, 0, min(c.rows, ROWS_PER_BATCH))
        for s, c in enumerate(probe_corpus.commits)
    ]
    sizes = (train.batch_sequences, train.micro_batch_sequences)
    return Padding(train.batching, **padding_ratios(np.concatenate(lengths), *sizes))


def _corpus_warnings(config: RunConfig, survey: CorpusSurvey, views: Views) -> list[str]:
    """Return the warnings that will appear when the corpus is made and trained on."""
    warnings = few_pairs_warnings(survey.probe_corpus, views, config.teachers)
    warnings += _fresh_head_warnings(config, survey)
    if config.student is not None and not survey.estimated:
        warnings += describe_too_few(config.train, survey.sequences)
    return warnings


def _unseen_warnings(
    config: RunConfig, plans: Sequence[TeacherPlan | None], works: Sequence[TeacherWork]
) -> list[str]:
    """Return the warnings about teachers with work to do whose models could not be looked at."""
    return [
        f"teacher {teacher.name!r} is planned without its model, {teacher.model}: whether it can "
        "teach on this corpus is not known"
        for teacher, plan, work in zip(config.teachers, plans, works, strict=True)
        if plan is None and work.units_to_make and not missing(teacher.model)
    ]


def _slow_precision_warnings(
    config: RunConfig,
    survey: CorpusSurvey,
    plans: Sequence[TeacherPlan | None],
    works: Sequence[TeacherWork],
) -> list[str]:
    """Return the warnings about precisions that this device has no instructions for."""
    device = place("fp32").device.partition(":")[0]
    warnings: list[str | None] = []
    for teacher, plan, work in zip(config.teachers, plans, works, strict=True):
        if plan is None:
            settings = {f"teachers.{teacher.name}.precision: {{}}": teacher.precision}
            warnings.append(describe_slow_precision(settings, device))
        elif work.units_to_make:
            warnings.append(slow_pass_warning(plan, survey.cached or survey.reference))
    if config.student is not None:
        warnings.append(
            describe_slow_precision({"train.precision: {}": config.train.precision}, device)
        )
    return [warning for warning in warnings if warning is not None]


def _fresh_head_warnings(config: RunConfig, survey: CorpusSurvey) -> list[str]:
    """Return the warning of `pipeline train-student` about an untrained language-model head."""
    student, train = config.student, config.train
    if student is None or student.from_scratch or train.warm_head_steps:
        return []
    is_masked = student.language_task == "masked_lm"  # a causal LM without its head is refused
    folder = local_model(student.model, is_required=False) if is_masked else None
    if folder is None:
        return []
    if not has_fresh_head(folder, student.language_task, student.chosen_attention):
        return []
    is_language_model = {teacher.name: teacher.vocabulary for teacher in config.teachers}
    terms = train.objective.distill
    has_words = any(
        is_used(t.weight) and any(map(is_language_model.get, t.teachers)) for t in terms
    )
    has_hard_loss = is_used(train.objective.hard.weight)
    if not has_hard_loss and not has_words:
        return []
    taught_note = "" if has_hard_loss else ", from its teachers' words alone"
    return [
        describe_fresh_head(
            student.model, survey.probe_corpus.tokenizer.size, train.steps, taught_note
        )
    ]


def _check_files(config: RunConfig, is_required: bool) -> None:
    """Check all model folders on this machine, as `pipeline cache-teachers` does first."""
    local = []
    for teacher in config.teachers:
        with naming(f"teacher {teacher.name!r}"):
            is_local = teacher.served is None and local_model(
                teacher.model, is_required, check_of(teacher)
            )
            if is_local:
                local.append(teacher)
    student = config.student
    if student is not None and local_model(student.model, is_required) is None:
        student = None
    check_files(local, student)


def _trained_share(corpus: Corpus) -> float | None:
    """Return the share of trained tokens; None if all are trained."""
    return corpus.trained_tokens / max(corpus.tokens, 1) if corpus.has_trained else None


def _view_plan(config: RunConfig, survey: CorpusSurvey, view: StoredView) -> ViewPlan:
    work = work_of(survey, config.cache, f"views/{view.name}", view.name)
    # Measured on the largest shard, where the fixed part of a file counts least.
    last = len(survey.probe_corpus.commits) - 1
    commits = view.shards.committed()
    last_commits = [commits[view.unit(last, replica)] for replica in view.numbers(view.replicas)]
    per_row = sum(commit.bytes for commit in last_commits) / sum(
        commit.rows for commit in last_commits
    )
    is_bound = isinstance(view, HardMaskedView)
    return ViewPlan(view.name, work.units, work.present, round(work.rows * per_row), is_bound)


class AssumedMasks(HardMaskedView):
    """The view of policy hard before it is known which tokens are hard: every candidate counts.

    It has the name of the true view; sizes and positions are upper bounds.
    """

    def masked_positions(self, number: int, replica: int) -> Iterator[NDArray[np.int64]]:
        """Yield as many of each row's tokens as the limit allows."""
        for batch in self.corpus.shard(number).batches():
            for content in map(np.flatnonzero, trained_content(batch)):
                losses = np.full(len(content), np.inf, np.float32)
                yield content[hard_tokens(losses, 0.0, self.config.limit)]


def _assumed_masks(config: RunConfig, survey: CorpusSurvey, probe: bool) -> HardMaskedView | None:
    """Write the upper bound beside the sample ``survey.probe_corpus``; None under another policy.

    Raise InputError as ``hard_view`` does.
    """
    if config.cache.mask.policy != "hard":
        return None
    teacher = _mask_teacher(config, survey, probe)
    masks = AssumedMasks(survey.probe_corpus, config.cache.mask, config.cache.seed, teacher)
    masks.build()
    return masks


def _mask_teacher(config: RunConfig, survey: CorpusSurvey, probe: bool) -> TeacherInfo:
    """Describe the teacher of the masks, as far as possible without a download."""
    corpus, name = survey.cached or survey.reference, config.cache.mask.teacher
    named = [teacher for teacher in config.teachers if teacher.name == name]
    if is_described(corpus.store, name or "") or not named or named[0].sees_masks:
        return mask_teacher(corpus, config)
    teacher = named[0]
    folder = local_model(teacher.model, is_required=probe)
    if folder is None:  # the true view will have another name, and none of its units exists
        return TeacherInfo(name=teacher.name, task="masked_lm", kind="topk", view="clean")
    return describe_local(teacher, folder, survey, Views(), config.cache.seed).info
