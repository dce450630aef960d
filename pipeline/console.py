"""Escape what reaches a terminal. Texts, labels, names and paths come from outside; their control
characters could ring, move the cursor, or change colours and direction.

Everything sent to stdout passes ``EscapedStream``. stderr, on which rich and tqdm draw bars, gets
only what ``say``, the log and ``progress`` send. Files and JSON keep every text unchanged.
"""

import codecs
import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# C0 except tab and line feed, DEL and C1; direction marks and line separators. Replacements for
# printable letters that an older console's encoding lacks.
_PLAIN_LETTERS = str.maketrans(
    {"─": "-", "–": "-", "−": "-", "—": "-", "…": "...", "±": "+-", "×": "x", "·": ".", "≠": "!="}
    | {"≤": "<=", "≥": ">=", "→": "->", "Δ": "d", "τ": "tau", "μ": "mu", "λ": "lambda"}
    | dict(zip("▁▂▃▄▅▆▇█", ".:-=+*#@", strict=True))
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    r"""Escape control characters as Python writes them: ``\\x1b``, ``\\u202e``."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def in_line(text: str) -> str:
    """Return ``escaped`` text with tabs and line feeds escaped too, for a cell or a name
    in a line.
    """
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Return the replacement for letters missing from a stream's encoding: others, or escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    replaced = error.object[error.start : error.end].translate(_PLAIN_LETTERS)
    return replaced.encode("ascii", "backslashreplace").decode(), error.end


REPLACING = "rekindle-plainly"
codecs.register_error(REPLACING, _replace_unencodable)


def as_written(text: str) -> str:
    """Return the text as stdout will show it, with replacements for letters its encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, REPLACING).decode(encoding)


def say(text: str) -> None:
    """Print one message to stderr."""
    print(escaped(text), file=sys.stderr)


@contextmanager
def terminal() -> Iterator[None]:
    """Within the block, escape what is printed, and replace letters the encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACING)
    raw_stdout = sys.stdout
    sys.stdout = cast("TextIO", EscapedStream(raw_stdout))
    log_to_stderr(logging.INFO)
    try:
        yield
    finally:
        sys.stdout = raw_stdout


def log_to_stderr(level: int, prefix: str = "") -> None:
    """Send this process's log to stderr, escaped, with ``prefix`` before each message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Escaped(prefix.replace("%", "%%") + "%(message)s"))
    log = logging.getLogger("rekindle")
    log.handlers = [handler]
    log.setLevel(level)


class EscapedStream:
    """Escapes what is written to a text stream. rich bypasses it, because it needs colours."""

    def __init__(self, raw: TextIO):
        self.rich_proxied_file = raw  # the attribute by which rich finds it

    def write(self, text: str) -> int:
        """Write the text, escaped."""
        return self.rich_proxied_file.write(escaped(text))

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # click would use it to bypass this on an ASCII console
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))
