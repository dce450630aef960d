"""A cache in an object store, read where it lies (pip install -e '.[s3]'):

    python examples/cache_in_a_store.py s3://bucket/cache TEACHER

Credentials, region and endpoint are AWS's own variables (AWS_ENDPOINT_URL for a server of yours).
Each byte is checked against its checksum when it is first touched, and fetched once.
"""

import sys
import time

from rekindle.data.cache import Cache


def main(place: str, teacher: str) -> int:
    began = time.perf_counter()
    cache = Cache.open(place)
    print(f"opened in {time.perf_counter() - began:.2f} s: {cache}")
    positions = 0
    for batch in cache.batches(teachers=[teacher], batch_sequences=32, seed=0, epoch=0):
        positions += len(batch.targets[teacher].rows)
    print(f"{positions:,} positions with targets of {teacher}")
    return positions


if __name__ == "__main__":
    main(*sys.argv[1:])
