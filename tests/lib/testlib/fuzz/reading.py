"""Read everything in a cache, and define what sound data is."""

import dataclasses
import hashlib

import numpy as np

from rekindle.data.batch import EmbeddingBatch, SequenceTargetBatch, TokenTargetBatch
from rekindle.data.cache import Cache
from rekindle.data.errors import CacheError, RekindleError
from rekindle.data.storage.cuts import RowTexts
from rekindle.pipeline.checks.teachers import list_teachers
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.train.order.held_out import split_corpus


class Wrong(Exception):
    """Data that no reader should have returned."""


def hold(truth, told):
    if not np.all(truth):
        raise Wrong(told)


def steps_of(path):
    """Return name -> function that reads a part of the cache; first ones make what later
    ones need.
    """

    def verify():
        report = verify_cache(str(path))
        if report.problems:
            raise CacheError(report.problems[0])
        return [report.shards, report.orphans, report.coverage]

    yield "verify", verify
    opened = []

    def open_cache():
        opened.append(Cache.open(path))
        cache = opened[0]
        hold(len(cache) >= 0, "a negative number of sequences")
        return [len(cache), cache.corpus.tokens, cache.corpus.domains, cache.corpus.fingerprint]

    yield "open", open_cache
    if not opened:
        return
    cache = opened[0]
    everything = np.arange(min(len(cache), 1000))
    yield "teachers", lambda: list_teachers(str(path), as_json=True)
    yield "split", lambda: split_corpus(cache, 0.1)
    for index in {0, len(everything) // 2, len(everything) - 1} & set(everything.tolist()):
        yield f"example {index}", lambda index=index: checked_example(cache, cache.example(index))
    yield "corpus", lambda: checked(cache, cache.gather(everything, []))
    for name in sorted(cache.teachers):
        yield from steps_of_teacher(cache, name, everything)


def steps_of_teacher(cache, name, everything):
    teacher = cache.teachers[name]
    view = teacher.info.view if teacher.masked else None
    yield f"{name} facts", lambda: [teacher.positions, teacher.coverage, teacher.bytes]
    for epoch in range(min(2, teacher.replicas)):
        yield (
            f"{name} {epoch}",
            lambda epoch=epoch: checked(
                cache, cache.gather(everything, [name], epoch=epoch, masked_view=view)
            ),
        )
    # a request is for all scalars or none
    if teacher.info.is_vocabulary and not teacher.info.lacks:
        # They are read past the checksums of whole record batches, so use a freshly opened cache.
        yield f"{name} scalars", lambda: scalars_of(Cache.open(cache.store.root), name)
        yield f"{name} scores", lambda: cache.scores(name)


def scalars_of(cache, name):
    found = []
    teacher = cache.teacher(name)
    for shard in range(min(len(cache.corpus.commits), 10)):
        for scalars in teacher.scalars(shard, 0 if teacher.masked else None):
            values = vars(scalars)
            for column in ("gold_log_prob", "entropy"):
                hold(np.isfinite(values[column]), f"{column} of no number")
            hold(np.diff(scalars.offsets) >= 0, "offsets that fall")
            hold(scalars.offsets[-1] == len(scalars.positions), "offsets outside")
            found.append(values)
    found += [vars(hard) for hard in cache.hard_positions(name)]
    return found


def checked_example(cache, example):
    size = cache.corpus.info["tokenizer"]["size"]
    within(example.input_ids, size, "an example's ids")
    for targets in example.targets.values():
        for target in targets:
            values = vars(target)
            for name in ("logits", "mc_probs"):
                hold(values.get(name) is None or np.isfinite(values[name]), f"infinite {name}")
            if "log_probs" in values:
                hold(target.positions < len(example.input_ids), "positions outside the example")
                within(target.input_ids, size, "what a teacher saw")
                probabilities(target.log_probs, *target.log_tail.values())
    return vars(example)


def within(ids, size, what):
    hold((np.asarray(ids) >= 0) & (np.asarray(ids) < size), f"{what} lie outside the vocabulary")


def probabilities(*parts):
    for part in parts:
        hold(part < 1e-3, "log-probabilities that are NaN or above 0")


def checked(cache, batch):
    """Return the batch with its invariants checked and its targets decoded."""
    size = cache.corpus.info["tokenizer"]["size"]
    within(batch.input_ids[batch.attention_mask], size, "the corpus's ids")
    if batch.masked is not None:
        masked = batch.masked
        hold(masked.positions < batch.lengths[masked.rows], "masked positions outside")
        within(masked.input_ids[batch.attention_mask], size, "masked ids")
    for pair in batch.pairs.values():
        inside = np.arange(pair.input_ids.shape[1]) < pair.lengths[:, None]
        within(pair.input_ids[inside], size, "a pair's ids")
    return [vars(batch), *(checked_targets(batch, found) for found in batch.targets.values())]


def checked_targets(batch, found):
    if isinstance(found, SequenceTargetBatch):
        hold(np.isfinite(found.logits), "logits that are no numbers")
        hold(found.mc_probs is None or np.isfinite(found.mc_probs), "mc_probs of no numbers")
        return None
    if isinstance(found, EmbeddingBatch):
        hold(np.isfinite(found.vectors), "vectors that are no numbers")
        hold(np.diff(found.rows) > 0, "rows that do not ascend")
        return None
    info = found.info
    hold(np.diff(found.rows) >= 0, "rows that fall")
    same = np.diff(found.rows) == 0
    hold(np.diff(found.positions)[same] > 0, "positions that do not ascend")
    last = batch.lengths[found.rows] - (info.task == "causal_lm")
    hold((found.positions >= 0) & (found.positions < last), "positions outside")
    if not isinstance(found, TokenTargetBatch):
        hold(np.isfinite(found.logits), "logits that are no numbers")
        return None
    decoded = [found.decode(t) for t in info.temperatures or (1.0, 2.0)]
    for ids, log_probs, log_tail in decoded:
        hold(ids >= (-1 if info.kind == "random" else 0), "negative ids")
        hold(ids < info.vocabulary_size, "ids outside the vocabulary")
        hold((ids >= 0) | (log_probs == -np.inf), "mass of no id")
        probabilities(log_probs, log_tail)
    return decoded


def fold(state, value):
    """Hash exactly what readers return."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if hasattr(value, "model_dump_json"):
        value = value.model_dump(mode="python")
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            state.update(str(key).encode())
            fold(state, value[key])
    elif isinstance(value, list | tuple | RowTexts):
        state.update(f"[{len(value)}".encode())
        for item in value:
            fold(state, item)
    elif isinstance(value, np.ndarray):
        state.update(f"{value.dtype}{value.shape}".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    else:
        state.update(repr(value).encode("utf-8", "backslashreplace"))


def read_everything(path):
    """Return step -> its digest, or the typed error it raised. Any other error is a failure."""
    found = {}
    for name, step in steps_of(path):
        try:
            with np.errstate(all="ignore"):
                value = step()
        except RekindleError as error:
            found[name] = error
            continue
        state = hashlib.sha256()
        fold(state, value)
        found[name] = state.hexdigest()
    return found
