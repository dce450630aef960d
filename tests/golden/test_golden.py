"""Frozen caches open for ever, and decode to what they decoded to when they were made; frozen runs
go on to what they would have come to.
"""

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.corpus.remarks import end_of_text, special_names
from rekindle.data.errors import (
    CacheMismatchError,
    CacheVersionError,
    CheckpointError,
    InputError,
)
from rekindle.data.settings import parse_settings
from rekindle.data.storage import manifest
from rekindle.data.storage.records import Records
from rekindle.data.storage.seal import CHANGING
from rekindle.data.storage.store import LocalStore
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.inputs import check_start
from rekindle.train.record.identity import VERSION
from testlib.stage_one.extending import assert_kept, files_of
from testlib.students import TIMES, metrics

HERE = Path(__file__).parent
RUNS = sorted(path for path in HERE.glob("run-v*") if path.is_dir())
CACHES = sorted(
    (path for path in HERE.glob("cache-v*") if path.is_dir()),
    key=lambda path: int(path.name.removeprefix("cache-v")),
)


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(found: object, expected: object) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[k], expected[k]) for k in expected
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-6)
    return found == expected


def test_there_is_one_per_format_version():
    """Of each that a cache stays in."""
    versions = [n for n in range(1, manifest.NEWEST_VERSION + 1) if n != CHANGING]
    assert [path.name for path in CACHES] == [f"cache-v{n}" for n in versions]
    for version, path in zip(versions, CACHES, strict=True):
        assert manifest.read_manifest(LocalStore(path))["format_version"] == version


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.name)
def test_a_frozen_cache_is_sound_and_decodes_as_ever(path):
    assert verify_cache(str(path)).problems == []
    decoded = module_of("make_cache").decoded
    expected = json.loads(path.with_suffix(".json").read_text())
    assert len(Cache.open(path)) == len(expected)
    for index, example in enumerate(expected):
        assert same(json.loads(json.dumps(decoded(path, index))), example), index


def test_there_is_a_run_of_the_version_before():
    """The newest is written by every other test."""
    assert [path.name for path in RUNS] == [f"run-v{n}" for n in range(1, VERSION)]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_frozen_run_goes_on_to_what_it_would_have_come_to(path, tmp_path, one_thread, caplog):
    made, out = module_of("make_run"), tmp_path / "run"
    student = made.make_student(tmp_path / "student")
    shutil.copytree(path, out)
    record = (out / "run.json").read_text().replace(made.STUDENT, str(student))
    (out / "run.json").write_text(record)
    with caplog.at_level("INFO", logger="rekindle"):
        made.train(student, out, resume=True)
    read = "did not record how much of the cache it read; assumed: replicas 2"
    assert (read in caplog.text) is (path.name == "run-v1")
    expected = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    expected = [{k: v for k, v in record.items() if k not in TIMES} for record in expected]
    assert same(metrics(out), expected)
    about = json.loads((out / "run.json").read_text())
    assert about["version"] == VERSION
    assert about["cache"]["targets"] == {"lm": {"k": 9, "part": "k9"}}


def test_version_3_holds_what_is_new_in_it():
    corpus = Cache.open(HERE / "cache-v3").corpus
    facts = corpus.info["tokenizer"]
    ids = np.concatenate([corpus.shard(0).table()["input_ids"].combine_chunks().flatten()])
    assert facts["holes"]
    assert ids.max() > facts["holes"][0][1] - 1  # a token above the gap
    assert end_of_text(corpus) == facts["eos_id"]
    assert end_of_text(corpus) in ids
    assert special_names(corpus) == 1


def test_version_4_holds_imported_targets_and_their_rows_are_still_them(tmp_path, monkeypatch):
    """What the same rows come to today is held against every column that is frozen."""
    path, copy = HERE / "cache-v4", tmp_path / "cache"
    frozen = Cache.open(path)
    infos = {name: teacher.info for name, teacher in frozen.teachers.items()}
    imported = json.loads(module_of("make_cache").rows_of(path).read_text())
    assert {name for name, info in infos.items() if info.imported} == {*imported}
    assert {info.codec for info in infos.values()} == {"default", "precise", "compact"}
    assert infos["tails"].temperatures == (1.0, 2.0, 4.0)
    assert infos["served"].temperatures == (2.0,)
    assert infos["packed"].imported.lacks == ("gold_log_prob", "gold_rank", "entropy")
    shutil.copytree(path, copy)
    before, cache = files_of(copy), Cache.open(copy)
    for name, given in imported.items():
        provenance = infos[name].imported.provenance
        done = cache.import_targets(name, given["rows"], provenance, **given["settings"])
        assert (done.units_done, done.units_present) == (0, 8 if name == "masked" else 4)
    assert files_of(copy) == before
    monkeypatch.setattr(manifest, "NEWEST_VERSION", 3)
    with pytest.raises(CacheVersionError, match=r"cache format 4; this version.*formats 1 to 3"):
        Cache.open(copy)


def test_version_5_holds_roll_ups_that_are_believed(tmp_path, monkeypatch):
    """Where the folder of records is as it was when they were rolled up."""
    copy = Path(shutil.copytree(HERE / "cache-v5", tmp_path / "cache"))
    rolled = sorted(copy.rglob("records.json"))
    assert len(rolled) == 3
    for about in rolled:
        state = int(json.loads(about.read_text())["state"])
        os.utime(about.parent / "commits", ns=(state, state))
    monkeypatch.setattr(Records, "_read_all", None)  # what reads the records one by one
    assert len(Cache.open(copy).teachers["masked_lm"].commits) == 4
    os.utime(about.parent / "commits")
    with pytest.raises(TypeError):
        Cache.open(copy)


def test_version_6_says_what_is_trained():
    cache = Cache.open(HERE / "cache-v6")
    files = ["chat", "rows", "rows", "texts", "texts"]
    assert len(cache) == len(files)
    for index, name in enumerate(files):
        example = cache.example(index)
        assert example.document.startswith(f"{name}.jsonl:")
        assert example.trained.any()
        assert example.trained.all() == (index >= 2)
        (said,) = example.targets["causal_lm"]
        assert np.array_equal(said.positions, np.flatnonzero(example.trained[1:]))


def test_version_7_holds_served_targets():
    infos = [teacher.info for teacher in Cache.open(HERE / "cache-v7").teachers.values()]
    assert {info.codec for info in infos} == {"default", "precise", "compact"}
    for info in infos:
        assert info.served.model == info.model == "tiny"
        assert info.served.fingerprint == info.fingerprints["probes"]
        assert info.lacks == ("entropy",)


def test_version_8_has_several_documents_in_a_row():
    batch = Cache.open(HERE / "cache-v8").gather([1], ["causal_lm"])
    (numbers,), ends = batch.document_numbers, [17, 26]
    assert np.flatnonzero(np.diff(numbers, append=2)).tolist() == ends
    told = batch.targets["causal_lm"].positions.tolist()
    assert sorted([*told, *ends]) == [*range(27)]  # the last token of a document predicts nothing


def test_version_9_holds_targets_of_another_tokenizer():
    info = Cache.open(HERE / "cache-v9").teachers["causal_lm"].info
    assert info.mapped is not None
    assert info.fingerprints["tokenizer"] is not None


def test_version_11_holds_vectors():
    teachers = Cache.open(HERE / "cache-v11").teachers
    told = {name: (t.info.pooling, t.info.vectors, t.info.prompt) for name, t in teachers.items()}
    assert told == {"halves": ("mean", "fp16", None), "bytes": ("cls", "int8", "the text: ")}


def test_version_12_keeps_the_group_of_each_pair():
    cache = Cache.open(HERE / "cache-v12")
    assert [*cache.gather(range(len(cache)), []).groups] == [*"012012"]


@pytest.mark.parametrize("path", CACHES[:2], ids=lambda path: path.name)
def test_an_old_cache_is_extended_as_it_was_made_and_is_of_this_version_then(
    path, tmp_path, make_model, monkeypatch
):
    """Its source is long gone; a version that knows no 3 refuses what was added to it."""
    copy = tmp_path / "cache"
    shutil.copytree(path, copy)
    before, old = files_of(copy), Cache.open(copy)
    tokenizer = copy / "corpus" / "tokenizer"
    decides = old.corpus.info["config"] | {"tokenizer": str(tokenizer)}
    per_shard = decides.pop("sequences_per_shard")
    values = {
        "corpus": decides | {"sequence_length": 24},
        "cache": {"path": str(copy), "sequences_per_shard": per_shard, "replicas": 2},
        "teachers": [
            {
                "name": "later",
                "model": str(make_model("bert", "AutoModelForMaskedLM", tokenizer)),
                "task": "masked_lm",
                "targets": {"kind": "threshold", "k": 6},
            }
        ],
    }
    with pytest.raises(CacheMismatchError, match="sequence_length"):
        cache_teachers(parse_settings(RunConfig, values))
    assert Cache.open(copy).manifest == old.manifest  # what is refused raises no version
    values["corpus"] = decides
    cache_teachers(parse_settings(RunConfig, values))
    assert_kept(before, copy)
    assert verify_cache(str(copy)).problems == []
    grown = Cache.open(copy)
    assert grown.manifest["format_version"] == 3
    assert {*grown.teachers} == {*old.teachers, "later"}
    assert grown.example(0).targets["later"][0].ids.shape[1] == 6
    monkeypatch.setattr(manifest, "NEWEST_VERSION", 2)
    with pytest.raises(CacheVersionError, match=r"cache format 3; this version.*formats 1 to 2"):
        Cache.open(copy)


# --- begun by an older version, and not finished --------------------------------------------------


@pytest.fixture(scope="module")
def begun_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("begun")
    module_of("make_begun").make_home(home)
    return home


@pytest.fixture
def begun(begun_home, tmp_path):
    """begun(which, folder) -> the home of what that version began, as far as its record says it."""
    made = module_of("make_begun")

    def put(which, version="begun-1", settled=lambda record: None):
        home = Path(shutil.copytree(begun_home, tmp_path / "home"))
        text = (HERE / version / made.OUTS[which]).read_text()
        record = json.loads(text.replace("HOME", str(home)).replace("GOLDEN", str(HERE)))
        if which == "cycle":
            record["start"] = check_start(parse_settings(CycleConfig, made.cycle(home)))
        settled(record)
        for name in ("first", "second"):
            (home / which / name).mkdir(parents=True)
        (home / which / made.OUTS[which]).write_text(json.dumps(record))
        return home

    return put


@pytest.mark.parametrize("which", ["cycle", "stages", "sweep"])
def test_what_was_begun_goes_on_as_it_was_begun(which, begun):
    made, home = module_of("make_begun"), begun(which)
    if which == "sweep":
        made.SWEPT[:] = ["train.seed=1,2,3"]  # another one is as those that were begun
    made.begin(home, which)
    if which == "sweep":
        runs = json.loads((home / which / "sweep.json").read_text())["runs"]
        assert [run["train"]["warmup_steps"] for run in runs] == [100] * 3
    if which == "cycle":
        about = json.loads((home / which / "cycle.json").read_text())
        assert about["settings"]["finetune"]["max_length"] == 128  # the default that it had
        assert about["settings"]["train"]["warmup_steps"] == 100
        assert about["settings"]["test_texts"] == "keep"  # no text is taken away on the way
        made.begin(home, which)


@pytest.mark.parametrize("which", ["cycle", "stages"])
def test_other_words_for_the_same_source_and_model_go_on(which, begun, monkeypatch):
    made, home = module_of("make_begun"), begun(which)
    monkeypatch.setenv("HERE", str(home))
    cache = home / "cycle" / "cache" if which == "cycle" else home / "cache"
    config = parse_settings(CycleConfig, made.cycle(home)).corpus
    build_corpus(LocalStore(cache), config, 16)
    (home / "moved").mkdir()
    (home / "text.jsonl").rename(home / "moved" / "words.jsonl")

    def written(source):
        return lambda values: values["corpus"].update(source=[source])

    made.begin(home, which, written("$HERE/moved/*.jsonl"))
    (home / "moved" / "words.jsonl").unlink()
    made.begin(home, which, written("$HERE/moved/*.jsonl"))
    with pytest.raises(CheckpointError, match=r"corpus\.source"):
        made.begin(home, which, written(str(home / "train.jsonl")))


@pytest.mark.parametrize(
    ("which", "change", "words"),
    [
        ("cycle", {"finetune": {"epochs": 2}}, r"finetune\.epochs: 1 there, 2 here"),
        ("cycle", {"finetune": {"max_length": None}}, r"max_length: 128 there, None here"),
        ("cycle", {"finetune": {"problem": "regression"}}, "is not a number"),
        ("cycle", {"corpus": {"special_tokens": "token"}}, r"special_tokens: 'text' there"),
        ("stages", {"corpus": {"special_tokens": "token"}}, r"special_tokens: 'text' there"),
        ("stages", {"student": {"grow": {"layers": 3}}}, r"grow\.layers: 2 there, 3 here"),
        ("sweep", {"student": {"grow": {"layers": 2, "noise_std": 0.1}}}, r"noise_std: 0.0 there"),
    ],
)
def test_what_differs_from_what_was_begun_is_named(which, change, words, begun):
    made, home = module_of("make_begun"), begun(which)

    def put(values):
        for section, keys in change.items():
            values[section] |= keys

    error = InputError if words == "is not a number" else CheckpointError
    with pytest.raises(error, match=words):
        made.begin(home, which, put)


def test_a_warm_up_that_is_allowed_no_more_ends_with_what_can_be_done(begun):
    """As long as the cycle's students train."""

    def short(record):
        record["settings"]["train"]["steps"] = 50

    home = begun("cycle", settled=short)
    with pytest.raises(InputError, match=r"cannot go on as an older.*another --out: .*steps 50"):
        module_of("make_begun").begin(
            home, "cycle", lambda values: values["train"].update(steps=50)
        )


@pytest.mark.parametrize("which", ["stages", "sweep"])
def test_noise_as_it_was_once_asks_for_the_version_that_began_it(which, begun):
    def noisy(record):
        for one in record.get("runs", []) + [s["config"] for s in record.get("stages", [])]:
            one["student"]["grow"]["noise"] = 0.05

    home = begun(which, settled=noisy)
    with pytest.raises(CheckpointError, match=r"older version.*grow\.noise: 0\.05 there.*another"):
        module_of("make_begun").begin(home, which)
