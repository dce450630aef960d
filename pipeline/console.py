"""What reaches a terminal. Texts, labels, names and paths come from outside, and may hold what
rings, moves, colours or turns around what is shown: they are shown escaped, which is done here.

All that goes to stdout passes ``EscapedStream``; stderr, on which rich and tqdm draw bars, gets
what ``say``, the log and ``progress`` send there. Files and JSON have every text as it is.
"""

import codecs
import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# C0 but tab and line feed, DEL and C1; marks that turn the direction, separators of lines.
# What an older console has instead of a letter of print that its encoding lacks.
_PLAIN = str.maketrans(
    {"─": "-", "–": "-", "−": "-", "—": "-", "…": "...", "±": "+-", "×": "x", "·": ".", "≠": "!="}
    | {"≤": "<=", "≥": ">=", "→": "->", "Δ": "d", "τ": "tau", "μ": "mu", "λ": "lambda"}
    | dict(zip("▁▂▃▄▅▆▇█", ".:-=+*#@", strict=True))
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """``text`` with its control characters as Python writes them: ``\\x1b``, ``\\u202e``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_line(text: str) -> str:
    """``escaped``, and neither tab nor line feed, for a cell or a name within a line."""
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """What is written for letters that the encoding of a stream lacks: others, or their numbers."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_PLAIN)
    return lacking.encode("ascii", "backslashreplace").decode(), error.end


PLAINLY = "rekindle-plainly"
codecs.register_error(PLAINLY, _plainly)


def as_written(text: str) -> str:
    """The text as stdout will have it: with other letters where its encoding lacks some."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, PLAINLY).decode(encoding)


def say(text: str) -> None:
    """One message on stderr."""
    print(escaped(text), file=sys.stderr)


@contextmanager
def terminal() -> Iterator[None]:
    """Escape what is printed within the block; what an encoding lacks is escaped, too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAINLY)
    before = sys.stdout
    sys.stdout = cast("TextIO", EscapedStream(before))
    log_to_stderr(logging.INFO)
    try:
        yield
    finally:
        sys.stdout = before


def log_to_stderr(level: int, lead: str = "") -> None:
    """Send the log of this process to stderr, escaped, each message after ``lead``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Escaped(lead.replace("%", "%%") + "%(message)s"))
    log = logging.getLogger("rekindle")
    log.handlers = [handler]
    log.setLevel(level)


class EscapedStream:
    """Escapes what is written to a text stream; rich, which colours help, writes past it."""

    def __init__(self, raw: TextIO):
        self.rich_proxied_file = raw  # the name by which rich finds it

    def write(self, text: str) -> int:
        """Write the text escaped."""
        return self.rich_proxied_file.write(escaped(text))

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # click would write past this to a console that is ASCII
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))
