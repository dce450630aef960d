"""What a fine-tuning understood of its files: said, and written beside the scores."""

import json

import numpy as np
import pytest
from transformers import AutoConfig

from rekindle.data.errors import InputError
from rekindle.train.answers.score import evaluate, score_model
from rekindle.train.finetune.run import FinetuneConfig, finetune
from rekindle.train.finetune.task_data import read_task


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def bert(make_model, wordpiece):
    return str(make_model("bert", "AutoModelForMaskedLM", wordpiece, initializer_range=0.1))


@pytest.fixture
def spam(tmp_path):
    """Ten texts, every fifth of them longer, two without a label."""
    labels = ["spam", "ham", "ham", "-", "spam"] * 2
    texts = ["river " * (30 if n % 5 == 0 else 4) for n in range(10)]
    rows = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    return write(tmp_path / "spam.jsonl", rows)


def test_it_is_said_and_written_what_labels_mean_and_what_is_cut(tmp_path, bert, spam, caplog):
    given = {"drop_labels": ["-"], "positive": "ham", "max_length": 10, "max_steps": 1}
    with caplog.at_level("INFO", logger="rekindle"):
        out = str(tmp_path / "out")
        result = finetune(bert, spam, spam, out, metric="f1", config=FinetuneConfig(**given))
    for told in (
        "train: classification: 8 rows (2 of '-' left out), 2 classes: ham 4, spam 4; F1 is that "
        "of 'ham'",
        "texts are cut at 10 tokens: 25.0% of train, 25.0% of dev (the longest has 32); what "
        "follows is never read: max_length=32 reads all",
    ):
        assert told in caplog.text
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    counts = {"ham": 4, "spam": 4}
    assert written["class_counts"] == {"train": counts, "dev": counts}
    assert (written["positive"], written["cut"]) == ("ham", {"train": 0.25, "dev": 0.25})
    assert written["dropped"] == {"train": {"-": 2}, "dev": {"-": 2}}
    assert (result.metric, result.problem) == ("f1", "single_label_classification")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    given_labels = [json.loads(line)["given_label"] for line in lines]
    assert given_labels == ["spam", "ham", "ham", "spam"] * 2  # the others have no line
    again = score_model(
        out, spam, spam, str(tmp_path / "s"), config=FinetuneConfig(**given, epochs=0)
    )
    assert again.per_seed[0].scores["f1"] == pytest.approx(result.mean)
    assert again.cut == {"dev": 0.25}


def test_f1_of_two_names_is_refused_until_one_is_positive(tmp_path, bert, spam):
    given = (bert, spam, spam, str(tmp_path / "out"))
    with pytest.raises(InputError, match="positive=spam"):
        finetune(*given, metric="f1", config=FinetuneConfig(drop_labels="-"))
    config = FinetuneConfig(drop_labels="-", max_steps=1)
    assert finetune(*given, config=config).per_seed[0].scores.keys() == {"accuracy", "matthews"}


def test_texts_are_cut_only_where_the_model_takes_no_more(tmp_path, bert, caplog):
    limit = AutoConfig.from_pretrained(bert).max_position_embeddings
    for tokens, cut in ((limit, 0.0), (limit + 1, 0.5)):
        texts = ["river", " ".join(["river"] * (tokens - 2))]
        rows = [{"text": text, "label": n} for n, text in enumerate(texts)]
        path = write(tmp_path / "long.jsonl", rows)
        out = str(tmp_path / f"out-{tokens}")
        result = finetune(bert, path, path, out, config=FinetuneConfig(max_steps=1))
        assert result.cut == {"train": cut, "dev": cut}
        told = f"texts are cut at {limit} tokens: 50.0% of train"
        assert (told in caplog.text) == bool(cut)
        assert ("never read: the model takes no more" in caplog.text) == bool(cut)


def test_several_scores_are_learnt_scored_and_written(tmp_path, bert):
    """The scores of a text are how often two words occur in it."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(160):
        counts = draw.integers(4, size=2)
        text = draw.permutation(["light"] * counts[0] + ["paper"] * counts[1] + ["the"])
        rows.append({"text": " ".join(text), "label": [float(c) + 0.5 for c in counts]})
    train, dev = (write(tmp_path / f"{n}.jsonl", r) for n, r in (("t", rows), ("d", rows[:40])))
    out, config = str(tmp_path / "out"), {"epochs": 8, "batch_size": 16, "learning_rate": 1e-2}
    result = finetune(bert, train, dev, out, config=FinetuneConfig(**config))
    assert result.mean > 0.7
    saved = AutoConfig.from_pretrained(out)
    assert (saved.num_labels, saved.problem_type) == (2, "regression")
    line = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert line["label"] == rows[0]["label"]  # nothing that is said is called so
    assert len(line["scores"]) == 2
    scores, _ = evaluate(out, read_task(train, dev)[1])
    assert scores == pytest.approx(result.per_seed[0].scores, abs=1e-6)
    one = write(tmp_path / "one.jsonl", [{"text": "light", "label": 0.5}] * 2)
    with pytest.raises(InputError, match="2 outputs"):
        evaluate(out, read_task(one)[0])
    saved.problem_type = None  # as most classifiers from elsewhere have it
    saved.save_pretrained(out)
    with pytest.raises(InputError, match=r"may be classes.*\"problem_type\": \"regression\""):
        evaluate(out, read_task(train, dev)[1])


def test_the_longest_text_counts_a_special_tokens_name_as_text(tmp_path, bert, caplog):
    rows = [{"text": "[MASK] " * 8, "label": n} for n in (0, 1)]
    path, config = write(tmp_path / "t.jsonl", rows), FinetuneConfig(max_steps=1, max_length=12)
    finetune(bert, path, path, str(tmp_path / "out"), config=config)
    assert "(the longest has 42)" in caplog.text  # five each, and two around them
