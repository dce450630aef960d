"""Compares reading a small corpus in small shards with the same one in shards of 4,096.

    python tests/benchmarks/scale/shard_sizes.py [--toy] [--csv PATH]

5,000 and 50,000 sequences of 32 tokens, a causal teacher (31 targets each, k = 32), batches of 32
sequences drawn from all of them, one thread, warm page cache. Every size of shard has the same
integers; each gives the same numbers for the same sequences before it is timed. "usual" is the size
that a new corpus of that many sequences gets. Opening is measured beside it, once.

Prediction before the first run: opened in twice the time with 16 times the shards; reading 0.9 of
that of 4,096 at the usual size, 0.8 at 64.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cache_rows import Ints, Ours, draw_columns, make_corpus, timed
from results_csv import RESULTS, Row, append, processor, versions

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.packing import MAX_SHARD_SIZE, MIN_SHARD_SIZE, default_shard_size
from rekindle.data.targets.codec import Columns
from rekindle.pipeline.caching.compute_unit import UnitResult

LENGTH, TARGETS, BATCH, ROUNDS = 32, 31, 32, 5


class Sliced(Ours):
    """Targets that are drawn once for the whole corpus, and cut at its shards."""

    def __init__(self, corpus: Corpus):
        self.whole = draw_columns(len(corpus) * TARGETS, 0, "default", TARGETS)
        super().__init__(corpus, "default", TARGETS)

    def _unit(self, shard: int) -> UnitResult:
        first, rows = self.corpus.first(shard), self.corpus.commits[shard].rows
        held = slice(first * TARGETS, (first + rows) * TARGETS)
        columns: Columns = {name: values[held] for name, values in self.whole.items()}
        return UnitResult(np.repeat(np.arange(rows), TARGETS), columns)


def made(folder: Path, sequences: int, shard: int) -> Ours:
    """Return the corpus and its targets in shards of this size."""
    ours = Sliced(make_corpus(folder, sequences, LENGTH, shard))
    ours.write()
    ours.open()
    return ours


def compare(sequences: int, folder: Path) -> list[Row]:
    usual = default_shard_size(sequences)
    sizes = sorted({MIN_SHARD_SIZE, usual, MAX_SHARD_SIZE}, reverse=True)
    ours = {size: made(folder / f"{sequences}-{size}", sequences, size) for size in sizes}
    order = np.random.default_rng(0).permutation(sequences)
    batches = [order[at : at + BATCH] for at in range(0, sequences - BATCH + 1, BATCH)]
    for size in sizes:
        for index in batches[:: len(batches) // 8]:
            _same(ours[size], ours[MAX_SHARD_SIZE], index)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size in sizes:
            seconds[size].append(timed(partial(_read, ours[size], batches)))
    rows = []
    case = f"{sequences:,} sequences of {LENGTH}"
    for size in sizes:
        name = f"{size} a shard{' (usual)' if size == usual else ''}"
        rate = len(batches) * BATCH / statistics.median(seconds[size])
        ratio = statistics.median(
            one / own for one, own in zip(seconds[MAX_SHARD_SIZE], seconds[size], strict=True)
        )
        began = time.perf_counter()
        ours[size].open()
        opened = time.perf_counter() - began
        print(
            f"{case}, {name}: {rate:,.0f} sequences/s, {ratio:.2f} of {MAX_SHARD_SIZE}; "
            f"open {opened:.3f} s"
        )
        rows += [
            (case, name, "shuffled reads", rate, "sequences/s"),
            (case, name, f"shuffled reads, of {MAX_SHARD_SIZE} a shard", ratio, "ratio"),
            (case, name, "open", opened, "s"),
        ]
    return rows


def _read(one: Ours, batches: Sequence[Ints]) -> None:
    for index in batches:
        one.gather(index)


def _same(one: Ours, other: Ours, index: Ints) -> None:
    found, expected = (o.gather(index).targets[o.name].columns for o in (one, other))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="results are appended to it")
    options = parser.parse_args()
    about = versions("numpy", "pyarrow")
    with tempfile.TemporaryDirectory() as folder:
        sizes = (500,) if options.toy else (5_000, 50_000)
        results = [row for sequences in sizes for row in compare(sequences, Path(folder))]
    append(results, f"shard_sizes{' --toy' * options.toy}", processor(), about, options.csv)


if __name__ == "__main__":
    main()
