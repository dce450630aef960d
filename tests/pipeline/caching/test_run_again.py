"""A complete cache is looked at again without writing, so that it may lie on a read-only mount."""

from pathlib import Path

import pytest

from rekindle.data.errors import InputError
from rekindle.data.storage.store import LocalStore
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from testlib.command import pipeline


@pytest.fixture(scope="module")
def config(tmp_path_factory, configure, make_teacher):
    """A complete cache with a teacher of each way to be kept."""
    kept = {"kind": "topk", "k": 5, "temperatures": [1.0, 2.0]}
    teachers = [
        make_teacher("lm", "masked_lm", targets=kept),
        make_teacher("states", "masked_lm", targets={"kind": "hidden"}),
        make_teacher("pairs", "sequence_classification", pairs="adjacent"),
    ]
    path = tmp_path_factory.mktemp("again") / "cache"
    first = teachers[0] | {"targets": kept | {"temperatures": [1.0]}}
    cache_teachers(configure(path, [first, *teachers[1:]]))
    config = configure(path, teachers)
    cache_teachers(config)
    return config


def state(folder):
    """What changes when anything in a folder is written, also what is gone again."""
    found = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


@pytest.mark.parametrize("check", [True, False, None])
def test_a_complete_cache_is_not_written(config, monkeypatch, check):
    folder = Path(config.cache.path)
    before = state(folder)

    def refuse(self, name, content):
        raise InputError(f"written: {name}")

    monkeypatch.setattr(LocalStore, "replace", refuse)
    monkeypatch.setattr(LocalStore, "begin", refuse)
    again = cache_teachers(config, check=check)
    assert (again.units_done, again.repaired) == (0, 0)
    assert state(folder) == before


def test_a_missing_bucket_is_called_so(s3):
    for command in ("verify", "inspect", "gc"):
        failed = pipeline(command, "s3://no-such-bucket/cache")
        assert failed.returncode == 2
        assert failed.stdout == ""
        assert failed.stderr.startswith("error: there is no bucket 'no-such-bucket' for s3://no-")
        empty = pipeline(command, f"{s3}/nothing")
        assert empty.returncode == 3
        assert "is not a Rekindle cache" in empty.stderr
