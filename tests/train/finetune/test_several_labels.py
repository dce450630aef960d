"""Labels of which several may hold: how files write them, the scores, an expert of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rekindle.data.errors import InputError
from rekindle.train.answers.score import evaluate, score_model
from rekindle.train.finetune.config import TaskSettings
from rekindle.train.finetune.metrics import all_scores, chosen_metric, scores_of
from rekindle.train.finetune.run import FinetuneConfig, finetune
from rekindle.train.finetune.task_data import TaskData, read_task

SEVERAL = "multi_label_classification"
LISTS = [["a", "b"], [], ["b"]]
HELD = [[True, True], [False, False], [False, True]]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(path, *labels):
    return write(path, [{"text": f"t {n}", "label": label} for n, label in enumerate(labels)])


def read(path, **settings):
    return read_task(path, settings=TaskSettings(**settings))[0]


@pytest.mark.parametrize(
    ("train", "dev", "parts"),
    [
        (["a", "b", "a;b"], ["a"], ["a.csv, row 3: label 'a;b'", "1 row)", "'label_separator"]),
        (["a;b", "c;b;d", "", "d"], ["a"], ["row 1", "2 rows)", "none holds in 1 row with an em"]),
        (["1", "2", "1|2"], ["1"], ["row 3", """'label_separator="|"'"""]),
        (["a", "b", "a, b"], ["a"], ["row 3", """'label_separator=","'"""]),
        (["a", "b"], ["b", "a; b"], ["b.csv, row 2", """'label_separator=";"'"""]),
    ],
)
def test_labels_that_join_others_are_doubtful_and_both_settings_work(tmp_path, train, dev, parts):
    paths = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    for path, labels in zip(paths, (train, dev), strict=True):
        Path(path).write_text("text,label\n" + "".join(f't,"{one}"\n' for one in labels))
    with pytest.raises(InputError) as caught:
        read_task(*paths)
    told = str(caught.value)
    for part in [*parts, "finetune.label_separator", "--set problem=classification"]:
        assert part in told
    separator = told.partition('label_separator="')[2][0]
    several = read_task(*paths, settings=TaskSettings(label_separator=separator))[0]
    assert (several.problem, len(several)) == (SEVERAL, len(train))
    if "" not in train and len(dev) == 1:
        classes = read_task(*paths, settings=TaskSettings(problem="classification"))[0]
        assert len(classes.label_names) == len(train)


@pytest.mark.parametrize(
    "labels",
    [
        ["Salt Lake, Utah", "Provo, Utah", "Paris"],
        ["a;b", "c;d"],
        ["a;", "a"],
        ["[1.5, 2.5]", "[1.5, 2.0]", "[2.0, 2.5]"],
    ],
)
def test_names_that_contain_such_a_character_are_names(tmp_path, labels):
    read(labelled(tmp_path / "a.jsonl", *labels))


WRITTEN = {
    "a.jsonl": "".join(json.dumps({"text": "t", "label": one}) + "\n" for one in LISTS),
    "a.csv": 'text,label\nt,"[""a"", ""b""]"\nt,[]\nt,"[""b""]"\n',
    "python.csv": "text,label\nt,\"['a', 'b']\"\nt,[]\nt,['b']\n",  # as pandas writes one
    "a.tsv": 'text\tlabel\nt\t["a", "b"]\nt\t[]\nt\t["b"]\n',
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_list_of_names_is_labels_that_hold_and_an_empty_one_none(tmp_path, name):
    (tmp_path / name).write_text(WRITTEN[name])
    data = read(str(tmp_path / name))
    assert (data.problem, data.label_names) == (SEVERAL, ("a", "b"))
    assert data.labels.tolist() == HELD
    assert data.counts == {"a": 1, "b": 2}
    assert data.describe() == (
        "multi-label classification: 3 rows, 2 labels: a 1, b 2; 1.00 a row on average, none in 1 "
        "row; F1 is at probability 0.5"
    )


def test_a_separator_is_told(tmp_path):
    for cut, suffix in ((",", "csv"), ("\t", "tsv")):
        path = tmp_path / f"a.{suffix}"
        path.write_text(f"text{cut}label\nt{cut}a; b\nt{cut}\nt{cut}b\n")
        assert read(str(path), label_separator=";").labels.tolist() == HELD


@pytest.mark.parametrize(
    ("labels", "settings", "names", "held"),
    [
        ([[1], [2, 10], []], {"problem": "multi_label"}, ("1", "2", "10"), [0, 1, 2]),
        ([[1], [2, 0], []], {"label_names": ["x", "y", "z"]}, ("x", "y", "z"), [1, 0, 2]),
        ([["a"], ["A"]], {"problem": SEVERAL}, ("A", "a"), [1, 0]),
        ([["a"], ["b", "-"], ["b"]], {"drop_labels": ["-"]}, ("a", "b"), [0, 1]),
        ([["a"], None, ["b"]], {"drop_labels": [None]}, ("a", "b"), [0, 1]),
        ([[], ["a"]], {}, ("a",), [0]),
    ],
)
def test_the_settings_decide_what_lists_mean(tmp_path, labels, settings, names, held):
    data = read(labelled(tmp_path / "a.jsonl", *labels), **settings)
    assert data.label_names == names
    assert np.nonzero(data.labels)[1].tolist() == held
    assert len(data) + sum(data.dropped.values()) == len(labels)


@pytest.mark.parametrize(
    ("labels", "settings", "parts"),
    [
        ([[1, 2], [2, 3]], {}, ["row 1", "problem=regression", f"problem={SEVERAL}"]),
        ([[1], [2, 3]], {}, ["row 1", f"problem={SEVERAL}", "label_names=[…]"]),
        ([["1"], []], {}, ["row 1", f"problem={SEVERAL}"]),
        ([[0, 1, 1], [1, 0, 0]], {"problem": SEVERAL}, ["row 1", "a 0 or a 1 for each label"]),
        ([[True, False]], {}, ["row 1", "True in a list is not a label"]),
        ([["a"], ["b", 0.5]], {}, ["row 2", "0.5 is not a label"]),
        ([["a"], ["b", ""]], {}, ["row 2", "a label in it is empty"]),
        ([["a"], ["b", None]], {}, ["row 2", "None in a list"]),
        ([["a"], "b"], {}, ["row 2", "'b' is not a list of labels", '["b"]', "label_separator"]),
        (["a", ["b"]], {}, ["row 1: label 'a' is not a list of labels, as that of row 2 is"]),
        ([["a"], None], {}, ["row 2", "missing", "empty list", "drop_labels=[null]"]),
        ([["a"], ["b", "b"]], {}, ["row 2", "'b' is twice"]),
        ([["a"], ["A"]], {}, ["row 2", "blanks or case", f"problem={SEVERAL}"]),
        ([["a"], ["b", "-"]], {}, ["row 2", "'-' (1 row)", "drop_labels", f"problem={SEVERAL}"]),
        ([[], []], {}, ["no row has a label"]),
        ([["a"], ["b\ud800"]], {}, ["row 2", "half of a surrogate pair"]),
        ([[0], [3]], {"label_names": ["x", "y"]}, ["row 2", "3 is not the number of a label"]),
        ([["a"], ["b"]], {"positive": "a"}, ["positive is 'a'", "leave it out"]),
        (
            ["a;b", "c"],
            {"problem": "multi_label"},
            ["row 1", "'a;b' is not a list", "label_separator"],
        ),
        (["a", "b"], {"problem": "classification", "label_separator": ";"}, ["label_separator"]),
        ([[1.5, 2]], {"problem": "regression", "label_names": ["x"]}, ["label_names"]),
        ([["x"]], {"label_names": ["x", "x"]}, ["a name twice"]),
    ],
)
def test_doubtful_lists_are_refused_with_the_setting_that_decides(
    tmp_path, labels, settings, parts
):
    with pytest.raises(InputError) as caught:
        read(labelled(tmp_path / "a.jsonl", *labels), **settings)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "paths"),
    [
        (["animal|dog", "animal|cat", "plant|rose", "plant|oak"], True),
        (["a|b|c", "a|b|d", "a|e|f", "g|h|i", "g|j|k"], True),
        (["toxic|insult", "toxic|threat", "toxic|obscene"], False),  # what all are, and more
        (["comedy|drama", "comedy|romance", "action|war"], False),  # one root has no branches
        (["a|b", "a|c", "d|e", "d|f", ""], False),  # of one text none holds
        (["a|b", "a|c", "d|e", "d|f", None], False),
        (["animal|dog", "animal|cat", "plant"], False),  # of another length
        (["red|big", "red|small", "blue|big"], False),  # big is below two
        (["dog|animal", "animal|cat"], False),  # at two depths
        (["animal;dog", "animal;cat", "plant;rose"], False),
    ],
)
def test_paths_in_a_tree_are_classes_and_what_may_be_lists_is_asked_with_both_settings(
    tmp_path, labels, paths, caplog
):
    path = labelled(tmp_path / "a.jsonl", *labels)
    if paths:
        with caplog.at_level("WARNING", "rekindle"):
            assert read(path).label_names == tuple(sorted(labels))
        (told,) = [one for one in caplog.messages if "paths in a tree" in one]
        assert """--set 'label_separator="|"'""" in told
        return
    with pytest.raises(InputError, match=r"--set 'label_separator=.*--set problem=classification"):
        read(path)


def test_numbers_of_single_labels_may_have_names_too(tmp_path):
    data = read(labelled(tmp_path / "a.jsonl", 1, 0, 1), label_names=["no", "yes"])
    assert (data.label_names, data.labels.tolist()) == (("no", "yes"), [1, 0, 1])
    with pytest.raises(InputError, match="row 2: label -1 is not the number of a label"):
        read(labelled(tmp_path / "b.jsonl", 1, -1, 0), label_names=["no", "yes"])


def test_a_label_that_train_has_not_is_refused(tmp_path):
    train = labelled(tmp_path / "t.jsonl", ["a"], ["b"])
    dev = labelled(tmp_path / "d.jsonl", [], ["c"])
    with pytest.raises(InputError, match=r"d.jsonl, row 2: label 'c' does not occur in .*t.jsonl"):
        read_task(train, dev)


def test_the_scores_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    labels, logits = draw.random((50, 4)) < 0.3, draw.normal(size=(50, 4)).astype(np.float32)
    for threshold in (0.2, 0.5, 0.9):
        given = 1 / (1 + np.exp(-logits.astype(np.float64))) >= threshold
        scores = all_scores(SEVERAL, logits, labels, threshold=threshold)
        for average in ("micro", "macro"):
            wanted = sklearn_metrics.f1_score(labels, given, average=average, zero_division=0.0)
            assert scores[f"f1_{average}"] == pytest.approx(wanted)
        assert scores["subset_accuracy"] == sklearn_metrics.accuracy_score(labels, given)


def test_labels_that_nobody_has_do_not_count_and_those_the_model_adds_are_wrong():
    data = TaskData(["t"] * 2, None, np.array([[1, 0, 0], [1, 1, 0]], bool), ("a", "b", "c"))
    right = np.where(data.labels, 3.0, -3.0).astype(np.float32)
    assert set(scores_of(data, right).values()) == {1.0}
    more = np.insert(right, 0, [3.0, -3.0], axis=1)
    scores = scores_of(data, more, ["z", "a", "b", "c"])
    assert scores["subset_accuracy"] == 0.5
    assert scores["f1_micro"] == pytest.approx(2 * 3 / (4 + 3))
    assert chosen_metric(None, data) == "f1_micro"
    with pytest.raises(InputError, match="use one of: f1_micro, f1_macro, subset_accuracy"):
        chosen_metric("f1", data)


@pytest.fixture(scope="module")
def bert(make_model, wordpiece):
    return str(make_model("bert", "AutoModelForMaskedLM", wordpiece, initializer_range=0.1))


def task(folder, sizes=(200, 40)):
    """A label holds where its word stands in the text."""
    draw = np.random.default_rng(0)
    paths = []
    for name, size in zip(("train", "dev"), sizes, strict=True):
        rows = []
        for _ in range(size):
            held = [word for word in ("river", "engine", "paper") if draw.random() < 0.4]
            text = [*draw.choice(["the", "a", "of", "in", "light"], size=4), *held]
            rows.append({"text": " ".join(draw.permutation(text)), "label": held})
        paths.append(write(folder / f"{name}.jsonl", rows))
    return paths


@pytest.fixture(scope="module")
def expert(tmp_path_factory, bert):
    folder = tmp_path_factory.mktemp("several")
    train, dev = task(folder)
    config = FinetuneConfig(epochs=5, batch_size=16, learning_rate=1e-2, threshold=0.4)
    result = finetune(bert, train, dev, str(folder / "out"), config=config)
    return result, train, dev, str(folder / "out"), config


def test_an_expert_learns_them_and_plain_transformers_gives_the_same(expert):
    result, train, dev, out, config = expert
    assert (result.metric, result.problem) == ("f1_micro", SEVERAL)
    assert result.mean > 0.9
    assert result.class_counts["dev"].keys() == {"river", "engine", "paper"}
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.problem_type == SEVERAL
    assert tuple(model.config.id2label.values()) == ("engine", "paper", "river")
    lines, rows = (
        [json.loads(line) for line in Path(path).read_text().splitlines()]
        for path in (f"{out}/predictions.jsonl", dev)
    )
    for row, line in zip(rows, lines, strict=True):
        with torch.no_grad():
            given = torch.sigmoid(model(**tokenizer(row["text"], return_tensors="pt")).logits[0])
        names = [model.config.id2label[n] for n in torch.nonzero(given >= 0.4)[:, 0].tolist()]
        assert (line["labels"], line["label"]) == (names, row["label"])
    data = read_task(train, dev, settings=TaskSettings(threshold=0.4))[1]
    assert evaluate(out, data)[0] == pytest.approx(result.per_seed[0].scores)
    given = (out, train, dev, f"{out}-scored")
    scored = score_model(*given, config=config.model_copy(update={"epochs": 0}))
    assert scored.mean == pytest.approx(result.mean)


def test_it_is_never_taken_for_a_classifier_of_classes_nor_a_classifier_for_it(
    tmp_path, expert, make_model, wordpiece
):
    _, train, _, out, _ = expert
    single = labelled(tmp_path / "one.jsonl", "river", "engine", "paper")
    given = (out, single, single, str(tmp_path / "s"))
    with pytest.raises(InputError, match="labels of which several may hold, but the task is a sin"):
        score_model(*given, config=FinetuneConfig(epochs=0))
    merge = {"epochs": 0, "merge": {"experts": [out], "passes": 0}}
    with pytest.raises(InputError, match=f"is a {SEVERAL}: only classifiers"):
        score_model(*given, config=FinetuneConfig(**merge))
    with pytest.raises(InputError, match="merge is for classes that exclude each other"):
        score_model(out, train, train, str(tmp_path / "s"), config=FinetuneConfig(**merge))
    names = dict(enumerate(["engine", "paper", "river"]))
    about = {"id2label": names, "label2id": {n: i for i, n in names.items()}}
    auto = "AutoModelForSequenceClassification"
    for problem, told in ((None, 'write "problem_type"'), ("single_label_classification", "a si")):
        other = make_model("bert", auto, wordpiece, problem_type=problem, **about)
        with pytest.raises(InputError, match=told):
            score_model(
                str(other), train, train, str(tmp_path / "s"), config=FinetuneConfig(epochs=0)
            )


def test_a_head_for_classes_that_exclude_each_other_starts_fresh(tmp_path, expert, caplog):
    _, train, dev, out, _ = expert
    single = labelled(tmp_path / "one.jsonl", "river", "engine", "paper")
    with caplog.at_level("INFO", logger="rekindle"):
        finetune(out, single, single, str(tmp_path / "a"), config=FinetuneConfig(max_steps=1))
        assert "starts fresh" in caplog.text
        caplog.clear()
        finetune(out, train, dev, str(tmp_path / "b"), config=FinetuneConfig(max_steps=1))
        assert "starts fresh" not in caplog.text
