"""Count or estimate a corpus before it is made, from the cache or from a sample of its text, and
cut a small corpus on which views are built and teachers are timed.

Writes only to the given folder.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rekindle.data.corpus.additions import (
    complete_addition,
    last_document,
    new_addition,
    record_addition,
    recorded_shard_size,
    resolve_addition,
    shard_metadata,
)
from rekindle.data.corpus.columns import TRAINED, TRAINED_FACTS, fields_of
from rekindle.data.corpus.config import CorpusConfig, SourceEntry, describe_corpus
from rekindle.data.corpus.corpus import Corpus, build_corpus, unit_of
from rekindle.data.corpus.packing import default_shard_size
from rekindle.data.corpus.source_sample import SourceSample, sample_source
from rekindle.data.corpus.stored_tokenizer import TOKENIZER
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.forms.written import content_of, row_of
from rekindle.data.permutation import permute
from rekindle.data.source.held_texts import HeldCounts
from rekindle.data.source.left_out import describe_held
from rekindle.data.source.sources import Content
from rekindle.data.storage.atomic import write_lines
from rekindle.data.storage.base import Store
from rekindle.data.storage.manifest import MANIFEST, read_manifest
from rekindle.data.storage.shards import ROWS_PER_BATCH, ShardSet, shard_schema
from rekindle.data.storage.store import open_store
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.scale import Scale

SAMPLED_BATCHES = 8  # record batches, spread over the corpus, that the probe corpus is made from
FEW_TEXTS = 100  # texts; an estimate from fewer is rough
PROBE_SHARD_SIZES = (1, 4, 16, 64, 256)  # sequences; a last shard has all others


@dataclass(frozen=True)
class CorpusSurvey:
    """What is known of the corpus before it is made."""

    cached: Corpus | None  # the part in the cache
    reference: Corpus  # the whole corpus, or the sample's
    probe_corpus: Corpus  # rows of the reference, in shards of growing size
    sequences: int
    tokens: int
    estimated: bool
    basis: str  # what the numbers are based on, in words
    texts: int | None = None  # documents, if the user asked for a number
    warnings: tuple[str, ...] = ()

    @property
    def new_sequences(self) -> int:
        """Sequences not in the cache yet."""
        return self.sequences - (len(self.cached) if self.cached else 0)

    @property
    def shard_size(self) -> int:
        """Sequences per shard if the configuration does not set it."""
        recorded = None if self.cached is None else recorded_shard_size(self.cached.store)
        return recorded or default_shard_size(self.sequences)

    @property
    def new_tokens(self) -> int:
        """Tokens of the sequences not in the cache yet."""
        return max(0, self.tokens - self.cached.tokens) if self.cached else self.tokens


def survey_corpus(config: RunConfig, folder: Path, scale: Scale | None = None) -> CorpusSurvey:
    """Return the sequences and tokens of the configured corpus. They are counted if the cache holds
    it all or the source is small, else estimated. Intermediate files go to ``folder``.

    With a ``scale``, or beside a cache of another corpus, the figures are for a new cache. Raise
    InputError for a source without text or of unknown size.
    """
    cached = _read_cached(open_store(config.cache.path))
    is_whole, warnings = False, tuple[str, ...]()
    if cached is not None:
        is_whole, reason = _compare_cached(cached, config, scale)
        cached, warnings = (None, (reason,)) if reason else (cached, ())
    texts = None
    if cached is not None and is_whole:
        reference, basis, estimated = cached, "the corpus is in the cache", False
        if without := cached.info["config"].get("without"):
            basis += f"; {describe_held(cached.held, without['files'])}"
        sequences, tokens = len(cached), cached.tokens
    else:
        corpus = config.corpus.model_copy(update={"limit_sequences": None} if scale else {})
        sample = sample_source(corpus, load_tokenizer(corpus.tokenizer))
        reference = _sample_corpus(sample, corpus, folder)
        if scale is None:
            sequences, tokens, estimated = _extrapolated(reference, sample, corpus)
            basis = _basis(sample) if estimated else "counted in the source"
        else:
            text_count = len(sample.documents)
            texts, tokens = scale.of(text_count, reference.tokens)
            sequences, estimated = max(1, round(len(reference) * tokens / reference.tokens)), True
            few_note = " (few: the figures are rough)" if text_count < FEW_TEXTS else ""
            basis = f"scaled from {counted(text_count, 'text')} of the source{few_note}"
        if left_out_note := sample.left_out.describe(
            last_document(reference.commits_by_unit, corpus.limit_sequences)
        ):
            basis += f"; {'within these documents, ' * estimated}{left_out_note}"
    if cached is not None and not cached.commits:
        cached = None  # begun, but killed before anything was written
    if cached is not None:
        sequences, tokens = max(sequences, len(cached)), max(tokens, cached.tokens)
    probe_corpus = _build_probe_corpus(reference, open_store(folder / "probe"))
    return CorpusSurvey(
        cached=cached,
        reference=reference,
        probe_corpus=probe_corpus,
        sequences=sequences,
        tokens=tokens,
        estimated=estimated,
        basis=basis,
        texts=texts,
        warnings=warnings,
    )


def _read_cached(store: Store) -> Corpus | None:
    if not store.exists(MANIFEST):
        return None
    read_manifest(store)
    return Corpus(store) if store.names("corpus") else None


def _compare_cached(
    cached: Corpus, config: RunConfig, scale: Scale | None
) -> tuple[bool, str | None]:
    """Return whether the cache holds the whole configured corpus, and the reason to plan a new
    cache instead, or None.
    """
    cache_path = config.cache.path
    names = ", ".join(cached.store.folders("targets")) or "none"
    contents = f"{counted(len(cached), 'sequence')}, {counted(cached.tokens, 'token')}"
    contents = f"{cache_path} has {contents}; teachers: {names}"
    if scale is not None:
        return False, f"the figures are for a new cache; what is there is not counted: {contents}"
    size = config.cache.sequences_per_shard or cached.info["config"]["sequences_per_shard"]
    tokenizer, held_texts = load_tokenizer(config.corpus.tokenizer), config.corpus.held_texts()
    info = describe_corpus(config.corpus, tokenizer, size, held_texts)
    size_in_cache = (len(cached.commits), len(cached))
    try:
        addition = resolve_addition(cached.store, info, config.corpus, lambda: size_in_cache)
    except CacheMismatchError as error:
        return False, f"the figures are for a new cache: {error}. {contents}"
    return cached.complete and addition.number < len(cached.additions), None


def _basis(sample: SourceSample) -> str:
    documents = counted(len(sample.documents), "document")
    share = "" if sample.share is None else f", about {100 * sample.share:.3g} % of the source"
    return f"estimated from the first {documents}{share}"


# --- from a sample to corpora in a folder ---------------------------------------------------------


def _sample_corpus(sample: SourceSample, config: CorpusConfig, folder: Path) -> Corpus:
    """Pack the sample as the corpus will be packed."""
    has_domains = any(document.domain is not None for document in sample.documents)
    entries = []
    for number, (content, documents) in enumerate(groupby(sample.documents, content_of)):
        path = folder / f"sample-{number}.jsonl"
        write_lines(path, map(row_of, documents))
        entries.append(SourceEntry.model_construct(path=str(path), format=cast("Content", content)))
    field = "domain" if has_domains else None
    source = {"source": tuple(entries), "text_field": "text", "domain_field": field}
    pair = {"pair_field": config.pair_field and "pair"}
    pair |= {"group_field": config.group_field and "group"}
    left_out = {"without": (), "without_fields": ()}  # left out already
    sample_config = config.model_copy(update=source | pair | left_out)
    return build_corpus(open_store(folder / "sample"), sample_config, 4096, tell=False)


def _extrapolated(
    reference: Corpus, sample: SourceSample, config: CorpusConfig
) -> tuple[int, int, bool]:
    """Return the sequences and tokens of the whole corpus, and whether they are estimated."""
    limit = config.limit_sequences
    next_document: int = reference.commits[-1].facts["next"][0]
    if sample.share == 1 or (len(reference) == limit and next_document < len(sample.documents)):
        return len(reference), reference.tokens, False
    if sample.share is None and limit is None:
        raise InputError(
            f"how much text there is in {', '.join(config.places)} is unknown until all of it has "
            "been read; set corpus.limit_sequences to plan for a number of sequences"
        )
    sequences = limit or 0
    if sample.share is not None:
        total = max(1, round(len(reference) / sample.share))
        sequences = total if limit is None else min(limit, total)
    return sequences, round(reference.tokens * sequences / len(reference)), True


def _build_probe_corpus(corpus: Corpus, store: Store) -> Corpus:
    """Copy up to 1,024 rows from all over ``corpus`` into shards of growing size, so that a slow
    teacher can be timed on few of them.
    """
    sampled = np.unique(np.linspace(0, len(corpus) - 1, SAMPLED_BATCHES).astype(np.int64))
    places = zip(*(part.tolist() for part in corpus.locate(sampled)), strict=True)
    batches = {(s, row // corpus.commits[s].rows_per_batch) for s, row in places}
    rows = pa.Table.from_batches(
        [corpus.shard(s).batch(b).replace_schema_metadata(None) for s, b in sorted(batches)]
    )
    rows = rows.take(permute(np.arange(len(rows)), len(rows), seed=0, epoch=0))
    addition, tokenizer = new_addition(corpus.info["config"], []), corpus.info["tokenizer"]
    fields = fields_of(addition.config)
    record_addition(store, addition, tokenizer)
    for name in corpus.store.names(TOKENIZER):
        store.create(f"{TOKENIZER}/{name}", corpus.store.read_bytes(f"{TOKENIZER}/{name}"))
    shards = ShardSet(store, "corpus")
    count = start = 0
    for size in (*PROBE_SHARD_SIZES, len(rows)):
        part = rows.slice(start, size)
        if not len(part):
            break
        schema = shard_schema(fields, shard_metadata(count, addition, tokenizer))
        written = part.cast(schema).combine_chunks().to_batches(max_chunksize=ROWS_PER_BATCH)
        shards.write(unit_of(count), schema, written, _facts(part))
        count, start = count + 1, start + size
    complete_addition(store, addition, count, {}, HeldCounts())
    return Corpus(store)


def _facts(rows: pa.Table) -> dict[str, object]:
    tokens = sum(len(ids) for ids in rows["input_ids"])
    domains = Counter(domain for domain in rows["domain"].to_pylist() if domain is not None)
    facts: dict[str, object] = {"tokens": tokens, "next": [0, 0], "domains": dict(domains)}
    if TRAINED in rows.schema.names:
        trained = pc.sum(pc.list_flatten(rows[TRAINED])).as_py()
        facts |= dict.fromkeys(TRAINED_FACTS, 0) | {TRAINED_FACTS[0]: trained}
    return facts
