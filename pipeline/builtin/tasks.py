"""The texts of the built-in models: the demo's corpus and tasks, and three tasks more. Knows no
model.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from rekindle.data.corpus.python_docs import PARTS, PythonDoc, python_docs
from rekindle.pipeline.demo.tasks import (
    TASKS,
    TASKS_FOLDER,
    Example,
    Split,
    Task,
    TaskSizes,
    labelled_examples,
    passages,
    record_of,
    split_of,
    write_corpus,
    write_lines,
)

HALVES = {"part-1": PARTS[: len(PARTS) // 2], "part-2": PARTS[len(PARTS) // 2 :]}
PLACE = "place"
_FEWEST = 3  # passages of a document that has a beginning, a middle and an end
_PART = next(task for task in TASKS if task.name == "part")


def write_documents(
    out: Path, sizes: TaskSizes, documents: int | None, domains: Mapping[str, str]
) -> None:
    """Write ``domain-<name>.jsonl``, ``tasks/<task>/<split>.jsonl`` and ``corpus.jsonl``."""
    # In an order without meaning: the first documents of the corpus are then a sample of all of it.
    pages = sorted(python_docs(), key=lambda page: hashlib.sha256(page.id.encode()).digest())
    write_corpus(pages, sizes, out, documents)
    for name, part in domains.items():
        own = [page for page in pages if page.part == part and split_of(page.id) == "corpus"]
        write_lines(out / f"domain-{name}.jsonl", ({"id": p.id, "text": p.text} for p in own))
    for name, parts in HALVES.items():
        half = Task(name, _PART.question, partial(_examples_of, parts))
        for split, examples in labelled_examples(half, pages, sizes).items():
            _write(out, name, split, map(record_of, examples))
    for split, records in place_records(pages, sizes).items():
        _write(out, PLACE, split, records)


def _write(out: Path, task: str, split: Split, records: Iterator[Mapping[str, object]]) -> None:
    folder = out / TASKS_FOLDER / task
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / f"{split}.jsonl", records)


def _examples_of(parts: tuple[str, ...], page: PythonDoc) -> Iterator[Example]:
    if page.part in parts:
        yield from _PART.examples(page)


def place_records(
    pages: list[PythonDoc], sizes: TaskSizes
) -> dict[Split, Iterator[dict[str, object]]]:
    """How far into its document a passage stands: 0.0 is the first one, 1.0 the last.

    Of each third of the scale there are equally many, although most documents are short.
    """
    places = {
        (page.id, text): number / (len(found) - 1)
        for page in pages
        if len(found := passages(page.text)) >= _FEWEST
        for number, text in enumerate(found)
    }

    def examples(page: PythonDoc) -> Iterator[Example]:
        for text in passages(page.text):
            if (page.id, text) in places:
                third = min(2, int(3 * places[page.id, text]))
                yield Example(page.id, text, None, str(third))

    chosen = labelled_examples(Task(PLACE, "how far into its document?", examples), pages, sizes)
    return {
        split: ({**record_of(e), "label": places[e.document, e.text]} for e in found)
        for split, found in chosen.items()
    }
