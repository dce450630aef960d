"""Corpus sources in an object store: read as the same files are locally, and known again."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.corpus.source_sample import sample_source
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.source.documents import read_documents
from rekindle.data.source.source_states import find_present
from rekindle.data.storage.store import LocalStore
from testlib.servers.faulty_s3 import faulty_server

ROWS = [{"text": f"Document {n} of some words. " * 20, "domain": f"d{n % 2}"} for n in range(300)]


def write_formats(folder: Path) -> list[str]:
    """The rows in each format, and the patterns that name them all."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    inner = folder / "in" / "side"
    inner.mkdir(parents=True)
    (folder / "a.jsonl").write_text(lines)
    (inner / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.txt").write_text("\n\n".join(row["text"] for row in ROWS))
    table = pa.Table.from_pylist(ROWS)
    with pa.CompressedOutputStream(str(folder / "d.csv.zst"), "zstd") as packed:
        packed.write(
            ("text,domain\n" + "".join(f"{r['text']},{r['domain']}\n" for r in ROWS)).encode()
        )
    pq.write_table(table, folder / "e.parquet", row_group_size=50)
    with pa.ipc.new_file(str(folder / "f.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=64)
    with pa.ipc.new_stream(str(folder / "g.arrow"), table.schema) as stream:
        stream.write_table(table)
    saved = folder / "saved" / "train"  # as datasets' save_to_disk leaves it
    saved.mkdir(parents=True)
    (saved.parent / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000.arrow"}]}')
    (saved / "data-00000.arrow").write_bytes((folder / "g.arrow").read_bytes())
    return ["a.jsonl", "**/b*.jsonl.gz", "c.txt", "*.csv.zst", "[ef].*", "g.arrow", "saved"]


@pytest.fixture(scope="module")
def both(s3, tmp_path_factory) -> tuple[Path, str, list[str]]:
    """A folder of sources, a copy of it on a server, and the entries that name its files."""
    folder = tmp_path_factory.mktemp("sources")
    entries = write_formats(folder)
    s3fs.S3FileSystem().put(str(folder), "bucket/wiki", recursive=True)
    s3fs.S3FileSystem().pipe_file("bucket/wiki/in/", b"")  # a "folder" as consoles make it
    return folder, f"{s3}/wiki", entries


def test_documents_from_a_store_are_those_of_the_same_files(both):
    folder, address, entries = both
    for entry in entries:
        here = [*read_documents([f"{folder}/{entry}"], domain_field=None)]
        there = [*read_documents([f"{address}/{entry}"], domain_field=None)]
        assert len(here) >= len(ROWS)
        assert there == here


def test_a_sample_of_a_store_is_that_of_the_same_files(both, wordpiece, monkeypatch):
    folder, address, entries = both
    for entry in entries:
        here, there = (
            sample_source(CorpusConfig(source=[f"{at}/{entry}"], tokenizer=str(wordpiece)))
            for at in (folder, address)
        )
        assert there.documents == here.documents
        assert there.share == here.share


def test_reading_outlasts_faults(both, monkeypatch):
    folder, address, entries = both
    here = [*read_documents([f"{folder}/{entry}" for entry in entries])]
    with faulty_server(monkeypatch) as server:
        assert [*read_documents([f"{address}/a.jsonl"])]  # a server that has answered before
        rng = random.Random(0)
        faults = ["503", "500", "drop", "cut"]
        server.faults = [rng.choice(faults) if rng.random() < 0.2 else "" for _ in range(400)]
        assert [*read_documents([f"{address}/{entry}" for entry in entries])] == here


def test_objects_are_known_by_what_the_store_says_of_their_content(s3, tmp_path, wordpiece):
    fs, at = s3fs.S3FileSystem(), "bucket/known"
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    fs.pipe_file(f"{at}/a.jsonl", content)
    fs.pipe_file(f"{at}/b.jsonl", content[: len(content) // 2 - 20] + b'\n{"text": "an end"}\n')
    config = CorpusConfig(
        source=[f"{s3}/known/*.jsonl"],
        tokenizer=str(wordpiece),
        sequence_length=16,
        on_bad_record="skip",
    )
    store = LocalStore(tmp_path)
    made = build_corpus(store, config, 500).fingerprint
    states = [state for _, state in find_present(config.source)]
    assert [state and state[0] for state in states] == [len(content), fs.size(f"{at}/b.jsonl")]
    # Written again, elsewhere: the same content. Nothing is made again.
    fs.mv(f"{at}/a.jsonl", f"{at}/moved/z.jsonl")
    again = config.model_copy(
        update={"source": (f"{s3}/known/b.jsonl", f"{s3}/known/moved/z.jsonl")}
    )
    assert build_corpus(store, again, 500).fingerprint == made
    fs.pipe_file(f"{at}/b.jsonl", fs.cat_file(f"{at}/b.jsonl").replace(b"an end", b"AN END"))
    with pytest.raises(CacheMismatchError, match=r"b\.jsonl \(has other content\)"):
        build_corpus(store, again, 500)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("s3://no-such-bucket/a.jsonl", "there is no bucket 'no-such-bucket' for s3://no-such-b"),
        ("s3://no-such-bucket/*.jsonl", "there is no bucket 'no-such-bucket' for s3://no-such-b"),
        ("s3://bucket/nothing.jsonl", "there is no such object, and none matches it"),
        ("s3://bucket/nothing/**/*.jsonl", "there is no such object, and none matches it"),
        ("s3://bucket/wiki/in/side", r"such as s3://bucket/wiki/in/side/\*\*/\*\.jsonl\.gz"),
        ("s3://bucket/wiki/saved/train/state.json/x", "there is no such object"),
        ("foo://bucket/a.jsonl", "cannot open 'foo://"),
        ("s3://AKIA:hidden-word@bucket/a.jsonl", "holds no user names"),
        ("https://host/a.jsonl?X-Amz-Signature=hidden-word", "holds no user names"),
    ],
)
def test_a_source_that_is_not_there_is_called_so(both, source, told):
    with pytest.raises(InputError, match=told) as caught:
        find_present([source])
    assert "hidden-word" not in str(caught.value)


def test_an_address_of_a_local_file(tmp_path, corpus_file):
    (present,) = find_present([f"file://{corpus_file}"])
    assert present == find_present([str(corpus_file)])[0]
