"""The errors that users can cause or meet, by cause. Each carries its command's exit code.

A message says what was given, the rule, and what to do. Bad calls of the Python entry points raise
plain ``ValueError``; an ``assert`` is only for our own bugs.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_SIMILARITY = 0.6  # share of two names' letters that they must have in common, in order


class RekindleError(Exception):
    """Anything that Rekindle reports without a traceback."""

    exit_code = 1


class InputError(RekindleError, ValueError):
    """The user's input is wrong: a configuration key, a file, a model, a label."""

    exit_code = 2


class ResumableError(InputError):
    """Memory or disk ran out. The work can continue with ``settings`` (``key=value``) added to the
    command.
    """

    def __init__(self, message: str, settings: tuple[str, ...] = ()):
        super().__init__(message)
        self.settings = settings


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message about an unknown ``name``: the nearest of the ``known`` ones,
    ignoring case, or one that begins with it, after ``prefix``; "" if none is near.
    """
    by_lowercase = {one.casefold(): one for one in known}
    given = name.casefold()
    nearest = difflib.get_close_matches(given, by_lowercase, n=1, cutoff=_SIMILARITY)
    nearest = nearest or [one for one in by_lowercase if len(given) > 2 and one.startswith(given)]
    return f"; did you mean {prefix + by_lowercase[nearest[0]]!r}?" if nearest else ""


def first_words(error: BaseException, limit: int = 300) -> str:
    """Return the first words of a library's error: its first line, or, if that only announces the
    reason with a colon, all of it as one line of at most ``limit`` characters. If it begins with
    the printout of a model, which ends in its own bracket, add the last line.
    """
    text = str(error).strip()
    first, _, more = text.partition("\n")
    words = " ".join(text.split()) if first.rstrip().endswith(":") else first.strip()
    if words.endswith("(") and more:
        words = f"{words} … {more.splitlines()[-1].strip()}"
    return words if len(words) <= limit else f"{words[: limit - 2]} …"


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Put ``subject`` is wrong (a stage, a student, a key) before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from None


class CacheError(RekindleError):
    """A cache cannot be used as it is."""

    exit_code = 3


class CacheFormatError(CacheError):
    """Not a cache, an unknown format version, or bytes that differ from what was committed."""


class CacheVersionError(CacheFormatError):
    """A cache of a format version that this code cannot read; it is not damaged."""


class CacheMismatchError(CacheError):
    """A sound cache that does not belong to this corpus, tokenizer, teacher or student."""


class CheckpointError(RekindleError):
    """A checkpoint is damaged or belongs to another run."""

    exit_code = 3


@contextmanager
def unusable(message: str, *causes: type[Exception], advice: str = "") -> Iterator[None]:
    """Turn ``causes`` into a CacheFormatError: ``message`` about a file, the cause, the advice.

    For a missing file the cause is left out.
    """
    try:
        yield
    except causes as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "" if missing else ": " + " ".join(str(error).split())
        raise CacheFormatError(f"{message}{reason}{advice}") from None
