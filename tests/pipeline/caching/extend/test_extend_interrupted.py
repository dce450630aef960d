"""A growth that is interrupted, killed or damaged: the cache opens, and the rest is made."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import LocalStore
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.train.device_batch import sparse_targets
from testlib.caches import committed, examples
from testlib.stage_one.extending import (
    CPU,
    assert_kept,
    assert_same_targets,
    assert_sound,
    digests,
    files_of,
    rows,
    stopped,
)


def trains(cache: Cache, tau: float, k: int | None) -> None:
    """What a step reads of the whole cache at ``tau``: probabilities that sum to one."""
    info = cache.teachers["lm"].info
    view = info.view if info.view.startswith("masked-") else None
    batch = cache.gather(np.arange(len(cache)), ["lm"], masked_view=view).targets["lm"]
    found = sparse_targets(batch, tau, k, CPU)
    assert len(found.ids) == len(batch.rows) > 0
    assert torch.allclose(found.probs.sum(1) + found.tail, torch.ones(len(found.ids)), atol=1e-5)


@pytest.mark.covering
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    "change", [{"taus": (1.0, 4.0)}, {"k": 9}, {"k": 9, "taus": (4.0,)}], ids=["τ", "k", "both"]
)
def test_interrupted_the_old_state_can_be_read_and_trained_on(
    make, whole, copied, monkeypatch, change, count
):
    path = copied("causal_lm")
    before = files_of(path)
    old = [e.targets["lm"][0] for e in examples(Cache.open(path))]
    with stopped(monkeypatch, count):
        cache_teachers(make(path, **change))
    cache = Cache.open(path)
    info = cache.teachers["lm"].info
    assert (info.k, info.temperatures) == (4, (1.0, 2.0))
    assert cache.teachers["lm"].coverage == 1
    for example, target in zip(examples(cache), old, strict=True):
        (now,) = example.targets["lm"]
        assert np.array_equal(now.log_probs, target.log_probs)
        assert np.array_equal(now.ids, target.ids)
    for tau in (1.0, 2.0):
        trains(cache, tau, None)
        trains(cache, tau, 3)
    with pytest.raises(InputError, match=r"stores the temperatures \[1.0, 2.0\], not 4.0"):
        trains(cache, 4.0, None)
    assert verify_cache(str(path)).problems == []
    done = len(files_of(path)) - len(before)
    again = cache_teachers(make(path, **change))
    assert again.units_done <= 3
    assert done > 0 or again.units_done == 3
    assert_kept(before, path)
    assert_sound(path)
    wanted = {"k": 4, "taus": (1.0, 2.0)} | change
    wanted["taus"] = tuple({1.0, 2.0, *wanted["taus"]})
    assert_same_targets(Cache.open(path), whole(**wanted))


def test_what_an_interrupted_growth_began_is_finished_by_a_larger_one(make, copied, monkeypatch):
    """k = 9 was begun, k = 7 is then asked for: the one that was begun serves."""
    path = copied("causal_lm")
    with stopped(monkeypatch, 2):
        cache_teachers(make(path, k=9))
    assert cache_teachers(make(path, k=7)).units_done in (1, 2)
    assert Cache.open(path).teachers["lm"].info.k == 9
    assert_sound(path)


def test_new_text_under_way_takes_no_temperature_away(make, copied, monkeypatch):
    """Its candidates are there, its tails at the later temperature not yet: of the old text both
    can still be read.
    """
    path = copied("causal_lm")
    cache_teachers(make(path, taus=(1.0, 4.0)))
    with stopped(monkeypatch, 2):  # of four: candidates and tails of two new shards
        cache_teachers(make(path, taus=(1.0, 4.0), limit=20))
    cache = Cache.open(path)
    assert set(cache.teachers["lm"].info.temperatures) == {1.0, 2.0, 4.0}
    batch = cache.gather(np.arange(12), ["lm"]).targets["lm"]
    sparse_targets(batch, 4.0, None, CPU)


def test_masked_targets_can_be_read_while_the_corpus_grows(make, copied, monkeypatch):
    """The new text has no masks yet; the old text's targets are as they were."""
    path, original = copied("masked_lm"), ShardSet.write

    def failing(self: ShardSet, unit: str, *arguments: Any, **options: Any) -> Any:
        if self.folder != "corpus":
            raise KeyboardInterrupt
        return original(self, unit, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ShardSet, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(make(path, task="masked_lm", limit=17))
    cache = Cache.open(path)
    assert len(cache) == 17
    assert [t.replica for t in cache.example(0).targets["lm"]] == [0, 1]
    assert 0 < cache.teachers["lm"].coverage < 1


# A masked teacher has all files that a causal one has, and those of its masks.
@pytest.mark.parametrize("task", [pytest.param("causal_lm", marks=pytest.mark.slow), "masked_lm"])
def test_killed_at_any_moment_of_growth_the_cache_opens(make, copied, monkeypatch, task):
    """Before every single small file that is created: descriptions, commit records, completions."""
    path = copied(task)
    before = files_of(path)
    old = digests(Cache.open(path))
    longer = {"limit": 14, "files": "ab", "k": 6}
    original, killed, moments = LocalStore.create, [], 0

    def failing(self: LocalStore, name: str, content: bytes) -> bool:
        if not (self.root / name).exists() and name not in killed:
            killed.append(name)
            raise KeyboardInterrupt
        return original(self, name, content)

    def finish(config: Any) -> bool:
        try:
            cache_teachers(config)
        except KeyboardInterrupt:
            return False
        return True

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "create", failing)
        for taus in ((1.0, 4.0), (8.0,)):
            while not finish(make(path, task=task, taus=taus, **longer)):
                moments += 1
                cache = Cache.open(path)
                assert digests(cache)[:12] == old
                assert cache.gather(np.arange(12), [], masked_view=None).digests == old
                assert cache.teachers["lm"].info.k in (4, 6)
                if task == "causal_lm":
                    assert len(cache.example(0).targets["lm"][0].positions) > 0
                assert verify_cache(str(path)).problems == []
    assert moments == len(killed) >= {"causal_lm": 13, "masked_lm": 23}[task]
    assert_kept(before, path)
    report = verify_cache(str(path))
    assert report.problems == []
    assert set(report.coverage.values()) == {1.0}
    info = Cache.open(path).teachers["lm"].info
    assert (info.k, set(info.temperatures)) == (6, {1.0, 2.0, 4.0, 8.0})


# --- what is lost is made again -------------------------------------------------------------------


@pytest.fixture(scope="module")
def much_grown(tmp_path_factory, make) -> tuple[Path, Any]:
    """Text in three additions, candidates and temperatures added between them."""
    path = tmp_path_factory.mktemp("grown") / "cache"
    for step in (
        {"limit": 7},
        {"limit": 12, "taus": (1.0, 4.0)},
        {"limit": 12, "taus": (1.0, 4.0), "k": 9},
        {"limit": 20, "files": "ab", "k": 9, "taus": (8.0, 4.0)},
    ):
        config = make(path, task="masked_lm", **step)
        cache_teachers(config)
    assert rows(Cache.open(path)) == [5, 2, 5, 5, 3]
    return path, config


def in_use(path: Path) -> dict[str, bytes]:
    """Shards of the parts that readers show; what a larger k has replaced may stay lost."""
    teacher = Cache.open(path).teachers["lm"]
    parts = [teacher.main.info.folder, *(part.info.folder for part in teacher.tails)]
    assert len(parts) == 2
    found = committed(path, "corpus", "views")
    for folder in parts:
        found |= committed(path, folder)
    return found


# What is damaged is taken out, and then is lost: tests/pipeline/caching/test_repair.py.
@pytest.mark.parametrize("how", ["record", "data", pytest.param("damaged", marks=pytest.mark.slow)])
def test_a_lost_shard_of_any_addition_is_made_again(tmp_path, make, much_grown, how):
    path = shutil.copytree(much_grown[0], tmp_path / "cache")
    config = make(path, task="masked_lm", limit=20, files="ab", k=9, taus=(8.0, 4.0))
    whole = in_use(path)
    lost = [n for n in whole if n.startswith("corpus/")]
    lost += [n for i, n in enumerate(sorted(whole)) if n not in lost and i % 4 == 0]
    assert {n.rpartition("/")[0] for n in lost} == {n.rpartition("/")[0] for n in whole}
    for name in lost:
        folder, _, unit = name.rpartition("/")
        commit = ShardSet(LocalStore(path), folder).read_record(unit)
        data = path / folder / commit.path
        if how == "record":
            data.unlink()
            (path / folder / "commits" / f"{unit}.json").unlink()
        elif how == "data":
            data.unlink()
        else:
            content = bytearray(data.read_bytes())
            content[len(content) // 2] ^= 4
            data.write_bytes(content)
        cache_teachers(config)
        assert in_use(path) == whole, name
    assert_sound(path)


def test_several_lost_shards_of_different_stages_at_once(tmp_path, make, much_grown):
    path = shutil.copytree(much_grown[0], tmp_path / "cache")
    whole = in_use(path)
    for unit in ("00000", "00001", "00003", "00004"):
        ShardSet(LocalStore(path), "corpus").forget(unit)
    cache_teachers(make(path, task="masked_lm", limit=20, files="ab", k=9, taus=(8.0, 4.0)))
    assert in_use(path) == whole
    assert_sound(path)


def test_a_lost_description_of_an_extension_is_restored(tmp_path, make, much_grown):
    path = shutil.copytree(much_grown[0], tmp_path / "cache")
    parts = sorted((path / "targets/lm/extensions").glob("*/teacher.json"))
    assert len(parts) >= 3
    before = files_of(path)
    for file in parts:
        file.unlink()
    config = make(path, task="masked_lm", limit=20, files="ab", k=9, taus=(8.0, 4.0))
    assert cache_teachers(config).units_done == 0
    after = files_of(path)
    assert {p: content for p, (_, content) in after.items()} == {
        p: content for p, (_, content) in before.items()
    }


def test_the_audit_of_a_grown_cache(much_grown):
    path, config = much_grown
    (found,) = audit_cache(str(path), config, 20).values.values()
    assert found["of_bound"] < 1
    assert found["rows"] > 50
    assert abs(found["kl"]) < 5e-3
