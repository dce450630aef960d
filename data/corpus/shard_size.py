"""How many sequences a shard of a new corpus has, where its configuration does not say.

A shard is the unit of work, and of what a kill loses: a small corpus has small ones. It is decided
once, when the corpus is begun, and recorded with it. A power of two, as record batches are.
"""

LEAST, MOST = 64, 4096  # sequences in a shard
SHARDS = 32  # of a corpus that is neither very small nor large, at least


def usual_shard_size(sequences: int | None) -> int:
    """Return the size for a corpus of about so many sequences; MOST where that is not known."""
    if sequences is None:
        return MOST
    size = LEAST
    while size < MOST and 2 * size * SHARDS <= sequences:
        size *= 2
    return size
