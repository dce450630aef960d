"""The plan command: what stage 1 has to do, what it writes, how long it takes, when it pays off.

Nothing is written but into a temporary folder, no built-in model is made, nothing is downloaded but
the corpus's tokenizer, and the cache that the configuration names is only read.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rekindle.data.storage.store import LocalStore, open_store
from rekindle.data.targets.hard_masks import HardMaskedView
from rekindle.data.views.views import MaskedView, PairView
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.caching.cache_teachers import build_views
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.break_even import break_even
from rekindle.pipeline.plan.figures import CorpusPlan, RunPlan, TeacherWork, Totals, ViewPlan
from rekindle.pipeline.plan.masks import assumed_masks
from rekindle.pipeline.plan.not_made import not_made
from rekindle.pipeline.plan.sample import CorpusSurvey, survey_corpus
from rekindle.pipeline.plan.teacher import plan_one_teacher
from rekindle.pipeline.plan.text import shown_bytes
from rekindle.pipeline.plan.work import work_of
from rekindle.pipeline.progress import Progress


def plan_run(config: RunConfig, probe: bool = True) -> RunPlan:
    """Say what `pipeline cache-teachers` would do for ``config``, without doing any of it.

    With ``probe`` each teacher whose model is on this machine is tried for up to 10 seconds. What
    depends on a built-in model that is not made yet is None, and ``to_make`` names both. Raises
    InputError for a bad source, for a model that is not there (with ``probe``, and unless it may be
    one of the hub) or does not fit the corpus, CacheMismatchError when the cache holds another
    corpus or another teacher of that name.
    """
    config.check_single()
    views: tuple[ViewPlan, ...] = ()
    if needed := missing(config.corpus):
        why = f"{' and '.join(needed)} {'are' if len(needed) > 1 else 'is'} not made yet"
        corpus = CorpusPlan(config.corpus.source, None, None, True, why, None)
        teachers = tuple(TeacherWork(t.name, t.task, reason=why) for t in config.teachers)
    else:
        corpus, views, teachers = _surveyed(config, probe)
    totals = _totals(config.cache.path, corpus, views, teachers)
    return RunPlan(
        cache=config.cache.path,
        corpus=corpus,
        views=views,
        teachers=teachers,
        break_even=break_even(config, corpus, teachers),
        totals=totals,
        warnings=_warnings(totals),
        to_make=not_made(config, teachers),
    )


def _surveyed(
    config: RunConfig, probe: bool
) -> tuple[CorpusPlan, tuple[ViewPlan, ...], tuple[TeacherWork, ...]]:
    """The corpus, its views and the teachers, as a sample in a temporary folder tells them."""
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


def _view_plan(
    config: RunConfig, survey: CorpusSurvey, view: MaskedView | HardMaskedView | PairView
) -> ViewPlan:
    work = work_of(survey, config.cache, f"views/{view.name}", view.name)
    last = len(survey.steps.commits) - 1  # the largest: what each file has anyway counts least
    commits = view.shards.committed()
    made = [commits[unit] for unit in commits if unit.startswith(f"{last:05d}")]
    per_row = sum(commit.bytes for commit in made) / sum(commit.rows for commit in made)
    bound = isinstance(view, HardMaskedView)
    return ViewPlan(view.name, work.units, work.present, round(work.rows * per_row), bound)


def _totals(
    path: str, corpus: CorpusPlan, views: Sequence[ViewPlan], teachers: Sequence[TeacherWork]
) -> Totals:
    size = corpus.bytes
    if size is not None:
        size += sum(view.bytes for view in views) + sum(t.bytes or 0 for t in teachers)
    seconds = [t.seconds for t in teachers if t.seconds is not None]
    unknown = tuple(t.name for t in teachers if t.bytes is None or t.seconds is None)
    disk, free = None, None
    store = open_store(path)
    if isinstance(store, LocalStore):
        root = store.root.absolute()
        nearest = next(folder for folder in (root, *root.parents) if folder.exists())
        disk, free = str(nearest), shutil.disk_usage(nearest).free
    return Totals(size, sum(seconds) if seconds or not teachers else None, unknown, disk, free)


def _warnings(totals: Totals) -> tuple[str, ...]:
    if totals.bytes is None or totals.disk_free is None or totals.bytes <= totals.disk_free:
        return ()
    return (
        f"there is not enough room: {shown_bytes(totals.bytes)} would be written and "
        f"{shown_bytes(totals.disk_free)} are free at {totals.disk}",
    )
