"""An audit passes what a codec and two passes explain, and nothing else: each kind of target."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.config import dump_config

TARGETS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 8},
    "precise": {"kind": "topk", "k": 8, "codec": "precise", "temperatures": [0.5, 3.0]},
    "compact": {"kind": "topk", "k": 8, "codec": "compact"},
    "threshold": {"kind": "threshold", "k": 8},
    "tempered": {"kind": "threshold", "k": 8, "temperatures": [2.0], "codec": "precise"},
    "random": {"kind": "random", "k": 20},
    "warm": {"kind": "random", "k": 20, "temperatures": [2.0]},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}


@pytest.fixture(scope="module")
def teachers(make_teacher) -> dict[str, dict[str, Any]]:
    made = [make_teacher(name, "causal_lm", targets=kept) for name, kept in TARGETS.items()]
    made += [
        make_teacher("masked", "masked_lm", targets={"kind": "topk", "k": 4}),
        make_teacher("classes", "sequence_classification"),
        make_teacher("passes", "sequence_classification", monte_carlo={"passes": 60}),
        make_teacher("score", "regression"),
        make_teacher("words", "token_classification"),
    ]
    return {teacher["name"]: teacher for teacher in made}


@pytest.fixture(scope="module")
def sound(tmp_path_factory, configure, teachers) -> Path:
    path = tmp_path_factory.mktemp("judged") / "cache"
    cache_teachers(configure(path, [*teachers.values()]))
    return path


def test_a_clean_cache_of_every_kind_passes(sound, configure, teachers):
    report = audit_cache(str(sound), configure(sound, [*teachers.values()]), 12)
    assert report.problems == []
    assert [*report.values] == [*teachers]
    shares = {name: values["of_bound"] for name, values in report.values.items()}
    assert all(0 <= share < 0.9 for share in shares.values()), shares
    assert {values["rows"] > 0 for values in report.values.values()} == {True}
    assert max(report.values[name]["total_variation"] for name in ("random", "warm")) < 1e-6


def altered(cache: Path, name: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Write the first unit of a teacher again, its columns changed: every checksum is right."""
    shards = ShardSet(open_store(cache), f"targets/{name}")
    unit, commit = next(iter(sorted(shards.committed().items())))
    batches = [*shards.open(commit).batches()]
    changed = []
    for batch in batches:
        columns = {n: _flat(batch[n]).copy() for n in batch.schema.names[1:]}
        if batch is batches[0]:
            change(columns)
        arrays = [batch[0], *(_again(batch[n], v) for n, v in columns.items())]
        changed.append(pa.record_batch(arrays, schema=batch.schema))
    (cache / "targets" / name / "commits" / f"{unit}.json").unlink()
    facts = {k: v for k, v in commit.facts.items() if k != "scalars"}
    shards.write(unit, batches[0].schema, changed, facts)
    assert verify_cache(str(cache)).problems == []


def _leaf(array: pa.Array) -> pa.Array:
    while pa.types.is_nested(array.type):
        array = array.values
    return array


def _flat(array: pa.Array) -> np.ndarray:
    return _leaf(array).to_numpy(zero_copy_only=False)


def _again(array: pa.Array, flat: np.ndarray) -> pa.Array:
    buffers, leaf = array.buffers(), _leaf(array)
    new = pa.array(flat.astype(leaf.type.to_pandas_dtype()), leaf.type).buffers()[-1]
    return (
        pa.Array.from_buffers(
            array.type,
            len(array),
            [*buffers[:-1], new],
            array.null_count,
            array.offset,
            children=None,
        )
        if not pa.types.is_nested(array.type)
        else _nested(array, flat)
    )


def _nested(array: pa.Array, flat: np.ndarray) -> pa.Array:
    inner = _again(array.values, flat)
    if pa.types.is_fixed_size_list(array.type):
        made = pa.FixedSizeListArray.from_arrays(inner, type=array.type)
        return made
    return type(array).from_arrays(array.offsets, inner, type=array.type)


def other_id(columns: dict[str, np.ndarray], place: int) -> None:
    """An id that is not among the first position's."""
    columns["ids"][place] = next(i for i in range(5, 60) if i not in columns["ids"][:20])


CHANGES: dict[str, tuple[str, Callable[[dict[str, np.ndarray]], None], str]] = {
    "a value": ("topk", lambda c: c["values"].__setitem__(4, 255 - c["values"][4]), "log-prob"),
    "a precise value": ("precise", lambda c: c["values"].__setitem__(4, 9), "kept log-prob"),
    "the best": ("topk", lambda c: c["log_prob_max"].__setitem__(0, 1), "log-prob"),
    "a tail": ("precise", lambda c: c["tail_log_odds"].__setitem__(2, -700), "temperature 3"),
    "an id": ("topk", lambda c: other_id(c, 7), "the likeliest token that was left out"),
    "a gold value": ("dense", lambda c: c["gold_log_prob"].__setitem__(3, 9), "gold"),
    "an entropy": ("random", lambda c: c["entropy"].__setitem__(0, 9), "entropy"),
    "a probability": ("dense", lambda c: c["log_probs"].__setitem__(8, -9.0), "a log-prob"),
    "a state": ("hidden", lambda c: c["hidden"].__setitem__(2, -c["hidden"][2] - 9000), "log-prob"),
    "a threshold value": ("threshold", lambda c: c["values"].__setitem__(7, 90), "log-prob"),
    "a drawn id": ("tempered", lambda c: other_id(c, 7), ""),
    "a draw": ("random", lambda c: other_id(c, 0), "the place of a draw"),
    "a masked value": ("masked", lambda c: c["values"].__setitem__(1, 250), "kept log-prob"),
    "a logit": ("classes", lambda c: c["logits"].__setitem__(0, c["logits"][0] + 0.1), "a logit"),
    "a score": ("score", lambda c: c["logits"].__setitem__(1, c["logits"][1] - 0.1), "a logit"),
    "a word's logit": ("words", lambda c: c["logits"].__setitem__(0, 7.0), "a logit"),
    "passes": (
        "passes",
        lambda c: c["mc_probs"].__setitem__(slice(None), 1 - c["mc_probs"].round()),
        "Monte",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_one_value_beyond_its_bound_is_found(tmp_path, sound, configure, teachers, what):
    name, change, told = CHANGES[what]
    path = shutil.copytree(sound, tmp_path / "cache")
    altered(path, name, change)
    report = audit_cache(str(path), configure(path, [teachers[name]]), 12)
    (problem,) = report.problems
    assert problem.startswith(f"teacher {name!r}, example ")
    assert told in problem
    assert report.values[name]["of_bound"] > 1


def test_the_command_says_which_and_ends_with_3(tmp_path, sound, configure, teachers, command):
    path = shutil.copytree(sound, tmp_path / "cache")
    run = tmp_path / "run.yaml"
    run.write_text(dump_config(configure(path, [teachers["topk"], teachers["words"]])))
    code, out, _ = command("verify", path, "--audit", 12, "--config", run)
    assert code == 0
    assert "of_bound 0." in out
    altered(path, "topk", CHANGES["a value"][1])
    code, out, err = command("verify", path, "--audit", 12, "--config", run, "--json")
    assert code == 3
    (beyond,) = json.loads(out)["beyond"]
    assert beyond.startswith("teacher 'topk', example 0, position 0: a kept log-probability is off")
    assert beyond in err
