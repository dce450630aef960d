"""Plans the parts of a teacher's targets: a part in the cache is never made again.

A larger k is a new part, because a stored top-k list cannot be extended. More temperatures are a
new part that holds only tail masses, for the ids already stored.
"""

from dataclasses import replace

import xxhash

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import is_described, read_parts
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.schema import LONGEST_PART, TeacherInfo
from rekindle.data.writing import check_same
from rekindle.pipeline.caching.teachers import TeacherPlan


def plan_parts(corpus: Corpus, plan: TeacherPlan) -> list[TeacherPlan]:
    """Return the parts that hold what ``plan`` needs of its teacher, in the order to make them.

    A smaller k or fewer temperatures than cached need no new part. Raises CacheMismatchError if the
    cache holds another teacher of that name.
    """
    requested = plan.info
    if not is_described(corpus.store, requested.name):
        return [plan]
    infos = read_parts(corpus.store, requested.name)
    base = infos[0]
    if not (kind_of(base).can_grow and kind_of(requested).can_grow):
        check_same(corpus, base, requested)
        return [replace(plan, info=base)]
    cached_settings = {key: getattr(base, key) for key in ("k", "temperatures", "estimator")}
    check_same(corpus, base, requested.model_copy(update=cached_settings))
    main = _main_part(corpus, infos, requested)
    tails = _tails(infos, main, requested)
    return [replace(plan, info=info) for info in (main, *tails)]


def _main_part(corpus: Corpus, infos: list[TeacherInfo], requested: TeacherInfo) -> TeacherInfo:
    """Return the part with the candidates: the one that readers use, if it has enough of them."""
    assert requested.k is not None
    current = TeacherReader(corpus, infos).main.info
    if (current.k or 0) >= requested.k:
        return current
    large_enough = [i for i in infos if kind_of(i).can_grow and (i.k or 0) >= requested.k]
    if large_enough:
        return min(large_enough, key=lambda info: info.k or 0)
    temperatures = {t for info in infos for t in info.temperatures} | {*requested.temperatures}
    changes = {"part": f"k{requested.k}", "temperatures": tuple(sorted(temperatures))}
    return requested.model_copy(update=changes)


def _tails(
    infos: list[TeacherInfo], main: TeacherInfo, requested: TeacherInfo
) -> list[TeacherInfo]:
    """Return the parts for temperatures that ``main`` lacks: those begun, and perhaps a new one."""
    missing = {*requested.temperatures} - {*main.temperatures}
    existing = [info for info in infos if info.extends == main.part]
    for info in existing:
        missing -= {*info.temperatures}
    if not missing:
        return existing
    temperatures = tuple(sorted(missing))
    name = f"k{main.k}-tau-" + "-".join(repr(t).removesuffix(".0") for t in temperatures)
    if len(name) > LONGEST_PART:
        name = f"k{main.k}-tau-" + xxhash.xxh3_64_hexdigest(repr(temperatures).encode())
    changes = {
        "kind": "tails",
        "part": name,
        "extends": main.part,
        "temperatures": temperatures,
        "codec": "default",
    }
    return [*existing, main.model_copy(update=changes)]
