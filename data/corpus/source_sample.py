"""The first documents of a source, and how much of it they are: so that what all of it will be can
be told before it is read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.packing import lacks_end, pack_documents
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.source.documents import Document, LeftOut, read_documents
from rekindle.data.source.records import arrow_batches
from rekindle.data.source.sources import PYTHON_DOCS, TABLES, recorded_origin, source_files
from rekindle.data.source.tables import bytes_of_rows
from rekindle.data.text_files import compression_of, open_text

SAMPLE_BYTES = 2_000_000  # of text
SAMPLE_DOCUMENTS = 2_000
DENSITY_BYTES = 32 << 20  # of a compressed file are unpacked to learn how much is in it


@dataclass(frozen=True)
class SourceSample:
    """The first documents of the source, and the share of its bytes that they are."""

    documents: list[Document]
    share: float | None  # 1: all there is; None: the size of the source is not known
    left_out: LeftOut  # of the records before their end


def sample_source(config: CorpusConfig) -> SourceSample:
    """The first 2 MB of text or 2,000 documents, whichever is first.

    Raises InputError as ``read_documents`` does, and for a source without text.
    """
    documents: list[Document] = []
    read = total = 0.0
    left_out = LeftOut(config.on_bad_record == "skip", config.held_texts())
    for place, size in _places(config.source):
        full = len(documents) >= SAMPLE_DOCUMENTS or _text_bytes(documents) >= SAMPLE_BYTES
        fields = (config.text_field, config.domain_field, left_out, config.pair_field)
        stream = read_documents([place], *fields)
        before = left_out.total
        taken = list(_until_full(stream, documents))
        rows = len(taken) + left_out.total - before
        if place == PYTHON_DOCS:  # it is no file, and small
            read += _text_bytes(taken)
            total += _text_bytes(taken) + _text_bytes(stream)
        elif size is None:
            read += _text_bytes(taken)
            total += _text_bytes(taken) if next(stream, None) is None else np.nan
        else:
            total += size
            if not full:
                read += (
                    size if next(stream, None) is None else _bytes_read(place, size, taken, rows)
                )
    if not documents:
        advice = left_out.advice("give a source with at least one non-blank document")
        raise InputError(
            f"the corpus is empty: no text in {', '.join(config.source)} (field "
            f"{config.text_field!r}); {advice}"
            f"{f'; {told}' if (told := left_out.told()) else ''}"
        )
    if np.isnan(total):
        return SourceSample(documents, None, left_out)
    return SourceSample(documents, read / total if 0 < read < total else 1.0, left_out)


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
    return sum(len(text.encode()) for document in documents for text in document.texts)


def _bytes_read(path: str, size: int, taken: list[Document], rows: int) -> float:
    """About how many bytes of a file its first ``rows`` are, of which ``taken`` is the text."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1] == ".parquet":
        return size * min(1.0, rows / pq.read_metadata(path).num_rows)
    if suffixes[-1] == ".arrow":
        return size * min(1.0, rows / sum(batch.num_rows for batch in arrow_batches(path)))
    compression, table = compression_of(path), recorded_origin(path).format
    if ".txt" in suffixes:
        plain = _text_bytes(taken) + 2 * len(taken)  # the blank line between two
    elif table in TABLES:
        plain = bytes_of_rows(path, table == "tsv", rows)
    else:
        plain = _bytes_of_lines(path, rows)
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


def about_sequences(config: CorpusConfig, tokenizer: Tokenizer) -> int | None:
    """About how many sequences the corpus will have, in a second or so; None where the size of the
    source is not known. Raises InputError as ``sample_source`` does.
    """
    if any(size is None and place != PYTHON_DOCS for place, size in _places(config.source)):
        return config.limit_sequences
    sample = sample_source(config)
    if sample.share is None:
        return config.limit_sequences
    sequences = pack_documents(
        sample.documents,
        sequence_length=config.sequence_length,
        packing=config.packing,
        tokenizer=tokenizer,
        pairs=config.pair_field is not None,
        end_of_text=config.packing == "document" and lacks_end(tokenizer),
    )
    whole = max(1, round(sum(1 for _ in sequences) / sample.share))
    return min(whole, config.limit_sequences or whole)
