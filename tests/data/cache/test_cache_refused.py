"""What does not fit the format is refused, whoever wrote it."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.data.storage.columns import list_array, list_type, offsets_of
from rekindle.data.storage.seal import SEAL, seal
from rekindle.data.storage.shards import ShardSet, shard_schema
from rekindle.data.storage.store import LocalStore
from testlib.cache_format import write_teacher


def too_large_an_id(columns):
    columns["ids"][3, 1], columns["ids_high"][3] = 0xFFFF, 0xFF  # 262,143 of 200,000


def a_rising_row(columns):
    columns["log_prob_min"][2] = columns["log_prob_max"][2] - 1


def the_last_token(columns):
    columns["positions"][-1] += 1  # there is no token after it to predict


def a_descending_position(columns):
    columns["positions"][:2] = [1, 0]


CHANGES = [
    (too_large_an_id, "ids outside the vocabulary"),
    (a_rising_row, "rising probabilities"),
    (the_last_token, "positions outside its sequences"),
    (a_descending_position, "positions outside its sequences"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_targets_of_strangers_are_validated(copied, change, told):
    write_teacher(copied, change=change)
    cache = Cache.open(copied)
    with pytest.raises(CacheFormatError, match=told):
        list(cache.batches(["big"]))


def test_exchanged_targets_are_noticed(copied):
    """Two teachers of the same shape: nothing but what the shards say of themselves differs."""
    write_teacher(copied, "one")
    write_teacher(copied, "two")
    for part in ("data", "commits"):
        shutil.rmtree(copied / "targets/one" / part)
        shutil.copytree(copied / "targets/two" / part, copied / "targets/one" / part)
    cache = Cache.open(copied)
    cache.gather(np.arange(3), ["two"])
    with pytest.raises(CacheMismatchError, match=r"made by another teacher than teacher\.json"):
        cache.gather(np.arange(3), ["one"])


def test_an_edited_description_is_noticed(copied):
    """Every shard repeats teacher.json; 2.0 read as 3.0 would be a wrong temperature."""
    write_teacher(copied)
    path = copied / "targets/big/teacher.json"
    info = json.loads(path.read_text())
    info.pop(SEAL, None)

    def edited(**changes):
        path.write_bytes(seal(info | changes))
        return Cache.open(copied).gather(np.arange(3), ["big"])

    path.write_text(json.dumps(info | {SEAL: "0" * 64}))
    with pytest.raises(CacheFormatError, match="its checksum does not match"):
        Cache.open(copied)
    with pytest.raises(CacheMismatchError, match=r"made by another teacher than teacher\.json"):
        edited(temperatures=[1.0, 3.0])
    with pytest.raises(CacheFormatError, match="columns that targets/big consists of"):
        edited(k=6)
    assert edited()


def test_targets_of_a_renamed_teacher_are_refused(copied):
    (copied / "targets/mlm").rename(copied / "targets/other")
    with pytest.raises(CacheFormatError, match="describes teacher 'mlm'"):
        Cache.open(copied)


def test_a_teacher_that_was_killed_before_it_began_is_no_teacher(copied):
    (copied / "targets/new").mkdir()
    (copied / "targets/new/.teacher.json.12345678.tmp").write_text("{")
    assert "new" not in Cache.open(copied).teachers
    (copied / "targets/mlm/teacher.json").unlink()  # but one that has targets must say whose
    with pytest.raises(CacheFormatError, match=r"targets/mlm/teacher\.json is missing"):
        Cache.open(copied)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"format_version": 2}', '{"format_version": "1"}', "null"]
)
def test_another_format_version_is_refused(copied, content):
    (copied / "cache.json").write_text(content)
    with pytest.raises(CacheFormatError, match=r"reads format 1|format"):
        Cache.open(copied)


def test_no_cache(tmp_path):
    with pytest.raises(CacheFormatError, match=r"not a Rekindle cache.*cache\.json"):
        Cache.open(tmp_path)


def test_masks_that_the_teacher_did_not_see_are_refused(cache):
    """Views may share positions and differ in what stands there: no shape would tell."""
    view = cache.teacher("mlm").info.view
    assert len(cache.gather(np.arange(4), ["mlm"], masked_view=view).targets["mlm"].rows)
    for other in (None, next(n for n in cache.views if n != view)):
        with pytest.raises(InputError, match=r"'mlm' saw masked-.*its targets belong to other"):
            cache.gather(np.arange(4), ["mlm"], masked_view=other)


def test_batches_refuses_bad_arguments_when_it_is_called(cache):
    for bad in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"batch_sequences": 0}):
        with pytest.raises(ValueError, match="rank in"):
            cache.batches(["clm"], **bad)
    with pytest.raises(InputError, match="no teacher 'nobody'"):
        cache.batches(["nobody"])


def test_positions_of_lists_that_disagree_are_refused(copied):
    """A column whose lists have other lengths than the positions'."""
    write_teacher(copied)
    cache = Cache.open(copied)
    commit = cache.teachers["big"].commits["00000"]
    shard = cache.teachers["big"].main.shards.open(commit)
    (copied / "targets/big/commits/00000.json").unlink()
    batches = []
    for index in range(shard.batch_count):
        batch = shard.batch(index)
        lengths = np.diff(batch["entropy"].offsets.to_numpy())
        lengths[0], lengths[1] = lengths[0] + 1, lengths[1] - 1
        flat = batch["entropy"].values.to_numpy()
        entropy = list_array(offsets_of(lengths), flat)
        columns = [batch[n] if n != "entropy" else entropy for n in batch.schema.names]
        batches.append(pa.record_batch(columns, schema=shard.schema))
    store = ShardSet(LocalStore(copied), "targets/big")
    store.write("00000", shard.schema, batches, commit.facts)
    with pytest.raises(CacheFormatError, match="'entropy' has other list lengths"):
        Cache.open(copied).gather(np.arange(3), ["big"])


def test_a_shard_with_other_columns_is_refused(copied):
    write_teacher(copied)
    cache = Cache.open(copied)
    commit = cache.teachers["big"].commits["00000"]
    metadata = cache.teachers["big"].main.shards.open(commit).metadata
    (copied / "targets/big/commits/00000.json").unlink()
    schema = shard_schema(
        [pa.field("digest", pa.string()), pa.field("ids", list_type(pa.int64()))], metadata
    )
    ShardSet(LocalStore(copied), "targets/big").write("00000", schema, [])
    with pytest.raises(CacheFormatError):
        Cache.open(copied).gather(np.arange(3), ["big"])
