"""The cache is read by others without our code, and what does not belong into it is refused."""

import json
import math
import os
import shutil

import numpy as np
import polars
import pyarrow as pa
import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus.corpus import unit_of
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.data.example import SequenceTargets, TokenLabelTargets, TokenTargets
from rekindle.data.storage.columns import list_array, list_type, offsets_of
from rekindle.data.storage.seal import SEAL, seal
from rekindle.data.storage.shards import ShardSet, describe
from rekindle.data.storage.store import LocalStore
from rekindle.data.targets.codec import encode
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.schema import TeacherInfo

PER_SHARD = 140  # the first shard has two record batches
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    """No test here pulls the plug: without fsync they take half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus_file, wordpiece, make_model):
    """A finished cache with a teacher of every kind of target; no test writes into it."""
    import torch

    from rekindle.pipeline.caching.cache_teachers import cache_teachers
    from rekindle.pipeline.config import RunConfig

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    path = tmp_path_factory.mktemp("format") / "cache"

    def teacher(name, family, auto, task, seed=0, **values):
        extra = values.pop("extra", {})
        model = make_model(family, f"AutoModelFor{auto}", wordpiece, seed, **SMALL, **extra)
        return {"name": name, "model": str(model), "task": task, **values}

    labels = {"num_labels": 3, "hidden_dropout_prob": 0.2}
    teachers = [
        teacher("mlm", "bert", "MaskedLM", "masked_lm", targets={"kind": "topk", "k": 9}),
        teacher("dense", "bert", "MaskedLM", "masked_lm", 1, targets={"kind": "dense"}),
        teacher(
            "clm",
            "llama",
            "CausalLM",
            "causal_lm",
            targets={"kind": "topk", "k": 5, "temperatures": [3.0]},
        ),
        teacher(
            "expert",
            "bert",
            "SequenceClassification",
            "sequence_classification",
            extra=labels,
            monte_carlo={"passes": 2},
            domains=["even"],
        ),
        teacher(
            "pairs",
            "bert",
            "SequenceClassification",
            "sequence_classification",
            2,
            extra={"num_labels": 2},
            pairs="adjacent",
        ),
        teacher("tags", "bert", "TokenClassification", "token_classification", extra=labels),
    ]
    config = RunConfig.model_validate(
        {
            "corpus": {
                "source": str(corpus_file),
                "tokenizer": str(wordpiece),
                "sequence_length": 12,
                "domain_field": "domain",
            },
            "cache": {"path": str(path), "sequences_per_shard": PER_SHARD, "replicas": 2},
            "teachers": teachers,
        }
    )
    cache_teachers(config)
    torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="module")
def cache(made):
    return Cache.open(made)


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the cache to damage."""
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"


def committed_files(cache):
    """(what, first sequence of its corpus shard, path) of every shard of the cache."""
    sets = {"corpus": cache.corpus.shards}
    sets |= {name: view.shards for name, view in cache.views.items()}
    sets |= {name: teacher.shards for name, teacher in cache.teachers.items()}
    return [
        (name, cache.corpus.first(int(unit[:5])), shards.open(commit).path)
        for name, shards in sets.items()
        for unit, commit in shards.committed().items()
    ]


# --- readers that know nothing of us --------------------------------------------------------------


def with_pyarrow(path, scratch):
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all().to_pylist()


def with_polars_read(path, scratch):
    return plain(polars.read_ipc(path).to_dicts())


def with_polars_scan(path, scratch):
    return plain(polars.scan_ipc(path).collect().to_dicts())


def with_datasets(path, scratch):
    from datasets import load_dataset

    return list(
        load_dataset("arrow", data_files=[str(path)], split="train", cache_dir=str(scratch))
    )


def with_datasets_streaming(path, scratch):
    from datasets import load_dataset

    return list(
        load_dataset(
            "arrow",
            data_files=[str(path)],
            split="train",
            streaming=True,
            cache_dir=str(scratch),
        )
    )


def with_duckdb(path, scratch):
    import duckdb

    shard = pa.ipc.open_file(str(path)).read_all()
    with duckdb.connect() as connection:
        connection.register("shard", shard)
        found = connection.execute("SELECT * FROM shard")
        names = [column[0] for column in found.description]
        return [dict(zip(names, plain(row), strict=True)) for row in found.fetchall()]


def plain(value):
    """Nested Python lists of whatever a reader nests."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray | polars.Series):
        return [plain(inner) for inner in value]
    return value


READERS = [
    with_polars_read,
    with_polars_scan,
    with_datasets,
    with_datasets_streaming,
    with_duckdb,
]


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


def decoded(row, teacher, temperature):
    """Ids, log-probs and log tail of a row by data/targets/codec.py, in plain Python."""
    k, slot = teacher["k"], teacher["temperatures"].index(temperature)
    planes = max(0, (teacher["vocabulary_size"] - 1).bit_length() - 16)
    out = []
    for p in range(len(row["positions"])):
        ids = list(row["ids"][p])
        bits = [
            (byte >> bit) & 1 for byte in row.get("ids_high", [[]] * (p + 1))[p] for bit in range(8)
        ]
        for plane in range(planes):
            ids = [i + (bits[plane * k + n] << (16 + plane)) for n, i in enumerate(ids)]
        span = (row["log_prob_min"][p] - row["log_prob_max"][p]) / 1024
        relative = [-v / 255 * span / temperature for v in row["values"][p]]
        odds = row["tail_log_odds"][p][slot]
        kept = 1.0 if odds == 32767 else 1 / (1 + math.exp(-odds / 1024))
        tail = 0.0 if odds == 32767 else 1 / (1 + math.exp(odds / 1024))
        total = sum(math.exp(r) for r in relative)
        probs = [math.exp(r) / total * kept for r in relative]
        out.append((ids, probs, tail))
    return out


def check_tokens(target, row, teacher):
    assert target.positions.tolist() == row["positions"]
    assert target.gold_rank.tolist() == row["gold_rank"]
    for name in ("gold_log_prob", "entropy"):
        sign = -1 if name == "gold_log_prob" else 1
        assert getattr(target, name) == pytest.approx([sign * v / 1024 for v in row[name]])
    if teacher["kind"] == "dense":
        assert target.log_probs == pytest.approx(np.array(row["log_probs"]), abs=1e-5)
        return
    for temperature in teacher["temperatures"]:
        rows = decoded(row, teacher, temperature)
        assert np.exp(target.log_tail[temperature]) == pytest.approx([r[2] for r in rows])
    at_one = decoded(row, teacher, 1.0)
    assert target.ids.tolist() == [r[0] for r in at_one]
    assert np.exp(target.log_probs) == pytest.approx(np.array([r[1] for r in at_one]), rel=1e-4)


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
            assert about["format_version"] == 2
            assert (
                TeacherInfo(**about["teacher"]).identity() == cache.teachers[name].info.identity()
            )


def test_no_half_floats_and_nothing_dictionary_encoded(cache):
    """Half-floats break DuckDB for the whole table; everything else is what readers know."""
    for _, _, path in committed_files(cache):
        for field in pa.ipc.open_file(str(path)).schema:
            assert "halffloat" not in str(field.type)
            assert "dictionary" not in str(field.type)


# --- large vocabularies, written by hand ----------------------------------------------------------


def write_teacher(path, name="big", size=200_000, k=5, change=None):
    """A top-k teacher of the clean view with random targets of a vocabulary of ``size``."""
    store = LocalStore(path)
    corpus = Cache.open(path).corpus
    info = TeacherInfo(
        name=name,
        task="causal_lm",
        kind="topk",
        view="clean",
        vocabulary_size=size,
        k=k,
        temperatures=(1.0, 2.0),
    )
    store.create(f"targets/{name}/teacher.json", info.model_dump_json().encode())
    draw = np.random.default_rng(0)
    kept = []
    for shard in range(len(corpus.commits)):
        table = corpus.shard(shard).table()
        lengths = [len(ids) - 1 for ids in table["input_ids"].to_pylist()]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.uint16)
        ids = draw.integers(0, size, (len(rows), k))
        log_probs = np.sort(draw.normal(-3, 1, (len(rows), k)))[:, ::-1].astype(np.float32)
        odds = draw.normal(0, 2, (len(rows), 2)).astype(np.float32)
        scalars = {
            "gold_log_prob": np.zeros(len(rows), np.uint16),
            "gold_rank": np.zeros(len(rows), np.uint32),
            "entropy": np.zeros(len(rows), np.uint16),
        }
        columns = {"positions": positions} | encode(ids, log_probs, odds, size) | scalars
        if change is not None:
            change(columns)
        schema = kind_of(info).schema({"shard": shard, "replica": None})
        batches = kind_of(info).batches(schema, table["digest"].to_pylist(), rows, columns)
        facts = {"positions": len(rows), "tokens": 0}
        ShardSet(store, f"targets/{name}").write(unit_of(shard), schema, batches, facts)
        kept.append((rows, ids))
    return kept


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


# --- what does not belong together is refused -----------------------------------------------------


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
    with pytest.raises(CacheFormatError, match="columns that teacher"):
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


def test_batches_give_each_sequence_once_over_all_ranks(cache):
    for epoch in (0, 1):
        seen = []
        for rank in range(3):
            for batch in cache.batches(
                ["mlm", "clm"], 16, seed=4, epoch=epoch, rank=rank, world_size=3
            ):
                assert batch.masked.replica == epoch
                seen += batch.index.tolist()
        assert sorted(seen) == list(range(len(cache)))


def test_a_batch_is_its_examples(cache):
    """Whatever the order and the batch size, a row has the targets of its sequence."""
    index = np.array([PER_SHARD + 1, 3, PER_SHARD - 1, 3, 0])
    batch = cache.gather(index, list(cache.teachers), epoch=1, masked_view=cache.masked_view().name)
    examples = [cache.example(int(i)) for i in index]
    assert batch.digests == [e.digest for e in examples]
    assert batch.domains == [e.domain for e in examples]
    for number, example in enumerate(examples):
        length = batch.lengths[number]
        assert batch.input_ids[number, :length].tolist() == example.input_ids.tolist()
        assert batch.attention_mask[number].sum() == length
        for name, target in batch.targets.items():
            expected = example.targets[name]
            if hasattr(target, "present"):
                assert target.present[number] == bool(expected)
                assert not expected or np.array_equal(target.logits[number], expected[0].logits)
                continue
            mine = target.rows == number
            one = expected[1] if cache.teacher(name).masked else expected[0]
            assert np.array_equal(target.positions[mine], one.positions)
            if isinstance(one, TokenTargets):
                assert np.array_equal(target.decode()[1][mine], one.log_probs)
    for name, pairs in batch.pairs.items():
        for number, example in enumerate(examples):
            assert (pairs.lengths[number] > 0) == (example.pairs[name] is not None)


def test_dense_targets_with_tokens_that_cannot_occur(cache):
    """Reading fewer candidates than can occur leaves a tail, reading more leaves none: not NaN."""
    found = cache.gather(np.arange(2), ["dense"], masked_view=cache.masked_view().name).targets[
        "dense"
    ]
    log_probs = np.full((2, found.info.vocabulary_size), -np.inf, np.float32)
    log_probs[:, [7, 3]] = np.log([0.25, 0.75])
    few = type(found)(found.info, found.rows[:2], found.positions[:2], {"log_probs": log_probs})
    for k, tail in ((1, 0.25), (2, 0.0), (5, 0.0)):
        ids, kept, log_tail = few.decode(1.0, k)
        assert ids[0, : min(k, 2)].tolist() == [3, 7][: min(k, 2)]
        assert np.exp(log_tail) == pytest.approx(tail, abs=1e-6)
        assert np.exp(kept).sum(axis=1) == pytest.approx(1 - tail, abs=1e-6)
    ids, kept, log_tail = found.decode(2.0)
    assert np.array_equal(ids[0], np.arange(found.info.vocabulary_size))
    assert np.exp(kept).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert (log_tail == -np.inf).all()


def test_what_can_be_asked_of_a_teacher(cache):
    found = cache.gather(np.arange(2), ["clm"]).targets["clm"]
    with pytest.raises(InputError, match=r"stores the temperatures \[1.0, 3.0\], not 2.0"):
        found.decode(2.0)
    for k in (0, 6):
        with pytest.raises(ValueError, match=r"1\.\.5"):
            found.decode(1.0, k)
    assert cache.teachers["clm"].k == 5
    assert cache.teachers["expert"].label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        assert cache.teachers["clm"].nothing


def test_positions_of_lists_that_disagree_are_refused(copied):
    """A column whose lists have other lengths than the positions'."""
    write_teacher(copied)
    cache = Cache.open(copied)
    commit = cache.teachers["big"].commits["00000"]
    shard = cache.teachers["big"].shards.open(commit)
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
    metadata = cache.teachers["big"].shards.open(commit).metadata
    (copied / "targets/big/commits/00000.json").unlink()
    schema = describe(
        [pa.field("digest", pa.string()), pa.field("ids", list_type(pa.int64()))], metadata
    )
    ShardSet(LocalStore(copied), "targets/big").write("00000", schema, [])
    with pytest.raises(CacheFormatError):
        Cache.open(copied).gather(np.arange(3), ["big"])
