"""A regression of several scores: cached, taught by squared error, shown and evaluated."""

import json

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.inspect import inspect_example
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.student import Student


def test_an_expert_of_three_scores_teaches_a_head_of_three(tmp_path, configure, make_teacher):
    about = {"num_labels": 3, "problem_type": "regression"}
    expert = make_teacher("scores", "regression", config=about)
    lm = make_teacher("lm", "masked_lm")
    values = configure(tmp_path / "c", [expert]).model_dump(mode="json") | {
        "student": {"model": lm["model"]},
        "train": {
            "steps": 60,
            "batch_sequences": 12,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "objective": {"hard": {"weight": 0.0}, "distill": [{"teachers": ["scores"]}]},
        },
    }
    run = parse_settings(RunConfig, values)
    cache_teachers(run)
    cache = Cache.open(tmp_path / "c")
    info = cache.teacher("scores").info
    assert (info.problem, info.num_labels) == ("regression", 3)
    tokenizer = AutoTokenizer.from_pretrained(expert["model"])
    model = AutoModelForSequenceClassification.from_pretrained(expert["model"]).eval()
    for number in range(len(cache)):
        example = cache.example(number)
        with torch.no_grad():
            wanted = model(**tokenizer(example.text, return_tensors="pt")).logits[0].numpy()
        found = example.targets["scores"][0].logits
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    shown = inspect_example(str(tmp_path / "c"), 0, None)
    assert "scores: score LABEL_0 " in shown
    result = train_from_config(run, tmp_path / "run")
    assert result is not None
    head = Student.from_pretrained(str(tmp_path / "run")).head_configs["scores"]
    assert (head.num_labels, head.problem) == (3, "regression")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
