"""A fine-tuned ranker teaches a corpus of groups: its cached scores are those of a forward pass by
transformers alone, and rank as `pipeline evaluate` says.
"""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.run import finetune
from rekindle.train.ranking.scores import ranking_scores

WORDS = ["the", "old", "river", "runs", "under", "a", "new", "city", "and", "light", "falls"]


def rows_of(split, queries):
    draw = np.random.default_rng(len(split))
    for query in range(queries):
        asked = [str(word) for word in draw.choice(WORDS, 2, replace=False)]
        for number in range(4):
            grade = int(draw.integers(0, 3)) if number else 2
            words = [*draw.choice(WORDS, 2 + number), *asked[:grade]]
            row = {"query": " ".join(asked), "document": " ".join(words), "label": grade}
            yield row | {"group": f"{split}{query}", "id": f"{split}{query}-{number}"}


def test_a_rankers_cached_scores_are_those_of_a_forward_pass(
    tmp_path, make_model, wordpiece, one_thread
):
    files, model = {}, make_model("bert", "AutoModelForMaskedLM", wordpiece)
    for split, queries in (("train", 6), ("dev", 4), ("corpus", 9)):
        files[split] = tmp_path / f"{split}.jsonl"
        files[split].write_text("\n".join(map(json.dumps, rows_of(split, queries))))
    expert, config = tmp_path / "expert", FinetuneConfig(epochs=1)
    finetune(str(model), str(files["train"]), str(files["dev"]), str(expert), config=config)
    corpus = {"source": [str(files["corpus"])], "text_field": "query", "pair_field": "document"}
    corpus |= {"group_field": "group", "tokenizer": str(wordpiece), "sequence_length": 24}
    teacher = {"name": "ranker", "model": str(expert), "task": "regression"}
    cache = {"path": str(tmp_path / "cache"), "sequences_per_shard": 8}
    cache_teachers(
        parse_settings(RunConfig, {"corpus": corpus, "cache": cache, "teachers": [teacher]})
    )
    made, rows = Cache.open(tmp_path / "cache"), [*rows_of("corpus", 9)]
    network = AutoModelForSequenceClassification.from_pretrained(expert).eval()
    tokenizer = AutoTokenizer.from_pretrained(expert)
    order = np.random.default_rng(0).permutation(len(made))
    batch = made.gather(order, ["ranker"])
    said = batch.targets["ranker"].logits[:, 0]
    with torch.no_grad():
        for number, score in zip(order, said, strict=True):
            row = rows[number]
            inputs = tokenizer(row["query"], row["document"], return_tensors="pt")
            assert network(**inputs).logits.item() == pytest.approx(score, abs=1e-5)
    assert [*batch.groups] == [rows[number]["group"] for number in order]
    names = {name: at for at, name in enumerate(dict.fromkeys(batch.groups))}
    groups = np.array([names[name] for name in batch.groups])
    grades = np.array([rows[number]["label"] for number in order], np.float32)
    found = evaluate_file(str(expert), str(files["corpus"]))
    assert ranking_scores(said, grades, groups) == pytest.approx(found.scores, abs=1e-5)
