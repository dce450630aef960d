"""A ranking task cut from Python's documentation: which passage stands under a title? Knows no
model.

A section is a headed part of a help topic, or a docstring whose first paragraph is one line: that
is its title, and the first passage of what follows its own. A title is a query, and its candidates
are its own passage, a few of other sections of the same module, and passages from elsewhere. A
document's sections belong to the split that the document belongs to, and so do all candidates.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.data.source.python_docs import PythonDoc
from rekindle.data.storage.atomic import write_lines
from rekindle.pipeline.builtin.tasks import (
    LABELLED,
    TASKS_FOLDER,
    Record,
    hashed,
    passages,
    split_of,
)

NAME = "section"
TEXT = "text"  # the unlabelled titles and candidates
OWN, NEAR, FAR = 2, 1, 0  # labels: how well a candidate answers
_NEAR, _CANDIDATES = 2, 8  # of a title: at most so many of the same module; of all kinds
_SHORTEST, _LONGEST = 8, 80  # characters of a title
_HEADING = re.compile(r"^(\S.*)\n([*=\-~^])\2{3,}$", re.MULTILINE)


@dataclass(frozen=True)
class SectionSizes:
    """How many titles each split has at most, and the unlabelled text."""

    train: int
    dev: int
    test: int
    text: int


@dataclass(frozen=True)
class Section:
    """A title and the passage that stands under it."""

    document: str
    title: str
    passage: str
    module: str
    part: str


def sections_of(pages: Sequence[PythonDoc]) -> list[Section]:
    """All sections, in the order of their documents; of those with a title or a passage that
    another one has, the first.
    """
    found: list[Section] = []
    seen: set[str] = set()
    for page in pages:
        for title, body in _titled(page):
            own = passages(body)[:1]
            if not own or not _SHORTEST <= len(title) <= _LONGEST or {title, *own} & seen:
                continue
            seen |= {title, *own}
            module = page.module.partition(".")[0]
            found.append(Section(page.id, title, own[0], module, page.part))
    return found


def _titled(page: PythonDoc) -> Iterator[tuple[str, str]]:
    """Yield each title of a document with what follows it."""
    if page.kind != "topic":
        first, _, rest = page.text.partition("\n\n")
        if "\n" not in first:
            yield first, rest.strip()
        return
    headings = list(_HEADING.finditer(page.text))
    ends = [*(heading.start() for heading in headings[1:]), len(page.text)]
    for heading, end in zip(headings, ends, strict=False):
        yield heading[1], page.text[heading.end() : end].strip()


def candidates(section: Section, others: Sequence[Section]) -> list[tuple[Section, int]]:
    """Return the sections whose passages are ranked for the title of ``section``, with the label of
    each, in an order without meaning; ``others`` of its split may have it among them.
    """

    def drawn(given: list[Section], count: int) -> list[Section]:
        return sorted(given, key=lambda one: hashed(section.title, one.passage))[:count]

    near = drawn([one for one in others if one.module == section.module and one != section], _NEAR)
    far = drawn([one for one in others if one.module != section.module], _CANDIDATES)
    found = [(section, OWN), *((one, NEAR) for one in near), *((one, FAR) for one in far)]
    found = found[:_CANDIDATES]
    return sorted(found, key=lambda one: hashed("place", section.title, one[0].passage))


def write_sections(pages: Sequence[PythonDoc], sizes: SectionSizes, out: Path) -> None:
    """Write ``tasks/section/{train,dev,test}.jsonl`` and ``text.jsonl``, which has no labels."""
    sections = sections_of(pages)
    for name in (*LABELLED, TEXT):
        split = "corpus" if name == TEXT else name
        own = [one for one in sections if split_of(one.document) == split]
        chosen = sorted(own, key=lambda one: hashed(NAME, one.title))[: getattr(sizes, name)]
        lines = (
            _record(section, other, None if name == TEXT else label)
            for section in chosen
            for other, label in candidates(section, own)
        )
        write_lines(out / TASKS_FOLDER / NAME / f"{name}.jsonl", lines)


def _record(section: Section, other: Section, label: int | None) -> Record:
    """A line: a title and one of its candidates."""
    texts = {"group": section.title, "sentence1": section.title, "sentence2": other.passage}
    if label is None:
        return {**texts, "domain": section.part}
    return {"document": section.document, **texts, "label": label}
