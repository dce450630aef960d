"""A cycle's tasks: every labelled row in one split, written so that it reads as the same one."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.cycle import inputs
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import (
    _read,
    read_draws,
    read_tasks,
    write_tasks,
)
from rekindle.pipeline.cycle.record import remove_outdated_splits
from rekindle.pipeline.cycle.sections import CycleTask
from rekindle.train.finetune.config import ComparisonFinetuneConfig, FinetuneConfig, TaskSettings
from rekindle.train.finetune.task_data import read_task


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(count, first=0, labels=("no", "yes")):
    return [
        {"text": f"text {n}", "label": labels[n % len(labels)]} for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


def task_of(folder, train, test=None, **values):
    files = {
        "train": lines(folder / "train.jsonl", train),
        "test": lines(folder / "test.jsonl", test or numbered(6, first=1000)),
    }
    return parse_settings(CycleTask, {"name": "t"} | files | values)


@given(
    count=st.integers(20, 60),
    dev=st.integers(1, 80),
    limit=st.one_of(st.none(), st.integers(40, 80)),
    seed=st.integers(0, 9),
)
def test_every_row_trains_or_selects_and_none_does_both(folder, count, dev, limit, seed):
    task = task_of(folder, numbered(count), dev_examples=dev, train_examples=limit)
    found = _read(task, seed)
    train, selects = set(found.rows["train"].tolist()), set(found.rows["dev"].tolist())
    assert not train & selects
    assert len(selects) == min(dev, count // 5)
    left = count - len(selects)
    assert len(train) == (left if limit is None else min(limit, left))
    assert train | selects <= set(range(count))
    assert found.rows["test"].tolist() == list(range(6))
    again = _read(task, seed)
    assert all(np.array_equal(found.rows[name], again.rows[name]) for name in found.rows)


def test_another_seed_takes_other_rows(folder):
    task = task_of(folder, numbered(60))
    assert not np.array_equal(_read(task, 0).rows["dev"], _read(task, 1).rows["dev"])


def test_more_labels_keep_those_that_were_chosen(folder):
    """So that a learning curve over train_examples is one of nested sets."""
    rows = [
        set(_read(task_of(folder, numbered(60), train_examples=n), 0).rows["train"].tolist())
        for n in (20, 30)
    ]
    assert rows[0] < rows[1]


def test_a_dev_file_is_taken_as_it_is(folder):
    dev = lines(folder / "dev.jsonl", numbered(5, first=500))
    found = _read(task_of(folder, numbered(20), dev=dev), 0)
    assert found.rows["train"].tolist() == list(range(20))
    assert found.splits["dev"].texts == [f"text {n}" for n in range(500, 505)]


LABELS = {
    "words": ["spam", "ham", "10"],
    "numbers": [0, 1, 2],
    "wide numbers": [3, 10, 200],
    "numbers below 0": [-1, 1, 0],
    "words of digits": ["10", "9", "200"],
    "words with zeros": ["007", "08", "1"],
    "words of signs": ["--1", "-", "+1"],
    "booleans": [True, False, True],
    "scores": [0.25, 3.8, 5.0],
    "lists": [["b", "a"], [], ["b"]],
    "lists of words of digits": [["10", "9"], ["-"], ["007"]],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("pairs", [False, True])
def test_what_is_written_reads_as_the_same_examples(tmp_path, labels, pairs):
    texts = ['quote " and \\', "naïve\u2028 line", "tab\tand 中文"]
    train = [{"text": f"{texts[n % 3]} {n}", "label": labels[n % 3]} for n in range(30)]
    if pairs:
        train = [
            {"sentence1": r["text"], "sentence2": r["text"][::-1], "label": r["label"]}
            for r in train
        ]
    doubtful = any(one in labels for one in (-1, "spam", "-"))
    problem = "multi_label" if ["-"] in labels else "classification" if doubtful else None
    settings = TaskSettings(problem=problem, threshold=0.3)
    found = _read(task_of(tmp_path, train, test=train[:3], dev_examples=6), 0, settings)
    write_tasks([found], tmp_path)
    written = tmp_path / "tasks" / "t"
    names = ("train", "dev", "test")
    files = (str(written / f"{n}.jsonl") for n in names)
    own = found.own_settings(FinetuneConfig(text_field=["of the original files"]))
    for name, data in zip(names, read_task(*files, settings=own), strict=True):
        original, rows = found.splits[name], found.rows[name]
        assert data.texts == [original.texts[r] for r in rows]
        assert data.pairs == ([original.pairs[r] for r in rows] if pairs else None)
        assert data.labels.tolist() == original.labels[rows].tolist()
        assert data.label_names == original.label_names
        assert data.problem == original.problem
        assert data.threshold == original.threshold


def test_files_that_are_there_are_left(tmp_path):
    found = _read(task_of(tmp_path, numbered(20)), 0)
    write_tasks([found], tmp_path)
    path = tmp_path / "tasks" / "t" / "train.jsonl"
    before = path.stat().st_mtime_ns
    write_tasks([found], tmp_path)
    assert path.stat().st_mtime_ns == before


def test_files_of_other_rows_are_written_anew_unless_something_was_made_of_them(tmp_path, caplog):
    """As a version leaves them that took out other rows of test."""
    caplog.set_level("INFO")
    task = task_of(tmp_path, numbered(20))
    older, now = _read(task, 1), _read(task, 0)
    write_tasks([now], tmp_path / "new")
    write_tasks([older], tmp_path)
    remove_outdated_splits([now], tmp_path)
    write_tasks([now], tmp_path)
    files = [f"tasks/t/{name}.jsonl" for name in ("train", "dev", "test")]
    for file in files:
        assert (tmp_path / file).read_bytes() == (tmp_path / "new" / file).read_bytes()
    told = "task t: {}.jsonl is written again"
    assert [told.format(n) in caplog.text for n in ("train", "dev", "test")] == [True, True, False]
    for place in ("experts/t", "experts/.t.seeds", "search/mlm/t", "fine-tuned/mlm/.t.seeds"):
        made = tmp_path / place
        made.mkdir(parents=True)
        with pytest.raises(CheckpointError, match=rf"train\.jsonl has other rows .*{place} was"):
            remove_outdated_splits([older], tmp_path)
        made.rmdir()
    remove_outdated_splits([now], tmp_path)  # these very rows
    assert (tmp_path / files[0]).exists()
    (tmp_path / files[0]).write_text("{")
    with pytest.raises(CheckpointError, match=r"train\.jsonl is damaged .*remove it"):
        remove_outdated_splits([now], tmp_path)


def test_test_examples_that_train_has_are_counted(tmp_path):
    train = numbered(20)
    facts = _read(task_of(tmp_path, train, test=[*train, *numbered(4, first=900)]), 0).facts
    assert facts["test_in_train"] == facts["train"] == 16
    assert facts["test"] == 24


RARE = [{"text": "x", "label": ["b"] if n == 29 else ["a"]} for n in range(30)]


@pytest.mark.parametrize(
    ("train", "values", "words"),
    [
        (numbered(4), {}, "too few to take any for dev"),
        (numbered(30), {"train_examples": 1}, "none of the 1 examples"),
        (numbered(30), {"pairs": "adjacent"}, "has no sentence2"),
        (numbered(30), {"metric": "pearson"}, "does not fit"),
        ([{"text": "x", "label": 0}] * 20, {}, "at least two classes"),
        (RARE, {"train_examples": 1}, "the label 'b'"),
        ([{"tokens": ["a", "b"], "tags": ["x", "y"]}] * 20, {}, "a cycle needs texts. Make"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, train, values, words):
    with pytest.raises(InputError, match=words):
        _read(task_of(tmp_path, train, test=train, **values), 0)


def test_a_pair_task_is_shown_pairs(tmp_path):
    pairs = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2} for n in range(20)]
    assert _read(task_of(tmp_path, pairs, test=pairs[:2]), 0).pairs == "adjacent"
    other = _read(task_of(tmp_path, pairs, test=pairs[:2], pairs="random"), 0)
    assert other.pairs == "random"


@pytest.mark.parametrize("dev", [False, True])
def test_rows_that_are_tested_are_counted_and_taken_out(tmp_path, dev):
    """Whatever their case and punctuation; the others stay in the splits that they were in."""
    rows, tests = numbered(40), [{"text": f"TEXT, {n}!", "label": "no"} for n in (3, 7, 500)]
    values = {"dev": lines(tmp_path / "dev.jsonl", numbered(12))} if dev else {"dev_examples": 6}
    task = task_of(tmp_path, rows, test=tests, **values)
    kept, removed = _read(task, 0), _read(task, 0, remove=True)
    assert kept.held == removed.held == {"train": 2} | ({"dev": 2} if dev else {})
    for name in ("train", "dev"):
        left = [removed.splits[name].texts[row] for row in removed.rows[name]]
        assert not {"text 3", "text 7"} & {*left}
    assert sum(map(len, kept.rows.values())) - sum(map(len, removed.rows.values())) == 2 + 2 * dev
    assert removed.facts["test_in_train"] == 0
    other = _read(task_of(tmp_path, rows, **values), 0, remove=True)
    plain = _read(task_of(tmp_path, rows, **values), 0)
    assert all(np.array_equal(other.rows[name], plain.rows[name]) for name in ("train", "dev"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dev", r"all 6 rows of dev .*are rows of test.*another dev, leave it out, or give"),
        ("train", r"all 30 rows of train .*another train, or give test_texts: keep"),
    ],
)
def test_a_file_that_test_takes_whole_is_refused(tmp_path, name, words):
    rows = numbered(30)
    dev = lines(tmp_path / "dev.jsonl", numbered(6) if name == "dev" else numbered(6, first=50))
    task = task_of(tmp_path, rows, test=rows[:6] if name == "dev" else rows, dev=dev)
    assert len(_read(task, 0).rows[name])
    with pytest.raises(InputError, match=words):
        _read(task, 0, remove=True)


def test_signs_alone_are_not_the_same_text(tmp_path):
    rows = [row | {"text": "?" * (n + 1)} for n, row in enumerate(numbered(20))]
    assert _read(task_of(tmp_path, rows, test=rows[:2]), 0).held == {"train": 2}


def test_every_draw_is_read_before_any_runs(tmp_path, caplog):
    """The only rare row is taken for dev in one of the draws."""
    caplog.set_level("INFO")
    rows = [*numbered(30), {"text": "rare", "label": "rare"}]
    values = {"corpus": {"source": ["t"], "tokenizer": "m"}, "student": {"model": "m"}}
    values["tasks"] = [task_of(tmp_path, rows, dev_examples=3, train_per_class=5)]
    values["seed"] = 12  # the first whose draw 2 alone takes it

    def draws_of(number):
        return read_draws(parse_settings(CycleConfig, values | {"label_draws": number}))

    draws_of(2)
    words = "draw 2 of the labels: task 't': none of the .*'rare'; lower dev_examples, or give a"
    with pytest.raises(InputError, match=words):
        draws_of(3)
    assert "train_per_class is" not in caplog.text  # each draw says so when it runs


def test_a_pair_is_tested_only_as_a_pair(tmp_path):
    pairs = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2} for n in range(20)]
    tests = [pairs[4], pairs[5] | {"sentence2": "another"}]
    assert _read(task_of(tmp_path, pairs, test=tests), 0).held == {"train": 1}


def test_a_pair_the_other_way_round_is_the_same_row(tmp_path):
    """MRPC has one such row of its test in its train set, with its label, and STS-B six."""
    pairs = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n % 2} for n in range(20)]
    turned = {"sentence1": "B 4.", "sentence2": "A 4.", "label": 0}
    found = _read(task_of(tmp_path, pairs, test=[turned, turned | {"label": 1}]), 0, remove=True)
    assert found.held == {"train": 1}
    assert 4 not in {*found.rows["train"], *found.rows["dev"]}


def test_so_many_of_each_class_are_trained_on_as_far_as_there_are(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = numbered(30) + [{"text": f"rare {n}", "label": "rare"} for n in range(4)]
    task = task_of(tmp_path, rows, dev_examples=2, train_per_class=5)
    drawn = []
    for seed in (0, 1):
        found = _read(task, seed)
        labels = [rows[row]["label"] for row in found.rows["train"]]
        assert labels.count("no") == labels.count("yes") == 5
        selects = [rows[row]["label"] for row in found.rows["dev"]]
        assert labels.count("rare") + selects.count("rare") == 4
        drawn.append(found.rows["train"].tolist())
    assert drawn[0] != drawn[1]
    assert "of class rare are trained on, and train_per_class is 5" in caplog.text
    scores = [{"text": f"text {n}", "label": n / 7} for n in range(20)]
    with pytest.raises(InputError, match=r"has scores; give train_examples"):
        _read(task_of(tmp_path, scores, test=scores[:2], train_per_class=5), 0)


def test_a_missing_file_is_named(tmp_path):
    class Config:
        test_texts = "keep"
        tasks = (CycleTask(name="t", train=str(tmp_path / "none.jsonl"), test="x"),)
        seed = 0

        def finetune_of(self, task, point, arm):
            return ComparisonFinetuneConfig()

    with pytest.raises(InputError, match=r"none\.jsonl"):
        read_tasks(Config())


def test_files_are_read_once_for_all_draws(folder, monkeypatch):
    read = []
    task = task_of(folder, numbered(60), train_examples=20)
    monkeypatch.setattr(inputs, "read_task", lambda *p, **s: read.append(p) or read_task(*p, **s))
    draws = [_read(task, seed) for seed in (0, 1, 0)]
    assert read == [(task.train, task.test)]
    assert not np.array_equal(draws[0].rows["train"], draws[1].rows["train"])
    assert draws[0].facts == draws[2].facts
    before = draws[0].digests
    again = _read(task_of(folder, numbered(61), train_examples=20), 0)
    assert len(read) == 2
    assert again.digests[task.train] != before[task.train]
