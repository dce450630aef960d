"""Frozen caches open for ever, and decode to what they decoded to when they were made."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from rekindle.data.cache import Cache
from rekindle.pipeline.checks.verify import verify_cache

HERE = Path(__file__).parent
CACHES = sorted(path for path in HERE.glob("cache-v*") if path.is_dir())


def make_cache_module():
    spec = importlib.util.spec_from_file_location("make_cache", HERE / "make_cache.py")
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
    assert [path.name for path in CACHES] == ["cache-v1", "cache-v2"]


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.name)
def test_a_frozen_cache_is_sound_and_decodes_as_ever(path):
    assert verify_cache(str(path)).problems == []
    decoded = make_cache_module().decoded
    expected = json.loads(path.with_suffix(".json").read_text())
    assert len(Cache.open(path)) == len(expected)
    for index, example in enumerate(expected):
        assert same(json.loads(json.dumps(decoded(path, index))), example), index
