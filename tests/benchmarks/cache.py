"""Compare reads and writes of the cache with other ways to hold the same targets, in one run.

    python tests/benchmarks/cache.py [--toy] [--positions N] [--csv PATH] [--peers FOLDER ...]
    python tests/benchmarks/cache.py --overhead [--toy]    # what stage 1 adds to a forward loop

The first form: sequences of 512 tokens, a causal teacher (511 targets each, k = 32, V = 30,522),
batches of 16 sequences as arrays, one thread, warm page cache. Rekindle's cache goes through the
real writer (hashes, fsync, commit) and ``Cache.gather``. Every peer holds the very same integers:
the tokens and, per position, ``ids`` uint16 [k], ``values`` uint8 [k], the position, and the five
16-bit scalars that a loss needs as *one* array; the cache holds three more for selection, which are
not read. Each must deliver the same numbers for the same sequences before it is timed. Shuffled
reads take the same sequences everywhere, drawn from all of them; "own order" is a library's own
shuffling, in an order it chooses. "bare copies" is no store: slices of arrays in memory, copied
into a batch. Bytes are those of the targets, without the tokens.

--peers: folders put on the import path first, one each, for libraries that conflict with this
package's requirements (``pip install --no-deps --target FOLDER mosaicml-streaming``).

The second form: a masked LM (6 layers, hidden 384) on sequences of 128, 15 % masked. A forward loop
over all tokens is compared with stage 1 (forward, scoring, encoding, writing) on the same batches.

Predictions before the first run: shuffled reads within 20 % of sequential ones, 2 x the best peer;
stage 1 costs less than the forward loop, whose head sees every token and not only the masked ones.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from cache_overhead import overhead
from cache_peers import PEERS
from cache_rows import (
    BATCH,
    CODECS,
    LENGTH,
    SHARD,
    TARGETS,
    VOCABULARY,
    Ints,
    K,
    Ours,
    Rows,
    in_order,
    make_corpus,
    timed,
)
from results_csv import RESULTS, Row, append, processor, versions

from rekindle.data.corpus.corpus import Corpus

PACKAGES = ("torch", "numpy", "pyarrow", "datasets", "safetensors", "transformers")
PACKAGES += ("mosaicml-streaming", "litdata")
LONG = 3.0  # seconds; works that take longer are measured once


# ---- measuring
# ---------------------------------------------------------------------------------------------


def rate(batches: Iterator[Any], budget: float) -> float:
    """Return positions per second over as many batches as fit into ``budget`` seconds, at least
    one.
    """
    began, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - began > budget:
            break
    return count * BATCH * TARGETS / (time.perf_counter() - began)


def again_and_again(once: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Repeat passes: a single one takes only milliseconds."""
    while True:
        yield from once()


def same(found: Rows, expected: Rows) -> bool:
    return all(np.array_equal(np.asarray(f), e) for f, e in zip(found, expected, strict=True))


def prepare(
    corpus: Corpus, folder: Path, gate: list[Ints]
) -> tuple[dict[str, Any], dict[str, str], dict[str, float]]:
    """Return the contenders that are installed and correct, why the others are not, and the seconds
    of their writes.
    """
    contenders: dict[str, Any] = {}
    absent: dict[str, str] = {}
    writes: dict[str, float] = {}
    for codec in CODECS:
        contenders[f"rekindle, {codec}"] = Ours(corpus, codec)
        ours = contenders[f"rekindle, {codec}"]
        writes[f"rekindle, {codec}"] = timed(ours.write)
        ours.open()
        truth = contenders[f"rekindle, {CODECS[0]}"]
        if not all(ours.agrees(index, truth) for index in gate):
            absent[f"rekindle, {codec}"] = "FAILED: not the default codec's targets"
            del contenders[f"rekindle, {codec}"]
    parts = [truth.rows(truth.batch(index)) for index in in_order(len(corpus))]
    rows = Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    for name, (kind, files) in PEERS.items():
        try:
            peer = kind(folder / (files or name).replace(" ", "-"), rows)
            if not files:
                writes[name] = timed(peer.write)
            peer.open()
            for index in gate:
                if not same(peer.batch(index), Rows(*(c[index] for c in rows))):
                    raise AssertionError("does not deliver the same numbers")
            contenders[name] = peer
        except ImportError as error:
            absent[name] = f"not installed: {error}"
        except Exception as error:  # a peer's failure is a finding, not an error of the benchmark
            absent[name] = f"FAILED: {type(error).__name__}: {str(error)[:90]}"
    return contenders, absent, writes


def measure(
    contenders: dict[str, Any], writes: dict[str, float], sequences: int, rounds: int, budget: float
) -> dict[str, dict[str, list[float]]]:
    """Return the rates [positions/s] of all contenders by kind of work, one of each a round."""
    rates: dict[str, dict[str, list[float]]] = {
        name: {"write": [], "sequential": [], "shuffled": []} for name in contenders
    }
    draw = np.random.default_rng(1)
    for turn in range(rounds):
        order = draw.permutation(sequences)
        shuffled = [order[at : at + BATCH] for at in range(0, sequences - BATCH + 1, BATCH)]
        for name, contender in contenders.items():
            found = rates[name]
            write = name in writes and (turn == 0 or writes[name] < LONG)
            if write:
                found["write"].append(sequences * TARGETS / timed(contender.write))
                contender.open()
            if write or turn == 0:
                rate(contender.stream(), LONG)  # warm, and our checksums are verified
            if turn and found["shuffled"][0] < BATCH * TARGETS / LONG:
                continue  # a batch takes seconds
            own = getattr(contender, "shuffle", False)
            for kind, ordered in (("sequential", True), ("shuffled", own)):
                once = contender.stream if ordered else partial(map, contender.batch, shuffled)
                found[kind].append(rate(again_and_again(once), budget))
    return rates


def compare(options: argparse.Namespace, folder: Path) -> list[Row]:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    count = options.positions or (16_384 if options.toy else 524_288)
    sequences = max(2 * BATCH, -(-count // TARGETS) // BATCH * BATCH)
    corpus = make_corpus(folder / "ours", sequences, LENGTH, SHARD)
    draw = np.random.default_rng(2)
    gate = [np.arange(BATCH), draw.permutation(sequences)[:BATCH]]
    contenders, absent, writes = prepare(corpus, folder / "peers", gate)
    rounds, budget = (2, 0.02) if options.toy else (9, 0.3)
    rates = measure(contenders, writes, sequences, rounds, budget)
    case = f"{sequences} x {LENGTH} V={VOCABULARY} k={K} batch={BATCH}"
    print(f"\n{case}, one thread, medians of {rounds} rounds; M positions/s")
    print(f"{'':26}{'write':>9}{'B/pos':>9}{'sequential':>12}{'shuffled':>10}{'x ours':>9}")
    results: list[Row] = []
    ours = rates[f"rekindle, {CODECS[0]}"]["shuffled"]
    for name, contender in contenders.items():
        size = contender.bytes() / (sequences * TARGETS)
        medians = {kind: statistics.median(r) for kind, r in rates[name].items() if r}
        ratio = statistics.median(
            a / b for a, b in zip(rates[name]["shuffled"], ours, strict=False)
        )
        write = f"{medians['write'] / 1e6:9.3f}" if "write" in medians else " " * 9
        reads = f"{medians['sequential'] / 1e6:12.3f}{medians['shuffled'] / 1e6:10.3f}"
        print(f"{name:26}{write}{size:9.1f}{reads}{ratio:9.4f}")
        results += [(case, name, kind, value, "positions/s") for kind, value in medians.items()]
        results.append((case, name, "size", size, "bytes/position"))
        results.append((case, name, "shuffled ratio to ours", ratio, "1"))
    for name, why in absent.items():
        print(f"{name:26} {why}")
    return results


# ---- the run
# ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--positions", type=int, help="about this many targets")
    parser.add_argument("--overhead", action="store_true", help="stage 1 against a forward loop")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="results are appended to it")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="import from here first")
    options = parser.parse_args()
    sys.path[1:1] = [str(path.resolve()) for path in options.peers]
    load = os.getloadavg()[0]
    print(f"{processor()}; Python {platform.python_version()}; load average {load:.2f}")
    about = versions(*PACKAGES)
    print(about)
    with tempfile.TemporaryDirectory() as folder:
        results = (overhead if options.overhead else compare)(options, Path(folder))
    name = f"cache{' --overhead' * options.overhead}{' --toy' * options.toy}"
    append(results, name, processor(), about, options.csv)


if __name__ == "__main__":
    main()
