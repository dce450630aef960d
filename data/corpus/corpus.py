"""The corpus of a cache: text read once, tokenised for the student, packed into sequences.

Stored as shards under ``corpus/`` with the tokenizer beside them, one row per packed sequence. A
row's digest is a hash of its content; masks and targets are keyed by it. Teachers and views are
unknown here.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rekindle.data.corpus.additions import (
    Addition,
    complete_addition,
    count_left_out,
    empty_corpus_error,
    info_name,
    read_additions,
    record_addition,
    resolve_addition,
    shard_metadata,
)
from rekindle.data.corpus.columns import (
    DOCUMENTS,
    TOKEN_TYPES,
    TRAINED,
    TRAINED_FACTS,
    document_numbers,
    facts_of,
    fields_of,
    record_batches,
    required_columns,
)
from rekindle.data.corpus.config import (
    CorpusConfig,
    CorpusInfo,
    are_tokens,
    chat_template,
    describe_corpus,
    forms_of,
    given_encoder,
    tokenizer_facts,
    version_of,
    within_documents,
)
from rekindle.data.corpus.in_order import InOrder, in_threads
from rekindle.data.corpus.making import CorpusStream, PartMaker
from rekindle.data.corpus.packing import Position, packing_of
from rekindle.data.corpus.rows import PIECE_SEPARATOR, Rows, in_chunks
from rekindle.data.corpus.special_names import special_names
from rekindle.data.corpus.stored_tokenizer import check_gaps, read_tokenizer, save_tokenizer
from rekindle.data.corpus.tokenizer import Tokenizer, load_tokenizer
from rekindle.data.errors import CacheFormatError, CacheMismatchError
from rekindle.data.source.content import Form
from rekindle.data.source.documents import Fields, origins_of
from rekindle.data.source.held_texts import HeldCounts
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.parts import Reader
from rekindle.data.source.sources import Entry, Origin
from rekindle.data.storage.base import Store
from rekindle.data.storage.columns import flat_lists, list_views
from rekindle.data.storage.commits import Commits, ShardCommits
from rekindle.data.storage.cuts import Flat, Place, RowReader
from rekindle.data.storage.manifest import raise_version
from rekindle.data.storage.seal import REPAIR
from rekindle.data.storage.shards import ROWS_PER_BATCH, Shard, ShardSet, shard_schema
from rekindle.data.storage.units import unit_of


class Corpus(RowReader):
    """The sequences of a cache, by global number 0..len-1 in corpus order."""

    recomputed = ("tokenizer",)

    def __init__(self, store: Store):
        super().__init__()
        self.store = store
        self.shards = ShardSet(store, "corpus")
        self.additions, tokenizer = read_additions(store)
        if not self.additions:
            raise CacheFormatError(
                f"{store.location} holds no corpus ({info_name(0)} is missing): it is not a "
                "Rekindle cache, or `pipeline cache-teachers` was never started on it"
            )
        assert tokenizer is not None  # it is in the first description
        self.info: CorpusInfo = {"config": self.additions[-1].config, "tokenizer": tokenizer}
        self.commits_by_unit = self.shards.committed()
        self.commits = ShardCommits(self.commits_by_unit)
        first_missing = len(self.commits)
        if first_missing < max(len(self.commits_by_unit), self.additions[-1].shards or 0):
            raise CacheFormatError(
                f"{store.location}/corpus lacks shard {first_missing}; run `pipeline "
                "cache-teachers` to make it again"
            )
        self._firsts = np.concatenate([[0], np.cumsum(self.commits_by_unit.rows)])
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def complete(self) -> bool:
        """Return whether the source was read to its end (or to ``limit_sequences``)."""
        return self.additions[-1].shards is not None

    @property
    def tokens(self) -> int:
        """Return how many tokens all sequences have, special tokens included."""
        return int(self.commits_by_unit.count_facts("tokens").sum())

    @property
    def trained_tokens(self) -> int:
        """Return how many tokens are trained."""
        trained_fact = TRAINED_FACTS[0] if self.has_trained else "tokens"
        return int(self.commits_by_unit.count_facts(trained_fact).sum())

    @property
    def documents(self) -> int:
        """Return how many documents its sequences come from, blank ones included."""
        if not self.commits:
            return 0
        reached = Position(*self.commits[-1].facts["next"])
        return reached.document_index + (reached.token > 0)

    @cached_property
    def domains(self) -> dict[str, int]:
        """Return the number of sequences per domain."""
        sequences: Counter[str] = Counter()
        for shard, counts in enumerate(self.commits_by_unit.counts_by_name("domains")):
            if counts is None or {type(n) for n in counts.values()} - {int}:
                raise CacheFormatError(
                    f"the commit record of {self.commits[shard].path} does not count its domains. "
                    f"{REPAIR}"
                )
            sequences.update(counts)
        return dict(sequences)

    @property
    def bad_records(self) -> dict[str, int]:
        """Return how many records of the source were left out as bad, by kind."""
        return dict(next((one.bad_records for one in self.additions[::-1] if one.bad_records), {}))

    @property
    def held(self) -> HeldCounts:
        """Return how many records were left out because they hold a text of a test."""
        return next((one.held for one in self.additions[::-1] if sum(one.held)), HeldCounts())

    @cached_property
    def fingerprint(self) -> str:
        """Return the identity of the content: over every shard's sha256."""
        return self.fingerprint_of(len(self.commits))

    def fingerprint_of(self, shards: int) -> str:
        """Return the identity of the first shards only: of the corpus before it grew."""
        return self.commits_by_unit.fingerprint(shards)

    @property
    def fingerprints_before(self) -> Iterator[str]:
        """Yield the identity of every earlier state of the corpus: of its first shards."""
        state = hashlib.sha256()
        for digest in self.commits_by_unit.sha256s[:-1]:
            state.update(digest.encode())
            yield state.copy().hexdigest()

    def shard(self, index: int) -> Shard:
        """Return corpus shard ``index``, memory-mapped."""
        if index not in self._open:
            addition = [s for s in self.additions if s.first_shard <= index][-1]
            about = shard_metadata(index, addition, self.info["tokenizer"])
            commit, fields = self.commits[index], fields_of(self.info["config"])
            self._open[index] = self.shards.open(commit, about, fields, self._check_batch)
        return self._open[index]

    def _check_batch(self, index: int, batch: pa.RecordBatch) -> None:
        """Raise CacheFormatError for what our own code would not have written."""
        names = ("input_ids", "char_starts", "word_starts", *self._extra_lists)
        lists = {name: list_views(batch[name], name) for name in names}
        offsets, ids = lists["input_ids"]
        same_offsets = all(np.array_equal(offsets, others) for others, _ in lists.values())
        are_valid = are_tokens(ids[offsets[0] : offsets[-1]], self.info["tokenizer"])
        if not are_valid:
            check_gaps(self.store, self.info["tokenizer"], tokenizer_facts(self.tokenizer))
        has_nulls = any(batch[name].null_count for name in required_columns(self.info["config"]))
        if has_nulls or not same_offsets or not are_valid:
            raise CacheFormatError(
                f"{self.store.location}/corpus has rows with ids outside the vocabulary, nulls, or "
                "columns of different lengths: it was not written by Rekindle"
            )

    def rows(self, shard: int, first: int, count: int) -> pa.RecordBatch:
        """Return ``count`` rows of a shard, fewer at its end; they must lie in one record batch."""
        index, local = divmod(first, ROWS_PER_BATCH)
        return self.shard(shard).batch(index).slice(local, count)

    def _read_lists(self, shard: int, index: int, replica: int | None) -> Flat:
        batch = self.shard(shard).batch(index)
        offsets, columns = flat_lists(batch, ["input_ids", *self._extra_lists])
        return offsets, columns | ({DOCUMENTS: document_numbers(batch)} if self.is_packed else {})

    def text(self, name: str, place: Place) -> str | None:
        """Return the value of the text column ``name`` for a row."""
        index, local = divmod(place[1], ROWS_PER_BATCH)
        value: str | None = self.shard(place[0]).batch(index)[name][local].as_py()
        return value

    def lengths(self, shard: int, first: int, count: int) -> NDArray[np.int64]:
        """Return the number of tokens of each of those rows."""
        tokens = self.rows(shard, first, count)["input_ids"]
        return np.diff(tokens.offsets.to_numpy()).astype(np.int64)

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return shards and rows within them of global numbers; IndexError outside."""
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"sequence numbers lie in 0..{len(self) - 1}")
        shards = np.searchsorted(self._firsts, indices, side="right") - 1
        return shards, indices - self._firsts[shards]

    def shards_of(self, sequences: int) -> int | None:
        """Return how many of the first shards have that many sequences; None if no number does."""
        matching = np.flatnonzero(self._firsts == sequences)
        return int(matching[-1]) if len(matching) else None

    def first(self, shard: int) -> int:
        """Return the global number of a shard's first row."""
        return int(self._firsts[shard])

    @property
    def has_pairs(self) -> bool:
        """Return whether each of its sequences is a pair of texts."""
        return "pair_field" in self.info["config"]

    @property
    def has_groups(self) -> bool:
        """Return whether each of its sequences belongs to a group."""
        return "group_field" in self.info["config"]

    @property
    def has_trained(self) -> bool:
        """Return whether it marks each token as trained or not; otherwise all are."""
        return bool(self.info["config"].get("trained"))

    @property
    def is_packed(self) -> bool:
        """Return whether its sequences hold several documents, with attention within each."""
        return within_documents(self.info["config"])

    @property
    def full(self) -> float | None:
        """Return the share of a packed corpus's places that hold tokens; None if not packed."""
        places = len(self) * self.info["config"]["sequence_length"]
        return self.tokens / places if self.is_packed and places else None

    @property
    def _extra_lists(self) -> list[str]:
        return [*[TOKEN_TYPES] * self.has_pairs, *[TRAINED] * self.has_trained]

    def pairs(self, batch: pa.RecordBatch) -> list[tuple[str, str]]:
        """Return the two texts of each row of a record batch, uncut, in a corpus of pairs."""
        ends, texts = batch["span_end"].to_pylist(), batch["text"].to_pylist()
        cuts = [(end, end + len(PIECE_SEPARATOR)) for end in ends]
        return [(text[:a], text[b:]) for text, (a, b) in zip(texts, cuts, strict=True)]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer stored in the cache, reading texts as the corpus was read."""
        tokenizer = read_tokenizer(self.store, self.info["tokenizer"])
        as_tokens = self.info["config"].get("special_tokens") == "token"
        return tokenizer.reading_special_tokens() if as_tokens else tokenizer


def build_corpus(
    store: Store,
    config: CorpusConfig,
    sequences_per_shard: int,
    progress: Callable[[int, int], None] = lambda sequences, tokens: None,
    tell: bool = True,
    in_order: InOrder = in_threads,
) -> Corpus:
    """Make the corpus, or what is missing of it: after an interruption, a removed shard, a larger
    limit or appended source files.

    ``progress(sequences, tokens)`` is called with what each finished shard added; ``tell``: log the
    first records that are left out; ``in_order`` makes the parts of the source; the bytes do not
    depend on it. Raises InputError for a source without text, CacheMismatchError if the cache holds
    a corpus of another configuration or the source was changed.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if "chat" in config.contents:  # to be stored with the corpus
        tokenizer.hf.chat_template = chat_template(config, tokenizer).source
    if config.special_tokens == "token":
        tokenizer = tokenizer.reading_special_tokens()
    held = config.held_texts()
    info = describe_corpus(config, tokenizer, sequences_per_shard, held)
    shards = ShardSet(store, "corpus")
    committed = shards.committed()
    last = resolve_addition(store, info, config, lambda: _corpus_size(store, committed))
    raise_version(store, version_of(info["config"]))
    recorded = read_additions(store)[0]
    additions = [*recorded[: last.number], last]
    if committed:  # what a repair removed
        _describe(store, additions[: max(1, len(recorded))], tokenizer)
    # A new addition only once it has text: a mistake in the source must not claim the cache.
    claim_once = cache(partial(_describe, store, additions, tokenizer))
    for number, addition in enumerate(additions):
        count = max(committed.leading_shards, addition.first_shard)
        if addition.shards is not None and count >= addition.shards:
            continue
        later_additions = additions[number + 1 :]
        end_sequence = addition.end_sequence(later_additions)
        source = last.origins[: len(addition.order)] or config.entries
        left_out = LeftOut(config.on_bad_record == "skip", held)
        forms = forms_of(config, tokenizer)
        new_shards = _make_missing_shards(
            committed, tokenizer, addition, end_sequence, source, forms, left_out, in_order
        )
        for shard, rows, name_count in new_shards:
            count = shard + 1
            if unit_of(shard) in committed:
                continue
            claim_once()
            about = shard_metadata(shard, addition, info["tokenizer"])
            schema = shard_schema(fields_of(addition.config), about)
            batches = record_batches(rows, schema)
            commit = shards.write(unit_of(shard), schema, batches, facts_of(rows, name_count))
            committed.add(commit)
            progress(len(rows), commit.count_fact("tokens"))
        if not count and not later_additions:
            raise empty_corpus_error(config, left_out)
        claim_once()
        if tell:
            left_out.log_first()
        left_out_counts = count_left_out(left_out, committed, end_sequence)
        complete_addition(store, addition, count, *left_out_counts)
    return Corpus(store)


def _describe(store: Store, additions: Sequence[Addition], tokenizer: Tokenizer) -> None:
    """Record what the corpus is, as far as missing, and the tokenizer beside it."""
    for addition in additions:
        record_addition(store, addition, tokenizer_facts(tokenizer))
    save_tokenizer(store, tokenizer)


def _corpus_size(store: Store, committed: Commits) -> tuple[int, int]:
    """Return the shards and sequences after which a corpus may grow."""
    count = committed.leading_shards
    if count < len(committed):
        raise CacheMismatchError(
            f"{store.location}/corpus lacks shard {count}: run `pipeline cache-teachers` with the "
            "configuration the cache was made with, then with the longer corpus"
        )
    return count, int(committed.rows.sum())


def _make_missing_shards(
    committed: Commits,
    tokenizer: Tokenizer,
    addition: Addition,
    end_sequence: int | None,
    source: Sequence[Entry | Origin],
    forms: Mapping[str, Form],
    left_out: LeftOut,
    in_order: InOrder,
) -> Iterator[tuple[int, Rows, int]]:
    """Yield (shard number, its sequences, how many documents that begin in it hold names of special
    tokens) from the first missing shard on.

    ``end_sequence``: how many sequences the corpus has at the addition's end.
    """
    shard = max(committed.leading_shards, addition.first_shard)
    start = Position(*committed[unit_of(shard - 1)].facts["next"]) if shard else Position(0, 0)
    config = addition.config
    names = (config["text_field"], config["domain_field"], config.get("pair_field"))
    fields = Fields(*names, forms, config.get("group_field"))
    length = config["sequence_length"]
    maker = PartMaker(
        Reader(fields, left_out.skips_bad, left_out.held_texts),
        tokenizer.encoder,
        special_names(tokenizer),
        packing_of(tokenizer, length, config["packing"], config.get("end_of_text", False)),
        length,
        given_encoder(tokenizer, forms) if config.get("trained") else None,
    )
    stream = CorpusStream(origins_of(source), maker, left_out, in_order, start)
    remaining = None
    if end_sequence is not None:
        remaining = end_sequence - int(committed.rows[:shard].sum())
        if not remaining:
            if left_out.skips_bad or left_out.held_texts:
                stream.read_on()
            return
    for rows in in_chunks(stream.rows(), config["sequences_per_shard"], remaining):
        end = Position(*rows.ends[-1].tolist())
        yield shard, rows, stream.holders.count(start, end)
        shard, start = shard + 1, end
