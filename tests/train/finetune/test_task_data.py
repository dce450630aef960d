import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.train.finetune.task_data import read_task

ROWS = [
    {"text": 'says "no", twice', "label": "neg"},
    {"text": "12", "label": "pos"},
    {"text": "été\tor not", "label": "neg"},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(path, labels, text="t"):
    return jsonl(path, [{"text": f"{text} {i}", "label": label} for i, label in enumerate(labels)])


def refused(*paths):
    with pytest.raises(InputError) as caught:
        read_task(*paths)
    return str(caught.value)


def write(path: Path, rows):
    """One table in whatever format the name asks for."""
    table = pa.Table.from_pylist(rows)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif ".tsv" in path.name:
        lines = ["\t".join(rows[0])] + ["\t".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif ".csv" in path.name:
        pa.csv.write_csv(table, path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(content.encode())
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_task(tmp_path, name):
    (data,) = read_task(write(tmp_path / name, ROWS))
    assert data.texts == [row["text"] for row in ROWS]
    assert data.pairs is None
    assert data.label_names == ("neg", "pos")
    assert data.labels.tolist() == [0, 1, 0]
    assert data.labels.dtype == np.int64
    assert data.problem == "single_label_classification"
    assert len(data) == 3


def test_a_tsv_has_no_quoting(tmp_path):
    rows = [
        {"sentence1": '"Open', "sentence2": "x", "label": 0},
        {"sentence1": 'and " alone', "sentence2": '"y"', "label": 1},
    ]
    (data,) = read_task(write(tmp_path / "a.tsv", rows))
    assert data.texts == ['"Open', 'and " alone']
    assert data.pairs == ["x", '"y"']


def test_a_csv_may_hold_line_breaks_in_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",0\n"a ""b""",1\n')
    (data,) = read_task(str(tmp_path / "a.csv"))
    assert data.texts == ["one\ntwo", 'a "b"']


@given(st.lists(st.integers(-20, 200), min_size=2, max_size=30).filter(lambda x: len(set(x)) > 1))
def test_whole_numbers_are_classes_in_numeric_order(tmp_path_factory, labels):
    path = labelled(tmp_path_factory.mktemp("t") / "a.jsonl", labels)
    (data,) = read_task(path)
    assert data.label_names == tuple(str(number) for number in sorted(set(labels)))
    assert [int(data.label_names[i]) for i in data.labels] == labels


def test_labels_0_to_c_keep_their_number(tmp_path):
    labels = [11, 3, 2, 10, 0, 1, 9, 8, 7, 6, 5, 4]
    (data,) = read_task(labelled(tmp_path / "a.jsonl", labels))
    assert data.labels.tolist() == labels


def test_booleans_are_classes(tmp_path):
    (data,) = read_task(labelled(tmp_path / "a.jsonl", [True, False]))
    assert data.label_names == ("false", "true")
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize("train", [[0.5, 1.0], [0.0, 5.0], [3, 2.5]])
def test_floats_in_train_make_a_regression_of_every_split(tmp_path, train):
    files = [
        labelled(tmp_path / f"{i}.jsonl", x) for i, x in enumerate([train, [5.0, 1.0], [2, 3]])
    ]
    for data, labels in zip(read_task(*files), [train, [5.0, 1.0], [2, 3]], strict=True):
        assert data.problem == "regression"
        assert data.label_names == ()
        assert data.labels.dtype == np.float32
        assert data.labels.tolist() == labels


def test_a_dev_split_in_floats_follows_the_classes_of_train(tmp_path):
    train, dev = labelled(tmp_path / "t.jsonl", [0, 1]), labelled(tmp_path / "d.jsonl", [1.0, 0.0])
    assert read_task(train, dev)[1].labels.tolist() == [1, 0]


def test_a_csv_column_is_typed_as_a_whole(tmp_path):
    def read(*labels):
        (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t,{x}\n" for x in labels))
        return read_task(str(tmp_path / "a.csv"))[0]

    assert read("10", "9").label_names == ("9", "10")
    assert read("1.5", "2").problem == "regression"
    assert read("1e-3", ".5", "-2.").labels.tolist() == pytest.approx([1e-3, 0.5, -2.0])
    assert read("1_0", "2").label_names == ("1_0", "2")
    assert read("2020-01-01", "NA").label_names == ("2020-01-01", "NA")


def test_the_labels_are_those_of_train(tmp_path):
    train = labelled(tmp_path / "train.jsonl", ["b", "a", "c"])
    dev = labelled(tmp_path / "dev.jsonl", ["c", "c"])
    assert read_task(train, dev)[1].labels.tolist() == [2, 2]
    wrong = labelled(tmp_path / "wrong.jsonl", ["c", "d"])
    message = refused(train, dev, wrong)
    for part in ("wrong.jsonl, row 2", "'d'", "a, b, c", train):
        assert part in message
    assert "row 1: label '-1'" in refused(train, labelled(tmp_path / "hidden.jsonl", [-1]))


def test_many_known_labels_are_not_all_listed(tmp_path):
    train = labelled(tmp_path / "train.jsonl", list(range(150)))
    message = refused(train, labelled(tmp_path / "dev.jsonl", [150]))
    assert "150: 0, 1," in message
    assert "19 …" in message


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ["no rows"]),
        ([{"text": "a"}], ["no field 'label'", "the fields it has: text"]),
        ([{"words": "a", "label": 1}], ["'text' or 'sentence1'", "words, label"]),
        ([{"text": "a", "sentence1": "b", "label": 1}], ["both"]),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], ["row 2", "label is missing"]),
        ([{"text": "a", "label": 1}, {"text": "b"}], ["row 2", "label is missing"]),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "x"}], ["row 2", "string", "number"]),
        ([{"text": "a", "label": True}, {"text": "b", "label": 0}], ["row 2", "number", "boolean"]),
        ([{"text": "a", "label": [1]}], ["row 1", "list"]),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], ["'1'", "at least two classes"]),
        ([{"text": 7, "label": 1}], ["row 1", "text must be a string", "7, a int"]),
        ([{"sentence1": "a", "sentence2": None, "label": 1}], ["sentence2 must be", "missing"]),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": float("nan")}], ["row 2", "nan"]),
        ([{"text": "a", "label": float("inf")}], ["row 1", "finite"]),
    ],
)
def test_wrong_rows_are_named(tmp_path, rows, parts):
    message = refused(jsonl(tmp_path / "a.jsonl", rows))
    for part in ["a.jsonl", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"text": "a", "label": 1}\n\n{"text"', "line 3: not JSON"),
        (b"[1]\n", "line 1"),
        (b'{"text": "\xff", "label": 1}\n', "cannot be read"),
    ],
)
def test_broken_jsonl_is_named(tmp_path, content, part):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert part in refused(str(tmp_path / "a.jsonl"))


def test_broken_files_are_named(tmp_path):
    for name, content in {
        "a.csv": b"text,label\na\n",
        "b.csv": b"",
        "c.csv": b"text,label\n",
        "d.parquet": b"PAR1 no",
        "e.jsonl.gz": b"not gzip",
        "f.csv": b"text,label\nx,1\nx,\n",
        "g.csv": b"text,label\nx,1.5\nx,nan\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert name in refused(str(tmp_path / name))


def test_missing_and_unknown_files(tmp_path):
    assert "no such file" in refused(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.txt").write_text("x")
    message = refused(str(tmp_path / "a.txt"))
    assert ".jsonl" in message
    assert ".parquet" in message


def test_splits_must_agree_on_pairs_and_on_the_kind_of_label(tmp_path):
    single = labelled(tmp_path / "single.jsonl", [0, 1])
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 1}])
    for files in ((single, pairs), (pairs, single)):
        assert "pairs.jsonl has sentence2 and" in refused(*files)
    scores = labelled(tmp_path / "scores.jsonl", [0.5, 1.5])
    assert "is no number" in refused(scores, labelled(tmp_path / "names.jsonl", ["a"]))


def test_the_glue_files_read_as_glue_describes_them(shared):
    sizes = {"cola": (8551, 1043), "mrpc": (3668, 408), "stsb": (5749, 1500)}
    for task, rows in sizes.items():
        files = [shared / "glue" / f"{task}_{split}.jsonl" for split in ("train", "dev")]
        splits = read_task(*map(str, files))
        assert tuple(map(len, splits)) == rows
        assert (splits[0].pairs is None) == (task == "cola")
        assert splits[1].label_names == (() if task == "stsb" else ("0", "1"))
