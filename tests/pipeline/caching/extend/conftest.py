"""A corpus in four files, models for it, and a finished cache to grow."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle.data.cache import Cache
from rekindle.pipeline.caching import make_unit
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from testlib.models import AUTO
from testlib.stage_one.extending import Make, Ran, rows


@pytest.fixture(scope="session")
def texts(tmp_path_factory, corpus_file) -> Path:
    """The corpus in four files, a.jsonl to d.jsonl."""
    folder = tmp_path_factory.mktemp("texts")
    lines = corpus_file.read_text().splitlines(keepends=True)
    for name, part in zip(
        "abcd", (lines[:8], lines[8:11], lines[11:13], lines[13:15]), strict=True
    ):
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder


@pytest.fixture(scope="session")
def models(make_model, wordpiece) -> dict[str, Path]:
    one = {"num_hidden_layers": 1}
    return {
        "masked_lm": make_model("bert", AUTO["masked_lm"], wordpiece, **one),
        "causal_lm": make_model("llama", AUTO["causal_lm"], wordpiece, **one),
        "other": make_model("llama", AUTO["causal_lm"], wordpiece, seed=9, **one),
    }


@pytest.fixture(scope="session")
def make(configure, texts, models) -> Make:
    """make(path, k=…, taus=…, limit=…, files="a", …) -> configuration of one teacher ``lm``."""

    def built(
        path: Path,
        *,
        task: str = "causal_lm",
        k: int = 4,
        taus: tuple[float, ...] = (1.0, 2.0),
        limit: int | None = 12,
        files: Any = "a",
        replicas: int = 2,
        codec: str = "default",
        more: tuple[dict, ...] = (),
        model: Path | None = None,
        targets: dict | None = None,
        folder: Path | None = None,
        **corpus: Any,
    ) -> Any:
        where = folder or texts
        source = [str(where / f"{name}.jsonl") for name in files]
        wanted = {"kind": "topk", "k": k, "temperatures": list(taus), "codec": codec}
        teacher = {"name": "lm", "model": str(model or models[task]), "task": task}
        return configure(
            path,
            [teacher | {"targets": targets or wanted}, *more],
            corpus={"source": source, "limit_sequences": limit} | corpus,
            cache={"replicas": replicas, "mask": {"policy": "random", "probability": 0.3}},
        )

    return built


@pytest.fixture(scope="session")
def whole(tmp_path_factory, make) -> Callable[..., Cache]:
    """whole(…) -> the cache of ``make``'s configuration, made in one go; nobody writes into it."""
    made: dict[str, Path] = {}

    def built(**asked: Any) -> Cache:
        if (key := repr(sorted(asked.items()))) not in made:
            path = tmp_path_factory.mktemp("whole") / "cache"
            cache_teachers(make(path, **asked))
            made[key] = path
        return Cache.open(made[key])

    return built


@pytest.fixture
def ran(monkeypatch) -> Ran:
    """Every unit that is computed."""
    found: Ran = []
    original = make_unit.run_unit

    def noted(teacher: Any, unit: Any, **options: Any) -> Any:
        found.append((teacher.info.name, teacher.info.part, unit.name))
        return original(teacher, unit, **options)

    monkeypatch.setattr(make_unit, "run_unit", noted)
    return found


@pytest.fixture(scope="session")
def finished(tmp_path_factory, make) -> dict[str, Path]:
    """A finished cache for each task: 12 sequences in shards of 5, 5 and 2."""
    found = {}
    for task in ("causal_lm", "masked_lm"):
        path = tmp_path_factory.mktemp(f"finished-{task}") / "cache"
        cache_teachers(make(path, task=task))
        assert rows(Cache.open(path)) == [5, 5, 2]
        found[task] = path
    return found


@pytest.fixture
def copied(tmp_path, finished) -> Callable[[str], Path]:
    return lambda task: shutil.copytree(finished[task], tmp_path / f"copy-{task}")
