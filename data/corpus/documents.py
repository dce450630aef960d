"""Real text as a stream of documents: txt, jsonl, parquet, arrow, a datasets id, the Python docs.

Never holds a whole file: lines and record batches are read as they are wanted. It knows nothing of
tokens. Every mistake in the source is an InputError that names the place.
"""

import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rekindle.data.corpus.python_docs import python_docs
from rekindle.data.errors import InputError, did_you_mean

PYTHON_DOCS = "python-docs"
TEXT_DOCUMENT_BYTES = 1 << 20  # a document of a .txt file is never longer
_SUFFIXES = {f".{name}": name for name in ("txt", "jsonl", "parquet", "arrow")} | {".json": "jsonl"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KNOWN_SUFFIXES = ".txt, .jsonl, .json (each also .gz, .zst), .parquet, .arrow"
# owner/name or name, then optionally :config and :split
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^:/]*){0,2}")
_ROWS_AT_A_TIME = 256  # bounds what becomes Python objects when record batches are large


class Document(NamedTuple):
    """One text of the corpus.

    ``id`` is the record's own ``id`` (text or integer) or "<file name>:<row>", where the row counts
    from 1: records of parquet, arrow and datasets, lines of jsonl and txt.
    """

    id: str
    text: str
    domain: str | None


class _Origin(NamedTuple):
    format: str  # txt | jsonl | parquet | arrow | hub | python-docs
    place: str  # a path, or a datasets id
    compression: str | None = None

    @property
    def is_file(self) -> bool:
        return self.format not in ("hub", PYTHON_DOCS)


class _Record(NamedTuple):
    row: int
    values: Mapping[str, object]  # every field it has; None for those that were not read


def read_documents(
    source: Sequence[str], text_field: str = "text", domain_field: str | None = None
) -> Iterator[Document]:
    """The documents of ``source`` in a fixed order, in memory that does not grow with the files.

    An entry of ``source`` is one of
      - a file, or a glob (``**`` descends; its files are taken in sorted order): .txt, .jsonl or
        .json with one object per line, each of these also .gz or .zst; .parquet; .arrow (the IPC
        file format and the stream format);
      - a directory written by ``datasets``' ``save_to_disk`` (of several splits: ``train``);
      - a datasets id, ``name``, ``name:config`` or ``name:config:split``, an empty config being the
        default one (``ag_news::test``); the split is ``train`` unless given; it is streamed;
      - ``python-docs``: the documentation of the installed Python, its domain being the part of the
        library, whatever ``domain_field`` says.
    A file that is named twice is read once, at its first place.

    In .txt files a blank line ends a document; so does the line break after which it would grow
    past 1 MiB (a single line longer than that is cut at a space). Texts that are empty or all white
    space are skipped. ``domain`` is ``str(record[domain_field])``, None without ``domain_field``.

    Raises InputError: at the call for a source that does not exist or is of no known kind; while
    reading for a damaged file, bytes that are not UTF-8, a bad JSON line, a missing field, or a
    text that is not a string.
    """
    origins = _origins(source)
    return chain.from_iterable(_documents(origin, text_field, domain_field) for origin in origins)


def source_files(source: Sequence[str]) -> list[str]:
    """The local files ``source`` stands for, in reading order; none for a hub id or python-docs.

    Raises InputError as ``read_documents`` does.
    """
    return [origin.place for origin in _origins(source) if origin.is_file]


def only_files(source: Sequence[str]) -> bool:
    """Whether ``source`` is nothing but local files, which can be told apart and added to."""
    return all(origin.is_file for origin in _origins(source))


# --- from a source to origins ---------------------------------------------------------------------


def _origins(source: Sequence[str]) -> list[_Origin]:
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise InputError("no corpus source; give files, globs, a datasets id or python-docs")
    found: dict[str, _Origin] = {}
    for entry in entries:
        for origin in _resolve(entry):
            key = origin.place if origin.format == "hub" else os.path.realpath(origin.place)
            found.setdefault(key, origin)
    return list(found.values())


def _resolve(entry: str) -> list[_Origin]:
    if entry == PYTHON_DOCS:
        return [_Origin(PYTHON_DOCS, PYTHON_DOCS)]
    path = os.path.expanduser(entry)
    if os.path.isdir(path):
        return _saved_dataset(Path(path))
    if os.path.exists(path):
        return [_file(path)]
    if glob.has_magic(path):
        files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if files:
            return [_file(file) for file in files]
    elif _HUB_ID.fullmatch(entry) and _format(entry) is None:
        return [_Origin("hub", entry)]
    raise _no_such_source(entry)


def _no_such_source(entry: str, reason: object = None) -> InputError:
    because = f" ({reason})" if reason else ""
    return InputError(
        f"corpus source {entry!r} is neither a file, a glob that matches files, nor a datasets id "
        f"that could be loaded{because}; give an existing file, a glob such as 'texts/**/*.jsonl', "
        f"a datasets id as name:config:split, or {PYTHON_DOCS}"
    )


def _format(path: str) -> tuple[str, str | None] | None:
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = _SUFFIXES.get(suffix)
    if kind is None or (compression and kind not in ("txt", "jsonl")):
        return None
    return kind, compression


def _file(path: str) -> _Origin:
    known = _format(path)
    if known is None:
        raise InputError(f"{path}: unknown extension; known are {_KNOWN_SUFFIXES}")
    return _Origin(known[0], path, known[1])


def _saved_dataset(directory: Path) -> list[_Origin]:
    if (directory / "dataset_dict.json").is_file():
        splits = json.loads((directory / "dataset_dict.json").read_text())["splits"]
        if "train" not in splits:
            raise InputError(
                f"{directory} holds the splits {', '.join(splits)} and no 'train'; "
                f"name one of them, such as {directory / splits[0]}"
            )
        return _saved_dataset(directory / "train")
    if not (directory / "state.json").is_file():
        raise InputError(
            f"{directory} is a directory that datasets' save_to_disk did not write; "
            f"name its files with a glob, such as {directory / '**' / '*.jsonl'}"
        )
    state = json.loads((directory / "state.json").read_text())
    return [_file(str(directory / part["filename"])) for part in state["_data_files"]]


# --- from an origin to documents ------------------------------------------------------------------


def _documents(origin: _Origin, text_field: str, domain_field: str | None) -> Iterator[Document]:
    if origin.format == PYTHON_DOCS:
        for page in python_docs():
            yield Document(page.id, page.text, page.part)
        return
    for record in _records(origin, text_field, domain_field):
        where = f"{origin.place}, record {record.row}"
        text = _field(record, text_field, "corpus.text_field", where)
        if not isinstance(text, str):
            raise InputError(
                f"{where}: the field {text_field!r} holds {_shown(text)}; the text must be a string"
            )
        domain = None
        if domain_field is not None:
            domain = str(_field(record, domain_field, "corpus.domain_field", where))
        if not text or text.isspace():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: character {error.start} of the text is half of a surrogate pair, "
                f"which is no Unicode character; repair the text where it was made"
            ) from None
        yield Document(_identity(record, origin), text, domain)


def _field(record: _Record, field: str, setting: str, where: str) -> object:
    if record.values.get(field) is not None:
        return record.values[field]
    fields = list(record.values)
    if field in fields:
        raise InputError(f"{where}: the field {field!r} ({setting}) is null")
    raise InputError(
        f"{where}: no field {field!r} ({setting}); it has: {', '.join(fields) or 'no fields'}"
        f"{did_you_mean(field, fields)}"
    )


def _identity(record: _Record, origin: _Origin) -> str:
    own = record.values.get("id")
    if isinstance(own, str | int) and not isinstance(own, bool) and own != "":
        return str(own)
    name = origin.place if origin.format == "hub" else os.path.basename(origin.place)
    return f"{name}:{record.row}"


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} (a {type(value).__name__})"


# --- the formats ----------------------------------------------------------------------------------


def _records(origin: _Origin, text_field: str, domain_field: str | None) -> Iterator[_Record]:
    if origin.format == "hub":
        yield from _hub_records(origin)
        return
    try:
        if origin.format == "txt":
            for line, text in _txt_documents(origin):
                yield _Record(line, {text_field: text})
        elif origin.format == "jsonl":
            yield from _jsonl_records(origin)
        else:
            wanted = ["id", text_field, *([domain_field] if domain_field else [])]
            batches = _parquet_batches if origin.format == "parquet" else _arrow_batches
            yield from _columnar_records(batches(origin.place, wanted))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{origin.place} cannot be read as {origin.format}: {error}") from error


def _byte_stream(origin: _Origin) -> BinaryIO:
    return io.BufferedReader(pa.input_stream(origin.place, compression=origin.compression))


def _decode(line: bytes, number: int, origin: _Origin) -> str:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark some editors write
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{origin.place}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1} of the "
            f"line); convert the file to UTF-8"
        ) from None


def _jsonl_records(origin: _Origin) -> Iterator[_Record]:
    with _byte_stream(origin) as stream:
        for number, line in enumerate(stream, start=1):
            text = _decode(line, number, origin)
            if not text or text.isspace():
                continue
            try:
                values = json.loads(text)
            except ValueError as error:
                raise InputError(
                    f"{origin.place}:{number}: not JSON ({error}); each line must be one object"
                ) from None
            if not isinstance(values, dict):
                raise InputError(
                    f"{origin.place}:{number}: {_shown(values)}; each line must be one JSON object"
                )
            yield _Record(number, values)


def _txt_documents(origin: _Origin) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of every document."""
    lines: list[str] = []
    first = size = 0
    for number, line, length in _txt_lines(origin):
        blank = not line or line.isspace()
        if lines and (blank or size + length > TEXT_DOCUMENT_BYTES):
            yield first, "".join(lines).rstrip()
            lines = []
        if blank:
            continue
        if not lines:
            first, size = number, 0
        lines.append(line)
        size += length
    if lines:
        yield first, "".join(lines).rstrip()


def _txt_lines(origin: _Origin) -> Iterator[tuple[int, str, int]]:
    """(line number, text with its line break, bytes); a line past 1 MiB comes in several pieces."""
    number, rest = 1, b""
    with _byte_stream(origin) as stream:
        while piece := rest + stream.readline(TEXT_DOCUMENT_BYTES - len(rest)):
            ended = piece.endswith(b"\n")
            rest = b""
            if not ended and len(piece) == TEXT_DOCUMENT_BYTES:
                cut = _place_to_cut(piece)
                piece, rest = piece[:cut], piece[cut:]
            yield number, _decode(piece, number, origin).replace("\r\n", "\n"), len(piece)
            number += ended


def _place_to_cut(piece: bytes) -> int:
    space = piece.rfind(b" ", 1)
    if space > 0:
        return space + 1
    cut = len(piece) - 1
    while cut > 1 and piece[cut] & 0xC0 == 0x80:  # never inside a UTF-8 character
        cut -= 1
    return cut


def _hub_records(origin: _Origin) -> Iterator[_Record]:
    from datasets import load_dataset

    name, config, split = [*origin.place.split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library's errors share no base; all mean: not to be had
        raise _no_such_source(origin.place, error) from error
    yield from (_Record(row, values) for row, values in enumerate(rows, start=1))


_Batch = tuple[pa.RecordBatch, list[str]]  # the wanted columns, the names of all


def _columnar_records(batches: Iterable[_Batch]) -> Iterator[_Record]:
    rows = count(1)
    for columns, fields in batches:
        unread = dict.fromkeys(fields)
        for begin in range(0, columns.num_rows, _ROWS_AT_A_TIME):
            for values in columns.slice(begin, _ROWS_AT_A_TIME).to_pylist():
                yield _Record(next(rows), unread | values)


def _parquet_batches(path: str, wanted: list[str]) -> Iterator[_Batch]:
    with pq.ParquetFile(path) as file:
        fields = file.schema_arrow.names
        columns = [field for field in fields if field in wanted]
        for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
            yield batch, fields


def _arrow_batches(path: str, wanted: list[str]) -> Iterator[_Batch]:
    for batch in arrow_batches(path):
        fields = batch.schema.names
        yield batch.select([field for field in fields if field in wanted]), fields


def arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, or of a stream in one; mapped, so that values which
    nobody asks for are not read.
    """
    with pa.memory_map(path) as memory:
        is_file_format = memory.read(6) == b"ARROW1"
        memory.seek(0)
        if is_file_format:
            file = pa.ipc.open_file(memory)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            yield from pa.ipc.open_stream(memory)
