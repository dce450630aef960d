"""Shows what a cache holds: sizes, kept mass and entropy per teacher, or one example."""

import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rekindle.data.batch import TokenTargetBatch
from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.example import Example, SequenceTargets, TokenLabelTargets, TokenTargets
from rekindle.data.targets.codec import STEP
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.views.registry import view_kind

SAMPLE_SHARDS = 8  # record batches looked at for the histograms
BARS = " ▁▂▃▄▅▆▇█"
SHOWN_POSITIONS = 12


def inspect_cache(path: str, teacher: str | None = None, as_json: bool = False) -> str:
    """A summary of the cache, as text or JSON."""
    cache = Cache.open(path)
    readers = [cache.teacher(teacher)] if teacher else list(cache.teachers.values())
    facts = {"cache": path, "corpus": corpus_facts(cache)}
    facts["teachers"] = {r.info.name: teacher_facts(cache, r) for r in readers}
    if as_json:
        return json.dumps(facts) + "\n"
    return _as_text(facts)


def corpus_facts(cache: Cache) -> dict[str, Any]:
    """Sequences, tokens, tokenizer, domains and views."""
    corpus = cache.corpus
    return {
        "sequences": len(corpus),
        "tokens": corpus.tokens,
        "sequence_length": corpus.info["config"]["sequence_length"],
        "packing": corpus.info["config"]["packing"],
        "vocabulary": corpus.info["tokenizer"]["size"],
        "bytes": sum(c.bytes for c in corpus.commits),
        "domains": corpus.domains,
        "views": {name: view.replicas for name, view in cache.views.items()},
        "complete": corpus.complete,
    }


def teacher_facts(cache: Cache, teacher: TeacherReader) -> dict[str, Any]:
    """What one teacher left, with the spread of its kept mass and entropy over a sample."""
    info = teacher.info
    facts: dict[str, Any] = {
        "task": info.task,
        "kind": info.kind,
        "view": info.view,
        "k": info.k,
        "temperatures": list(info.temperatures),
        "labels": list(info.label_names),
        "positions": teacher.positions,
        "coverage": teacher.coverage,
        "bytes": teacher.bytes,
        "bytes_per_token": teacher.bytes_read / max(cache.corpus.tokens * teacher.replicas, 1),
        "bytes_per_position": teacher.bytes_read / max(teacher.positions, 1),
        "weights": teacher.fingerprint,
        "estimator": info.estimator,
        "codec": info.codec,
        "parts": [part.info.part for part in teacher.parts],
        "lineage": [run.model_dump() for run in info.lineage],
    }
    if info.k is not None:
        assert info.vocabulary_size is not None
        facts["elsewhere"] = bytes_elsewhere(info.k, info.vocabulary_size)
    if teacher.info.is_vocabulary and teacher.commits:
        sample = _sample(cache, teacher)
        facts["entropy"] = _spread(sample["entropy"], 0.0, np.log(info.vocabulary_size or 2))
        if "kept_mass" in sample:
            facts["kept_mass"] = _spread(sample["kept_mass"], 0.0, 1.0)
    return facts


def bytes_elsewhere(k: int, vocabulary_size: int) -> dict[str, float]:
    """Bytes per position that other formats take for the same k, without their positions or tails.

    DistillKit: ids packed in ⌈log₂ V⌉ bits each, every value in 16 bits (its polynomial presets
    take fewer bytes: 121 at k = 50, 269 at k = 100, V = 128,256, and lose 10 to 1,000 times more of
    the distribution). Megatron-LM: an id in 3 bytes and a value in 2, before its zstd.
    """
    bits = max(1, (vocabulary_size - 1).bit_length())
    return {"DistillKit": -(-k * bits // 8) + 2.0 * k, "Megatron-LM": 5.0 * k}


def _sample(cache: Cache, teacher: TeacherReader) -> dict[str, NDArray]:
    """Entropy and kept mass at the positions of a few record batches, spread over the corpus."""
    shards = np.unique(np.linspace(0, len(cache.corpus.commits) - 1, SAMPLE_SHARDS).astype(int))
    entropy, kept = [], []
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
        entropy.append(batch.columns["entropy"] / STEP)
        if teacher.kind.has_tail:
            _, _, log_tail = batch.decode()
            kept.append(-np.expm1(log_tail))
    sample = {"entropy": np.concatenate(entropy or [np.zeros(0)])}
    return sample | ({"kept_mass": np.concatenate(kept)} if kept else {})


def _spread(values: NDArray, low: float, high: float) -> dict[str, Any]:
    if not len(values):
        return {"mean": None, "p05": None, "p50": None, "p95": None, "histogram": []}
    histogram, _ = np.histogram(values, bins=20, range=(low, high))
    quantiles = np.quantile(values, [0.05, 0.5, 0.95])
    return {
        "mean": float(values.mean()),
        "p05": float(quantiles[0]),
        "p50": float(quantiles[1]),
        "p95": float(quantiles[2]),
        "range": [float(low), float(high)],
        "histogram": histogram.tolist(),
    }


def _console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    # No markup: texts, tokens and domains may have brackets.
    return Console(file=out, width=110, highlight=False, markup=False), out


def _as_text(facts: dict[str, Any]) -> str:
    console, out = _console()
    corpus = facts["corpus"]
    console.print(
        f"{facts['cache']}: {corpus['sequences']:,} sequences, {corpus['tokens']:,} tokens "
        f"(length {corpus['sequence_length']}, {corpus['packing']} packing, "
        f"vocabulary {corpus['vocabulary']:,}, {corpus['bytes'] / 1e6:.1f} MB)",
        soft_wrap=True,
    )
    for name, replicas in corpus["views"].items():
        shown = f", {replicas} replicas" if view_kind(name).masked else ""
        console.print(f"view {name}{shown}")
    if corpus["domains"]:
        shares = ", ".join(f"{name} {count:,}" for name, count in corpus["domains"].items())
        console.print(f"domains: {shares}", soft_wrap=True)
    table = Table(title=None)
    for heading in ("teacher", "task", "kept"):
        table.add_column(heading)
    for heading in ("coverage", "positions", "MB", "B/position", "B/token"):
        table.add_column(heading, justify="right")
    for name, t in facts["teachers"].items():
        kept = f"{t['kind']} {t['k'] or len(t['labels']) or ''}".replace("topk", "top")
        table.add_row(
            name,
            t["task"],
            kept,
            f"{t['coverage']:.1%}",
            f"{t['positions']:,}",
            f"{t['bytes'] / 1e6:.2f}",
            f"{t['bytes_per_position']:.1f}",
            f"{t['bytes_per_token']:.2f}",
        )
    console.print(table)
    for name, t in facts["teachers"].items():
        for number, run in enumerate(t["lineage"]):
            console.print(_lineage_line(name, number, run), soft_wrap=True)
    for name, t in facts["teachers"].items():
        if "elsewhere" in t:
            others = ", ".join(f"{there} {size:.0f}" for there, size in t["elsewhere"].items())
            console.print(
                f"{name}: {t['bytes_per_position']:.1f} bytes a position, all in (codec "
                f"{t['codec']}); candidates alone of the same k = {t['k']} elsewhere: {others}",
                soft_wrap=True,
            )
    for name, t in facts["teachers"].items():
        for key, unit in (("kept_mass", ""), ("entropy", " nats")):
            if t.get(key, {}).get("histogram"):
                console.print(_histogram_line(f"{name} {key.replace('_', ' ')}", t[key], unit))
    return out.getvalue()


def _lineage_line(name: str, number: int, run: dict[str, Any]) -> str:
    taught = ", ".join(f"{who} {weights[:12]}" for who, weights in run["teachers"].items())
    return (
        f"{name} lineage {number + 1}: {run['student']}, {run['steps']:,} steps on corpus "
        f"{run['corpus'][:12]}, taught by {taught or 'none'} -> weights {run['weights'][:12]}"
    )


def _histogram_line(title: str, spread: dict[str, Any], unit: str) -> Text:
    counts = np.array(spread["histogram"])
    heights = np.ceil(counts / max(counts.max(), 1) * (len(BARS) - 1)).astype(int)
    low, high = spread["range"]
    bars = "".join(BARS[h] for h in heights)
    return Text(
        f"{title:32} {low:.0f} {bars} {high:.1f}{unit}   "
        f"median {spread['p50']:.3f}, 5–95 %: {spread['p05']:.3f}–{spread['p95']:.3f}"
    )


def inspect_example(path: str, index: int, teacher: str | None, as_json: bool = False) -> str:
    """One example: its text, and what each teacher says of it."""
    cache = Cache.open(path)
    if teacher:
        cache.teacher(teacher)
    if not 0 <= index < len(cache):
        raise InputError(f"{path} has the examples 0..{len(cache) - 1}, not {index}")
    example = cache.example(index)
    if as_json:
        return json.dumps(_example_json(cache, example, teacher)) + "\n"
    console, out = _console()
    heading = f"example {index} · {example.digest} · document {example.document}"
    console.print(heading, soft_wrap=True)
    console.print(example.text, soft_wrap=True)
    tokenizer = cache.corpus.tokenizer.hf
    for name, targets in example.targets.items():
        if teacher in (None, name):
            for target in targets:
                shown = _rendered(name, target, cache, tokenizer)
                console.print(shown, soft_wrap=isinstance(shown, Text))
    return out.getvalue()


def _rendered(name: str, target: Any, cache: Cache, tokenizer: Any) -> Table | Text:
    labels = cache.teacher(name).info.label_names
    if isinstance(target, SequenceTargets):
        if cache.teacher(name).info.problem == "regression":
            return Text(f"{name}: score {target.logits[0]:.3f}")
        probs = np.exp(target.logits - target.logits.max())
        probs = probs / probs.sum()
        best = np.argsort(-probs)[:5]
        return Text(f"{name}: " + ", ".join(f"{labels[i]} {probs[i]:.3f}" for i in best))
    if isinstance(target, TokenLabelTargets):
        best = target.logits.argmax(axis=1)
        shown = [f"{p}:{labels[b]}" for p, b in zip(target.positions, best, strict=True)]
        return Text(f"{name}: " + " ".join(shown[:SHOWN_POSITIONS]))
    return _token_table(name, target, tokenizer)


def _token_table(name: str, target: TokenTargets, tokenizer: Any) -> Table:
    where = "" if target.replica is None else f", replica {target.replica}"
    table = Table(title=f"{name}{where}: {len(target.positions)} positions", title_justify="left")
    for heading in ("position", "true token", "rank", "top predictions", "tail"):
        table.add_column(heading)
    for row in range(min(len(target.positions), SHOWN_POSITIONS)):
        best = [
            f"{tokenizer.convert_ids_to_tokens(int(i))} {np.exp(p):.3f}"
            for i, p in zip(target.ids[row, :5], target.log_probs[row, :5], strict=True)
        ]
        table.add_row(
            str(target.positions[row]),
            Text(str(tokenizer.convert_ids_to_tokens(int(target.gold_ids[row])))),
            str(target.gold_rank[row]),
            Text("  ".join(best)),
            f"{np.exp(target.log_tail[1.0][row]):.3f}",
        )
    return table


def _example_json(cache: Cache, example: Example, teacher: str | None) -> dict[str, Any]:
    targets: dict[str, list[dict[str, Any]]] = {}
    for name, found in example.targets.items():
        if teacher in (None, name):
            targets[name] = [_plain(vars(target)) for target in found]
    shown = {"index": example.index, "digest": example.digest, "document": example.document}
    shown |= {"domain": example.domain, "text": example.text}
    return shown | {"input_ids": example.input_ids.tolist(), "targets": targets}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What ``json`` takes: arrays as lists, a logarithm of zero as null (JSON has no infinity)."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out[str(key)] = _plain(value)
        elif isinstance(value, np.ndarray):
            shown = value.astype(object)
            shown[np.isneginf(value)] = None
            out[str(key)] = shown.tolist()
        else:
            out[str(key)] = value
    return out
