"""Runs the live teachers again on random sequences and compares with what the cache holds."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rekindle.data.batch import TokenTargetBatch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.example import Target, TokenTargets
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.pairs import PairView
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.caching.compute_unit import Unit, UnitResult, run_unit
from rekindle.pipeline.caching.teachers import Teacher, TeacherPlan
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.model.files import config_fingerprint, weights_fingerprint
from rekindle.train.model.folder import resolve_model

# Whole live distributions are held for so many sequences: 0.8 GB at 512 tokens of 50,000.
ROWS_AT_ONCE = 8
Values = dict[str, float]


def audit_cache(path: str, config: RunConfig, count: int, seed: int = 0) -> dict[str, Values]:
    """What the live teachers say of ``count`` random sequences, against the cache; by teacher.

    Vocabulary teachers: ``kl`` (live ‖ cached, nats), ``top1`` agreement and ``kept_mass``, means
    over positions; of samples ``total_variation`` to one drawn again; task heads: ``max_error`` of
    the logits. ``rows``: how many were compared. Of masked replicas the first is audited. Raises
    InputError when a teacher is not the one that was cached, and when the configuration has none of
    the cache's teachers.
    """
    config.check_single()
    cache = Cache.open(path)
    index = np.random.default_rng(seed).permutation(len(cache))[:count]
    configs = {t.name: t for t in config.teachers if t.name in cache.teachers}
    if not configs:
        known = ", ".join(cache.teachers) or "none"
        raise InputError(
            f"the configuration names none of the teachers of {path} (it has: {known}), so there "
            "is nothing to audit; give the configuration the cache was made with"
        )
    make_missing(*configs.values())
    return {
        name: _audit_teacher(cache, _live(cache, teacher), index)
        for name, teacher in configs.items()
    }


def _live(cache: Cache, config: TeacherConfig) -> Teacher:
    """The teacher, loaded; its distributions whole, so that what top-k left out is compared too.

    Raises InputError when it is not the one that was cached.
    """
    info = cache.teachers[config.name].info
    directory = resolve_model(config.model)
    prints = info.fingerprints

    def check(same: dict[str, bool]) -> None:
        for what in (name for name, kept in same.items() if not kept):
            raise InputError(
                f"teacher {config.name!r}: {directory} is not the teacher that was cached (its "
                f"{what} differs); give the configuration the cache was made with"
            )

    check(
        {
            "weights": weights_fingerprint(directory) == prints.get("weights"),
            "model configuration": config_fingerprint(directory) == prints.get("config"),
            "task": config.task == info.task and config.pair_expert == info.shown.paired,
            "view": config.sees_masks == info.shown.masked,
            "kind of pairs": not config.pair_expert or PairView.pairs_of(info.view) == config.pairs,
        }
    )
    # A sample is drawn again: the same draws from the same distributions.
    exact = config.vocabulary and not kind_of(info).sampled
    whole = info.model_copy(update={"kind": "dense", "codec": "default"} if exact else {})
    teacher = Teacher(TeacherPlan(config, directory, whole), cache.corpus)
    check({"tokenizer": teacher.tokenizer.digest == prints.get("tokenizer")})
    teacher.stores_tails = kind_of(info).has_tail  # and its own tokens' mass lies in the tail
    return teacher


def _audit_teacher(cache: Cache, teacher: Teacher, index: NDArray[np.int64]) -> Values:
    reader = cache.teacher(teacher.info.name)
    replica = 0 if reader.masked else None
    values: dict[str, list[float]] = {}
    for shard, rows in _parts(cache, index):
        if not reader.has(shard, replica):
            continue
        live = run_unit(teacher, Unit(shard, replica), only=rows)
        for row in rows:
            example = cache.example(cache.corpus.first(shard) + int(row))
            for cached in example.targets[teacher.info.name]:
                if getattr(cached, "replica", None) == replica:
                    own = teacher.config.vocabulary and len(teacher.token_columns.foreign) > 0
                    for key, found in _compare(cached, live, int(row), teacher.info, own).items():
                        values.setdefault(key, []).extend(found)
    rows_compared = {"rows": float(len(next(iter(values.values()), [])))}
    if "error" in values:
        return {"max_error": max(values["error"])} | rows_compared
    return {key: float(np.mean(found)) for key, found in values.items()} | rows_compared


def _parts(cache: Cache, index: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The sequences ``index``, a few rows of one shard at a time."""
    shards, rows = cache.corpus.locate(index)
    for shard in np.unique(shards):
        chosen = rows[shards == shard]
        for start in range(0, len(chosen), ROWS_AT_ONCE):
            yield int(shard), chosen[start : start + ROWS_AT_ONCE]


def _compare(
    cached: Target, live: UnitResult, row: int, info: TeacherInfo, own_tokens: bool
) -> dict[str, list[float]]:
    mine = live.rows == row
    if not mine.any():  # of a domain that is not the teacher's, or without a word
        return {}
    if not isinstance(cached, TokenTargets):
        return {"error": np.abs(live.columns["logits"][mine] - cached.logits).max(axis=1).tolist()}
    if "log_probs" not in live.columns:
        return _compare_sample(cached, {k: v[mine] for k, v in live.columns.items()}, info)
    exact = live.columns["log_probs"][mine].astype(np.float64)
    p = np.take_along_axis(exact, cached.ids, axis=1)
    q = cached.log_probs.astype(np.float64)
    rest = np.exp(exact)
    np.put_along_axis(rest, cached.ids, 0.0, axis=1)
    tail_p = rest.sum(axis=1)
    if own_tokens:
        tail_p += (1 - np.exp(exact).sum(axis=1)).clip(min=0)
    tail_q = np.exp(cached.log_tail[1.0].astype(np.float64))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    has_tail = (tail_p > 0) & (tail_q > 0)
    ratio = np.divide(tail_p, tail_q, out=np.ones_like(tail_p), where=has_tail)
    kl += tail_p * np.log(ratio)
    best = np.take_along_axis(cached.ids, q.argmax(axis=1)[:, None], axis=1)[:, 0]
    return {
        "kl": kl.tolist(),
        "top1": (exact.argmax(axis=1) == best).astype(float).tolist(),
        "kept_mass": np.exp(p).sum(axis=1).tolist(),
    }


def _compare_sample(
    cached: TokenTargets, live: Columns, info: TeacherInfo
) -> dict[str, list[float]]:
    """Half the summed difference between the sample in the cache and one that is drawn again."""
    count = len(cached.positions)
    rows = np.arange(count)
    again = TokenTargetBatch(info, rows, rows, live)
    ids, log_probs, _ = again.decode(info.temperatures[0])
    assert info.vocabulary_size is not None
    difference = np.zeros((count, info.vocabulary_size + 1))  # the last column takes the padding
    np.add.at(difference, (rows[:, None], ids), np.exp(log_probs))
    np.add.at(difference, (rows[:, None], cached.ids), -np.exp(cached.log_probs))
    return {"total_variation": (np.abs(difference).sum(axis=1) / 2).tolist()}
