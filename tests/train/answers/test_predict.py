"""What is said of every row of a file: the same as evaluate's, whatever the file and the model."""

import csv
import gzip
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rekindle.data.errors import InputError
from rekindle.train.answers import judge
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.answers.predict import predict_file
from rekindle.train.finetune import classifier as classifier_module
from testlib.answers.judges import LABELS, classifier, lines, write

TEXTS = ["the river", "a city", "light falls " * 9, "old water", "paper", "", "the [SEP] old"]


@pytest.fixture
def few_at_a_time(monkeypatch):
    monkeypatch.setattr(judge, "ROWS_AT_A_TIME", 3)
    monkeypatch.setattr("rekindle.train.answers.predict.ROWS_AT_A_TIME", 3)


@pytest.fixture
def expert(make_model, wordpiece):
    return classifier(make_model, wordpiece, 2, *LABELS)


def as_csv(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "t.jsonl": write,
    "t.csv": as_csv,
    "t.tsv": lambda path, rows: as_csv(path, rows, "\t"),
    "t.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "t.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    ),
}


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("name", WRITERS)
def test_every_row_of_every_kind_of_file_has_a_line_in_its_order(tmp_path, expert, name):
    rows = [{"id": str(n), "text": text, "when": "now"} for n, text in enumerate(TEXTS)]
    WRITERS[name](tmp_path / name, rows)
    found = predict_file(expert, str(tmp_path / name), str(tmp_path / "out.jsonl"))
    said = lines(tmp_path / "out.jsonl")
    assert [{k: one[k] for k in ("id", "text", "when")} for one in said] == rows
    assert [[*one] for one in said] == [[*rows[0], "label", "probabilities"]] * len(rows)
    assert found.rows == len(rows)
    assert sum(found.said.values()) == len(rows)
    assert [*found.said.values()] == sorted(found.said.values(), reverse=True)


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("family", ["bert", "gpt2", "electra"])
def test_labels_are_those_of_evaluate_and_of_transformers_alone(
    tmp_path, make_model, wordpiece, bytelevel, family
):
    """Texts of all lengths together, some of them cut: padding and blocks change nothing."""
    tokenizer = bytelevel if family == "gpt2" else wordpiece
    expert = classifier(make_model, tokenizer, 2, *LABELS, family=family)
    rows = [{"text": text, "label": LABELS[n % 4]} for n, text in enumerate(TEXTS) if text]
    file, config = write(tmp_path / "t.jsonl", rows), AskConfig(max_length=12, batch_size=2)
    found = predict_file(expert, file, str(tmp_path / "p.jsonl"), config=config)
    scores = evaluate_file(expert, file, out=str(tmp_path / "e.jsonl"), config=config)
    said, scored = lines(tmp_path / "p.jsonl"), lines(tmp_path / "e.jsonl")
    assert [one["label"] for one in said] == [one["label"] for one in scored]
    assert found.renamed == {"label": "given_label"}
    right = [one["label"] == one["given_label"] for one in said]
    assert scores.scores["accuracy"] == pytest.approx(np.mean(right))
    assert found.cut == scores.cut > 0
    model = AutoModelForSequenceClassification.from_pretrained(expert).eval()
    slow = AutoTokenizer.from_pretrained(expert)
    for row, one in zip(rows, said, strict=True):
        inputs = slow(
            row["text"], truncation=True, max_length=12, split_special_tokens=True,
            return_tensors="pt", return_token_type_ids=False,
        )  # fmt: skip
        with torch.no_grad():
            probs = torch.softmax(model(**inputs).logits[0], dim=0)
        assert [*one["probabilities"].values()] == pytest.approx(probs.tolist(), abs=1e-4)


@pytest.mark.usefixtures("few_at_a_time")
def test_models_that_padding_changes_see_texts_of_one_length_together(
    tmp_path, expert, monkeypatch
):
    asked = []

    def moved(model):
        asked.append(model)
        return 1.0

    monkeypatch.setattr(classifier_module, "padding_influence", moved)
    widths = []
    collate = classifier_module.collate

    def watched(encoded, rows, device):
        widths.append({*encoded.lengths[rows].tolist()})
        return collate(encoded, rows, device)

    monkeypatch.setattr(classifier_module, "collate", watched)
    predict_file(
        expert, write(tmp_path / "t.jsonl", [{"text": t} for t in TEXTS]), str(tmp_path / "o")
    )
    assert asked
    assert all(len(width) == 1 for width in widths)


def test_a_line_of_a_txt_file_is_a_text(tmp_path, expert):
    (tmp_path / "t.txt").write_bytes("\ufeffthe river\r\n\n  \na city\nold".encode())
    found = predict_file(expert, str(tmp_path / "t.txt"), str(tmp_path / "o.jsonl"))
    assert found.summary().startswith("3 rows (each line is one text): ")
    assert [one["text"] for one in lines(tmp_path / "o.jsonl")] == ["the river", "a city", "old"]


def test_pairs_scores_and_columns_by_name(tmp_path, make_model, wordpiece):
    scorer = classifier(make_model, wordpiece, 4, "x", problem_type="regression")
    rows = [{"premise": "the river", "then": text} for text in TEXTS]
    config = AskConfig(text_field=("premise", "then"))
    file = write(tmp_path / "t.jsonl", rows)
    predict_file(scorer, file, str(tmp_path / "o.jsonl"), config=config)
    model = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    tokenizer = AutoTokenizer.from_pretrained(scorer)
    for row, one in zip(rows[:5], lines(tmp_path / "o.jsonl"), strict=False):
        inputs = tokenizer(*row.values(), return_tensors="pt")
        with torch.no_grad():
            assert one == row | {"score": pytest.approx(float(model(**inputs).logits), abs=1e-4)}
    with pytest.raises(InputError, match="has no column 'text', 'sentence1' or 'tokens'"):
        predict_file(scorer, file, str(tmp_path / "n.jsonl"))


def test_rows_may_be_piped_in(tmp_path, expert):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    thread = threading.Thread(target=pipe.write_text, args=(content,))
    thread.start()
    found = predict_file(expert, str(pipe), str(tmp_path / "o.jsonl"))
    thread.join()
    assert found.rows == len(TEXTS)
    assert [one["text"] for one in lines(tmp_path / "o.jsonl")] == TEXTS


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "has no rows; give at least one text"),
        ([{"txt": "a"}], "has no column 'text', 'sentence1' or 'tokens'"),
        ([{"text": "a"}] * 4 + [{"text": 5}], "row 5: text must be a string"),
        ([{"text": "a"}] * 4 + [{"other": "a"}], "row 5: text must be a string"),
        ([{"text": "a"}] * 4 + [{"text": "\ud800"}], "row 5: character 1 of the text is half"),
        ([{"text": "a", "label": 1, "given_label": 2}], "the columns 'label' and 'given_label'"),
    ],
)
@pytest.mark.usefixtures("few_at_a_time")
def test_a_row_that_is_none_is_found_before_anything_is_judged(
    tmp_path, expert, monkeypatch, rows, told
):
    monkeypatch.setattr(judge.Expert, "logits", lambda *_: pytest.fail("asked"))
    file = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(InputError, match=told):
        predict_file(expert, file, str(tmp_path / "o.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_what_is_there_stays_unless_by_force_and_where_work_breaks_off(
    tmp_path, expert, monkeypatch
):
    file, out = write(tmp_path / "t.jsonl", [{"text": "a"}] * 7), tmp_path / "o.jsonl"
    out.write_text('{"score": 1}\n')
    with pytest.raises(InputError, match="already exists; give another --out, or --force"):
        predict_file(expert, file, str(out))
    with pytest.raises(InputError, match="is a folder"):
        predict_file(expert, file, str(tmp_path), force=True)
    monkeypatch.setattr("rekindle.train.answers.predict.ROWS_AT_A_TIME", 2)
    calls = iter(range(3))

    def broken(self, encoded, batch_size):
        next(calls)
        return np.zeros((len(encoded.input_ids), 4), np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(judge.Expert, "logits", broken)
        with pytest.raises(StopIteration):
            predict_file(expert, file, str(out), force=True)
    assert out.read_text() == '{"score": 1}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", "o.jsonl"}
    predict_file(expert, file, str(out), force=True)
    assert len(lines(out)) == 7


def test_a_students_head_says_what_it_says_in_training(tmp_path, folder, student, task):
    out = tmp_path / "o.jsonl"
    found = predict_file(str(folder / "student"), task, str(out), head="a+c")
    assert found.head == "a+c"
    names = student.head_configs["a+c"].label_names
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "student"))
    for one in lines(out):
        inputs = tokenizer(one["text"], return_tensors="pt")
        with torch.no_grad():
            logits = student(inputs, sequence_heads=["a+c"]).logits["a+c"][0]
        assert one["label"] == names[int(logits.argmax())]
        expected = torch.softmax(logits, dim=0).tolist()
        assert one["probabilities"] == dict(
            zip(names, [pytest.approx(p, abs=1e-5) for p in expected], strict=True)
        )
    scores = evaluate_file(str(folder / "student"), task, head="a+c")
    right = [one["label"].split("/")[1] == one["given_label"] for one in lines(out)]
    assert scores.scores["accuracy"] == pytest.approx(np.mean(right))


def test_a_student_of_an_older_version_is_asked_all_the_same(tmp_path, folder, student, task):
    """Its file says nothing of methods and domains, its heads nothing of their problem."""
    old = Path(shutil.copytree(folder / "student", tmp_path / "old"))
    about = json.loads((old / "rekindle_student.json").read_text())
    for key in ("methods", "domains"):
        about.pop(key, None)
    for one in about["heads"].values():
        one.pop("problem")
    (old / "rekindle_student.json").write_text(json.dumps(about))
    for name, outputs in (("a+b", "probabilities"), ("score", "score")):
        for which, directory in (("old", old), ("new", folder / "student")):
            predict_file(str(directory), task, str(tmp_path / f"{which}-{name}"), head=name)
        assert lines(tmp_path / f"old-{name}") == lines(tmp_path / f"new-{name}")
        assert outputs in lines(tmp_path / f"old-{name}")[0]
