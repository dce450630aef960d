"""Caches from strangers: any bytes give a typed error or sound data; no crash, no hang.

Level A: bytes changed under an intact commit record must be found, or what is read is what was
written. Level B: a stranger who signs what he changed (sizes, checksums, seals) must get a typed
error, or give data within the ranges that readers check. Cases run in forked children: a crash, a
hang or a memory bomb is a failure with the name of its case, not the end of the tests. A case is
called ``template mutator seed``: ``REKINDLE_FUZZ="dense b-words 17" pytest -s -k one_case`` runs it
alone, in this process.
"""

import dataclasses
import hashlib
import json
import math
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from rekindle.data.batch import SequenceTargetBatch, TokenTargetBatch
from rekindle.data.cache import Cache, write_manifest
from rekindle.data.corpus.corpus import build_corpus, unit_of
from rekindle.data.corpus.growth import CorpusConfig
from rekindle.data.errors import CacheError, RekindleError
from rekindle.data.storage import shards
from rekindle.data.storage.columns import list_views
from rekindle.data.storage.cuts import RowTexts
from rekindle.data.storage.seal import SEAL, VERSION, checksum, seal
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import LocalStore
from rekindle.data.targets.codec import encode
from rekindle.data.targets.codec_precise import encode_precise
from rekindle.data.targets.head import StoredHead, encode_hidden, write_head
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.scalars import ScalarSums
from rekindle.data.targets.schema import TeacherInfo, rank_dtype
from rekindle.data.views.masking import MaskConfig
from rekindle.data.views.views import MaskedView, PairView, ViewReader
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.train.order.split import split_corpus

GOLDEN = sorted(p for p in (Path(__file__).parents[1] / "golden").glob("cache-v*") if p.is_dir())
CASES_PER_CHILD = 300
SECONDS = 30  # of one case: it takes hundredths
ADDRESS_SPACE = 3 << 30  # bytes a child may map beyond what it begins with
RESIDENT = 256 << 20  # bytes by which one case may raise the peak: the caches hold some 100 kB


# --- the caches -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    """No test here pulls the plug: without fsync they take half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(shards, "new_attempt", lambda: "0000face")  # cases are the same every time
        yield


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
    """Row and position of every target of a vocabulary teacher in one unit."""
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
    """Columns of ``random`` targets: K draws, some ids twice."""
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
    """Random targets of ``count`` positions, as a writer of ours could have made them."""
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
        columns = {n: draw.random(shape).astype(np.float32) for n in schema.names[1:]}
        batches = kind_of(info).batches(schema, digests, np.flatnonzero(present), columns)
        facts["positions"] = int(present.sum())
    else:
        rows, positions = predicted(corpus, view, shard, replica)
        columns = {"positions": positions} | position_columns_of(draw, info, len(rows))
        batches = kind_of(info).batches(schema, digests, rows, columns)
        facts["positions"] = len(rows)
    if info.codec == "compact":
        options = pa.ipc.IpcWriteOptions(compression="zstd")
    sums = ScalarSums()
    batches = sums.over(batches)
    unit = unit_of(shard, replica)
    written = ShardSet(corpus.store, info.folder)
    written.write(unit, schema, batches, facts, options, info.rows_per_batch, sums.facts)


def write_teacher(corpus, shown, replicas=2, seed=0, **described):
    """A teacher with random targets, written as the pipeline writes them."""
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


@pytest.fixture(scope="module")
def templates(tmp_path_factory, corpus_file, wordpiece):
    """One small cache of each kind by name; no test writes into it."""
    root = tmp_path_factory.mktemp("templates")
    corpus_at(root / "short", corpus_file, wordpiece, length=12, limit=9, per_shard=5)
    # Its domains are nulls.
    corpus_at(root / "long", corpus_file, wordpiece, None, length=8, limit=131, per_shard=140)
    made = {path.name: path for path in GOLDEN}
    for name, parts in TEACHERS.items():
        path = made[name] = root / name
        shutil.copytree(root / ("long" if name == "tall" else "short"), path)
        corpus = Cache.open(path).corpus
        view = None
        if parts[0]["task"] == "masked_lm":
            view = MaskedView(corpus, MaskConfig(probability=0.3), seed=1, replicas=2)
        elif name == "pairs":
            view = PairView(corpus, "adjacent", seed=1)
        if view is not None:
            view.build()
        size = corpus.info["tokenizer"]["size"]
        for part in parts:
            vocabulary = {"vocabulary_size": size} if part["task"] in VOCABULARY_TASKS else {}
            write_teacher(corpus, view, name="teacher", **(vocabulary | part))
        write_manifest(LocalStore(path))
    return made


# --- reading everything ---------------------------------------------------------------------------


class Wrong(Exception):
    """Data that no reader should have given."""


def hold(truth, told):
    if not np.all(truth):
        raise Wrong(told)


def steps_of(path):
    """Name -> what reads a part of the cache; the first ones make what the later ones need."""

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
    if teacher.is_vocabulary:
        # Scalars are read past the checksums of whole record batches, so with an unread cache.
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
    """The batch, its invariants checked, with its targets decoded."""
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
    """Hash whatever readers return, exactly."""
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
    """Step -> its digest, or the typed error it raised. Anything else it raises is a failure."""
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


# --- what strangers do to files -------------------------------------------------------------------


class Stranger:
    """A cache to change: remembers what stood there, to put it back. Files are never changed in
    place: what the last case mapped must stay.
    """

    def __init__(self, root, draw=None):
        self.root, self.draw = root, draw or random.Random(0)
        self.files = sorted(p for p in root.rglob("*") if p.is_file())
        self.data = [p for p in self.files if p.suffix == ".arrow"]
        self.sealed = [
            p for p in self.files if p.suffix == ".json" and b'"record"' in p.read_bytes()
        ]
        self._before = {}

    def write(self, path, content):
        self._before.setdefault(path, path.read_bytes())
        temporary = path.with_name(".changed")
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def restore(self):
        for path, content in self._before.items():
            temporary = path.with_name(".changed")
            temporary.write_bytes(content)
            os.replace(temporary, path)
        self._before = {}

    def record_of(self, path):
        """The commit record of a data file."""
        unit = path.name.rsplit("-", 1)[0]
        return path.parents[1] / "commits" / f"{unit}.json"

    def commit(self, path, content, cuts=None, **changes):
        """Write a data file and a record that speaks the truth about it."""
        record = self.record_of(path)
        body = json.loads(record.read_bytes())
        body.pop(SEAL)
        cuts = cuts or recut([o + n for o, n, _ in body["regions"]], len(content))
        regions = [
            [a, b - a, xxhash.xxh3_64_hexdigest(content[a:b])]
            for a, b in zip([0, *cuts], cuts, strict=False)
        ]
        sha256 = hashlib.sha256(content).hexdigest()
        body |= {"bytes": len(content), "sha256": sha256, "regions": regions} | changes
        if "scalars" in body["facts"]:
            body["facts"].pop("scalars")
            if self.draw.random() < 0.7 and (sums := sums_of(content)):
                body["facts"]["scalars"] = sums
        self.write(path, content)
        self.write(record, sealed_record(body))
        if "corpus" in path.parts[-3:]:
            self.roll_up({})

    def roll_up(self, body):
        """cache.json, which says of the corpus what its shards are."""
        manifest = self.root / "cache.json"
        self.write(manifest, describe_as(json.loads(manifest.read_bytes()), body))


def recut(cuts, size):
    """The regions' ends, in a file of another size."""
    cuts = [c for c in cuts[:-1] if 0 < c < size]
    return [*cuts, size]


def sums_of(content):
    """The checksum of the scalar columns, where they can be read; what crashes is for the reader.

    Only of files that a writer of ours could read: never of lying offsets.
    """
    try:
        reader = pa.ipc.open_file(pa.py_buffer(content))
        sums = ScalarSums()
        for index in range(min(reader.num_record_batches, 100)):
            batch = reader.get_batch(index)
            batch.validate(full=True)
            sums.add(batch)
        return sums.facts().get("scalars")
    except Exception:
        return None


def sealed_record(body):
    return json.dumps(body | {SEAL: checksum(body)}).encode()


def describe_as(before, body):
    """A description as its format has it: sealed, or of format 1 without a seal."""
    if SEAL in before:
        return seal(body)
    return json.dumps(body | ({VERSION: before[VERSION]} if VERSION in before else {})).encode()


# Level A: bytes under an intact record ------------------------------------------------------------


def any_file(stranger):
    """A file whose bytes something vouches for."""
    vouched = [*stranger.data, *stranger.sealed, *stranger.root.glob("targets/*/*.safetensors")]
    # Half of the time a shard: there are more small files than these.
    return stranger.draw.choice(stranger.data if stranger.draw.random() < 0.6 else vouched)


def somewhere(draw, content):
    start = draw.randrange(len(content))
    return start, min(len(content), start + 2 ** draw.randrange(12))


def flipped(stranger):
    path = any_file(stranger)
    content = bytearray(path.read_bytes())
    for _ in range(stranger.draw.choice([1, 1, 1, 2, 8])):
        content[stranger.draw.randrange(len(content))] ^= 1 << stranger.draw.randrange(8)
    stranger.write(path, bytes(content))


def zeroed(stranger):
    path = any_file(stranger)
    content = bytearray(path.read_bytes())
    start, stop = somewhere(stranger.draw, content)
    content[start:stop] = bytes(stop - start)
    stranger.write(path, bytes(content))


def scrambled(stranger):
    path = any_file(stranger)
    content = bytearray(path.read_bytes())
    start, stop = somewhere(stranger.draw, content)
    content[start:stop] = stranger.draw.randbytes(stop - start)
    stranger.write(path, bytes(content))


def cut(stranger):
    path = any_file(stranger)
    content = path.read_bytes()
    stranger.write(path, content[: stranger.draw.randrange(len(content))])


def inserted(stranger):
    path = any_file(stranger)
    content = path.read_bytes()
    start, stop = somewhere(stranger.draw, content)
    more = stranger.draw.choice([content[start:stop], bytes(stop - start), b"\0", b" "])
    stranger.write(path, content[:start] + more + content[start:])


def spliced(stranger):
    first, second = any_file(stranger), any_file(stranger)
    start = stranger.draw.randrange(len(first.read_bytes()))
    stranger.write(first, first.read_bytes()[:start] + second.read_bytes()[start:])


def exchanged(stranger):
    first, second = stranger.draw.sample(stranger.data, 2)
    ours, theirs = first.read_bytes(), second.read_bytes()
    stranger.write(first, theirs)
    stranger.write(second, ours)


def exchanged_with_records(stranger):
    """Two units of one set, each with its own record: the records name the units they are of."""
    first, second = stranger.draw.sample(stranger.data, 2)
    for a, b in ((first, second), (stranger.record_of(first), stranger.record_of(second))):
        ours, theirs = a.read_bytes(), b.read_bytes()
        stranger.write(a, theirs)
        stranger.write(b, ours)


# Level B: signed ----------------------------------------------------------------------------------

WORDS = [0, 1, 2, 3, 7, 8, 64, 127, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
WORDS += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8]


def footer_of(content):
    (length,) = struct.unpack("<i", content[-10:-6])
    return max(0, len(content) - 10 - length), len(content)


def metadata_of(content, regions):
    """Where the file describes itself: the schema, each record batch's head, the footer."""
    places = [footer_of(content)]
    starts = [8, *(offset for offset, _, _ in regions[1:-1])]
    (length,) = struct.unpack("<i", content[12:16])
    starts.append(16 + length)
    for start in starts:
        if start + 8 <= len(content):
            (length,) = struct.unpack("<i", content[start + 4 : start + 8])
            if 0 < length < len(content):
                places.append((start, min(len(content), start + 8 + length)))
    return places


def words(stranger):
    """Words of the metadata (mostly) become others: lengths, offsets, counts, types."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    content = bytearray(path.read_bytes())
    regions = json.loads(stranger.record_of(path).read_bytes())["regions"]
    places = metadata_of(content, regions)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        start, stop = draw.choice(places) if draw.random() < 0.85 else (0, len(content))
        size = draw.choice([1, 2, 4, 4, 8, 8])
        at = start + draw.randrange(max(1, stop - start - size)) // size * size
        old = int.from_bytes(content[at : at + size], "little")
        new = draw.choice(
            [*WORDS, old + 1, old - 1, old + 8, old * 2, old ^ 1 << draw.randrange(8)]
        )
        new = new % (1 << 8 * size)
        content[at : at + size] = new.to_bytes(size, "little")[: len(content[at : at + size])]
    stranger.commit(path, bytes(content))


def signed(change):
    """A change of level A to a shard, with a record that agrees."""

    def changed(stranger):
        path = stranger.draw.choice(stranger.data)
        stranger.data, others = [path], stranger.data
        stranger.draw.random, chance = lambda: 0.0, stranger.draw.random
        try:
            change(stranger)
        finally:
            stranger.data = others
            stranger.draw.random = chance
        content = path.read_bytes()
        if content:
            stranger.commit(path, content)

    return changed


def exchanged_and_signed(stranger):
    """Another unit's bytes, truly described: of another shard, replica, view or teacher."""
    first, second = stranger.draw.sample(stranger.data, 2)
    theirs = json.loads(stranger.record_of(second).read_bytes())
    cuts = [o + n for o, n, _ in theirs["regions"]]
    changes = {"rows": theirs["rows"]}
    if "rows_per_batch" in theirs:
        changes["rows_per_batch"] = theirs["rows_per_batch"]
    stranger.commit(first, second.read_bytes(), cuts, **changes)


def offsets(stranger):
    """A word of a list's or a text's offsets lies; nothing else does."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    content = path.read_bytes()
    reader = pa.ipc.open_file(pa.py_buffer(content))
    batch = reader.get_batch(draw.randrange(reader.num_record_batches))
    column = batch[draw.choice([n for n in batch.schema.names if has_offsets(batch[n])])]
    known = column.buffers()[1].to_pybytes()[: 4 * (len(column) + 1)]
    at = content.find(known)
    if at < 0:  # compressed
        return words(stranger)
    slot = at + 4 * draw.randrange(len(column) + 1)
    (old,) = struct.unpack("<i", content[slot : slot + 4])
    new = draw.choice([0, -1, old + 1, old - 1, 10**6, 2**31 - 1, -(2**31), 2 * old])
    new = max(-(2**31), min(2**31 - 1, new))
    stranger.commit(path, content[:slot] + struct.pack("<i", new) + content[slot + 4 :])
    return None


def has_offsets(column):
    return pa.types.is_list(column.type) or pa.types.is_string(column.type)


def batches_of(path):
    reader = pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)], reader.schema


def rewrite(stranger, path, schema, batches, compression=None, **options):
    """Write a shard anew, as Arrow writes it, with a true record."""
    sink = pa.BufferOutputStream()
    cuts = []
    settings = pa.ipc.IpcWriteOptions(compression=compression, **options)
    with pa.ipc.new_file(sink, schema, options=settings) as writer:
        for batch in batches:
            writer.write_batch(batch)
            cuts.append(sink.tell())
    content = sink.getvalue().to_pybytes()
    record = json.loads(stranger.record_of(path).read_bytes())
    rows = sum(batch.num_rows for batch in batches)
    changes = {"rows": rows if stranger.draw.random() < 0.8 else record["rows"]}
    stranger.commit(path, content, [*cuts, len(content)], **changes)


def compression_of(path):
    return "zstd" if b"ids_class" in path.read_bytes() else None


def leaf(draw, dtype, size):
    if pa.types.is_floating(dtype):
        return draw.choice([math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, None])
    if pa.types.is_boolean(dtype):
        return draw.choice([True, False, None])
    if pa.types.is_integer(dtype):
        low = -(2 ** (dtype.bit_width - 1)) if pa.types.is_signed_integer(dtype) else 0
        high = 2**dtype.bit_width - 1 + low
        wild = [low, high, 0, 1, size, size - 1, draw.randint(low, high), None]
        return draw.choice([w for w in wild if w is None or low <= w <= high])
    return draw.choice(["", "x", "\ufffd" * 9, "ü" * 100, None])


def other_value(draw, value, dtype, size):
    """``value`` of an Arrow type with something in it changed."""
    if not hasattr(dtype, "value_type"):
        return leaf(draw, dtype, size)
    if value is None:
        return [[], None][draw.randrange(2)] if pa.types.is_list(dtype) else None
    fixed = pa.types.is_fixed_size_list(dtype)
    kind = draw.random()
    if not fixed and kind < 0.1:
        return value[: draw.randrange(len(value) + 1)]
    if not fixed and kind < 0.2:
        return (
            value + [value[-1]] * draw.choice([1, 2, 70_000 if len(value) < 3 else 9])
            if value
            else None
        )
    if not value or (not fixed and kind < 0.25):
        return None
    value = list(value)
    at = draw.randrange(len(value))
    value[at] = other_value(draw, value[at], dtype.value_type, size)
    return value


def values(stranger):
    """Cells become others: extremes, nulls, NaN, longer and shorter lists."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    batches, schema = batches_of(path)
    number = draw.randrange(len(batches))
    columns = {n: batches[number][n].to_pylist() for n in schema.names}
    size = draw.choice([24, 300, 200_000])
    for _ in range(draw.choice([1, 1, 2, 20])):
        name = draw.choice(schema.names)
        row = draw.randrange(len(columns[name]))
        columns[name][row] = other_value(draw, columns[name][row], schema.field(name).type, size)
    if draw.random() < 0.3:
        same_lengths(draw, columns, schema)
    arrays = [pa.array(columns[n], schema.field(n).type) for n in schema.names]
    batches[number] = pa.record_batch(arrays, schema=schema)
    rewrite(stranger, path, schema, batches, compression_of(path))


def same_lengths(draw, columns, schema):
    """One row's lists all become shorter or longer together."""
    lists = [field.name for field in schema if pa.types.is_list(field.type)]
    row = draw.randrange(len(next(iter(columns.values()))))
    more = draw.random() < 0.5
    for name in lists:
        value = columns[name][row]
        if value:
            columns[name][row] = [*value, value[-1]] if more else value[:-1]


def retyped(draw, array):
    """The same values as another type, as far as they have one."""
    kinds = [
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.int64(),
        pa.float32(),
        pa.null(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.int64()),
        pa.list_(pa.string()),
        pa.large_list(pa.int32()),
        pa.list_view(pa.int32()),
        pa.list_(pa.int32(), 3),
        pa.struct([("a", pa.int32())]),
        pa.uint16(),
        pa.float64(),
        pa.bool_(),
        pa.run_end_encoded(pa.int32(), pa.string()),
        pa.map_(pa.string(), pa.int32()),
        pa.decimal128(5, 2),
        pa.timestamp("s"),
    ]
    kind = draw.choice(kinds)
    try:
        return pa.array(array.to_pylist(), kind)
    except (pa.ArrowException, TypeError, ValueError, NotImplementedError, OverflowError):
        try:
            return pa.nulls(len(array), kind)
        except pa.ArrowException:
            return pa.nulls(len(array))


def columns_changed(stranger):
    """Other columns than announced: fewer, twice, in another order, of another type or name."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    batches, schema = batches_of(path)
    names = list(schema.names)
    at = draw.randrange(len(names))
    what = draw.choice(["drop", "twice", "order", "rename", "type", "type", "type", "extension"])
    arrays = [[batch.column(i) for i in range(len(names))] for batch in batches]
    if what == "drop":
        names.pop(at)
        _ = [row.pop(at) for row in arrays]
    elif what == "twice":
        names.append(names[at])
        _ = [row.append(row[at]) for row in arrays]
    elif what == "order":
        order = draw.sample(range(len(names)), len(names))
        names = [names[i] for i in order]
        arrays = [[row[i] for i in order] for row in arrays]
    elif what == "rename":
        names[at] = draw.choice(["", "x", *names])
    elif what == "type":
        state = draw.getstate()
        for row in arrays:
            draw.setstate(state)
            row[at] = retyped(draw, row[at])
        if len({str(row[at].type) for row in arrays}) > 1:
            arrays = [[*row[:at], pa.nulls(len(row[at])), *row[at + 1 :]] for row in arrays]
    fields = [pa.field(n, a.type) for n, a in zip(names, arrays[0], strict=True)]
    if what == "extension":
        of = draw.choice(["arrow.uuid", "arrow.json", "arrow.opaque", "arrow.py_extension_type"])
        about = {"ARROW:extension:name": of, "ARROW:extension:metadata": "x"}
        fields[at] = fields[at].with_metadata(about)
    changed = pa.schema(fields, metadata=schema.metadata)
    remade = [pa.RecordBatch.from_arrays(row, schema=changed) for row in arrays]
    rewrite(stranger, path, changed, remade, compression_of(path))


def batches_changed(stranger):
    """Record batches twice, left out, cut, joined, in another order, compressed, of old format."""
    draw, path = stranger.draw, stranger.draw.choice(stranger.data)
    batches, schema = batches_of(path)
    what = draw.choice(
        ["none", "twice", "less", "cut", "join", "order", "zstd", "lz4", "v4", "stream"]
    )
    at = draw.randrange(len(batches))
    options = {"compression": compression_of(path)}
    if what == "none":
        batches = []
    elif what == "twice":
        batches.insert(at, batches[at])
    elif what == "less":
        batches.pop(at)
    elif what == "cut":
        size = batches[at].num_rows // 2
        batches[at : at + 1] = [batches[at].slice(0, size), batches[at].slice(size)]
    elif what == "join":
        batches = pa.Table.from_batches(batches).combine_chunks().to_batches()
    elif what == "order":
        draw.shuffle(batches)
    elif what in ("zstd", "lz4"):
        options["compression"] = what
    elif what == "v4":
        options["metadata_version"] = pa.ipc.MetadataVersion.V4
    else:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            _ = [writer.write_batch(batch) for batch in batches]
        return stranger.commit(path, sink.getvalue().to_pybytes())
    return rewrite(stranger, path, schema, batches, **options)


DEEP = "deep nesting stands here"
ODD = [None, True, False, -1, 0, 1, 2, 3, 1.5, -0.0, 1e308, math.nan, math.inf, -math.inf]
ODD += [2**31 - 1, 2**31, -(2**63), 2**63 - 1, 2**63, 2**70, 10**12, 10**400]
ODD += ["", "x", "1", "../../x", "/etc/passwd", "a\0b", "\ud800", "a" * 5000, "masked-x", "pairs-x"]
ODD += ["masked-../../x", "topk", "tails", "dense", "hidden", "sequence", "token", "random"]
ODD += ["causal_lm", "masked_lm", "regression", "compact", "precise", DEEP]
ODD += [[], {}, [[]], [None], {"a": 1}, [1, 2, 3], {"shards": 3, "sequences": 9}, [0.0], [math.nan]]


def inner_paths(value, path=()):
    """The place of everything in nested JSON, outer things first."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from inner_paths(item, (*path, key))


def json_changed(draw, value):
    """Nested JSON with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = [p for p in inner_paths(value) if p]
        if not places:
            return draw.choice(ODD)
        depth = draw.choice(sorted({len(p) for p in places}))
        *outer, key = draw.choice([p for p in places if len(p) == depth])
        holder = value
        for part in outer:
            holder = holder[part]
        what = draw.random()
        if what < 0.15:
            del holder[key]
        elif what < 0.2 and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif what < 0.25 and isinstance(holder, dict):
            holder[draw.choice(["x", "after", "part", "extends", "rows_per_batch", "scalars"])] = (
                draw.choice(ODD)
            )
        elif what < 0.4 and isinstance(holder[key], int):
            holder[key] += draw.choice([1, -1, 1000, -1000])
        elif what < 0.45:
            holder[key] = [holder[key]]
        elif what < 0.5:
            holder[key] = str(holder[key])
        else:
            holder[key] = draw.choice(ODD)
    return value


def as_file(content):
    """JSON that is nested a hundred thousand deep cannot be made, but it can be written."""
    deep = b"[" * 100_000 + b"]" * 100_000
    return content.replace(json.dumps(DEEP).encode(), deep)


def record(stranger):
    """A commit record that says something else, with a right checksum."""
    path = stranger.record_of(stranger.draw.choice(stranger.data))
    body = json.loads(path.read_bytes())
    body.pop(SEAL)
    body = json_changed(stranger.draw, body)
    sealed = sealed_record(body) if isinstance(body, dict) else json.dumps(body).encode()
    stranger.write(path, as_file(sealed))
    if stranger.draw.random() < 0.5:
        stranger.roll_up({})


def descriptions(stranger):
    return [
        p
        for p in stranger.files
        if p.suffix == ".json"
        and not {"commits", "tokenizer"} & {*p.relative_to(stranger.root).parts}
    ]


def description(stranger):
    """A description that says something else, with a right seal."""
    path = stranger.draw.choice(descriptions(stranger))
    before = json.loads(path.read_bytes())
    body = {k: v for k, v in before.items() if k not in (SEAL, VERSION)}
    changed = json_changed(stranger.draw, body)
    whole = isinstance(changed, dict)
    content = describe_as(before, changed) if whole else json.dumps(changed).encode()
    stranger.write(path, as_file(content))


def agreed(stranger):
    """A description and all its shards that say the same other thing."""
    draw = stranger.draw
    names = ("teacher.json", "corpus.json", "view.json")
    path = draw.choice([p for p in descriptions(stranger) if p.name in names])
    before = json.loads(path.read_bytes())
    body = {k: v for k, v in before.items() if k not in (SEAL, VERSION)}
    changed = json_changed(draw, body)
    if not isinstance(changed, dict) or json.dumps(DEEP) in json.dumps(changed):
        return description(stranger)
    stranger.write(path, describe_as(before, changed))
    chance = draw.random() < 0.3  # the columns change with what is said of them
    for file in sorted((path.parent / "data").glob("*.arrow")):
        batches, schema = batches_of(file)
        about = json.loads(schema.metadata[b"rekindle"])
        if path.name == "teacher.json":
            about["teacher"] = changed
        else:
            about |= {key: value for key, value in changed.items() if key in about}
        schema = schema.with_metadata({"rekindle": json.dumps(about)})
        batches = [batch.replace_schema_metadata(schema.metadata) for batch in batches]
        if chance and path.name == "teacher.json":
            schema, batches = announced(changed, schema, batches)
        rewrite(stranger, file, schema, batches, compression_of(file))
    if path.name == "corpus.json":
        stranger.roll_up({})
    return None


def announced(described, schema, batches):
    """Null or zero columns of the types that a changed description asks for, where it can be."""
    try:
        wanted = kind_of(TeacherInfo(**described)).schema({})
    except Exception:
        return schema, batches
    if any(str(field.type).count("[") and width_of(field.type) > 4096 for field in wanted):
        return schema, batches
    wanted = wanted.with_metadata(schema.metadata)
    remade = []
    for batch in batches:
        arrays = []
        for field in wanted:
            same = field.name in batch.schema.names and batch[field.name].type == field.type
            empty = [[]] * len(batch) if pa.types.is_list(field.type) else [None] * len(batch)
            arrays.append(batch[field.name] if same else pa.array(empty, field.type))
        remade.append(pa.RecordBatch.from_arrays(arrays, schema=wanted))
    return wanted, remade


def width_of(dtype):
    return getattr(dtype, "list_size", 1) * (
        width_of(dtype.value_type) if hasattr(dtype, "value_type") else 1
    )


def head(stranger):
    """Another output matrix, or none at all, with its own sha256."""
    draw = stranger.draw
    path = draw.choice(list(stranger.root.glob("targets/*/head.safetensors")))
    from safetensors.numpy import load, save

    content = path.read_bytes()
    tensors = load(content)
    what = draw.choice(["bytes", "shape", "dtype", "values", "names", "bias", "header"])
    if what == "bytes":
        content = bytearray(content)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        content = bytes(content)
    elif what == "header":
        start = draw.choice([0, 0, *range(8, 100)])
        word = draw.choice(WORDS).to_bytes(8, "little")
        content = content[:start] + word + content[start + 8 :]
    else:
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        shapes = [tensor.T, tensor[:-1], tensor[..., :-1], tensor.reshape(-1), tensor[None]]
        changed = {
            "shape": draw.choice(shapes),
            "dtype": tensor.astype(draw.choice([np.float16, np.float64, np.int8, np.bool_])),
            "values": np.where(draw.random() < 2, tensor * np.nan, tensor),
            "names": tensor,
            "bias": tensor[:1],
        }[what]
        if what == "values":
            changed = tensor.copy()
            odd = [np.nan, np.inf, -np.inf, 3e38, -3e38]
            changed.flat[draw.randrange(changed.size)] = draw.choice(odd)
        if what == "names":
            tensors.pop(name)
            name = draw.choice(["x", "", "weights"])
        content = save(tensors | {name: np.ascontiguousarray(changed)})
    stranger.write(path, content)
    about = path.with_name("head.json")
    body = json.loads(about.read_bytes())
    kept = {k: v for k, v in body.items() if k not in (SEAL, VERSION)}
    stranger.write(about, seal(kept | {"sha256": hashlib.sha256(content).hexdigest()}))


LEVEL_A = {
    "a-flipped": flipped,
    "a-zeroed": zeroed,
    "a-scrambled": scrambled,
    "a-cut": cut,
    "a-inserted": inserted,
    "a-spliced": spliced,
    "a-exchanged": exchanged,
    "a-records": exchanged_with_records,
}
LEVEL_B = {
    "b-words": words,
    "b-flipped": signed(flipped),
    "b-zeroed": signed(zeroed),
    "b-scrambled": signed(scrambled),
    "b-cut": signed(cut),
    "b-inserted": signed(inserted),
    "b-exchanged": exchanged_and_signed,
    "b-offsets": offsets,
    "b-values": values,
    "b-columns": columns_changed,
    "b-batches": batches_changed,
    "b-record": record,
    "b-description": description,
    "b-agreed": agreed,
    "b-head": head,
}
MUTATORS = LEVEL_A | LEVEL_B
# How often each is drawn: what reaches deep is tried more often.
WEIGHTS = {"b-words": 6, "b-values": 5, "b-offsets": 3, "b-agreed": 5, "b-description": 5}
WEIGHTS |= {"b-record": 4, "b-columns": 3, "a-flipped": 3, "b-flipped": 2}


# --- running cases --------------------------------------------------------------------------------


def run_case(case, stranger, sound):
    """None, or what went wrong with one case."""
    template, mutator, seed = case
    stranger.draw = random.Random(f"{template} {mutator} {seed}")
    try:
        MUTATORS[mutator](stranger)
        found = read_everything(stranger.root)
    except Wrong as error:
        return str(error), ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if f.filename != __file__ and "/lib/" not in f.filename]
        ours = [f for f in ours if f.filename.endswith(".py")] or frames
        place = f"{Path(ours[-1].filename).name}, {ours[-1].name}"
        return f"{type(error).__name__} in {place}", repr(str(error)[:150])
    finally:
        stranger.restore()
    if mutator in LEVEL_A:
        for step, digest in found.items():
            if mutator == "a-records" and step.endswith(" facts"):
                continue  # sizes and counts are the records' own word, until a shard is opened
            if not isinstance(digest, RekindleError) and digest != sound.get(step):
                return "other data than was written", step
    return None


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def child(cases, first, templates, folder, place, out):
    """Run the cases from ``first`` on, telling where it is; never returns."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # also ends a loop in C
    strangers, sound = {}, {}
    with open(out, "a") as told:
        for number in range(first, len(cases)):
            place[:8] = struct.pack("<q", number)
            name = cases[number][0]
            if name not in strangers:
                shutil.copytree(templates[name], folder / name, dirs_exist_ok=True)
                strangers[name] = Stranger(folder / name)
                sound[name] = read_everything(folder / name)
            before = peak()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            wrong = run_case(cases[number], strangers[name], sound[name])
            signal.setitimer(signal.ITIMER_REAL, 0)
            grown = peak() - before
            if wrong is None and grown > RESIDENT:
                wrong = "too much memory", f"{grown:,} bytes"
            if wrong is not None:
                told.write(json.dumps([number, *wrong]) + "\n")
                told.flush()
            if grown > RESIDENT:
                place[:8] = struct.pack("<q", number + 1)
                os._exit(3)  # the peak would hide the next case's
    os._exit(0)


def run_cases(cases, templates, folder):
    """(case, what went wrong) of those that failed. Each few hundred in a child of their own."""
    failed = []
    for start in range(0, len(cases), CASES_PER_CHILD):
        part = cases[start : start + CASES_PER_CHILD]
        first = 0
        while first < len(part):
            first, failures = run_child(part, first, templates, folder)
            failed += failures
    return failed


def run_child(cases, first, templates, folder):
    place = mmap.mmap(-1, 8)
    place[:8] = struct.pack("<q", first)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    out = work / "told.jsonl"
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            child(cases, first, templates, work, place, out)
        except BaseException:
            traceback.print_exc()
        os._exit(2)
    _, status = os.waitpid(process, 0)
    (at,) = struct.unpack("<q", place[:8])
    told = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    failures = [(cases[number], wrong, about) for number, wrong, about in told]
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return len(cases), failures
    if code == 3:
        return at, failures
    assert code < 0, f"the child itself failed at {cases[at]}"
    return at + 1, [*failures, (cases[at], f"died of {signal.Signals(-code).name}", "")]


def cases_of(templates, count, first=0):
    """``count`` cases over all caches and mutators, the same every time."""
    draw = random.Random(f"cases {first}")
    cases = []
    while len(cases) < count:
        mutator = draw.choices([*MUTATORS], [WEIGHTS.get(name, 1) for name in MUTATORS])[0]
        template = "hidden" if mutator == "b-head" else draw.choice(sorted(templates))
        cases.append((template, mutator, first + len(cases)))
    return cases


def explained(failed):
    """The failures by what went wrong, with a case of each to run again."""
    kinds = Counter(wrong for _, wrong, _ in failed)
    first = {wrong: (case, about) for case, wrong, about in reversed(failed)}
    lines = [f"{len(failed)} cases failed, in {len(kinds)} ways:"]
    for wrong, count in kinds.most_common():
        case, about = first[wrong]
        lines.append(f"  {count:4} x {wrong} [{' '.join(map(str, case))}] {about}")
    return "\n".join(lines)


def test_caches_are_sound_before_they_are_changed(templates):
    for name, path in templates.items():
        assert verify_cache(str(path)).problems == [], name
        found = read_everything(path)
        assert not {k: v for k, v in found.items() if isinstance(v, Exception)}, name
        assert found == read_everything(path), name


def test_strangers_get_typed_errors_or_give_sound_data(templates, tmp_path):
    failed = run_cases(cases_of(templates, 400), templates, tmp_path)
    assert not failed, explained(failed)


def test_a_small_file_does_not_fill_the_memory(templates, tmp_path):
    """Zeros that zstd packs 10,000 to 1: 6 kB must not become a gigabyte before it is refused."""
    shutil.copytree(templates["compact"], tmp_path / "cache")
    stranger = Stranger(tmp_path / "cache")
    path = next(p for p in stranger.data if "targets" in p.parts)
    (batch,), schema = batches_of(path)
    positions = 1_500_000
    ends = pa.array([0] + [positions] * batch.num_rows, pa.int32())
    arrays = [batch["digest"]]
    for field in list(schema)[1:]:
        width = field.type.value_type.list_size
        zeros = pa.FixedSizeListArray.from_arrays(np.zeros(positions * width, np.uint8), width)
        arrays.append(pa.ListArray.from_arrays(ends, zeros))
    bomb = pa.record_batch(arrays, schema=schema)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(bomb)
        cuts = [sink.tell()]
    content = sink.getvalue().to_pybytes()
    del bomb, arrays, zeros, batch
    body = json.loads(stranger.record_of(path).read_bytes())
    body["facts"].pop("scalars", None)
    body.pop(SEAL)
    stranger.write(stranger.record_of(path), sealed_record(body))
    stranger.commit(path, content, [*cuts, len(content)])
    assert len(content) < 20_000
    process = os.fork()
    if process == 0:
        before = peak()
        try:
            cache = Cache.open(tmp_path / "cache")
            view = cache.teacher("teacher").info.view
            with pytest.raises(CacheError):
                cache.gather(np.arange(3), ["teacher"], masked_view=view)
            os._exit(0 if peak() - before < RESIDENT else 1)
        finally:
            os._exit(2)
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_strangers_get_typed_errors_or_give_sound_data(templates, tmp_path, part):
    failed = run_cases(cases_of(templates, 3_000, 10_000 * (part + 1)), templates, tmp_path)
    assert not failed, explained(failed)


@pytest.mark.skipif("REKINDLE_FUZZ" not in os.environ, reason="REKINDLE_FUZZ names no case")
def test_one_case(templates, tmp_path):
    template, mutator, seed = os.environ["REKINDLE_FUZZ"].split()
    shutil.copytree(templates[template], tmp_path / "cache")
    stranger = Stranger(tmp_path / "cache", random.Random(f"{template} {mutator} {seed}"))
    MUTATORS[mutator](stranger)
    for step, found in read_everything(tmp_path / "cache").items():
        print(f"{step}: {type(found).__name__} {found}")
