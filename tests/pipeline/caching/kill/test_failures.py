"""A disk that is full, a folder that may not be written, a model that fails: one message."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from rekindle.data.cache import Cache
from rekindle.data.inventory import shard_sets
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching import make_unit
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.config import dump_config
from testlib.command import run_main
from testlib.killing import (
    CORPUS,
    Journal,
    assert_finished,
    contents,
    fork_workers,
    units,
)
from testlib.processes import Child


def full_disk() -> None:
    """No file of this process can grow any more: the kernel itself says so."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def fails(child: Child, *words: str) -> None:
    """Exit code 2 with one message, and no traceback."""
    assert child.wait() == 2, child.errors
    errors = [line for line in child.errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in child.errors
    assert len(errors) == 1, child.errors
    for word in words:
        assert word in errors[0]


FULL_AT = [
    "within /targets/lm/data/00001-r000",
    "before link /targets/hidden/head.safetensors",
    "after link /corpus/commits/00001.json",
    "after link /cache.json",
    *(
        pytest.param(step, marks=pytest.mark.slow)
        for step in (
            "before sync /targets/lm/data/00000-r001",
            "after link /corpus/corpus.json",
            "after link /targets/hidden/commits/00001.json",
        )
    ),
]


@pytest.mark.parametrize("step", FULL_AT)
def test_a_full_disk_is_one_message_and_finished_shards_are_kept(
    tmp_path, configure, few, whole, step
):
    cache, run = tmp_path / "cache", tmp_path / "run.yaml"
    config = configure(cache, few, CORPUS)
    run.write_text(dump_config(config))
    journal = Journal(Path(os.devnull), cache, step, full_disk)

    def work() -> None:
        journal.follow()
        run_main("cache-teachers", run)

    fails(Child(work), "File too large")
    before = {n: (cache / n).stat().st_mtime_ns for n in committed(cache)}
    assert_finished(cache, config, whole)
    after = {n: (cache / n).stat().st_mtime_ns for n in committed(cache)}
    assert before.items() <= after.items()


def committed(cache: Path) -> list[str]:
    """The records of all units and the data files that they name."""
    found = []
    for shards in shard_sets(open_store(cache)):
        for unit, commit in shards.committed().items():
            found += [f"{shards.folder}/commits/{unit}.json", f"{shards.folder}/{commit.path}"]
    return found


TAKEN_AWAY = {
    "corpus/data": "after link /corpus/commits/00000.json",
    "corpus/commits": "after link /corpus/commits/00000.json",
    "views": "after link /corpus/complete.json",
    "targets": "after link /corpus/complete.json",
    "targets/lm/data": "computed lm 00000-r001",
    "targets/lm/commits": "computed lm 00000-r001",
}


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, marks=pytest.mark.slow if folder.endswith("/commits") else [])
        for folder in TAKEN_AWAY
    ],
)
def test_a_folder_that_may_not_be_written_is_one_message(tmp_path, configure, few, whole, folder):
    """A file stands in its place: a permission taken away does not hold for root."""
    cache, run = tmp_path / "cache", tmp_path / "run.yaml"
    config = configure(cache, few, CORPUS)
    run.write_text(dump_config(config))
    place, away = cache / folder, tmp_path / "away"

    def take_away() -> None:
        if place.exists():
            place.rename(away)
        place.write_bytes(b"")

    journal = Journal(Path(os.devnull), cache, TAKEN_AWAY[folder], take_away)

    def work() -> None:
        journal.follow()
        run_main("cache-teachers", run)

    fails(Child(work), str(cache))
    place.unlink()
    if away.exists():
        away.rename(place)
    assert_finished(cache, config, whole)


@pytest.mark.parametrize(("workers", "unit"), [(1, "00001-r000"), (2, "00001-r001")])
def test_a_model_that_fails_on_one_batch_is_one_message(
    tmp_path, configure, few, whole, workers, unit
):
    import transformers

    cache, run = tmp_path / "cache", tmp_path / "run.yaml"
    config = configure(cache, few, CORPUS)
    run.write_text(dump_config(config))

    def work() -> None:
        fork_workers()
        body, original, current = transformers.BertModel.forward, make_unit.run_unit, []

        def run_unit(*arguments: Any, **named: Any) -> Any:
            current[:] = [arguments[1].name]
            return original(*arguments, **named)

        def forward(model: Any, input_ids: Any = None, **named: Any) -> Any:
            if current == [unit] and len(input_ids) > 2:
                raise RuntimeError("the tensors do not fit\ntogether")
            return body(model, input_ids, **named)

        make_unit.run_unit, transformers.BertModel.forward = run_unit, forward
        run_main("cache-teachers", run, "--workers", workers)

    fails(Child(work), "teacher 'lm' failed on a batch", "the tensors do not fit")
    there = {Path(name).stem for name in units(cache)}
    assert unit not in there
    if workers == 1:
        order = ["00000-r000", "00001-r000", "00000-r001", "00001-r001"]
        assert there == set(order[: order.index(unit)])
    assert_finished(cache, config, whole)


# --- a teacher that was never finished ------------------------------------------------------------


def failing_first(config: Any) -> None:
    """Run until the matrix of hidden states is stored; the first forward pass then fails."""

    def work() -> None:
        def fail(*arguments: Any, **named: Any) -> None:
            raise KeyboardInterrupt

        make_unit.run_unit = fail
        cache_teachers(config, only=["hidden"])

    assert Child(work).wait() == 1


def test_a_corrected_model_has_its_own_matrix(tmp_path, configure, few, make_model, wordpiece):
    """The name was free as long as no unit of the teacher was written: so is its matrix's place."""
    other = make_model("llama", "AutoModelForCausalLM", wordpiece, seed=5)
    corrected = [few[1] | {"model": str(other)}]
    fresh = configure(tmp_path / "fresh", corrected, CORPUS)
    cache_teachers(fresh)
    failing_first(configure(tmp_path / "cache", few[1:], CORPUS))
    cache_teachers(configure(tmp_path / "cache", corrected, CORPUS))
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")


def test_a_teacher_given_up_before_its_first_unit_harms_nothing(tmp_path, configure, few):
    failing_first(configure(tmp_path / "cache", few, CORPUS))
    cache_teachers(configure(tmp_path / "cache", few[:1], CORPUS))
    assert verify_cache(str(tmp_path / "cache")).problems == []
    assert list(Cache.open(tmp_path / "cache").teachers) == ["lm"]
