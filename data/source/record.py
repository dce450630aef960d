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


class BadRecord(NamedTuple):
    """A record without a valid text: the kind, for counting, and what is wrong, with its place."""

    kind: str
    message: str


class Block(Protocol):
    """Consecutive records of one file, as they were read; picklable."""

    @property
    def size(self) -> int:
        """Return its approximate size in bytes."""
        ...

    def records(self) -> Iterator[Record | BadRecord]:
        """Yield each record. Raise InputError for a file of another format."""
        ...


class ReadRecords(NamedTuple):
    """Records that can only be read one after another."""

    items: Sequence[Record | BadRecord]
    size: int

    def records(self) -> Iterator[Record | BadRecord]:  # noqa: D102
        return iter(self.items)


def record_size(record: Record | BadRecord) -> int:
    """Return a record's approximate size in bytes."""
    values = [] if isinstance(record, BadRecord) else record.values.values()
    return 64 + sum(len(value) for value in values if isinstance(value, str | bytes))


def show_value(value: object) -> str:
    """Return a record's value for a message."""
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} (a {type(value).__name__})"


def decode_line(line: bytes, number: int, place: str) -> str | BadRecord:
    """Return a line as text."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(
            "not UTF-8",
            f"{place}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line); "
            "convert the file to UTF-8",
        )


def jq_command(expression: str, place: str) -> str:
    """Return the command that writes the objects of a file as lines."""
    return f"jq -c '{expression}' {shlex.quote(place)} > lines.jsonl"


def tr_command(place: str) -> str:
    """Return the command that turns a file's carriage returns into line ends."""
    return f"tr '\\r' '\\n' < {shlex.quote(place)} > lines{os.path.splitext(place)[1]}"
