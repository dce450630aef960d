"""What a plan says of a corpus that is there to be read, of its views and of its teachers."""

import tempfile
from dataclasses import replace
from pathlib import Path

from rekindle.data.targets.reading.hard_masks import HardMaskedView
from rekindle.data.views.base import StoredView
from rekindle.pipeline.caching.views import build_views
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.figures import CorpusPlan, TeacherWork, ViewPlan
from rekindle.pipeline.plan.masks import assumed_masks
from rekindle.pipeline.plan.sample import CorpusSurvey, survey_corpus
from rekindle.pipeline.plan.teacher import plan_one_teacher
from rekindle.pipeline.plan.work import work_of
from rekindle.pipeline.progress import Progress


def survey_all(
    config: RunConfig, probe: bool
) -> tuple[CorpusPlan, tuple[ViewPlan, ...], tuple[TeacherWork, ...]]:
    """Plan the corpus, its views and the teachers by a sample in a temporary folder."""
    sampled = config
    if config.cache.mask.policy != "cover":  # of replicas that are drawn alike, one is enough
        cache = config.cache.model_copy(update={"replicas": 1})
        sampled = config.model_copy(update={"cache": cache})
    with tempfile.TemporaryDirectory(prefix="rekindle-plan-") as folder:
        survey = survey_corpus(config, Path(folder))
        views = build_views(survey.steps, sampled, Progress.silent())
        views = replace(views, masked=assumed_masks(config, survey, probe) or views.masked)
        per_sequence = sum(c.bytes for c in survey.reference.commits) / len(survey.reference)
        corpus = CorpusPlan(
            source=config.corpus.source,
            sequences=survey.sequences,
            tokens=survey.tokens,
            estimated=survey.estimated,
            basis=survey.basis,
            bytes=round(survey.new_sequences * per_sequence),
        )
        found = [view for view in (views.masked, *views.pairs.values()) if view is not None]
        shown = tuple(_view_plan(config, survey, view) for view in found)
        teachers = tuple(plan_one_teacher(t, config, survey, views, probe) for t in config.teachers)
    return corpus, shown, teachers


def _view_plan(config: RunConfig, survey: CorpusSurvey, view: StoredView) -> ViewPlan:
    work = work_of(survey, config.cache, f"views/{view.name}", view.name)
    last = len(survey.steps.commits) - 1  # the largest: what each file has anyway counts least
    commits = view.shards.committed()
    made = [commits[unit] for unit in commits if unit.startswith(f"{last:05d}")]
    per_row = sum(commit.bytes for commit in made) / sum(commit.rows for commit in made)
    bound = isinstance(view, HardMaskedView)
    return ViewPlan(view.name, work.units, work.present, round(work.rows * per_row), bound)
