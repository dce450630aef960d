"""A ranking task cut from Python's documentation: which passage stands under a title? Knows no
model.

A section is a headed part of a help topic, or a docstring whose first paragraph is one line: that
is its title, and the first passage of what follows its own. A title is a query. Its candidates are
its own passage, a few that stand under other titles of the same module, and passages from the
midst of other modules' documents. A document belongs to one split with all its passages, and a
title's candidates are of its split.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

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
OWN_PASSAGE, SAME_MODULE, OTHER_MODULE = 2, 1, 0  # labels: how well a candidate answers
_MOST_OF_MODULE, _MOST_CANDIDATES = (
    2,
    8,
)  # of a title: at most so many of the same module; of all kinds
_SAMPLED_PASSAGES = 40  # passages from the midst, of which those of other modules are candidates
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

    page: str
    title: str
    passage: str
    module: str
    part: str


def sections_of(pages: Sequence[PythonDoc]) -> list[Section]:
    """Return all sections, in the order of their documents; of those that share a title or a
    passage, only the first.
    """
    sections: list[Section] = []
    seen: set[str] = set()
    for page in pages:
        for title, body in _titles_and_bodies(page):
            first_passage = passages(body)[:1]
            if (
                not first_passage
                or not _SHORTEST <= len(title) <= _LONGEST
                or {title, *first_passage} & seen
            ):
                continue
            seen |= {title, *first_passage}
            module = page.module.partition(".")[0]
            sections.append(Section(page.id, title, first_passage[0], module, page.part))
    return sections


def _titles_and_bodies(page: PythonDoc) -> Iterator[tuple[str, str]]:
    """Yield each title of a document with what follows it."""
    if page.kind != "topic":
        first_paragraph, _, body = page.text.partition("\n\n")
        if "\n" not in first_paragraph:
            yield first_paragraph, body.strip()
        return
    headings = list(_HEADING.finditer(page.text))
    ends = [*(heading.start() for heading in headings[1:]), len(page.text)]
    for heading, end in zip(headings, ends, strict=False):
        yield heading[1], page.text[heading.end() : end].strip()


def later_passages(pages: Sequence[PythonDoc]) -> list[tuple[str, str]]:
    """Return the passages of documents but for each one's first, with its module, each once."""
    module_of_passage = {
        passage: page.module.partition(".")[0]
        for page in pages
        for passage in passages(page.text)[1:]
    }
    return [(module, passage) for passage, module in module_of_passage.items()]


def candidates(
    section: Section, others: Sequence[Section], later: Sequence[tuple[str, str]]
) -> list[tuple[str, int]]:
    """Return the passages that are ranked for the title of ``section`` with the label of each, in
    an order without meaning; ``others`` of its split may have it among them, and ``later`` are
    passages of modules.
    """
    random = Random(section.title)
    same_module = [
        other.passage for other in others if other.module == section.module and other != section
    ]
    labels = {section.passage: OWN_PASSAGE}
    labels |= dict.fromkeys(
        random.sample(same_module, min(_MOST_OF_MODULE, len(same_module))), SAME_MODULE
    )
    for module, passage in random.sample(later, min(_SAMPLED_PASSAGES, len(later))):
        if len(labels) < _MOST_CANDIDATES and module != section.module:
            labels.setdefault(passage, OTHER_MODULE)
    return random.sample([*labels.items()], len(labels))


def write_sections(pages: Sequence[PythonDoc], sizes: SectionSizes, out: Path) -> None:
    """Write ``tasks/section/{train,dev,test}.jsonl`` and ``text.jsonl``, which has no labels."""
    sections = sections_of(pages)
    for name in (*LABELLED, TEXT):
        split = "corpus" if name == TEXT else name
        of_split = [entry for entry in sections if split_of(entry.page) == split]
        own_passages = {entry.passage for entry in of_split}
        later = later_passages([page for page in pages if split_of(page.id) == split])
        later = [entry for entry in later if entry[1] not in own_passages]
        chosen = sorted(of_split, key=lambda entry: hashed(NAME, entry.title))[
            : getattr(sizes, name)
        ]
        lines = (
            _record(section, passage, None if name == TEXT else label)
            for section in chosen
            for passage, label in candidates(section, of_split, later)
        )
        write_lines(out / TASKS_FOLDER / NAME / f"{name}.jsonl", lines)


def _record(section: Section, passage: str, label: int | None) -> Record:
    """A line: a title and one of its candidates."""
    texts = {"group": section.title, "query": section.title, "document": passage}
    if label is None:
        return {**texts, "domain": section.part}
    return {"page": section.page, **texts, "label": label}
