"""The cache is read by others without our code."""

import json

import numpy as np
import polars
import pyarrow as pa
import pytest

from rekindle.data.cache import Cache
from rekindle.data.example import SequenceTargets, TokenLabelTargets, TokenTargets
from rekindle.data.targets.schema import TeacherInfo
from testlib.cache_format import (
    PER_SHARD,
    READERS,
    check_tokens,
    committed_files,
    plain,
    with_pyarrow,
    write_teacher,
)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_the_same_rows(cache, tmp_path, reader):
    """The first shard of each kind: corpus, both views, the targets of every kind of teacher."""
    seen = set()
    for name, first, path in committed_files(cache):
        if name in seen or first:
            continue
        seen.add(name)
        expected = with_pyarrow(path, tmp_path)
        assert len(expected) == PER_SHARD
        assert reader(path, tmp_path) == expected
    assert seen == {"corpus", *cache.views, *cache.teachers}


def test_several_shards_are_one_data_set(cache, tmp_path):
    from datasets import load_dataset

    paths = [str(p) for name, _, p in committed_files(cache) if name == "corpus"]
    assert len(paths) > 1
    rows = load_dataset("arrow", data_files=paths, split="train", cache_dir=str(tmp_path))
    digests = [cache.example(i).digest for i in range(len(cache))]
    assert rows["digest"][:] == digests
    assert polars.scan_ipc(paths).select("digest").collect()["digest"].to_list() == digests


def check_row(example, name, target, row, teacher):
    assert row["digest"] == example.digest
    if isinstance(target, TokenTargets):
        check_tokens(target, row, teacher)
    elif isinstance(target, TokenLabelTargets):
        assert target.positions.tolist() == row["positions"]
        assert target.logits.tolist() == row["logits"]
    else:
        assert isinstance(target, SequenceTargets)
        assert target.logits.tolist() == row["logits"]
        mc = None if target.mc_probs is None else target.mc_probs.tolist()
        assert mc == row.get("mc_probs")


def test_rows_read_by_others_are_what_cache_example_gives(cache, tmp_path):
    """Decoded from the files by the published table alone, against our reader; every row."""
    replicas = {}
    checked = dict.fromkeys(cache.teachers, 0)
    for name, first, path in committed_files(cache):
        if name not in cache.teachers:
            continue
        described = json.loads(pa.ipc.open_file(str(path)).schema.metadata[b"rekindle"])
        replica = described["replica"]
        replicas.setdefault(name, set()).add(replica)
        for local, row in enumerate(plain(polars.read_ipc(path).to_dicts())):
            if local % 5:
                continue  # a fifth of the rows is enough to meet every record batch
            example = cache.example(first + local)
            targets = example.targets[name]
            if not targets:  # not its domain, or no pair
                assert row["logits"] is None
                continue
            check_row(example, name, targets[replica or 0], row, described["teacher"])
            checked[name] += 1
    assert replicas["mlm"] == replicas["dense"] == {0, 1}
    assert replicas["expert"] == replicas["clm"] == {None}
    assert min(checked.values()) > 20


def test_an_expert_is_silent_outside_its_domains_and_where_there_is_no_pair(cache):
    """Null in the file and no target in the reader; never zeros that look like logits."""
    silent = dict.fromkeys(("expert", "pairs"), 0)
    for name, first, path in committed_files(cache):
        if name not in silent:
            continue
        for local, row in enumerate(plain(polars.read_ipc(path).to_dicts())):
            example = cache.example(first + local)
            (pair,) = example.pairs.values()
            speaks = example.domain == "even" if name == "expert" else pair is not None
            assert (row["logits"] is not None) == bool(example.targets[name]) == speaks
            silent[name] += not speaks
    assert min(silent.values()) > 5


def test_corpus_rows_read_by_others_are_what_cache_example_gives(cache):
    for name, first, path in committed_files(cache):
        if name != "corpus":
            continue
        for local, row in enumerate(polars.read_ipc(path).to_dicts()):
            example = cache.example(first + local)
            for field in ("digest", "document", "domain", "text"):
                assert row[field] == getattr(example, field)
            assert row["input_ids"] == example.input_ids.tolist()


def test_every_shard_describes_itself_in_json(cache):
    for name, first, path in committed_files(cache):
        metadata = pa.ipc.open_file(str(path)).schema.metadata
        about = json.loads(metadata[b"rekindle"])
        assert cache.corpus.first(about["shard"]) == first
        if name == "corpus":
            assert about["kind"] == "corpus"
            assert about["config"]["sequence_length"] == 12
            assert about["tokenizer"]["digest"] == cache.tokenizer_digest
        elif name in cache.views:
            assert (about["kind"], about["view"]) == ("view", name)
        else:
            assert about["kind"] == "targets"
            assert about["format_version"] == 3
            assert (
                TeacherInfo(**about["teacher"]).identity() == cache.teachers[name].info.identity()
            )


def test_no_half_floats_and_nothing_dictionary_encoded(cache):
    """Half-floats break DuckDB for the whole table; everything else is what readers know."""
    for _, _, path in committed_files(cache):
        for field in pa.ipc.open_file(str(path)).schema:
            assert "halffloat" not in str(field.type)
            assert "dictionary" not in str(field.type)


def test_ids_beyond_16_bits_are_read_by_us_and_by_others(copied, tmp_path):
    kept = write_teacher(copied)
    cache = Cache.open(copied)
    for name, first, path in committed_files(cache):
        if name != "big" or first:
            continue
        expected = with_pyarrow(path, tmp_path)
        for reader in READERS:
            assert reader(path, tmp_path) == expected
        teacher = json.loads(pa.ipc.open_file(str(path)).schema.metadata[b"rekindle"])["teacher"]
        for local in range(0, 60, 7):
            check_tokens(cache.example(local).targets["big"][0], expected[local], teacher)
    batch = cache.gather(np.arange(PER_SHARD), ["big"]).targets["big"]
    assert np.array_equal(batch.decode()[0], kept[0][1])
    assert batch.decode()[0].max() > 131_072
