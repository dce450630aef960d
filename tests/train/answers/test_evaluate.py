"""Scores on labelled rows without a train file: the labels are the model's own, by name."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rekindle.data.errors import InputError
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.answers.judge import open_judge
from rekindle.train.answers.labelled import read_labelled
from rekindle.train.answers.perplexity import text_perplexity
from rekindle.train.answers.predict import predict_file
from rekindle.train.finetune.config import FinetuneConfig, TaskSettings
from rekindle.train.finetune.run import finetune
from rekindle.train.student import ABOUT_FILE
from testlib.answers.judges import LABELS, classifier, lines, write


@pytest.fixture
def trained(tmp_path, make_model, wordpiece):
    """trained(rows, **settings): an expert of them, and finetune's result on the same rows."""

    def make(rows, family="bert", tokenizer=wordpiece, **settings):
        kind = "AutoModelForCausalLM" if family == "gpt2" else "AutoModelForMaskedLM"
        model = str(make_model(family, kind, tokenizer, initializer_range=0.1))
        file, config = write(tmp_path / "rows.jsonl", rows), FinetuneConfig(max_steps=2, **settings)
        return finetune(model, file, file, str(tmp_path / "expert"), config=config)

    return make


def rows_of(*labels, words=4):
    return [
        {"text": "the river " * (words + n), "label": label, "id": n}
        for n, label in enumerate(labels * 4)
    ]


@pytest.mark.covering
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (rows_of("spam", "ham"), {"positive": "ham", "max_length": 12}),
        (rows_of(3, 10, 20), {}),
        (rows_of("True", "False"), {}),
        (rows_of("09", "10"), {}),
        (rows_of(0.25, 1.5, 1.0), {}),
        (rows_of([0.5, 1.25], [1.0, 0.0]), {}),
        (
            [{"sentence1": "a river", "sentence2": f"of {n}", "label": n % 2} for n in range(9)],
            {"metric": "f1"},
        ),
    ],
)
def test_it_gives_what_finetune_gave_on_dev(tmp_path, trained, bytelevel, family, rows, settings):
    """Whatever the labels look like, with texts that are cut, at the length they were cut at."""
    given = {k: v for k, v in settings.items() if k != "metric"}
    how = {"family": family, "tokenizer": bytelevel} if family == "gpt2" else {}
    result = trained(rows, **given, **how)
    expert, test = str(tmp_path / "expert"), str(tmp_path / "rows.jsonl")
    out = tmp_path / "said.jsonl"
    found = evaluate_file(expert, test, metric=settings.get("metric"), out=str(out))
    assert found.scores == result.per_seed[0].scores  # to the last digit
    assert (found.metric, found.cut) == (settings.get("metric", result.metric), result.cut["dev"])
    assert found.cut > 0 or "max_length" not in settings
    for one, before in zip(lines(out), lines(Path(expert) / "predictions.jsonl"), strict=True):
        assert one.keys() == before.keys()
        assert one.get("label") == before.get("label")
        scores = [value.get("score", value.get("scores")) for value in (one, before)]
        assert scores[0] is scores[1] is None or scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_one_class_and_fewer_than_the_model_knows_are_enough(tmp_path, make_model, wordpiece):
    expert = classifier(make_model, wordpiece, 2, *LABELS)
    model = AutoModelForSequenceClassification.from_pretrained(expert).eval()
    tokenizer = AutoTokenizer.from_pretrained(expert)
    for labels in (["sun"], ["rain", "cat"]):
        rows = [{"text": t, "label": labels[n % len(labels)]} for n, t in enumerate(TEXTS)]
        found = evaluate_file(expert, write(tmp_path / "rows.jsonl", rows))
        with torch.no_grad():
            each = [model(**tokenizer(row["text"], return_tensors="pt")).logits[0] for row in rows]
        right = [LABELS[int(z.argmax())] == r["label"] for z, r in zip(each, rows, strict=True)]
        assert found.scores["accuracy"] == pytest.approx(sum(right) / len(right))
        assert found.label_names == LABELS
        assert all(map(math.isfinite, found.scores.values()))


TEXTS = ["the river", "a city", "light falls", "old water", "paper", "an engine runs", "the old"]


@pytest.mark.parametrize("label", ["snow", "Sun", 1, 0.5, None])
def test_a_label_that_the_model_does_not_know_names_its_row(experts, tmp_path, label):
    file = write(tmp_path / "t.jsonl", [{"text": "a", "label": one} for one in ("sun", label)])
    with pytest.raises(InputError, match=r"row 2: .*(does not know the label|is missing)"):
        evaluate_file(experts[1], file)


def test_many_unknown_labels_are_summed_up_and_the_advice_works(experts, tmp_path):
    strange = ["snow", "hail: wet", "fog"] * 3
    rows = [{"text": "a", "label": one} for one in ("dog", *strange, "sun")]
    file = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(InputError) as caught:
        evaluate_file(experts[1], file)
    told = str(caught.value)
    assert "row 2, 3, 4, 5, 6 … (9 rows)" in told
    assert "it knows 3: rain, sun, dog" in told
    setting = told.rpartition("--set ")[2]
    assert setting == """'drop_labels=["snow", "hail: wet", "fog"]'"""
    dropped = AskConfig(drop_labels=("snow", "hail: wet", "fog"))
    found = evaluate_file(experts[1], file, config=dropped)
    assert (found.rows, found.dropped) == (2, {"snow": 3, "hail: wet": 3, "fog": 3})


def test_labels_are_known_however_a_file_writes_them(tmp_path, make_model, wordpiece):
    """Also the numbers of outputs that have no names of their own."""
    for names, labels, expected in (
        (("0", "1", "2"), [1, "2", 0.0, "1.0"], [1, 2, 0, 1]),
        (("false", "true"), [True, "False", "TRUE"], [1, 0, 1]),
        (("1.10", "1.2"), ["1.10", "1.2"], [0, 1]),
        (("LABEL_0", "LABEL_1"), [1, "0", 1], [1, 0, 1]),
        (("LABEL_0", "LABEL_1"), ["LABEL_1"], [1]),
    ):
        judge = open_judge(classifier(make_model, wordpiece, 3, *names))
        file = write(tmp_path / "t.jsonl", [{"text": "a", "label": one} for one in labels])
        assert read_labelled(file, judge, TaskSettings()).labels.tolist() == expected


def test_scores_and_classes_are_told_apart(tmp_path, experts, make_model, wordpiece):
    scorer = classifier(make_model, wordpiece, 4, "x", problem_type="regression")
    classes = write(tmp_path / "c.jsonl", [{"text": "a", "label": "cat"}])
    scores = write(
        tmp_path / "s.jsonl", [{"text": t, "label": 0.5 + n} for n, t in enumerate(TEXTS)]
    )
    with pytest.raises(InputError, match="row 1: label 'cat' is not a number"):
        evaluate_file(scorer, classes)
    with pytest.raises(InputError, match=r"'0\.5', '1\.5'.* knows none of the file's labels"):
        evaluate_file(experts[0], scores)
    assert evaluate_file(scorer, scores, metric="spearman").metric == "spearman"
    with pytest.raises(InputError, match="metric 'f1' does not fit"):
        evaluate_file(scorer, scores, metric="f1")


def test_how_it_was_fine_tuned_is_taken_over_and_said(tmp_path, trained, caplog):
    rows = [{"question": row["text"], "kind": row["label"]} for row in rows_of("spam", "ham")]
    given = {"text_columns": ("question",), "label_column": "kind", "positive": "ham"}
    result = trained(rows, **given)
    expert = str(tmp_path / "expert")
    caplog.set_level("INFO", "rekindle")
    found = evaluate_file(expert, str(tmp_path / "rows.jsonl"))
    assert found.scores == pytest.approx(result.per_seed[0].scores)
    told = 'as it was fine-tuned: positive=ham, text_field=["question"], label_field=kind, '
    told += "batch_size=16"
    assert told in caplog.text
    plain = write(tmp_path / "plain.jsonl", rows_of("spam", "ham"))
    assert evaluate_file(expert, plain).rows == 8
    with pytest.raises(InputError, match="positive is 'eggs'"):
        evaluate_file(expert, plain, config=AskConfig(positive="eggs"))


def test_pairs_and_single_texts_are_not_taken_for_each_other(tmp_path, trained):
    rows = rows_of("spam", "ham")
    trained([{"sentence1": row["text"], "sentence2": "a", "label": row["label"]} for row in rows])
    with pytest.raises(InputError, match=r"fine-tuned on pairs of texts, but .* has single texts"):
        evaluate_file(str(tmp_path / "expert"), write(tmp_path / "plain.jsonl", rows))
    (tmp_path / "x.txt").write_text("the river\n")
    with pytest.raises(InputError, match=r"a txt has no columns; give a jsonl, csv, tsv or parq"):
        predict_file(str(tmp_path / "expert"), str(tmp_path / "x.txt"), str(tmp_path / "o.jsonl"))


def test_scores_that_are_all_the_same_are_said_to_have_no_correlation(
    tmp_path, make_model, wordpiece, caplog
):
    scorer = classifier(make_model, wordpiece, 4, "x", problem_type="regression")
    file = write(tmp_path / "s.jsonl", [{"text": t, "label": 2.5} for t in TEXTS])
    assert evaluate_file(scorer, file).value == 0
    assert f"every score of {file} is 2.5: a correlation is not defined" in caplog.text


@pytest.mark.usefixtures("student")
def test_a_students_head_reads_what_it_was_trained_with_and_says_what_is_cut(
    tmp_path, folder, task, caplog
):
    """As its export does; more of a text is read on request."""
    short = Path(shutil.copytree(folder / "student", tmp_path / "short"))
    about = json.loads((short / ABOUT_FILE).read_text())
    (short / ABOUT_FILE).write_text(json.dumps(about | {"sequence_length": 5}))
    found = evaluate_file(str(short), task, head="a+b")
    assert found.cut > 0
    assert f"texts are cut at 5 tokens: {found.cut:.1%} of {task} (the longest has " in caplog.text
    whole = evaluate_file(str(short), task, head="a+b", config=AskConfig(max_length=64))
    before = evaluate_file(str(folder / "student"), task, head="a+b")
    assert (whole.cut, before.cut) == (0, 0)
    assert whole.scores == before.scores


def test_nothing_is_written_where_it_fails(tmp_path, experts):
    file, out = write(tmp_path / "t.jsonl", [{"text": "a", "label": "snow"}]), tmp_path / "o.jsonl"
    with pytest.raises(InputError):
        evaluate_file(experts[0], file, out=str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.usefixtures("student")
def test_a_wrong_column_is_named_before_a_model_is_loaded(
    tmp_path, folder, make_model, wordpiece, monkeypatch
):
    for name in ("evaluate", "predict"):
        monkeypatch.setattr(f"rekindle.train.answers.{name}.open_text_judge", None)
    monkeypatch.setattr("rekindle.train.answers.perplexity.open_language_model", None)
    expert = classifier(make_model, wordpiece, 2, *LABELS)
    config = AskConfig(text_field=["txt"])
    for suffix in ("jsonl", "csv"):
        file, out = str(tmp_path / f"t.{suffix}"), str(tmp_path / "o.jsonl")
        row = json.dumps({"text": "a", "label": "cat"})
        Path(file).write_text("text,label\na,cat\n" if suffix == "csv" else row)
        for model, head in ((expert, None), (str(folder / "student"), "a+b")):
            for ask in (
                lambda m, h, f=file: evaluate_file(m, f, head=h, config=config),
                lambda m, h, f=file, o=out: predict_file(m, f, o, head=h, config=config),
            ):
                with pytest.raises(InputError, match=r"no column 'txt' .*did you mean 'text'"):
                    ask(model, head)
        with pytest.raises(InputError, match=r"no column 'name of labels'.*--label-field"):
            evaluate_file(expert, file, config=AskConfig(label_field="name of labels"))
        with pytest.raises(InputError, match=r"txt.*--text-field"):
            text_perplexity(expert, file, text_field="txt")
