"""``cache.json``: the format's version, and a roll-up of the cache that can be rebuilt from the
rest.
"""

from collections.abc import Mapping
from typing import Any

from rekindle.data.errors import CacheFormatError, CacheVersionError
from rekindle.data.storage.seal import FORMAT_VERSION, REPAIR, SEAL, VERSION, seal, unseal
from rekindle.data.storage.store import Store

MANIFEST = "cache.json"


def read_manifest(store: Store) -> dict[str, Any]:
    """``cache.json``, checked for damage and for a format version that this code reads."""
    try:
        values = store.read_json(MANIFEST)
    except FileNotFoundError:
        raise CacheFormatError(
            f"{store.location} is not a Rekindle cache: it has no {MANIFEST}. "
            "Give the folder that cache.path names, or make one with `pipeline cache-teachers`"
        ) from None
    where = f"{store.location}/{MANIFEST}"
    sealed = isinstance(values, dict) and SEAL in values
    body = unseal(values, where) if sealed else values
    version = body.get(VERSION) if isinstance(body, dict) else None
    if version not in (1, FORMAT_VERSION):
        raise CacheVersionError(
            f"{store.location} has cache format {version!r}; this version of Rekindle reads "
            f"formats 1 to {FORMAT_VERSION}. Use the version of Rekindle that wrote it, or make "
            "the cache again"
        )
    body = unseal(values, where)
    if not _is_roll_up(body):
        raise CacheFormatError(
            f"{where} is damaged: it does not say what is in the cache. {REPAIR}"
        )
    return body


def _is_roll_up(body: Mapping[str, object]) -> bool:
    corpus, teachers = (body.get(key) or {} for key in ("corpus", "teachers"))
    if not isinstance(corpus, dict) or not isinstance(teachers, dict):
        return False
    stated = not corpus or (type(corpus.get("sequences")) is int and "fingerprint" in corpus)
    return stated and all(isinstance(teacher, dict) for teacher in teachers.values())


def begin_manifest(store: Store) -> None:
    """Mark a new cache with its format version (kept when it is there)."""
    store.create(MANIFEST, seal({}))
    read_manifest(store)
