"""Records read from a source, or what is wrong with them; and blocks of records that can be sent to
another process before parsing.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol


class Record(NamedTuple):
    """One record. ``row`` counts from 1: records of parquet, arrow and datasets, lines of jsonl and
    txt; for csv and tsv, rows without blank ones and without the header.
    """

    row: int
    values: Mapping[str, object]  # every field it has; None for those that were not read


class Bad(NamedTuple):
    """A record that is not a text: the kind of problem, for counts, and a message with its
    place.
    """

    kind: str
    message: str


class Block(Protocol):
    """Some consecutive records of one file, as they were read; picklable."""

    @property
    def size(self) -> int:
        """Approximate size in bytes."""
        ...

    def records(self) -> Iterator[Record | Bad]:
        """Yield each record. Raise InputError for a file of another kind."""
        ...


class Taken(NamedTuple):
    """Records that can only be read one after another."""

    taken: Sequence[Record | Bad]
    size: int

    def records(self) -> Iterator[Record | Bad]:  # noqa: D102
        return iter(self.taken)


def taken_size(record: Record | Bad) -> int:
    """Return the approximate size of a record in bytes."""
    values = [] if isinstance(record, Bad) else record.values.values()
    return 64 + sum(len(value) for value in values if isinstance(value, str | bytes))


def shown(value: object) -> str:
    """Format a value of a record for a message."""
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} (a {type(value).__name__})"


def decoded(line: bytes, number: int, place: str) -> str | Bad:
    """Decode a line."""
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
