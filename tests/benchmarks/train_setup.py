"""The inputs of the training benchmark: text, models of real shapes with random weights, and a
cache of the teacher. Speed does not depend on the weights.
"""

import os
import re
import shutil
import string
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rekindle.data.batch import Batch, TokenTargetBatch
from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.data.source.python_docs import python_docs
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.train.config import StudentConfig
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.student import Student, build_student

SHARED = Path(os.environ.get("REKINDLE_SHARED", Path(__file__).parents[3] / "shared" / "data"))
VOCABULARY, K, TEMPERATURES = 30_522, 64, (1.0, 2.0)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MOST_SEQUENCES = 4096  # at most this many are cached; the steps reuse them
HELD_BATCHES = 32  # this many are kept in memory for the loops that do not read the cache


class Shape(NamedTuple):
    """A BERT: layers, hidden size, attention heads; the feed-forward part is four times as wide."""

    layers: int
    width: int
    heads: int


SHAPES = {
    "toy": Shape(2, 64, 2),
    "bert-mini": Shape(4, 256, 4),
    "minilm-l6": Shape(6, 384, 12),
    "minilm-l12": Shape(12, 384, 12),
    "bert-base": Shape(12, 768, 12),
    "bert-large": Shape(24, 1024, 16),
}


class Prepared(NamedTuple):
    """A masked batch as tensors: B sequences of S tokens, N masked positions, K kept ids."""

    input_ids: Tensor  # [B,S]
    attention_mask: Tensor  # [B,S]
    rows: Tensor  # [N] masked positions as flat indices into [B·S]
    labels: Tensor  # [N]
    target_ids: Tensor  # [N,K]
    target_probs: Tensor  # [N,K] at τ = 2

    def on(self, device: torch.device) -> "Prepared":
        """Return the same on ``device``; from pinned memory without waiting."""
        return Prepared(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


@dataclass(frozen=True)
class Bench:
    """The sizes of one measurement, and the folder of its models and its cache."""

    folder: Path
    steps: int  # of every run; the first ``warm_up`` of them are not measured
    warm_up: int
    batch: int
    length: int
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def cache(self) -> Cache:
        return Cache.open(str(self.folder / "cache"))

    def model(self, which: str) -> Student:
        """Return the ``student`` or the ``teacher``, on the device."""
        config = StudentConfig(model=str(self.folder / which))
        return build_student(config, {}, VOCABULARY, 0, self.length).to(self.device)

    def autocast(self) -> AbstractContextManager:
        """Return the context that ``precision: auto`` means."""
        if self.device.type == "cpu" or not torch.cuda.is_bf16_supported():
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @cached_property
    def held(self) -> list[Prepared]:
        """Return batches of the cache, read and decoded beforehand: these loops get their data
        free.
        """
        batches = self.cache().batches(["teacher"], self.batch)
        whole = (b for b in batches if len(b.index) == self.batch)
        return [prepared(b, self.device) for b, _ in zip(whole, range(HELD_BATCHES), strict=False)]


def prepared(batch: Batch, device: torch.device) -> Prepared:
    """Return the masked inputs, labels and targets (τ = 2) of a batch of the cache, in
    main memory.
    """
    masked, target = batch.masked, batch.targets["teacher"]
    assert masked is not None
    assert isinstance(target, TokenTargetBatch)
    rows = masked.rows * batch.input_ids.shape[1] + masked.positions
    if not np.array_equal(target.rows * batch.input_ids.shape[1] + target.positions, rows):
        raise AssertionError("the targets are not of the masked positions, in their order")
    ids, log_probs, _ = target.decode(2.0)
    arrays = (masked.input_ids, batch.attention_mask, rows, masked.labels, ids)
    integers = [torch.from_numpy(a.astype(np.int64)) for a in arrays]
    tensors = [*integers, torch.from_numpy(np.exp(log_probs))]
    return Prepared(*(t.pin_memory() if device.type == "cuda" else t for t in tensors))


def prepare(bench: Bench, student: str, teacher: str) -> None:
    """Write the two models and cache the teacher: one replica, k = 64, τ = 1 and 2."""
    for seed, (name, shape) in enumerate((("student", student), ("teacher", teacher))):
        write_model(bench.folder / name, SHAPES[shape], seed)
    text = SHARED / "corpus" / "wiki_train.jsonl"
    wanted = min(MOST_SEQUENCES, bench.steps * bench.batch)
    values = {
        "corpus": {
            "source": str(text) if text.is_file() else "python-docs",
            "tokenizer": str(bench.folder / "student"),
            "sequence_length": bench.length,
            "packing": "contiguous",  # every sequence is full: the same shapes for everyone
            "limit_sequences": max(wanted, 2 * bench.batch),
        },
        "cache": {"path": str(bench.folder / "cache"), "replicas": 1},
        "teachers": [
            {
                "name": "teacher",
                "model": str(bench.folder / "teacher"),
                "task": "masked_lm",
                "targets": {"kind": "topk", "k": K, "temperatures": list(TEMPERATURES)},
            }
        ],
    }
    began = time.perf_counter()
    done = cache_teachers(parse_settings(RunConfig, values))
    seconds = time.perf_counter() - began
    print(f"{done.corpus_sequences} sequences cached in {seconds:.0f} s", flush=True)


def write_model(folder: Path, shape: Shape, seed: int) -> None:
    """Write a BERT of random weights with a vocabulary of 30,522."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
    )
    with quiet_transformers():
        transformers.BertForMaskedLM(config).save_pretrained(folder)
    known = SHARED / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    if known.is_file():
        shutil.copy(known, folder)
    else:
        (folder / "vocab.txt").write_text("\n".join(words_of_python()) + "\n", encoding="utf-8")


def words_of_python() -> list[str]:
    """Return a WordPiece vocabulary of 30,522: single characters, then the documentation's
    words.
    """
    counts = Counter(chain.from_iterable(_words(doc.text) for doc in python_docs()))
    letters = string.ascii_lowercase + string.digits
    pieces = [*string.punctuation, *letters, *(f"##{letter}" for letter in letters)]
    known = list(dict.fromkeys([*SPECIALS, *pieces, *(word for word, _ in counts.most_common())]))
    unused = (f"[unused{i}]" for i in range(VOCABULARY))
    return [*known, *unused][:VOCABULARY]


def _words(text: str) -> Iterator[str]:
    return (found.group() for found in re.finditer(r"[a-z]+", text.lower()))
