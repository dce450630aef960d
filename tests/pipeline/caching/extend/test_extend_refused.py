"""What would not be the same corpus or teacher any more is refused, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from testlib.stage_one.extending import files_of, grow_folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 32}, "sequence_length: 24 there, 32 here"),
        ({"sequence_length": 32, "limit": 17}, "sequence_length: 24 there, 32 here"),
        ({"packing": "contiguous"}, "packing: 'document' there, 'contiguous' here"),
        ({"domain_field": None, "limit": None}, "domain_field: 'domain' there, None here"),
        ({"limit": 11}, "limit_sequences: 12 there, 11 here"),
        ({"files": "b"}, "source has changed.*[ab].jsonl"),
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


@pytest.mark.parametrize("files", ["cd", "bc"])
def test_files_in_place_of_others_are_refused(of_two_files, make, texts, ran, files):
    path, folder = of_two_files
    before = files_of(path)
    grow_folder(folder, texts, "c")
    ran.clear()
    with pytest.raises(CacheMismatchError, match=r"[bcd]\.jsonl"):
        cache_teachers(make(path, folder=folder, files=files, limit=None))
    assert ran == []
    assert files_of(path) == before


@pytest.mark.covering
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
