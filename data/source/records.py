"""The records of a source, format by format: lines, rows of tables and of record batches, examples
of a stream.

Never holds a whole file. A record that cannot be read is a ``Bad`` one among the others; a file
that cannot be, is an InputError.
"""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rekindle.data.errors import InputError
from rekindle.data.source.sources import HUB, TABLES, Origin, no_such_source
from rekindle.data.source.tables import table_rows
from rekindle.data.text_files import open_text, refuse_pointer

TEXT_DOCUMENT_BYTES = 1 << 20  # a document of a .txt file is never longer
LONGEST_LINE = 1 << 28  # bytes of a .jsonl file's line, which is held in memory
ROWS_AT_A_TIME = 256  # bounds what becomes Python objects when record batches are large


class Record(NamedTuple):
    """``row`` counts from 1: records of parquet, arrow and datasets, lines of jsonl and txt; of csv
    and tsv, rows without blank ones and without the names of the columns.
    """

    row: int
    values: Mapping[str, object]  # every field it has; None for those that were not read


class Bad(NamedTuple):
    """A record that is no text: of which kind, for counts, and what is wrong, with its place."""

    kind: str
    message: str


def read_records(origin: Origin, fields: Sequence[str] | None) -> Iterator[Record | Bad]:
    """The records of ``origin`` in order; of a .txt file, whose records have no fields, each has
    its text under the first of ``fields``.

    Of columns only those are read that ``fields`` need (None: all); dotted ones are inside others.
    """
    if origin.format == HUB:
        yield from _hub_records(origin)
        return
    try:
        if origin.format == "txt":
            yield from _txt_documents(origin.place, fields[0] if fields else "text")
        elif origin.format == "jsonl":
            yield from _jsonl_records(origin.place)
        elif origin.format in TABLES:
            yield from _table_records(origin.place, fields, tabbed=origin.format == "tsv")
        else:
            refuse_pointer(origin.place)
            batches = _parquet_batches if origin.format == "parquet" else _arrow_batches
            yield from _columnar_records(origin.place, batches(origin.place, fields))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # that of a column's name
        told = " ".join(str(error).split())
        raise InputError(f"{origin.place} cannot be read as {origin.format}: {told}") from error


def shown(value: object) -> str:
    """A value of a record in a message."""
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} (a {type(value).__name__})"


def _decoded(line: bytes, number: int, place: str) -> str | Bad:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(
            "not UTF-8",
            f"{place}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line); "
            "convert the file to UTF-8",
        )


# --- lines of JSON --------------------------------------------------------------------------------


def _jsonl_records(place: str) -> Iterator[Record | Bad]:
    with open_text(place) as stream:
        for number in count(1):
            line = stream.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise InputError(
                    f"{place}:{number}: a line of more than {LONGEST_LINE >> 20} MiB; each line "
                    f"must be one object. If the file is one array: {_lines_out_of('.[]', place)}"
                )
            # Also within the file, where several were joined that each began with a mark.
            text = _decoded(line.removeprefix(b"\xef\xbb\xbf"), number, place)
            if isinstance(text, Bad):
                yield text
            elif text and not text.isspace():
                yield _parsed(text, number, place)


def _parsed(text: str, number: int, place: str) -> Record | Bad:
    if number == 1 and text.lstrip().startswith("["):
        raise InputError(
            f"{place}:1: the file begins with a JSON array; each line must be one object: "
            f"{_lines_out_of('.[]', place)}"
        )
    try:
        values = json.loads(text, object_pairs_hook=_each_once)
    except _Twice as error:
        told = f"the key {error.args[0]!r} stands twice in one object; keep one of the two"
        return Bad("a key twice", f"{place}:{number}: {told}")
    except (ValueError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            told = f"{error.msg} at character {error.pos + 1}"
        hint = _hint(text, error, place)
        return Bad(
            "not JSON", f"{place}:{number}: not JSON ({told}); each line must be one object{hint}"
        )
    if not isinstance(values, dict):
        message = f"{place}:{number}: {shown(values)}; each line must be one JSON object"
        return Bad("no object", message)
    return Record(number, values)


class _Twice(Exception):
    """Of an object's key, of whose values json would take the last."""


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _hint(text: str, error: Exception, place: str) -> str:
    if "\r" in text.strip():
        return f". Its lines end in a carriage return alone: {_line_ends(place)}"
    if isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip()):
        return f". If objects go on over several lines: {_lines_out_of('.', place)}"
    return ""


def _lines_out_of(expression: str, place: str) -> str:
    return f"jq -c '{expression}' {shlex.quote(place)} > lines.jsonl"


def _line_ends(place: str) -> str:
    return f"tr '\\r' '\\n' < {shlex.quote(place)} > lines{os.path.splitext(place)[1]}"


# --- csv and tsv ----------------------------------------------------------------------------------


def _table_records(
    place: str, fields: Sequence[str] | None, tabbed: bool
) -> Iterator[Record | Bad]:
    rows = table_rows(place, tabbed)
    names = next(rows, [])
    if isinstance(names, str):
        raise InputError(f"{place}, first line: {names}; it must name the columns")
    columns = {name: names.index(name) for name in _columns_for(fields, names, place)}
    unread = dict.fromkeys(names)
    for number, row in enumerate(rows, start=1):
        where = f"{place}, row {number}"
        if isinstance(row, str):
            yield Bad("not CSV", f"{where}: {row}")
        elif len(row) != len(names):
            yield Bad("no row of the table", f"{where}: {_not_so_many(row, names, tabbed)}")
        else:
            found = {name: row[at] for name, at in columns.items()}
            yield _not_utf8(found, where) or Record(number, unread | found)


def _not_so_many(row: Sequence[str], names: Sequence[str], tabbed: bool) -> str:
    between = "tab" if tabbed else "comma"
    quoted = "" if tabbed else ", or quote the text that holds one"
    several = "s" * (len(row) > 1)
    return (
        f"has {len(row)} field{several}, and the first line names {len(names)} (split at each "
        f"{between}); give it as many{quoted}"
    )


def _not_utf8(values: Mapping[str, str], where: str) -> Bad | None:
    for name, value in values.items():
        try:
            value.encode(errors="surrogateescape").decode()
        except UnicodeDecodeError as error:
            return Bad(
                "not UTF-8",
                f"{where}: {name} is not UTF-8 ({error.reason} at byte {error.start + 1}); convert "
                "the file to UTF-8",
            )
    return None


# --- plain text -----------------------------------------------------------------------------------


def _txt_documents(place: str, field: str) -> Iterator[Record | Bad]:
    """Every document, by the number of its first line."""
    lines: list[str] = []
    first = size = 0
    bad: Bad | None = None
    for number, line, length in _txt_lines(place):
        blank = isinstance(line, str) and (not line or line.isspace())
        if lines and (blank or size + length > TEXT_DOCUMENT_BYTES):
            yield bad or Record(first, {field: "".join(lines).rstrip()})
            lines, bad = [], None
        if blank:
            continue
        if not lines:
            first, size = number, 0
        if isinstance(line, Bad):
            bad, line = bad or line, " "
        lines.append(line)
        size += length
    if lines:
        yield bad or Record(first, {field: "".join(lines).rstrip()})


def _txt_lines(place: str) -> Iterator[tuple[int, str | Bad, int]]:
    """(line number, text with its line break, bytes); a line past 1 MiB comes in several pieces."""
    number, rest, alone = 1, b"", False
    with open_text(place) as stream:
        while piece := rest + stream.readline(TEXT_DOCUMENT_BYTES - len(rest)):
            ended = piece.endswith(b"\n")
            # One within a line is a character, but not where there are more than other line ends.
            returns = piece.strip().count(b"\r") if b"\r" in piece else 0
            if returns > number:
                raise _joined(place, number)
            alone = returns == number
            rest = b""
            if not ended and len(piece) == TEXT_DOCUMENT_BYTES:
                cut = _place_to_cut(piece)
                piece, rest = piece[:cut], piece[cut:]
            marked = piece.removeprefix(b"\xef\xbb\xbf") if number == 1 else piece
            text = _decoded(marked, number, place)
            yield number, text if isinstance(text, Bad) else text.replace("\r\n", "\n"), len(piece)
            number += ended
    if alone:  # in the file's last line
        raise _joined(place, number)


def _joined(place: str, number: int) -> InputError:
    return InputError(
        f"{place}: its lines end in a carriage return alone (line {number}), so that all of them "
        f"would be one line: {_line_ends(place)}"
    )


def _place_to_cut(piece: bytes) -> int:
    space = piece.rfind(b" ", 1)
    if space > 0:
        return space + 1
    cut = len(piece) - 1
    while cut > 1 and piece[cut] & 0xC0 == 0x80:  # never inside a UTF-8 character
        cut -= 1
    return cut


# --- a stream from the hub ------------------------------------------------------------------------


def _hub_records(origin: Origin) -> Iterator[Record]:
    from datasets import load_dataset

    name, config, split = [*origin.place.split(":"), "", ""][:3]
    try:
        rows = iter(load_dataset(name, config or None, split=split or "train", streaming=True))
    except Exception as error:  # the library's errors share no base; all mean: not to be had
        raise no_such_source(origin.place, error) from error
    for row in count(1):
        try:
            values = next(rows, None)
        except Exception as error:  # nor do those of the connections below it
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"corpus source {origin.place!r} broke off after {row - 1:,} records ({told}). "
                "What is finished is kept: run the same command again, and it goes on; or download "
                "the dataset and name its files"
            ) from error
        if values is None:
            return
        yield Record(row, values)


# --- columns --------------------------------------------------------------------------------------

_Batch = tuple[pa.RecordBatch, list[str]]  # the wanted columns, the names of all


def _columnar_records(place: str, batches: Iterable[_Batch]) -> Iterator[Record | Bad]:
    rows = count(1)
    for columns, fields in batches:
        unread = dict.fromkeys(fields)
        for begin in range(0, columns.num_rows, ROWS_AT_A_TIME):
            part = columns.slice(begin, ROWS_AT_A_TIME)
            try:
                found = part.to_pylist()
            except UnicodeDecodeError:
                yield from (_row(part, n, next(rows), place, unread) for n in range(part.num_rows))
                continue
            for values in found:
                yield Record(next(rows), unread | values)


def _row(
    columns: pa.RecordBatch, index: int, row: int, place: str, unread: dict[str, None]
) -> Record | Bad:
    """A row of columns some of which are no UTF-8, which Arrow does not look at."""
    values: dict[str, object] = {}
    for name in columns.schema.names:
        try:
            values[name] = columns[name][index].as_py()
        except UnicodeDecodeError as error:
            return Bad(
                "not UTF-8",
                f"{place}, record {row}: the field {name!r} is not UTF-8 ({error.reason} at byte "
                f"{error.start + 1}); write the file anew from text that is",
            )
    return Record(row, unread | values)


def _parquet_batches(path: str, wanted: Sequence[str] | None) -> Iterator[_Batch]:
    with pq.ParquetFile(path) as file:
        fields = file.schema_arrow.names
        columns = _columns_for(wanted, fields, path)
        for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
            yield batch, fields


def _arrow_batches(path: str, wanted: Sequence[str] | None) -> Iterator[_Batch]:
    for batch in arrow_batches(path):
        fields = batch.schema.names
        columns = batch.select(_columns_for(wanted, fields, path))
        for column in columns.columns:
            _check_column(column)
        yield columns, fields


def _columns_for(wanted: Sequence[str] | None, fields: list[str], path: str) -> list[str]:
    """Those columns that are wanted, or may hold what is wanted by a dotted name."""
    columns = [
        f for f in fields if wanted is None or any(f == w or w.startswith(f"{f}.") for w in wanted)
    ]
    doubled = next((name for name in columns if columns.count(name) > 1), None)
    if doubled:
        raise InputError(
            f"{path} has {columns.count(doubled)} columns called {doubled!r}; which of them is "
            "meant is not clear: rename them"
        )
    return columns


def _check_column(column: pa.Array) -> None:
    """ArrowException for offsets that lead outside of the buffers, as in a damaged file.

    Text that is no UTF-8 is no damage, and is found row by row.
    """
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
    try:
        (column.view(as_bytes) if as_bytes else column).validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


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
