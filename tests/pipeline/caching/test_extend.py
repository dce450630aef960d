"""A finished cache grows: teachers, replicas, text, temperatures and candidates are added to it.

What was there keeps its name and its bytes, only what is missing is computed, and in the end there
is what a cache made in one go has. At every moment in between the cache can be opened and read.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.example import TokenTargets
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import LocalStore
from rekindle.pipeline.caching import cache_teachers as stage_one
from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.train.device_batch import kd_targets, sparse_targets

NOISE = 2e-4
CPU = torch.device("cpu")
AUTO = {"masked_lm": "AutoModelForMaskedLM", "causal_lm": "AutoModelForCausalLM"}
Files = dict[Path, tuple[int, bytes]]
Ran = list[tuple[str, str, str]]  # teacher, part, unit


# --- making and watching --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory, corpus_file) -> Path:
    """The corpus in four files, a.jsonl to d.jsonl."""
    folder = tmp_path_factory.mktemp("texts")
    lines = corpus_file.read_text().splitlines(keepends=True)
    for name, part in zip(
        "abcd", (lines[:8], lines[8:11], lines[11:13], lines[13:15]), strict=True
    ):
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder


@pytest.fixture(scope="module")
def models(make_model, wordpiece) -> dict[str, Path]:
    return {
        "masked_lm": make_model("bert", AUTO["masked_lm"], wordpiece),
        "causal_lm": make_model("llama", AUTO["causal_lm"], wordpiece),
        "other": make_model("llama", AUTO["causal_lm"], wordpiece, seed=9),
    }


Make = Callable[..., Any]


@pytest.fixture(scope="module")
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


@pytest.fixture
def ran(monkeypatch) -> Ran:
    """Every unit that is computed."""
    found: Ran = []
    original = stage_one.run_unit

    def noted(teacher: Any, corpus: Any, view: Any, unit: Any, **options: Any) -> Any:
        found.append((teacher.info.name, teacher.info.part, unit.name))
        return original(teacher, corpus, view, unit, **options)

    monkeypatch.setattr(stage_one, "run_unit", noted)
    return found


def files_of(path: Path) -> Files:
    """Every file but the roll-up: its inode and its bytes."""
    found = [p for p in path.rglob("*") if p.is_file() and p.name != "cache.json"]
    return {p: (p.stat().st_ino, p.read_bytes()) for p in found}


def assert_kept(before: Files, path: Path) -> None:
    """Whatever was there has its name, its bytes, and was not even written anew."""
    after = files_of(path)
    assert {p: after.get(p) for p in before} == before


def shards(path: Path, *folders: str) -> dict[str, bytes]:
    """The bytes of every committed shard below ``folders``, by set and unit."""
    found = {}
    for commits in sorted(path.rglob("commits")):
        folder = commits.parent.relative_to(path).as_posix()
        if not folders or folder.startswith(folders):
            for unit, commit in ShardSet(LocalStore(path), folder).committed().items():
                found[f"{folder}/{unit}"] = (path / folder / commit.path).read_bytes()
    return found


def digests(cache: Cache) -> list[str]:
    found = [cache.corpus.shard(i).table()["digest"].to_pylist() for i in range(shard_count(cache))]
    return list(itertools.chain(*found))


def shard_count(cache: Cache) -> int:
    return len(cache.corpus.commits)


def rows(cache: Cache) -> list[int]:
    return [commit.rows for commit in cache.corpus.commits]


def examples(cache: Cache) -> Iterator[Any]:
    return (cache.example(index) for index in range(len(cache)))


def assert_same_targets(grown: Cache, whole: Cache, name: str = "lm") -> None:
    """Example by example: ids equal, values within the codec's bound (batches round otherwise)."""
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


@torch.no_grad()
def logits_of(model: Any, target: TokenTargets) -> np.ndarray:
    ids = torch.tensor([list(map(int, target.input_ids))])
    return model(input_ids=ids).logits[0].double().numpy()[target.positions]


def assert_tails_are_the_models(cache: Cache, directory: Path, task: str, taus: set[float]) -> None:
    """The mass outside the ids that are stored, at every temperature, in float64."""
    auto = getattr(transformers, AUTO[task])
    model = auto.from_pretrained(str(directory), dtype=torch.float32).eval()
    compared = 0
    for example in examples(cache):
        for target in example.targets["lm"]:
            logits = logits_of(model, target)
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


@pytest.fixture(scope="module")
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


UNITS = {"causal_lm": 3, "masked_lm": 6}


def units(task: str, shards: range | list[int]) -> list[str]:
    replicas = [""] if task == "causal_lm" else ["-r000", "-r001"]
    return [f"{shard:05d}{replica}" for replica in replicas for shard in shards]


# --- a teacher, replicas --------------------------------------------------------------------------


def test_a_further_teacher(tmp_path, make, copied, models, ran):
    path = copied("causal_lm")
    before = files_of(path)
    more = ({"name": "two", "model": str(models["other"]), "task": "causal_lm"},)
    assert cache_teachers(make(path, more=more)) == StageOne(12, 3, 3)
    assert ran == [("two", "", unit) for unit in units("causal_lm", [0, 1, 2])]
    assert_kept(before, path)
    assert_sound(path)
    cache_teachers(make(tmp_path / "whole", more=more))
    assert shards(path) == shards(tmp_path / "whole")


def test_further_replicas(tmp_path, make, copied, ran):
    path = copied("masked_lm")
    before = files_of(path)
    assert cache_teachers(make(path, task="masked_lm", replicas=4)) == StageOne(12, 6, 6)
    assert ran == [("lm", "", f"{s:05d}-r{r:03d}") for r in (2, 3) for s in (0, 1, 2)]
    assert_kept(before, path)
    assert_sound(path)
    cache_teachers(make(tmp_path / "whole", task="masked_lm", replicas=4))
    assert shards(path) == shards(tmp_path / "whole")
    assert [t.replica for t in Cache.open(path).example(3).targets["lm"]] == [0, 1, 2, 3]


def test_fewer_replicas_than_there_are_take_nothing_away(make, copied, ran):
    path = copied("masked_lm")
    before = files_of(path)
    assert cache_teachers(make(path, task="masked_lm", replicas=1)).units_done == 0
    assert ran == []
    assert files_of(path) == before
    assert Cache.open(path).teachers["lm"].replicas == 2


# --- a longer corpus ------------------------------------------------------------------------------

LONGER = {
    "a larger limit": {"limit": 23, "files": "a"},
    "no limit": {"limit": None, "files": "a"},
    "a file, no limit": {"limit": None, "files": "ab"},
    "a file, a larger limit": {"limit": 23, "files": "ab"},
    "files, by glob": {"limit": None, "glob": True, "files": "abcd"},
}


def grow_folder(folder: Path, texts: Path, names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(texts / f"{name}.jsonl", folder)
    return folder


@pytest.mark.parametrize("packing", ["document", "contiguous"])
@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
@pytest.mark.parametrize("change", LONGER)
def test_a_longer_corpus(tmp_path, make, texts, ran, task, packing, change):
    """The old sequences stay, the rest of the source follows, and only that is run."""
    values = dict(LONGER[change])
    first: dict[str, Any] = {"files": "a", "limit": 7}
    if values.pop("glob", False):
        folder = grow_folder(tmp_path / "texts", texts, "a")
        names = values.pop("files")
        first = {"files": "*", "limit": None, "folder": folder}
        values = {"files": "*", "limit": None, "folder": folder}
    path = tmp_path / "cache"
    cache_teachers(make(path, task=task, packing=packing, **first))
    old = Cache.open(path)
    old_digests, old_rows = digests(old), rows(old)
    before = files_of(path)
    ran.clear()
    if "folder" in values:
        grow_folder(folder, texts, names)
    done = cache_teachers(make(path, task=task, packing=packing, **values))
    cache = Cache.open(path)
    new = list(range(len(old_rows), shard_count(cache)))
    assert new
    assert ran == [("lm", "", unit) for unit in units(task, new)]
    assert done == StageOne(len(cache), len(ran), len(units(task, range(len(old_rows)))))
    assert_kept(before, path)
    assert_sound(path)
    assert rows(cache)[: len(old_rows)] == old_rows
    assert old_rows[-1] < 5  # there is a short shard in the middle
    assert digests(cache)[: len(old)] == old_digests
    cache_teachers(make(tmp_path / "whole", task=task, packing=packing, **values))
    whole = Cache.open(tmp_path / "whole")
    if packing == "document" or change in ("a larger limit", "no limit") or "folder" not in values:
        assert_same_targets(cache, whole)
    else:  # text that was at its end was packed as such; what follows begins a sequence
        alone = {"files": "*", "limit": None, "folder": grow_folder(tmp_path / "n", texts, "bcd")}
        cache_teachers(make(tmp_path / "rest", task=task, packing=packing, **alone))
        assert digests(cache)[len(old) :] == digests(Cache.open(tmp_path / "rest"))
    # And again: there is nothing left to do.
    after = files_of(path)
    assert cache_teachers(make(path, task=task, packing=packing, **values)).units_done == 0
    assert files_of(path) == after


def test_grown_again_and_again(tmp_path, make, ran):
    """Every growth leaves a short shard; limits, files and both by turns."""
    path = tmp_path / "cache"
    steps = [("a", 3), ("a", 8), ("ab", 8), ("ab", 16), ("abc", 22), ("abcd", None)]
    for files, limit in steps:
        before = files_of(path)
        ran.clear()
        result = cache_teachers(make(path, files=files, limit=limit))
        assert_kept(before, path)
        cache = Cache.open(path)
        assert result.corpus_sequences == len(cache) == (limit or len(cache))
        assert len(ran) == result.units_done
        assert_sound(path)
    assert rows(cache)[:6] == [3, 5, 5, 3, 5, 1]
    cache_teachers(make(tmp_path / "whole", files="abcd", limit=None))
    assert_same_targets(cache, Cache.open(tmp_path / "whole"))
    assert len(list((path / "corpus").glob("growth-*.json"))) == 5


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_grown_before_it_was_finished(tmp_path, make, monkeypatch, stop):
    """A corpus that was interrupted after ``stop`` shards may be asked for as a longer one."""
    path, original, written = tmp_path / "cache", ShardSet.write, []

    def failing(self: ShardSet, unit: str, *arguments: Any, **options: Any) -> Any:
        if self.folder == "corpus" and len(written) == stop:
            raise KeyboardInterrupt
        written.append(unit)
        return original(self, unit, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ShardSet, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(make(path, files="a", limit=17))
    cache_teachers(make(path, files="ab", limit=None))
    assert_sound(path)
    cache_teachers(make(tmp_path / "whole", files="ab", limit=None))
    assert_same_targets(Cache.open(path), Cache.open(tmp_path / "whole"))


def test_grown_in_the_middle_of_growing(tmp_path, make, monkeypatch):
    path, original, calls = tmp_path / "cache", ShardSet.write, []
    cache_teachers(make(path, limit=3))

    def failing(self: ShardSet, *arguments: Any, **options: Any) -> Any:
        calls.append(self.folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ShardSet, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(make(path, limit=14))
    before = files_of(path)
    cache_teachers(make(path, limit=20, files="ab"))
    assert_kept(before, path)
    assert_sound(path)
    cache_teachers(make(tmp_path / "whole", limit=20, files="ab"))
    assert_same_targets(Cache.open(path), Cache.open(tmp_path / "whole"))


def test_a_corpus_grown_for_every_kind_of_teacher(tmp_path, make, models, make_model, wordpiece):
    """Samples, states and dense targets, task heads, and all codecs: new shards beside the old."""
    classes = make_model("bert", "AutoModelForSequenceClassification", wordpiece, num_labels=3)
    base = {"model": str(models["causal_lm"]), "task": "causal_lm"}
    kinds = [
        {"kind": "threshold", "codec": "compact"},
        {"kind": "random", "k": 9},
        {"kind": "dense"},
        {"kind": "hidden"},
        {"codec": "precise"},
    ]
    more = tuple(base | {"name": f"t{i}", "targets": kind} for i, kind in enumerate(kinds))
    more += (
        {"name": "classes", "model": str(classes), "task": "sequence_classification"},
        {
            "name": "pairs",
            "model": str(classes),
            "task": "sequence_classification",
            "pairs": "adjacent",
        },
    )
    path = tmp_path / "cache"
    cache_teachers(make(path, limit=7, more=more))
    before = files_of(path)
    done = cache_teachers(make(path, limit=12, more=more))
    assert (done.units_done, done.units_present) == (8, 16)
    assert_kept(before, path)
    assert_sound(path)
    cache_teachers(make(tmp_path / "whole", limit=12, more=more))
    grown, whole = Cache.open(path), Cache.open(tmp_path / "whole")
    for one, other in zip(examples(grown), examples(whole), strict=True):
        for name in ("t0", "t1", "t2", "t3", "t4"):
            (a,), (b,) = one.targets[name], other.targets[name]
            assert np.array_equal(a.ids, b.ids)
            wide = np.isfinite(b.log_probs)
            assert np.abs(a.log_probs[wide] - b.log_probs[wide]).max() < 0.1
        (a,), (b,) = one.targets["classes"], other.targets["classes"]
        assert np.abs(a.logits - b.logits).max() < 1e-3


# --- temperatures and candidates ------------------------------------------------------------------


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_further_temperatures(tmp_path, make, copied, models, ran, task):
    """Tail masses of the ids that are stored; nothing else is made."""
    path = copied(task)
    before, size = files_of(path), Cache.open(path).teachers["lm"].bytes
    taus = (1.0, 4.0, 0.5)  # 2 stays, though it is not asked for
    result = cache_teachers(make(path, task=task, taus=taus))
    assert result == StageOne(12, UNITS[task], UNITS[task])
    parts = {part for _, part, _ in ran}
    assert len(parts) == 1
    assert "" not in parts
    assert [unit for _, _, unit in ran] == units(task, range(3))
    assert_kept(before, path)
    assert_sound(path)
    cache = Cache.open(path)
    assert set(cache.teachers["lm"].info.temperatures) == {0.5, 1.0, 2.0, 4.0}
    assert cache.teachers["lm"].info.k == 4
    added = [p for p in path.rglob("*.arrow") if p not in before]
    assert len(added) == UNITS[task]
    positions = cache.teachers["lm"].positions
    assert cache.teachers["lm"].bytes - size < UNITS[task] * 6000 + 8 * positions
    assert_tails_are_the_models(cache, models[task], task, {0.5, 1.0, 2.0, 4.0})
    cache_teachers(make(tmp_path / "whole", task=task, taus=(0.5, 1.0, 2.0, 4.0)))
    assert_same_targets(cache, Cache.open(tmp_path / "whole"))


@pytest.mark.parametrize("codec", ["default", "precise", "compact"])
def test_further_temperatures_and_candidates_in_every_codec(tmp_path, make, models, codec):
    path = tmp_path / "cache"
    cache_teachers(make(path, codec=codec))
    for step in ({"taus": (1.0, 3.0)}, {"k": 9, "taus": (1.0, 2.0)}, {"k": 9, "taus": (8.0,)}):
        before = files_of(path)
        result = cache_teachers(make(path, codec=codec, **step))
        assert result.units_done == 3
        assert_kept(before, path)
        assert_sound(path)
    cache = Cache.open(path)
    assert cache.teachers["lm"].info.codec == codec
    assert cache.teachers["lm"].info.k == 9
    assert_tails_are_the_models(cache, models["causal_lm"], "causal_lm", {1.0, 2.0, 3.0, 8.0})
    cache_teachers(make(tmp_path / "whole", codec=codec, k=9, taus=(1.0, 2.0, 3.0, 8.0)))
    assert_same_targets(cache, Cache.open(tmp_path / "whole"))


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_larger_k(tmp_path, make, copied, models, ran, task):
    path = copied(task)
    before = files_of(path)
    result = cache_teachers(make(path, task=task, k=9))
    assert result == StageOne(12, UNITS[task], 0)
    assert [unit for _, _, unit in ran] == units(task, range(3))
    assert_kept(before, path)
    assert_sound(path)
    cache = Cache.open(path)
    assert cache.teachers["lm"].info.k == 9
    assert_tails_are_the_models(cache, models[task], task, {1.0, 2.0})
    cache_teachers(make(tmp_path / "whole", task=task, k=9))
    assert_same_targets(cache, Cache.open(tmp_path / "whole"))


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_larger_k_and_further_temperatures_at_once(tmp_path, make, copied, models, ran, task):
    path = copied(task)
    before = files_of(path)
    assert cache_teachers(make(path, task=task, k=9, taus=(8.0,))).units_done == UNITS[task]
    assert_kept(before, path)
    assert_sound(path)
    cache = Cache.open(path)
    # What could be read before can be read now.
    assert_tails_are_the_models(cache, models[task], task, {1.0, 2.0, 8.0})
    cache_teachers(make(tmp_path / "whole", task=task, k=9, taus=(1.0, 2.0, 8.0)))
    assert_same_targets(cache, Cache.open(tmp_path / "whole"))


STEPS = {
    "temperature": {"taus": (1.0, 4.0)},
    "candidates": {"k": 9},
    "text": {"limit": 17},
}


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)))
def test_in_every_order(tmp_path, make, copied, ran, order):
    """Each step asks for all that the steps before it asked for; the end is the same."""
    path, asked = copied("causal_lm"), {}
    for name in order:
        asked |= STEPS[name]
        before = files_of(path)
        ran.clear()
        result = cache_teachers(make(path, **asked))
        assert len(ran) == result.units_done > 0
        assert len(set(ran)) == len(ran)
        assert_kept(before, path)
        assert_sound(path)
    cache = Cache.open(path)
    assert cache.teachers["lm"].coverage == 1
    cache_teachers(make(tmp_path / "whole", k=9, taus=(1.0, 2.0, 4.0), limit=17))
    assert_same_targets(cache, Cache.open(tmp_path / "whole"))
    ran.clear()
    assert cache_teachers(make(path, **asked)).units_done == 0
    assert ran == []


def test_temperatures_twice_in_a_row(make, copied, models, ran):
    """Only those that are new, each time; a part of their own each time."""
    path = copied("causal_lm")
    for taus, done in (((1.0, 4.0), 3), ((1.0, 4.0, 8.0), 3), ((8.0, 0.5, 4.0), 3), ((0.5,), 0)):
        before = files_of(path)
        ran.clear()
        assert cache_teachers(make(path, taus=taus)).units_done == len(ran) == done
        assert_kept(before, path)
        assert_sound(path)
    cache = Cache.open(path)
    assert_tails_are_the_models(cache, models["causal_lm"], "causal_lm", {0.5, 1.0, 2.0, 4.0, 8.0})


def test_k_twice_in_a_row(make, copied, models, ran):
    path = copied("causal_lm")
    for k, done in ((6, 3), (9, 3), (7, 0), (4, 0), (1, 0)):
        before = files_of(path)
        ran.clear()
        assert cache_teachers(make(path, k=k)).units_done == len(ran) == done
        assert_kept(before, path)
    assert_sound(path)
    assert Cache.open(path).teachers["lm"].info.k == 9


def test_k_of_the_whole_vocabulary_is_exact_when_it_is_added(make, copied):
    path = copied("causal_lm")
    assert cache_teachers(make(path, k=100_000)).units_done == 3
    info = Cache.open(path).teachers["lm"].info
    assert (info.k, info.estimator["bias"]) == (info.vocabulary_size, "exact")
    assert cache_teachers(make(path, k=100_000)).units_done == 0


def test_many_temperatures_at_once(make, copied, models):
    """Their number is not limited by what makes a readable name."""
    path = copied("causal_lm")
    taus = tuple(1 + n / 8 for n in range(24))
    assert cache_teachers(make(path, taus=taus)).units_done == 3
    assert_sound(path)
    assert_tails_are_the_models(
        Cache.open(path), models["causal_lm"], "causal_lm", {*taus, 1.0, 2.0}
    )


def test_temperatures_that_differ_in_the_eighth_digit(make, copied):
    path = copied("causal_lm")
    for tau in (3.0, 3.0000001, 0.00001):
        assert cache_teachers(make(path, taus=(1.0, tau))).units_done == 3
    assert set(Cache.open(path).teachers["lm"].info.temperatures) == {
        1.0,
        2.0,
        3.0,
        3.0000001,
        0.00001,
    }


@pytest.mark.parametrize(
    "less", [{"k": 2}, {"taus": (1.0,)}, {"k": 1, "taus": (2.0,)}, {"k": 4, "taus": ()}]
)
def test_less_than_there_is_asks_for_nothing(make, copied, ran, less):
    path = copied("causal_lm")
    before = files_of(path)
    assert cache_teachers(make(path, **less)) == StageOne(12, 0, 3)
    assert ran == []
    assert files_of(path) == before
    info = Cache.open(path).teachers["lm"].info
    assert (info.k, info.temperatures) == (4, (1.0, 2.0))


def test_less_than_was_added_makes_new_text_as_rich(make, copied, ran):
    """A longer corpus gets the candidates and temperatures that the rest of it has."""
    path = copied("causal_lm")
    cache_teachers(make(path, k=9, taus=(1.0, 4.0)))
    ran.clear()
    cache_teachers(make(path, limit=17))
    cache = Cache.open(path)
    assert cache.teachers["lm"].info.k == 9
    assert set(cache.teachers["lm"].info.temperatures) == {1.0, 2.0, 4.0}
    assert len(ran) == 1
    assert_sound(path)
    assert cache.example(16).targets["lm"][0].ids.shape[1] == 9


def test_new_text_keeps_temperatures_that_are_not_asked_for(make, copied, ran):
    """The union stays readable: a temperature is not lost because the next run leaves it out."""
    path = copied("causal_lm")
    cache_teachers(make(path, taus=(1.0, 4.0)))
    assert set(Cache.open(path).teachers["lm"].info.temperatures) == {1.0, 2.0, 4.0}
    cache_teachers(make(path, limit=17))
    assert set(Cache.open(path).teachers["lm"].info.temperatures) == {1.0, 2.0, 4.0}


# --- under way ------------------------------------------------------------------------------------


@contextmanager
def stopped(monkeypatch, count: int) -> Iterator[None]:
    """A run that is killed before it computes unit number ``count``."""
    original, calls = stage_one.run_unit, []

    def failing(*arguments: Any, **options: Any) -> Any:
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stage_one, "run_unit", failing)
        with pytest.raises(KeyboardInterrupt):
            yield


def trains(cache: Cache, tau: float, k: int | None) -> None:
    """What a step reads of the whole cache at ``tau``: probabilities that sum to one."""
    info = cache.teachers["lm"].info
    view = info.view if info.view.startswith("masked-") else None
    batch = cache.gather(np.arange(len(cache)), ["lm"], masked_view=view).targets["lm"]
    found = sparse_targets(batch, tau, k, CPU)
    assert len(found.ids) == len(batch.rows) > 0
    assert torch.allclose(found.probs.sum(1) + found.tail, torch.ones(len(found.ids)), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    "change", [{"taus": (1.0, 4.0)}, {"k": 9}, {"k": 9, "taus": (4.0,)}], ids=["τ", "k", "both"]
)
def test_interrupted_the_old_state_can_be_read_and_trained_on(
    tmp_path, make, copied, monkeypatch, change, count
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
    cache_teachers(make(tmp_path / "whole", **wanted))
    assert_same_targets(Cache.open(path), Cache.open(tmp_path / "whole"))


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


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
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
    """Text in three stages, candidates and temperatures added between them."""
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
    found = shards(path, "corpus", "views")
    for folder in parts:
        found |= shards(path, folder)
    return found


@pytest.mark.parametrize("how", ["record", "data", "damaged"])
def test_a_lost_shard_of_any_stage_is_made_again(tmp_path, make, much_grown, how):
    path = shutil.copytree(much_grown[0], tmp_path / "cache")
    config = make(path, task="masked_lm", limit=20, files="ab", k=9, taus=(8.0, 4.0))
    whole = in_use(path)
    lost = [n for n in whole if n.startswith("corpus/")]
    lost += [n for i, n in enumerate(sorted(whole)) if n not in lost and i % 4 == 0]
    assert {n.rpartition("/")[0] for n in lost} == {n.rpartition("/")[0] for n in whole}
    for name in lost:
        folder, _, unit = name.rpartition("/")
        commit = ShardSet(LocalStore(path), folder).commit(unit)
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
    (found,) = audit_cache(str(path), config, 20).values()
    assert found["rows"] > 50
    assert abs(found["kl"]) < 5e-3


# --- students -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_students_read_the_new_temperature_and_k(make, copied, models, task):
    path = copied(task)
    cache_teachers(make(path, task=task, k=9, taus=(4.0,)))
    cache_teachers(make(path, task=task, k=9, taus=(8.0,)))
    cache = Cache.open(path)
    model = getattr(transformers, AUTO[task]).from_pretrained(str(models[task])).eval()
    view = cache.teachers["lm"].info.view
    masked = view if view.startswith("masked-") else None
    batch = cache.gather(np.arange(12), ["lm"], masked_view=masked)
    for tau, k in itertools.product((1.0, 2.0, 4.0, 8.0), (None, 9, 6, 1)):
        kd_targets(batch.targets["lm"], tau, k, CPU)
        found = sparse_targets(batch.targets["lm"], tau, k, CPU)
        at = 0
        for index in range(12):
            target = cache.example(index).targets["lm"][0]
            exact = torch.softmax(torch.from_numpy(logits_of(model, target)) / tau, 1)
            mine = slice(at, at + len(target.positions))
            at = mine.stop
            assert found.ids[mine].shape == (len(target.positions), k or 9)
            p = exact.gather(1, found.ids[mine])
            error = (found.probs[mine].double() / p).log().abs()
            span = (target.log_probs[:, :1] - target.log_probs[:, -1:]).clip(0, 32)
            bound = 2 * (span / 510 + 1 / 1024) / tau + 1 / 2048 + NOISE / tau
            assert (error.numpy() <= bound)[p.numpy() > 1e-12].all()
        assert at == len(found.ids)


def test_a_student_trains_on_a_grown_cache(tmp_path, make, copied, models):
    from rekindle.data.settings import parse_settings
    from rekindle.train.config import StudentConfig, TrainConfig
    from rekindle.train.loop import train_student

    path = copied("masked_lm")
    cache_teachers(make(path, task="masked_lm", k=9, taus=(1.0, 4.0), limit=17))
    config = parse_settings(
        TrainConfig,
        {
            "steps": 3,
            "batch_sequences": 6,
            "warmup_steps": 1,
            "evaluate_sequences": 4,
            "objective": {"distill": [{"teachers": ["lm"], "temperature": 4.0, "k": 7}]},
        },
    )
    student = StudentConfig(model=str(models["masked_lm"]), task="masked_lm")
    result = train_student(Cache.open(path), student, config, tmp_path / "run")
    assert result.coverage["sequences_with_kd"] > 0
    assert result.coverage["sequences_ce_only"] == result.coverage["sequences_neither"] == 0
    # A teacher's own weights: what is left is the other masks' and dropout's doing.
    assert np.isfinite(result.evaluation["kl/lm"])


# --- what is no growth ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 32}, "sequence_length: 24 there, 32 here"),
        ({"sequence_length": 32, "limit": 17}, "sequence_length: 24 there, 32 here"),
        ({"packing": "contiguous"}, "packing: 'document' there, 'contiguous' here"),
        ({"domain_field": None, "limit": None}, "domain_field: 'domain' there, None here"),
        ({"limit": 11}, "limit_sequences: 12 there, 11 here"),
        ({"files": "b"}, "source has changed.*[ab].jsonl"),
        ({"files": "ba"}, "source.*[ab].jsonl"),
        ({"files": "ba", "limit": None}, "source.*[ab].jsonl"),
    ],
)
def test_another_corpus_is_refused(make, copied, ran, change, message):
    path = copied("causal_lm")
    before = files_of(path)
    with pytest.raises(CacheMismatchError, match=message):
        cache_teachers(make(path, **change))
    assert ran == []
    assert files_of(path) == before


def test_another_tokenizer_is_refused(configure, copied, texts, bytelevel, ran):
    path = copied("causal_lm")
    before = files_of(path)
    for limit in (12, 17):
        corpus = {
            "source": [str(texts / "a.jsonl")],
            "tokenizer": str(bytelevel),
            "limit_sequences": limit,
        }
        with pytest.raises(CacheMismatchError, match="another tokenizer"):
            cache_teachers(configure(path, [], corpus=corpus))
    assert files_of(path) == before


@pytest.fixture
def of_two_files(tmp_path, make, texts) -> tuple[Path, Path]:
    """A cache of the whole of b.jsonl and d.jsonl, in a folder of its own."""
    folder = grow_folder(tmp_path / "texts", texts, "bd")
    cache_teachers(make(tmp_path / "cache", folder=folder, files="bd", limit=None))
    return tmp_path / "cache", folder


@pytest.mark.parametrize("files", ["db", "dbc", "bcd", "cbd", "cd", "bc"])
def test_files_in_another_order_or_between_are_refused(of_two_files, make, texts, ran, files):
    path, folder = of_two_files
    before = files_of(path)
    grow_folder(folder, texts, "c")
    ran.clear()
    with pytest.raises(CacheMismatchError, match=r"[bcd]\.jsonl"):
        cache_teachers(make(path, folder=folder, files=files, limit=None))
    assert ran == []
    assert files_of(path) == before


@pytest.mark.parametrize("files", ["ba", "bac"])
def test_another_order_of_a_limited_corpus_is_refused(tmp_path, make, texts, files):
    """What was read of the first file would be read again, and of another file skipped."""
    path = tmp_path / "cache"
    cache_teachers(make(path, files="ab", limit=7))
    with pytest.raises(CacheMismatchError, match=r"[abc]\.jsonl"):
        cache_teachers(make(path, files=files, limit=None))


def test_a_file_that_a_glob_finds_between_is_refused(tmp_path, make, texts):
    folder, path = grow_folder(tmp_path / "texts", texts, "bd"), tmp_path / "cache"
    cache_teachers(make(path, folder=folder, files="*", limit=None))
    before = files_of(path)
    grow_folder(folder, texts, "c")
    with pytest.raises(CacheMismatchError, match=r"source has changed.*[cd]\.jsonl"):
        cache_teachers(make(path, folder=folder, files="*", limit=None))
    assert files_of(path) == before


@pytest.mark.parametrize("change", ["a letter", "a line more", "gone"])
@pytest.mark.parametrize("asked", [{}, {"limit": None}, {"limit": None, "files": "bdc"}])
def test_a_changed_file_is_refused(tmp_path, make, texts, change, asked):
    folder, path = grow_folder(tmp_path / "texts", texts, "bdc"), tmp_path / "cache"
    cache_teachers(make(path, folder=folder, files="bd", limit=7))
    before = files_of(path)
    file = folder / "b.jsonl"
    text = file.read_text()
    if change == "gone":
        file.unlink()
        if not asked:
            pytest.skip("a finished corpus needs its source no more")
    elif change == "a letter":
        file.write_text(text.replace("the", "teh", 1))
    else:
        file.write_text(text + text.splitlines()[0] + "\n")
    error = InputError if change == "gone" else CacheMismatchError
    with pytest.raises((error, CacheMismatchError), match=r"b\.jsonl"):
        cache_teachers(make(path, **({"files": "bd", "limit": 7} | asked), folder=folder))
    assert files_of(path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "precise"}, "codec: 'default' there, 'precise' here"),
        ({"codec": "compact", "k": 9}, "codec: 'default' there, 'compact' here"),
        ({"targets": {"kind": "dense"}}, "kind: 'topk' there, 'dense' here"),
        ({"targets": {"kind": "hidden"}}, "kind: 'topk' there, 'hidden' here"),
        ({"targets": {"kind": "threshold", "k": 4}}, "kind: 'topk' there, 'threshold' here"),
        ({"model": "other"}, "other weights"),
        ({"model": "other", "k": 9}, "other weights"),
        ({"model": "other", "taus": (8.0,)}, "other weights"),
    ],
)
def test_another_teacher_of_that_name_is_refused(make, copied, models, ran, change, message):
    path = copied("causal_lm")
    before = files_of(path)
    change = dict(change)
    if "model" in change:
        change["model"] = models[change["model"]]
    with pytest.raises(CacheMismatchError, match=f"teacher 'lm' .*{message}"):
        cache_teachers(make(path, **change))
    assert ran == []
    assert files_of(path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 9}, "k: 4 there, 9 here"),
        ({"temperatures": [2.0]}, r"temperatures: \[1.0\] there, \[2.0\] here"),
        ({"kind": "random"}, "kind: 'threshold' there, 'random' here"),
    ],
)
def test_a_sample_cannot_be_added_to(tmp_path, make, change, message):
    sample = {"kind": "threshold", "k": 4, "temperatures": [1.0]}
    cache_teachers(make(tmp_path, targets=sample))
    with pytest.raises(CacheMismatchError, match=message):
        cache_teachers(make(tmp_path, targets=sample | change))


def test_an_extension_of_another_teacher_is_refused(make, copied, tmp_path, models):
    """Extensions that were copied from elsewhere, whole and sealed, are not believed."""
    path = copied("causal_lm")
    cache_teachers(make(tmp_path / "other", model=models["other"], k=9))
    cache_teachers(make(tmp_path / "other", model=models["other"], k=9))
    cache_teachers(make(tmp_path / "base", model=models["other"]))
    cache_teachers(make(tmp_path / "base", model=models["other"], k=9))
    shutil.copytree(tmp_path / "base/targets/lm/extensions", path / "targets/lm/extensions")
    with pytest.raises(CacheMismatchError, match=r"extensions/.* extends another teacher"):
        Cache.open(path)


def test_an_extensions_description_is_sealed(make, copied):
    path = copied("causal_lm")
    cache_teachers(make(path, k=9))
    (file,) = (path / "targets/lm/extensions").glob("*/teacher.json")
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"k": 8}))
    assert any("teacher.json" in problem for problem in verify_cache(str(path)).problems)
