"""Read the texts of test files, which a corpus must not contain."""

import logging
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.source.fields import ABSENT, reach
from rekindle.data.source.held_texts import HeldTexts
from rekindle.data.source.record import BadRecord
from rekindle.data.source.records import read_records
from rekindle.data.source.rows import Row, read_rows
from rekindle.data.source.sources import PYTHON_DOCS, Origin, find_origins
from rekindle.data.text_files import FileState, state_of, surrogate_problem

log = logging.getLogger("rekindle")

_PAIRS = ("sentence1", "sentence2", "question", "question1", "question2", "premise", "hypothesis")
DEFAULT_FIELDS = ("text", "sentence", *_PAIRS, "tokens")  # fields of a labelled task
LABEL_WORDS = 3  # hardly any label has more words: a longer value is a text


def read_held(files: Sequence[str], fields: Sequence[str], corpus: Sequence[str]) -> HeldTexts:
    """Return the texts of ``files``: files, globs, datasets ids.

    Each value of ``fields`` is a text of its own, and tokens together are one. Without ``fields``,
    fields named like the corpus's own (``corpus``) or those of a labelled task are read; in a .txt
    file each line. The log says which fields of each file are read, and warns if others look like
    texts in the first row. A file that has not changed is not read again. Raises InputError for a
    missing file or one with none of the fields, for a value that is not text, and for a row that
    lacks the first one's fields.
    """
    try:
        origins = [(origin, state_of(origin.place)) for origin in _origins(files)]
        held_texts = _read_texts(tuple(origins), tuple(fields), tuple(corpus))
    except InputError as error:  # its message speaks of sources
        message = str(error).replace("corpus source ", "").replace(f", or {PYTHON_DOCS}", "")
        message = message.replace(", a datasets id", ", or a datasets id")
        raise InputError(f"corpus.without: {message}") from None
    if not held_texts.size:
        message = f"no text with a letter or a digit in {', '.join(files)}"
        raise InputError(f"corpus.without: {message}; give files with the texts of a test")
    return held_texts


# A command reads them several times, a cycle once for each of its texts. Only a test's texts are
# kept.
@lru_cache(maxsize=4)
def _read_texts(
    origins: tuple[tuple[Origin, FileState], ...], fields: tuple[str, ...], corpus: tuple[str, ...]
) -> HeldTexts:
    return HeldTexts(text for origin, _ in origins for text in _texts(origin, fields, corpus))


def _origins(files: Sequence[str]) -> list[Origin]:
    found = find_origins(files)
    if any(origin.format == PYTHON_DOCS for origin in found):
        raise InputError(
            f"{PYTHON_DOCS} is not a test; give the files that the student is tested on"
        )
    return found


def _texts(origin: Origin, chosen_fields: Sequence[str], corpus: Sequence[str]) -> Iterator[str]:
    fields: Sequence[str] = ()
    first: Row = {}
    for label, row in _rows(origin):
        if not fields:
            fields, first = _fields_of(row, origin, chosen_fields, corpus), row
            _log_fields(row, origin, fields, is_chosen=bool(chosen_fields))
        elif not chosen_fields and row.keys() != first.keys():
            _check_same_fields(row, label, fields, corpus)
        for field in fields:
            yield _text(reach(row, field), f"{label}: {field}")
    if not fields:
        raise InputError(f"{origin.place} has no rows; give a file with texts")


def _rows(origin: Origin) -> Iterator[tuple[str, Row]]:
    """Yield every row, with its place."""
    if origin.format == "txt":
        yield from ((origin.place, row) for row in read_rows(origin.place))
        return
    lines = origin.format == "jsonl"
    for record in read_records(origin, None):
        if isinstance(record, BadRecord):
            raise InputError(record.message)
        yield f"{origin.place}{':' if lines else ', row '}{record.row}", record.values


def _check_same_fields(row: Row, label: str, fields: Sequence[str], corpus: Sequence[str]) -> None:
    """Raise InputError for a row with texts in fields that the first row lacks: they would be
    ignored, and not be looked for.
    """
    ignored = [
        f for f in _default_fields(corpus) if f not in fields and reach(row, f) is not ABSENT
    ]
    if ignored:
        raise InputError(
            f"{label} has {' and '.join(ignored)}, but the first row of the file does not: texts "
            f"are read only from {' and '.join(fields)}. Name all fields of texts, which every row "
            "must have, with corpus.without_fields, or give the rows of each kind as a file"
        )


def _default_fields(corpus: Sequence[str]) -> list[str]:
    """Return the fields that are read by default."""
    return [*dict.fromkeys((*corpus, *DEFAULT_FIELDS))]


def _fields_of(
    row: Row, origin: Origin, chosen_fields: Sequence[str], corpus: Sequence[str]
) -> Sequence[str]:
    row_fields = ", ".join(map(str, row)) or "no fields"
    if origin.format == "txt":
        return ("text",)
    for field in chosen_fields:
        if reach(row, field) is ABSENT:
            suggestion = did_you_mean(field, map(str, row))
            raise InputError(
                f"{origin.place} has no field {field!r} (corpus.without_fields); it has: "
                f"{row_fields}{suggestion}"
            )
    found = chosen_fields or [f for f in _default_fields(corpus) if reach(row, f) is not ABSENT]
    if not found:
        raise InputError(
            f"{origin.place} has none of the fields {', '.join(_default_fields(corpus))} "
            f"(it has: {row_fields}); name those of its texts with corpus.without_fields"
        )
    return found


def _log_fields(row: Row, origin: Origin, fields: Sequence[str], is_chosen: bool) -> None:
    if origin.format == "txt":
        return
    message = f"corpus.without: texts of {origin.place} are {', '.join(fields)}"
    others = [name for name, value in row.items() if _looks_like_text(value) and name not in fields]
    if not others or is_chosen:
        _log_once(logging.INFO, message)
        return
    _log_once(
        logging.WARNING,
        f"{message}; {', '.join(others)} {'is' if len(others) == 1 else 'are'} not read: if tests "
        "have texts there, name all fields of texts with corpus.without_fields",
    )


@cache  # for a command that reads the files by several rules
def _log_once(level: int, message: str) -> None:
    log.log(level, "%s", message)


def _looks_like_text(value: object) -> bool:
    return isinstance(value, str) and len(value.split()) > LABEL_WORDS


def _text(value: object, label: str) -> str:
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        value = " ".join(value)
    if not isinstance(value, str):
        given = f"a {type(value).__name__}"
        if value is None or value is ABSENT:
            given = "missing; every row must have the fields of the first"
        raise InputError(f"{label} must be a string or a list of words (given: {given})")
    if problem := surrogate_problem("text", value):
        raise InputError(f"{label}: {problem}")
    return value
