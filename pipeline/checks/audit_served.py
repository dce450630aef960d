"""Ask a teacher's server again about random sequences and compare with the cache.

Two answers of one server differ, depending on its kernels and batches, and nobody states by how
much. On average over a sequence, an error may reach the teacher's ``served.tolerance`` plus twice
the codec's rounding. The error is the mean over its positions of Σ p·|Δ log p| over the kept ids;
an id that the server no longer names counts as 1 nat.

N positions, K candidates.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rekindle.data.cache import Cache
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.served import MISSING_NATS
from rekindle.pipeline.caching.compute_unit import Unit
from rekindle.pipeline.caching.served_plan import describe_served
from rekindle.pipeline.caching.served_units import ServedTeacher
from rekindle.pipeline.caching.teachers import TeacherPlan
from rekindle.pipeline.progress import ProgressTask
from rekindle.pipeline.teacher_config import TeacherConfig

Floats = NDArray[np.float64]
Part = tuple[int, NDArray[np.int64]]  # a shard and some of its rows


def audit_served(
    cache: Cache, config: TeacherConfig, parts: Iterable[Part], task: ProgressTask
) -> tuple[dict[str, float], list[str]]:
    """Return what was measured over ``parts``, and what lies beyond its bound, worst first.

    Values: ``mean_error`` and ``max_error`` of a log-probability in nats, ``top1`` agreement,
    ``kept_mass``; ``rows``: positions; ``of_bound``: the largest error of a sequence as a share of
    its bound. Raise CacheMismatchError if another model is served, InputError if none is.
    """
    reader = cache.teacher(config.name)
    describe_served(config, cache.corpus, reader.info.view)
    teacher = ServedTeacher(TeacherPlan(config, Path(), reader.main.info), cache.corpus)
    assert config.served is not None
    errors_of: dict[str, list[Floats]] = {n: [] for n in ("mean", "max", "top1", "mass")}
    beyond: list[tuple[float, str]] = []
    largest = 0.0
    for shard, rows in parts:
        task.advance(len(rows))
        if not reader.has(shard, None):
            continue
        live = teacher.unit(Unit(shard), only_rows=rows)
        counts, cached = reader.gather([(shard, int(row)) for row in rows], None)
        owners = np.repeat(rows, counts)
        order = np.argsort(owners, kind="stable")
        owners, cached = owners[order], {name: array[order] for name, array in cached.items()}
        assert isinstance(reader.kind, VocabularyKind)
        for row in np.unique(owners):
            is_cached_row, is_live_row = owners == row, live.rows == row
            cached_row, live_row = (
                {name: array[is_row] for name, array in columns.items()}
                for columns, is_row in ((cached, is_cached_row), (live.columns, is_live_row))
            )
            errors = _errors(reader.kind, cached_row, live_row)
            mean, bound = float(errors["mean"].mean()), float(errors["bound"].mean())
            bound += config.served.tolerance
            share = mean / bound
            largest = max(largest, share)
            for name, arrays in errors_of.items():
                arrays.append(errors[name])
            if share > 1:
                example = cache.corpus.first(shard) + int(row)
                description = (
                    f"example {example}: its log-probabilities are off by {mean:.3g} nats in the "
                    f"mean, at most {bound:.3g} (served.tolerance)"
                )
                beyond.append((share, description))
    joined = {name: np.concatenate(arrays or [np.zeros(1)]) for name, arrays in errors_of.items()}
    values = {
        "mean_error": float(joined["mean"].mean()),
        "max_error": float(joined["max"].max()),
        "top1": float(joined["top1"].mean()),
        "kept_mass": float(joined["mass"].mean()),
        "rows": float(sum(map(len, errors_of["mean"]))),
        "of_bound": largest,
    }
    worst_first = sorted(beyond, key=lambda share_and_text: -share_and_text[0])
    return values, [description for _, description in worst_first]


def _errors(kind: VocabularyKind, cached: Columns, live: Columns) -> dict[str, Floats]:
    """Compare ``cached`` with ``live`` at each position [N] of a sequence."""
    ids, cached_log_probs, _ = kind.decode(cached, None, 1.0, None)
    live_ids, live_log_probs, _ = kind.decode(live, None, 1.0, None)
    is_same_id = ids[:, :, None] == live_ids[:, None, :]
    live_values = (is_same_id * live_log_probs[:, None, :].astype(np.float64)).sum(axis=2)
    error = np.where(is_same_id.any(axis=2), np.abs(cached_log_probs - live_values), MISSING_NATS)
    probs = np.exp(cached_log_probs.astype(np.float64))
    span = (cached_log_probs.max(axis=1) - cached_log_probs.min(axis=1)).astype(np.float64)
    return {
        "mean": (probs * error).sum(axis=1),
        "max": error.max(axis=1),
        "top1": (ids[:, 0] == live_ids[:, 0]).astype(np.float64),
        "mass": probs.sum(axis=1),
        "bound": 2 * CODECS[kind.info.codec].error_bound(span, 1.0),
    }
