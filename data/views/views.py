"""Views: how an example is shown to models other than as it stands; stored beside the corpus.

``masked-<fingerprint>``: per sequence and replica, the masked positions and the ids that stand
there, drawn here or taken from a teacher's losses (``hard_masks.py``).
``pairs-<kind>-<fingerprint>``: per sequence, two texts for sentence-pair experts and the student's
encoding of them. A view's fingerprint covers everything that decides its bytes, so equal names mean
equal inputs. Nothing is known here of the models that are shown them.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.corpus import Corpus, unit_of
from rekindle.data.corpus.sentences import split_sentences
from rekindle.data.errors import CacheFormatError, CacheMismatchError
from rekindle.data.storage.columns import list_array, list_type, list_views, offsets_of
from rekindle.data.storage.seal import seal
from rekindle.data.storage.shards import (
    ROWS_PER_BATCH,
    Commit,
    Shard,
    ShardSet,
    describe,
    rows_in_batches,
)
from rekindle.data.views.masking import (
    Mask,
    MaskConfig,
    MaskingVocabulary,
    generator,
    mask_sequence,
)

PairKind = Literal["adjacent", "same-document", "random"]
ALGORITHM = 1  # raise it when masks or pairs would come out differently


def view_fingerprint(parts: dict[str, Any]) -> str:
    """The part of a view's name that stands for all that decides its bytes."""
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
            "mask": config.identity(),
            "seed": seed,
            "tokenizer": tokenizer["digest"],
            # Replicas of `random` are independent and can be added to; `cover` deals tokens out
            # over all.
            "replicas": replicas if config.policy == "cover" else None,
        }
        self.name = f"masked-{view_fingerprint(self.identity)}"
        self.vocabulary = masking_vocabulary(corpus)
        self.shards = ShardSet(corpus.store, f"views/{self.name}")

    @property
    def share(self) -> float:
        """About how much of a sequence is masked."""
        return self.config.probability

    def build(self) -> None:
        """Write what is missing of every replica of every corpus shard."""
        content = seal(self.identity | {"replicas": self.replicas})
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
            yield masked_batch(batch["digest"], masks, schema)


def masking_vocabulary(corpus: Corpus) -> MaskingVocabulary:
    """What masks need of the corpus's tokenizer."""
    tokenizer = corpus.info["tokenizer"]
    special = frozenset(tokenizer["special_ids"])
    return MaskingVocabulary.of(tokenizer["size"], tokenizer["mask_id"], special)


def masked_batch(digests: pa.Array, masks: list[Mask], schema: pa.Schema) -> pa.RecordBatch:
    """A masked view's record batch: the ``masks`` of the sequences with these ``digests``."""
    lists = offsets_of([len(mask.positions) for mask in masks])
    positions = np.concatenate([mask.positions for mask in masks])
    input_ids = np.concatenate([mask.input_ids for mask in masks])
    columns = [digests, list_array(lists, positions), list_array(lists, input_ids)]
    return pa.record_batch(columns, schema=schema)


class PairView:
    """Text pairs from the corpus for sentence-pair experts, one per sequence where possible.

    ``adjacent``: two neighbouring sentences of the sequence, of one document. ``same-document``: a
    sentence of the sequence and another sentence of the same document. ``random``: a sentence of
    the sequence and one of another document. Partners come from the same corpus shard. A sequence
    without a pair has nulls.
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
        self.name = f"pairs-{kind}-{view_fingerprint(self.identity)}"
        self.shards = ShardSet(corpus.store, f"views/{self.name}")

    def build(self) -> None:
        """Write what is missing."""
        self.corpus.store.create(f"views/{self.name}/view.json", seal(self.identity))
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
            [parts for index in range(shard.batch_count) for parts in _parts(shard.batch(index))],
            table["document"].to_pylist(),
            [generator(f"pairs/{self.kind}", self.seed, digest) for digest in digests],
            self.kind,
        )
        length = self.corpus.info["config"]["sequence_length"]
        for first, last in rows_in_batches(len(digests)):
            encoded: list[tuple[Any, Any]] = [
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


def _parts(batch: pa.RecordBatch) -> list[list[str]]:
    """Each row's text, cut where another document begins."""
    tokens, characters = list_views(batch["char_starts"], "char_starts")
    lists, begins = list_views(batch["document_starts"], "document_starts")
    parts = []
    for row, text in enumerate(batch["text"].to_pylist()):
        first_tokens = begins[lists[row] + 1 : lists[row + 1]]
        cuts = characters[tokens[row] + first_tokens].tolist()
        parts.append([text[a:b] for a, b in pairwise([0, *cuts, len(text)])])
    return parts


def make_pairs(
    texts: list[list[str]],
    documents: list[str],
    generators: list[np.random.Generator],
    kind: PairKind,
) -> list[tuple[str, str] | None]:
    """One pair of sentences per row, or None where the rows allow none.

    ``texts``: each row's text, cut where another document begins; ``documents``: the document of
    its first part. No pair of neighbours crosses documents; the other kinds use the first part.
    """
    split = [[[t[a:b] for a, b in split_sentences(t)] for t in parts] for parts in texts]
    if kind == "adjacent":
        near = [[pair for part in parts for pair in pairwise(part)] for parts in split]
        return [
            found[int(random.integers(len(found)))] if found else None
            for found, random in zip(near, generators, strict=True)
        ]
    same = kind == "same-document"
    return _distant_pairs([parts[0] for parts in split], documents, generators, same)


def _distant_pairs(
    rows: list[list[str]],
    documents: list[str],
    generators: list[np.random.Generator],
    same_document: bool,
) -> list[tuple[str, str] | None]:
    """A sentence of each row and any other of the same document, or of another one."""
    sentences: list[str] = []  # of one document after another
    starts: dict[int, int] = {}
    lows: dict[str, int] = {}
    highs: dict[str, int] = {}
    for row in sorted(range(len(rows)), key=lambda row: documents[row]):
        starts[row] = len(sentences)
        lows.setdefault(documents[row], len(sentences))
        sentences += rows[row]
        highs[documents[row]] = len(sentences)
    pairs: list[tuple[str, str] | None] = []
    for row, random in enumerate(generators):
        low, high = lows[documents[row]], highs[documents[row]]
        choices = high - low - 1 if same_document else len(sentences) - (high - low)
        if not rows[row] or choices < 1:
            pairs.append(None)
            continue
        first = starts[row] + int(random.integers(len(rows[row])))
        other = int(random.integers(choices))
        if same_document:
            second = low + other + (low + other >= first)
        else:
            second = other + (high - low if other >= low else 0)
        pairs.append((sentences[first], sentences[second]))
    return pairs


class ViewReader:
    """Reads the rows of a view by corpus shard (and replica), checked against the corpus."""

    def __init__(self, corpus: Corpus, name: str):
        self.corpus, self.name = corpus, name
        self.shards = ShardSet(corpus.store, f"views/{name}")
        self.commits: dict[str, Commit] = self.shards.committed()
        self._open: dict[str, Shard] = {}
        self._batches: dict[tuple[str, int], pa.RecordBatch] = {}
        self._lists: dict[tuple[str, int, str], tuple[NDArray[np.int32], NDArray]] = {}

    @property
    def folder(self) -> str:
        """Where its shards are."""
        return self.shards.folder

    @cached_property
    def replicas(self) -> int:
        """How many replicas every corpus shard has."""
        # Text that was added a moment ago may have no masks yet; the rest of it has.
        every = range(len(self.corpus.commits))
        shards = [shard for shard in every if unit_of(shard, 0) in self.commits]
        count = 0
        while shards and all(unit_of(shard, count) in self.commits for shard in shards):
            count += 1
        return count

    def has(self, shard: int, replica: int | None = None) -> bool:
        """Whether the unit is committed."""
        return unit_of(shard, replica) in self.commits

    def batch(self, shard: int, index: int, replica: int | None = None) -> pa.RecordBatch:
        """Record batch ``index`` of one corpus shard's view."""
        unit = unit_of(shard, replica)
        if (unit, index) not in self._batches:
            batch = self._shard(unit, shard, replica).batch(index)
            check_aligned(batch, self.corpus, shard, index, f"views/{self.name}/{unit}")
            self._check_rows(batch, shard, index)
            self._batches[unit, index] = batch
        return self._batches[unit, index]

    def lists(
        self, shard: int, index: int, replica: int | None, name: str
    ) -> tuple[NDArray[np.int32], NDArray]:
        """Offsets and values of a list column of that batch, as views."""
        key = (unit_of(shard, replica), index, name)
        if key not in self._lists:
            self._lists[key] = list_views(self.batch(shard, index, replica)[name], name)
        return self._lists[key]

    def _shard(self, unit: str, shard: int, replica: int | None) -> Shard:
        if unit not in self._open:
            if unit not in self.commits:
                raise CacheFormatError(
                    f"view {self.name} has no unit {unit}; run `pipeline cache-teachers` to make it"
                )
            about = {"kind": "view", "view": self.name, "shard": shard}
            about |= {} if replica is None else {"replica": replica}
            fields = MaskedView.FIELDS if self._masked else PairView.FIELDS
            self._open[unit] = self.shards.open(self.commits[unit], about, fields)
        return self._open[unit]

    @property
    def _masked(self) -> bool:
        return self.name.startswith("masked-")

    def _check_rows(self, batch: pa.RecordBatch, shard: int, index: int) -> None:
        """CacheFormatError for what no writer of ours would have written."""
        beside = "positions" if self._masked else "token_types"
        offsets, ids = list_views(batch["input_ids"], "input_ids")
        others, flat = list_views(batch[beside], beside)
        ids = ids[offsets[0] : offsets[-1]]
        size = self.corpus.info["tokenizer"]["size"]
        sound = np.array_equal(offsets, others) and bool(((ids >= 0) & (ids < size)).all())
        if sound and self._masked:
            counts = np.diff(offsets)
            limit = np.repeat(
                self.corpus.lengths(shard, index * ROWS_PER_BATCH, len(batch)), counts
            )
            row, at = np.repeat(np.arange(len(counts)), counts), flat[offsets[0] : offsets[-1]]
            ascending = (np.diff(at.astype(np.int64)) > 0) | (np.diff(row) > 0)
            sound = bool((at < limit).all() and ascending.all())
        elif sound:
            sound = batch["text_a"].is_null().equals(batch["text_b"].is_null())
        if not sound:
            raise CacheFormatError(
                f"views/{self.name}: record batch {index} of shard {shard} has ids outside the "
                "vocabulary, positions outside its sequences or columns that do not agree"
            )


def check_aligned(
    batch: pa.RecordBatch,
    corpus: Corpus,
    shard: int,
    index: int,
    what: str,
    rows_per_batch: int = ROWS_PER_BATCH,
) -> None:
    """Raise CacheMismatchError unless the batch's digests are the corpus's, row by row."""
    expected = corpus.rows(shard, index * rows_per_batch, rows_per_batch)["digest"]
    if batch["digest"].equals(expected):
        return
    theirs, ours = batch["digest"].to_pylist(), expected.to_pylist()
    row = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours))
    raise CacheMismatchError(
        f"{what}: row {row} of record batch {index} does not belong to the corpus row beside it "
        "(their digests differ); these targets were made from another corpus"
    )
