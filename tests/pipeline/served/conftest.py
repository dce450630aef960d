"""A server of a tiny causal LM, and a cache of what it says."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rekindle.data.storage import patience
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.served import client
from testlib.servers.vllm_double import Double, served

K = 6


@pytest.fixture(scope="session")
def local(make_teacher: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The model that the server has, as a teacher of this machine."""
    targets = {"kind": "topk", "k": K, "temperatures": [1.0], "codec": "precise"}
    return make_teacher("local", "causal_lm", targets=targets)


@pytest.fixture(scope="session")
def _double(local: dict[str, Any]) -> Iterator[Double]:
    with served(Path(local["model"])) as double:
        yield double


@pytest.fixture
def double(
    _double: Double, local: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Double]:
    """The server, without faults; it is asked again at once."""
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(client, "FIRST_PATIENCE", 0.2)
    _double.asked.clear()
    yield _double
    _double.faults.clear()
    _double.__dict__ |= {"max_logprobs": 20, "max_model_len": 64, "api_key": None, "name": "tiny"}
    _double.retry_after = "0.02"
    if _double.folder != Path(local["model"]):
        _double.serve(Path(local["model"]))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, configure: Any, _double: Double) -> Path:
    """The cache of an uninterrupted run, without faults; not to be changed."""
    path = tmp_path_factory.mktemp("served") / "cache"
    cache_teachers(configure(path, [_teacher(_double)]))
    return path


@pytest.fixture
def teacher(double: Double) -> Callable[..., dict[str, Any]]:
    """teacher(timeout_s=…, …) -> a served teacher's part of a run file; ``targets`` among them."""

    return partial(_teacher, double)


def _teacher(double: Double, targets: Any = None, **served: Any) -> dict[str, Any]:
    about = {"url": double.url, "model": "tiny", "max_concurrency": 3} | served
    kept = {"k": K, "codec": "precise"} | (targets or {})
    return {"name": "big", "served": about, "targets": kept}
