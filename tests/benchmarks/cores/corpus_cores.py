"""Compare making a corpus on two cores and on one: reading, tokenising, packing, writing.

    python tests/benchmarks/cores/corpus_cores.py SHARED [--toy] [--times N] [--csv PATH]

SHARED: the folder of the shared corpora (`corpus/wiki_train.jsonl`, `glue/sst2_train.jsonl`,
`tokenizers/bert-base-uncased`). Long texts (most of that Wikipedia) and short ones (the sentences
of SST-2, several times over) are made into sequences of 512, in shards of the usual size: some ten
seconds of one core each (``--times``: that many times as much, once), compared to which starting
the workers (a quarter of a second) is little. One process uses the first core, one the first two
(``taskset``: threads, as for any corpus that is not long), and one these with ``--workers 2``; they
make the same corpora in turns, in one run, each alone. One-time costs (imports) are left out,
except loading the tokenizer and starting the workers.

Meant for idle cores. On others the rows say so: the load average is part of their case. Independent
of it is the last row of each case: the share of one process's CPU time that is left, with two
workers, to the process that cuts the source into parts and writes. That part cannot be shared, so
its inverse bounds what any number of cores can give.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# last: its files are imported by the names of packages
sys.path.append(str(Path(__file__).parents[1]))
from results_csv import RESULTS, Row, append, processor, versions

Found = dict[str, Any]
CASES = {  # file, how many times over, field, packing, sequences
    "long texts, contiguous": ("corpus/wiki_train.jsonl", 1, "text", "contiguous", 11_000),
    "short texts, contiguous": ("glue/sst2_train.jsonl", 6, "sentence1", "contiguous", 8_000),
    "short texts, a sequence each": ("glue/sst2_train.jsonl", 4, "sentence1", "document", 250_000),
}
TOY = 100  # sequences
VARIANTS = {"one core": ("0", 1), "two cores": ("0,1", 1), "two cores, 2 workers": ("0,1", 2)}


def source_of(case: str, sources: Path) -> Path:
    """Return where the text of a case lies."""
    path, times, *_ = CASES[case]
    return sources / f"{times}-{Path(path).name}"


def sequences_of(case: str, toy: bool, times: int) -> int:
    """Return the number of sequences of a case's corpus."""
    return TOY if toy else times * CASES[case][-1]


def serve(shared: Path, sources: Path, workers: int, toy: bool, times: int) -> None:
    """Make the corpus of each case named on standard input; answer with the results."""
    import transformers  # noqa: F401

    from rekindle.data.corpus.config import CorpusConfig
    from rekindle.data.corpus.corpus import Corpus, build_corpus
    from rekindle.data.corpus.packing import default_shard_size
    from rekindle.data.storage.store import LocalStore
    from rekindle.pipeline.processes.units import OnThisMachine

    def make(folder: str, case: str, sequences: int) -> Corpus:
        _, _, field, packing, _ = CASES[case]
        config = CorpusConfig(
            source=(str(source_of(case, sources)),),
            text_field=field,
            tokenizer=str(shared / "tokenizers/bert-base-uncased"),
            sequence_length=512,
            packing=packing,
            limit_sequences=sequences,
        )
        in_order = partial(OnThisMachine(workers).in_order, "corpus")
        size = default_shard_size(sequences)
        return build_corpus(LocalStore(Path(folder)), config, size, in_order=in_order)

    with tempfile.TemporaryDirectory() as folder:
        make(folder, next(iter(CASES)), TOY)  # imports on first use
    print("ready", flush=True)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            before, began = _used(), time.perf_counter()
            corpus = make(folder, line.strip(), sequences_of(line.strip(), toy, times))
            seconds, after = time.perf_counter() - began, _used()
            found = {"seconds": seconds, "cpu": after - before, "is": corpus.fingerprint}
            print(json.dumps(found), flush=True)


def _used() -> float:
    """Return the CPU seconds of this process."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def started(
    shared: Path, sources: Path, variant: str, toy: bool, times: int
) -> Callable[[str], Found]:
    """Start a process of that variant; return it as a function of a case."""
    cores, workers = VARIANTS[variant]
    command = ["taskset", "-c", cores, sys.executable, __file__, str(shared)]
    command += ["--serve", str(sources), str(workers), *["--toy"] * toy, "--times", str(times)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "ready\n"

    def make(case: str) -> Found:
        process.stdin.write(f"{case}\n")
        process.stdin.flush()
        return dict(json.loads(process.stdout.readline()))

    return make


def measure(shared: Path, sources: Path, toy: bool, times: int) -> list[Row]:
    """Measure every case with every variant, in turns."""
    for case, (path, copies, *_) in CASES.items():
        with source_of(case, sources).open("wb") as file:
            for _ in range(copies * times):
                file.write((shared / path).read_bytes())
    makers = {variant: started(shared, sources, variant, toy, times) for variant in VARIANTS}
    rows: list[Row] = []
    for case in CASES:
        loads = [os.getloadavg()[0]]
        turns = [
            {v: make(case) for v, make in makers.items()}
            for _ in range(2 if toy else max(1, 4 - times))
        ]
        loads.append(os.getloadavg()[0])
        assert len({found["is"] for turn in turns for found in turn.values()}) == 1
        sequences = sequences_of(case, toy, times)
        told = f"{case}, {sequences:,} sequences, load {min(loads):.1f}-{max(loads):.1f}"
        cpu = statistics.median(turn["one core"]["cpu"] for turn in turns)
        rows.append((told, "one core", "CPU time", cpu, "s"))
        for variant in VARIANTS:
            seconds = statistics.median(turn[variant]["seconds"] for turn in turns)
            rows.append((told, variant, "time", seconds, "s"))
        for variant in [*VARIANTS][1:]:
            ratios = [turn["one core"]["seconds"] / turn[variant]["seconds"] for turn in turns]
            rows.append((told, variant, "ratio to one core", statistics.median(ratios), "1"))
        alone = statistics.median(t["two cores, 2 workers"]["cpu"] / cpu for t in turns)
        rows.append((told, "two cores, 2 workers", "first process's share of CPU time", alone, "1"))
        for _, variant, metric, value, unit in rows[-7:]:
            print(f"{told}: {variant}: {metric} {value:.3g} {unit}", flush=True)
    return rows


def main() -> None:
    """Measure, print, and append to the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--toy", action="store_true", help="some seconds; its figures mean nothing")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(
            options.shared,
            Path(options.serve[0]),
            int(options.serve[1]),
            options.toy,
            options.times,
        )
        return
    with tempfile.TemporaryDirectory() as sources:
        rows = measure(options.shared, Path(sources), options.toy, options.times)
    if not options.toy:
        about = versions("tokenizers", "transformers", "pyarrow", "numpy")
        append(rows, "corpus_cores", processor(), about, options.csv)


if __name__ == "__main__":
    main()
