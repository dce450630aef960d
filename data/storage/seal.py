"""Small JSON files that carry a checksum of themselves: what a cache says about itself.

Every description in a cache (manifest, corpus, tokenizer, views, teachers) and every commit record
is sealed, so that a flipped byte in any of them is found and named. Knows nothing of their content.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.base import Store

FORMAT_VERSION = 3  # what it means, and what of the older ones is kept: manifest.py
WITH_IMPORTS = 4  # of a cache that has targets that were made elsewhere; else it is version 3
WITH_ROLL_UPS = 5  # of a cache whose commit records are rolled up; else it is version 3, or 4
WITH_TRAINED = 6  # of a cache whose corpus says what is trained; else it is one of those above
WITH_SERVED = 7  # of a cache that has targets that a server gave; else it is one of those above
WITH_PACKED = 8  # of a cache with attention within each document of a row; else one of those above
WITH_MAPPED = 9  # of a cache with a teacher of another tokenizer; else one of those above
CHANGING = 10  # while a teacher is renamed, removed or transcoded; then what it was before
WITH_VECTORS = 11  # of a cache with a teacher of task: embedding; else one of those above, but 10
WITH_GROUPS = 12  # of a cache whose sequences are of groups; else one of those above, but 10
SEAL = "record"  # the key of the checksum
VERSION = "format_version"


def checksum(body: Mapping[str, object]) -> str:
    """The sha256 of the canonical JSON of ``body``."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()


def seal(body: Mapping[str, object], version: int = FORMAT_VERSION) -> bytes:
    """``body`` as JSON with the format's version and a checksum over both."""
    plain = json.loads(json.dumps(dict(body) | {VERSION: version}))
    text = json.dumps(plain | {SEAL: checksum(plain)}, indent=1, sort_keys=True)
    return text.encode() + b"\n"


def unseal(values: object, where: str) -> dict[str, Any]:
    """What was sealed; CacheFormatError, naming ``where``, when it is not what was written.

    Files of format version 1 have neither version nor checksum (but for its manifest, which says
    1); one of the two alone is damage.
    """
    if not isinstance(values, dict):
        raise CacheFormatError(f"{where} is damaged: it is not a JSON object. {REPAIR}")
    body = dict(values)
    stated = body.pop(SEAL, None)
    if stated is None and body.get(VERSION, 1) == 1:
        return body
    if stated != checksum(body):
        raise CacheFormatError(f"{where} is damaged: its checksum does not match. {REPAIR}")
    return body


def damage(error: CacheFormatError) -> str:
    """What is damaged, without the advice: where many are listed, it is given once."""
    return str(error).replace(REPAIR, "").strip()


REPAIR = "`pipeline verify` names all that is damaged, `pipeline cache-teachers` makes it anew"


def read_sealed(store: Store, name: str) -> dict[str, Any]:
    """The sealed object ``name`` without its version; FileNotFoundError when there is none.

    Raises CacheFormatError when it is damaged.
    """
    body = unseal(store.read_json(name), f"{store.location}/{name}")
    body.pop(VERSION, None)
    return body
