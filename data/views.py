"""Views: how an example is shown to models other than as it stands. Built from the corpus, stored beside it.

``masked-<fingerprint>``: per sequence and replica, the masked positions and the ids that stand there.
``pairs-<kind>-<fingerprint>``: per sequence, two texts for sentence-pair experts and the student's encoding of
them. A view's fingerprint covers everything that decides its bytes, so equal names mean equal inputs.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.columns import list_array, list_type, list_views, offsets_of
from rekindle.data.corpus import Corpus, unit_of
from rekindle.data.errors import CacheFormatError, CacheMismatchError
from rekindle.data.masking import MaskConfig, MaskingVocabulary, generator, mask_sequence
from rekindle.data.sentences import split_sentences
from rekindle.data.shards import Commit, Shard, ShardSet, describe, rows_in_batches
from rekindle.data.store import Store

PairKind = Literal["adjacent", "same-document", "random"]
ALGORITHM = 1  # raise it when masks or pairs would come out differently


def _fingerprint(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class MaskedView:
    """The masked replicas of a corpus under one mask configuration and seed."""

    FIELDS = (
        pa.field("digest", pa.string()),
        pa.field("positions", list_type(pa.uint16())),
        pa.field("input_ids", list_type(pa.int32())),
    )

    def __init__(self, corpus: Corpus, config: MaskConfig, seed: int, replicas: int):
        tokenizer = corpus.info["tokenizer"]
        self.corpus, self.config, self.seed, self.replicas = corpus, config, seed, replicas
        self.identity = {
            "algorithm": ALGORITHM,
            "mask": config.model_dump(),
            "seed": seed,
            "tokenizer": tokenizer["digest"],
            # Replicas of `random` are independent and can be added to; `cover` deals tokens out over all.
            "replicas": replicas if config.policy == "cover" else None,
        }
        self.name = f"masked-{_fingerprint(self.identity)}"
        self.vocabulary = MaskingVocabulary.of(
            tokenizer["size"], tokenizer["mask_id"], frozenset(tokenizer["special_ids"])
        )
        self.shards = ShardSet(corpus.store, f"views/{self.name}")

    def build(self) -> None:
        """Write what is missing of every replica of every corpus shard."""
        content = json.dumps(self.identity | {"replicas": self.replicas}, indent=1).encode()
        self.corpus.store.create(f"views/{self.name}/view.json", content)
        done = self.shards.committed()
        for shard in range(len(self.corpus.commits)):
            for replica in range(self.replicas):
                if unit_of(shard, replica) not in done:
                    self._write(shard, replica)

    def _write(self, shard: int, replica: int) -> None:
        about = {"kind": "view", "view": self.name, "shard": shard, "replica": replica}
        schema = describe(list(self.FIELDS), about | self.identity)
        batches = self._batches(self.corpus.shard(shard), replica, schema)
        self.shards.write(unit_of(shard, replica), schema, batches)

    def _batches(self, shard: Shard, replica: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for index in range(shard.batch_count):
            batch = shard.batch(index)
            digests = batch["digest"].to_pylist()
            offsets, ids = list_views(batch["input_ids"], "input_ids")
            content = list_views(batch["char_starts"], "char_starts")[1] >= 0
            words = list_views(batch["word_starts"], "word_starts")[1]
            masks = [
                mask_sequence(
                    ids[a:b],
                    content[a:b],
                    words[a:b],
                    self.vocabulary,
                    self.config,
                    seed=self.seed,
                    digest=digest,
                    replica=replica,
                    replicas=self.replicas,
                )
                for digest, a, b in zip(digests, offsets, offsets[1:], strict=False)
            ]
            lists = offsets_of([len(mask.positions) for mask in masks])
            columns = [
                batch["digest"],
                list_array(lists, np.concatenate([mask.positions for mask in masks])),
                list_array(lists, np.concatenate([mask.input_ids for mask in masks])),
            ]
            yield pa.record_batch(columns, schema=schema)


class PairView:
    """Text pairs made from the corpus for sentence-pair experts, one per sequence where that is possible.

    ``adjacent``: two neighbouring sentences of the sequence. ``same-document``: a sentence of the sequence
    and another sentence of the same document. ``random``: a sentence of the sequence and one of another
    document. Partners come from the same corpus shard. A sequence without a pair has nulls.
    """

    FIELDS = (
        pa.field("digest", pa.string()),
        pa.field("text_a", pa.string()),
        pa.field("text_b", pa.string()),
        pa.field("input_ids", list_type(pa.int32())),
        pa.field("token_types", list_type(pa.uint8())),
    )

    def __init__(self, corpus: Corpus, kind: PairKind, seed: int):
        self.corpus, self.kind, self.seed = corpus, kind, seed
        self.identity = {
            "algorithm": ALGORITHM,
            "pairs": kind,
            "seed": seed,
            "tokenizer": corpus.info["tokenizer"]["digest"],
        }
        self.name = f"pairs-{kind}-{_fingerprint(self.identity)}"
        self.shards = ShardSet(corpus.store, f"views/{self.name}")

    def build(self) -> None:
        """Write what is missing."""
        content = json.dumps(self.identity, indent=1).encode()
        self.corpus.store.create(f"views/{self.name}/view.json", content)
        done = self.shards.committed()
        for shard in range(len(self.corpus.commits)):
            if unit_of(shard) not in done:
                about = {"kind": "view", "view": self.name, "shard": shard}
                schema = describe(list(self.FIELDS), about | self.identity)
                batches = self._batches(self.corpus.shard(shard), schema)
                self.shards.write(unit_of(shard), schema, batches)

    def _batches(self, shard: Shard, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        table = shard.table()
        digests = table["digest"].to_pylist()
        pairs = make_pairs(
            table["text"].to_pylist(),
            table["document"].to_pylist(),
            [generator(f"pairs/{self.kind}", self.seed, digest) for digest in digests],
            self.kind,
        )
        length = self.corpus.info["config"]["sequence_length"]
        for first, last in rows_in_batches(len(digests)):
            encoded = [
                self.corpus.tokenizer.encode_pair(*pair, max_length=length) if pair else ([], [])
                for pair in pairs[first:last]
            ]
            lists = offsets_of([len(ids) for ids, _ in encoded])
            columns = [
                pa.array(digests[first:last], pa.string()),
                pa.array([p and p[0] for p in pairs[first:last]], pa.string()),
                pa.array([p and p[1] for p in pairs[first:last]], pa.string()),
                list_array(lists, np.concatenate([np.array(i, np.int32) for i, _ in encoded])),
                list_array(lists, np.concatenate([np.array(t, np.uint8) for _, t in encoded])),
            ]
            yield pa.record_batch(columns, schema=schema)


def make_pairs(
    texts: list[str],
    documents: list[str],
    generators: list[np.random.Generator],
    kind: PairKind,
) -> list[tuple[str, str] | None]:
    """One pair of sentences per text, or None where the texts allow none."""
    sentences = [[text[a:b] for a, b in split_sentences(text)] for text in texts]
    rows_of: dict[str, list[int]] = {}
    for row, document in enumerate(documents):
        rows_of.setdefault(document, []).append(row)
    everything = list(range(len(texts)))
    pairs: list[tuple[str, str] | None] = []
    for row, random in enumerate(generators):
        mine = sentences[row]
        if kind == "adjacent":
            start = int(random.integers(len(mine) - 1)) if len(mine) > 1 else None
            pairs.append(None if start is None else (mine[start], mine[start + 1]))
            continue
        same = kind == "same-document"
        rows = rows_of[documents[row]] if same else everything
        pairs.append(_distant_pair(row, rows, sentences, documents, random, same))
    return pairs


def _distant_pair(
    row: int,
    rows: list[int],
    sentences: list[list[str]],
    documents: list[str],
    random: np.random.Generator,
    same_document: bool,
) -> tuple[str, str] | None:
    if not sentences[row]:
        return None
    first = int(random.integers(len(sentences[row])))
    for _ in range(8):  # rejection: nearly every draw fits, and a corpus of one document ends as None
        other = rows[int(random.integers(len(rows)))]
        if not sentences[other] or (documents[other] == documents[row]) != same_document:
            continue
        second = int(random.integers(len(sentences[other])))
        if (other, second) != (row, first):
            return sentences[row][first], sentences[other][second]
    return None


class ViewReader:
    """Reads the rows of a view by corpus shard (and replica), checked against the corpus digests."""

    def __init__(self, corpus: Corpus, name: str):
        self.corpus, self.name = corpus, name
        self.shards = ShardSet(corpus.store, f"views/{name}")
        self.commits: dict[str, Commit] = self.shards.committed()
        self._open: dict[str, Shard] = {}

    @property
    def replicas(self) -> int:
        """How many replicas every corpus shard has."""
        count = 0
        while all(unit_of(s, count) in self.commits for s in range(len(self.corpus.commits))):
            count += 1
        return count

    def batch(self, shard: int, index: int, replica: int | None = None) -> pa.RecordBatch:
        """Record batch ``index`` of one corpus shard's view."""
        unit = unit_of(shard, replica)
        if unit not in self._open:
            if unit not in self.commits:
                raise CacheFormatError(
                    f"view {self.name} has no unit {unit}; run `pipeline cache-teachers` to make it"
                )
            self._open[unit] = self.shards.open(self.commits[unit])
        batch = self._open[unit].batch(index)
        check_aligned(batch, self.corpus, shard, index, f"views/{self.name}/{unit}")
        return batch


def check_aligned(batch: pa.RecordBatch, corpus: Corpus, shard: int, index: int, what: str) -> None:
    """Raise CacheMismatchError unless the batch's digests are the corpus's, row by row."""
    expected = corpus.shard(shard).batch(index)["digest"]
    if batch["digest"].equals(expected):
        return
    theirs, ours = batch["digest"].to_pylist(), expected.to_pylist()
    row = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours))
    raise CacheMismatchError(
        f"{what}: row {row} of record batch {index} does not belong to the corpus row beside it "
        "(their digests differ); these targets were made from another corpus"
    )


def masked_input(
    input_ids: NDArray[np.int32], positions: NDArray[np.uint16], replaced: NDArray[np.int32]
) -> NDArray[np.int32]:
    """The sequence [S] as a masked model sees it."""
    out = input_ids.copy()
    out[positions] = replaced
    return out
