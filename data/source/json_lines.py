"""A file's lines of JSON: read as blocks of bytes, parsed wherever a block is sent."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from rekindle.data.errors import InputError
from rekindle.data.source.record import (
    BadRecord,
    Record,
    decode_line,
    jq_command,
    show_value,
    tr_command,
)
from rekindle.data.text_files import open_text

LONGEST_LINE = 1 << 28  # bytes of a line, which is held in memory


class Lines(NamedTuple):
    """Whole lines of the file at ``place``; the first one's number is ``first``."""

    place: str
    first: int
    content: bytes

    @property
    def size(self) -> int:  # noqa: D102
        return len(self.content)

    def records(self) -> Iterator[Record | BadRecord]:
        """Yield each line that is not blank. Raise InputError for a file that is one array."""
        for number, line in enumerate(io.BytesIO(self.content), self.first):
            # Also inside the file, if it was joined from several that each began with a byte order
            # mark.
            text = decode_line(line.removeprefix(b"\xef\xbb\xbf"), number, self.place)
            if isinstance(text, BadRecord):
                yield text
            elif text and not text.isspace():
                yield _parse(text, number, self.place)


def line_blocks(place: str, size: int) -> Iterator[Lines]:
    """Yield the file in blocks of about ``size`` bytes. Raise InputError for a line past
    LONGEST_LINE.
    """
    first = 1
    with open_text(place) as stream:
        while content := stream.read(size):
            if not content.endswith(b"\n"):
                content += stream.readline(LONGEST_LINE + 1)
            begin = content.rfind(b"\n", 0, -1) + 1  # of the last line
            if len(content) - begin > LONGEST_LINE:
                if begin:
                    yield Lines(place, first, content[:begin])
                number = first + content.count(b"\n", 0, begin)
                raise InputError(
                    f"{place}:{number}: a line of more than "
                    f"{LONGEST_LINE >> 20} MiB; each line must be one object. If the file is one "
                    f"array: {jq_command('.[]', place)}"
                )
            yield Lines(place, first, content)
            first += content.count(b"\n")


def _parse(text: str, number: int, place: str) -> Record | BadRecord:
    if number == 1 and text.lstrip().startswith("["):
        raise InputError(
            f"{place}:1: the file begins with a JSON array; each line must be one object: "
            f"{jq_command('.[]', place)}"
        )
    try:
        values = _DECODER.decode(text)
    except _RepeatedKey as error:
        problem = f"the key {error.args[0]!r} appears twice in one object; keep one of the two"
        return BadRecord("a key twice", f"{place}:{number}: {problem}")
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            problem = f"{error.msg} at character {error.pos + 1}"
        hint = _hint(text, error, place)
        return BadRecord(
            "not JSON",
            f"{place}:{number}: not JSON ({problem}); each line must be one object{hint}",
        )
    if not isinstance(values, dict):
        message = f"{place}:{number}: {show_value(values)}; each line must be one JSON object"
        return BadRecord("no object", message)
    return Record(number, values)


class _RepeatedKey(Exception):
    """A key that appears twice in an object; json would keep only its last value."""


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKey(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


# json.loads would make one for each text
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _hint(text: str, error: Exception, place: str) -> str:
    if "\r" in text.strip():
        return f". Its lines end in a carriage return only: {tr_command(place)}"
    if isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip()):
        return f". If objects span several lines: {jq_command('.', place)}"
    return ""
