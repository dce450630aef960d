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
    wanted = plan.info
    if not is_described(corpus.store, wanted.name):
        return [plan]
    infos = read_parts(corpus.store, wanted.name)
    base = infos[0]
    if not (kind_of(base).can_grow and kind_of(wanted).can_grow):
        check_same(corpus, base, wanted)
        return [replace(plan, info=base)]
    as_begun = {key: getattr(base, key) for key in ("k", "temperatures", "estimator")}
    check_same(corpus, base, wanted.model_copy(update=as_begun))
    main = _main_part(corpus, infos, wanted)
    tails = _tails(infos, main, wanted)
    return [replace(plan, info=info) for info in (main, *tails)]


def _main_part(corpus: Corpus, infos: list[TeacherInfo], wanted: TeacherInfo) -> TeacherInfo:
    """Return the part with the candidates: the one that readers use, if it has enough of them."""
    assert wanted.k is not None
    used = TeacherReader(corpus, infos).main.info
    if (used.k or 0) >= wanted.k:
        return used
    enough = [i for i in infos if kind_of(i).can_grow and (i.k or 0) >= wanted.k]
    if enough:
        return min(enough, key=lambda info: info.k or 0)
    temperatures = {t for info in infos for t in info.temperatures} | {*wanted.temperatures}
    changed = {"part": f"k{wanted.k}", "temperatures": tuple(sorted(temperatures))}
    return wanted.model_copy(update=changed)


def _tails(infos: list[TeacherInfo], main: TeacherInfo, wanted: TeacherInfo) -> list[TeacherInfo]:
    """Return the parts for temperatures that ``main`` lacks: those begun, and perhaps a new one."""
    lacking = {*wanted.temperatures} - {*main.temperatures}
    begun = [info for info in infos if info.extends == main.part]
    for info in begun:
        lacking -= {*info.temperatures}
    if not lacking:
        return begun
    temperatures = tuple(sorted(lacking))
    name = f"k{main.k}-tau-" + "-".join(repr(t).removesuffix(".0") for t in temperatures)
    if len(name) > LONGEST_PART:
        name = f"k{main.k}-tau-" + xxhash.xxh3_64_hexdigest(repr(temperatures).encode())
    changed = {
        "kind": "tails",
        "part": name,
        "extends": main.part,
        "temperatures": temperatures,
        "codec": "default",
    }
    return [*begun, main.model_copy(update=changed)]
