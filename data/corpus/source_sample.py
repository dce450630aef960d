"""Sample the first documents of a source, and estimate their share of it, to predict the whole
before it is read.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rekindle.data.corpus.config import CorpusConfig, forms_of
from rekindle.data.corpus.encoded import lengths_of
from rekindle.data.corpus.packing import lacks_end, next_fit, packing_of, plan
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.source.content import TokenRow
from rekindle.data.source.documents import Document, read_documents
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.record_batches import arrow_batches
from rekindle.data.source.sources import (
    HUB,
    PYTHON_DOCS,
    TABLES,
    Entry,
    Origin,
    find_origins,
    recorded_origin,
)
from rekindle.data.source.tables import bytes_of_rows
from rekindle.data.storage.addresses import open_binary, states_of_objects
from rekindle.data.storage.client import is_remote
from rekindle.data.text_files import compression_of, open_text

SAMPLE_BYTES = 2_000_000  # bytes of text
SAMPLE_DOCUMENTS = 2_000
# bytes of a compressed file that are unpacked to estimate how much is in it
DENSITY_BYTES = 32 << 20


@dataclass(frozen=True)
class SourceSample:
    """The first documents of the source, and their share of its bytes."""

    documents: list[Document]
    share: float | None  # 1: everything; None: the size of the source is unknown
    left_out: LeftOut  # records before their end


def sample_source(config: CorpusConfig, tokenizer: Tokenizer | None = None) -> SourceSample:
    """Return the first 2 MB of text or 2,000 documents, whichever comes first. Files after them are
    not opened. ``tokenizer``: for a corpus with other content than texts.

    Raises InputError as ``read_documents`` does, and for a source without text.
    """
    sample = _Sample()
    bytes_read = bytes_total = 0.0
    left_out = LeftOut(config.on_bad_record == "skip", config.held_texts())
    forms = {} if tokenizer is None else forms_of(config, tokenizer)
    fields = (config.text_field, config.domain_field, left_out, config.pair_field, forms)
    for origin, size in _sizes(config.entries):
        if size is not None:
            bytes_total += size
            if sample.is_full:
                continue
        stream = read_documents([origin], *fields, config.group_field)
        left_out_before = left_out.total
        new_documents = sample.take(stream)
        if origin.format == PYTHON_DOCS:  # not a file, and small
            bytes_read += _text_bytes(new_documents)
            bytes_total += _text_bytes(new_documents) + _text_bytes(stream)
        elif size is None:
            bytes_read += _text_bytes(new_documents)
            bytes_total += _text_bytes(new_documents) if next(stream, None) is None else np.nan
        elif next(stream, None) is None:
            bytes_read += size
        else:
            rows = len(new_documents) + left_out.total - left_out_before
            bytes_read += _bytes_read(origin.place, size, new_documents, rows)
    documents = sample.documents
    if not documents:
        advice = left_out.advice("give a source with at least one non-blank document")
        raise InputError(
            f"the corpus is empty: no text in {', '.join(config.places)} (field "
            f"{config.text_field!r}); {advice}"
            f"{f'; {described}' if (described := left_out.describe()) else ''}"
        )
    if np.isnan(bytes_total):
        return SourceSample(documents, None, left_out)
    return SourceSample(
        documents, bytes_read / bytes_total if 0 < bytes_read < bytes_total else 1.0, left_out
    )


def _sizes(source: Iterable[Entry]) -> list[tuple[Origin, int | None]]:
    """Return (what is read, its bytes); None if bytes are unknown."""
    origins = find_origins([*source])
    files = [one.place for one in origins if one.is_file]
    sizes = {
        place: state[0] for place, state in states_of_objects([*filter(is_remote, files)]).items()
    }
    sizes |= {place: os.path.getsize(place) for place in files if place not in sizes}
    return [(one, sizes.get(one.place)) for one in origins]


@dataclass
class _Sample:
    """The documents of the sample so far, and the bytes of their text."""

    documents: list[Document] = field(default_factory=list)
    bytes: int = 0

    @property
    def is_full(self) -> bool:
        """Return whether the sample is large enough."""
        return len(self.documents) >= SAMPLE_DOCUMENTS or self.bytes >= SAMPLE_BYTES

    def take(self, stream: Iterator[Document]) -> list[Document]:
        """Take documents of ``stream`` until the sample is large enough; return them."""
        count_before = len(self.documents)
        while not self.is_full and (document := next(stream, None)) is not None:
            self.documents.append(document)
            self.bytes += _text_bytes([document])
        return self.documents[count_before:]


def _text_bytes(documents: Iterable[Document]) -> int:
    return sum(map(_bytes_of, documents))


def _bytes_of(document: Document) -> int:
    if isinstance(document.content, TokenRow):
        return document.content.ids.nbytes
    return sum(len(text.encode()) for text in document.texts)


def _bytes_read(path: str, size: int, sample: list[Document], rows: int) -> float:
    """Return about how many bytes of a file its first ``rows`` are, with the text ``sample``."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1] == ".parquet":
        with open_binary(path) as file:
            return size * min(1.0, rows / pq.read_metadata(file).num_rows)
    if suffixes[-1] == ".arrow":
        return size * min(1.0, rows / sum(batch.num_rows for batch in arrow_batches(path)))
    compression, table = compression_of(path), recorded_origin(path).format
    if ".txt" in suffixes:
        text_bytes = _text_bytes(sample) + 2 * len(sample)  # the blank line between two
    elif table in TABLES:
        text_bytes = bytes_of_rows(path, table == "tsv", rows)
    else:
        text_bytes = _bytes_of_lines(path, rows)
    return min(size, text_bytes / (_density(path, compression) if compression else 1.0))


def _bytes_of_lines(path: str, lines: int) -> int:
    """Return the unpacked bytes of the first ``lines`` lines that are not blank."""
    size = 0
    with open_text(path) as stream:
        while lines and (line := stream.readline()):
            size += len(line)
            lines -= bool(line.strip())
    return size


def _density(path: str, compression: str) -> float:
    """Return unpacked bytes per packed byte in the first part of a file."""
    unpacked = 0
    with open_binary(path) as raw, pa.input_stream(raw, compression=compression) as stream:
        while unpacked < DENSITY_BYTES and (piece := stream.read(1 << 20)):
            unpacked += len(piece)
        return unpacked / raw.tell()


def _estimate_tokens(document: Document) -> int:
    content = document.content
    return len(content.ids) if isinstance(content, TokenRow) else len(document.text) // 4


def estimate_sequences(config: CorpusConfig, tokenizer: Tokenizer) -> int | None:
    """Return about how many sequences the corpus will have, in a second or so; None if the size of
    the source is unknown. Raise InputError as ``sample_source`` does.
    """
    if any(origin.format == HUB for origin in find_origins(config.entries)):
        return config.limit_sequences
    sample = sample_source(config, tokenizer)
    if sample.share is None:
        return config.limit_sequences
    texts = [document.text for document in sample.documents]
    if config.contents != {"text"}:
        sequences = sum(_estimate_tokens(one) for one in sample.documents) // config.sequence_length
        if config.packing == "document":  # a dialogue is a sequence
            sequences = max(sequences, len(texts))
    elif config.pair_field is not None:
        tokens = tokenizer.uncut_lengths(texts, [str(one.pair) for one in sample.documents])
        sequences = int(np.count_nonzero(tokens > tokenizer.uncut_lengths([""], [""])))
    else:
        end = config.packing != "contiguous" and lacks_end(tokenizer)
        packing = packing_of(tokenizer, config.sequence_length, config.packing, end)
        tokens = lengths_of(tokenizer.encoder.encodings(texts))
        planned = plan(tokens.tolist(), 0, packing, last=True)
        sequences = len(planned.pieces)
        if packing.joins_rows:
            affixes = len(packing.prefix) + len(packing.suffix)
            lengths = planned.piece_lengths + affixes + len(packing.end) * planned.has_end
            domains = [sample.documents[number].domain for number in planned.document_of_piece]
            sequences = len(next_fit(lengths.tolist(), config.sequence_length, domains))
    estimate = max(1, round(sequences / sample.share))
    return min(estimate, config.limit_sequences or estimate)
