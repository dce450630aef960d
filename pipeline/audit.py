"""Runs the live teachers again on random sequences and compares with what the cache holds."""

import numpy as np

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.targets import SequenceTargets, TokenLabelTargets, TokenTargets
from rekindle.pipeline.cache_teachers import view_of
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.run_teacher import Unit, UnitResult, run_unit
from rekindle.pipeline.teachers import Teacher, TeacherPlan
from rekindle.train.models import resolve_model, weights_fingerprint

Values = dict[str, float]


def audit_cache(path: str, config: RunConfig, count: int, seed: int = 0) -> dict[str, Values]:
    """Per teacher, over ``count`` random sequences: ``kl`` (live ‖ cached, nats), ``top1`` agreement,
    ``kept_mass`` and the number of ``rows`` compared; ``max_error`` of logits for task heads.

    Raises InputError when a teacher's model is not the one that was cached.
    """
    cache = Cache.open(path)
    index = np.random.default_rng(seed).permutation(len(cache))[:count]
    configs = {t.name: t for t in config.teachers}
    results = {}
    for name, cached in cache.teachers.items():
        if name not in configs:
            continue
        directory = resolve_model(configs[name].model)
        if weights_fingerprint(directory) != cached.fingerprint:
            raise InputError(
                f"teacher {name!r}: {directory} does not hold the weights that were cached; give the "
                "configuration the cache was made with"
            )
        # The live distribution is taken whole, so that what top-k left out is compared as well.
        whole = {"kind": "dense"} if configs[name].vocabulary else {}
        info = cached.info.model_copy(update=whole)
        teacher = Teacher(TeacherPlan(configs[name], directory, info), cache.corpus)
        results[name] = _audit_teacher(cache, teacher, index)
    return results


def _audit_teacher(cache: Cache, teacher: Teacher, index: np.ndarray) -> Values:
    shards, rows = cache.corpus.locate(index)
    replica = 0 if teacher.info.view.startswith("masked-") else None
    sums: dict[str, list[float]] = {}
    for shard in np.unique(shards):
        chosen = rows[shards == shard]
        view = view_of(teacher.info, cache.corpus)
        live = run_unit(teacher, cache.corpus, view, Unit(int(shard), replica), only=chosen)
        for row in chosen:
            number = cache.corpus.first(int(shard)) + int(row)
            found = cache.example(number).targets[teacher.info.name]
            if found:
                for key, values in _compare(found[0], live, int(row)).items():
                    sums.setdefault(key, []).extend(values)
    summary = {key: float(np.mean(values)) for key, values in sums.items() if values}
    if "error" in sums:
        summary = {"max_error": float(np.max(sums["error"]))}
    return summary | {"rows": float(len(next(iter(sums.values()), [])))}


def _compare(
    cached: TokenTargets | SequenceTargets | TokenLabelTargets, live: UnitResult, row: int
) -> dict[str, list[float]]:
    if isinstance(cached, SequenceTargets):
        return {"error": [float(np.abs(live.columns["logits"][row] - cached.logits).max())]}
    mine = live.rows == row
    if isinstance(cached, TokenLabelTargets):
        return {"error": np.abs(live.columns["logits"][mine] - cached.logits).max(axis=1).tolist()}
    exact = live.columns["log_probs"][mine].astype(np.float64)
    p = np.take_along_axis(exact, cached.ids, axis=1)
    q = cached.log_probs.astype(np.float64)
    rest = np.exp(exact)
    np.put_along_axis(rest, cached.ids, 0.0, axis=1)
    tail_p = rest.sum(axis=1)
    tail_q = np.exp(cached.log_tail[1.0].astype(np.float64))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    has_tail = (tail_p > 0) & (tail_q > 0)
    ratio = np.divide(tail_p, tail_q, out=np.ones_like(tail_p), where=has_tail)
    kl += tail_p * np.log(ratio)
    return {
        "kl": kl.tolist(),
        "top1": (exact.argmax(axis=1) == cached.ids[:, 0]).astype(float).tolist(),
        "kept_mass": np.exp(p).sum(axis=1).tolist(),
    }
