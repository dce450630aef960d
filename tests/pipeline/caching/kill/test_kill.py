"""Stage 1 killed at any step goes on, and leaves the cache of an uninterrupted run."""

import random
import re
import signal
from pathlib import Path

import pytest

from testlib.killing import (
    CORPUS,
    Journal,
    assert_finished,
    assert_goes_on,
    die,
    forked,
    killed_at,
    units,
)


def kinds_of(steps: list[str]) -> dict[str, str]:
    """A step of each kind: one of several units, the last, stands for all."""
    return {re.sub(r"\d{5}(-r\d{3})?", "unit", step): step for step in steps}


def test_the_journal_knows_every_step(steps, whole):
    """Each data file is begun, made durable, and then committed by a link; nothing is missed."""
    for unit in units(whole):
        record = f"/{unit}"
        data = record.replace("/commits/", "/data/").removesuffix(".json")
        name = unit.split("/")[1]
        order = [
            f"computed {name} {Path(unit).stem}",
            f"within {data}",
            f"after sync {data}",
            f"within {Path(record).parent}/temporary {Path(record).name}",
            f"before link {record}",
            f"after link {record}",
        ]
        places = [steps.index(step) for step in order]
        assert places == sorted(places)
    assert len(kinds_of(steps)) > 60


@pytest.mark.slow
def test_killed_while_masks_of_losses_are_made(tmp_path, configure, every):
    """They are made after their teacher, and before those that see them."""
    chosen = [every[0] | {"name": "reference", "view": "clean"}, every[0]]
    hard = {"mask": {"policy": "hard", "teacher": "reference"}}
    config = configure(tmp_path / "whole", chosen, CORPUS, hard)
    journal = Journal(tmp_path / "journal", tmp_path / "whole")
    assert (child := forked(config, journal)).wait() == 0, child.errors
    lines = journal.lines()
    steps = [step for step in kinds_of(lines).values() if "/views/masked-" in step]
    assert len(steps) > 10
    places = [lines.index(step) for step in steps]
    assert lines.index("computed reference 00001") < min(places)
    assert max(places) < lines.index("begun lm 00000-r000")
    for number, step in enumerate(steps):
        cache = tmp_path / str(number)
        config = configure(cache, chosen, CORPUS, hard)
        killed_at(step, cache, config, tmp_path)
        assert_finished(cache, config, tmp_path / "whole")


@pytest.mark.parametrize("part", range(6))
def test_killed_at_some_steps(tmp_path, configure, few, whole, steps, part):
    """Six steps of all, always those around a commit; the slow test below takes each kind."""
    chosen = list(kinds_of(steps).values())
    commits = [s for s in chosen if re.match(r"(before|after) link /targets/\w+/commits", s)]
    step = (commits + chosen[:: len(chosen) // 3][1:])[part]
    assert_goes_on(step, configure(tmp_path / "cache", few, CORPUS), whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_each_kind_of_step(tmp_path, configure, few, whole, steps, seed):
    for number, step in enumerate(list(kinds_of(steps).values())[seed::6]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_goes_on(step, configure(folder / "cache", few, CORPUS), whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_steps_with_a_teacher_of_each_kind(
    tmp_path, configure, every, whole_of_every, seed
):
    """Sixty kills in all, each on a cache of its own, and then several in a row on one."""
    rng = random.Random(seed)
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = configure(folder / "cache", every, CORPUS)
        assert_goes_on(rng.randrange(700), config, whole_of_every, folder)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]
)
def test_killed_several_times_in_a_row(tmp_path, configure, few, whole, seed):
    """Wherever it is killed, what was committed stays, to the byte, the inode and the time."""
    rng, cache = random.Random(seed), tmp_path / "cache"
    config = configure(cache, few, CORPUS)
    kept: dict[str, tuple[int, int]] = {}
    for number in range(6):
        journal = Journal(tmp_path / f"journal-{number}", cache, rng.randrange(5, 60), die)
        assert forked(config, journal).wait() in (0, -signal.SIGKILL)
        now = {n: (s.st_ino, s.st_mtime_ns) for n in units(cache) if (s := (cache / n).stat())}
        assert now | kept == now
        kept = now
    assert_finished(cache, config, whole)
