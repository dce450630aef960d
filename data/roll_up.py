"""What ``cache.json`` repeats of a cache, and whether it still matches."""

from collections.abc import Mapping

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import CacheMismatchError
from rekindle.data.storage.manifest import MANIFEST
from rekindle.data.targets.reading.reader import TeacherReader
from rekindle.data.views.reader import ViewReader

ROLLED_UP = ("corpus", "views", "teachers")


def roll_up(
    corpus: Corpus, views: Mapping[str, ViewReader], teachers: Mapping[str, TeacherReader]
) -> dict[str, object]:
    """Return the entries of ``cache.json``, which can be rebuilt from the rest of the cache."""
    return {
        "corpus": {
            "fingerprint": corpus.fingerprint,
            "tokenizer": str(corpus.info["tokenizer"]["digest"]),
            "sequences": len(corpus),
            "tokens": corpus.tokens,
        },
        "views": {name: {"units": len(view.commits)} for name, view in views.items()},
        "teachers": {
            name: {
                "task": teacher.info.task,
                "weights": teacher.info.fingerprints.get("weights"),
                "view": teacher.info.view,
                "units": len(teacher.commits),
                "bytes": teacher.bytes,
            }
            for name, teacher in teachers.items()
        },
    }


def check_roll_up(manifest: Mapping[str, object], corpus: Corpus) -> None:
    """Raise CacheMismatchError if the manifest describes another corpus than the one beside it."""
    recorded = manifest.get("corpus") or {}
    assert isinstance(recorded, dict)  # see ``read_manifest``
    if not recorded:
        return
    # The corpus may have grown since the roll-up was written.
    shards = corpus.shards_of(int(recorded.get("sequences", -1)))
    is_same = shards is not None and corpus.fingerprint_of(shards) == recorded["fingerprint"]
    if not is_same or recorded.get("tokenizer") != str(corpus.info["tokenizer"]["digest"]):
        raise CacheMismatchError(
            f"{corpus.store.location}: {MANIFEST} describes another corpus than the one in "
            "corpus/. If shards were copied by hand, copy the whole cache; otherwise delete "
            "cache.json's 'corpus' entry by running `pipeline cache-teachers` again"
        )
