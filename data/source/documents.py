"""Real text as a stream of documents: txt, jsonl, csv, tsv, parquet, arrow, a datasets id, the
Python docs.

Decides which part of a record is its text, domain and id, and which records are bad. Tokens are
unknown here. Every mistake in the source is an InputError that names the place.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeGuard

from rekindle.data.errors import InputError, did_you_mean
from rekindle.data.source.content import Dialogue, Form, RichContent
from rekindle.data.source.fields import ABSENT, reach
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.python_docs import python_docs
from rekindle.data.source.record import BadRecord, Block, Record, show_value
from rekindle.data.source.records import BLOCK_BYTES, read_blocks, records_of
from rekindle.data.source.sources import HUB, PYTHON_DOCS, TABLES, Entry, Origin, find_origins
from rekindle.data.text_files import surrogate_problem

log = logging.getLogger("rekindle")

_COLUMNS = ("parquet", "arrow", HUB)  # in these formats missing values are null
_NOT_NAMES = (Mapping, list, tuple, bytes)  # not valid as a domain or group


class Document(NamedTuple):
    """One text of the corpus.

    ``id`` is the record's own ``id`` (text or integer) or "<file name>:<row>", with rows counted
    from 1: records of parquet, arrow and datasets, rows of csv and tsv, lines of jsonl and txt.
    ``pair``: the second text of a record that is a pair. ``content``: what it holds, if that is not
    plain text. ``group``: the group it is compared within.
    """

    id: str
    text: str
    domain: str | None
    pair: str | None = None
    content: RichContent | None = None
    group: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the text, and the other one of its pair."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


class Fields(NamedTuple):
    """Which fields of a record hold its text, its domain, the second text of a pair and its group.
    ``forms`` read records that are not texts, by kind of content.
    """

    text: str
    domain: str | None
    pair: str | None
    forms: Mapping[str, Form] | None = None
    group: str | None = None

    def names_for(self, origin: Origin) -> list[str]:
        """Return the fields that are read of an origin, the text's first."""
        if origin.content == "text":
            return [*filter(None, (self.text, self.domain, self.pair, self.group)), "id"]
        return [*self.form_of(origin).fields, *filter(None, (self.domain, self.group)), "id"]

    def form_of(self, origin: Origin) -> Form:
        """Return the reader of an origin's records."""
        assert self.forms is not None  # whoever names such a source has them
        return self.forms[origin.content]


def read_documents(
    source: Sequence[str | Entry | Origin],
    text_field: str = "text",
    domain_field: str | None = None,
    left_out: LeftOut | None = None,
    pair_field: str | None = None,
    forms: Mapping[str, Form] | None = None,
    group_field: str | None = None,
) -> Iterator[Document]:
    """Yield the documents of ``source`` in a fixed order; memory does not grow with the files.

    ``source`` is what ``find_origins`` takes, or its result. In .txt files a blank line ends a
    document; so does the line break after which it would exceed 1 MiB (a longer single line is cut
    at a space). Texts that are empty or only white space are skipped.

    A field may be dotted: ``meta.set_name`` is ``set_name`` inside ``meta``; a field of that
    literal name takes precedence. ``domain`` is the value of ``domain_field`` as text, whether
    text, a number or a date; None without ``domain_field``. For python-docs it is the part of the
    library, whatever ``domain_field`` says. With ``pair_field`` each record is a pair of texts and
    must have both; .txt files and python-docs have none. ``group`` is the value of ``group_field``,
    treated like ``domain``; .txt files and python-docs have none. ``forms`` read the records of
    entries that hold no texts, and report what is bad in them.

    Bad records are: a line that is not a JSON object, a row with more or fewer fields than columns,
    bytes that are not UTF-8 (in a .txt file, the document that has them), a text, domain or group
    that is missing or null, a text that is not a string, a domain or group that is a mapping or a
    list, half a surrogate pair in text, domain, group or id, an empty text of a pair. With
    ``left_out`` they are collected there, unless its ``skips_bad`` is false, and the rest is read.

    Raises InputError: at the call for a source that does not exist or is of an unknown kind; while
    reading for a damaged file, and for a bad record that is not left out.
    """
    origins = origins_of(source)
    fields = Fields(text_field, domain_field, pair_field, forms, group_field)
    return _documents(origins, fields, left_out)


def origins_of(source: Sequence[str | Entry | Origin]) -> Sequence[Origin]:
    """Return the origins that ``find_origins`` finds for ``source``; ``source`` itself if it is
    that.
    """
    entries = [source] if isinstance(source, str) else source
    origins = [entry for entry in entries if isinstance(entry, Origin)]
    return origins or find_origins([e for e in entries if not isinstance(e, Origin)])


def _documents(
    origins: Sequence[Origin], fields: Fields, left_out: LeftOut | None
) -> Iterator[Document]:
    for origin in origins:
        is_empty = True
        for block in document_blocks(origin, fields):
            for document in documents_of(block, origin, fields):
                is_empty &= isinstance(document, BadRecord)
                if accept(document, left_out):
                    yield document
                    if left_out is not None:
                        left_out.kept_documents += 1
        if is_empty:
            warn_empty(origin)


def warn_empty(origin: Origin) -> None:
    """Warn that there is no text in an origin."""
    log.warning("%s: there is no text in it", origin.place)


def accept(found: Document | BadRecord, left_out: LeftOut | None) -> TypeGuard[Document]:
    """Return whether this is a document that is kept; if it is left out, note it.

    Raises InputError for a bad record that must not be left out.
    """
    if isinstance(found, BadRecord):
        if left_out is None or not left_out.skips_bad:
            raise InputError(
                f"{found.message}; or leave such records out (corpus.on_bad_record: skip)"
            )
        left_out.add(found)
        return False
    if left_out is None or left_out.held_texts is None:
        return True
    if held_text := left_out.held_texts.find(*_searched_texts(found)):
        left_out.add_held(found.id, held_text)
        return False
    return True


def _searched_texts(document: Document) -> tuple[str, ...]:
    """Return the texts in which a test's text may occur: not across what a template puts between
    messages.
    """
    content = document.content
    return (content.parts,) if isinstance(content, Dialogue) else document.texts


def document_blocks(
    origin: Origin, fields: Fields, size: int = BLOCK_BYTES
) -> Iterator["Block | Pages"]:
    """Yield what ``documents_of`` turns into documents, in blocks of about ``size`` bytes."""
    if origin.content != "text" and origin.format in (PYTHON_DOCS, "txt", *TABLES):
        raise InputError(
            f"{origin.place} cannot hold rows of the format {origin.content}, which corpus.source "
            "gives it; they are in jsonl, parquet or arrow files, or in a datasets id"
        )
    if fields.pair is not None and origin.format in (PYTHON_DOCS, "txt"):
        raise InputError(
            f"{origin.place} has no fields, so none of its records is a pair (corpus.pair_field: "
            f"{fields.pair}); give jsonl, csv, tsv, parquet or arrow files, or leave pair_field "
            "out"
        )
    if fields.group is not None and origin.format in (PYTHON_DOCS, "txt"):
        raise InputError(
            f"{origin.place} has no fields, so none of its records has a group "
            f"(corpus.group_field: {fields.group}); give jsonl, csv, tsv, parquet or arrow files, "
            "or leave it out"
        )
    if origin.format == PYTHON_DOCS:
        for page in python_docs():
            yield Pages([Document(page.id, page.text, page.part)])
        return
    yield from read_blocks(origin, fields.names_for(origin), size)


class Pages(NamedTuple):
    """Documents that are ready."""

    documents: Sequence[Document]

    @property
    def size(self) -> int:
        """Return their approximate size in bytes."""
        return sum(len(document.text) for document in self.documents)


def documents_of(
    block: "Block | Pages", origin: Origin, fields: Fields
) -> Iterator[Document | BadRecord]:
    """Yield the documents of a block of ``origin``, and its bad records."""
    if isinstance(block, Pages):
        yield from block.documents
        return
    for record in records_of(block, origin):
        found = record if isinstance(record, BadRecord) else _document(record, origin, fields)
        if found is not None:
            yield found


def _document(record: Record, origin: Origin, fields: Fields) -> Document | BadRecord | None:
    """Return the document of a record; None if its text is blank, unless it belongs to a pair."""
    table = origin.format in TABLES
    record_name = f"{origin.place}, {'row' if table else 'record'} {record.row}"
    columns_text = "the first line names its columns" if table else "it has"
    domain, group = (
        None if name is None else _name_value(record, name, subject, record_name, columns_text)
        for subject, name in (("domain", fields.domain), ("group", fields.group))
    )
    if origin.content != "text":
        return _document_of_content(record, origin, fields, (domain, group), record_name)
    values = [_text(record, fields.text, "corpus.text_field", record_name, columns_text)]
    if fields.pair is not None:
        values.append(_text(record, fields.pair, "corpus.pair_field", record_name, columns_text))
    if bad_records := [found for found in (*values, domain, group) if isinstance(found, BadRecord)]:
        return bad_records[0]
    texts = [text for text in values if isinstance(text, str)]
    blank = [not text or text.isspace() for text in texts]
    if fields.pair is None and blank[0]:
        return None
    if any(blank):
        field = (fields.text, fields.pair)[blank.index(True)]
        empty = (
            f"{record_name}: the field {field!r} is empty; a pair (corpus.pair_field) has two texts"
        )
        return BadRecord("an empty text of a pair", empty)
    pair = texts[1] if len(texts) > 1 else None
    fields_of_document = (_document_id(record, origin), texts[0], domain, pair, None, group)
    return _check_characters(Document(*fields_of_document), record_name)  # type: ignore[arg-type]


def _document_of_content(
    record: Record,
    origin: Origin,
    fields: Fields,
    names: tuple[str | BadRecord | None, str | BadRecord | None],
    record_name: str,
) -> Document | BadRecord:
    """Return the document of a record that is not plain text."""
    result = fields.form_of(origin)(record.values, origin.format in _COLUMNS, record_name)
    if isinstance(result, BadRecord):
        return result
    domain, group = names
    if isinstance(domain, BadRecord):
        return domain
    if isinstance(group, BadRecord):
        return group
    text, content = result
    fields_of_document = (_document_id(record, origin), text, domain, None, content, group)
    return _check_characters(Document(*fields_of_document), record_name)


def _check_characters(document: Document, record_name: str) -> Document | BadRecord:
    """Return the document, unless it contains half a character."""
    texts = (("text", text) for text in document.texts)
    names = (("domain", document.domain or ""), ("group", document.group or ""))
    for subject, value in (*texts, ("id", document.id), *names):
        if problem := surrogate_problem(subject, value):
            return BadRecord("half a surrogate pair", f"{record_name}: {problem}")
    return document


def _text(
    record: Record, field: str, setting: str, record_name: str, columns_text: str
) -> str | BadRecord:
    text = reach(record.values, field)
    if text is None or text is ABSENT:
        return _missing(record, field, setting, record_name, columns_text)
    if not isinstance(text, str):
        return BadRecord(
            "text is no string",
            f"{record_name}: the field {field!r} holds {show_value(text)}; the text must be a "
            "string",
        )
    return text


def _name_value(
    record: Record, field: str, subject: str, record_name: str, columns_text: str
) -> str | BadRecord:
    """Return a record's domain or group, whichever ``subject`` names."""
    value = reach(record.values, field)
    if value is None or value is ABSENT:
        return _missing(record, field, f"corpus.{subject}_field", record_name, columns_text)
    if isinstance(value, _NOT_NAMES):
        return BadRecord(
            f"{subject} is no name",
            f"{record_name}: the field {field!r} (corpus.{subject}_field) holds "
            f"{show_value(value)}; a {subject} is a name or a number{_nested_fields(field, value)}",
        )
    return str(value)


def _missing(
    record: Record, field: str, setting: str, record_name: str, columns_text: str
) -> BadRecord:
    known = {"corpus.domain_field": "no domain", "corpus.group_field": "no group"}
    kind = known.get(setting, "no text")
    if reach(record.values, field) is None:
        return BadRecord(kind, f"{record_name}: the field {field!r} ({setting}) is null")
    fields = list(record.values)
    found = ", ".join(map(str, fields)) or "no fields"
    suggestion = did_you_mean(field, map(str, fields))
    return BadRecord(
        kind, f"{record_name}: no field {field!r} ({setting}); {columns_text}: {found}{suggestion}"
    )


def _nested_fields(field: str, value: object) -> str:
    """Return the dotted fields inside a value that is not a name itself."""
    if not isinstance(value, Mapping) or not value:
        return ""
    return ": " + " or ".join(f"{field}.{name}" for name in list(value)[:5])


def _document_id(record: Record, origin: Origin) -> str:
    record_id = record.values.get("id")
    if isinstance(record_id, str | int) and not isinstance(record_id, bool) and record_id != "":
        return str(record_id)
    return f"{origin.name}:{record.row}"
