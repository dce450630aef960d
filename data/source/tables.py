"""The rows of csv and tsv files, as lists of texts; the first one names the columns.

In a csv double quotes quote, line breaks too; in a tsv, as GLUE publishes it, nothing does. Blank
lines are no rows. What the fields mean is not known here.
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
_WRONG = {  # what csv's errors mean
    "unexpected end of data": "a quotation mark is opened and never closed",
    "',' expected after '\"'": "text goes on after a closing quotation mark; within quotes write "
    'it twice ("")',
}


def table_rows(place: str, tabbed: bool) -> Iterator[list[str] | str]:
    """Every row, the names of the columns first; of one that is none, what is wrong with it.

    Bytes that are no UTF-8 are in it as Python's ``surrogateescape`` writes them.
    """
    with open_text(place) as stream:
        yield from _rows(_lines(stream, place), tabbed)


def bytes_of_rows(place: str, tabbed: bool, count: int) -> int:
    """Unpacked bytes of the names of the columns and the first ``count`` rows."""
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
    """The lines with their ends, as Python's csv wants them."""
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
    taken: list[str] = []  # of the row that is being read
    again: deque[str] = deque()

    def one_by_one() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line

    reader = csv.reader(one_by_one(), strict=True)
    while True:
        taken.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quotation mark that is not closed has taken the next lines with it.
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(one_by_one(), strict=True)
            yield _WRONG.get(str(error), str(error))
            continue
        if row:
            yield row
