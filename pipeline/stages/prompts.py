"""Turn cached predictions into text (prompted continued pre-training, NeurIPS 2023).

Each sequence that an expert judged gives a line: the text put into the template, with the word of
the most probable label. Reads the cache shard by shard; the expert itself is not needed.
"""

import filecmp
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rekindle.data.batch import SequenceTargetBatch, read_targets
from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.storage.atomic import remove_leftovers, write_lines
from rekindle.data.storage.shards import ROWS_PER_BATCH
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.pipeline.config import check_template, fill_template


@dataclass
class PromptCounts:
    """Counts over every sequence of the corpus."""

    written: int = 0
    labels: Counter[str] = field(default_factory=Counter)  # of the written lines
    not_judged: int = 0  # in domains the expert is not for
    below_confidence: int = 0

    def as_text(self) -> str:
        """Return the counts as a line of text."""
        shares = ", ".join(f"{name} {count:,}" for name, count in sorted(self.labels.items()))
        return (
            f"{counted(self.written, 'line')} ({shares}); "
            f"{counted(self.below_confidence, 'sequence')} below the "
            f"confidence, {self.not_judged:,} that the expert did not judge"
        )


def write_prompts(
    cache: Cache,
    teacher: str,
    path: str | os.PathLike[str],
    *,
    template: str = "{text} This is about {label}.",
    words: Mapping[str, str] | None = None,
    confidence: float = 0.0,
    tokenizer: Tokenizer | None = None,
) -> PromptCounts:
    """Write the corpus ``path`` (jsonl: id, text, domain) from the cached logits of a classifier.

    ``words``: a word for each label (None: the label names). ``confidence``: the lowest softmax
    probability of a label that is written. ``tokenizer``: its vocabulary must contain the words
    (None: the cache's). ``id`` is the document's, so what is held out of the corpus stays together.
    The file appears whole or not at all; an existing file with the same content is left alone.

    Raise InputError for a template without {text} or {label}; words that do not fit the labels; a
    teacher that is unfinished or no classifier of single texts; no line at all; and a file with
    other content. Raise ValueError for a confidence outside 0..1.
    """
    if not 0 <= confidence <= 1:
        raise ValueError(f"a confidence is a probability between 0 and 1, not {confidence}")
    _check(cache, teacher, template)
    names = cache.teacher(teacher).info.label_names
    chosen = words_of(names, words, tokenizer or cache.corpus.tokenizer)
    target, counts = Path(path), PromptCounts()
    remove_leftovers(target.parent, target.name)

    def lines() -> Iterator[dict[str, str | None]]:
        for row, judged, label, sure in _judged(cache, cache.teacher(teacher)):
            if not judged:
                counts.not_judged += 1
            elif sure < confidence:
                counts.below_confidence += 1
            else:
                counts.written += 1
                counts.labels[names[label]] += 1
                text = fill_template(template, row["text"], chosen[names[label]])
                yield {"id": row["document"], "text": text, "domain": row["domain"]}

    write_lines(target, lines(), publish=lambda written, _: _publish(written, target, counts))
    return counts


def _judged(cache: Cache, reader: TeacherReader) -> Iterator[tuple[dict, bool, int, float]]:
    """Yield each row of the corpus, whether it was judged, its most probable label, and the label's
    probability.
    """
    for shard, commit in enumerate(cache.corpus.commits):
        for first in range(0, commit.rows, ROWS_PER_BATCH):
            batch = cache.corpus.rows(shard, first, ROWS_PER_BATCH)
            where = [(shard, first + row) for row in range(batch.num_rows)]
            target = read_targets(reader, where, None)
            assert isinstance(target, SequenceTargetBatch)
            rows = batch.select(["document", "text", "domain"]).to_pylist()
            yield from zip(rows, target.present, *most_probable(target.logits), strict=True)


def most_probable(
    logits: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the most probable class of each row [R,C], and its softmax probability."""
    exact = logits.astype(np.float64)
    best = exact.argmax(axis=1)
    largest = exact.max(axis=1, keepdims=True)
    return best, 1 / np.exp(exact - largest).sum(axis=1)


def words_of(
    names: Sequence[str], words: Mapping[str, str] | None, tokenizer: Tokenizer
) -> dict[str, str]:
    """Return the word of each label. Raise InputError for a word that is missing, unknown, or not
    in the vocabulary.
    """
    chosen = {name: name for name in names} if words is None else dict(words)
    labels = ", ".join(names)
    if unknown := [name for name in chosen if name not in names]:
        raise InputError(f"words: {unknown[0]!r} is not a label of the teacher (it has: {labels})")
    if missing := [name for name in names if name not in chosen]:
        raise InputError(f"words: none is given for the label {missing[0]!r}; give each label one")
    unknown_id = tokenizer.hf.unk_token_id
    for name, word in chosen.items():
        ids = tokenizer.hf(word, add_special_tokens=False)["input_ids"]
        if not ids or (unknown_id is not None and unknown_id in ids):
            raise InputError(
                f"words: the tokenizer has no tokens for {word!r}, the word of the label "
                f"{name!r}, so a model could not learn it. Give another word"
            )
    return chosen


def _check(cache: Cache, teacher: str, template: str) -> None:
    try:
        check_template(template)
    except ValueError as error:
        raise InputError(str(error)) from None
    reader = cache.teacher(teacher)
    info, where = reader.info, f"teacher {teacher!r} of {cache.store.location}"
    if info.problem != "single_label_classification":
        what = info.problem or info.task
        raise InputError(f"{where} is of {what}: prompts need a classifier with one label a text")
    if reader.info.view_class.paired:
        raise InputError(
            f"{where} judged pairs of texts; prompts need one that judges the sequence"
        )
    if reader.coverage < 1:
        raise InputError(
            f"{where} has judged {reader.coverage:.1%} of the corpus; finish it with `pipeline "
            "cache-teachers`"
        )


def _publish(written: Path, target: Path, counts: PromptCounts) -> None:
    if not counts.written:
        raise InputError(f"{target}: no line to write: {counts.as_text()}; lower the confidence")
    if not target.exists():
        os.replace(written, target)
    elif not filecmp.cmp(written, target, shallow=False):
        raise InputError(
            f"{target} exists with other content. A corpus that may be in use is not overwritten: "
            "delete it, or give another name"
        )
