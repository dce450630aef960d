"""why.py compares what is to be compared, on the right rows."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def why() -> ModuleType:
    sys.path.insert(0, str(HERE))
    try:
        return import_module("why")
    finally:
        sys.path.remove(str(HERE))


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def cell(why: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cell's folder with a row in each split, and 3 of the 5 other rows as unlabelled text."""
    monkeypatch.chdir(tmp_path)
    rows = [{"sentence1": f"film {n} ", "label": n % 2} for n in range(8)]
    write(Path("shared/data/glue/sst2_train.jsonl"), rows)
    write(
        Path("data/few_labels/sst2_unlabelled.jsonl"),
        [{"text": f"film {n} "} for n in (1, 3, 5, 7)],
    )
    home = tmp_path / "runs/few-sst2-2/draws/2"
    for n, split in enumerate(("train", "dev", "test")):
        write(home / f"tasks/sst2/{split}.jsonl", [{"text": f"film {n}", "label": n % 2}])
    (home / "experts/sst2").mkdir(parents=True)
    (tmp_path / "runs/few-sst2-2/draws/0/search").mkdir(parents=True)
    return why.Cell(tmp_path / "runs/few-sst2-2", tmp_path / "why", bf16=False)


def test_a_cell_is_named_by_its_folder(cell) -> None:
    assert cell.about == {"cells": "few", "task": "sst2", "draw": 2}


def test_labels_of_the_text_are_of_rows_in_no_split(why: ModuleType, cell) -> None:
    rows = why.read(cell.unlabelled())
    assert [(row["text"], row["label"]) for row in rows] == [(f"film {n} ", 1) for n in (3, 5, 7)]


def test_three_experts_answer_by_the_mean_of_their_probabilities(why: ModuleType) -> None:
    sure, unsure = {"a": 0.9, "b": 0.1}, {"a": 0.4, "b": 0.6}
    members = [[{"probabilities": p}, {"probabilities": unsure}] for p in (sure, unsure, unsure)]
    assert why.committee_labels(members) == ["a", "b"]


def test_a_student_is_compared_where_its_teacher_is_right_and_where_it_is_wrong(
    why: ModuleType,
) -> None:
    truth = ["a", "a", "b", "b", "b"]
    taught = ["a", "b", "b", "b", "a"]
    answered = ["a", "a", "b", "a", "a"]
    assert why.compared(answered, truth, taught) == {
        "test": 3 / 5,
        "teacher": 3 / 5,
        "agreement": 3 / 5,
        "where_right": 2 / 3,
        "where_wrong": 1 / 2,
    }
    assert why.compared(["a"], ["a"], ["a"])["where_wrong"] is None


def test_a_share_of_the_texts_is_of_all_classes(why: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "by_class.jsonl"
    write(source, [{"text": f"{n}", "label": n // 50} for n in range(100)])
    rows = why.read(why.shuffled([str(source)], tmp_path / "shuffled.jsonl"))
    assert sorted(int(row["text"]) for row in rows) == [*range(100)]
    assert 15 < sum(row["label"] for row in rows[:50]) < 35
