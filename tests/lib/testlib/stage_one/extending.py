"""Requirements of a grown cache: old files are kept, and targets are the model's own."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.data.example import TokenTargets
from rekindle.pipeline.caching import make_unit
from rekindle.pipeline.checks.verify import verify_cache
from testlib.caches import examples
from testlib.models import AUTO
from testlib.run_alone import NOISE, logits_of

CPU = torch.device("cpu")
Files = dict[Path, tuple[int, bytes]]
Ran = list[tuple[str, str, str]]  # teacher, part, unit


Make = Callable[..., Any]


def files_of(path: Path) -> Files:
    """Return inode and bytes of every file except the roll-up and the card."""
    told = ("cache.json", "README.md")
    found = [p for p in path.rglob("*") if p.is_file() and p.name not in told]
    return {p: (p.stat().st_ino, p.read_bytes()) for p in found}


def assert_kept(before: Files, path: Path) -> None:
    """Check that every old file has its name, its bytes and its inode."""
    after = files_of(path)
    assert {p: after.get(p) for p in before} == before


def digests(cache: Cache) -> list[str]:
    found = [cache.corpus.shard(i).table()["digest"].to_pylist() for i in range(shard_count(cache))]
    return list(itertools.chain(*found))


def shard_count(cache: Cache) -> int:
    return len(cache.corpus.commits)


def rows(cache: Cache) -> list[int]:
    return [commit.rows for commit in cache.corpus.commits]


def assert_same_targets(grown: Cache, whole: Cache, name: str = "lm") -> None:
    """Compare example by example: ids equal, values within the codec's bound (batches round
    differently).
    """
    info, other = grown.teachers[name].info, whole.teachers[name].info
    assert (info.k, set(info.temperatures)) == (other.k, set(other.temperatures))
    assert grown.teachers[name].coverage == whole.teachers[name].coverage == 1
    assert digests(grown) == digests(whole)
    for one, same in zip(examples(grown), examples(whole), strict=True):
        assert one.text == same.text
        assert len(one.targets[name]) == len(same.targets[name]) > 0
        for a, b in zip(one.targets[name], same.targets[name], strict=True):
            assert a.replica == b.replica
            for field in ("input_ids", "positions", "ids", "gold_ids", "gold_rank"):
                assert np.array_equal(getattr(a, field), getattr(b, field)), field
            span = (b.log_probs[:, :1] - b.log_probs[:, -1:]).clip(0, 32)
            assert (np.abs(a.log_probs - b.log_probs) <= 2 * span / 255 + 4 / 1024).all()
            assert a.log_tail.keys() == b.log_tail.keys()
            for tau, tail in b.log_tail.items():
                assert np.abs(a.log_tail[tau] - tail).max() <= 2 / 1024
            for field in ("gold_log_prob", "entropy"):
                assert np.abs(getattr(a, field) - getattr(b, field)).max() <= 2 / 1024


def assert_sound(path: Path) -> None:
    report = verify_cache(str(path))
    assert report.problems == []
    assert report.orphans == 0
    assert set(report.coverage.values()) == {1.0}


def logits_at(target: TokenTargets, directory: Path, task: str) -> np.ndarray:
    """Return the model's own logits [P,V] at the target's positions, in float64."""
    logits = logits_of(directory, AUTO[task], input_ids=target.input_ids)
    return logits.double().numpy()[target.positions]


def assert_tails_are_the_models(cache: Cache, directory: Path, task: str, taus: set[float]) -> None:
    """Check the mass outside the stored ids at every temperature, in float64."""
    compared = 0
    for example in examples(cache):
        for target in example.targets["lm"]:
            logits = logits_at(target, directory, task)
            assert target.log_tail.keys() == taus
            for tau, stored in target.log_tail.items():
                tempered = logits / tau
                kept = np.logaddexp.reduce(np.take_along_axis(tempered, target.ids, 1), axis=1)
                np.put_along_axis(tempered, target.ids, -np.inf, axis=1)
                rest = np.logaddexp.reduce(tempered, axis=1)
                exact = rest - np.logaddexp(kept, rest)
                seen = rest - kept > -31.9
                assert np.abs(stored - exact)[seen].max(initial=0) <= 1 / 2048 + NOISE / tau
                assert (stored[~seen] < -31.9).all()
                compared += len(stored)
    assert compared > 100


UNITS = {"causal_lm": 3, "masked_lm": 6}


def units(task: str, shards: range | list[int]) -> list[str]:
    replicas = [""] if task == "causal_lm" else ["-r000", "-r001"]
    return [f"{shard:05d}{replica}" for replica in replicas for shard in shards]


def grow_folder(folder: Path, texts: Path, names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(texts / f"{name}.jsonl", folder)
    return folder


@contextmanager
def stopped(monkeypatch, count: int) -> Iterator[None]:
    """Kill a run before it computes unit number ``count``."""
    original, calls = make_unit.run_unit, []

    def failing(*arguments: Any, **options: Any) -> Any:
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(make_unit, "run_unit", failing)
        with pytest.raises(KeyboardInterrupt):
            yield
