"""Read the records of a source, format by format: lines, rows of tables and of record batches,
examples of a stream.

Never holds a whole file. A record that cannot be read becomes a ``Bad`` one among the others; a
file that cannot be read is an InputError.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

import pyarrow as pa

from rekindle.data.errors import InputError
from rekindle.data.source.json_lines import line_blocks
from rekindle.data.source.record import Bad, Block, Record, Taken, decoded, line_ends, taken_size
from rekindle.data.source.record_batches import column_blocks, columns_for
from rekindle.data.source.sources import HUB, Origin, no_such_source
from rekindle.data.source.tables import table_rows
from rekindle.data.text_files import open_text, refuse_pointer

TEXT_DOCUMENT_BYTES = 1 << 20  # largest document of a .txt file
BLOCK_BYTES = 1 << 16  # of records that are read at a time


def read_records(origin: Origin, fields: Sequence[str] | None) -> Iterator[Record | Bad]:
    """Yield the records of ``origin`` in order. The records of a .txt file have no fields; their
    text is under the first of ``fields``.

    Only the columns that ``fields`` need are read (None: all); dotted ones are inside others.
    """
    for block in read_blocks(origin, fields):
        yield from records_of(block, origin)


def records_of(block: Block, origin: Origin) -> Iterator[Record | Bad]:
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
            yield from _together(_one_by_one(origin, fields), size)


@contextmanager
def _readable(origin: Origin) -> Iterator[None]:
    try:
        yield
    # UnicodeDecodeError: in a column's name
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise InputError(
            f"{origin.place} cannot be read as {origin.format}: {told.rstrip('.')}. It is "
            "truncated, damaged or of another format: copy it again, or name it by its format"
        ) from error


def _one_by_one(origin: Origin, fields: Sequence[str] | None) -> Iterator[Record | Bad]:
    if origin.format == HUB:
        return _hub_records(origin, fields)
    if origin.format == "txt":
        return _txt_documents(origin.place, fields[0] if fields else "text")
    return _table_records(origin.place, fields, tabbed=origin.format == "tsv")


def _together(records: Iterable[Record | Bad], size: int) -> Iterator[Taken]:
    """Yield blocks of them; what was read before an error comes before it."""
    taken: list[Record | Bad] = []
    bytes_taken = 0
    try:
        for record in records:
            taken.append(record)
            bytes_taken += taken_size(record)
            if bytes_taken >= size:
                yield Taken(taken, bytes_taken)
                taken, bytes_taken = [], 0
    except Exception:
        if taken:
            yield Taken(taken, bytes_taken)
        raise
    if taken:
        yield Taken(taken, bytes_taken)


# --- csv and tsv ----------------------------------------------------------------------------------


def _table_records(
    place: str, fields: Sequence[str] | None, tabbed: bool
) -> Iterator[Record | Bad]:
    rows = table_rows(place, tabbed)
    names = next(rows, [])
    if isinstance(names, str):
        raise InputError(f"{place}, first line: {names}; it must name the columns")
    columns = {name: names.index(name) for name in columns_for(fields, names, place)}
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
        f"has {len(row)} field{several}, but the first line names {len(names)} (split at each "
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
    """Yield every document, with the number of its first line."""
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
    """Yield (line number, text with its line break, bytes); a line past 1 MiB comes in several
    pieces.
    """
    number, rest, alone = 1, b"", False
    with open_text(place) as stream:
        while piece := rest + stream.readline(TEXT_DOCUMENT_BYTES - len(rest)):
            ended = piece.endswith(b"\n")
            # One within a line is a character, unless there are more of them than other line ends.
            returns = piece.strip().count(b"\r") if b"\r" in piece else 0
            if returns > number:
                raise _joined(place, number)
            alone = returns == number
            rest = b""
            if not ended and len(piece) == TEXT_DOCUMENT_BYTES:
                cut = _place_to_cut(piece)
                piece, rest = piece[:cut], piece[cut:]
            marked = piece.removeprefix(b"\xef\xbb\xbf") if number == 1 else piece
            text = decoded(marked, number, place)
            yield number, text if isinstance(text, Bad) else text.replace("\r\n", "\n"), len(piece)
            number += ended
    if alone:  # in the file's last line
        raise _joined(place, number)


def _joined(place: str, number: int) -> InputError:
    return InputError(
        f"{place}: its lines end in a carriage return only (line {number}), so all of them would "
        f"be one line: {line_ends(place)}"
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


def _hub_records(origin: Origin, fields: Sequence[str] | None) -> Iterator[Record]:
    from datasets import load_dataset

    name, config, split = [*origin.place.split(":"), "", ""][:3]
    try:
        rows = iter(load_dataset(name, config or None, split=split or "train", streaming=True))
    # the library's errors have no common base; all mean that it cannot be had
    except Exception as error:
        raise no_such_source(origin.place, error) from error
    for row in count(1):
        try:
            values = next(rows, None)
        except Exception as error:  # nor have those of the connections below it
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"corpus source {origin.place!r} broke off after {row - 1:,} records ({told}). "
                "What is finished is kept: run the same command again to continue; or download "
                "the dataset and name its files"
            ) from error
        if values is None:
            return
        read = {name: values[name] for name in columns_for(fields, list(values), origin.place)}
        # what is passed on could be large otherwise
        yield Record(row, dict.fromkeys(values) | read)
