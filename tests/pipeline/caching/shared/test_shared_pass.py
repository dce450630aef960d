"""Teachers of one model, view and precision share their forward passes, and nothing else."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from rekindle.pipeline.processes.units import OnThisMachine
from testlib.caches import committed, problems
from testlib.estimators import teachers_of
from testlib.killing import contents, killed_at
from testlib.models import AUTO

KINDS = ["topk", "threshold", "random", "hidden", "dense"]
BODIES = {"masked_lm": "BertModel", "causal_lm": "LlamaModel"}
UNITS = {"masked_lm": 6, "causal_lm": 3}


@pytest.fixture(scope="module")
def models(make_model, wordpiece) -> dict[str, Path]:
    families = {"masked_lm": "bert", "causal_lm": "llama"}
    return {task: make_model(families[task], AUTO[task], wordpiece, 3) for task in families}


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of the ids of every forward pass."""
    found: list[tuple[int, ...]] = []
    for name in BODIES.values():
        body = getattr(transformers, name)

        def forward(model: Any, input_ids: Any, *, _run: Any = body.forward, **more: Any) -> Any:
            found.append(tuple(input_ids.shape))
            return _run(model, input_ids, **more)

        monkeypatch.setattr(body, "forward", forward)
    return found


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_bytes_are_those_of_separate_runs(tmp_path, configure, models, seen, caplog, task):
    """Of every kind, and of the output matrix; the passes are those of one teacher."""
    teachers = teachers_of(models[task], task, KINDS)
    apart, count = configure(tmp_path / "apart", teachers), []
    for name in KINDS:
        before = len(seen)
        cache_teachers(apart, only=[name])
        count.append(seen[before:])
    assert all(one == count[0] for one in count)
    assert len(count[0]) >= UNITS[task]
    seen.clear()
    with caplog.at_level(logging.INFO, "rekindle"):
        done = cache_teachers(configure(tmp_path / "shared", teachers))
    assert done == StageOne(12, len(KINDS) * UNITS[task], 0)
    assert seen == count[0]
    assert contents(tmp_path / "shared") == contents(tmp_path / "apart")
    assert problems(tmp_path / "shared") == []
    told = [line for line in caplog.messages if "one forward pass of" in line]
    assert len(told) == 1
    assert told[0].startswith(f"teachers {', '.join(KINDS)}: one forward pass of {models[task]}")


def test_killed_between_the_files_of_two_it_makes_what_is_missing(
    tmp_path, configure, models, seen, caplog
):
    """-9 when a unit of the one is committed and that of the other is not: bytes as before."""
    teachers = teachers_of(models["causal_lm"], "causal_lm", ["topk", "threshold"])
    cache_teachers(configure(tmp_path / "whole", teachers))
    config = configure(tmp_path / "cache", teachers)
    step = "before link /targets/threshold/commits/00001.json"
    killed_at(step, tmp_path / "cache", config, tmp_path)
    there = {n for n in committed(tmp_path / "cache") if n.startswith("targets/")}
    made = [f"targets/topk/{unit}" for unit in ("00000", "00001")] + ["targets/threshold/00000"]
    assert there == set(made)
    seen.clear()
    assert cache_teachers(config) == StageOne(12, 3, 3)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert problems(tmp_path / "cache") == []
    again = len(seen)  # one unit for the second alone, and one for both
    shutil.rmtree(tmp_path / "cache/targets/threshold")
    seen.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, "rekindle"):
        assert cache_teachers(config) == StageOne(12, 3, 3)  # the one is complete
    assert len(seen) == again + 1
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert not [line for line in caplog.messages if "one forward pass" in line]


@pytest.mark.parametrize(
    "other", [{"view": "clean"}, {"batch_tokens": 64}, {"domains": ["odd"]}, "model"]
)
def test_what_decides_the_pass_is_not_shared(tmp_path, configure, models, make_model, seen, other):
    """Bytes as of separate runs, and as many passes."""
    teachers = teachers_of(models["masked_lm"], "masked_lm", ["topk", "threshold"])
    if other == "model":
        weights = make_model("bert", AUTO["masked_lm"], Path(teachers[0]["model"]), 4)
        other = {"model": str(weights)}
    teachers[1] |= other
    for name in ("topk", "threshold"):
        cache_teachers(configure(tmp_path / "apart", teachers), only=[name])
    apart = len(seen)
    cache_teachers(configure(tmp_path / "shared", teachers))
    assert len(seen) == 2 * apart
    assert contents(tmp_path / "shared") == contents(tmp_path / "apart")


@pytest.mark.slow
def test_worker_processes_share_as_well(tmp_path, configure, models):
    teachers = teachers_of(models["masked_lm"], "masked_lm", KINDS)
    cache_teachers(configure(tmp_path / "one", teachers))
    cache_teachers(configure(tmp_path / "two", teachers), executor=OnThisMachine(2))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
