"""Read the rows of csv and tsv files as lists of texts; the first one names the columns.

In csv, double quotes quote, line breaks too; in tsv, as GLUE publishes it, nothing does. Blank
lines are not rows. What the fields mean is unknown here.
"""

import csv
import io
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import BinaryIO

from rekindle.data.errors import InputError
from rekindle.data.text_files import open_text

LONGEST_FIELD = 1 << 28  # characters, which are held in memory
_CSV_PROBLEMS = {  # the meaning of csv's errors
    "unexpected end of data": "a quotation mark is opened but never closed",
    "',' expected after '\"'": "text follows a closing quotation mark; within quotes write",
}


def table_rows(place: str, tabbed: bool) -> Iterator[list[str] | str]:
    """Yield every row, the names of the columns first; for an invalid row, what is wrong with it.

    Bytes that are not UTF-8 are kept as Python's ``surrogateescape`` writes them.
    """
    with open_text(place) as stream:
        yield from _rows(_lines(stream, place), tabbed)


def bytes_of_rows(place: str, tabbed: bool, count: int) -> int:
    """Return the unpacked bytes of the names of the columns and the first ``count`` rows."""
    size = 0

    def measured(lines: Iterable[str]) -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line.encode(errors="surrogateescape"))
            yield line

    with open_text(place) as stream:
        for _ in islice(_rows(measured(_lines(stream, place)), tabbed), count + 1):
            pass
    return size


def _lines(stream: BinaryIO, place: str) -> Iterator[str]:
    """Yield the lines with their ends, as Python's csv needs them."""
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    while line := text.readline(LONGEST_FIELD + 1):
        if len(line) > LONGEST_FIELD:
            raise InputError(
                f"{place} has a line of more than {LONGEST_FIELD >> 20} million characters; each "
                "row must be a line"
            )
        yield line


def _rows(lines: Iterator[str], tabbed: bool) -> Iterator[list[str] | str]:
    if not tabbed:
        yield from _quoted_rows(lines)
        return
    for line in lines:
        if text := line.rstrip("\r\n"):
            yield text.split("\t")


def _quoted_rows(lines: Iterator[str]) -> Iterator[list[str] | str]:
    csv.field_size_limit(LONGEST_FIELD)
    row_lines: list[str] = []  # lines of the row being read
    replayed: deque[str] = deque()

    def next_lines() -> Iterator[str]:
        while (line := replayed.popleft() if replayed else next(lines, None)) is not None:
            row_lines.append(line)
            yield line

    reader = csv.reader(next_lines(), strict=True)
    while True:
        row_lines.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An unclosed quotation mark has swallowed the next lines.
            replayed.extendleft(reversed(row_lines[1:]))
            reader = csv.reader(next_lines(), strict=True)
            yield _CSV_PROBLEMS.get(str(error), str(error))
            continue
        if row:
            yield row
