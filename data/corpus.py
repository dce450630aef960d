"""The corpus of a cache: text read once, tokenised for the student, packed into sequences.

Stored as shards under ``corpus/`` with the tokenizer beside them. One row per packed sequence; a
row's digest is a hash of its content and is what masks and targets are keyed by. Knows nothing of
teachers and views.
"""

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count as count_from
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from pydantic import Field, field_validator

from rekindle.data.columns import list_array, list_type, offsets_of
from rekindle.data.documents import read_documents, source_files
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.data.packing import Position, pack
from rekindle.data.packing import Sequence as PackedSequence
from rekindle.data.settings import Settings
from rekindle.data.shards import ROWS_PER_BATCH, Commit, Shard, ShardSet, describe
from rekindle.data.store import Store
from rekindle.data.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger("rekindle")

INFO = "corpus/corpus.json"
COMPLETE = "corpus/complete.json"
BUCKETS = 10_000  # documents fall into these by hash; a held-out split is a range of them
MAX_SEQUENCE_LENGTH = 65_536  # positions are stored as uint16
SAMPLES = 8  # places at which a source file is looked at, to notice that it was changed
SAMPLE_BYTES = 1 << 16

FIELDS = [
    pa.field("digest", pa.string()),
    pa.field("input_ids", list_type(pa.int32())),
    pa.field("char_starts", list_type(pa.int32())),
    pa.field("word_starts", list_type(pa.bool_())),
    pa.field("document_starts", list_type(pa.int32())),
    pa.field("document", pa.string()),
    pa.field("domain", pa.string()),
    pa.field("span_start", pa.int64()),
    pa.field("span_end", pa.int64()),
    pa.field("text", pa.string()),
    pa.field("bucket", pa.uint16()),
]


class CorpusConfig(Settings):
    """Where the text comes from and how it becomes sequences."""

    source: tuple[str, ...] = Field(
        description="files or globs (txt, jsonl, parquet, arrow), a datasets id, or python-docs"
    )
    text_field: str = Field("text", description="the field of a record that holds its text")
    domain_field: str | None = Field(None, description="the field that names a record's domain")
    tokenizer: str = Field(description="the student's tokenizer: a directory or a hub id")
    sequence_length: int = Field(
        128,
        ge=8,
        le=MAX_SEQUENCE_LENGTH,
        description="tokens per sequence, special tokens included",
    )
    packing: Literal["document", "contiguous"] = Field(
        "document", description="document never crosses a document; contiguous fills every sequence"
    )
    limit_sequences: int | None = Field(None, gt=0, description="stop after this many sequences")

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def digest_of(sequence: PackedSequence) -> str:
    """The identity of an example: 128 bits over its token ids and its text, as 32 hex digits."""
    state = xxhash.xxh3_128(sequence.input_ids.astype("<i4").tobytes())
    state.update(sequence.text.encode("utf-8", "surrogatepass"))
    return str(state.hexdigest())


def unit_of(shard: int, replica: int | None = None) -> str:
    """The name of a unit of work: a corpus shard, or one masked replica of it."""
    return f"{shard:05d}" if replica is None else f"{shard:05d}-r{replica:03d}"


class Corpus:
    """The sequences of a cache, by global number 0..len-1 in corpus order."""

    def __init__(self, store: Store):
        self.store = store
        self.shards = ShardSet(store, "corpus")
        try:
            self.info: dict[str, Any] = store.read_json(INFO)
        except FileNotFoundError:
            raise CacheFormatError(
                f"{store.location} holds no corpus ({INFO} is missing): it is not a Rekindle "
                "cache, "
                "or `pipeline cache-teachers` was never started on it"
            ) from None
        committed = self.shards.committed()
        self._planned = _planned_shards(store)
        missing = first_missing(committed)
        if missing < max(len(committed), self._planned or 0):
            raise CacheFormatError(
                f"{store.location}/corpus lacks shard {missing}; run `pipeline cache-teachers` to "
                "have it made again"
            )
        self.commits: list[Commit] = [committed[unit_of(i)] for i in range(missing)]
        self._firsts = np.cumsum([0] + [c.rows for c in self.commits])
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def complete(self) -> bool:
        """Whether the source was read to its end (or to ``limit_sequences``)."""
        return self._planned is not None

    @property
    def tokens(self) -> int:
        """Tokens in all sequences, special tokens included."""
        return sum(c.facts["tokens"] for c in self.commits)

    @cached_property
    def domains(self) -> dict[str, int]:
        """Sequences per domain."""
        return dict(sum((Counter(c.facts["domains"]) for c in self.commits), Counter()))

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the content: over every shard's sha256."""
        return hashlib.sha256("".join(c.sha256 for c in self.commits).encode()).hexdigest()

    def shard(self, index: int) -> Shard:
        """Corpus shard ``index``, memory-mapped."""
        if index not in self._open:
            about = {"kind": "corpus", "shard": index}
            about |= {key: self.info[key] for key in ("config", "tokenizer")}
            self._open[index] = self.shards.open(self.commits[index], about)
        return self._open[index]

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number and row within it of global sequence numbers; IndexError outside."""
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"sequence numbers lie in 0..{len(self) - 1}")
        shards = np.searchsorted(self._firsts, indices, side="right") - 1
        return shards, indices - self._firsts[shards]

    def first(self, shard: int) -> int:
        """The global number of a shard's first row."""
        return int(self._firsts[shard])

    def buckets(self) -> NDArray[np.uint16]:
        """The hash bucket (0..9999) of every sequence's document, in corpus order."""
        parts = [self.shard(i).table()["bucket"].to_numpy() for i in range(len(self.commits))]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored in the cache."""
        with tempfile.TemporaryDirectory() as folder:
            for name in self.store.names("corpus/tokenizer"):
                content = self.store.read_bytes(f"corpus/tokenizer/{name}")
                (Path(folder) / name).write_bytes(content)
            tokenizer = load_tokenizer(folder)
        if tokenizer.digest != self.info["tokenizer"]["digest"]:
            raise CacheMismatchError(
                f"{self.store.location}/corpus/tokenizer is not the tokenizer the corpus was made "
                "with"
            )
        return tokenizer


def build_corpus(
    store: Store,
    config: CorpusConfig,
    sequences_per_shard: int,
    progress: Callable[[int, int], None] = lambda sequences, tokens: None,
) -> Corpus:
    """Make the corpus, or what is missing of it: after an interruption, or a shard taken away.

    ``progress(sequences, tokens)`` is called with what each finished shard added. Raises InputError
    for a source without text, CacheMismatchError when the cache holds a corpus of another
    configuration or when the source was changed since.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    info = _describe(config, tokenizer, sequences_per_shard)
    planned = _planned_shards(store)
    _check_claim(store, info)
    _check_sources(store, config, complete=planned is not None)
    shards = ShardSet(store, "corpus")
    committed = shards.committed()
    if planned is not None and first_missing(committed) >= planned:
        return Corpus(store)
    count = first_missing(committed)
    for shard, rows, where in _shards_after(committed, config, tokenizer, sequences_per_shard):
        count = shard + 1
        if unit_of(shard) in committed:
            continue
        if shard == 0:  # not before there is text: a mistake in the source must not claim the cache
            _claim(store, info, config)
            _save_tokenizer(store, tokenizer)
        facts = _facts(rows, where)
        schema = describe(FIELDS, {"kind": "corpus", "shard": shard, **info})
        shards.write(unit_of(shard), schema, _batches(rows, schema), facts)
        progress(len(rows), facts["tokens"])
    if not count:
        raise InputError(
            f"the corpus is empty: no text in {', '.join(config.source)} (field "
            f"{config.text_field!r}); give a source with at least one non-blank document"
        )
    store.create(COMPLETE, json.dumps({"shards": count}).encode())
    return Corpus(store)


def first_missing(committed: Mapping[str, Commit]) -> int:
    """The number of the first shard that is not there."""
    return next(n for n in count_from(0) if unit_of(n) not in committed)


def _planned_shards(store: Store) -> int | None:
    """How many shards a finished corpus has; None while it is being made."""
    try:
        return int(store.read_json(COMPLETE)["shards"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError):
        raise CacheFormatError(
            f"{store.location}/{COMPLETE} is damaged; delete it and run `pipeline cache-teachers`"
        ) from None


def _describe(
    config: CorpusConfig, tokenizer: Tokenizer, sequences_per_shard: int
) -> dict[str, Any]:
    """What a corpus is made of: everything that decides its bytes, nothing that does not."""
    values = config.model_dump(mode="json", exclude={"tokenizer"})
    return {
        "config": values | {"sequences_per_shard": sequences_per_shard},
        "tokenizer": {
            "digest": tokenizer.digest,
            "size": tokenizer.size,
            "mask_id": tokenizer.mask_id,
            "pad_id": tokenizer.pad_id,
            "eos_id": tokenizer.eos_id,
            "special_ids": sorted(tokenizer.special_ids),
        },
    }


def _claim(store: Store, info: dict[str, Any], config: CorpusConfig) -> None:
    """Record what this cache's corpus is, or insist that it already is the same."""
    content = info | {"sources": _sources(config)}
    if not store.create(INFO, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()):
        _check_claim(store, info)


def _check_claim(store: Store, info: dict[str, Any]) -> None:
    try:
        present = store.read_json(INFO)
        old, old_tokenizer, _ = present["config"], present["tokenizer"], present["sources"]
    except FileNotFoundError:
        return
    except (KeyError, TypeError):
        raise CacheFormatError(
            f"{store.location}/{INFO} is damaged: it does not say what the corpus is made of. "
            "Take it from a copy of the cache, or use another cache.path"
        ) from None
    if old_tokenizer != info["tokenizer"]:
        difference = "another tokenizer"
    else:
        new = info["config"]
        keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        difference = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in keys)
    if difference:
        raise CacheMismatchError(
            f"{store.location} holds a corpus made differently ({difference}). "
            "Use another cache.path for this corpus, or the configuration the cache was made with"
        )


def _sources(config: CorpusConfig) -> dict[str, list[Any]]:
    """Size and a checksum of samples of every source file, by path."""
    return {f.path: [f.bytes, _sampled(f.path, f.bytes)] for f in source_files(config.source)}


def _sampled(path: str, size: int) -> str:
    state = xxhash.xxh3_64()
    with open(path, "rb") as file:
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            state.update(file.read(SAMPLE_BYTES))
    return str(state.hexdigest())


def _check_sources(store: Store, config: CorpusConfig, complete: bool) -> None:
    """A changed source must not be mixed with what was read of it before, nor pass unnoticed."""
    try:
        recorded = store.read_json(INFO)["sources"]
    except FileNotFoundError:
        return
    try:
        present = _sources(config)
    except InputError:
        if not complete:
            raise
        log.info("the corpus source is no longer there; going on with the corpus in the cache")
        return
    changed = sorted(
        p for p in recorded.keys() | present.keys() if recorded.get(p) != present.get(p)
    )
    if changed:
        raise CacheMismatchError(
            f"the corpus source has changed since the cache was begun: {', '.join(changed[:3])}. "
            "Use another cache.path for the new text"
        )


def _save_tokenizer(store: Store, tokenizer: Tokenizer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for file in sorted(f for f in Path(folder).iterdir() if f.is_file()):
            store.create(f"corpus/tokenizer/{file.name}", file.read_bytes())


def _shards_after(
    committed: Mapping[str, Commit],
    config: CorpusConfig,
    tokenizer: Tokenizer,
    sequences_per_shard: int,
) -> Iterator[tuple[int, list[PackedSequence], Position]]:
    """(shard number, its sequences, where the next begins) from the first missing shard on."""
    shard = first_missing(committed)
    start = Position(*committed[unit_of(shard - 1)].facts["next"]) if shard else Position(0, 0)
    documents = read_documents(config.source, config.text_field, config.domain_field)
    sequences = pack(
        tokenizer.encode_documents(islice(documents, start.document_index, None)),
        sequence_length=config.sequence_length,
        packing=config.packing,
        tokenizer=tokenizer,
        start=start,
    )
    remaining = None
    if config.limit_sequences is not None:
        remaining = config.limit_sequences - sum(committed[unit_of(n)].rows for n in range(shard))
    limited = islice(sequences, remaining)
    while taken := list(islice(limited, sequences_per_shard)):
        yield shard, [sequence for sequence, _ in taken], taken[-1][1]
        shard += 1


def _facts(rows: Sequence[PackedSequence], where: Position) -> dict[str, Any]:
    return {
        "tokens": sum(len(r.input_ids) for r in rows),
        "next": list(where),
        "domains": dict(sorted(Counter(r.domain for r in rows if r.domain is not None).items())),
    }


def _batches(rows: Sequence[PackedSequence], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for first in range(0, len(rows), ROWS_PER_BATCH):
        yield _batch(rows[first : first + ROWS_PER_BATCH], schema)


def _batch(rows: Sequence[PackedSequence], schema: pa.Schema) -> pa.RecordBatch:
    offsets = offsets_of([len(r.input_ids) for r in rows])
    columns = [
        pa.array([digest_of(r) for r in rows], pa.string()),
        list_array(offsets, np.concatenate([r.input_ids for r in rows])),
        list_array(offsets, np.concatenate([r.char_starts for r in rows])),
        list_array(offsets, np.concatenate([r.word_starts for r in rows])),
        list_array(
            offsets_of([len(r.document_starts) for r in rows]),
            np.concatenate([r.document_starts for r in rows]),
        ),
        pa.array([r.document for r in rows], pa.string()),
        pa.array([r.domain for r in rows], pa.string()),
        pa.array([r.span[0] for r in rows], pa.int64()),
        pa.array([r.span[1] for r in rows], pa.int64()),
        pa.array([r.text for r in rows], pa.string()),
        pa.array([_bucket(r.document) for r in rows], pa.uint16()),
    ]
    return pa.record_batch(columns, schema=schema)


def _bucket(document: str) -> int:
    return int(xxhash.xxh3_64_intdigest(document.encode("utf-8", "surrogatepass"))) % BUCKETS
