"""Real text as a stream of documents: txt, jsonl, csv, tsv, parquet, arrow, a datasets id, the
Python docs.

What of a record is its text, its domain and its id, and which records are bad. It knows nothing of
tokens. Every mistake in the source is an InputError that names the place.
"""

import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.source.python_docs import python_docs
from rekindle.data.source.records import Bad, Record, read_records, shown
from rekindle.data.source.sources import PYTHON_DOCS, TABLES, Origin, find_origins
from rekindle.data.text_files import half_a_pair

log = logging.getLogger("rekindle")

_ABSENT = object()
_NO_NAME = (Mapping, list, tuple, bytes)  # what a domain cannot be


class Document(NamedTuple):
    """One text of the corpus.

    ``id`` is the record's own ``id`` (text or integer) or "<file name>:<row>", where the row counts
    from 1: records of parquet, arrow and datasets, rows of csv and tsv, lines of jsonl and txt.
    """

    id: str
    text: str
    domain: str | None


class LeftOut:
    """Which bad records were left out: of each kind, how many documents were read before each."""

    def __init__(self) -> None:
        self.first = ""  # what is wrong with the first one
        self.documents = 0  # read so far
        self._before: dict[str, array[int]] = {}

    def add(self, bad: Bad) -> None:
        """One more."""
        self.first = self.first or bad.message
        self._before.setdefault(bad.kind, array("q")).append(self.documents)

    def counts(self, last_document: int | None = None) -> dict[str, int]:
        """How many of each kind, up to the document of that index or in all."""
        found = {
            kind: sum(last_document is None or before <= last_document for before in places)
            for kind, places in sorted(self._before.items())
        }
        return {kind: number for kind, number in found.items() if number}

    def told(self) -> str:
        """What was left out, in words; nothing where there was nothing."""
        counts = self.counts()
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts.items())
        return f"bad records left out: {kinds}; the first: {self.first}" if counts else ""


def read_documents(
    source: Sequence[str | Origin],
    text_field: str = "text",
    domain_field: str | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[Document]:
    """The documents of ``source`` in a fixed order, in memory that does not grow with the files.

    ``source`` is what ``find_origins`` takes, or its result. In .txt files a blank line ends a
    document; so does the line break after which it would grow past 1 MiB (a single line longer than
    that is cut at a space). Texts that are empty or all white space are skipped.

    A field may be dotted, ``meta.set_name`` being ``set_name`` inside ``meta``; a field that is
    called so comes first. ``domain`` is the value of ``domain_field`` as text, be it text, a number
    or a date; None without ``domain_field``. Of python-docs it is the part of the library, whatever
    ``domain_field`` says.

    Bad are: a line that is no JSON object, a row with more or fewer fields than columns, bytes that
    are not UTF-8 (of a .txt file the document that has them), a text or domain that is missing or
    null, a text that is not a string, a domain that is a mapping or a list, half a surrogate pair
    in text, domain or id. With ``left_out`` they are put there, and what is left is read.

    Raises InputError: at the call for a source that does not exist or is of no known kind; while
    reading for a damaged file, and without ``left_out`` for a bad record.
    """
    origins = [origin for origin in source if isinstance(origin, Origin)]
    if not origins:
        origins = find_origins(
            [str(entry) for entry in ([source] if isinstance(source, str) else source)]
        )
    return _documents(origins, text_field, domain_field, left_out)


def _documents(
    origins: Sequence[Origin], text_field: str, domain_field: str | None, left_out: LeftOut | None
) -> Iterator[Document]:
    for origin in origins:
        count = 0
        for document in _of_origin(origin, text_field, domain_field):
            if isinstance(document, Document):
                count += 1
                yield document
                if left_out is not None:
                    left_out.documents += 1
            elif left_out is None:
                raise InputError(
                    f"{document.message}; or leave such records out (corpus.on_bad_record: skip)"
                )
            else:
                left_out.add(document)
        if not count:
            log.warning("%s: there is no text in it", origin.place)


def _of_origin(
    origin: Origin, text_field: str, domain_field: str | None
) -> Iterator[Document | Bad]:
    if origin.format == PYTHON_DOCS:
        for page in python_docs():
            yield Document(page.id, page.text, page.part)
        return
    fields = [text_field, "id", *([domain_field] if domain_field is not None else [])]
    for record in read_records(origin, fields):
        found = (
            record
            if isinstance(record, Bad)
            else _document(record, origin, text_field, domain_field)
        )
        if found is not None:
            yield found


def _document(
    record: Record, origin: Origin, text_field: str, domain_field: str | None
) -> Document | Bad | None:
    """The document of a record; None where its text is blank."""
    table = origin.format in TABLES
    where = f"{origin.place}, {'row' if table else 'record'} {record.row}"
    named = "the first line names its columns" if table else "it has"
    text = _reach(record.values, text_field)
    if text is None or text is _ABSENT:
        return _missing(record, text_field, "corpus.text_field", where, named)
    if not isinstance(text, str):
        return Bad(
            "text is no string",
            f"{where}: the field {text_field!r} holds {shown(text)}; the text must be a string",
        )
    domain = None
    if domain_field is not None:
        value = _reach(record.values, domain_field)
        if value is None or value is _ABSENT:
            return _missing(record, domain_field, "corpus.domain_field", where, named)
        if isinstance(value, _NO_NAME):
            return Bad(
                "domain is no name",
                f"{where}: the field {domain_field!r} (corpus.domain_field) holds {shown(value)}; "
                f"a domain is a name or a number{_inside(domain_field, value)}",
            )
        domain = str(value)
    if not text or text.isspace():
        return None
    identity = _identity(record, origin)
    for what, value in (("text", text), ("id", identity), ("domain", domain or "")):
        if told := half_a_pair(what, value):
            return Bad("half a surrogate pair", f"{where}: {told}")
    return Document(identity, text, domain)


def _reach(values: Mapping[str, object], field: str) -> object:
    """The value of a field that may be inside others; _ABSENT where there is none."""
    if field in values:
        return values[field]
    for at in range(len(field) - 1, 0, -1):  # the longest name that is there holds the rest
        inside = values.get(field[:at]) if field[at] == "." else None
        if isinstance(inside, Mapping):
            found = _reach(inside, field[at + 1 :])
            if found is not _ABSENT:
                return found
    return _ABSENT


def _missing(record: Record, field: str, setting: str, where: str, named: str) -> Bad:
    kind = "no text" if setting.endswith("text_field") else "no domain"
    if _reach(record.values, field) is None:
        return Bad(kind, f"{where}: the field {field!r} ({setting}) is null")
    fields = list(record.values)
    has = ", ".join(map(str, fields)) or "no fields"
    near = did_you_mean(field, map(str, fields))
    return Bad(kind, f"{where}: no field {field!r} ({setting}); {named}: {has}{near}")


def _inside(field: str, value: object) -> str:
    """Which dotted fields there are in a value that is no name itself."""
    if not isinstance(value, Mapping) or not value:
        return ""
    return ": " + " or ".join(f"{field}.{name}" for name in list(value)[:5])


def _identity(record: Record, origin: Origin) -> str:
    own = record.values.get("id")
    if isinstance(own, str | int) and not isinstance(own, bool) and own != "":
        return str(own)
    return f"{origin.name}:{record.row}"
