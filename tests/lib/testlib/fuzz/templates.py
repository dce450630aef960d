"""Small caches of every kind, with random targets written like the pipeline's."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.storage.columns import list_views
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import unit_of
from rekindle.data.targets.codec import encode
from rekindle.data.targets.codec_precise import encode_precise
from rekindle.data.targets.head import StoredHead, encode_hidden, write_head
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.scalars import ScalarChecksum
from rekindle.data.targets.schema import TeacherInfo, rank_dtype
from rekindle.data.views.reader import ViewReader

TESTS = Path(__file__).parents[3]
GOLDEN = sorted(p for p in (TESTS / "golden").glob("cache-v*") if p.is_dir())


def corpus_at(path, source, tokenizer, domain="domain", *, length, limit, per_shard):
    store = LocalStore(path)
    store.create("cache.json", seal({}))
    config = CorpusConfig(
        source=(str(source),),
        domain_field=domain,
        tokenizer=str(tokenizer),
        sequence_length=length,
        limit_sequences=limit,
    )
    return build_corpus(store, config, per_shard)


def predicted(corpus, view, shard, replica):
    """Return row and position of every target of a vocabulary teacher in one unit."""
    parts = []
    for index in range(corpus.shard(shard).batch_count):
        if view is None:
            offsets, _ = list_views(corpus.shard(shard).batch(index)["input_ids"], "input_ids")
            parts += [np.arange(n - 1) for n in np.diff(offsets)]
        else:
            offsets, flat = list_views(view.batch(shard, index, replica)["positions"], "positions")
            parts += [flat[a:b] for a, b in pairwise(offsets)]
    rows = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    return rows, np.concatenate(parts).astype(np.uint16)


def drawn(draw, info, count):
    """Return columns of ``random`` targets: K draws, some ids twice."""
    ids = np.full((count, info.k), -1, np.int64)
    counts = np.zeros((count, info.k), np.uint8)
    for row in range(count):
        found, times = np.unique(
            draw.integers(0, info.vocabulary_size, info.k) // 3 * 3, return_counts=True
        )
        ids[row, : len(found)], counts[row, : len(found)] = found, times
    return {"ids": ids, "counts": counts}


def candidates(draw, info, count):
    size, k = info.vocabulary_size, info.k
    ids = np.array([draw.choice(size, k, replace=False) for _ in range(count)]).reshape(count, k)
    log_probs = np.sort(draw.normal(-3, 1, (count, k)))[:, ::-1].astype(np.float32)
    odds = draw.normal(0, 2, (count, len(info.temperatures))).astype(np.float32)
    odds[::3] = np.inf
    if info.codec == "precise":
        return encode_precise(ids, log_probs, odds, size)
    return encode(ids, log_probs, odds, size)


def position_columns_of(draw, info, count):
    """Return random targets of ``count`` positions that one of our writers could have made."""
    if info.kind == "tails":
        shape = (count, len(info.temperatures))
        return {"tail_log_odds": draw.integers(-9000, 9000, shape).astype(np.int16)}
    if info.kind == "token":
        return {"logits": draw.normal(size=(count, info.num_labels)).astype(np.float32)}
    scalars = {
        "gold_log_prob": draw.integers(0, 9000, count).astype(np.uint16),
        "gold_rank": draw.integers(0, 30, count).astype(rank_dtype(info.vocabulary_size)),
        "entropy": draw.integers(0, 9000, count).astype(np.uint16),
    }
    if info.kind == "dense":
        logits = draw.normal(size=(count, info.vocabulary_size))
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return {"log_probs": logits.astype(np.float32)} | scalars
    if info.kind == "hidden":
        states = draw.normal(size=(count, info.hidden_size)).astype(np.float32)
        stored, scale = encode_hidden(states)
        return {"hidden": stored, "hidden_scale": scale} | scalars
    return (drawn if info.kind == "random" else candidates)(draw, info, count) | scalars


def write_unit(corpus, info, view, shard, replica, draw):
    table = corpus.shard(shard).table()
    digests = table["digest"].to_pylist()
    schema = kind_of(info).schema({"shard": shard, "replica": replica})
    facts = {"tokens": 0, "corpus_sha256": corpus.commits[shard].sha256}
    options = None
    if info.kind == "sequence":
        present = np.array(
            [info.domains is None or d in info.domains for d in table["domain"].to_pylist()]
        )
        shape = (len(digests), info.num_labels)
        columns = {n: draw.random(shape).astype(np.float32)[present] for n in schema.names[1:]}
        batches = kind_of(info).batches(schema, digests, np.flatnonzero(present), columns)
        facts["positions"] = int(present.sum())
    else:
        rows, positions = predicted(corpus, view, shard, replica)
        columns = {"positions": positions} | position_columns_of(draw, info, len(rows))
        batches = kind_of(info).batches(schema, digests, rows, columns)
        facts["positions"] = len(rows)
    if info.codec == "compact":
        options = pa.ipc.IpcWriteOptions(compression="zstd")
    checksum = ScalarChecksum()
    batches = checksum.pass_through(batches)
    unit = unit_of(shard, replica)
    written = ShardSet(corpus.store, info.folder)
    written.write(unit, schema, batches, facts, options, info.rows_per_batch, checksum.facts)


def write_teacher(corpus, shown, replicas=2, seed=0, **described):
    """Write a teacher with random targets, as the pipeline writes them."""
    named = {"view": "clean" if shown is None else shown.name}
    info = TeacherInfo(**(named | described))
    draw = np.random.default_rng(seed)
    corpus.store.create(f"{info.folder}/teacher.json", seal(info.model_dump(mode="json")))
    if info.kind == "hidden":
        shape = (info.vocabulary_size, info.hidden_size)
        weight, bias = draw.normal(size=shape), draw.normal(size=shape[0])
        head = StoredHead(weight.astype(np.float32), bias.astype(np.float32), 0.5, 9.0)
        write_head(corpus.store, info.folder, head)
    masked = info.view.startswith("masked-")
    reader = ViewReader(corpus, info.view) if masked else None
    for shard in range(len(corpus.commits)):
        for replica in range(replicas) if masked else [None]:
            write_unit(corpus, info, reader, shard, replica, draw)


MASKED_LM = {"task": "masked_lm", "kind": "topk", "k": 4, "temperatures": (1.0, 2.0)}
CAUSAL_LM = MASKED_LM | {"task": "causal_lm"}
SEQUENCE = {"task": "sequence_classification", "kind": "sequence", "num_labels": 3}
TEACHERS = {
    "default": [MASKED_LM],
    "precise": [
        CAUSAL_LM | {"codec": "precise", "rows_per_batch": 2},
        CAUSAL_LM | {"codec": "precise", "k": 6, "part": "k6", "rows_per_batch": 4},
        {
            "task": "causal_lm",
            "codec": "precise",
            "kind": "tails",
            "temperatures": (4.0,),
            "part": "t4",
            "extends": "k6",
            "rows_per_batch": 4,
        },
    ],
    "compact": [MASKED_LM | {"codec": "compact", "k": 12, "vocabulary_size": 128_256}],
    "threshold": [MASKED_LM | {"kind": "threshold", "temperatures": (2.0,)}],
    "random": [CAUSAL_LM | {"kind": "random", "k": 7, "temperatures": (1.0,)}],
    "dense": [MASKED_LM | {"kind": "dense", "k": None, "temperatures": (), "vocabulary_size": 24}],
    "hidden": [
        CAUSAL_LM
        | {"kind": "hidden", "k": None, "temperatures": (), "hidden_size": 5}
        | {"vocabulary_size": 24, "rows_per_batch": 2}
    ],
    "sequence": [SEQUENCE | {"view": "text", "monte_carlo_passes": 2, "domains": ("even",)}],
    "pairs": [SEQUENCE],
    "token": [SEQUENCE | {"task": "token_classification", "kind": "token", "view": "text"}],
    "big": [CAUSAL_LM | {"vocabulary_size": 200_000, "k": 5}],
    "tall": [MASKED_LM | {"k": 3}],
    "drawn": [
        CAUSAL_LM
        | {"kind": "random", "k": 7, "temperatures": (1.0,), "vocabulary_size": 200_000}
        | {"rows_per_batch": 1}
    ],
}
VOCABULARY_TASKS = ("masked_lm", "causal_lm")
