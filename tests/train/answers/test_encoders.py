"""Sentence encoders that are asked: cosines of pairs against scores, and vectors of texts."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from rekindle.data.errors import InputError
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.answers.predict import predict_file
from rekindle.train.embedding.texts import TextEncoder, describe_encoder
from testlib.encoders import encoder_folder

FIRST = ["the old river runs", "a small engine", "the city", "it was found", "a tree of the city"]
SECOND = ["a river that runs", "the old engine falls", "a tree", "it was lost", "a city tree"]


@pytest.fixture
def encoder(tmp_path, make_model, wordpiece):
    model = make_model("bert", "AutoModel", wordpiece)
    about = {"prompts": {"query": "ask: ", "passage": "said: "}}
    return str(encoder_folder(tmp_path / "e", model, {"pooling_mode": "mean"}, about=about))


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {"text_a": a, "text_b": b, "label": float(n)}
        for n, (a, b) in enumerate(zip(FIRST, SECOND, strict=True))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ASKED = AskConfig(text_field=["text_a", "text_b"])


def cosines(model: str) -> np.ndarray:
    encoder = TextEncoder.of(describe_encoder(model))
    a, b = (encoder.vectors(texts).astype(np.float64) for texts in (FIRST, SECOND))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_pairs_are_scored_by_the_rank_correlation_of_their_cosines(tmp_path, encoder, pairs):
    out = tmp_path / "out.jsonl"
    found = evaluate_file(encoder, pairs, config=ASKED, out=str(out))
    expected = cosines(encoder)
    assert found.metric == "spearman"
    assert found.value == pytest.approx(spearmanr(expected, np.arange(5)).statistic)
    said = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    assert np.abs(np.array(said) - expected).max() < 1e-6


def test_a_plain_encoder_is_scored_by_the_pooling_that_is_said(make_model, wordpiece, pairs):
    model = str(make_model("bert", "AutoModel", wordpiece))
    values = [
        evaluate_file(model, pairs, config=ASKED.model_copy(update={"pooling": mode})).scores
        for mode in ("mean", "cls")
    ]
    assert values[0] != values[1]


def test_predict_writes_the_vector_of_each_text_or_the_cosine_of_each_pair(
    tmp_path, encoder, pairs
):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in FIRST))
    predict_file(encoder, str(texts), str(tmp_path / "v.jsonl"))
    found = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    exact = TextEncoder.of(describe_encoder(encoder)).vectors(FIRST)
    assert np.array_equal(np.array([row["vector"] for row in found], np.float32), exact)
    assert [row["text"] for row in found] == FIRST
    predict_file(encoder, pairs, str(tmp_path / "c.jsonl"), config=ASKED)
    said = [json.loads(line)["score"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert np.abs(np.array(said) - cosines(encoder)).max() < 1e-6


def test_what_an_encoder_cannot_be_asked_is_refused(tmp_path, encoder, make_model, wordpiece):
    single = tmp_path / "single.jsonl"
    single.write_text('{"text": "a", "label": 1.0}\n{"text": "b", "label": 2.0}\n')
    with pytest.raises(InputError, match="two columns with --text-field"):
        evaluate_file(encoder, str(single))
    plain = str(make_model("bert", "AutoModel", wordpiece))
    asked = AskConfig(pooling="mean")
    with pytest.raises(InputError, match=r"Set pooling .* and normalise"):
        predict_file(plain, str(single), str(tmp_path / "x.jsonl"), config=asked)
    with pytest.raises(InputError, match="modules say pooling: mean, not cls"):
        predict_file(
            encoder, str(single), str(tmp_path / "x.jsonl"), config=AskConfig(pooling="cls")
        )


def test_a_search_is_scored_within_groups_with_the_prompts_of_queries_and_documents(
    tmp_path, encoder
):
    rows = [
        {"q": FIRST[n % 3], "d": text, "label": (n // 3 + n) % 3, "group": f"g{n % 3}"}
        for n, text in enumerate([*SECOND, *FIRST])
    ]
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = AskConfig(text_field=["q", "d"], group_field="group")
    found = evaluate_file(encoder, str(path), config=asked)
    text = TextEncoder.of(describe_encoder(encoder, prompt=""))
    sides = [
        text.vectors([prompt + row[field] for row in rows]).astype(np.float64)
        for prompt, field in (("ask: ", "q"), ("said: ", "d"))
    ]
    a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    cosine, values = (a * b).sum(1), []
    for group in range(3):
        own = np.arange(group, len(rows), 3)
        gains = np.array([rows[n]["label"] for n in own])[np.argsort(-cosine[own])]
        discounts = 1 / np.log2(np.arange(len(own)) + 2)
        values.append(gains @ discounts / (np.sort(gains)[::-1] @ discounts))
    assert found.metric == "ndcg@10"
    assert found.value == pytest.approx(np.mean(values))
