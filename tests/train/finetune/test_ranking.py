"""Rankers: files of queries, documents and grades; fine-tuned by each loss, scored, asked again."""

import json

import numpy as np
import pytest
from sklearn.metrics import ndcg_score
from transformers import AutoConfig

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.commands.next_commands import next_commands
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.constant import find_weakness
from rekindle.train.finetune.run import finetune
from rekindle.train.finetune.task_data import read_task

WORDS = ["the", "a", "of", "in", "to", "and", "light", "model", "paper", "teacher"]
RARE = ["river", "city", "engine", "water", "mountain"]


def rows_of(split, queries, clicks=False, documents=5):
    """The grade is how many words of the query a document has; some groups say nothing."""
    draw = np.random.default_rng(sum(map(ord, split)))
    rows = []
    for query in range(queries):
        asked = [str(word) for word in draw.choice(RARE, 2, replace=False)]
        for number in range(documents):
            grade = 2 if number == 0 else int(draw.integers(0, 2))
            words = [*draw.choice(WORDS, 3), *asked[:grade]]
            row = {"query": " ".join(asked), "document": " ".join(draw.permutation(words))}
            row |= {"label": grade > 0 if clicks else grade, "group": f"{split}-{query}"}
            rows.append(row)
    return [rows[number] for number in draw.permutation(len(rows))]  # groups lie scattered


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    def made(clicks=False, **sizes):
        sizes = {"train": 40, "dev": 12} | sizes
        return [write(tmp_path / f"{n}.jsonl", rows_of(n, q, clicks)) for n, q in sizes.items()]

    return made


@pytest.fixture(scope="module")
def bert(make_model, wordpiece):
    return str(make_model("bert", "AutoModelForMaskedLM", wordpiece, initializer_range=0.1))


# --- what is read ---------------------------------------------------------------------------------


def test_a_file_is_read_as_queries_documents_and_grades(files, tmp_path, caplog):
    train, dev = files()
    splits = read_task(train, dev)
    rows = rows_of("train", 40)
    assert (splits[0].problem, splits[0].head_problem) == ("ranking", "regression")
    assert splits[0].texts == [row["query"] for row in rows]
    assert splits[0].pairs == [row["document"] for row in rows]
    assert splits[0].labels.tolist() == [row["label"] for row in rows]
    same = [[a["group"] == b["group"] for b in rows] for a in rows]
    assert (splits[0].groups[:, None] == splits[0].groups).tolist() == same
    assert "ranking: 200 rows in 40 groups of 5, grades 0 to 2" in splits[0].describe()
    assert read_task(train, dev, settings=FinetuneConfig(problem="regression"))[0].groups is None
    other = [
        {"a": r["query"], "b": r["document"], "y": str(r["label"]), "qid": r["group"]} for r in rows
    ]
    names = {"text_field": ["a", "b"], "label_field": "y", "group_field": "qid"}
    named = parse_settings(FinetuneConfig, names)
    found = read_task(write(tmp_path / "o.jsonl", other), settings=named)[0]
    assert np.array_equal(found.groups, splits[0].groups)
    assert np.array_equal(found.labels, splits[0].labels)


def test_without_a_field_of_groups_the_query_is_the_group_and_that_is_said(files, tmp_path, caplog):
    rows = [{k: v for k, v in row.items() if k != "group"} for row in rows_of("train", 40)]
    with caplog.at_level("INFO", logger="rekindle"):
        data = read_task(write(tmp_path / "t.jsonl", rows))[0]
    queries = [row["query"] for row in rows]
    assert len({*data.groups.tolist()}) == len({*queries}) < 40
    assert "has no field of groups: all rows of one query text are a group" in caplog.text


def test_clicks_are_0_and_1_and_what_says_nothing_is_left_out_and_said(tmp_path):
    rows = [
        {"query": f"q{n}", "document": f"d{n} {m}", "label": (n == 0) and m == 0}
        for n in range(3)
        for m in range(1 if n == 2 else 3)
    ]
    data = read_task(write(tmp_path / "t.jsonl", rows))[0]
    assert data.labels.tolist() == [1, 0, 0, 0, 0, 0, 0]
    told = "7 rows in 3 groups of 1 to 3, grades 0 to 1; 2 groups of one document"
    assert told in data.describe()
    (tmp_path / "t.csv").write_text(
        "query,document,label\nq,a,True\nq,b,false\nq,c,TRUE\n", encoding="utf-8"
    )
    assert read_task(str(tmp_path / "t.csv"))[0].labels.tolist() == [1, 0, 1]


ROW = {"query": "a river", "document": "the old city", "label": 1, "group": "x"}
OTHER = ROW | {"document": "a new engine", "label": 0}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([ROW, OTHER, {**ROW, "label": -1}], "row 3: label -1 is negative"),
        ([ROW, OTHER, {**ROW, "label": 1e300}], "row 3: label 1e+300 is too large; a grade is a"),
        ([ROW, OTHER, {**ROW, "label": float("nan")}], "row 3: label is missing (given: nan)"),
        ([ROW, OTHER, {**ROW, "label": "good"}], "row 3: label 'good' is a word, but row 1 has 1"),
        ([ROW, OTHER, {**ROW, "label": True}], "row 3: label True is a boolean, but row 1 has 1"),
        ([ROW, OTHER, {**ROW, "group": None}], "row 3: group must be the id of the row's query"),
        ([ROW, OTHER, {**ROW, "group": [1]}], "given: [1], a list"),
        ([ROW, OTHER, {**ROW, "document": None}], "row 3: document must be a string"),
        ([ROW, {**OTHER, "group": "y"}], "has 2 groups, and in none are there documents"),
        ([ROW, {**OTHER, "label": 1}], "no order is better than another"),
        ([{**ROW, "text": "a"}, OTHER | {"text": "b"}], "has both 'text' and 'query' with"),
    ],
)  # fmt: skip
def test_what_is_no_ranking_is_refused(tmp_path, rows, told):
    with pytest.raises(InputError) as error:
        read_task(write(tmp_path / "t.jsonl", rows))
    assert told in str(error.value)


def test_a_group_in_two_splits_is_refused_and_ids_used_again_are_not(tmp_path):
    train = write(tmp_path / "train.jsonl", [ROW, OTHER])
    dev = write(tmp_path / "dev.jsonl", [OTHER, ROW | {"document": "another"}])
    with pytest.raises(InputError, match=r"row 1: the group 'x' with its query is also in .*train"):
        read_task(train, dev)
    again = [row | {"query": "an engine"} for row in (ROW, OTHER)]
    assert len(read_task(train, write(tmp_path / "dev.jsonl", again))) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"group_field": "qid"}, "has no column 'qid'"),
        ({"problem": "ranking", "text_field": "query"}, "has one text a row, query"),
        ({"positive": 1}, "positive is for classes"),
    ],
)
def test_settings_that_do_not_fit_a_ranking_are_refused(tmp_path, settings, told):
    path = write(tmp_path / "t.jsonl", [ROW, OTHER])
    with pytest.raises(InputError, match=told):
        read_task(path, settings=parse_settings(FinetuneConfig, settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss": "pairwise", "problem": "classification"}, "loss is for documents in groups"),
        ({"loss": "pairwise", "text_field": "query"}, "leave loss: pairwise out"),
        (
            {"grade_temperature": 3, "problem": "regression"},
            "grade_temperature is for documents in groups",
        ),
        (
            {"grade_temperature": 3, "loss": "pointwise"},
            "grade_temperature belongs to loss: listwise, but loss is pointwise",
        ),
    ],
)
def test_settings_of_a_ranking_that_nothing_reads_are_refused_before_a_model(
    tmp_path, settings, told
):
    path = write(tmp_path / "t.jsonl", [ROW, OTHER])
    config = parse_settings(FinetuneConfig, settings)
    with pytest.raises(InputError, match=told):
        finetune("no/such/model", path, path, str(tmp_path / "out"), config=config)
    read_task(path, settings=FinetuneConfig(loss="listwise", problem="regression"))  # what is usual


# --- what is trained and scored -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "clicks"), [("listwise", False), ("pairwise", False), ("pointwise", True)]
)
def test_each_loss_makes_a_ranker_that_evaluate_scores_alike(
    files, bert, tmp_path, loss, clicks, one_thread
):
    train, dev = files(clicks)
    config = FinetuneConfig(epochs=4, batch_size=20, learning_rate=1e-2, loss=loss)
    out = str(tmp_path / "expert")
    result = finetune(bert, train, dev, out, config=config)
    assert (result.problem, result.metric) == ("ranking", "ndcg@10")
    scores = result.per_seed[0].scores
    assert [*scores] == ["ndcg@10", "mrr", "map"]
    lines = (tmp_path / "expert" / "predictions.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    by_group = {}
    for row in said:
        by_group.setdefault(row["group"], []).append((float(row["label"]), row["score"]))
    each = [zip(*pairs, strict=True) for pairs in by_group.values() if len(dict(pairs)) > 1]
    theirs = [ndcg_score([truth], [given], k=10) for truth, given in each]
    assert scores["ndcg@10"] == pytest.approx(np.mean(theirs), abs=1e-6)
    chance = find_weakness("ndcg@10", scores["ndcg@10"], np.zeros((60, 1)), read_task(dev)[0])
    assert scores["ndcg@10"] > chance.constant.score + 0.05
    config = AutoConfig.from_pretrained(out)
    assert (config.problem_type, config.num_labels) == ("regression", 1)
    found = evaluate_file(out, dev)
    assert (found.metric, found.scores) == ("ndcg@10", pytest.approx(scores, abs=1e-6))
    told = next_commands(out, result)[-1]
    assert "task: regression" in told
    assert "pairs: record" in told


def test_what_a_random_order_gets_is_called_weak(tmp_path):
    data = read_task(write(tmp_path / "t.jsonl", rows_of("dev", 20)))[0]
    noise = np.random.default_rng(1).normal(size=(len(data), 1)).astype(np.float32)
    weak = find_weakness("ndcg@10", 0.75, noise, data)
    assert weak is not None
    assert "that of guessing" in str(weak)
    assert find_weakness("ndcg@10", 1.0, data.labels[:, None], data) is None


def test_a_group_larger_than_a_batch_is_a_step_of_its_own_and_that_is_said(
    files, bert, tmp_path, caplog
):
    train, dev = files(train=6, dev=3)
    config = FinetuneConfig(epochs=1, batch_size=3)
    result = finetune(bert, train, dev, str(tmp_path / "expert"), config=config)
    assert result.per_seed[0].epochs[0]["steps"] == 6
    assert "the largest group has 5 documents, more than batch_size 3" in caplog.text
