"""Every kind of vocabulary target and every codec, beside the model's own logits.

The reference is transformers' own ``model(**inputs).logits`` of one sequence at a time and float64
arithmetic, without any of our helpers.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rekindle.data.batch import TokenTargetBatch
from rekindle.data.cache import Cache
from rekindle.data.example import TokenTargets
from testlib.models import AUTO
from testlib.run_alone import logits_of

TAUS = (0.5, 1.0, 2.0, 4.0)
K = 12
DRAWS = 20
CODECS = ["default", "precise", "compact"]
TASKS = ["masked_lm", "causal_lm"]
FAMILY = {"masked_lm": "bert", "causal_lm": "llama"}

# The configuration of each kind of target; those with a codec are cached with each of the three.
TARGETS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": K, "temperatures": list(TAUS)},
    "threshold": {"kind": "threshold", "k": K},
    "threshold-2": {"kind": "threshold", "k": K, "temperatures": [2.0]},
    "whole": {"kind": "threshold", "k": 100_000},
    "every": {"kind": "topk", "k": 100_000, "temperatures": [1.0]},
    "random": {"kind": "random", "k": DRAWS},
    "random-2": {"kind": "random", "k": DRAWS, "temperatures": [2.0]},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}
CODED = ["topk", "threshold", "threshold-2", "whole", "every"]
SAMPLES = {"threshold": 1.0, "threshold-2": 2.0, "random": 1.0, "random-2": 2.0}


class World(NamedTuple):
    """One teacher model's targets of every kind, in a cache for each codec."""

    task: str
    model: Path
    folders: dict[str, Path]  # by codec
    config: Any

    def open(self, codec: str = "default") -> Cache:
        return Cache.open(self.folders[codec])


def teachers_of(model: Path, task: str, names: list[str], codec: str = "default") -> list[dict]:
    chosen = {name: TARGETS[name] | ({"codec": codec} if name in CODED else {}) for name in names}
    base = {"model": str(model), "task": task}
    return [base | {"name": name, "targets": targets} for name, targets in chosen.items()]


@functools.cache
def logits_once(directory: Path, auto: str, ids: tuple[int, ...]) -> np.ndarray:
    """Return the model's own logits [S,V] of one sequence, in float64."""
    return logits_of(directory, auto, input_ids=ids).double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def targets_of(
    cache: Cache, name: str, directory: Path, auto: str, size: int | None = None
) -> Iterator[tuple[TokenTargets, np.ndarray]]:
    """Yield every cached target of a teacher, with the model's own logits [P,V] at its
    positions.
    """
    for index in range(len(cache)):
        for target in cache.example(index).targets[name]:
            whole = logits_once(directory, auto, tuple(map(int, target.input_ids)))
            yield target, whole[target.positions][:, :size]


def in_world(world: World, name: str, codec: str = "default") -> Iterator[Any]:
    return targets_of(world.open(codec), name, world.model, AUTO[world.task])


def stated_precision(codec: str, relative: np.ndarray, tau: float) -> np.ndarray:
    """Return the codec's bound [P,1] for candidates ``relative`` [P,K] below the best, at τ."""
    if codec == "precise":
        return np.full((len(relative), 1), 1 / (2048 * tau) + 1 / 2048)
    span = np.minimum(-relative.min(axis=1, keepdims=True), 32)
    return 2 * (span / 510 + 1 / 1024) / tau + 1 / 2048


def whole_batch(cache: Cache, name: str, replica: int = 0) -> TokenTargetBatch:
    view = cache.teachers[name].info.view
    masked = view if view.startswith("masked-") else None
    found = cache.gather(np.arange(len(cache)), [name], epoch=replica, masked_view=masked)
    return found.targets[name]


def theta_of(probs: np.ndarray, k: int) -> float:
    """Return θ with Σ min(1, t/θ) = k by its definition: the largest m with t_m ≥ rest/(k − m)."""
    ordered = np.sort(probs)[::-1]
    rest = ordered.sum() - np.concatenate([[0.0], np.cumsum(ordered)])
    kept = 0
    while kept < k - 1 and ordered[kept] * (k - kept) >= rest[kept]:
        kept += 1
    return float(rest[kept] / (k - kept))


def about(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "targets" / name / "teacher.json").read_text())
