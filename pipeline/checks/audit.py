"""Run the live teachers again on random sequences and compare with the cache.

``judge`` defines how far a value may be off.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.journal import explain_missing
from rekindle.data.targets.codec import Columns
from rekindle.data.targets.kinds.base import VocabularyKind
from rekindle.data.targets.kinds.embedding import Embedding
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.views.pairs import PairView
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.caching.compute_unit import Unit, run_unit
from rekindle.pipeline.caching.sampling import (
    random_sample,
    sample_keys,
    threshold_sample,
    uniforms,
)
from rekindle.pipeline.caching.teachers import Teacher, TeacherPlan
from rekindle.pipeline.checks.audit_served import audit_served
from rekindle.pipeline.checks.judge import (
    Distributions,
    Judged,
    judge_dense,
    judge_logits,
    judge_random,
    judge_scalars,
    judge_threshold,
    judge_topk,
    judge_vectors,
)
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.describing.encoders import find_teacher
from rekindle.pipeline.progress import SILENT, Progress, ProgressTask
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.model.files import (
    adapted_fingerprints,
    config_fingerprint,
    weights_fingerprint,
)
from rekindle.train.precision import warn_of_slow_precision

log = logging.getLogger("rekindle")

# Sequences whose full live distributions are held at once: 0.8 GB at 512 tokens of 50,000.
ROWS_AT_ONCE = 8
VALUES_AT_ONCE = 4_000_000  # of those distributions, compared in float64 at once
Values = dict[str, float]


@dataclass
class TeacherAudit:
    """What was measured for one teacher, and what lies beyond its bound."""

    values: Values = field(default_factory=dict)
    beyond: list[str] = field(default_factory=list)  # worst first


@dataclass
class AuditReport:
    """The findings of an audit, by teacher."""

    teachers: dict[str, TeacherAudit] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Values]:
        """Return the measured values for --json."""
        return {name: audit.values for name, audit in self.teachers.items()}

    @property
    def problems(self) -> list[str]:
        """Describe, for every teacher with values beyond their bounds, the worst one."""
        return [
            f"teacher {name!r}, {audit.beyond[0]}"
            + (f" ({len(audit.beyond):,} places are beyond)" if audit.beyond[1:] else "")
            for name, audit in self.teachers.items()
            if audit.beyond
        ]

    def as_text(self) -> str:
        """Return one line of text for each teacher."""
        return "\n".join(
            f"audit of {name}: "
            + ", ".join(f"{key} {value:.3g}" for key, value in audit.values.items())
            for name, audit in self.teachers.items()
        )


def audit_cache(
    path: str, config: RunConfig, count: int, seed: int = 0, progress: Progress = SILENT
) -> AuditReport:
    """Compare the live teachers' outputs for ``count`` random sequences with the cache, by teacher.

    Vocabulary teachers: ``kl`` (live ‖ cached, nats), ``top1`` agreement and ``kept_mass``, means
    over positions; for samples ``total_variation`` to one drawn again. Task heads: ``max_error`` of
    the logits. Sentence encoders: ``cosine_error``, the mean of 1 − cosine. ``rows``: how many were
    compared. ``of_bound``: the largest error as a share of its bound; above 1 it is beyond. Of
    masked replicas the first is audited. A served teacher is asked again (``audit_served``).

    Raise CacheMismatchError if a teacher's files are not those that were cached; InputError if the
    configuration describes it differently, or names none of the cache's teachers.
    """
    config.check_single()
    cache = Cache.open(path)
    index = np.random.default_rng(seed).permutation(len(cache))[:count]
    configs = {t.name: t for t in config.teachers if t.name in cache.teachers}
    if not configs:
        cached_names = ", ".join(cache.teachers) or "none"
        raise InputError(
            f"the configuration names none of the teachers of {path} (it has: {cached_names}), so "
            "there is nothing to audit; give the configuration the cache was made with"
        )
    _warn_of_left_out(cache, config)
    make_missing(*configs.values())
    audits = {}
    for name, teacher_config in configs.items():
        with progress.task(f"audit of {name}", unit="sequences", total=len(index)) as task:
            if teacher_config.served is not None:
                row_groups = _row_groups(cache, index)
                audits[name] = TeacherAudit(*audit_served(cache, teacher_config, row_groups, task))
            else:
                audits[name] = _Audit(cache, _load_live(cache, teacher_config)).audit(index, task)
    return AuditReport(audits)


def _warn_of_left_out(cache: Cache, config: RunConfig) -> None:
    """Warn about teachers that only the file or only the cache has, and so are not audited."""
    configured_names = [teacher.name for teacher in config.teachers]
    for name in cache.teachers:
        if name not in configured_names:
            log.warning(
                ("teacher %s is not audited: the configuration has no teacher of that name"), name
            )
    for name in configured_names:
        if name not in cache.teachers:
            became = explain_missing(cache.manifest, cache.store, name, cache.teachers)
            log.warning("teacher %s of the configuration is not in the cache.%s", name, became)


def _load_live(cache: Cache, config: TeacherConfig) -> Teacher:
    """Load the teacher with its full distributions, so that what top-k left out is compared too."""
    info = cache.teachers[config.name].info
    if info.imported is not None:
        raise InputError(
            f"teacher {config.name!r} was imported ({info.imported.summary()}): there is no model "
            "to audit it with. Take it out of `teachers` of the configuration"
        )
    if info.served is not None:
        raise InputError(
            f"teacher {config.name!r} was served as {info.served.model!r}: give the configuration "
            "the cache was made with, which has its served section"
        )
    directory, encoder = find_teacher(config)
    fingerprints = info.fingerprints

    def check(matches: dict[str, bool], error: type[CacheMismatchError | InputError]) -> None:
        for part in (name for name, is_same in matches.items() if not is_same):
            raise error(
                f"teacher {config.name!r}: {directory} is not the teacher that was cached (its "
                f"{part} differs); give the configuration the cache was made with"
            )

    settings_match = {
        "task": config.task == info.task and config.pair_expert == info.view_class.paired,
        "view": config.sees_masks == info.view_class.masked,
        "kind of pairs": not config.pair_expert or PairView.pairs_of(info.view) == config.pairs,
    }
    files_match = {
        "weights": weights_fingerprint(directory) == fingerprints.get("weights"),
        "model configuration": config_fingerprint(directory) == fingerprints.get("config"),
    }
    if encoder is not None:
        files_match["modules"] = encoder.fingerprint == fingerprints.get("modules")
    adapter_prints = adapted_fingerprints(directory)
    files_match |= {
        name.replace("_", " "): fingerprints.get(name) == value
        for name, value in adapter_prints.items()
    }
    check(settings_match, InputError)
    check(files_match, CacheMismatchError)
    full_info = info.model_copy(
        update={"kind": "dense", "codec": "default"} if config.vocabulary else {}
    )
    teacher = Teacher(TeacherPlan(config, directory, full_info, encoder), cache.corpus)
    precision = {f"teacher {config.name!r}: {{}}": info.precision}
    device = teacher.placement.device.partition(":")[0]
    warn_of_slow_precision(precision, device, "An audit computes as the targets were made")
    check(
        {"tokenizer": teacher.tokenizer.digest == fingerprints.get("tokenizer")}, CacheMismatchError
    )
    teacher.stores_tails = kind_of(info).has_tail  # its own tokens' mass lies in the tail
    return teacher


class _Audit:
    """One teacher of a cache beside the live one."""

    def __init__(self, cache: Cache, teacher: Teacher):
        self.cache, self.teacher = cache, teacher
        self.reader: TeacherReader = cache.teacher(teacher.info.name)
        self.replica = 0 if self.reader.masked else None
        self.sums: dict[str, list[float]] = {}
        self.beyond: list[tuple[float, str]] = []
        self.largest_share, self.rows = 0.0, 0

    def audit(self, index: NDArray[np.int64], task: ProgressTask) -> TeacherAudit:
        """Audit the sequences ``index``."""
        for shard, rows in _row_groups(self.cache, index):
            task.advance(len(rows))
            if self.reader.has(shard, self.replica):
                self._compare(shard, rows)
        values = {
            name: float(max(values_of_name) if name == "max_error" else np.mean(values_of_name))
            for name, values_of_name in self.sums.items()
            if values_of_name
        }
        values |= {"rows": float(self.rows), "of_bound": self.largest_share}
        worst_first = sorted(self.beyond, key=lambda share_and_text: -share_and_text[0])
        return TeacherAudit(values, [description for _, description in worst_first])

    def _compare(self, shard: int, rows: NDArray[np.int64]) -> None:
        live = run_unit(self.teacher, Unit(shard, self.replica), only_rows=rows, for_audit=True)
        places = [(shard, int(row)) for row in rows]
        counts, cached = self.reader.gather(places, self.replica)
        owners = np.repeat(rows, counts)
        order = np.argsort(owners, kind="stable")
        owners, cached = owners[order], {name: values[order] for name, values in cached.items()}
        if not np.array_equal(owners, live.rows):
            mismatched = sorted({*owners.tolist()} ^ {*live.rows.tolist()}) or rows.tolist()
            self._record_beyond(
                shard, mismatched[0], None, np.inf, "it has targets where the teacher has none"
            )
            return
        if not len(owners):
            return
        self.rows += len(owners)
        size = live.columns["log_probs"].shape[1] if "log_probs" in live.columns else 1
        step = max(1, VALUES_AT_ONCE // size)
        for start in range(0, len(owners), step):
            block = slice(start, start + step)
            cached_block = {name: values[block] for name, values in cached.items()}
            live_block = {name: values[block] for name, values in live.columns.items()}
            for judged in self._judged(shard, owners[block], cached_block, live_block):
                self._record_judged(shard, owners[block], cached_block.get("positions"), judged)

    def _record_judged(
        self, shard: int, owners: NDArray[np.int64], positions: NDArray | None, judged: Judged
    ) -> None:
        share = judged.share
        self.largest_share = max(self.largest_share, float(share.max()))
        for at in np.flatnonzero(share > 1):
            codec_bound, pass_bound = judged.codec_bound[at], judged.pass_bound[at]
            precision = self.teacher.info.precision
            description = (
                f"{judged.quantity} is off by {judged.error[at]:.3g}, at most "
                f"{codec_bound + pass_bound:.3g} ({codec_bound:.2g} of what is stored, "
                f"{pass_bound:.2g} of two passes in {precision})"
            )
            position = None if positions is None else int(positions[at])
            self._record_beyond(shard, int(owners[at]), position, float(share[at]), description)

    def _record_beyond(
        self, shard: int, row: int, position: int | None, share: float, description: str
    ) -> None:
        example = self.cache.corpus.first(shard) + row
        place = f"example {example}" + ("" if position is None else f", position {position}")
        self.largest_share = max(self.largest_share, share)
        self.beyond.append((share, f"{place}: {description}"))

    def _add(self, **values: NDArray) -> None:
        for name, measured in values.items():
            self.sums.setdefault(name, []).extend(measured.tolist())

    def _judged(
        self, shard: int, owners: NDArray[np.int64], cached: Columns, live: Columns
    ) -> Iterator[Judged]:
        info, kind = self.reader.info, self.reader.kind
        if isinstance(kind, Embedding):
            judged = [*judge_vectors(kind, cached, live["vectors"])]
            self._add(cosine_error=judged[0].error)
            yield from judged
            return
        if not isinstance(kind, VocabularyKind):
            error = np.abs(live["logits"].astype(np.float64) - cached["logits"])
            self._add(max_error=error.max(axis=1))
            yield from judge_logits(info, cached, live)
            return
        uniform_draws = None
        if kind.is_sample:
            digests = self.cache.corpus.shard(shard).table()["digest"].to_pylist()
            row_digests = [digests[row] for row in owners]
            keys = sample_keys(
                info, row_digests, self.replica, cached["positions"].astype(np.int64)
            )
            count = 1 if info.kind == "threshold" else kind.k
            uniform_draws = uniforms(torch.from_numpy(keys), count).numpy()
        exact = live["log_probs"].astype(np.float64)
        has_foreign = len(self.teacher.token_columns.foreign) > 0
        scalars = (live["gold_log_prob"], live["entropy"])
        distributions = Distributions(info, exact, *scalars, uniform_draws, has_foreign)
        head = self.reader.head if kind.has_head else None
        ids, log_probs, log_tail = kind.decode(cached, head, kind.readable_temperature, None)
        cached_log_probs = log_probs.astype(np.float64)
        yield from judge_scalars(distributions, cached)
        if kind.is_sample:
            self._add(total_variation=_variation(distributions, ids, cached_log_probs))
        else:
            outside = distributions.foreign_mass
            self._add(
                **_divergence(exact, ids, cached_log_probs, log_tail.astype(np.float64), outside)
            )
        if kind.has_all_probabilities:
            yield from judge_dense(distributions, cached, cached_log_probs, head)
        elif info.kind == "random":
            yield from judge_random(distributions, ids, cached["counts"])
        elif info.kind == "threshold":
            yield from judge_threshold(distributions, ids, cached_log_probs)
        else:
            yield from judge_topk(distributions, cached, ids, cached_log_probs)


def _row_groups(cache: Cache, index: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the sequences ``index``, a few rows of one shard at a time."""
    shards, rows = cache.corpus.locate(index)
    for shard in np.unique(shards):
        chosen = rows[shards == shard]
        for start in range(0, len(chosen), ROWS_AT_ONCE):
            yield int(shard), chosen[start : start + ROWS_AT_ONCE]


def _divergence(
    exact: NDArray,
    ids: NDArray[np.int64],
    cached_log_probs: NDArray,
    log_tail: NDArray,
    foreign: NDArray,
) -> dict[str, NDArray]:
    """Return KL of the live distributions [N,V] to the cached candidates [N,K] with tails [N],
    top-1 agreement, and the live mass of the candidates.

    KL is over K + 1 outcomes; ``foreign`` mass [N] counts in the last.
    """
    p = np.take_along_axis(exact, ids, axis=1)
    outside = np.exp(exact)
    np.put_along_axis(outside, ids, 0.0, axis=1)
    tail_p, tail_q = outside.sum(axis=1) + foreign, np.exp(log_tail)
    kl = (np.exp(p) * (p - cached_log_probs)).sum(axis=1)
    has_tail = (tail_p > 0) & (tail_q > 0)
    ratio = np.divide(tail_p, tail_q, out=np.ones_like(tail_p), where=has_tail)
    best = np.take_along_axis(ids, cached_log_probs.argmax(axis=1)[:, None], axis=1)[:, 0]
    return {
        "kl": kl + tail_p * np.log(ratio),
        "top1": (exact.argmax(axis=1) == best).astype(float),
        "kept_mass": np.exp(p).sum(axis=1),
    }


def _variation(live: Distributions, ids: NDArray[np.int64], cached_log_probs: NDArray) -> NDArray:
    """Return the total variation [N]: half the summed difference between samples in the cache and
    those drawn again.
    """
    info = live.info
    assert live.uniforms is not None
    assert info.k is not None
    probs = torch.from_numpy(np.exp(live.at(info.temperatures[0])).astype(np.float32))
    points = torch.from_numpy(live.uniforms)
    if info.kind == "threshold":
        redrawn_ids, values = threshold_sample(probs, info.k, points[:, 0])
    else:
        redrawn_ids, counts = random_sample(probs, info.k, points)
        values = counts / info.k
    rows = np.arange(len(ids))[:, None]
    difference = np.zeros((len(ids), probs.shape[1] + 1))  # the last column takes the padding
    np.add.at(difference, (rows, redrawn_ids.numpy()), values.numpy().astype(np.float64))
    np.add.at(difference, (rows, ids), -np.exp(cached_log_probs))
    variation: NDArray = np.abs(difference).sum(axis=1) / 2
    return variation
