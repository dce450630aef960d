"""A corpus of groups: each record names its group, and a sequence keeps it."""

import json

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.exchange.exporting import Export
from rekindle.data.storage.manifest import begin_manifest, read_manifest
from rekindle.data.storage.seal import FORMAT_VERSION, VERSION, WITH_GROUPS
from rekindle.data.storage.store import LocalStore

ROWS = [
    {"q": f"river {n % 5}", "d": f"old city {n}", "of": n % 5 if n % 2 else f"{n % 5}"}
    for n in range(23)
]


@pytest.fixture
def build(tmp_path, wordpiece):
    def made(records=ROWS, name="p.jsonl", **values):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
        given = {"source": str(tmp_path / name), "text_field": "q", "pair_field": "d"}
        given |= {"tokenizer": str(wordpiece), "sequence_length": 16, "group_field": "of"}
        store = LocalStore(tmp_path / "cache")
        begin_manifest(store)
        return build_corpus(store, CorpusConfig(**given | values), 8)

    return made


@pytest.mark.parametrize("pair_field", ["d", None])
def test_a_batch_has_the_group_of_each_sequence_in_any_order(build, pair_field):
    store = build(pair_field=pair_field).store
    cache = Cache(store)
    assert read_manifest(store)[VERSION] == WITH_GROUPS
    order = np.random.default_rng(0).permutation(len(cache))
    batch = cache.gather(order, [])
    assert [*batch.groups] == [str(ROWS[n]["of"]) for n in order]
    assert [*batch.take(slice(3, 9)).groups] == [*batch.groups][3:9]
    assert cache.example(7).group == "2"
    assert [row["group"] for row in Export(cache.corpus).rows()] == [str(r["of"]) for r in ROWS]


def test_without_the_field_nothing_of_groups_is_kept(build):
    store = build(group_field=None).store
    cache = Cache(store)
    assert read_manifest(store)[VERSION] == FORMAT_VERSION
    assert not cache.gather([0, 1], []).groups
    assert cache.example(0).group is None
    assert "group" not in cache.corpus.shard(0).table().column_names
    with pytest.raises(CacheMismatchError, match="group_field: None there, 'of' here"):
        build()


@pytest.mark.parametrize(
    ("given", "told"),
    [({}, "no field 'of' (corpus.group_field)"), ({"of": None}, "(corpus.group_field) is null"),
     ({"of": [1]}, "a group is a name or a number"), ({"of": "\ud800"}, "of the group")],
)  # fmt: skip
def test_a_record_without_a_group_is_refused_or_left_out(build, given, told):
    bad = [*ROWS[:2], {"q": "a river", "d": "a city"} | given]
    with pytest.raises(InputError) as error:
        build(bad)
    assert told in str(error.value)
    assert "record 3" in str(error.value)
    left = build(bad, on_bad_record="skip")
    assert (len(left), sum(left.bad_records.values())) == (2, 1)


def test_what_has_no_fields_has_no_groups(build, tmp_path):
    (tmp_path / "a.txt").write_text("a river")
    with pytest.raises(InputError, match="has no fields, so none of its records has a group"):
        build(source=str(tmp_path / "a.txt"), pair_field=None)
    for packing in ("contiguous", "packed"):
        with pytest.raises(ValueError, match="with group_field a sequence belongs to one group"):
            build(packing=packing, pair_field=None)
