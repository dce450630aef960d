"""The plan command: what stage 1 has to do, what it writes, how long it takes, when it pays off.

Nothing is written but into a temporary folder, no built-in model is made, nothing is downloaded but
the corpus's tokenizer, and the cache that the configuration names is only read.
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
from rekindle.train.record.room import free_near

# Without its tokenizer or its text nothing can be said of the corpus, and so of little else;
# without a teacher's model, all but what the model itself decides.
OF_THE_CORPUS = ("sequences", "tokens", "units", "positions", "bytes", "seconds", "break-even")
OF_A_TEACHER = ("positions", "bytes", "seconds")


def plan_run(config: RunConfig, probe: bool = True, scale: Scale | None = None) -> RunPlan:
    """Say what `pipeline cache-teachers` would do for ``config``, without doing any of it.

    With ``probe`` each teacher whose model is on this machine is tried for up to 10 seconds. With
    ``scale``, and where the cache holds another corpus, a new cache is planned, and a warning says
    what there is. What depends on a built-in model that is not made yet is None, and ``to_make``
    names both. Raises InputError for a bad source, for a model that is not there (with ``probe``,
    and unless it may be one of the hub) or does not fit the corpus, CacheMismatchError when the
    cache holds another teacher of that name.
    """
    config.check_single()
    config.check_samples()
    views, warnings = tuple[ViewPlan, ...](), tuple[str, ...]()
    if needed := missing(config.corpus):
        why = f"{' and '.join(needed)} {'are' if len(needed) > 1 else 'is'} not made yet"
        corpus = CorpusPlan(config.corpus.places, None, None, True, why, None)
        teachers = tuple(TeacherWork(t.name, t.task, reason=why) for t in config.teachers)
    else:
        # It imports torch, which a plan of what is not made yet does without.
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
        nearest, free = free_near(store.root)
        disk = str(nearest)
    return Totals(size, sum(seconds) if seconds or not teachers else None, unknown, disk, free)


def _not_made(config: RunConfig, teachers: Sequence[TeacherWork]) -> tuple[NotMade, ...]:
    """What would be made for ``config``, and what is not known without; a plan makes none of it."""
    of_corpus = missing(config.corpus)
    found = []
    for name, path in missing(config).items():
        unknown = list(OF_THE_CORPUS if name in of_corpus else ())
        for teacher, work in zip(config.teachers, teachers, strict=True):
            if teacher.model == str(path):
                lacking = [figure for figure in OF_A_TEACHER if getattr(work, figure) is None]
                unknown += [f"{figure} of {work.name}" for figure in lacking]
        found.append(NotMade(name, ABOUT[name], str(path), tuple(unknown)))
    return tuple(found)


def _warnings(totals: Totals) -> tuple[str, ...]:
    if totals.bytes is None or totals.disk_free is None or totals.bytes <= totals.disk_free:
        return ()
    return (
        f"there is not enough room: {shown_bytes(totals.bytes)} would be written and "
        f"{shown_bytes(totals.disk_free)} are free at {totals.disk}",
    )
