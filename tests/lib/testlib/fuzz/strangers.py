"""A stranger who changes files; level A: bytes under an intact record."""

import hashlib
import json
import os
import random

import pyarrow as pa
import xxhash

from rekindle.data.storage.seal import SEAL, VERSION, checksum, seal
from rekindle.data.targets.scalars import ScalarChecksum


class Stranger:
    """A cache to change. Remembers the old content, to restore it. Files are never changed in
    place, because the last case may still map them.
    """

    def __init__(self, root, draw=None):
        self.root, self.draw = root, draw or random.Random(0)
        self.files = sorted(p for p in root.rglob("*") if p.is_file())
        # Not the roll-ups of records, which no record mentions.
        self.data = [p for p in self.files if p.suffix == ".arrow" and p.parent.name == "data"]
        self.sealed = [
            p for p in self.files if p.suffix == ".json" and b'"record"' in p.read_bytes()
        ]
        self._before = {}

    def write(self, path, content):
        self._before.setdefault(path, path.read_bytes())
        temporary = path.with_name(".changed")
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def restore(self):
        for path, content in self._before.items():
            temporary = path.with_name(".changed")
            temporary.write_bytes(content)
            os.replace(temporary, path)
        self._before = {}

    def record_of(self, path):
        """Return the path of a data file's commit record."""
        unit = path.name.rsplit("-", 1)[0]
        return path.parents[1] / "commits" / f"{unit}.json"

    def commit(self, path, content, cuts=None, **changes):
        """Write a data file and a truthful record."""
        record = self.record_of(path)
        body = json.loads(record.read_bytes())
        body.pop(SEAL)
        cuts = cuts or recut([o + n for o, n, _ in body["regions"]], len(content))
        regions = [
            [a, b - a, xxhash.xxh3_64_hexdigest(content[a:b])]
            for a, b in zip([0, *cuts], cuts, strict=False)
        ]
        sha256 = hashlib.sha256(content).hexdigest()
        body |= {"bytes": len(content), "sha256": sha256, "regions": regions} | changes
        if "scalars" in body["facts"]:
            body["facts"].pop("scalars")
            if self.draw.random() < 0.7 and (checksum := sums_of(content)):
                body["facts"]["scalars"] = checksum
        self.write(path, content)
        self.write(record, sealed_record(body))
        if "corpus" in path.parts[-3:]:
            self.roll_up({})

    def roll_up(self, body):
        """Update what cache.json says of the corpus to match its shards."""
        manifest = self.root / "cache.json"
        self.write(manifest, describe_as(json.loads(manifest.read_bytes()), body))


def recut(cuts, size):
    """Return the regions' ends for a file of another size."""
    cuts = [c for c in cuts[:-1] if 0 < c < size]
    return [*cuts, size]


def sums_of(content):
    """Return the checksum of the scalar columns if they can be read; crashes are for the reader.

    Only for files that one of our writers could read: never with wrong offsets.
    """
    try:
        reader = pa.ipc.open_file(pa.py_buffer(content))
        checksum = ScalarChecksum()
        for index in range(min(reader.num_record_batches, 100)):
            batch = reader.get_batch(index)
            batch.validate(full=True)
            checksum.add(batch)
        return checksum.facts().get("scalars")
    except Exception:
        return None


def sealed_record(body):
    return json.dumps(body | {SEAL: checksum(body)}).encode()


def describe_as(before, body):
    """Return a description in its format: sealed, or of format 1 without a seal."""
    if SEAL in before:
        return seal(body)
    return json.dumps(body | ({VERSION: before[VERSION]} if VERSION in before else {})).encode()


# Level A: bytes under an intact record ------------------------------------------------------------
def any_file(stranger):
    """Return a file whose bytes are protected by something."""
    vouched = [*stranger.data, *stranger.sealed, *stranger.root.glob("targets/*/*.safetensors")]
    # Prefer shards, because there are more small files.
    return stranger.draw.choice(stranger.data if stranger.draw.random() < 0.6 else vouched)


def somewhere(draw, content):
    start = draw.randrange(len(content))
    return start, min(len(content), start + 2 ** draw.randrange(12))


def flipped(stranger):
    path = any_file(stranger)
    content = bytearray(path.read_bytes())
    for _ in range(stranger.draw.choice([1, 1, 1, 2, 8])):
        content[stranger.draw.randrange(len(content))] ^= 1 << stranger.draw.randrange(8)
    stranger.write(path, bytes(content))


def zeroed(stranger):
    path = any_file(stranger)
    content = bytearray(path.read_bytes())
    start, stop = somewhere(stranger.draw, content)
    content[start:stop] = bytes(stop - start)
    stranger.write(path, bytes(content))


def scrambled(stranger):
    path = any_file(stranger)
    content = bytearray(path.read_bytes())
    start, stop = somewhere(stranger.draw, content)
    content[start:stop] = stranger.draw.randbytes(stop - start)
    stranger.write(path, bytes(content))


def cut(stranger):
    path = any_file(stranger)
    content = path.read_bytes()
    stranger.write(path, content[: stranger.draw.randrange(len(content))])


def inserted(stranger):
    path = any_file(stranger)
    content = path.read_bytes()
    start, stop = somewhere(stranger.draw, content)
    more = stranger.draw.choice([content[start:stop], bytes(stop - start), b"\0", b" "])
    stranger.write(path, content[:start] + more + content[start:])


def spliced(stranger):
    first, second = any_file(stranger), any_file(stranger)
    start = stranger.draw.randrange(len(first.read_bytes()))
    stranger.write(first, first.read_bytes()[:start] + second.read_bytes()[start:])


def exchanged(stranger):
    first, second = stranger.draw.sample(stranger.data, 2)
    ours, theirs = first.read_bytes(), second.read_bytes()
    stranger.write(first, theirs)
    stranger.write(second, ours)


def exchanged_with_records(stranger):
    """Swap two units of one set, each with its own record; the records name their units."""
    first, second = stranger.draw.sample(stranger.data, 2)
    for a, b in ((first, second), (stranger.record_of(first), stranger.record_of(second))):
        ours, theirs = a.read_bytes(), b.read_bytes()
        stranger.write(a, theirs)
        stranger.write(b, ours)
