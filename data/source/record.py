"""What is read of a source: a record, or what is wrong with one; and blocks of records, which may
be sent to another process before they are parsed.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol


class Record(NamedTuple):
    """A record. ``row`` counts from 1: records of parquet, arrow and datasets, lines of jsonl and
    txt; rows of csv and tsv without blank ones and without the names of the columns.
    """

    row: int
    values: Mapping[str, object]  # every field it has; None for those that were not read


class Bad(NamedTuple):
    """A record without a valid text: the kind, for counting, and what is wrong, with its place."""

    kind: str
    message: str


class Block(Protocol):
    """Consecutive records of one file, as they were read; picklable."""

    @property
    def size(self) -> int:
        """Return its approximate size in bytes."""
        ...

    def records(self) -> Iterator[Record | Bad]:
        """Yield each record. Raise InputError for a file of another format."""
        ...


class Taken(NamedTuple):
    """Records that can only be read one after another."""

    taken: Sequence[Record | Bad]
    size: int

    def records(self) -> Iterator[Record | Bad]:  # noqa: D102
        return iter(self.taken)


def taken_size(record: Record | Bad) -> int:
    """Return a record's approximate size in bytes."""
    values = [] if isinstance(record, Bad) else record.values.values()
    return 64 + sum(len(value) for value in values if isinstance(value, str | bytes))


def shown(value: object) -> str:
    """Return a record's value for a message."""
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} (a {type(value).__name__})"


def decoded(line: bytes, number: int, place: str) -> str | Bad:
    """Return a line as text."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(
            "not UTF-8",
            f"{place}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line); "
            "convert the file to UTF-8",
        )


def lines_out_of(expression: str, place: str) -> str:
    """Return the command that writes the objects of a file as lines."""
    return f"jq -c '{expression}' {shlex.quote(place)} > lines.jsonl"


def line_ends(place: str) -> str:
    """Return the command that turns a file's carriage returns into line ends."""
    return f"tr '\\r' '\\n' < {shlex.quote(place)} > lines{os.path.splitext(place)[1]}"
