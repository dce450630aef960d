import gzip
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.positive import positive_class
from rekindle.train.finetune.task_data import read_task
from rekindle.train.model.labels import check_label_names

EVERY = ("a.jsonl", "a.csv", "a.tsv", "a.parquet")
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


@given(st.lists(st.integers(2, 200), min_size=2, max_size=30, unique=True))
def test_whole_numbers_are_classes_in_numeric_order(tmp_path_factory, labels):
    labels = labels * 2
    path = labelled(tmp_path_factory.mktemp("t") / "a.jsonl", labels)
    (data,) = read_task(path)
    assert data.label_names == tuple(str(number) for number in sorted(set(labels)))
    assert [int(data.label_names[i]) for i in data.labels] == labels


def test_labels_0_to_c_keep_their_number(tmp_path):
    labels = [11, 3, 2, 10, 0, 1, 9, 8, 7, 6, 5, 4] * 2
    (data,) = read_task(labelled(tmp_path / "a.jsonl", labels))
    assert data.labels.tolist() == labels


def test_booleans_are_classes(tmp_path):
    (data,) = read_task(labelled(tmp_path / "a.jsonl", [True, False]))
    assert data.label_names == ("false", "true")
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize("train", [[0.5, 1.0], [0.25, 5.0], [3, 2.5]])
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


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9"], ("9", "10")),
        (["0.0", "1.0"], ("0", "1")),
        (["1e-3", ".5", "-2."], ()),
        (["3.8", "2"], ()),
        (["[0.5, 1]", "[2, 3]"], ()),
        (["07", "1_0"], ("07", "1_0")),
        (["10", "09", "1"], ("09", "1", "10")),
        (["2020-01-01", "NA"], ("2020-01-01", "NA")),
        (["True", "False"], ("false", "true")),
        (["true", "half-true"], ("half-true", "true")),
        (["-1", "1"], ("-1", "1")),
        (["-", "+"], ("+", "-")),
        ([" pos", " neg"], ("neg", "pos")),
    ],
)
def test_what_is_written_alike_means_the_same_in_every_file(tmp_path, labels, names):
    rows = [{"text": "t", "label": label} for label in labels]
    found = [read_task(write(tmp_path / name, rows))[0] for name in EVERY]
    assert {data.label_names for data in found} == {names}
    assert len({data.labels.tobytes() for data in found}) == 1


def test_numbers_mean_the_same_as_values_and_as_words(tmp_path):
    for values in ([0, 1, 1], [0.0, 1.0, 1.0], [True, False, True], [0.5, 1.0, 2.0]):
        found = []
        for kind in (str, lambda value: value):
            rows = [{"text": "t", "label": kind(value)} for value in values]
            found += [read_task(write(tmp_path / name, rows))[0] for name in EVERY]
        assert len({(data.label_names, data.labels.tobytes()) for data in found}) == 1, values


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([0, 1, -1, 0], ["row 3", "'-1' (1 row)", "drop_labels=[-1]", "problem=class"]),
        (["a", "b", "-"], ["row 3", 'drop_labels=["-"]', "problem=classification"]),
        (["a", "b", ""], ["row 3", "label is missing", "drop_labels=[null]"]),
        (["a", "b", "nan"], ["row 3", "label is missing"]),
        (["a", "b", "b "], ["row 3", "'b '", "row 2 has 'b'", "blanks or case", "problem=class"]),
        (["a", "b", "B"], ["row 3", "'B'", "row 2 has 'b'"]),
        (list(range(40)), ["40 labels in 40 rows", "ids", "--label-field", "problem=regression"]),
        ([f"{n}x" for n in range(26)], ["26 labels in 26 rows"]),
        (["1.0", "2.0", "3.0"], ["row 1", "written as decimals", "problem=regression"]),
        (["0.0", "1.0", "2.0"], ["row 1", "and not 0 and 1", "problem=classification"]),
        (["1", "0", "7" * 309], ["row 3", "label is 7777", "finite", "drop the row"]),
        (["0.5", "1.5", "n/a"], ["row 3", "'n/a' is a word", 'drop_labels=["n/a"]']),
        (["[1, 0]", "[0, 1]"], ["row 1", "do not exclude each other", "problem=regression"]),
        (["[0.5, 1]", "[2]"], ["row 2", "'[2]' is a word"]),
        (["[0.5, 1]", "[2, 1, 3]"], ["row 2", "3 numbers", "first has 2"]),
    ],
)
def test_doubtful_labels_are_refused_with_the_setting_that_decides(tmp_path, labels, parts):
    rows = [{"text": "t", "label": label} for label in labels]
    for name in EVERY:
        message = refused(write(tmp_path / name, rows))
        for part in (name, *parts):
            assert part in message


@pytest.mark.parametrize(
    ("labels", "settings", "names"),
    [
        ([0, 1, -1], {"problem": "classification"}, ("-1", "0", "1")),
        ([0, 1, -1], {"drop_labels": -1}, ("0", "1")),
        (["a", "b", "-"], {"drop_labels": ["-"]}, ("a", "b")),
        (["a", "b", None, ""], {"drop_labels": [None]}, ("a", "b")),
        ([0.0, 1.0, math.nan], {"drop_labels": [None]}, ("0", "1")),
        (["a", "b", "B"], {"problem": "classification"}, ("B", "a", "b")),
        ([*range(12)], {"problem": "classification"}, tuple(map(str, range(12)))),
        ([1.5, 2.0], {"problem": "classification"}, ("1.5", "2")),
        ([1, 2, "x"], {"problem": "classification"}, ("1", "2", "x")),
        ([*range(40)], {"problem": "regression"}, ()),
        ([[0, 1], [1, 0]], {"problem": "regression"}, ()),
    ],
)
def test_the_settings_decide_what_is_doubtful(tmp_path, labels, settings, names):
    path = labelled(tmp_path / "a.jsonl", labels)
    (data,) = read_task(path, settings=TaskSettings(**settings))
    assert data.label_names == names
    kept = [row for row, text in enumerate(data.texts, start=1) if text == f"t {row - 1}"]
    assert [*data.rows] == kept or settings.get("drop_labels") is None
    assert len(data) + sum(data.dropped.values()) == len(labels)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1.1", "1.10", "1.2", "1.20"], ("1.1", "1.10", "1.2", "1.20")),
        (["1E5", "2B1"], ("1E5", "2B1")),
        (["1.0", "1.1", "10"], ("1.0", "1.1", "10")),
        (["1.0", "1"], ("1", "1.0")),
        (["0.0", "10.0", "2.0"], ("0", "2", "10")),
        (["10", "2", "+1"], ("+1", "2", "10")),
        (["1" * 400, "x"], ("1" * 400, "x")),
    ],
)
def test_a_class_is_called_as_it_is_written(tmp_path, labels, names):
    rows = [{"text": "t", "label": label} for label in labels]
    for name in EVERY:
        path = write(tmp_path / name, rows)
        (data,) = read_task(path, settings=TaskSettings(problem="classification"))
        assert data.label_names == names
        assert [names[label] for label in data.labels] == [
            label if label in names else label.removesuffix(".0") for label in labels
        ]


def test_what_is_left_out_is_a_label_of_the_files(tmp_path):
    def left(labels, drop, **settings):
        rows = [{"text": "t", "label": label} for label in labels]
        given = TaskSettings(drop_labels=drop, **settings)
        each = [read_task(write(tmp_path / name, rows), settings=given)[0] for name in EVERY]
        assert len({data.label_names for data in each}) == 1
        return each[0].label_names, each[0].dropped

    assert left(["True", "No", "Maybe"], [True]) == (("Maybe", "No"), {"true": 1})
    sections = ["1.1", "1.10", "1.2"]
    assert left(sections, ["1.10"], problem="classification") == (("1.1", "1.2"), {"1.10": 1})
    assert left(["a", "b"], [None]) == (("a", "b"), {})
    for labels, drop, told in (
        (["a", "b", "unknown"], "unkown", r"not a label of .*jsonl .*did you mean 'unknown'\?"),
        (["09", "10", "11"], 9, 'write "09"'),
        (sections, [1.2, "1.3"], "'1.3'"),
    ):
        with pytest.raises(InputError, match=told):
            left(labels, drop)


def test_nothing_said_of_what_is_left_out_leaves_nothing_out():
    assert TaskSettings(drop_labels=None).drop_labels == ()


def test_labels_that_are_left_out_are_so_in_every_split_and_counted(tmp_path):
    train = labelled(tmp_path / "t.jsonl", [0, -1, 1])
    dev = labelled(tmp_path / "d.jsonl", [-1, 1])
    found = read_task(train, dev, settings=TaskSettings(drop_labels=[-1]))
    assert [data.dropped for data in found] == [{"-1": 1}] * 2
    assert [*found[1].rows] == [2]
    assert found[0].describe() == (
        "classification: 2 rows (1 of '-1' left out), 2 classes: 0 1, 1 1; F1 is that of '1'"
    )
    with pytest.raises(InputError, match="leaves none of its 2 rows"):
        read_task(labelled(tmp_path / "x.jsonl", [-1, -1]), settings=TaskSettings(drop_labels=-1))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("column", ["sentence1", "sentence2", "label"])
def test_half_a_surrogate_pair_is_refused_with_its_row(tmp_path, suffix, column):
    rows = [{"sentence1": "a", "sentence2": "b", "label": n} for n in ("x", "y", "x")]
    rows[1][column] += "\ud800"
    content = Path(jsonl(tmp_path / "a.jsonl", rows)).read_bytes()
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    told = f"row 2: character 2 of the {column} is half of a surrogate pair"
    assert f"{path}, {told}" in refused(str(path))


def test_a_label_name_of_a_model_is_text():
    with pytest.raises(InputError, match="m: character 2 of the name of output 1 is half"):
        check_label_names(["a", "b\ud800"], "m")


@pytest.mark.parametrize(("line", "column"), [(b"b\xff,0", "text"), (b"b,0\xff", "label")])
def test_of_bytes_that_are_not_utf8_a_csv_names_the_row(tmp_path, line, column):
    content = b"text,label\na,1\n\n" + line + b"\n"
    told = f"row 2: {column} is not UTF-8 (invalid start byte at byte 2)"
    for name, cut in (("a.csv", b","), ("a.tsv", b"\t")):
        (tmp_path / name).write_bytes(content.replace(b",", cut))
        assert f"{name}, {told}" in refused(str(tmp_path / name))


@pytest.mark.parametrize("name", EVERY)
def test_a_git_lfs_pointer_is_called_so(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    told = f"{name} is a git-lfs pointer, not the file itself"
    assert told in (message := refused(str(tmp_path / name)))
    assert f"Run `git lfs pull` in {tmp_path}" in message


def test_what_decides_is_told_as_a_command_and_a_cycle_take_it(tmp_path):
    path = labelled(tmp_path / "a.jsonl", ["a", "b", "it's -", "-"])
    told = "--set 'drop_labels=[\"-\"]' (in a cycle: finetune.drop_labels)"
    assert f"{told}, or say --set problem=classification" in refused(path)


def test_texts_that_are_empty_are_counted(tmp_path):
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(["a", "", " ", "b"])]
    (data,) = read_task(jsonl(tmp_path / "a.jsonl", rows))
    assert data.describe().startswith("classification: 4 rows, 2 of them without text, 2 classes")


def test_columns_are_chosen(tmp_path):
    rows = [{"premise": "a", "claim": "b", "gold": 0}, {"premise": "c", "claim": "d", "gold": 1}]
    chosen = TaskSettings(text_field=["premise", "claim"], label_field="gold")
    for name in EVERY:
        path = write(tmp_path / name, rows)
        (data,) = read_task(path, settings=chosen)
        assert (data.texts, data.pairs) == (["a", "c"], ["b", "d"])
        assert "--text-field" in refused(path)
        with pytest.raises(InputError, match=r"did you mean 'premise'.*--text-field"):
            read_task(path, settings=TaskSettings(text_field="premises", label_field="gold"))
        with pytest.raises(InputError, match=r"no column 'label'.*--label-field") as caught:
            read_task(path, settings=TaskSettings(text_field="claim"))
        assert "did you mean" not in str(caught.value)  # none of its columns is near
    former = TaskSettings(text_columns=["premise", "claim"], label_column="gold")
    assert former == chosen


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,label\na,0,1\nb,1,0\n")
    (tmp_path / "a.tsv").write_text("text\tlabel\tlabel\na\t0\t1\nb\t1\t0\n")
    columns = [pa.array(["a", "b"]), pa.array([0, 1]), pa.array([1, 0])]
    table = pa.Table.from_arrays(columns, names=["text", "label", "label"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.parquet"):
        assert "2 columns called 'label'" in refused(str(tmp_path / name))


@pytest.mark.parametrize(
    ("names", "wanted", "positive"),
    [
        (("0", "1"), None, "1"),
        (("-1", "1"), None, "1"),
        (("false", "true"), None, "true"),
        (("No", "Yes"), None, "Yes"),
        (("neg", "pos"), None, "pos"),
        (("entailment", "not_entailment"), None, "entailment"),
        (("Not Duplicate", "duplicate"), None, "duplicate"),
        (("ham", "spam"), None, None),
        (("1", "2"), None, None),
        (("ham", "spam"), "ham", "ham"),
        (("0", "1"), 0, "0"),
        (("+1", "-1"), None, "+1"),
        (("1.1", "1.10"), "1.10", "1.10"),
        (("a", "b", "c"), None, None),
    ],
)
def test_the_positive_class_is_the_one_that_says_yes_or_is_named(names, wanted, positive):
    assert positive_class(names, wanted) == positive


@pytest.mark.parametrize(("names", "wanted"), [(("a", "b"), "x"), (("a", "b", "c"), "a"), ((), 1)])
def test_a_positive_class_is_of_two(names, wanted):
    with pytest.raises(InputError, match="positive is"):
        positive_class(names, wanted)


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
    train = labelled(tmp_path / "train.jsonl", list(range(150)) * 2)
    message = refused(train, labelled(tmp_path / "dev.jsonl", [150]))
    assert "150: 0, 1," in message
    assert "19 …" in message


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ["no rows"]),
        ([{"text": "a"}], ["no column 'label'", "it has: text"]),
        ([{"words": "a", "label": 1}], ["'sentence1' or 'tokens'", "words, label"]),
        ([{"text": "a", "sentence1": "b", "label": 1}], ["both"]),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], ["row 2", "label is missing"]),
        ([{"text": "a", "label": 1}, {"text": "b"}], ["row 2", "label is missing"]),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "x"}], ["row 2", "a word", "a number"]),
        (
            [{"text": "a", "label": True}, {"text": "b", "label": 0}],
            ["row 2", "a boolean"],
        ),
        ([{"text": "a", "label": [1]}], ["row 1", "list"]),
        ([{"text": "a", "label": {"x": 1}}], ["row 1", "a dict"]),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], ["'1'", "at least two classes"]),
        ([{"text": 7, "label": 1}], ["row 1", "text must be a string", "7, a int"]),
        ([{"sentence1": "a", "sentence2": None, "label": 1}], ["sentence2 must be", "missing"]),
        (
            [{"text": "a", "label": 0.5}, {"text": "b", "label": float("nan")}],
            ["row 2", "nan"],
        ),
        ([{"text": "a", "label": float("inf")}], ["row 1", "finite"]),
        ([{"text": "a", "label": 10**400}], ["row 1", "finite"]),
        ([{"text": "a", "label": [0.5, 10**400]}], ["row 1", "finite"]),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": -1e39}], ["row 2", "too large"]),
    ],
)
def test_wrong_rows_are_named(tmp_path, rows, parts):
    message = refused(jsonl(tmp_path / "a.jsonl", rows))
    for part in ["a.jsonl", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"text": "a", "label": 1}\n\n{"text"', "a.jsonl:3: not JSON"),
        (b"[1]\n", "begins with a JSON array"),
        (b'{"text": "\xff", "label": 1}\n', "a.jsonl:1: not UTF-8"),
    ],
)
def test_broken_jsonl_is_named(tmp_path, content, part):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert part in refused(str(tmp_path / "a.jsonl"))


def test_a_file_is_read_by_what_is_in_it(tmp_path):
    content = b"text,label\na,0\nb,1\n"
    (tmp_path / "a.csv").write_bytes(gzip.compress(content))
    assert len(read_task(str(tmp_path / "a.csv"))[0]) == 2
    (tmp_path / "b.csv").write_bytes(content.decode().encode("utf-16"))
    assert "b.csv is UTF-16; convert" in refused(str(tmp_path / "b.csv"))


def test_a_column_of_parquet_that_is_no_utf8_names_the_row(tmp_path):
    values = pa.array([b"one", b"t\xffo"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, values.buffers())
    pyarrow.parquet.write_table(pa.table({"text": text, "label": [0, 1]}), tmp_path / "a.parquet")
    assert "a.parquet, record 2: the field 'text' is not" in refused(str(tmp_path / "a.parquet"))


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
        assert "pairs.jsonl has sentence2" in refused(*files)
    scores = labelled(tmp_path / "scores.jsonl", [0.5, 1.5])
    assert "is not a number" in refused(scores, labelled(tmp_path / "names.jsonl", ["a"]))


def test_the_glue_files_read_as_glue_describes_them(shared):
    sizes = {"cola": (8551, 1043), "mrpc": (3668, 408), "stsb": (5749, 1500)}
    for task, rows in sizes.items():
        files = [shared / "glue" / f"{task}_{split}.jsonl" for split in ("train", "dev")]
        splits = read_task(*map(str, files))
        assert tuple(map(len, splits)) == rows
        assert (splits[0].pairs is None) == (task == "cola")
        assert splits[1].label_names == (() if task == "stsb" else ("0", "1"))
