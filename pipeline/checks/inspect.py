"""Show what a cache holds: sizes, kept mass and entropy per teacher, or one example."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rekindle.data.batch import TokenTargetBatch
from rekindle.data.cache import Cache
from rekindle.data.corpus.pieces import PieceTexts
from rekindle.data.corpus.remarks import end_of_text, remarks, special_names
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.example import Example, Target, TokenLabelTargets, TokenTargets, VectorTargets
from rekindle.data.targets.codec import STEP
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.targets.reading.stored import stored_error
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.checks.origin import origin_lines
from rekindle.pipeline.console import in_line
from rekindle.pipeline.plain_values import for_json
from rekindle.pipeline.plan.text import MIN_PADDING_SHOWN
from rekindle.pipeline.report.table import Table, table_of
from rekindle.pipeline.report.text import terminal_width, text_lines
from rekindle.train.config import TrainConfig
from rekindle.train.order.similar_lengths import padding_ratios

SAMPLE_SHARDS = 8  # record batches read for the histograms
SAMPLE_PLACES = 64  # places at which the lengths of some sequences are read
BATCH: int = TrainConfig.model_fields["batch_sequences"].default
BARS = " ▁▂▃▄▅▆▇█"
SHOWN_POSITIONS = 12
PACKING_TEXT = {
    "document": "each of one document",
    "contiguous": "documents joined",
    "packed": "several documents in each, attention within each",
}


@dataclass(frozen=True)
class Spread:
    """How values are spread over a range; None if there are none."""

    range: tuple[float, float]
    mean: float | None = None
    p05: float | None = None
    p50: float | None = None
    p95: float | None = None
    histogram: list[int] = field(default_factory=list)


Spreads = dict[str, Spread]


def inspect_cache(path: str, teacher: str | None = None, as_json: bool = False) -> str:
    """Return a summary of the cache, as text or JSON."""
    cache = Cache.open(path)
    readers = [cache.teacher(teacher)] if teacher else list(cache.teachers.values())
    spreads = [_spreads(cache, reader) for reader in readers]
    if not as_json:
        return _as_text(path, cache, readers, spreads)
    facts = {
        reader.info.name: _teacher_facts(cache, reader)
        | {k: vars(s) for k, s in spreads_of_teacher.items()}
        for reader, spreads_of_teacher in zip(readers, spreads, strict=True)
    }
    return json.dumps({"cache": path, "corpus": _corpus_facts(cache), "teachers": facts}) + "\n"


def _corpus_facts(cache: Cache) -> dict[str, object]:
    """Return sequences, tokens, tokenizer, domains and views."""
    corpus = cache.corpus
    return {
        "sequences": len(corpus),
        "tokens": corpus.tokens,
        "trained_tokens": corpus.trained_tokens,
        "sequence_length": corpus.info["config"]["sequence_length"],
        "packing": corpus.info["config"]["packing"],
        "vocabulary": corpus.info["tokenizer"]["size"],
        "bytes": corpus.commits_by_unit.bytes,
        "domains": corpus.domains,
        "views": {name: view.replicas for name, view in cache.views.items()},
        "complete": corpus.complete,
        "bad_records": corpus.bad_records,
        "without": corpus.info["config"].get("without"),
        "held": corpus.held._asdict(),
        "end_of_text": end_of_text(corpus),
        "special_names": special_names(corpus),
        "padding": _padding(cache),
    }


def _teacher_facts(cache: Cache, teacher: TeacherReader) -> dict[str, object]:
    """Return the facts about one teacher's targets."""
    info, elsewhere = teacher.info, _bytes_elsewhere(teacher)
    fields = {"task", "kind", "view", "k", "temperatures", "estimator", "codec"}
    facts: dict[str, object] = info.model_dump(mode="json", include=fields) | {
        "labels": list(info.label_names),
        "positions": teacher.positions,
        "coverage": teacher.coverage,
        "bytes": teacher.bytes_on_disk,
        "bytes_per_token": _bytes_per_token(cache, teacher),
        "bytes_per_position": _bytes_per_position(teacher),
        "weights": teacher.fingerprint,
        "cut": vars(teacher.unseen) if teacher.unseen else None,
        "parts": [part.info.part for part in teacher.parts],
        "lineage": [run.model_dump() for run in info.lineage],
    }
    if teacher.mapped_coverage is not None:
        share, mass = teacher.mapped_coverage
        facts["mapped"] = {"tokens": info.mapped, "positions": share, "probability": mass}
    facts |= {"imported": info.imported.model_dump(mode="json")} if info.imported else {}
    if info.vectors is not None:
        vector_fields = {"dimensions", "pooling", "normalised", "vectors", "prompt"}
        facts |= info.model_dump(mode="json", include=vector_fields)
        error = stored_error(teacher.commits)
        facts["cosine_error"] = error and vars(error)
    if info.served is not None:
        facts["served"] = {"model": info.served.model, "lacks": info.lacks, **info.versions}
    return facts | ({"elsewhere": elsewhere} if elsewhere else {})


def _padding(cache: Cache) -> dict[str, float]:
    """Return the tokens a student computes per token of text, by ``train.batching``."""
    if not len(cache):
        return {}
    places = np.linspace(0, len(cache) - 1, SAMPLE_PLACES).astype(np.int64)
    sampled = np.unique(places[:, None] + np.arange(SAMPLE_PLACES // 8))
    return padding_ratios(cache.lengths(sampled[sampled < len(cache)]), BATCH)


def _bytes_per_token(cache: Cache, teacher: TeacherReader) -> float:
    return teacher.bytes_read / max(cache.corpus.tokens * teacher.replicas, 1)


def _bytes_per_position(teacher: TeacherReader) -> float:
    return teacher.bytes_read / max(teacher.positions, 1)


def _bytes_elsewhere(teacher: TeacherReader) -> dict[str, float]:
    """Return the bytes per position of other formats for the same k, without positions or tails.

    DistillKit: ids packed in ⌈log₂ V⌉ bits each, every value in 16 bits (its polynomial presets
    take fewer bytes, 121 at k = 50 and 269 at k = 100 with V = 128,256, but lose 10 to 1,000 times
    more of the distribution). Megatron-LM: an id in 3 bytes and a value in 2, before its zstd.
    """
    k, size = teacher.info.k, teacher.info.vocabulary_size
    if k is None or size is None:
        return {}
    bits = max(1, (size - 1).bit_length())
    return {"DistillKit": -(-k * bits // 8) + 2.0 * k, "Megatron-LM": 5.0 * k}


def _spreads(cache: Cache, teacher: TeacherReader) -> Spreads:
    """Return entropy and kept mass at the positions of a few record batches all over the corpus."""
    if not teacher.info.is_vocabulary or not teacher.commits:
        return {}
    shards = np.unique(np.linspace(0, len(cache.corpus.commits) - 1, SAMPLE_SHARDS).astype(int))
    entropy, kept_mass = [np.zeros(0)], [np.zeros(0)]
    for shard in shards.tolist():
        if not teacher.has(shard, 0 if teacher.masked else None):
            continue
        rows = min(128, cache.corpus.commits[shard].rows)
        start = cache.corpus.first(shard)
        batch = cache.gather(
            np.arange(start, start + rows),
            [teacher.info.name],
            masked_view=teacher.info.view if teacher.masked else None,
        ).targets[teacher.info.name]
        assert isinstance(batch, TokenTargetBatch)
        entropy.append(batch.columns.get("entropy", np.zeros(0)) / STEP)
        if teacher.kind.has_tail:
            _, _, log_tail = batch.decode(teacher.kind.readable_temperature)
            kept_mass.append(-np.expm1(log_tail))
    highest = np.log(teacher.info.vocabulary_size or 2)
    spreads = {"entropy": _spread(np.concatenate(entropy), highest)}
    return spreads | (
        {"kept_mass": _spread(np.concatenate(kept_mass), 1.0)} if len(kept_mass) > 1 else {}
    )


def _spread(values: NDArray, highest: float) -> Spread:
    """Summarize values between 0 and ``highest``."""
    value_range = (0.0, float(highest))
    if not len(values):
        return Spread(value_range)
    p05, p50, p95 = np.quantile(values, [0.05, 0.5, 0.95]).tolist()
    histogram, _ = np.histogram(values, bins=20, range=value_range)
    return Spread(value_range, float(values.mean()), p05, p50, p95, histogram.tolist())


def _as_text(
    path: str, cache: Cache, readers: Sequence[TeacherReader], spreads: Sequence[Spreads]
) -> str:
    corpus = cache.corpus
    config, size = corpus.info["config"], corpus.commits_by_unit.bytes
    lines = [
        f"{path}: {counted(len(corpus), 'sequence')} (pieces of up to "
        f"{config['sequence_length']:,} tokens, {PACKING_TEXT[config['packing']]}), "
        f"{counted(corpus.tokens, 'token')}",
        f"vocabulary {corpus.info['tokenizer']['size']:,}; text and tokens: {size / 1e6:.1f} MB",
    ]
    for view in cache.views.values():
        shown = "pairs of texts"
        if view.kind.masked:
            shown = f"masked text, {counted(view.replicas, 'masking')} of each sequence"
        lines.append(f"{shown}: view {view.name}")
    if corpus.domains:
        shares = ", ".join(f"{in_line(name)} {count:,}" for name, count in corpus.domains.items())
        lines.append(f"domains: {shares}")
    if (padding := _padding(cache)) and padding["shuffled"] >= MIN_PADDING_SHOWN:
        lines.append(
            f"padding: in batches of {BATCH}, {padding['shuffled']:.2f} tokens are computed for "
            f"each of the text; with train.batching: similar_lengths "
            f"{padding['similar_lengths']:.2f}"
        )
    lines += [in_line(line) for line in remarks(corpus)]
    lines += text_lines(_summary(cache, readers), terminal_width())
    for reader in readers:
        lines += origin_lines(reader)
    lines += [r.unseen.as_text(r.info.name) for r in readers if r.unseen]
    errors = [(reader.info, stored_error(reader.commits)) for reader in readers]
    lines += [error.as_text(info) for info, error in errors if error is not None]
    for reader in readers:
        if elsewhere := _bytes_elsewhere(reader):
            bytes_of_formats = ", ".join(
                f"{format_name} {size:.0f}" for format_name, size in elsewhere.items()
            )
            lines.append(
                f"{reader.info.name}: {_bytes_per_position(reader):.1f} bytes a target, all in "
                f"(codec {reader.info.codec})\n  candidates alone of the same k = "
                f"{reader.info.k} elsewhere: {bytes_of_formats}"
            )
    for reader, spreads_of_teacher in zip(readers, spreads, strict=True):
        for key, unit in (("kept_mass", ""), ("entropy", " nats")):
            if key in spreads_of_teacher and spreads_of_teacher[key].histogram:
                title = f"{reader.info.name} {key.replace('_', ' ')}"
                lines.append(_histogram_line(title, spreads_of_teacher[key], unit))
    return "\n".join(lines) + "\n"


def _summary(cache: Cache, readers: Sequence[TeacherReader]) -> Table:
    head = ("teacher", "task", "kept", "done", "targets", "MB", "B/target", "B/token")
    rows = [
        [
            reader.info.name,
            reader.info.task,
            _kept_text(reader.info),
            f"{reader.coverage:.1%}",
            f"{reader.positions:,}",
            f"{reader.bytes_on_disk / 1e6:.2f}",
            f"{_bytes_per_position(reader):.1f}",
            f"{_bytes_per_token(cache, reader):.2f}",
        ]
        for reader in readers
    ]
    note = (
        "done: the share of the sequences that the teacher was run on; a target: its output for "
        "one sequence, or for one token in it; B: bytes"
    )
    return table_of("", head, rows, words=3, note=note if rows else "")


def _kept_text(info: TeacherInfo) -> str:
    if info.vectors is not None:
        return kind_of(info).summary
    return f"{info.kind} {info.k or len(info.label_names) or ''}".replace("topk", "top")


def _histogram_line(title: str, spread: Spread, unit: str) -> str:
    counts = np.array(spread.histogram)
    heights = np.ceil(counts / max(counts.max(), 1) * (len(BARS) - 1)).astype(int)
    low, high = spread.range
    bars = "".join(BARS[h] for h in heights)
    return (
        f"{title:32} {low:.0f} {bars} {high:.1f}{unit}   "
        f"median {spread.p50:.3f}, 5–95 %: {spread.p05:.3f}–{spread.p95:.3f}"
    )


def inspect_example(path: str, index: int, teacher: str | None, as_json: bool = False) -> str:
    """Return one example: its text, and each teacher's output for it."""
    cache = Cache.open(path)
    if teacher:
        cache.teacher(teacher)
    if not 0 <= index < len(cache):
        raise InputError(f"{path} has the examples 0..{len(cache) - 1}, not {index}")
    example = cache.example(index)
    targets = {
        n: teacher_targets for n, teacher_targets in example.targets.items() if teacher in (None, n)
    }
    if as_json:
        shown = {name: value for name, value in vars(example).items() if name != "pairs"}
        if example.trained is None:  # all of it is trained
            del shown["trained"]
        if example.group is None:
            del shown["group"]
        shown["targets"] = {
            n: [vars(t) for t in teacher_targets] for n, teacher_targets in targets.items()
        }
        return json.dumps(for_json(shown)) + "\n"
    lines = [f"example {index} · {example.digest} · document {example.document}"]
    if example.group is not None:
        lines[0] += f" · group {in_line(example.group)}"
    lines.append(example.text or cache.texts[index])
    if example.trained is not None:
        lines.append(_trained_line(example, cache.corpus.tokenizer))
    for name, teacher_targets in targets.items():
        for target in teacher_targets:
            lines += _rendered(cache.teacher(name).info, target, cache.corpus.tokenizer)
    return "\n".join(lines) + "\n"


def _trained_line(example: Example, tokenizer: Tokenizer) -> str:
    """Return how much of the example is trained, and the runs of trained tokens."""
    assert example.trained is not None
    edges = np.flatnonzero(np.diff(example.trained, prepend=False, append=False)).reshape(-1, 2)
    runs = [in_line(tokenizer.hf.decode(example.input_ids[a:b])) for a, b in edges.tolist()]
    count = int(example.trained.sum())
    return f"trained: {count} of {len(example.input_ids)} tokens: {' … '.join(runs)}"


def _rendered(info: TeacherInfo, target: Target, tokenizer: Tokenizer) -> list[str]:
    labels = [in_line(name) for name in info.label_names]
    if isinstance(target, TokenTargets):
        return text_lines(_token_table(info, target, tokenizer), terminal_width())
    if isinstance(target, TokenLabelTargets):
        best_labels = zip(target.positions, target.logits.argmax(axis=1), strict=True)
        shown = [f"{place}:{labels[best]}" for place, best in best_labels][:SHOWN_POSITIONS]
        return [f"{info.name}: {' '.join(shown)}"]
    if isinstance(target, VectorTargets):
        values = " ".join(f"{value:.3f}" for value in target.vector[:SHOWN_POSITIONS])
        length = float(np.linalg.norm(target.vector))
        return [f"{info.name}: a vector of length {length:.3f}: {values} …"]
    if info.problem == "regression":
        scores = [f"{score:.3f}" for score in target.logits]
        if len(scores) > 1:
            scores = [f"{name} {score}" for name, score in zip(labels, scores, strict=True)]
        return [f"{info.name}: score {', '.join(scores)}"]
    probs = np.exp(target.logits - target.logits.max())
    probs = probs / probs.sum()
    likeliest = [f"{labels[i]} {probs[i]:.3f}" for i in np.argsort(-probs)[:5]]
    return [f"{info.name}: {', '.join(likeliest)}"]


def _token_table(info: TeacherInfo, target: TokenTargets, tokenizer: Tokenizer) -> Table:
    masking = "" if target.replica is None else f", masking {target.replica}"
    texts = PieceTexts(tokenizer.hf)
    # A sample has only the tail of the temperature it was drawn at, and that is 0.
    log_tail = target.log_tail.get(1.0, next(iter(target.log_tail.values())))
    rows = []
    for row in range(min(len(target.positions), SHOWN_POSITIONS)):
        likeliest = zip(target.ids[row, :5].tolist(), target.log_probs[row, :5], strict=True)
        candidates = (
            (id, log_prob) for id, log_prob in likeliest if id >= 0
        )  # −1: fewer were drawn
        predicted = "  ".join(f"{texts[id]} {np.exp(log_prob):.3f}" for id, log_prob in candidates)
        tail = f"{np.exp(log_tail[row]):.3f}"
        gold = texts[int(target.gold_ids[row])]
        rank = str(target.gold_rank[row]) if target.gold_rank[row] >= 0 else "?"  # unknown
        rows.append([str(target.positions[row]), gold, rank, predicted, tail])
    shown = "sampled predictions" if kind_of(info).is_sample else "top predictions"
    head = ("place", "true token", "rank", shown, "tail")
    title = f"{info.name}{masking}: {counted(len(target.positions), 'token')} with targets"
    return table_of(title, head, rows, words=len(head))
