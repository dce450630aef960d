"""Read the texts of test files, which a corpus must not contain."""

import logging
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.source.fields import ABSENT, reach
from rekindle.data.source.held_texts import HeldTexts
from rekindle.data.source.record import Bad
from rekindle.data.source.records import read_records
from rekindle.data.source.rows import Row, read_rows
from rekindle.data.source.sources import PYTHON_DOCS, Origin, find_origins
from rekindle.data.text_files import FileState, half_a_pair, state_of

log = logging.getLogger("rekindle")

_PAIRS = ("sentence1", "sentence2", "question", "question1", "question2", "premise", "hypothesis")
USUAL = ("text", "sentence", *_PAIRS, "tokens")  # fields of a labelled task
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
        held = _held(tuple(origins), tuple(fields), tuple(corpus))
    except InputError as error:  # its message speaks of sources
        told = str(error).replace("corpus source ", "").replace(f", or {PYTHON_DOCS}", "")
        told = told.replace(", a datasets id", ", or a datasets id")
        raise InputError(f"corpus.without: {told}") from None
    if not held.size:
        told = f"no text with a letter or a digit in {', '.join(files)}"
        raise InputError(f"corpus.without: {told}; give files with the texts of a test")
    return held


# A command reads them several times, a cycle once for each of its texts. Only a test's texts are
# kept.
@lru_cache(maxsize=4)
def _held(
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


def _texts(origin: Origin, given: Sequence[str], corpus: Sequence[str]) -> Iterator[str]:
    fields: Sequence[str] = ()
    first: Row = {}
    for where, row in _rows(origin):
        if not fields:
            fields, first = _fields_of(row, origin, given, corpus), row
            _tell_fields(row, origin, fields, chosen=bool(given))
        elif not given and row.keys() != first.keys():
            _check_same_fields(row, where, fields, corpus)
        for field in fields:
            yield _text(reach(row, field), f"{where}: {field}")
    if not fields:
        raise InputError(f"{origin.place} has no rows; give a file with texts")


def _rows(origin: Origin) -> Iterator[tuple[str, Row]]:
    """Yield every row, with its place."""
    if origin.format == "txt":
        yield from ((origin.place, row) for row in read_rows(origin.place))
        return
    lines = origin.format == "jsonl"
    for record in read_records(origin, None):
        if isinstance(record, Bad):
            raise InputError(record.message)
        yield f"{origin.place}{':' if lines else ', row '}{record.row}", record.values


def _check_same_fields(row: Row, where: str, fields: Sequence[str], corpus: Sequence[str]) -> None:
    """Raise InputError for a row with texts in fields that the first row lacks: they would be
    ignored, and not be looked for.
    """
    more = [f for f in _usual(corpus) if f not in fields and reach(row, f) is not ABSENT]
    if more:
        raise InputError(
            f"{where} has {' and '.join(more)}, but the first row of the file does not: texts are "
            f"read only from {' and '.join(fields)}. Name all fields of texts, which every row "
            "must have, with corpus.without_fields, or give the rows of each kind as a file"
        )


def _usual(corpus: Sequence[str]) -> list[str]:
    """Return the fields that are read by default."""
    return [*dict.fromkeys((*corpus, *USUAL))]


def _fields_of(
    row: Row, origin: Origin, given: Sequence[str], corpus: Sequence[str]
) -> Sequence[str]:
    has = ", ".join(map(str, row)) or "no fields"
    if origin.format == "txt":
        return ("text",)
    for field in given:
        if reach(row, field) is ABSENT:
            near = did_you_mean(field, map(str, row))
            raise InputError(
                f"{origin.place} has no field {field!r} (corpus.without_fields); it has: "
                f"{has}{near}"
            )
    found = given or [f for f in _usual(corpus) if reach(row, f) is not ABSENT]
    if not found:
        raise InputError(
            f"{origin.place} has none of the fields {', '.join(_usual(corpus))} "
            f"(it has: {has}); name those of its texts with corpus.without_fields"
        )
    return found


def _tell_fields(row: Row, origin: Origin, fields: Sequence[str], chosen: bool) -> None:
    if origin.format == "txt":
        return
    told = f"corpus.without: texts of {origin.place} are {', '.join(fields)}"
    others = [name for name, value in row.items() if _like_text(value) and name not in fields]
    if not others or chosen:
        _say(logging.INFO, told)
        return
    _say(
        logging.WARNING,
        f"{told}; {', '.join(others)} {'is' if len(others) == 1 else 'are'} not read: if tests "
        "have texts there, name all fields of texts with corpus.without_fields",
    )


@cache  # for a command that reads the files by several rules
def _say(level: int, told: str) -> None:
    log.log(level, "%s", told)


def _like_text(value: object) -> bool:
    return isinstance(value, str) and len(value.split()) > LABEL_WORDS


def _text(value: object, where: str) -> str:
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        value = " ".join(value)
    if not isinstance(value, str):
        given = f"a {type(value).__name__}"
        if value is None or value is ABSENT:
            given = "missing; every row must have the fields of the first"
        raise InputError(f"{where} must be a string or a list of words (given: {given})")
    if told := half_a_pair("text", value):
        raise InputError(f"{where}: {told}")
    return value
