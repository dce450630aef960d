"""A finished cache grows: teachers, replicas and text are added to it.

What was there keeps its name and its bytes, only what is missing is computed, and in the end there
is what a cache made in one go has. At every moment in between the cache can be opened and read.
"""

from itertools import product
from typing import Any

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.storage.shards import ShardSet
from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from testlib.caches import committed, examples
from testlib.stage_one.extending import (
    assert_kept,
    assert_same_targets,
    assert_sound,
    digests,
    files_of,
    grow_folder,
    rows,
    shard_count,
    units,
)


def test_a_further_teacher(tmp_path, make, copied, models, ran):
    path = copied("causal_lm")
    before = files_of(path)
    more = ({"name": "two", "model": str(models["other"]), "task": "causal_lm"},)
    assert cache_teachers(make(path, more=more)) == StageOne(12, 3, 3)
    assert ran == [("two", "", unit) for unit in units("causal_lm", [0, 1, 2])]
    assert_kept(before, path)
    assert_sound(path)
    cache_teachers(make(tmp_path / "whole", more=more))
    assert committed(path) == committed(tmp_path / "whole")


def test_further_replicas(tmp_path, make, copied, ran):
    path = copied("masked_lm")
    before = files_of(path)
    assert cache_teachers(make(path, task="masked_lm", replicas=4)) == StageOne(12, 6, 6)
    assert ran == [("lm", "", f"{s:05d}-r{r:03d}") for r in (2, 3) for s in (0, 1, 2)]
    assert_kept(before, path)
    assert_sound(path)
    cache_teachers(make(tmp_path / "whole", task="masked_lm", replicas=4))
    assert committed(path) == committed(tmp_path / "whole")
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


def cases():
    """Every combination; quick are those of causal models, and one of masked ones."""
    for task, packing, change in product(
        ("causal_lm", "masked_lm"), ("document", "contiguous"), LONGER
    ):
        quick = task == "causal_lm" or (packing, change) == ("contiguous", "a file, a larger limit")
        yield pytest.param(task, packing, change, marks=[] if quick else pytest.mark.slow)


@pytest.mark.covering
@pytest.mark.parametrize(("task", "packing", "change"), cases())
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


def test_grown_again_and_again(tmp_path, make, whole, ran):
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
    assert_same_targets(cache, whole(files="abcd", limit=None))
    assert len(list((path / "corpus").glob("growth-*.json"))) == 5


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_grown_before_it_was_finished(tmp_path, make, whole, monkeypatch, stop):
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
    assert_same_targets(Cache.open(path), whole(files="ab", limit=None))


def test_grown_in_the_middle_of_growing(tmp_path, make, whole, monkeypatch):
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
    assert_same_targets(Cache.open(path), whole(limit=20, files="ab"))


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
