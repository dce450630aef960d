"""What a plan knows of the corpus: what the cache holds of it, else what a sample of text tells.

Writes nothing but into the folder it is given: the sample's corpus, and a small corpus of rows on
which views are built and teachers are tried.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rekindle.data.corpus.additions import (
    begun_addition,
    claim_addition,
    complete_addition,
    describe_addition,
)
from rekindle.data.corpus.config import CorpusConfig, describe_corpus
from rekindle.data.corpus.corpus import (
    FIELDS,
    Corpus,
    about_shard,
    build_corpus,
    unit_of,
)
from rekindle.data.corpus.documents import Document, LeftOut, read_documents
from rekindle.data.corpus.records import arrow_batches
from rekindle.data.corpus.sources import PYTHON_DOCS, source_files
from rekindle.data.corpus.stored_tokenizer import TOKENIZER
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.permutation import permute
from rekindle.data.storage.atomic import write_lines
from rekindle.data.storage.manifest import MANIFEST, read_manifest
from rekindle.data.storage.shards import ROWS_PER_BATCH, ShardSet, describe
from rekindle.data.storage.store import Store, open_store
from rekindle.data.text_files import compression_of, open_text
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.text import counted

SAMPLE_BYTES = 2_000_000  # of text
SAMPLE_DOCUMENTS = 2_000
DENSITY_BYTES = 32 << 20  # of a compressed file are unpacked to learn how much is in it
PLACES = 8  # record batches of the corpus, spread over it, that the steps are taken from
STEPS = (1, 4, 16, 64, 256)  # sequences; the last step is what is left


@dataclass(frozen=True)
class SourceSample:
    """The first documents of the source, and the share of its bytes that they are."""

    documents: list[Document]
    share: float | None  # 1: all there is; None: the size of the source is not known
    left_out: str = ""  # bad records before their end, in words


@dataclass(frozen=True)
class CorpusSurvey:
    """The corpus as far as it is known before it is made."""

    present: Corpus | None  # what the cache holds of it
    reference: Corpus  # the whole corpus, or that of the sample
    steps: Corpus  # rows of the reference in shards of 1, 4, 16, … sequences
    sequences: int
    tokens: int
    estimated: bool
    basis: str  # what the numbers rest on, in words

    @property
    def new_sequences(self) -> int:
        """Sequences that are not in the cache yet."""
        return self.sequences - (len(self.present) if self.present else 0)

    @property
    def new_tokens(self) -> int:
        """Tokens of those sequences."""
        return max(0, self.tokens - self.present.tokens) if self.present else self.tokens


def survey_corpus(config: RunConfig, folder: Path) -> CorpusSurvey:
    """Sequences and tokens of the configured corpus: counted where the cache holds all of it, or
    the source is small; else estimated. ``folder`` is for what is made on the way.

    Raises InputError for a source without text or of unknown size, and CacheMismatchError when the
    cache holds another corpus.
    """
    present = _present(open_store(config.cache.path))
    if present is not None and _is_whole(present, config):
        reference, basis, estimated = present, "the corpus is in the cache", False
        sequences, tokens = len(present), present.tokens
    else:
        sample = sample_source(config.corpus)
        reference = _sample_corpus(sample, config.corpus, folder)
        sequences, tokens, estimated = _extrapolated(reference, sample, config.corpus)
        basis = _basis(sample) if estimated else "counted in the source"
        basis += sample.left_out
    if present is not None and not present.commits:
        present = None  # begun, and killed before there was anything
    if present is not None:
        sequences, tokens = max(sequences, len(present)), max(tokens, present.tokens)
    steps = _take_steps(reference, open_store(folder / "steps"))
    return CorpusSurvey(present, reference, steps, sequences, tokens, estimated, basis)


def _present(store: Store) -> Corpus | None:
    if not store.exists(MANIFEST):
        return None
    read_manifest(store)
    return Corpus(store) if store.names("corpus") else None


def _is_whole(present: Corpus, config: RunConfig) -> bool:
    """Whether nothing is missing of the configured corpus; CacheMismatchError if it is another."""
    info = describe_corpus(
        config.corpus, load_tokenizer(config.corpus.tokenizer), config.cache.sequences_per_shard
    )
    here = (len(present.commits), len(present))
    addition = claim_addition(present.store, info, config.corpus, lambda: here)
    return present.complete and addition.number < len(present.additions)


def _basis(sample: SourceSample) -> str:
    documents = counted(len(sample.documents), "document")
    share = "" if sample.share is None else f", about {100 * sample.share:.3g} % of the source"
    return f"estimated from the first {documents}{share}"


# --- from the source to a sample ------------------------------------------------------------------


def sample_source(config: CorpusConfig) -> SourceSample:
    """The first 2 MB of text or 2,000 documents, whichever is first.

    Raises InputError as ``read_documents`` does, and for a source without text.
    """
    documents: list[Document] = []
    read = total = 0.0
    left_out = LeftOut() if config.on_bad_record == "skip" else None
    for place, size in _places(config.source):
        full = len(documents) >= SAMPLE_DOCUMENTS or _text_bytes(documents) >= SAMPLE_BYTES
        stream = read_documents([place], config.text_field, config.domain_field, left_out)
        taken = list(_until_full(stream, documents))
        if place == PYTHON_DOCS:  # it is no file, and small
            read += _text_bytes(taken)
            total += _text_bytes(taken) + _text_bytes(stream)
        elif size is None:
            read += _text_bytes(taken)
            total += _text_bytes(taken) if next(stream, None) is None else np.nan
        else:
            total += size
            if not full:
                read += size if next(stream, None) is None else _bytes_read(place, size, taken)
    told = f"; {left_out.told()}" if left_out and left_out.counts() else ""
    if not documents:
        raise InputError(
            f"the corpus is empty: no text in {', '.join(config.source)} (field "
            f"{config.text_field!r}); give a source with at least one non-blank document{told}"
        )
    if np.isnan(total):
        return SourceSample(documents, None, told)
    return SourceSample(documents, read / total if 0 < read < total else 1.0, told)


def _places(source: Iterable[str]) -> list[tuple[str, int | None]]:
    """(what ``read_documents`` takes, bytes) for every file; None where bytes are not known."""
    places: dict[Path, tuple[str, int | None]] = {}
    for entry in source:
        files = source_files([entry])
        for path in map(Path, files):
            places.setdefault(path.resolve(), (str(path), path.stat().st_size))
        if not files:
            places.setdefault(Path(entry), (entry, None))
    return list(places.values())


def _until_full(stream: Iterator[Document], documents: list[Document]) -> Iterator[Document]:
    """What is moved from ``stream`` into ``documents``, until the sample is large enough."""
    size = _text_bytes(documents)
    while len(documents) < SAMPLE_DOCUMENTS and size < SAMPLE_BYTES:
        if (document := next(stream, None)) is None:
            return
        documents.append(document)
        size += _text_bytes([document])
        yield document


def _text_bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _bytes_read(path: str, size: int, taken: list[Document]) -> float:
    """About how many bytes of a file its first documents ``taken`` are."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1] == ".parquet":
        return size * min(1.0, len(taken) / pq.read_metadata(path).num_rows)
    if suffixes[-1] == ".arrow":
        return size * min(1.0, len(taken) / sum(batch.num_rows for batch in arrow_batches(path)))
    compression = compression_of(path)
    if ".txt" in suffixes:
        plain = _text_bytes(taken) + 2 * len(taken)  # the blank line between two
    else:
        plain = _bytes_of_lines(path, len(taken))
    return min(size, plain / (_density(path, compression) if compression else 1.0))


def _bytes_of_lines(path: str, lines: int) -> int:
    """Unpacked bytes of the first ``lines`` lines that are not blank."""
    size = 0
    with open_text(path) as stream:
        while lines and (line := stream.readline()):
            size += len(line)
            lines -= bool(line.strip())
    return size


def _density(path: str, compression: str) -> float:
    """Unpacked bytes per packed byte in the first part of a file."""
    unpacked = 0
    with pa.OSFile(path) as raw, pa.CompressedInputStream(raw, compression) as stream:
        while unpacked < DENSITY_BYTES and (piece := stream.read(1 << 20)):
            unpacked += len(piece)
        return unpacked / raw.tell()


# --- from a sample to corpora in a folder ---------------------------------------------------------


def _sample_corpus(sample: SourceSample, config: CorpusConfig, folder: Path) -> Corpus:
    """The sample packed as the corpus will be."""
    routed = any(document.domain is not None for document in sample.documents)
    path = folder / "sample.jsonl"
    write_lines(path, (d._asdict() | {"domain": d.domain or ""} for d in sample.documents))
    field = "domain" if routed else None
    source = {"source": (str(path),), "text_field": "text", "domain_field": field}
    return build_corpus(open_store(folder / "sample"), config.model_copy(update=source), 4096)


def _extrapolated(
    reference: Corpus, sample: SourceSample, config: CorpusConfig
) -> tuple[int, int, bool]:
    """Sequences and tokens of the whole corpus, and whether they are estimated."""
    limit = config.limit_sequences
    last: int = reference.commits[-1].facts["next"][0]  # the document that comes next
    if sample.share == 1 or (len(reference) == limit and last < len(sample.documents)):
        return len(reference), reference.tokens, False
    if sample.share is None and limit is None:
        raise InputError(
            f"how much text there is in {', '.join(config.source)} is not known before it is read "
            "to its end; set corpus.limit_sequences to plan for so many sequences"
        )
    sequences = limit or 0
    if sample.share is not None:
        whole = max(1, round(len(reference) / sample.share))
        sequences = whole if limit is None else min(limit, whole)
    return sequences, round(reference.tokens * sequences / len(reference)), True


def _take_steps(corpus: Corpus, store: Store) -> Corpus:
    """A corpus of up to 1,024 rows of ``corpus``, from all over it, in shards of growing size."""
    spread = np.unique(np.linspace(0, len(corpus) - 1, PLACES).astype(np.int64))
    places = zip(*(part.tolist() for part in corpus.locate(spread)), strict=True)
    batches = {(s, row // corpus.commits[s].rows_per_batch) for s, row in places}
    rows = pa.Table.from_batches(
        [corpus.shard(s).batch(b).replace_schema_metadata(None) for s, b in sorted(batches)]
    )
    rows = rows.take(permute(np.arange(len(rows)), len(rows), seed=0, epoch=0))
    addition, tokenizer = begun_addition(corpus.info["config"], []), corpus.info["tokenizer"]
    describe_addition(store, addition, tokenizer)
    for name in corpus.store.names(TOKENIZER):
        store.create(f"{TOKENIZER}/{name}", corpus.store.read_bytes(f"{TOKENIZER}/{name}"))
    shards = ShardSet(store, "corpus")
    count = start = 0
    for size in (*STEPS, len(rows)):
        part = rows.slice(start, size)
        if not len(part):
            break
        schema = describe(FIELDS, about_shard(count, addition, tokenizer))
        written = part.cast(schema).combine_chunks().to_batches(max_chunksize=ROWS_PER_BATCH)
        shards.write(unit_of(count), schema, written, _facts(part))
        count, start = count + 1, start + size
    complete_addition(store, addition, count, {})
    return Corpus(store)


def _facts(rows: pa.Table) -> dict[str, object]:
    tokens = sum(len(ids) for ids in rows["input_ids"])
    domains = Counter(domain for domain in rows["domain"].to_pylist() if domain is not None)
    return {"tokens": tokens, "next": [0, 0], "domains": dict(domains)}
