"""The labelled tasks: no document twice, equal labels, true labels, the same on every run."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.source.python_docs import PythonDoc, part_of, python_docs
from rekindle.data.source.sentences import split_sentences
from rekindle.pipeline.builtin.tasks import (
    LABELLED,
    TASKS,
    LabelledTask,
    TaskSizes,
    labelled_examples,
    passages,
    split_of,
    unlabelled_passages,
    write_corpus,
)
from rekindle.train.finetune.task_data import read_task

SIZES = TaskSizes(train=400, dev=100, test=700)


@pytest.fixture(scope="module")
def pages() -> list[PythonDoc]:
    return list(python_docs())


@pytest.fixture(scope="module")
def written(pages: list[PythonDoc], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_corpus(pages, SIZES, out)
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def splits(out: Path, task: LabelledTask) -> dict[str, list[dict[str, str]]]:
    return {split: rows(out / "tasks" / task.name / f"{split}.jsonl") for split in LABELLED}


def test_no_document_is_in_two_splits_or_in_the_corpus(written: Path) -> None:
    home = {row["id"]: "corpus" for row in rows(written / "corpus.jsonl")}
    for task in TASKS:
        for split, examples in splits(written, task).items():
            for example in examples:
                assert home.setdefault(example["document"], split) == split


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_no_text_is_in_two_splits_or_twice_in_one(
    task: LabelledTask, pages: list[PythonDoc], written: Path
) -> None:
    texts = [
        (e.get("text") or e["sentence1"], e.get("sentence2"))
        for examples in splits(written, task).values()
        for e in examples
    ]
    assert len(set(texts)) == len(texts)
    unlabelled = (page for page in pages if split_of(page.id) == "corpus")
    corpus = {(e.text, e.pair) for page in unlabelled for e in task.examples(page)}
    assert corpus.isdisjoint(texts)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_labels_are_balanced_and_all_there(task: LabelledTask, written: Path) -> None:
    found = splits(written, task)
    names = {example["label"] for example in found["train"]}
    for split, examples in found.items():
        counts = Counter(example["label"] for example in examples)
        assert set(counts) == names
        assert len(set(counts.values())) == 1
        assert 0.8 * getattr(SIZES, split) < len(examples) <= getattr(SIZES, split)


def test_labels_are_true(pages: list[PythonDoc], written: Path) -> None:
    by_id = {page.id: page for page in pages}
    for examples in splits(written, TASKS[0]).values():
        assert all(e["label"] == part_of(e["document"].partition(":")[0]) for e in examples)
    for examples in splits(written, TASKS[1]).values():
        assert all(e["label"] == by_id[e["document"]].kind for e in examples)
    for examples in [*splits(written, TASKS[0]).values(), *splits(written, TASKS[1]).values()]:
        assert all(e["text"] in by_id[e["document"]].text for e in examples)


def test_next_pairs_are_truly_adjacent_and_the_others_truly_not(
    pages: list[PythonDoc], written: Path
) -> None:
    text_of = {page.id: page.text for page in pages}
    for examples in splits(written, TASKS[2]).values():
        for example in examples:
            text = text_of[example["document"]]
            sentences = [text[start:end] for start, end in split_sentences(text)]
            pair = (example["sentence1"], example["sentence2"])
            assert set(pair) <= set(sentences)
            assert (pair in pairwise(sentences)) == (example["label"] == "next")


def test_the_same_files_again_whatever_the_order_of_the_examples(
    pages: list[PythonDoc], written: Path, tmp_path: Path
) -> None:
    write_corpus(pages, SIZES, tmp_path)
    files = sorted(path.relative_to(written) for path in written.rglob("*.jsonl"))
    assert len(files) == 1 + len(TASKS) * len(LABELLED)
    for file in files:
        assert (tmp_path / file).read_bytes() == (written / file).read_bytes()
    few, sizes = pages[::4], TaskSizes(train=80, dev=20, test=80)
    shuffled = random.Random(0).sample(few, len(few))
    for task in TASKS:
        assert labelled_examples(task, shuffled, sizes) == labelled_examples(task, few, sizes)


def test_examples_do_not_come_in_the_order_of_labels_or_documents(written: Path) -> None:
    for task in TASKS:
        for examples in splits(written, task).values():
            labels = [example["label"] for example in examples]
            changes = sum(a != b for a, b in pairwise(labels))
            expected = (1 - 1 / len(set(labels))) * len(labels)  # of an order without meaning
            assert changes > 0.6 * expected


def test_a_limited_corpus_is_a_part_of_the_whole_one(
    pages: list[PythonDoc], written: Path, tmp_path: Path
) -> None:
    write_corpus(pages, SIZES, tmp_path, documents=50)
    few = [row["id"] for row in rows(tmp_path / "corpus.jsonl")]
    everything = [row["id"] for row in rows(written / "corpus.jsonl")]
    assert len(few) == 50
    assert few == [name for name in everything if name in set(few)]
    for task in TASKS:
        assert splits(tmp_path, task) == splits(written, task)


def test_unlabelled_passages_are_texts_as_the_tasks_have_them(
    pages: list[PythonDoc], tmp_path: Path
) -> None:
    """Each once, all that the corpus's documents have of them, without labels."""
    write_corpus(pages, SIZES, tmp_path, tasks=(), unlabelled=unlabelled_passages)
    found = rows(tmp_path / "corpus.jsonl")
    others = [page for page in pages if split_of(page.id) == "corpus"]
    texts = [row["text"] for row in found]
    assert len({*texts}) == len(texts) == len({row["id"] for row in found})
    assert {*texts} == {example.text for page in others for example in TASKS[1].examples(page)}
    assert {*found[0]} == {"id", "text", "domain"}


def test_finetune_can_read_the_files(written: Path) -> None:
    for task in TASKS:
        folder = written / "tasks" / task.name
        train, dev, test = read_task(*(str(folder / f"{split}.jsonl") for split in LABELLED))
        assert (train.pairs is not None) == (task.name == "next")
        assert train.label_names == dev.label_names == test.label_names


def test_the_shares_of_the_splits() -> None:
    counts = Counter(split_of(f"document {number}") for number in range(20_000))
    shares = {split: count / 20_000 for split, count in counts.items()}
    assert shares == pytest.approx(
        {"corpus": 0.62, "train": 0.12, "dev": 0.04, "test": 0.22}, abs=0.02
    )


@given(st.text(alphabet="ab .\n?A-", max_size=600))
def test_passages_are_pieces_of_the_text_in_order(text: str) -> None:
    place = 0
    for passage in passages(text):
        assert 40 <= len(passage) <= 180
        place = text.index(passage, place) + len(passage)
