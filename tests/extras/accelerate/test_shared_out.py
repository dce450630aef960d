"""A teacher shared out among processes says what it says in one: transformers needs accelerate."""

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.train.model.fitting import AUTO_CLASSES
from testlib.caches import problems
from testlib.command import run_main
from testlib.several.forked import end_well, forked_world

TASKS = ["causal_lm", "sequence_classification"]


@pytest.fixture
def teachers(make_model, wordpiece):
    """A language model, which is also asked for its states, and a classifier; both Llamas."""
    shared = {"num_attention_heads": 4, "num_key_value_heads": 2}
    lm, expert = (
        str(make_model("llama", AUTO_CLASSES[task], wordpiece, 3, **shared)) for task in TASKS
    )
    kept = {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}
    return [
        {"name": "lm", "model": lm, "task": "causal_lm", "targets": kept},
        {"name": "states", "model": lm, "task": "causal_lm", "targets": {"kind": "hidden"}},
        {"name": "expert", "model": expert, "task": "sequence_classification"},
    ]


def written(config, folder):
    path = folder / "run.json"
    path.write_text(config.model_dump_json(exclude_unset=True))
    return str(path)


def test_two_processes_make_the_targets_of_one(tmp_path, configure, teachers, one_thread):
    """To rounding; what is lost is made again by the same command."""
    cache_teachers(configure(tmp_path / "alone", teachers))
    shared = [teacher | {"tp_plan": "auto"} for teacher in teachers]
    run = written(configure(tmp_path / "shared", shared), tmp_path)

    def work():
        run_main("cache-teachers", run)

    end_well(forked_world(work))
    (tmp_path / "shared/targets/lm/commits/00001.json").unlink()
    (tmp_path / "shared/targets/expert/commits/00000.json").unlink()
    end_well(forked_world(work))
    assert problems(tmp_path / "shared") == []
    alone, found = (Cache.open(tmp_path / name) for name in ("alone", "shared"))
    every = np.arange(len(alone))
    ours, theirs = (one.gather(every, ["lm", "expert"]).targets for one in (found, alone))
    assert np.array_equal(ours["lm"].positions, theirs["lm"].positions)
    (ids, *values), (others, *expected) = (one["lm"].decode(2.0) for one in (ours, theirs))
    same = ids == others  # two that are alike to rounding may change places
    assert same.mean() > 0.99
    for mine, other in zip(values, expected, strict=True):
        at = same if mine.shape == same.shape else np.ones(mine.shape, bool)
        np.testing.assert_allclose(mine[at], other[at], atol=0.2)  # a step of 8 bits is 0.13
    logits = [one["expert"].logits for one in (ours, theirs)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    states = [one.gather(every, ["states"]).targets["states"] for one in (found, alone)]
    hidden = (one.columns["hidden"].astype(int) for one in states)
    np.testing.assert_allclose(*hidden, rtol=0, atol=1)  # a step of 16 bits
