"""``cache.json``: the format's version, and a roll-up of the cache that can be rebuilt from the
rest.

Versions 1 to 12 are read. Older files lack the keys that version 3 introduced, so an older cache is
read, verified and extended as it was made: its corpus continues without end-of-text tokens, and
with its original vocabulary. The first run of stage 1 that may add to a cache raises the version to
3 before it writes anything (``raise_version``), whatever it then adds. From then on an older
Rekindle refuses the cache by its version instead of reading half of it. Records of both versions
exist side by side; only the manifest's version counts.

The later versions mark caches that contain something an older Rekindle would misread. A cache
without it keeps its version, and a cache may combine them:

- 4: a teacher with imported targets (``data/targets/imported.py``); raised before the first of them
  is written.
- 5: a roll-up of commit records (``records.py``), which large sets have. An older Rekindle that
  repairs such a cache would leave the roll-up unchanged.
- 6: a corpus that marks each token as trained or not (dialogues, rows of tokens). An older Rekindle
  would train all of them.
- 7: a teacher run by a server (``data/targets/served.py``); raised before its first target is
  written.
- 8: a corpus with several documents in a row and attention within each (``packing: packed``). An
  older Rekindle would show a student the other documents, too.
- 9: a teacher whose tokens were mapped to the corpus's (``vocabulary: map``). An older Rekindle
  takes a position without a target for damage.
- 10: a teacher is being removed, renamed or transcoded (``data/journal.py``). An older Rekindle
  would see half of that. Afterwards the version returns to what it was.
- 11: a teacher that gives vectors (``task: embedding``, ``data/targets/kinds/embedding.py``). An
  older Rekindle does not know this kind.
- 12: sequences with groups (``corpus.group_field``). An older Rekindle does not know the column.
"""

import logging
from collections.abc import Mapping
from typing import Any

from rekindle.data.errors import CacheFormatError, CacheVersionError, InputError
from rekindle.data.storage.base import Store
from rekindle.data.storage.seal import (
    FORMAT_VERSION,
    REPAIR,
    SEAL,
    VERSION,
    WITH_GROUPS,
    seal,
    unseal,
)

log = logging.getLogger("rekindle")

MANIFEST = "cache.json"
WITHOUT_TEXT = "corpus/without_text.json"  # in a cache that was passed on so; until it is whole
NEWEST_VERSION = WITH_GROUPS  # of the versions that can be read


def read_manifest(store: Store) -> dict[str, Any]:
    """Return ``cache.json``, checked for damage and for a format version this code reads."""
    try:
        values = store.read_json(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        if bucket := store.bucket_missing:
            raise InputError(
                f"there is no bucket {bucket!r} for {store.location} (or these credentials may not "
                "see it); make it, or correct the address"
            ) from None
        raise CacheFormatError(
            f"{store.location} is not a Rekindle cache: it has no {MANIFEST}. "
            "Give the folder that cache.path names, or make one with `pipeline cache-teachers`"
        ) from None
    name = f"{store.location}/{MANIFEST}"
    is_sealed = isinstance(values, dict) and SEAL in values
    body = unseal(values, name) if is_sealed else values
    version = body.get(VERSION) if isinstance(body, dict) else None
    if type(version) is not int or not 1 <= version <= NEWEST_VERSION:
        raise CacheVersionError(
            f"{store.location} has cache format {version!r}; this version of Rekindle reads "
            f"formats 1 to {NEWEST_VERSION}. Use the version of Rekindle that wrote it, or a "
            "later one, or make the cache again"
        )
    body = unseal(values, name)
    if not _is_roll_up(body):
        raise CacheFormatError(f"{name} is damaged: it does not say what is in the cache. {REPAIR}")
    return body


def _is_roll_up(body: Mapping[str, object]) -> bool:
    corpus, teachers = (body.get(key) or {} for key in ("corpus", "teachers"))
    if not isinstance(corpus, dict) or not isinstance(teachers, dict):
        return False
    states_corpus = not corpus or (type(corpus.get("sequences")) is int and "fingerprint" in corpus)
    return states_corpus and all(isinstance(teacher, dict) for teacher in teachers.values())


def describe_missing(store: Store, name: str) -> str:
    """Return the message about a committed shard that is missing."""
    if name.startswith("corpus/") and store.exists(WITHOUT_TEXT):
        return f"{store.location}/{name} is not there: {_NO_TEXT}"
    return f"{store.location}/{name} is missing although it was committed"


def refuse_without_text(store: Store) -> None:
    """Raise CacheFormatError for a cache that was passed on so, where its text is needed."""
    if store.exists(WITHOUT_TEXT):
        raise CacheFormatError(f"{store.location}: {_NO_TEXT}")


_NO_TEXT = (
    "the cache was passed on without its text. Its README.md and docs/sharing.md say how the same "
    "text makes it whole again"
)


def begin_manifest(store: Store) -> None:
    """Mark a new cache with its format version; an existing mark is kept."""
    store.create(MANIFEST, seal({}))
    read_manifest(store)


def raise_version(store: Store, version: int = FORMAT_VERSION) -> None:
    """Raise the cache's format version to at least ``version``, because later writes may need it.

    Does nothing to a folder without a manifest, to a cache that has the version, and to one that
    cannot be written (it may be complete).
    """
    if (
        store.writable
        and store.exists(MANIFEST)
        and (body := read_manifest(store))[VERSION] < version
    ):
        log.info(
            "%s has cache format %d: it is raised to %d; earlier versions of Rekindle will not "
            "open it any more",
            store.location,
            body[VERSION],
            version,
        )
        store.replace(MANIFEST, seal(body, version))
