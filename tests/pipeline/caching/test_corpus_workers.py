"""A corpus that several processes tokenise: the bytes of one that this process makes alone."""

import json
import multiprocessing
import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.errors import InputError
from rekindle.data.source import parts
from rekindle.data.storage.store import LocalStore
from rekindle.pipeline.processes import units
from rekindle.pipeline.processes.units import OnThisMachine
from rekindle.pipeline.processes.worker import Worker
from testlib.killing import contents, fork_workers
from testlib.processes import Child

SENTENCE = "the old river runs under a new city and light [MASK] falls over the quick engine"
WORDS = [*SENTENCE.split()]
CASES = {
    "document": {},
    "contiguous": {"packing": "contiguous"},
    "pairs": {"pair_field": "other"},
    "special tokens": {"special_tokens": "token", "domain_field": "domain"},
    "limit": {"packing": "contiguous", "limit_sequences": 37},
}


@pytest.fixture
def config(tmp_path, wordpiece):
    """Texts of very different lengths, and records that are none, from two files."""

    def make(**values):
        draw = random.Random(0)
        for name in ("a", "b"):
            with open(tmp_path / f"{name}.jsonl", "w") as file:
                for number in range(60):
                    words = draw.choices(WORDS, k=draw.randint(2, 60))
                    record = {"text": " ".join(words[1:]), "other": " ".join(words[:20])}
                    record["domain"] = "xyz"[number % 3]
                    file.write("no record\n" if number % 7 == 3 else json.dumps(record) + "\n")
        given = {"source": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]}
        given |= {"tokenizer": str(wordpiece), "sequence_length": 24, "on_bad_record": "skip"}
        return CorpusConfig(**(given | values))

    return make


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """So that there are some forty of them."""
    monkeypatch.setattr(parts, "PART_BYTES", 500)


def build(folder: Path, config: CorpusConfig, workers: int, **more) -> Corpus:
    in_order = partial(OnThisMachine(workers).in_order, "corpus")
    return build_corpus(LocalStore(folder), config, 8, in_order=in_order, **more)


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_depend_neither_on_the_workers_nor_on_the_parts(
    tmp_path, config, monkeypatch, case
):
    chosen, made = config(**CASES[case]), []
    for workers, size in ((1, 1 << 16), (2, 500), (3, 60)):  # all; some lines; a line
        monkeypatch.setattr(parts, "PART_BYTES", size)
        made.append(build(tmp_path / str(workers), chosen, workers))
    assert len(made[0].commits) > 4
    assert sum(made[0].bad_records.values()) > 0
    assert contents(tmp_path / "2") == contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_a_long_corpus_is_begun_in_threads_and_gone_on_with_in_processes(
    tmp_path, config, monkeypatch, packing
):
    chosen = config(packing=packing)
    build(tmp_path / "here", chosen, 1)
    begun = []
    monkeypatch.setattr(units, "UNITS_IN_THREADS", 10)
    monkeypatch.setattr(units, "Worker", lambda *given: begun.append(given) or Worker(*given))
    in_order = partial(OnThisMachine(1, text_processes=2).in_order, "corpus")
    build_corpus(LocalStore(tmp_path / "there"), chosen, 8, in_order=in_order)
    assert len(begun) == 2
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_corpus_grows_by_another_number_of_workers(tmp_path, config):
    whole = config(packing="contiguous")
    few = whole.model_copy(update={"source": whole.source[:1]})
    for turn, workers in (("one", (1, 1)), ("other", (3, 2))):
        build(tmp_path / turn, few, workers[0])
        assert len(build(tmp_path / turn, whole, workers[1]).additions) == 2
    assert contents(tmp_path / "other") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("before", "after", "packing"), [(2, 1, "contiguous"), (1, 3, "contiguous"), (2, 3, "document")]
)
def test_killed_and_gone_on_with_by_another_number_of_workers(
    tmp_path, config, before, after, packing
):
    chosen = config(packing=packing)
    build(tmp_path / "whole", chosen, 1)
    shards = []

    def progress(sequences: int, tokens: int) -> None:
        shards.append(sequences)
        if len(shards) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        fork_workers()
        build(tmp_path / "killed", chosen, before, progress=progress)

    assert Child(run).wait() == -signal.SIGKILL
    assert len(Corpus(LocalStore(tmp_path / "killed")).commits) == 3
    build(tmp_path / "killed", chosen, after)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_killed_worker_ends_it_with_one_message_and_finished_shards_are_kept(tmp_path, config):
    chosen = config(packing="contiguous")

    def progress(sequences: int, tokens: int) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(InputError, match=r"^corpus: its process was killed .* --workers") as error:
        build(tmp_path / "cache", chosen, 2, progress=progress)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()
    made = len(Corpus(LocalStore(tmp_path / "cache")).commits)
    assert 1 <= made < len(build(tmp_path / "cache", chosen, 2).commits)
    build(tmp_path / "whole", chosen, 1)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
