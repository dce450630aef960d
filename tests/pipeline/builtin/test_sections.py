"""The built-in ranking task: titles, their own passages, and others."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rekindle.data.source.python_docs import PythonDoc
from rekindle.pipeline.builtin.sections import (
    NEAR,
    OWN,
    SectionSizes,
    candidates,
    sections_of,
    write_sections,
)
from rekindle.pipeline.builtin.tasks import split_of


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(number, text, kind="function", module=None):
    return PythonDoc(f"m{number}:f", text, kind, module or f"m{number % 30}.sub", "text")


PAGES = [
    page(n, f"Do the thing number {n}.\n\nIt is done in {n} ways, all of which are described here.")
    for n in range(300)
]


def test_a_section_is_a_title_and_the_first_passage_under_it():
    long = "It goes on like this, in a sentence that is long enough to be a passage."
    found = sections_of(
        [
            page(0, f"Close the file.\n\n{long}"),
            page(1, f"A summary of\ntwo lines.\n\n{long} Again."),
            page(2, f"Close the file.\n\n{long} More."),  # a title that is there
            page(3, "Open the file.\n\nToo short."),
            page(4, f"Before.\n\nThe names\n*********\n\n{long} One.\n\nTheir use\n=========\n\n"
                 f"{long} Two.", "topic", "topics"),
        ]
    )  # fmt: skip
    assert [(one.title, one.passage.rpartition(" ")[2]) for one in found] == [
        ("Close the file.", "passage."),
        ("The names", "One."),
        ("Their use", "Two."),
    ]
    assert [one.module for one in found] == ["m0", "topics", "topics"]


def test_a_title_has_its_own_passage_some_near_and_others_far():
    sections = sections_of(PAGES)
    for section in sections[:40]:
        found = candidates(section, sections)
        assert len({one.passage for one, _ in found}) == len(found) == 8
        assert Counter(label for _, label in found) == {OWN: 1, NEAR: 2, 0: 5}
        for one, label in found:
            assert (label == OWN) == (one == section)
            assert (one.module == section.module) == (label != 0)
    places = {[label for _, label in candidates(one, sections)].index(OWN) for one in sections}
    assert places == set(range(8))  # where the own one stands says nothing


def test_the_files_share_no_passage_and_the_text_has_no_labels(tmp_path):
    write_sections(PAGES, SectionSizes(train=12, dev=4, test=20, text=30), tmp_path)
    rows = {
        n: lines(tmp_path / f"tasks/section/{n}.jsonl") for n in ("train", "dev", "test", "text")
    }
    titles = {name: {row["group"] for row in own} for name, own in rows.items()}
    assert {name: len(own) for name, own in titles.items()} == {
        "train": 12, "dev": 4, "test": 20, "text": 30,
    }  # fmt: skip
    passages = [{row["sentence2"] for row in own} for own in rows.values()]
    assert len(set().union(*passages)) == sum(map(len, passages))
    assert all("label" not in row for row in rows["text"])
    for name in ("train", "dev", "test"):
        assert {split_of(row["document"]) for row in rows[name]} == {name}
        assert {row["label"] for row in rows[name]} <= {0, NEAR, OWN}


@pytest.mark.parametrize("again", [True, False])
def test_the_files_are_the_same_whatever_the_order_of_the_documents(tmp_path, again):
    sizes = SectionSizes(train=12, dev=4, test=20, text=30)
    for folder, pages in (("a", PAGES), ("b", PAGES if again else PAGES[::-1])):
        write_sections(pages, sizes, tmp_path / folder)
    for path in (tmp_path / "a").rglob("*.jsonl"):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()
