"""Small JSON files that contain a checksum of themselves: a cache's descriptions of itself.

Every description in a cache (manifest, corpus, tokenizer, views, teachers) and every commit record
is sealed, so that a flipped byte in any of them is found and named. Knows nothing of their content.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.base import Store

FORMAT_VERSION = 3  # its meaning, and what is kept of older versions: manifest.py
WITH_IMPORTS = 4  # a cache with targets made elsewhere; without any, version 3
WITH_ROLL_UPS = 5  # a cache with rolled-up commit records; without, version 3 or 4
WITH_TRAINED = 6  # a cache whose corpus marks what is trained; without, one of the above
WITH_SERVED = 7  # a cache with targets from a server; without, one of the above
WITH_PACKED = 8  # a cache with attention within each document of a row; without, one of the above
WITH_MAPPED = 9  # a cache with a teacher of another tokenizer; without, one of the above
CHANGING = 10  # while a teacher is renamed, removed or transcoded; then the version before
WITH_VECTORS = 11  # a cache with a teacher of task: embedding; without, one of the above, except 10
WITH_GROUPS = 12  # a cache whose sequences have groups; without, one of the above, except 10
SEAL = "record"  # the key of the checksum
VERSION = "format_version"


def checksum(body: Mapping[str, object]) -> str:
    """Return the sha256 of the canonical JSON of ``body``."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()


def seal(body: Mapping[str, object], version: int = FORMAT_VERSION) -> bytes:
    """Return ``body`` as JSON with the format's version and a checksum over both."""
    plain = json.loads(json.dumps(dict(body) | {VERSION: version}))
    text = json.dumps(plain | {SEAL: checksum(plain)}, indent=1, sort_keys=True)
    return text.encode() + b"\n"


def unseal(values: object, name: str) -> dict[str, Any]:
    """Return what was sealed; raise CacheFormatError, naming ``name``, if it was altered.

    Files of format version 1 have neither version nor checksum (except its manifest, which says 1);
    one of the two alone is damage.
    """
    if not isinstance(values, dict):
        raise CacheFormatError(f"{name} is damaged: it is not a JSON object. {REPAIR}")
    body = dict(values)
    recorded = body.pop(SEAL, None)
    if recorded is None and body.get(VERSION, 1) == 1:
        return body
    if recorded != checksum(body):
        raise CacheFormatError(f"{name} is damaged: its checksum does not match. {REPAIR}")
    return body


def describe_damage(error: CacheFormatError) -> str:
    """Return what is damaged, without the advice, which is given once for a list."""
    return str(error).replace(REPAIR, "").strip()


REPAIR = "`pipeline verify` names all that is damaged, `pipeline cache-teachers` makes it anew"


def read_sealed(store: Store, name: str) -> dict[str, Any]:
    """Return the sealed object ``name`` without its version; raise FileNotFoundError without one.

    Raise CacheFormatError if it is damaged.
    """
    body = unseal(store.read_json(name), f"{store.location}/{name}")
    body.pop(VERSION, None)
    return body
