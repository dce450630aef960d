"""Write the predictions of an expert, or of a student's head, for every row of a file.

Rows are read, scored and written one block at a time, so memory does not grow with the file.
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.source.rows import Row, read_rows, texts_of
from rekindle.data.source.sources import recorded_origin
from rekindle.data.storage.atomic import new_file
from rekindle.data.text_files import STDIN
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.encoder import open_text_judge
from rekindle.train.answers.evaluate import check_pairs, less_memory
from rekindle.train.answers.judge import (
    ROWS_AT_A_TIME,
    Judge,
    find_expert_record,
    judge_texts,
    tags_words,
)
from rekindle.train.answers.labelled import with_problem
from rekindle.train.answers.recorded import fill_from_record
from rekindle.train.answers.target import check_target
from rekindle.train.answers.watch import NOBODY, Watch
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.encoded import Cuts, log_cut_texts
from rekindle.train.finetune.label_lists import TAGS
from rekindle.train.finetune.labels import SHOWN
from rekindle.train.finetune.predictions import (
    GIVEN,
    Answer,
    Answers,
    add_answers,
    labels_of,
    write_rows,
)
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.finetune.task_files import row_words, text_fields
from rekindle.train.running_out import report_shortage

log = logging.getLogger("rekindle")


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What was written, and how often each label was predicted."""

    model: str
    head: str | None  # None for an expert
    text: str
    out: str
    problem: str
    label_names: tuple[str, ...]
    rows: int
    said: dict[str, int]  # by label (or tag), the most frequent first; empty for scores
    cut: float  # share of the texts that were cut
    # the file's own columns that collided with an answer's column
    renamed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return a summary in lines."""
        each = [f"{name} {count:,}" for name, count in self.said.items()]
        counts_text = f": {', '.join(each[:SHOWN])}{' …' * (len(each) > SHOWN)}" if each else ""
        renamed_lines = [
            f"column {name} of {self.text} is kept as {to}" for name, to in self.renamed.items()
        ]
        # Piped input has no such name; it is jsonl.
        each_line = " (each line is one text)" if recorded_origin(self.text).format == "txt" else ""
        rows_text = f"{counted(self.rows, 'row')}{each_line}{counts_text}"
        return "\n".join([rows_text, *renamed_lines, f"predictions: {self.out}"])


def predict_file(
    model: str,
    text: str,
    out: str,
    *,
    head: str | None = None,
    config: AskConfig | None = None,
    force: bool = False,
    watch: Watch = NOBODY,
) -> Predicted:
    """Write one JSON line for every row of ``text`` into ``out``, completely or not at all.

    Both may be ``-``: jsonl from stdin, lines to stdout. A file is first read once as a check, so
    that a bad row is found before any scoring.

    Raises InputError for wrong files, models or heads, and for an ``out`` that exists, unless it
    holds predictions and ``force`` is given.
    """
    started = time.perf_counter()
    check_target(out, text, model, force)
    rows = read_rows(text)
    if (first := next(rows, None)) is None:
        raise InputError(f"{text} has no rows; give at least one text")
    record = find_expert_record(model)
    settings = fill_from_record(config or AskConfig(), record, first.keys())
    # Report wrong columns before a model is loaded.
    problem = TAGS if tags_words(model, head) else ""
    reader = _Reader.of(text, first, with_problem(settings, problem))
    check_pairs(record, len(reader.columns) > 1, model, text)
    judge = open_text_judge(model, head, settings, len(reader.columns) > 1)
    total = None if _is_piped(text) else _check(reader, judge.answers)
    watch.expect(total)
    work = _Work(judge, settings, reader)
    memory_guard = report_shortage(Path(out), lambda: "Nothing is written", less_memory(settings))
    with memory_guard, _opened(out) as (file, ascii_only):
        for block in blocks(chain([first], rows)):
            write_rows(work.add_answers(block), file, ascii_only)
            watch.advance(len(block))
    return Predicted(
        model=model,
        head=judge.head,
        text=text,
        out=out,
        problem=judge.answers.problem,
        label_names=judge.answers.names,
        rows=work.rows,
        said=dict(work.said.most_common()),
        cut=log_cut_texts({text: work.cuts})[text],
        renamed={name: GIVEN + name for name in judge.answers.columns if name in first},
        seconds=time.perf_counter() - started,
    )


def blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield the rows in blocks of ROWS_AT_A_TIME."""
    each = iter(rows)
    while block := [*islice(each, ROWS_AT_A_TIME)]:
        yield block


def _is_piped(path: str) -> bool:
    return path == STDIN or not Path(path).is_file()


@dataclass(frozen=True)
class _Reader:
    """Where a row's text is: in one column, in two for a pair, or in a column of tokens."""

    path: str
    columns: tuple[str, ...]
    tokens: bool

    @classmethod
    def of(cls, path: str, first: Row, settings: TaskSettings) -> Self:
        """Choose the columns from the first row; raise InputError if it is not clear which."""
        columns = text_fields(path, [*first], settings, settings.label_field)
        tokens = settings.problem == TAGS
        if tokens and len(columns) > 1:
            raise InputError(f"{path}: tokens cannot be pairs of texts; name their one column")
        return cls(path, columns, tokens)

    def data(self, block: Sequence[Row], first: int) -> TaskData:
        """Return the texts of rows, numbered from ``first``; raise InputError for a row without
        one.
        """
        no_labels = np.zeros(0, np.float32)
        if not self.tokens:
            return TaskData(*texts_of(block, first, self.columns, self.path), no_labels, ())
        (name,) = self.columns
        numbered = enumerate(block, start=first)
        words = [row_words(self.path, name, number, row.get(name)) for number, row in numbered]
        return TaskData([*map(" ".join, words)], None, no_labels, (), words=words)

    def with_tokens(self, row: Row, words: list[str], answer: Answer) -> Answer:
        """Add the tokens to an answer if the row has them as one text."""
        if isinstance(row.get(self.columns[0]), str):
            return {"tokens": words} | answer
        return answer


def _check(reader: _Reader, answers: Answers) -> int:
    """Check and count all rows."""
    count, no_answer = 0, dict.fromkeys(answers.columns)
    for block in blocks(read_rows(reader.path)):
        reader.data(block, count + 1)
        for _ in add_answers(block, [no_answer] * len(block), reader.path, count + 1):
            pass
        count += len(block)
    return count


@contextmanager
def _opened(out: str) -> Iterator[tuple[BinaryIO, bool]]:
    """Yield the output file, and whether non-ASCII characters are escaped, as for a terminal."""
    if out != STDIN:
        with new_file(Path(out)) as file:
            yield file, False
        return
    raw = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # JSON does its own escaping
    try:
        yield raw.buffer, True
        raw.flush()
    except BrokenPipeError:  # the reader has enough, like head
        os.dup2(os.open(os.devnull, os.O_WRONLY), raw.fileno())


class _Work:
    """The rows being scored, and the predictions so far."""

    def __init__(self, judge: Judge, settings: AskConfig, reader: _Reader):
        self.judge, self.settings, self.reader = judge, settings, reader
        self.answers = replace(judge.answers, threshold=settings.threshold)
        self.rows, self.cuts, self.said = 0, Cuts(), Counter[str]()

    def add_answers(self, block: Sequence[Row]) -> Iterator[Row]:
        """Yield each row with its answer."""
        first = self.rows + 1
        data = self.reader.data(block, first)
        logits, cuts = judge_texts(self.judge, data, self.settings)
        answers = [self.answers.of(one) for one in data.per_row(logits)]
        self.rows += len(block)
        self.cuts = self.cuts.add(cuts)
        for answer in answers:
            self.said.update(labels_of(answer))
        if data.words is not None:
            triples = zip(block, data.words, answers, strict=True)
            answers = [self.reader.with_tokens(*one) for one in triples]
        return add_answers(block, answers, self.reader.path, first)
