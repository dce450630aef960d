"""The rows that all stores of the cache's benchmark hold, and Rekindle's cache, which they come
from.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rekindle.data.cache import Cache, write_manifest
from rekindle.data.corpus.corpus import Corpus, CorpusConfig, build_corpus
from rekindle.data.storage.manifest import begin_manifest
from rekindle.data.storage.shards import ROWS_PER_BATCH
from rekindle.data.storage.store import open_store
from rekindle.data.targets.codec import Columns, encode, fixed_point
from rekindle.data.targets.codec_compact import compact_rows
from rekindle.data.targets.codec_precise import encode_precise
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.caching.compute_unit import Unit, UnitResult
from rekindle.pipeline.caching.make_unit import write_unit

CODECS = ("default", "precise", "compact")  # Rekindle's; ratios refer to the first
VOCABULARY, K, TEMPERATURES = 30_522, 32, (1.0, 2.0, 4.0)
LENGTH, TARGETS, BATCH = 512, 511, 16
SHARD = 512  # sequences


def save_masked_lm(folder: Path, layers: int, width: int, heads: int) -> None:
    """Write a random BERT of the benchmarks' vocabulary into the folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
    ).save_pretrained(folder)


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
    """Write a tokenizer of 30,522 words of four letters, and a text of ``tokens`` of them."""
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
    """Make a corpus of ``sequences`` full sequences."""
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


def draw_columns(positions: int, seed: int, codec: str, targets: int = TARGETS) -> Columns:
    """Draw the targets of a made-up teacher: about 2 nats of entropy, ids Zipf-like and distinct in
    a row.

    Independent of the context, which makes compression hard. ``compact`` is made of the default
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
        "positions": np.tile(np.arange(targets, dtype=np.uint16), positions // targets),
        "gold_log_prob": fixed_point(draw.exponential(2.0, positions)),
        "gold_rank": draw.geometric(0.1, positions).astype(np.uint16),
        "entropy": fixed_point(draw.uniform(0, 4, positions)),
    }
    if codec == "precise":
        return columns | encode_precise(ids, log_probs, odds, VOCABULARY)
    return columns | encode(ids, log_probs, odds, VOCABULARY)


class Ours:
    """One codec of the cache: written by ``write_unit``, read by ``Cache.gather``."""

    def __init__(self, corpus: Corpus, codec: str, targets: int = TARGETS):
        self.corpus, self.codec, self.name = corpus, codec, f"teacher-{codec}"
        self.targets = targets  # of each sequence
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
        columns = draw_columns(sequences * self.targets, shard, self.codec, self.targets)
        return UnitResult(np.repeat(np.arange(sequences), self.targets), columns)

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
        """Drop decoded rows: of a corpus this small, most would stay in memory."""
        if self.codec == "compact":
            reader = self.cache.teachers[self.name]
            reader._lists.clear()
            for shard in reader._open.values():
                shard._batches.clear()

    def rows(self, batch: Any) -> Rows:
        """Return what was delivered, in the shape of the table that the others hold."""
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
        """Return whether the values equal the default codec's; exactly, if both give the same
        columns.

        Another codec of values may differ by the rounding of the default one: 32 nats in 255 steps.
        """
        ours, theirs = (o.batch(index).targets[o.name] for o in (self, truth))
        found, expected = ours.decode(1.0), theirs.decode(1.0)
        close = (np.abs(a - b).max() < 0.2 for a, b in zip(found[1:], expected[1:], strict=True))
        return bool((found[0] == expected[0]).all()) and all(close)


def in_order(sequences: int) -> list[Ints]:
    return [np.arange(at, at + BATCH) for at in range(0, sequences - BATCH + 1, BATCH)]


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
