"""Read the records of a source, format by format: lines, rows of tables and of record batches,
examples of a stream.

Never holds a whole file. A record that cannot be read becomes a ``BadRecord`` among the others; a
file that cannot be read is an InputError.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

import pyarrow as pa

from rekindle.data.errors import InputError
from rekindle.data.source.json_lines import line_blocks
from rekindle.data.source.record import (
    BadRecord,
    Block,
    ReadRecords,
    Record,
    decode_line,
    record_size,
    tr_command,
)
from rekindle.data.source.record_batches import column_blocks, columns_for
from rekindle.data.source.sources import HUB, Origin, no_such_source_error
from rekindle.data.source.tables import table_rows
from rekindle.data.text_files import open_text, refuse_pointer

TEXT_DOCUMENT_BYTES = 1 << 20  # largest document of a .txt file
BLOCK_BYTES = 1 << 16  # of records that are read at a time


def read_records(origin: Origin, fields: Sequence[str] | None) -> Iterator[Record | BadRecord]:
    """Yield the records of ``origin`` in order. The records of a .txt file have no fields; their
    text is under the first of ``fields``.

    Only the columns that ``fields`` need are read (None: all); dotted ones are inside others.
    """
    for block in read_blocks(origin, fields):
        yield from records_of(block, origin)


def records_of(block: Block, origin: Origin) -> Iterator[Record | BadRecord]:
    """Yield the records of a block, wherever it was read."""
    with _readable(origin):
        yield from block.records()


def read_blocks(
    origin: Origin, fields: Sequence[str] | None, size: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Yield the records of ``origin`` in blocks of about ``size`` bytes; see ``read_records``."""
    with _readable(origin):
        if origin.format == "jsonl":
            yield from line_blocks(origin.place, size)
        elif origin.format in ("parquet", "arrow"):
            refuse_pointer(origin.place)
            yield from column_blocks(origin.place, origin.format, fields)
        else:
            yield from _in_blocks(_single_records(origin, fields), size)


@contextmanager
def _readable(origin: Origin) -> Iterator[None]:
    try:
        yield
    # UnicodeDecodeError: in a column's name
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{origin.place} cannot be read as {origin.format}: {reason.rstrip('.')}. It is "
            "truncated, damaged or of another format: copy it again, or name it by its format"
        ) from error


def _single_records(origin: Origin, fields: Sequence[str] | None) -> Iterator[Record | BadRecord]:
    if origin.format == HUB:
        return _hub_records(origin, fields)
    if origin.format == "txt":
        return _txt_documents(origin.place, fields[0] if fields else "text")
    return _table_records(origin.place, fields, tabbed=origin.format == "tsv")


def _in_blocks(records: Iterable[Record | BadRecord], size: int) -> Iterator[ReadRecords]:
    """Yield blocks of them; what was read before an error comes before it."""
    block: list[Record | BadRecord] = []
    size_of_block = 0
    try:
        for record in records:
            block.append(record)
            size_of_block += record_size(record)
            if size_of_block >= size:
                yield ReadRecords(block, size_of_block)
                block, size_of_block = [], 0
    except Exception:
        if block:
            yield ReadRecords(block, size_of_block)
        raise
    if block:
        yield ReadRecords(block, size_of_block)


# --- csv and tsv ----------------------------------------------------------------------------------


def _table_records(
    place: str, fields: Sequence[str] | None, tabbed: bool
) -> Iterator[Record | BadRecord]:
    rows = table_rows(place, tabbed)
    names = next(rows, [])
    if isinstance(names, str):
        raise InputError(f"{place}, first line: {names}; it must name the columns")
    columns = {name: names.index(name) for name in columns_for(fields, names, place)}
    unread = dict.fromkeys(names)
    for number, row in enumerate(rows, start=1):
        label = f"{place}, row {number}"
        if isinstance(row, str):
            yield BadRecord("not CSV", f"{label}: {row}")
        elif len(row) != len(names):
            yield BadRecord("no row of the table", f"{label}: {_wrong_count(row, names, tabbed)}")
        else:
            values = {name: row[at] for name, at in columns.items()}
            yield _encoding_problem(values, label) or Record(number, unread | values)


def _wrong_count(row: Sequence[str], names: Sequence[str], tabbed: bool) -> str:
    between = "tab" if tabbed else "comma"
    quoted = "" if tabbed else ", or quote the text that holds one"
    several = "s" * (len(row) > 1)
    return (
        f"has {len(row)} field{several}, but the first line names {len(names)} (split at each "
        f"{between}); give it as many{quoted}"
    )


def _encoding_problem(values: Mapping[str, str], label: str) -> BadRecord | None:
    for name, value in values.items():
        try:
            value.encode(errors="surrogateescape").decode()
        except UnicodeDecodeError as error:
            return BadRecord(
                "not UTF-8",
                f"{label}: {name} is not UTF-8 ({error.reason} at byte {error.start + 1}); convert "
                "the file to UTF-8",
            )
    return None


# --- plain text -----------------------------------------------------------------------------------


def _txt_documents(place: str, field: str) -> Iterator[Record | BadRecord]:
    """Yield every document, with the number of its first line."""
    lines: list[str] = []
    first = size = 0
    bad: BadRecord | None = None
    for number, line, length in _txt_lines(place):
        blank = isinstance(line, str) and (not line or line.isspace())
        if lines and (blank or size + length > TEXT_DOCUMENT_BYTES):
            yield bad or Record(first, {field: "".join(lines).rstrip()})
            lines, bad = [], None
        if blank:
            continue
        if not lines:
            first, size = number, 0
        if isinstance(line, BadRecord):
            bad, line = bad or line, " "
        lines.append(line)
        size += length
    if lines:
        yield bad or Record(first, {field: "".join(lines).rstrip()})


def _txt_lines(place: str) -> Iterator[tuple[int, str | BadRecord, int]]:
    """Yield (line number, text with its line break, bytes); a line past 1 MiB comes in several
    pieces.
    """
    number, remainder, has_only_returns = 1, b"", False
    with open_text(place) as stream:
        while piece := remainder + stream.readline(TEXT_DOCUMENT_BYTES - len(remainder)):
            ends_line = piece.endswith(b"\n")
            # One within a line is a character, unless there are more of them than other line ends.
            returns = piece.strip().count(b"\r") if b"\r" in piece else 0
            if returns > number:
                raise _line_end_error(place, number)
            has_only_returns = returns == number
            remainder = b""
            if not ends_line and len(piece) == TEXT_DOCUMENT_BYTES:
                cut = _cut_point(piece)
                piece, remainder = piece[:cut], piece[cut:]
            content = piece.removeprefix(b"\xef\xbb\xbf") if number == 1 else piece
            text = decode_line(content, number, place)
            yield (
                number,
                text if isinstance(text, BadRecord) else text.replace("\r\n", "\n"),
                len(piece),
            )
            number += ends_line
    if has_only_returns:  # in the file's last line
        raise _line_end_error(place, number)


def _line_end_error(place: str, number: int) -> InputError:
    return InputError(
        f"{place}: its lines end in a carriage return only (line {number}), so all of them would "
        f"be one line: {tr_command(place)}"
    )


def _cut_point(piece: bytes) -> int:
    space = piece.rfind(b" ", 1)
    if space > 0:
        return space + 1
    cut = len(piece) - 1
    while cut > 1 and piece[cut] & 0xC0 == 0x80:  # never inside a UTF-8 character
        cut -= 1
    return cut


# --- a stream from the hub ------------------------------------------------------------------------


def _hub_records(origin: Origin, fields: Sequence[str] | None) -> Iterator[Record]:
    from datasets import load_dataset

    name, config, split = [*origin.place.split(":"), "", ""][:3]
    try:
        rows = iter(load_dataset(name, config or None, split=split or "train", streaming=True))
    # the library's errors have no common base; all mean that it cannot be had
    except Exception as error:
        raise no_such_source_error(origin.place, error) from error
    for row in count(1):
        try:
            values = next(rows, None)
        except Exception as error:  # nor have those of the connections below it
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"corpus source {origin.place!r} broke off after {row - 1:,} records ({reason}). "
                "What is finished is kept: run the same command again to continue; or download "
                "the dataset and name its files"
            ) from error
        if values is None:
            return
        values_read = {
            name: values[name] for name in columns_for(fields, list(values), origin.place)
        }
        # what is passed on could be large otherwise
        yield Record(row, dict.fromkeys(values) | values_read)
