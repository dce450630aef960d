"""Real text as a stream of documents: txt, jsonl, csv, tsv, parquet, arrow, a datasets id, the
Python docs.

What of a record is its text, its domain and its id, and which records are bad. It knows nothing of
tokens. Every mistake in the source is an InputError that names the place.
"""

import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rekindle.data.counted import counted
from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.source.fields import ABSENT, reach
from rekindle.data.source.held_texts import Found, HeldTexts, Hold
from rekindle.data.source.python_docs import python_docs
from rekindle.data.source.records import Bad, Record, read_records, shown
from rekindle.data.source.sources import PYTHON_DOCS, TABLES, Origin, find_origins
from rekindle.data.text_files import half_a_pair

log = logging.getLogger("rekindle")

LONGEST_TOLD = 100  # characters of a test's text in a message
_NO_NAME = (Mapping, list, tuple, bytes)  # what a domain cannot be


class Document(NamedTuple):
    """One text of the corpus.

    ``id`` is the record's own ``id`` (text or integer) or "<file name>:<row>", where the row counts
    from 1: records of parquet, arrow and datasets, rows of csv and tsv, lines of jsonl and txt.
    ``pair``: the second text of a record that is a pair.
    """

    id: str
    text: str
    domain: str | None
    pair: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, and the other of its pair."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


class Fields(NamedTuple):
    """Which fields of a record hold its text, its domain, and the second text of a pair."""

    text: str
    domain: str | None
    pair: str | None


class LeftOut:
    """Which records are left out, and were: the bad ones, unless they are errors, and those that
    hold a text of a test; of each kind, how many documents were read before each.
    """

    def __init__(self, bad: bool = True, held: HeldTexts | None = None) -> None:
        self.bad, self.texts = bad, held
        self.first = ""  # what is wrong with the first bad one
        self.first_held = ""  # which one holds a text first, and which
        self.documents = 0  # read so far
        self._bad: dict[str, array[int]] = {}
        self._held: dict[str, array[int]] = {}

    def add(self, bad: Bad) -> None:
        """One more bad record."""
        self.first = self.first or bad.message
        self._bad.setdefault(bad.kind, array("q")).append(self.documents)

    def add_held(self, document: Document, hold: Hold) -> None:
        """One more that holds a text."""
        nearly = " nearly" * (hold.kind == "near")
        text = f"{hold.text[:LONGEST_TOLD]}{'…' * (len(hold.text) > LONGEST_TOLD)}"
        self.first_held = self.first_held or f"{document.id} holds{nearly}: {text}"
        self._held.setdefault(hold.kind, array("q")).append(self.documents)

    def counts(self, last_document: int | None = None) -> dict[str, int]:
        """How many bad ones of each kind, up to the document of that index or in all."""
        return _counted(self._bad, last_document)

    def held(self, last_document: int | None = None) -> Found:
        """How many that hold a text, up to the document of that index or in all."""
        return Found(**_counted(self._held, last_document))

    def tell_first(self) -> None:
        """Say the first one of each in a line."""
        if self.first:
            log.warning("the first bad record that was left out: %s", self.first)
        if self.first_held:
            log.info("the first record left out for a test's text: %s", self.first_held)

    @property
    def total(self) -> int:
        """How many were left out so far."""
        return sum(map(len, (*self._bad.values(), *self._held.values())))

    def advice(self, usual: str) -> str:
        """What to do where no document is left: ``usual``, unless texts of tests were all."""
        if any(self.held()) and not self._bad:
            return "give other text, or other files in corpus.without: it held texts of these"
        return usual

    def told(self, last_document: int | None = None) -> str:
        """What was left out, up to the document of that index or in all, in words; nothing where
        there was nothing.
        """
        told = []
        if bad := self.counts(last_document):
            told += [told_of_bad(bad), f"the first: {self.first}"]
        if any(held := self.held(last_document)):
            told += [told_of_held(held), f"the first: {self.first_held}"]
        return "; ".join(told)


def _counted(left_out: "Mapping[str, array[int]]", last_document: int | None) -> dict[str, int]:
    found = {
        kind: sum(last_document is None or before <= last_document for before in places)
        for kind, places in sorted(left_out.items())
    }
    return {kind: number for kind, number in found.items() if number}


def told_of_bad(counts: Mapping[str, int]) -> str:
    """How many bad records were left out of each kind, in words; nothing where there was none."""
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts.items())
    return f"bad records left out: {kinds}" if counts else ""


def told_of_held(found: Found, files: Sequence[str] = ()) -> str:
    """How many records were left out because they hold a text, in words."""
    of = ", ".join(files) or "corpus.without"
    return (
        f"{counted(sum(found), 'record')} left out for texts of {of} "
        f"({found.exact:,} hold one as it stands, {found.near:,} nearly)"
    )


def read_documents(
    source: Sequence[str | Origin],
    text_field: str = "text",
    domain_field: str | None = None,
    left_out: LeftOut | None = None,
    pair_field: str | None = None,
) -> Iterator[Document]:
    """The documents of ``source`` in a fixed order, in memory that does not grow with the files.

    ``source`` is what ``find_origins`` takes, or its result. In .txt files a blank line ends a
    document; so does the line break after which it would grow past 1 MiB (a single line longer than
    that is cut at a space). Texts that are empty or all white space are skipped.

    A field may be dotted, ``meta.set_name`` being ``set_name`` inside ``meta``; a field that is
    called so comes first. ``domain`` is the value of ``domain_field`` as text, be it text, a number
    or a date; None without ``domain_field``. Of python-docs it is the part of the library, whatever
    ``domain_field`` says. With ``pair_field`` each record is a pair of texts, both of which it must
    have; .txt files and python-docs have none.

    Bad are: a line that is no JSON object, a row with more or fewer fields than columns, bytes that
    are not UTF-8 (of a .txt file the document that has them), a text or domain that is missing or
    null, a text that is not a string, a domain that is a mapping or a list, half a surrogate pair
    in text, domain or id, an empty text of a pair. With ``left_out`` they are put there, unless
    that leaves only records out that hold a text of a test, and what is left is read.

    Raises InputError: at the call for a source that does not exist or is of no known kind; while
    reading for a damaged file, and for a bad record that is not left out.
    """
    origins = [origin for origin in source if isinstance(origin, Origin)]
    if not origins:
        origins = find_origins(
            [str(entry) for entry in ([source] if isinstance(source, str) else source)]
        )
    return _documents(origins, Fields(text_field, domain_field, pair_field), left_out)


def _documents(
    origins: Sequence[Origin], fields: Fields, left_out: LeftOut | None
) -> Iterator[Document]:
    texts = left_out and left_out.texts
    for origin in origins:
        count = 0
        for document in _of_origin(origin, fields):
            if isinstance(document, Bad):
                if left_out is None or not left_out.bad:
                    raise InputError(
                        f"{document.message}; or leave such records out (corpus.on_bad_record: "
                        "skip)"
                    )
                left_out.add(document)
                continue
            count += 1
            if left_out and texts and (hold := texts.find(*document.texts)):
                left_out.add_held(document, hold)
                continue
            yield document
            if left_out is not None:
                left_out.documents += 1
        if not count:
            log.warning("%s: there is no text in it", origin.place)


def _of_origin(origin: Origin, fields: Fields) -> Iterator[Document | Bad]:
    if fields.pair is not None and origin.format in (PYTHON_DOCS, "txt"):
        raise InputError(
            f"{origin.place} has no fields, so that no record of it is a pair (corpus.pair_field: "
            f"{fields.pair}); give jsonl, csv, tsv, parquet or arrow files, or leave pair_field out"
        )
    if origin.format == PYTHON_DOCS:
        for page in python_docs():
            yield Document(page.id, page.text, page.part)
        return
    for record in read_records(origin, [*filter(None, fields), "id"]):
        found = record if isinstance(record, Bad) else _document(record, origin, fields)
        if found is not None:
            yield found


def _document(record: Record, origin: Origin, fields: Fields) -> Document | Bad | None:
    """The document of a record; None where its text is blank, unless that is one of a pair."""
    table = origin.format in TABLES
    where = f"{origin.place}, {'row' if table else 'record'} {record.row}"
    named = "the first line names its columns" if table else "it has"
    read = [_text(record, fields.text, "corpus.text_field", where, named)]
    if fields.pair is not None:
        read.append(_text(record, fields.pair, "corpus.pair_field", where, named))
    domain = None
    if fields.domain is not None:
        domain = _domain(record, fields.domain, where, named)
    if isinstance(domain, Bad) or any(isinstance(text, Bad) for text in read):
        return next(found for found in (*read, domain) if isinstance(found, Bad))
    texts = [text for text in read if isinstance(text, str)]
    blank = [not text or text.isspace() for text in texts]
    if fields.pair is None and blank[0]:
        return None
    if any(blank):
        field = (fields.text, fields.pair)[blank.index(True)]
        empty = f"{where}: the field {field!r} is empty; a pair (corpus.pair_field) has two texts"
        return Bad("an empty text of a pair", empty)
    identity = _identity(record, origin)
    known = [*(("text", text) for text in texts), ("id", identity), ("domain", domain or "")]
    for what, value in known:
        if told := half_a_pair(what, str(value)):
            return Bad("half a surrogate pair", f"{where}: {told}")
    return Document(identity, texts[0], domain, texts[1] if len(texts) > 1 else None)


def _text(record: Record, field: str, setting: str, where: str, named: str) -> str | Bad:
    text = reach(record.values, field)
    if text is None or text is ABSENT:
        return _missing(record, field, setting, where, named)
    if not isinstance(text, str):
        return Bad(
            "text is no string",
            f"{where}: the field {field!r} holds {shown(text)}; the text must be a string",
        )
    return text


def _domain(record: Record, field: str, where: str, named: str) -> str | Bad:
    value = reach(record.values, field)
    if value is None or value is ABSENT:
        return _missing(record, field, "corpus.domain_field", where, named)
    if isinstance(value, _NO_NAME):
        return Bad(
            "domain is no name",
            f"{where}: the field {field!r} (corpus.domain_field) holds {shown(value)}; a domain is "
            f"a name or a number{_inside(field, value)}",
        )
    return str(value)


def _missing(record: Record, field: str, setting: str, where: str, named: str) -> Bad:
    kind = "no domain" if setting.endswith("domain_field") else "no text"
    if reach(record.values, field) is None:
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
