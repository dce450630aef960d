"""A corpus that is not there is estimated from a sample of its files."""

import gzip
import json
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus import source_sample
from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.source_sample import estimate_sequences, sample_source
from rekindle.data.errors import InputError
from rekindle.data.source.held_texts import HeldCounts
from rekindle.data.storage import addresses
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.inspect import inspect_cache
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.progress import Progress
from testlib.stage_one.planned import WHOLE

SENTENCE = "the old river runs under the new city and the light falls over a quick engine"
WORDS = [*SENTENCE.split()]


def write(path: Path, texts: list[str]) -> None:
    """The texts in the format that the name says."""
    lines = "".join(json.dumps({"text": t, "other": 7}) + "\n" for t in texts)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif path.suffix == ".arrow":
        table = pa.table({"text": texts})
        opened = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
        with opened(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=100)
    elif path.suffix == ".csv":
        path.write_text("n,text\n" + "".join(f'7,"{t}\n"\n' for t in texts))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".jsonl.zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines.encode())
    else:
        path.write_text(lines if path.suffix == ".jsonl" else "\n\n".join(texts))


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.txt",
        "a.csv",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.parquet",
        "a.file.arrow",
        "a.stream.arrow",
    ],
)
def test_the_share_of_one_file(tmp_path, name, monkeypatch):
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 300)
    write(tmp_path / name, [" ".join(WORDS[: 5 + n % 9]) + f" {n}" for n in range(1000)])
    config = CorpusConfig(source=(str(tmp_path / name),), tokenizer="unused")
    sample = sample_source(config)
    assert len(sample.documents) == 300
    assert sample.share == pytest.approx(0.3, rel=0.1)


def test_the_share_of_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 250)
    for number in range(10):
        write(tmp_path / f"{number}.jsonl", [" ".join(WORDS)] * 100)
    config = CorpusConfig(source=(str(tmp_path / "*.jsonl"),), tokenizer="unused")
    sample = sample_source(config)
    assert len(sample.documents) == 250
    assert sample.share == pytest.approx(0.25, rel=0.02)
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 1000)
    assert sample_source(config).share == 1  # that was everything, to the last document


def test_ten_thousand_files_are_planned_in_seconds_and_opened_once_at_most(
    tmp_path, configure, monkeypatch
):
    """The first 2,000 are the sample. 20 seconds of this process: 3 were seen, and 42 where each
    file cost as much as all before it.
    """
    names = [tmp_path / f"{number:05d}.txt" for number in range(10_000)]
    for name in names:
        name.write_text(SENTENCE)
    opened = Counter()

    def counting(path, *rest, **options):
        opened[str(path)] += Path(path).parent == tmp_path
        return open(path, *rest, **options)

    monkeypatch.setattr(addresses, "open", counting, raising=False)
    source = [*map(str, names[:5000]), str(tmp_path / "*.txt")]
    corpus = {"source": source, "domain_field": None, "limit_sequences": None}
    config = configure(tmp_path / "cache", [], corpus=corpus)
    began = time.process_time()
    found = plan_run(config, probe=False).corpus
    assert time.process_time() - began < 20
    assert found.estimated
    assert found.sequences == 10_000
    assert +opened == Counter(map(str, names[: source_sample.SAMPLE_DOCUMENTS]))


def test_the_sample_ends_at_so_much_text(tmp_path, monkeypatch):
    monkeypatch.setattr(source_sample, "SAMPLE_BYTES", 1000)
    write(tmp_path / "a.jsonl", ["é" * 50] * 100)
    config = CorpusConfig(source=(str(tmp_path / "a.jsonl"),), tokenizer="unused")
    assert len(sample_source(config).documents) == 10


def test_a_corpus_that_is_not_built_is_estimated(tmp_path, configure, monkeypatch):
    """Within a tenth of what it turns out to be."""
    write(tmp_path / "a.jsonl", [" ".join(WORDS * (1 + n % 5)) for n in range(600)])
    corpus = {"source": str(tmp_path / "a.jsonl"), "domain_field": None, "limit_sequences": None}
    config = configure(tmp_path / "cache", [], corpus=corpus, cache={"sequences_per_shard": 64})
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 100)
    found = plan_run(config).corpus
    cache_teachers(config)
    real = Cache.open(tmp_path / "cache").corpus
    assert found.estimated
    assert "the first 100 documents, about 16" in found.basis
    assert found.sequences == pytest.approx(len(real), rel=0.1)
    assert found.tokens == pytest.approx(real.tokens, rel=0.1)
    assert found.bytes == pytest.approx(sum(c.bytes for c in real.commits), rel=0.2)


def test_texts_of_tests_are_left_out_of_a_plan_as_of_the_cache(tmp_path, configure, monkeypatch):
    """Counted where the sample is all there is; else the share is that of the rows read."""
    texts = [f"number {n} of those that are here today" for n in range(300)]
    write(tmp_path / "a.jsonl", texts)
    write(tmp_path / "test.jsonl", texts[::3])
    corpus = {"source": str(tmp_path / "a.jsonl"), "domain_field": None, "limit_sequences": None}
    corpus["without"] = str(tmp_path / "test.jsonl")
    config = configure(tmp_path / "cache", [], corpus=corpus)
    planned = plan_run(config).corpus
    cache_teachers(config)
    real = Cache.open(tmp_path / "cache").corpus
    assert (planned.sequences, planned.tokens) == (len(real), real.tokens) == (200, real.tokens)
    assert "100 records left out for texts of corpus.without (100 hold one" in planned.basis
    assert "in the cache; 100 records left out for texts" in plan_run(config).corpus.basis
    assert real.held == HeldCounts(exact=100)
    assert "100 records left out for texts of " in inspect_cache(str(tmp_path / "cache"))
    few = configure(tmp_path / "few", [], corpus=corpus | {"limit_sequences": 10})
    assert "; 5 records left out for texts" in plan_run(few).corpus.basis  # before its end
    cache_teachers(few)
    assert Cache.open(tmp_path / "few").corpus.held == HeldCounts(exact=5)
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 100)
    assert sample_source(config.corpus).share == pytest.approx(0.5, rel=0.05)
    new = configure(tmp_path / "new", [], corpus=corpus)
    assert (
        "of the source; within these documents, 51 records left out" in plan_run(new).corpus.basis
    )


@pytest.mark.parametrize("packing", ["document", "contiguous"])
@pytest.mark.parametrize("limit", [1, 7, 150, 10_000])
def test_a_limit_caps_the_corpus(tmp_path, configure, monkeypatch, packing, limit):
    write(tmp_path / "a.jsonl", [" ".join(WORDS * (1 + n % 5)) for n in range(90)])
    corpus = {"source": str(tmp_path / "a.jsonl"), "domain_field": None, "packing": packing}
    config = configure(tmp_path / "cache", [], corpus=corpus | {"limit_sequences": limit})
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 30)
    found = plan_run(config).corpus
    cache_teachers(config)
    real = Cache.open(tmp_path / "cache").corpus
    assert found.estimated == (limit >= 150)
    exact = 0 if limit < 10_000 else 0.1
    assert found.sequences == pytest.approx(len(real), rel=exact)
    assert found.tokens == pytest.approx(real.tokens, rel=0.1 if found.estimated else 0)


def test_a_source_of_unknown_size_needs_a_limit(tmp_path, configure, monkeypatch):
    """What a datasets id holds is not known before it is read."""
    path = tmp_path / "a.jsonl"
    write(path, [" ".join(WORDS)] * 50)
    read = source_sample.read_documents
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 20)
    monkeypatch.setattr(source_sample, "read_documents", lambda source, *rest: read([path], *rest))
    corpus = {"source": "owner/name", "domain_field": None}
    with pytest.raises(InputError, match=r"owner/name.*corpus\.limit_sequences"):
        plan_run(configure(tmp_path / "cache", [], corpus=corpus | {"limit_sequences": None}))
    found = plan_run(configure(tmp_path / "cache", [], corpus=corpus | {"limit_sequences": 400}))
    assert found.corpus.sequences == 400
    assert found.corpus.basis == "estimated from the first 20 documents"


def test_domains_of_the_estimate(tmp_path, configure, teachers, monkeypatch):
    """A teacher for half the sequences has about half the work."""
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 20)
    both = [teachers[3], teachers[3] | {"name": "half", "domains": ["even"]}]
    found = plan_run(configure(tmp_path / "cache", both, corpus=WHOLE), probe=False)
    whole, half = found.teachers
    assert found.corpus.estimated
    assert whole.share == 1
    assert half.positions == pytest.approx(whole.positions * half.share, abs=1)
    assert 0.2 < half.share < 0.8


@pytest.mark.parametrize("limit", [None, 50, 10_000])
def test_the_bar_of_a_corpus_knows_about_how_many_sequences_there_will_be(
    tmp_path, configure, monkeypatch, limit
):
    write(tmp_path / "a.jsonl", [" ".join(WORDS * (1 + n % 5)) for n in range(400)])
    corpus = {"source": str(tmp_path / "a.jsonl"), "domain_field": None, "limit_sequences": limit}
    config = configure(tmp_path / "cache", [], corpus=corpus)
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 100)
    totals = []  # of the corpus

    class Noted(Progress):
        def task(self, name, unit, total=None):
            if name == "corpus":
                totals.append(total)
            return super().task(name, unit, total)

    cache_teachers(config, progress=Noted(quiet=False))
    count = len(Cache.open(tmp_path / "cache"))
    cache_teachers(config, progress=Noted(quiet=False))
    assert totals == [pytest.approx(count, rel=0.1), None]
    source = {"source": ("owner/name",), "limit_sequences": None}
    assert estimate_sequences(config.corpus.model_copy(update=source), None) is None
