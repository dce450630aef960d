"""Read the rows of a file with all their columns, in memory that does not grow with the file.

Files: those of a labelled task, arrow, and txt, in which each line that is not blank is a row with
the column ``text``. ``-`` is jsonl from standard input.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rekindle.data.errors import InputError
from rekindle.data.source.record import BadRecord
from rekindle.data.source.records import read_records
from rekindle.data.source.sources import HUB, PYTHON_DOCS, Origin, recorded_origin
from rekindle.data.text_files import (
    PACKED_SUFFIXES,
    STDIN,
    is_file,
    open_text,
    state_of,
    surrogate_problem,
)

LONGEST_LINE = 1 << 28  # bytes of a line of a txt file, which is held in memory
PIPED = Origin("jsonl", STDIN, "stdin")

Row = Mapping[str, object]


def read_rows(path: str) -> Iterator[Row]:
    """Yield every row with all its columns.

    Raises InputError: at the call for a missing file or an unknown type; while reading for an
    invalid row.
    """
    if path != STDIN and state_of(path) is None:
        raise InputError(f"no such file: {path!r}; give a jsonl, csv, tsv, txt or parquet file")
    if Path(path).is_dir():
        raise InputError(f"{path!r} is a folder; give a jsonl, csv, tsv, txt or parquet file")
    origin = PIPED if path == STDIN else recorded_origin(path)
    if origin.format in (HUB, PYTHON_DOCS):
        # A pipe of the shell (`<(…)`, /dev/stdin) has no ending and is read as jsonl.
        if is_file(path):
            raise InputError(
                f"{path}: unknown type of file; rows are .jsonl, .csv, .tsv or .txt (each also "
                f"packed: {', '.join(PACKED_SUFFIXES)}), .parquet or .arrow: rename or convert it"
            )
        origin = PIPED._replace(place=path)
    return _lines(path) if origin.format == "txt" else _records(origin)


def _records(origin: Origin) -> Iterator[Row]:
    for record in read_records(origin, None):
        if isinstance(record, BadRecord):
            raise InputError(record.message)
        yield record.values


def _lines(path: str) -> Iterator[Row]:
    with open_text(path) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise InputError(f"{path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB")
            try:
                text = line.removeprefix(b"\xef\xbb\xbf").decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1} of the "
                    "line); convert the file to UTF-8"
                ) from None
            if text and not text.isspace():
                yield {"text": text}


def text_of(row: Row, number: int, column: str, path: str) -> str:
    """Return the text in a column; raise InputError, naming the row, if it is not text."""
    value = row.get(column)
    if not isinstance(value, str):
        given = "missing" if value is None else f"{value!r}, a {type(value).__name__}"
        columns_text = "" if column in row else f"; the row has: {', '.join(map(str, row))}"
        raise InputError(
            f"{path}, row {number}: {column} must be a string (given: {given}{columns_text})"
        )
    if problem := surrogate_problem(column, value):
        raise InputError(f"{path}, row {number}: {problem}")
    return value


def texts_of(
    rows: Sequence[Row], first: int, columns: Sequence[str], path: str
) -> tuple[list[str], list[str] | None]:
    """Return the texts of ``rows``, numbered from ``first``, and the second texts of pairs if there
    are two ``columns``.
    """
    texts = [
        [text_of(row, number, name, path) for number, row in enumerate(rows, start=first)]
        for name in columns
    ]
    return texts[0], texts[1] if len(texts) > 1 else None
