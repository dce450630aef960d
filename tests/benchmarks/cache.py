"""Reads and writes of the cache beside what else would hold the same targets, in one run.

    python tests/benchmarks/cache.py [--toy] [--positions N] [--csv PATH] [--peers FOLDER ...]
    python tests/benchmarks/cache.py --overhead [--toy]    # what stage 1 adds to a forward loop

The first form: sequences of 512 tokens, a causal teacher (511 targets each, k = 32, V = 30,522),
batches of 16 sequences as arrays, one thread, warm page cache. Ours go through the real writer
(hashes, fsync, commit) and ``Cache.gather``; every other holds the very same integers: the tokens
and, per position, ``ids`` uint16 [k], ``values`` uint8 [k], the position, and the five 16-bit
scalars that a loss needs as *one* array; ours hold, and do not read, three more for selection. Each
must deliver the same numbers for the same sequences before it is timed. Shuffled reads take the
same sequences everywhere, drawn from all of them; "own order" is a library's own shuffling, whose
order it chooses. "bare copies" is no store: slices of arrays that lie in memory, copied into a
batch. Bytes are those of the targets; tokens are taken off.

--peers: folders put on the import path first, for libraries that do not fit beside this package's
requirements (``pip install --no-deps --target FOLDER mosaicml-streaming``), one folder for each.

The second form: a masked LM (6 layers, hidden 384) on sequences of 128, 15 % masked. A forward
loop over all tokens against stage 1 (forward, scoring, encoding, writing) on the same batches.

Predictions before the first run: shuffled reads within 20 % of sequential ones, 2 x the best other;
stage 1 costs less than the forward loop, whose head sees every token and not the masked only.
"""

import argparse
import csv
import datetime
import importlib
import importlib.metadata
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from rekindle.data.batch import pad
from rekindle.data.cache import Cache, write_manifest
from rekindle.data.corpus.corpus import Corpus, CorpusConfig, build_corpus
from rekindle.data.storage.columns import split_lists
from rekindle.data.storage.manifest import begin_manifest
from rekindle.data.storage.shards import ROWS_PER_BATCH
from rekindle.data.storage.store import open_store
from rekindle.data.targets.codec import Columns, encode, fixed_point
from rekindle.data.targets.codec_precise import encode_precise
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.masking import MaskConfig
from rekindle.data.views.views import MaskedView, ViewReader
from rekindle.pipeline.caching.batching import length_buckets
from rekindle.pipeline.caching.cache_teachers import write_unit
from rekindle.pipeline.caching.run_teacher import Unit, UnitResult, run_unit
from rekindle.pipeline.caching.teachers import Teacher, compact_rows, plan_teacher
from rekindle.pipeline.teacher_config import TeacherConfig

RESULTS = Path(__file__).with_name("results.csv")
FIELDS = ("date", "benchmark", "device", "versions", "case", "provider", "metric", "value", "unit")

CODECS = ("default", "precise", "compact")  # ours; the first is what ratios refer to
VOCABULARY, K, TEMPERATURES = 30_522, 32, (1.0, 2.0, 4.0)
LENGTH, TARGETS, BATCH = 512, 511, 16
SHARD = 512  # sequences
LONG = 3.0  # seconds; what takes longer is measured once
SCALARS = ("log_prob_max", "log_prob_min", "tail_log_odds")  # those that the loss needs

Ints = NDArray[np.int64]


class Rows(NamedTuple):
    """N sequences: tokens [N,512], positions [N,511], ids, values [N,511,k], scalars [N,511,5]."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.uint16]
    ids: NDArray[np.uint16]
    values: NDArray[np.uint8]
    scalars: NDArray[np.uint16]


# ---- the cache that all rows come from
# ---------------------------------------------------------------------------------------------


def write_text(folder: Path, tokens: int, seed: int = 0) -> tuple[Path, Path]:
    """A tokenizer of 30,522 words of four letters, and a text of so many of them."""
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [a + b + c + d for a in letters[:3] for b in letters for c in letters for d in letters]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = special + words[: VOCABULARY - len(special)]
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    drawn = np.array(vocabulary)[np.random.default_rng(seed).integers(5, VOCABULARY, tokens)]
    lines = (" ".join(drawn[at : at + 1000]) for at in range(0, tokens, 1000))
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    return folder / "tokenizer", folder / "text.txt"


def make_corpus(folder: Path, sequences: int, length: int, shard: int) -> Corpus:
    """A corpus of so many sequences, every one full."""
    tokenizer, text = write_text(folder, (sequences + 1) * length)
    config = CorpusConfig(
        source=(str(text),),
        tokenizer=str(tokenizer),
        sequence_length=length,
        packing="contiguous",
        limit_sequences=sequences,
    )
    store = open_store(folder / "cache")
    begin_manifest(store)
    return build_corpus(store, config, shard)


def draw_columns(positions: int, seed: int, codec: str) -> Columns:
    """Targets of a made-up teacher: about 2 nats of entropy, ids Zipf-like and distinct in a row.

    Independent of the context, which is hard on compression. ``compact`` is made of the default
    codec's columns when it is written.
    """
    draw = np.random.default_rng(seed)
    share = np.cumsum(np.arange(1, VOCABULARY // K * K + 1) ** -0.85)
    zipf = np.searchsorted(share, draw.random((positions, K)) * share[-1])
    ids = zipf // K * K + draw.permuted(np.tile(np.arange(K), (positions, 1)), axis=1)
    logits = -1.2 * np.log(np.arange(1, K + 1)) + 0.1 * draw.normal(size=(positions, K))
    logits = -np.sort(-logits * draw.uniform(0.5, 2, (positions, 1)), axis=1)
    kept = draw.uniform(0.85, 0.99, (positions, 1))
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) + np.log(kept)
    odds = np.log(kept / (1 - kept)) / np.array(TEMPERATURES)
    log_probs, odds = log_probs.astype(np.float32), odds.astype(np.float32)
    columns: Columns = {
        "positions": np.tile(np.arange(TARGETS, dtype=np.uint16), positions // TARGETS),
        "gold_log_prob": fixed_point(draw.exponential(2.0, positions)),
        "gold_rank": draw.geometric(0.1, positions).astype(np.uint16),
        "entropy": fixed_point(draw.uniform(0, 4, positions)),
    }
    if codec == "precise":
        return columns | encode_precise(ids, log_probs, odds, VOCABULARY)
    return columns | encode(ids, log_probs, odds, VOCABULARY)


class Ours:
    """One codec of the cache: written by ``write_unit``, read by ``Cache.gather``."""

    def __init__(self, corpus: Corpus, codec: str):
        self.corpus, self.codec, self.name = corpus, codec, f"teacher-{codec}"
        self.info = TeacherInfo(
            name=self.name,
            task="causal_lm",
            kind="topk",
            view="clean",
            vocabulary_size=VOCABULARY,
            k=K,
            temperatures=TEMPERATURES,
            codec=codec,
            rows_per_batch=compact_rows(TARGETS) if codec == "compact" else ROWS_PER_BATCH,
        )
        self.units = [self._unit(shard) for shard in range(len(corpus.commits))]

    def _unit(self, shard: int) -> UnitResult:
        sequences = self.corpus.commits[shard].rows
        columns = draw_columns(sequences * TARGETS, shard, self.codec)
        return UnitResult(np.repeat(np.arange(sequences), TARGETS), columns)

    def write(self) -> None:
        shutil.rmtree(Path(self.corpus.store.location) / "targets" / self.name, ignore_errors=True)
        for shard, result in enumerate(self.units):
            write_unit(self.info, self.corpus, Unit(shard), result)

    def open(self) -> None:
        write_manifest(self.corpus.store)
        self.cache = Cache.open(self.corpus.store.location)

    def bytes(self) -> int:
        return self.cache.teachers[self.name].bytes

    def gather(self, index: Ints) -> Any:
        return self.cache.gather(index, [self.name], scalars=False)

    def batch(self, index: Ints) -> Any:
        self._forget()
        return self.gather(index)

    def stream(self) -> Iterator[Any]:
        self._forget()
        return map(self.gather, in_order(len(self.corpus)))

    def _forget(self) -> None:
        """Of a corpus this small most would lie decoded in memory."""
        if self.codec == "compact":
            reader = self.cache.teachers[self.name]
            reader._views.clear()
            for shard in reader._open.values():
                shard._batches.clear()

    def rows(self, batch: Any) -> Rows:
        """What was delivered, in the shape of the table that the others hold."""
        columns, size = batch.targets[self.name].columns, len(batch.index)
        scalars = [columns[n].reshape(size, TARGETS, -1).view(np.uint16) for n in SCALARS]
        return Rows(
            batch.input_ids,
            batch.targets[self.name].positions.reshape(size, TARGETS).astype(np.uint16),
            columns["ids"].reshape(size, TARGETS, K),
            columns["values"].reshape(size, TARGETS, K),
            np.concatenate(scalars, axis=2),
        )

    def agrees(self, index: Ints, truth: "Ours") -> bool:
        """Whether it says what the default codec says; exactly, where both give the same columns.

        Another codec of values may differ by what the default one rounds: 32 nats in 255 steps.
        """
        ours, theirs = (o.batch(index).targets[o.name] for o in (self, truth))
        found, expected = ours.decode(1.0), theirs.decode(1.0)
        close = (np.abs(a - b).max() < 0.2 for a, b in zip(found[1:], expected[1:], strict=True))
        return bool((found[0] == expected[0]).all()) and all(close)


def in_order(sequences: int) -> list[Ints]:
    return [np.arange(at, at + BATCH) for at in range(0, sequences - BATCH + 1, BATCH)]


# ---- the others
# ---------------------------------------------------------------------------------------------


class Peer:
    """One way to hold ``rows`` in ``folder``. ``batch`` gives Rows, maybe of tensors."""

    requires = ""  # a module that may not be there

    def __init__(self, folder: Path, rows: Rows):
        self.folder, self.all, self.count = folder, rows, len(rows.tokens)
        if self.requires:
            importlib.import_module(self.requires)

    def write(self) -> None:
        raise NotImplementedError

    def open(self) -> None:
        """Whatever a reader does once."""

    def batch(self, index: Ints) -> Rows:
        raise NotImplementedError

    def stream(self) -> Iterator[Rows]:
        """Batches of all sequences, in order where the format has one."""
        return map(self.batch, in_order(self.count))

    def bytes(self) -> int:
        """On the disk, without the tokens."""
        found = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        return found - self.all.tokens.nbytes

    def fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def samples(self) -> Iterator[dict[str, NDArray]]:
        for row in range(self.count):
            yield {name: column[row] for name, column in self.all._asdict().items()}


def stacked(samples: list[dict[str, Any]]) -> Rows:
    return Rows(*(np.stack([sample[name] for sample in samples]) for name in Rows._fields))


class Copies(Peer):
    """No store: the lower bound of any that copies a batch together."""

    def write(self) -> None:
        self.held = Rows(*(column.copy() for column in self.all))

    def batch(self, index: Ints) -> Rows:
        out = Rows(*(np.empty((len(index), *c.shape[1:]), c.dtype) for c in self.held))
        for column, held in zip(out, self.held, strict=True):
            for number, row in enumerate(index.tolist()):
                column[number] = held[row]
        return out

    def bytes(self) -> int:
        return sum(column.nbytes for column in self.held[1:])


class Parquet(Peer):
    """As DistillKit writes it: rows of Python lists of bytes, 1000 a row group, default options.

    ``input_ids`` list<uint64>; ``bytepacked_indices`` and ``compressed_logprobs``
    list<list<uint8>>. Positions are implied by the list. Source: arcee-ai/DistillKit,
    distillkit/sample_common.py at 40198e11.
    """

    GROUP = 1000

    def write(self) -> None:
        folder = self.fresh()
        lists = pa.list_(pa.list_(pa.uint8()))
        names = ("input_ids", "bytepacked_indices", "compressed_logprobs")
        types = (pa.list_(pa.uint64()), lists, lists)
        schema = pa.schema(list(zip(names, types, strict=True)))
        a = self.all
        for number, at in enumerate(range(0, self.count, self.GROUP)):
            part = slice(at, at + self.GROUP)
            parts = (a.values[part], a.scalars[part].view(np.uint8))
            columns = (a.tokens[part], a.ids[part].view(np.uint8), np.concatenate(parts, axis=2))
            lists_of = (c.tolist() for c in columns)
            arrays = [pa.array(v, t) for v, t in zip(lists_of, types, strict=True)]
            with pq.ParquetWriter(folder / f"data_{number}.parquet", schema) as writer:
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    def open(self) -> None:
        files = range(-(-self.count // self.GROUP))
        self.files = [pq.ParquetFile(self.folder / f"data_{n}.parquet") for n in files]

    def bytes(self) -> int:
        groups = [f.metadata.row_group(0) for f in self.files]
        return sum(g.column(c).total_compressed_size for g in groups for c in (1, 2))

    def batch(self, index: Ints) -> Rows:
        parts, files = [], index // self.GROUP
        for number in np.unique(files):
            table = self.files[number].read_row_group(0, use_threads=False)
            parts.append(table.take(index[files == number] % self.GROUP))
        back = np.argsort(np.argsort(files, kind="stable"), kind="stable")
        return self._rows(pa.concat_tables(parts).take(back))

    def stream(self) -> Iterator[Rows]:
        for file in self.files:
            for batch in file.iter_batches(BATCH, use_threads=False):
                yield self._rows(pa.table(batch))

    def _rows(self, table: pa.Table) -> Rows:
        shape, arrays = (table.num_rows, TARGETS, -1), []
        for name in table.column_names:
            column = table[name].combine_chunks().flatten()
            arrays.append((column if name == "input_ids" else column.flatten()).to_numpy())
        both = arrays[2].reshape(shape)
        return Rows(
            arrays[0].reshape(table.num_rows, LENGTH),
            np.broadcast_to(np.arange(TARGETS, dtype=np.uint16), shape[:2]),
            arrays[1].view(np.uint16).reshape(shape),
            both[:, :, :K],
            np.ascontiguousarray(both[:, :, K:]).view(np.uint16),
        )


class HuggingFace(Peer):
    """``datasets``, map-style, lists of fixed-size lists; the format is what it hands out."""

    form: str | None = "arrow"

    def write(self) -> None:
        self.fresh()
        with ArrowWriter(path=str(self.folder / "data.arrow")) as writer:
            for at in range(0, self.count, 128):
                part = Rows(*(column[at : at + 128] for column in self.all))
                writer.write_table(pa.table({n: nested(c) for n, c in part._asdict().items()}))
            writer.finalize()

    def open(self) -> None:
        path = str(self.folder / "data.arrow")
        self.data = datasets.Dataset.from_file(path).with_format(self.form)

    def batch(self, index: Ints) -> Rows:
        return self._rows(self.data[index])

    def stream(self) -> Iterator[Rows]:
        return map(self._rows, self.data.iter(BATCH, drop_last_batch=True))

    def _rows(self, found: Any) -> Rows:
        if self.form != "arrow":
            return Rows(*(found[name] for name in Rows._fields))
        arrays = []
        for name, column in zip(Rows._fields, self.all, strict=True):
            flat = found[name].combine_chunks().flatten()
            flat = flat.flatten() if column.ndim == 3 else flat
            arrays.append(flat.to_numpy().reshape(found.num_rows, *column.shape[1:]))
        return Rows(*arrays)


def nested(column: NDArray) -> pa.Array:
    """[n,P] as list<T>, [n,P,w] as list<fixed_size_list<T,w>>."""
    flat = pa.array(column.reshape(-1))
    if column.ndim == 3:
        flat = pa.FixedSizeListArray.from_arrays(flat, column.shape[2])
    offsets = np.arange(len(column) + 1, dtype=np.int32) * column.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


class HuggingFaceNumpy(HuggingFace):
    form = "numpy"


class HuggingFaceTorch(HuggingFace):
    form = "torch"


class Safetensors(Peer):
    """A file of stacked tensors per 512 sequences, memory-mapped, read by slices."""

    def write(self) -> None:
        folder = self.fresh()
        for at in range(0, self.count, SHARD):
            part = {n: c[at : at + SHARD] for n, c in self.all._asdict().items()}
            safetensors.numpy.save_file(part, folder / f"{at // SHARD:05d}.safetensors")

    def open(self) -> None:
        paths = sorted(self.folder.iterdir())
        self.files = [safetensors.safe_open(path, "numpy") for path in paths]
        self.slices = [[file.get_slice(name) for name in Rows._fields] for file in self.files]

    def batch(self, index: Ints) -> Rows:
        out = Rows(*(np.empty((len(index), *c.shape[1:]), c.dtype) for c in self.all))
        for number, row in enumerate(index.tolist()):
            file, local = divmod(row, SHARD)
            for column, piece in zip(out, self.slices[file], strict=True):
                column[number] = piece[local : local + 1][0]
        return out

    def stream(self) -> Iterator[Rows]:
        for at in range(0, self.count - BATCH + 1, BATCH):
            file, local = divmod(at, SHARD)
            yield Rows(*(piece[local : local + BATCH] for piece in self.slices[file]))


class Npz(Peer):
    """A file per sequence, not compressed."""

    def write(self) -> None:
        folder = self.fresh()
        for number, sample in enumerate(self.samples()):
            np.savez(folder / f"{number:07d}.npz", **sample)  # type: ignore[arg-type]

    def batch(self, index: Ints) -> Rows:
        samples = []
        for number in index.tolist():
            with np.load(self.folder / f"{number:07d}.npz") as file:
                samples.append({name: file[name] for name in Rows._fields})
        return stacked(samples)


class Mosaic(Peer):
    """mosaicml-streaming (MDS): ndarray columns of fixed shape, from the local folder."""

    requires = "streaming"

    def write(self) -> None:
        module = importlib.import_module(self.requires)
        folder = self.fresh()
        kinds = {
            name: f"ndarray:{column.dtype}:{','.join(map(str, column.shape[1:]))}"
            for name, column in self.all._asdict().items()
        }
        with module.MDSWriter(out=str(folder), columns=kinds) as writer:
            for sample in self.samples():
                writer.write(sample)

    def open(self) -> None:
        module = importlib.import_module(self.requires)
        self.data = module.StreamingDataset(
            local=str(self.folder), remote=None, batch_size=BATCH, shuffle=False
        )

    def batch(self, index: Ints) -> Rows:
        return stacked([self.data[i] for i in index.tolist()])


class LitData(Peer):
    """litdata: dicts of arrays in chunks of 64 MB, its StreamingDataset asked by number."""

    requires = "litdata"
    shuffle = False

    def write(self) -> None:
        module = importlib.import_module("litdata.streaming")
        cache = module.Cache(str(self.fresh()), chunk_bytes="64MB")
        for number, sample in enumerate(self.samples()):
            cache[number] = sample
        cache.done()
        cache.merge()

    def open(self) -> None:
        kind = importlib.import_module("litdata").StreamingDataset
        self.data = kind(str(self.folder), shuffle=self.shuffle)
        # By default each number asked for decodes its neighbours, too.
        self.by_number = kind(str(self.folder), batch_decode=False)

    def batch(self, index: Ints) -> Rows:
        return stacked([self.by_number[i] for i in index.tolist()])

    def stream(self) -> Iterator[Rows]:
        waiting = []
        for sample in self.data:
            waiting.append(sample)
            if len(waiting) == BATCH:
                yield stacked(waiting)
                waiting = []


class LitDataOwn(LitData):
    """The same, in the order in which it likes to shuffle."""

    shuffle = True


PEERS: dict[str, tuple[type[Peer], str]] = {  # and the one whose files it reads
    "bare copies (no store)": (Copies, ""),
    "safetensors, slices": (Safetensors, ""),
    "datasets, arrow by hand": (HuggingFace, ""),
    "datasets, numpy": (HuggingFaceNumpy, "datasets, arrow by hand"),
    "datasets, torch": (HuggingFaceTorch, "datasets, arrow by hand"),
    "parquet (DistillKit)": (Parquet, ""),
    "npz, one a sequence": (Npz, ""),
    "mosaicml-streaming": (Mosaic, ""),
    "litdata": (LitData, ""),
    "litdata, own order": (LitDataOwn, "litdata"),
}


# ---- measuring
# ---------------------------------------------------------------------------------------------


def rate(batches: Iterator[Any], budget: float) -> float:
    """Positions a second over as many batches as fit into ``budget`` seconds, at least one."""
    began, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - began > budget:
            break
    return count * BATCH * TARGETS / (time.perf_counter() - began)


def again_and_again(once: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Pass after pass: one alone takes some milliseconds."""
    while True:
        yield from once()


def same(found: Rows, expected: Rows) -> bool:
    return all(np.array_equal(np.asarray(f), e) for f, e in zip(found, expected, strict=True))


def prepare(
    corpus: Corpus, folder: Path, gate: list[Ints]
) -> tuple[dict[str, Any], dict[str, str], dict[str, float]]:
    """Contenders that are there and right, why the others are not, and seconds of their writes."""
    contenders: dict[str, Any] = {}
    absent: dict[str, str] = {}
    writes: dict[str, float] = {}
    for codec in CODECS:
        contenders[f"rekindle, {codec}"] = Ours(corpus, codec)
        ours = contenders[f"rekindle, {codec}"]
        writes[f"rekindle, {codec}"] = timed(ours.write)
        ours.open()
        truth = contenders[f"rekindle, {CODECS[0]}"]
        if not all(ours.agrees(index, truth) for index in gate):
            absent[f"rekindle, {codec}"] = "FAILED: not the default codec's targets"
            del contenders[f"rekindle, {codec}"]
    parts = [truth.rows(truth.batch(index)) for index in in_order(len(corpus))]
    rows = Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    for name, (kind, files) in PEERS.items():
        try:
            peer = kind(folder / (files or name).replace(" ", "-"), rows)
            if not files:
                writes[name] = timed(peer.write)
            peer.open()
            for index in gate:
                if not same(peer.batch(index), Rows(*(c[index] for c in rows))):
                    raise AssertionError("does not deliver the same numbers")
            contenders[name] = peer
        except ImportError as error:
            absent[name] = f"not installed: {error}"
        except Exception as error:  # a peer's failure is a finding, not ours to raise
            absent[name] = f"FAILED: {type(error).__name__}: {str(error)[:90]}"
    return contenders, absent, writes


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(
    contenders: dict[str, Any], writes: dict[str, float], sequences: int, rounds: int, budget: float
) -> dict[str, dict[str, list[float]]]:
    """Rates [positions/s] of all contenders by kind of work, one of each a round."""
    rates: dict[str, dict[str, list[float]]] = {
        name: {"write": [], "sequential": [], "shuffled": []} for name in contenders
    }
    draw = np.random.default_rng(1)
    for turn in range(rounds):
        order = draw.permutation(sequences)
        shuffled = [order[at : at + BATCH] for at in range(0, sequences - BATCH + 1, BATCH)]
        for name, contender in contenders.items():
            found = rates[name]
            write = name in writes and (turn == 0 or writes[name] < LONG)
            if write:
                found["write"].append(sequences * TARGETS / timed(contender.write))
                contender.open()
            if write or turn == 0:
                rate(contender.stream(), LONG)  # warm, and our checksums are verified
            if turn and found["shuffled"][0] < BATCH * TARGETS / LONG:
                continue  # a batch takes seconds
            own = getattr(contender, "shuffle", False)
            for kind, ordered in (("sequential", True), ("shuffled", own)):
                once = contender.stream if ordered else partial(map, contender.batch, shuffled)
                found[kind].append(rate(again_and_again(once), budget))
    return rates


def compare(options: argparse.Namespace, folder: Path) -> list[tuple[str, str, str, float, str]]:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    count = options.positions or (16_384 if options.toy else 524_288)
    sequences = max(2 * BATCH, -(-count // TARGETS) // BATCH * BATCH)
    corpus = make_corpus(folder / "ours", sequences, LENGTH, SHARD)
    draw = np.random.default_rng(2)
    gate = [np.arange(BATCH), draw.permutation(sequences)[:BATCH]]
    contenders, absent, writes = prepare(corpus, folder / "peers", gate)
    rounds, budget = (2, 0.02) if options.toy else (9, 0.3)
    rates = measure(contenders, writes, sequences, rounds, budget)
    case = f"{sequences} x {LENGTH} V={VOCABULARY} k={K} batch={BATCH}"
    print(f"\n{case}, one thread, medians of {rounds} rounds; M positions/s")
    print(f"{'':26}{'write':>9}{'B/pos':>9}{'sequential':>12}{'shuffled':>10}{'x ours':>9}")
    results: list[tuple[str, str, str, float, str]] = []
    ours = rates[f"rekindle, {CODECS[0]}"]["shuffled"]
    for name, contender in contenders.items():
        size = contender.bytes() / (sequences * TARGETS)
        medians = {kind: statistics.median(r) for kind, r in rates[name].items() if r}
        ratio = statistics.median(
            a / b for a, b in zip(rates[name]["shuffled"], ours, strict=False)
        )
        write = f"{medians['write'] / 1e6:9.3f}" if "write" in medians else " " * 9
        reads = f"{medians['sequential'] / 1e6:12.3f}{medians['shuffled'] / 1e6:10.3f}"
        print(f"{name:26}{write}{size:9.1f}{reads}{ratio:9.4f}")
        results += [(case, name, kind, value, "positions/s") for kind, value in medians.items()]
        results.append((case, name, "size", size, "bytes/position"))
        results.append((case, name, "shuffled ratio to ours", ratio, "1"))
    for name, why in absent.items():
        print(f"{name:26} {why}")
    return results


# ---- what stage 1 adds to the teacher's forward passes
# ---------------------------------------------------------------------------------------------


def overhead(options: argparse.Namespace, folder: Path) -> list[tuple[str, str, str, float, str]]:
    """Seconds of stage 1 and of the bare loop over the same batches, in turns."""
    layers, width, sequences, length = (1, 32, 16, 32) if options.toy else (6, 384, 64, 128)
    corpus = make_corpus(folder / "ours", sequences, length, sequences)
    masked = MaskedView(corpus, MaskConfig(), 0, 1)
    masked.build()
    directory = folder / "model"
    shutil.copytree(folder / "ours" / "tokenizer", directory)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            intermediate_size=4 * width,
        )
    ).save_pretrained(directory)
    config = TeacherConfig(name="teacher", model=str(directory), task="masked_lm")
    teacher = Teacher(plan_teacher(config, corpus, masked, None, 0), corpus)
    view = ViewReader(corpus, teacher.info.view)
    batches, selected = forward_batches(teacher, corpus, view)

    @torch.inference_mode()
    def bare(_: int) -> None:
        for batch in batches:
            teacher.model(**batch)

    @torch.inference_mode()
    def selective(_: int) -> None:
        for batch, select in zip(batches, selected, strict=True):
            hidden, _ = teacher.language_model.hidden(batch, select)
            teacher.language_model.head.logits(hidden)

    def stage(turn: int) -> None:
        info = teacher.info.model_copy(update={"name": f"teacher-{turn}"})
        write_unit(info, corpus, Unit(0, 0), run_unit(teacher, corpus, view, Unit(0, 0)))

    works = {
        "forward, all tokens": bare,
        "forward, masked tokens": selective,
        "stage 1, written": stage,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    rounds = 3 if options.toy else 4
    for turn in range(rounds + 1):
        for name, work in works.items():
            times[name].append(timed(lambda work=work, turn=turn: work(turn)))  # type: ignore[misc]
    case = f"{sequences} x {length} L={layers} H={width} k={teacher.info.k} V={VOCABULARY}"
    print(f"\n{case}, {torch.get_num_threads()} threads, medians of {rounds} rounds")
    results = []
    base = times["forward, all tokens"][1:]
    for name, (_, *seconds) in times.items():  # the first round warms up
        ratio = statistics.median(s / b for s, b in zip(seconds, base, strict=True))
        print(f"{name:26}{statistics.median(seconds):9.3f} s{ratio:9.3f} x forward, all tokens")
        results.append((case, name, "time", statistics.median(seconds), "s"))
        results.append((case, name, "ratio to the forward loop", ratio, "1"))
    return results


def forward_batches(
    teacher: Teacher, corpus: Corpus, view: ViewReader
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """The inputs stage 1 gives the model on the first unit, and its masked places, by batch."""
    shard = corpus.shard(0)
    indices = range(shard.batch_count)
    seen = [s.copy() for s in split_lists([shard.batch(i) for i in indices], "input_ids")]
    views = [view.batch(0, i, 0) for i in indices]
    positions = split_lists(views, "positions")
    for row, where, put in zip(seen, positions, split_lists(views, "input_ids"), strict=True):
        row[where] = put
    lengths = np.array([len(s) for s in seen])
    batches, selected = [], []
    for rows in length_buckets(lengths, teacher.batch_tokens):
        ids = pad([seen[r] for r in rows], lengths[rows], 0)
        mask = np.arange(ids.shape[1]) < lengths[rows, None]
        batches.append({"input_ids": teacher.tensor(ids), "attention_mask": teacher.tensor(mask)})
        flat = [i * ids.shape[1] + positions[r].astype(np.int64) for i, r in enumerate(rows)]
        selected.append(teacher.tensor(np.concatenate(flat)))
    return batches, selected


# ---- the run
# ---------------------------------------------------------------------------------------------


def versions() -> str:
    names = ("torch", "numpy", "pyarrow", "datasets", "safetensors", "transformers")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    for name in ("mosaicml-streaming", "litdata"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--positions", type=int, help="about so many targets")
    parser.add_argument("--overhead", action="store_true", help="stage 1 against a forward loop")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="results are appended to it")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="import from here first")
    options = parser.parse_args()
    sys.path[1:1] = [str(path.resolve()) for path in options.peers]
    load = os.getloadavg()[0]
    print(f"{processor()}; Python {platform.python_version()}; load average {load:.2f}")
    print(versions())
    with tempfile.TemporaryDirectory() as folder:
        results = (overhead if options.overhead else compare)(options, Path(folder))
    new = not options.csv.exists()
    name = f"cache{' --overhead' * options.overhead}{' --toy' * options.toy}"
    about = [datetime.date.today().isoformat(), name, processor(), versions()]
    with open(options.csv, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        for case, provider, metric, value, unit in results:
            writer.writerow([*about, case, provider, metric, f"{value:.6g}", unit])


if __name__ == "__main__":
    main()
