"""Replaced-token detection: its configuration, and the method by itself."""

import numpy as np
import torch

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.prepare import prepare_objective

CPU = torch.device("cpu")
RTD = {"method": "replaced_tokens"}
KINDS = {
    "topk": {"kind": "topk", "k": 6, "temperatures": [1.0, 3.0]},
    "precise": {"kind": "topk", "k": 6, "codec": "precise"},
    "threshold": {"kind": "threshold", "k": 6},
    "random": {"kind": "random", "k": 12},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}


def config_of(methods, hard=1.0, **values):
    objective = {"hard": {"weight": hard}, "methods": methods}
    return parse_settings(TrainConfig, {"objective": objective, "held_out": 0.2} | values)


def rtd_student(model, **values):
    return StudentConfig(model=str(model), task="replaced_token_detection", **values)


def method_of(path, teacher="topk", seed=0, **values):
    """Return the method by itself, for the only masks of a cache."""
    cache = Cache.open(path)
    config = config_of([RTD | {"teacher": teacher} | values], seed=seed)
    view = cache.masked_view().name
    return cache, prepare_objective(cache, rtd_student("m"), config, view).methods[0]


def gather(cache, method, index=None, epoch=0):
    index = np.arange(len(cache)) if index is None else np.asarray(index)
    view = cache.masked_view().name
    return cache.gather(index, method.teachers, epoch=epoch, masked_view=view)


def replacements(method, batch):
    """Return {(example, position): token} at every masked position."""
    text = method.corrupted(batch, CPU)
    ids = text.inputs["input_ids"].numpy()
    target = batch.targets[method.teacher]
    places = zip(target.rows.tolist(), target.positions.tolist(), strict=True)
    return {(int(batch.index[r]), p): int(ids[r, p]) for r, p in places}
