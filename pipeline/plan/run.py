"""The plan command: what stage 1 has to do, what it writes, how long it takes, when it pays off.

Nothing is written but into a temporary folder, no built-in model is made, nothing is downloaded but
the corpus's tokenizer, and the cache that the configuration names is only read.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rekindle.data.storage.store import LocalStore, open_store
from rekindle.data.targets.reading.hard_masks import HardMaskedView
from rekindle.data.views.base import StoredView
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.caching.cache_teachers import Views, build_views
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.break_even import BreakEven, break_even
from rekindle.pipeline.plan.masks import assumed_masks
from rekindle.pipeline.plan.not_made import NotMade, awaited, not_made
from rekindle.pipeline.plan.sample import CorpusSurvey, survey_corpus
from rekindle.pipeline.plan.teacher import TeacherWork, plan_one_teacher
from rekindle.pipeline.plan.text import shown_bytes, shown_plan
from rekindle.pipeline.plan.work import work_of_view
from rekindle.pipeline.progress import Progress


@dataclass(frozen=True)
class CorpusPlan:
    """The corpus. ``bytes`` are those to be written. None: not known, and ``basis`` says why."""

    source: tuple[str, ...]
    sequences: int | None
    tokens: int | None
    estimated: bool
    basis: str
    bytes: int | None


@dataclass(frozen=True)
class ViewPlan:
    """A view that a teacher or the student is shown."""

    name: str
    units_to_make: int
    units_present: int
    bytes: int
    at_most: bool = False  # whether the bytes are a bound: what is hard is not known before


@dataclass(frozen=True)
class Totals:
    """Sums of what is known; ``unknown`` names the teachers of which something is not."""

    bytes: int | None  # None: the corpus is not known
    seconds: float | None  # None: not known of any
    unknown: tuple[str, ...]
    disk: str | None  # the existing folder nearest to the cache; None for an object store
    disk_free: int | None


@dataclass(frozen=True)
class RunPlan:
    """All that `pipeline plan` shows."""

    cache: str
    corpus: CorpusPlan
    views: tuple[ViewPlan, ...]
    teachers: tuple[TeacherWork, ...]
    break_even: BreakEven
    totals: Totals
    warnings: tuple[str, ...]
    to_make: tuple[NotMade, ...]  # built-in models and files that are not made yet

    def as_dict(self) -> dict[str, object]:
        """The plan as JSON has it."""
        values: dict[str, object] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return values

    def as_text(self) -> str:
        """The plan for people, in 100 columns."""
        return shown_plan(self.as_dict())


def plan_run(config: RunConfig, probe: bool = True) -> RunPlan:
    """Say what `pipeline cache-teachers` would do for ``config``, without doing any of it.

    With ``probe`` each teacher whose model is on this machine is tried for up to 10 seconds. What
    depends on a built-in model that is not made yet is None, and ``to_make`` names both. Raises
    InputError for a bad source, for a model that is not there (with ``probe``, and unless it may be
    one of the hub) or does not fit the corpus, CacheMismatchError when the cache holds another
    corpus or another teacher of that name.
    """
    config.check_single()
    if needed := missing(config.corpus):
        return _plan_without_corpus(config, awaited(needed))
    with tempfile.TemporaryDirectory(prefix="rekindle-plan-") as folder:
        survey = survey_corpus(config, Path(folder))
        views = build_views(survey.steps, _sampled(config), Progress.silent())
        views = replace(views, masked=assumed_masks(config, survey, probe) or views.masked)
        corpus = _corpus_plan(config, survey)
        shown = _view_plans(config, survey, views)
        teachers = tuple(
            plan_one_teacher(teacher, config, survey, views, probe) for teacher in config.teachers
        )
    totals = _totals(config.cache.path, corpus.bytes, shown, teachers)
    return RunPlan(
        cache=config.cache.path,
        corpus=corpus,
        views=shown,
        teachers=teachers,
        break_even=break_even(config, survey.sequences, teachers),
        totals=totals,
        warnings=_warnings(totals),
        to_make=not_made(config, teachers),
    )


def _plan_without_corpus(config: RunConfig, why: str) -> RunPlan:
    """Return the plan of a run whose tokenizer or text is not made yet."""
    teachers = tuple(TeacherWork(t.name, t.task, reason=why) for t in config.teachers)
    return RunPlan(
        cache=config.cache.path,
        corpus=CorpusPlan(config.corpus.source, None, None, True, why, None),
        views=(),
        teachers=teachers,
        break_even=BreakEven(
            None, {work.name: None for work in teachers}, f"Break-even: not known; {why}."
        ),
        totals=_totals(config.cache.path, None, (), teachers),
        warnings=(),
        to_make=not_made(config, teachers),
    )


def _sampled(config: RunConfig) -> RunConfig:
    """The configuration of the sample's views: of replicas that are drawn alike, one is enough."""
    if config.cache.mask.policy == "cover":
        return config
    return config.model_copy(update={"cache": config.cache.model_copy(update={"replicas": 1})})


def _corpus_plan(config: RunConfig, survey: CorpusSurvey) -> CorpusPlan:
    per_sequence = sum(c.bytes for c in survey.reference.commits) / len(survey.reference)
    return CorpusPlan(
        source=config.corpus.source,
        sequences=survey.sequences,
        tokens=survey.tokens,
        estimated=survey.estimated,
        basis=survey.basis,
        bytes=round(survey.new_sequences * per_sequence),
    )


def _view_plans(config: RunConfig, survey: CorpusSurvey, views: Views) -> tuple[ViewPlan, ...]:
    last = len(survey.steps.commits) - 1  # the largest: what each file has anyway counts least
    plans = []
    masked: list[StoredView] = [views.masked] if views.masked else []
    for view in [*masked, *views.pairs.values()]:
        work, present = work_of_view(
            survey, view.name, config.cache.masked_replicas, config.cache.sequences_per_shard
        )
        commits = view.shards.committed()
        made = [commits[unit] for unit in commits if unit.startswith(f"{last:05d}")]
        per_row = sum(commit.bytes for commit in made) / sum(commit.rows for commit in made)
        size = round(sum(w.count * w.rows for w in work) * per_row)
        bound = isinstance(view, HardMaskedView)
        plans.append(ViewPlan(view.name, sum(w.count for w in work), present, size, bound))
    return tuple(plans)


def _totals(
    path: str, corpus_bytes: int | None, views: Sequence[ViewPlan], teachers: Sequence[TeacherWork]
) -> Totals:
    size = corpus_bytes
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
