"""A model that has learnt half of what it reads, its clean targets and its hard masks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from testlib.self_evolution import HARD, examples


@pytest.fixture(scope="session")
def learn(tmp_path_factory, make_model, wordpiece, configure):
    """learn(seed) -> a model that has learnt to read every second word of those it sees."""

    def make(seed: int) -> Path:
        start = make_model("bert", "AutoModelForMaskedLM", wordpiece, seed, initializer_range=0.1)
        path = tmp_path_factory.mktemp("learnt")
        shutil.copytree(start, path, dirs_exist_ok=True)
        text = tmp_path_factory.mktemp("text")
        cache_teachers(configure(text, []))
        rows = [torch.tensor(e.input_ids.astype(np.int64)) for e in examples(text)]
        labels = pad_sequence(rows, batch_first=True, padding_value=-1)
        there = labels >= 0
        inputs = {"input_ids": labels.clamp_min(0), "attention_mask": there.long()}
        taught = labels[there] % 2 == 0
        model = transformers.AutoModelForMaskedLM.from_pretrained(str(path)).eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(200):
            logits = model(**inputs).logits[there]
            losses = F.cross_entropy(logits, labels[there], reduction="none")
            if (losses < HARD).float().mean() > 0.3:
                break
            optimizer.zero_grad()
            losses[taught].mean().backward()
            optimizer.step()
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def model(learn) -> Path:
    return learn(3)


@pytest.fixture(scope="session")
def second(model) -> dict[str, Any]:
    """The same model once more, as a teacher that sees the masks."""
    targets = {"kind": "topk", "k": 5}
    return {"name": "second", "model": str(model), "task": "masked_lm", "targets": targets}


@pytest.fixture(scope="session")
def evolve(configure, model):
    """evolve(path, mask={…}, teachers=[…], …) -> the configuration of a cache."""

    def make(path: Path, mask: Any = None, teachers: Any = (), corpus: Any = None, **first: Any):
        targets = {"targets": {"kind": "topk", "k": 12}}
        reference = {"name": "reference", "model": str(model), "task": "masked_lm", "view": "clean"}
        chosen = {"policy": "hard", "teacher": "reference"} | (mask or {})
        return configure(path, [reference | targets | first, *teachers], corpus, {"mask": chosen})

    return make


@pytest.fixture(scope="session")
def made(tmp_path_factory, evolve) -> tuple[Cache, RunConfig]:
    config = evolve(tmp_path_factory.mktemp("evolve") / "cache")
    cache_teachers(config)
    return Cache.open(config.cache.path), config


@pytest.fixture(scope="session")
def student(make_model, wordpiece) -> Path:
    return make_model("bert", "AutoModelForMaskedLM", wordpiece, 9, initializer_range=0.2)
