"""The plan command: what stage 1 has to do, what it writes, how long it takes, when it pays off.

Writes only to a temporary folder and makes no built-in model. Downloads only the corpus's
tokenizer, and only reads the configured cache.
"""

from collections.abc import Sequence

from rekindle.data.counted import shown_bytes
from rekindle.data.storage.store import LocalStore, open_store
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.builtin.names import ABOUT
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.break_even import break_even
from rekindle.pipeline.plan.figures import (
    CorpusPlan,
    NotMade,
    RunPlan,
    TeacherWork,
    Totals,
    ViewPlan,
)
from rekindle.pipeline.plan.scale import Scale
from rekindle.train.record.disk_room import free_bytes_near

# Without its tokenizer or text, almost nothing is known of the corpus. Without a teacher's model,
# only the figures that depend on the model are unknown.
CORPUS_FIGURES = ("sequences", "tokens", "units", "positions", "bytes", "seconds", "break-even")
TEACHER_FIGURES = ("positions", "bytes", "seconds")


def plan_run(config: RunConfig, probe: bool = True, scale: Scale | None = None) -> RunPlan:
    """Return what `pipeline cache-teachers` would do for ``config``, without doing it.

    With ``probe``, each teacher whose model is on this machine is run for up to 10 seconds. With
    ``scale``, or if the cache holds another corpus, plan a new cache and warn about the existing
    one. Figures that depend on a built-in model that is not made yet are None, and ``to_make``
    names the model and the figures. Raise InputError for a bad source, for a model that does not
    fit the corpus, and (with ``probe``) for a missing model that cannot be on the hub;
    CacheMismatchError if the cache holds another teacher of that name.
    """
    config.check_single()
    config.check_samples()
    views, warnings = tuple[ViewPlan, ...](), tuple[str, ...]()
    if missing_names := missing(config.corpus):
        verb = "are" if len(missing_names) > 1 else "is"
        reason = f"{' and '.join(missing_names)} {verb} not made yet"
        corpus = CorpusPlan(config.corpus.places, None, None, True, reason, None)
        teachers = tuple(TeacherWork(t.name, t.task, reason=reason) for t in config.teachers)
    else:
        # Imported here because it loads torch, which a plan of missing built-in models does not
        # need.
        from rekindle.pipeline.plan.surveyed import survey_all

        corpus, views, teachers, warnings = survey_all(config, probe, scale)
    totals = _totals(config.cache.path, corpus, views, teachers)
    return RunPlan(
        cache=config.cache.path,
        corpus=corpus,
        views=views,
        teachers=teachers,
        break_even=break_even(config, corpus, teachers),
        totals=totals,
        warnings=(*warnings, *_warnings(totals)),
        to_make=_not_made(config, teachers),
    )


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
        nearest, free = free_bytes_near(store.root)
        disk = str(nearest)
    return Totals(size, sum(seconds) if seconds or not teachers else None, unknown, disk, free)


def _not_made(config: RunConfig, teachers: Sequence[TeacherWork]) -> tuple[NotMade, ...]:
    """List what would be made for ``config`` and which figures are unknown without it."""
    missing_of_corpus = missing(config.corpus)
    not_made = []
    for name, path in missing(config).items():
        unknown = list(CORPUS_FIGURES if name in missing_of_corpus else ())
        for teacher, work in zip(config.teachers, teachers, strict=True):
            if teacher.model == str(path):
                missing_figures = [
                    figure for figure in TEACHER_FIGURES if getattr(work, figure) is None
                ]
                unknown += [f"{figure} of {work.name}" for figure in missing_figures]
        not_made.append(NotMade(name, ABOUT[name], str(path), tuple(unknown)))
    return tuple(not_made)


def _warnings(totals: Totals) -> tuple[str, ...]:
    if totals.bytes is None or totals.disk_free is None or totals.bytes <= totals.disk_free:
        return ()
    return (
        f"there is not enough room: {shown_bytes(totals.bytes)} would be written and "
        f"{shown_bytes(totals.disk_free)} are free at {totals.disk}",
    )
