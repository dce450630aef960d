"""Several processes at one cache, one of which is killed or comes in between."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.processes.units import OnThisMachine
from testlib.command import pipeline
from testlib.killing import (
    CORPUS,
    Journal,
    assert_finished,
    assert_little_lost,
    contents,
    fork_workers,
    forked,
    roles,
    slow,
    units,
    with_workers,
)
from testlib.processes import Child, alive, descendants, until


@pytest.mark.parametrize("victim", ["worker", "group", "parent"])
def test_one_of_several_processes_is_killed(tmp_path, configure, few, whole, victim):
    cache = tmp_path / "cache"
    config = configure(cache, few, CORPUS)
    journal = Journal(tmp_path / "journal", cache)
    child = with_workers(config, journal)
    assert until(lambda: units(cache) or child.ended()), child.errors
    workers = descendants(child.pid)
    assert len(workers) == 2, child.errors
    if victim == "group":
        os.killpg(child.pid, signal.SIGKILL)
    else:
        os.kill(child.pid if victim == "parent" else min(workers), signal.SIGKILL)
    code = child.wait()
    if victim == "worker":
        assert "teacher 'lm': its process was killed" in child.errors
        assert "run the same command again" in child.errors
    else:
        assert code == -signal.SIGKILL
    try:
        assert until(lambda: not alive(workers), 30), "workers outlive the process they work for"
    finally:
        for pid in alive(workers):
            os.kill(pid, signal.SIGKILL)
    assert_little_lost(journal, cache, 2)
    assert_finished(cache, config, whole)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_processes_share_the_work(tmp_path, configure, every, workers):
    """Started at once on one cache, both end well, and hardly any unit is computed twice."""
    teachers = [every[0], every[3]]
    settings = {"limit_sequences": 8, "sequence_length": 16}, {"sequences_per_shard": 1}
    alone = configure(tmp_path / "alone", teachers, *settings)
    planned = cache_teachers(alone).units_done
    cache = tmp_path / "cache"
    config = configure(cache, teachers, *settings)
    journals = [Journal(tmp_path / f"journal-{number}", cache) for number in range(2)]

    def work(journal: Journal) -> None:
        fork_workers()
        slow(journal, 0.01)
        cache_teachers(config, executor=OnThisMachine(workers))

    children = [Child(lambda journal=j: work(journal)) for j in journals]
    for child in children:
        assert child.wait() == 0, child.errors
    assert_finished(cache, config, tmp_path / "alone")
    computed = sum(line.startswith("computed") for j in journals for line in j.lines())
    assert planned <= computed <= 1.5 * planned
    assert all(any("computed" in line for line in j.lines()) for j in journals)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_are_at_one_cache(tmp_path, configure, every, whole_of_every, seed):
    """A later one comes at any moment, and checks what the first is just making."""
    cache = tmp_path / "cache"
    config = configure(cache, every, CORPUS)
    rng = random.Random(seed)
    journals = [Journal(tmp_path / f"journal-{number}", cache) for number in range(2)]
    children = []
    for journal in journals:
        children.append(forked(config, journal))
        time.sleep(rng.random() * 0.8)
    for child in children:
        assert child.wait() == 0, child.errors
    assert_finished(cache, config, whole_of_every)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]
)
def test_two_processes_mend_one_cache(tmp_path, configure, every, whole_of_every, seed):
    """What one has made again must not be taken out again by the other."""
    cache = Path(shutil.copytree(whole_of_every, tmp_path / "cache"))
    config = configure(cache, every, CORPUS)
    rng = random.Random(seed)
    kinds = ("targets/*/data/*", "views/*/data/*", "targets/*/commits/*", "targets/*/teacher.json")
    for pattern in kinds:
        for path in rng.sample(sorted(cache.glob(pattern)), 4):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    journals = [Journal(tmp_path / f"journal-{number}", cache) for number in range(2)]
    children = []
    for journal in journals:
        children.append(forked(config, journal))
        time.sleep(rng.random() * 0.3 * (seed % 3))
    for child in children:
        assert child.wait() == 0, child.errors
    assert cache_teachers(config).units_done == 0
    pipeline("gc", cache, "--older-than", 0)
    assert contents(cache) == contents(whole_of_every)
    assert roles(cache) == roles(whole_of_every)
    assert verify_cache(str(cache)).problems == []


def beside_a_stored_matrix(folder, config, first, second):
    """One process is held where it has stored a matrix, until another one is through."""
    cache = Path(config.cache.path)
    at = "after link /targets/hidden/head.safetensors"
    go_on = folder / "go on"
    journal = Journal(folder / "first", cache, at, lambda: until(go_on.exists) and None)
    child = forked(config, journal, **first)
    assert until(lambda: at in journal.lines())
    other = forked(config, Journal(folder / "second", cache), **second)
    assert other.wait() == 0, other.errors
    go_on.touch()
    assert child.wait() == 0, child.errors


def test_a_process_comes_while_another_stores_a_matrix(tmp_path, configure, few, whole):
    """What is half-written by one that lives must not be taken for damage."""
    config = configure(tmp_path / "cache", few, CORPUS)
    beside_a_stored_matrix(tmp_path, config, {}, {})
    assert_finished(tmp_path / "cache", config, whole)


def test_a_process_checks_while_another_stores_a_matrix(tmp_path, configure, few, whole):
    """The other one has other teachers to make: the half-stored matrix is none of its business."""
    config = configure(tmp_path / "cache", few, CORPUS)
    beside_a_stored_matrix(tmp_path, config, {"only": ["hidden"]}, {"only": ["lm"]})
    assert_finished(tmp_path / "cache", config, whole)
