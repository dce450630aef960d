"""Text and labelled tasks cut from Python's documentation, for the demo and the built-in models.
Knows no model.

Every document belongs to exactly one split, by a hash of its id: most to the unlabelled corpus, the
others to train, dev or test. The labels need no annotator: they are known of a text.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from rekindle.data.source.python_docs import PARTS, PythonDoc, python_docs
from rekindle.data.source.sentences import split_sentences
from rekindle.data.storage.atomic import write_lines

Split = Literal["corpus", "train", "dev", "test"]
TASKS_FOLDER = "tasks"
LABELLED: tuple[Split, ...] = ("train", "dev", "test")

# Shares of the documents. The test split is large because a small one is too noisy: 900 examples at
# 60 % accuracy have a standard error of 1.6 points.
_SHARES: dict[Split, float] = {"train": 0.12, "dev": 0.04, "test": 0.22}
_SHORTEST, _LONGEST = 40, 180  # characters of a passage; 180 are about 45 tokens
_PAIRS_PER_DOCUMENT = 4  # and as many that are not adjacent


class LabelledText(NamedTuple):
    """One labelled example; ``pair`` is the second text for tasks on two, ``group`` a class of
    labels if each text has a label of its own.
    """

    document: str
    text: str
    pair: str | None
    label: str | float
    group: str | None = None


@dataclass(frozen=True)
class LabelledTask:
    """A task: how a document becomes examples."""

    name: str
    examples: Callable[[PythonDoc], Iterator[LabelledText]]


@dataclass(frozen=True)
class TaskSizes:
    """How many examples each split of a task has at most."""

    train: int
    dev: int
    test: int


def split_of(document: str) -> Split:
    """Return the split a document id belongs to; a function of the id alone."""
    place = hashed("split", document) / 2**64
    for split, share in _SHARES.items():
        if place < share:
            return split
        place -= share
    return "corpus"


def passages(text: str) -> list[str]:
    """Return consecutive whole sentences of ``text``, joined to passages of 40 to 180 characters.

    Longer sentences are cut; what remains too short is left out.
    """
    spans: list[tuple[int, int]] = []
    for start, end in split_sentences(text):
        if spans and end - spans[-1][0] <= _LONGEST:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((start, end))
    texts = (text[start:end][:_LONGEST].strip() for start, end in spans)
    return [passage for passage in texts if len(passage) >= _SHORTEST]


def _passages(label: str, parts: Collection[str], page: PythonDoc) -> Iterator[LabelledText]:
    """Yield the passages of a document of these ``parts``, each with its ``label``, part
    or kind.
    """
    if page.kind == "topic" and label == "part":  # topics belong to no module, so to no part
        return
    if page.part in parts:
        for passage in passages(page.text):
            yield LabelledText(page.id, passage, None, getattr(page, label))


def _next_examples(page: PythonDoc) -> Iterator[LabelledText]:
    """Yield pairs of sentences of one document: B follows A, or stands elsewhere, also before A."""
    sentences = [page.text[start:stop] for start, stop in split_sentences(page.text)]
    adjacent = list(pairwise(sentences))
    for number in range(min(len(adjacent), _PAIRS_PER_DOCUMENT)):
        yield LabelledText(
            page.id, *adjacent[hashed("next", page.id, number) % len(adjacent)], "next"
        )
        a, b = (sentences[hashed(side, page.id, number) % len(sentences)] for side in "ab")
        if a != b and (a, b) not in adjacent:
            yield LabelledText(page.id, a, b, "other")


TASKS = (
    LabelledTask("part", partial(_passages, "part", PARTS)),
    LabelledTask("kind", partial(_passages, "kind", PARTS)),
    LabelledTask("next", _next_examples),
)


def labelled_examples(
    task: LabelledTask, pages: Sequence[PythonDoc], sizes: TaskSizes
) -> dict[Split, list[LabelledText]]:
    """Return the splits of a task, each with equally many examples per label, shuffled.

    First examples of documents are taken before second ones, for as many documents as possible. A
    text that documents of two splits share is in neither; within a split it occurs once.
    """
    candidates: dict[tuple[str, str | None], list[tuple[int, int, LabelledText]]] = {}
    for page in pages:
        for number, example in enumerate(task.examples(page)):
            key = (number, hashed(task.name, page.id, number), example)
            candidates.setdefault((example.text, example.pair), []).append(key)
    groups: dict[Split, dict[str, list[tuple[int, int, LabelledText]]]] = {s: {} for s in LABELLED}
    for occurrences in candidates.values():
        splits = {split_of(example.document) for _, _, example in occurrences}
        split = splits.pop()
        if not splits and split != "corpus":
            first = min(occurrences)
            group = first[2].group or str(first[2].label)
            groups[split].setdefault(group, []).append(first)
    return {
        split: _balanced(list(groups[split].values()), getattr(sizes, split)) for split in LABELLED
    }


def _balanced(groups: list[list[tuple[int, int, LabelledText]]], size: int) -> list[LabelledText]:
    per_group = min(size // len(groups), *map(len, groups))
    chosen = [key for group in groups for key in sorted(group)[:per_group]]
    return [example for _, _, example in sorted(chosen, key=lambda key: key[1])]


Record = dict[str, object]  # a line of jsonl


def whole_documents(pages: Iterable[PythonDoc]) -> Iterator[Record]:
    """Yield the records of unlabelled text: a document each."""
    return ({"id": page.id, "text": page.text, "domain": page.part} for page in pages)


def unlabelled_passages(pages: Iterable[PythonDoc]) -> Iterator[Record]:
    """Yield the records of unlabelled text: a passage each, as in the tasks part and kind; a text
    that stands in several documents occurs once.
    """
    seen = set()
    for page in pages:
        for number, text in enumerate(passages(page.text)):
            if text not in seen:
                seen.add(text)
                yield {"id": f"{page.id}/{number}", "text": text, "domain": page.part}


def write_corpus(
    pages: list[PythonDoc],
    sizes: TaskSizes,
    out: Path,
    documents: int | None = None,
    tasks: Sequence[LabelledTask] = TASKS,
    unlabelled: Callable[[Iterable[PythonDoc]], Iterator[Record]] = whole_documents,
) -> None:
    """Write ``tasks/<name>/<split>.jsonl`` for each of ``tasks``, then ``corpus.jsonl``.

    ``documents`` limits the unlabelled corpus to that number, chosen by a hash; ``unlabelled``
    makes its records of them. The corpus is written last, and in one step: if it exists, everything
    does.
    """
    for task in tasks:
        for split, examples in labelled_examples(task, pages, sizes).items():
            write_lines(out / TASKS_FOLDER / task.name / f"{split}.jsonl", map(record_of, examples))
    others = [page for page in pages if split_of(page.id) == "corpus"]
    chosen = {p.id for p in sorted(others, key=lambda p: hashed("corpus", p.id))[:documents]}
    write_lines(out / "corpus.jsonl", unlabelled(page for page in others if page.id in chosen))


def record_of(example: LabelledText) -> Record:
    """Return the line of a labelled file, as ``pipeline finetune`` reads it."""
    if example.pair is None:
        texts = {"text": example.text}
    else:
        texts = {"sentence1": example.text, "sentence2": example.pair}
    return {"document": example.document, **texts, "label": example.label}


def hashed(*parts: str | int) -> int:
    """Return 64 bits that depend only on the parts (Python's own hash differs from run to run)."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


# --- three tasks more -----------------------------------------------------------------------------

HALVES = {"part-1": PARTS[: len(PARTS) // 2], "part-2": PARTS[len(PARTS) // 2 :]}
_FEWEST = 3  # passages of a document that has a beginning, a middle and an end


def write_documents(
    out: Path, sizes: TaskSizes, documents: int | None, domains: Mapping[str, str]
) -> list[PythonDoc]:
    """Write ``domain-<name>.jsonl``, ``tasks/<task>/<split>.jsonl`` and ``corpus.jsonl``, and
    return the documents that they are made of.
    """
    # Shuffled: the first documents of the corpus are then a sample of all of it.
    pages = sorted(python_docs(), key=lambda page: hashlib.sha256(page.id.encode()).digest())
    for name, part in domains.items():
        domain_pages = [
            page for page in pages if page.part == part and split_of(page.id) == "corpus"
        ]
        write_lines(
            out / f"domain-{name}.jsonl", ({"id": p.id, "text": p.text} for p in domain_pages)
        )
    halves = [LabelledTask(name, partial(_passages, "part", half)) for name, half in HALVES.items()]
    write_corpus(pages, sizes, out, documents, (*TASKS, *halves, PLACE))
    return pages


def _place_examples(page: PythonDoc) -> Iterator[LabelledText]:
    """Yield passages with their places in the document: 0.0 is the first one, 1.0 the last.

    Each third of the scale has equally many, although most documents are short.
    """
    texts = passages(page.text)
    if len(texts) >= _FEWEST:
        places = {text: number / (len(texts) - 1) for number, text in enumerate(texts)}
        for text in texts:
            third = min(2, int(3 * places[text]))
            yield LabelledText(page.id, text, None, places[text], group=str(third))


PLACE = LabelledTask("place", _place_examples)
