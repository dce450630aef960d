"""The built-in ranking task: titles, their own passages, and others."""

import json
from collections import Counter
from pathlib import Path

from rekindle.data.source.python_docs import PythonDoc
from rekindle.pipeline.builtin.sections import (
    OTHER_MODULE,
    OWN_PASSAGE,
    SAME_MODULE,
    SectionSizes,
    candidates,
    later_passages,
    sections_of,
    write_sections,
)
from rekindle.pipeline.builtin.tasks import split_of


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(number, text, kind="function", module=None):
    return PythonDoc(f"m{number}:f", text, kind, module or f"m{number % 30}.sub", "text")


WAYS = "It is done in {} ways, " + "each of them as good as the others, " * 3 + "told of {}."
PAGES = [
    page(n, f"Do number {n}.\n\n{WAYS.format(n, 'here')}\n\n{WAYS.format(n, 'there')}")
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
    sections, midst = sections_of(PAGES), later_passages(PAGES)
    module_of = {one.passage: one.module for one in sections} | {p: m for m, p in midst}
    places = set()
    for section in sections:
        found = candidates(section, sections, midst)
        assert len({passage for passage, _ in found}) == len(found) == 8
        assert Counter(label for _, label in found) == {
            OWN_PASSAGE: 1,
            SAME_MODULE: 2,
            OTHER_MODULE: 5,
        }
        for passage, label in found:
            assert (label == OWN_PASSAGE) == (passage == section.passage)
            assert (module_of[passage] == section.module) == (label != OTHER_MODULE)
        places.add([label for _, label in found].index(OWN_PASSAGE))
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
    passages = [{row["document"] for row in own} for own in rows.values()]
    assert len(set().union(*passages)) == sum(map(len, passages))
    assert all("label" not in row for row in rows["text"])
    for name in ("train", "dev", "test"):
        assert {split_of(row["page"]) for row in rows[name]} == {name}
        assert {row["label"] for row in rows[name]} <= {0, SAME_MODULE, OWN_PASSAGE}
