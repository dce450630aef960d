"""What is read of a source: a record, or what is wrong with one; and blocks of records, which may
be handed to another process before anything is made of them.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol


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


class Block(Protocol):
    """Some records that follow each other in one file, as they were read; picklable."""

    @property
    def size(self) -> int:
        """About how many bytes they are."""
        ...

    def records(self) -> Iterator[Record | Bad]:
        """Each of them. Raises InputError for a file that is no such file."""
        ...


class Taken(NamedTuple):
    """Records that are to be had only one after another."""

    taken: Sequence[Record | Bad]
    size: int

    def records(self) -> Iterator[Record | Bad]:  # noqa: D102
        return iter(self.taken)


def taken_size(record: Record | Bad) -> int:
    """About how many bytes a record is."""
    values = [] if isinstance(record, Bad) else record.values.values()
    return 64 + sum(len(value) for value in values if isinstance(value, str | bytes))


def shown(value: object) -> str:
    """A value of a record in a message."""
    text = repr(value)
    return f"{text[:40]}{'…' if len(text) > 40 else ''} (a {type(value).__name__})"


def decoded(line: bytes, number: int, place: str) -> str | Bad:
    """A line as text."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(
            "not UTF-8",
            f"{place}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line); "
            "convert the file to UTF-8",
        )


def lines_out_of(expression: str, place: str) -> str:
    """The command that writes the objects of a file as lines."""
    return f"jq -c '{expression}' {shlex.quote(place)} > lines.jsonl"


def line_ends(place: str) -> str:
    """The command that makes line ends of a file's carriage returns."""
    return f"tr '\\r' '\\n' < {shlex.quote(place)} > lines{os.path.splitext(place)[1]}"
