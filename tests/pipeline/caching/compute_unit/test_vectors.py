"""A sentence encoder's vectors in the cache are those of a direct forward pass, at every row."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.changes.carry_out import change_teacher
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.exchange.exporting import Export
from rekindle.data.storage.manifest import read_manifest
from rekindle.data.storage.seal import VERSION, WITH_VECTORS
from rekindle.data.storage.store import LocalStore
from rekindle.data.targets.kinds.embedding import cosine_distances
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.inspect import inspect_cache
from rekindle.pipeline.checks.judge import judge_vectors
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.train.to_device import to_device
from testlib.caches import examples
from testlib.encoders import encoder_folder
from testlib.run_alone import model_of

DIRECT = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
}


@pytest.fixture(scope="module")
def teachers(make_model, wordpiece, bytelevel, tmp_path_factory):
    """Plain encoders; one of another tokenizer, one of a domain, one that reads few tokens."""
    bert, short = (make_model("bert", "AutoModel", wordpiece, seed) for seed in (0, 1))
    gpt2 = make_model("gpt2", "AutoModel", bytelevel)
    folder = encoder_folder(
        tmp_path_factory.mktemp("folders") / "short",
        short,
        {"pooling_mode_cls_token": True},
        transformer={"max_seq_length": 9},
    )
    own = {"task": "embedding"}
    return {
        "whole": own | {"model": str(bert), "pooling": "mean", "normalise": True},
        "prompted": own
        | {"model": str(bert), "pooling": "mean", "normalise": False, "prompt": "said: "},
        "other-tokens": own | {"model": str(gpt2), "pooling": "lasttoken", "normalise": False},
        "short": own | {"model": str(folder), "targets": {"vectors": "int8"}},
        "some": own | {"model": str(bert), "pooling": "cls", "normalise": True, "domains": ["odd"]},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, configure, teachers):
    path = tmp_path_factory.mktemp("vectors") / "cache"
    return configure(path, [{"name": name} | one for name, one in teachers.items()])


@pytest.fixture(scope="module")
def cache(run) -> Cache:
    cache_teachers(run)
    return Cache.open(run.cache.path)


@pytest.mark.parametrize("name", ["whole", "prompted", "other-tokens", "short", "some"])
def test_every_vector_is_the_models_own(cache, teachers, name):
    about, kind = teachers[name], cache.teacher(name).kind
    tokenizer = transformers.AutoTokenizer.from_pretrained(about["model"])
    longest, seen = 9 if name == "short" else 4096, 0
    for example in examples(cache):
        if name == "some" and example.domain != "odd":
            assert example.targets[name] == []
            continue
        text = about.get("prompt", "") + example.text
        ids = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        with torch.no_grad():
            states = model_of(about["model"], "AutoModel")(torch.tensor([ids])).last_hidden_state[0]
        exact = DIRECT[about.get("pooling", "cls")](states)
        if about.get("normalise"):
            exact = torch.nn.functional.normalize(exact, dim=0)
        (found,) = example.targets[name]
        stored, exact = found.vector[None], exact.numpy()[None]
        assert cosine_distances(exact, stored)[0] <= kind.bounds(exact)[0] + 1e-6
        assert np.linalg.norm(stored) == pytest.approx(np.linalg.norm(exact), rel=0.01)
        seen += 1
    assert seen == (cache.teacher(name).positions)
    assert seen > 2


def test_a_batch_has_them_as_float32(cache):
    index = np.arange(len(cache))
    batch = cache.gather(index, ["whole", "some"])
    for name, target in batch.targets.items():
        assert target.vectors.dtype == np.float32
        rows = [n for n in index if cache.example(n).targets[name]]
        assert target.rows.tolist() == rows
        for row, vector in zip(rows, target.vectors, strict=True):
            assert np.array_equal(vector, cache.example(row).targets[name][0].vector)
        sent = to_device(batch, "cpu").targets[name]
        assert np.array_equal(sent.vectors.numpy(), target.vectors)
        assert sent.select.tolist() == rows
    target = batch.targets["some"]
    part = target.take(slice(1, len(index) - 1))
    inside = (target.rows >= 1) & (target.rows < len(index) - 1)
    assert np.array_equal(part.rows, target.rows[inside] - 1)
    assert np.array_equal(part.vectors, target.vectors[inside])


def test_the_cache_is_sound_and_says_what_it_keeps(cache, run):
    path = run.cache.path
    assert verify_cache(path).problems == []
    assert read_manifest(cache.store)[VERSION] == WITH_VECTORS
    report = audit_cache(path, run, 6)
    assert report.problems == []
    assert report.values["short"]["cosine_error"] > report.values["whole"]["cosine_error"]
    told = json.loads(inspect_cache(path, as_json=True))["teachers"]["short"]
    assert told["vectors"] == "int8"
    assert 0 < told["cosine_error"]["mean"] <= told["cosine_error"]["largest"] < 1e-3
    assert "int8, which turns them by" in inspect_cache(path)


def test_an_audit_finds_another_prompt_and_vectors_that_are_off(cache, run, teachers, configure):
    """By the record, and by direction or length."""
    one = {"name": "prompted"} | teachers["prompted"]
    other = configure(run.cache.path, [one | {"prompt": "else: "}])
    with pytest.raises(CacheMismatchError, match="modules differs"):
        audit_cache(run.cache.path, other, 3)
    kind, exact = cache.teacher("prompted").kind, np.eye(3, 8, dtype=np.float32) + 1
    for wrong in (exact * 1.2, exact + np.eye(3, 8, 1, dtype=np.float32)):
        shares = [one.share for one in judge_vectors(kind, {"vectors": wrong}, exact)]
        assert max(share.max() for share in shares) > 1
    assert all((one.share <= 1).all() for one in judge_vectors(kind, {"vectors": exact}, exact))


def test_it_may_be_renamed(tmp_path, teachers, configure):
    cache_teachers(configure(tmp_path / "c", [{"name": "whole"} | teachers["whole"]]))
    store = LocalStore(tmp_path / "c")
    change_teacher(store, "rename", "whole", "other")
    assert [*Cache.open(tmp_path / "c").teachers] == ["other"]
    assert read_manifest(store)[VERSION] == WITH_VECTORS
    assert verify_cache(str(tmp_path / "c")).problems == []


@pytest.mark.parametrize("name", ["some", "short"])
def test_exported_vectors_are_imported_as_they_were(tmp_path, run, cache, name):
    """Of a domain alone, in fp16; and in int8. The same rows once more find the same targets."""
    copy = shutil.copytree(run.cache.path, tmp_path / "copy")
    info = cache.teacher(name).info
    rows = [*Export(cache.corpus, cache.teacher(name)).rows()]
    assert len(rows) == cache.teacher(name).positions
    settings = {"task": "embedding", "vectors": info.vectors, "allow_missing": name == "some"}
    opened = Cache.open(copy)
    for made in (True, False):
        done = opened.import_targets("again", rows, {"model": "elsewhere"}, **settings)
        assert bool(done.units_done) is made
    grown = Cache.open(copy)
    assert grown.teacher("again").info.dimensions == info.dimensions
    both = grown.gather(np.arange(len(grown)), [name, "again"]).targets
    assert np.array_equal(both[name].rows, both["again"].rows)
    assert cosine_distances(both[name].vectors, both["again"].vectors).max() < 1e-9
    assert verify_cache(str(copy)).problems == []
    wrong = [rows[0] | {"vector": rows[0]["vector"][:-1]}]
    with pytest.raises(InputError, match="vector"):
        opened.import_targets("other", [rows[1], *wrong], {"model": "elsewhere"}, **settings)
