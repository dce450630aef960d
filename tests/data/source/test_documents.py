import gzip
import json
import os
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.data.source.documents import Document, read_documents
from rekindle.data.source.records import TEXT_DOCUMENT_BYTES
from rekindle.data.source.sources import source_files
from testlib.command import python
from testlib.corpora import SHARED

ROWS = [
    {"id": "a", "text": "Ünï 😀 one", "topic": "x", "n": 1},
    {"id": "b", "text": "  ", "topic": "x", "n": 2},
    {"id": "c", "text": "three\nlines\nhere", "topic": "y", "n": 3},
]
EXPECTED = [Document("a", "Ünï 😀 one", "x"), Document("c", "three\nlines\nhere", "y")]


def compress(name, content):
    if name.lower().endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):
        return pa.compress(content, "zstd", asbytes=True)
    return content


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(path.name, content))
    return str(path)


def put_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return put(path, ("\n".join(lines) + "\n").encode())


def put_arrow(path, table, writer):
    with writer(str(path), table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    return str(path)


def texts(*args, **kwargs):
    return [document.text for document in read_documents(*args, **kwargs)]


def message_of(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        list(read_documents(*args, **kwargs))
    return str(caught.value)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz", "d.jsonl.zst", "D.JSONL.GZ"])
def test_jsonl(tmp_path, name):
    path = put_jsonl(tmp_path / name, ROWS)
    assert list(read_documents([path], domain_field="topic")) == EXPECTED


def test_parquet(tmp_path):
    path = str(tmp_path / "d.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    assert list(read_documents([path], domain_field="topic")) == EXPECTED


@pytest.mark.parametrize("writer", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_arrow_files_and_streams(tmp_path, writer, kind):
    table = pa.Table.from_pylist(ROWS)
    at = table.schema.get_field_index("text")
    table = table.set_column(at, "text", table["text"].combine_chunks().cast(kind))
    path = put_arrow(tmp_path / "d.arrow", table, writer)
    assert list(read_documents([path], domain_field="topic")) == EXPECTED


def test_a_directory_that_datasets_saved(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one", num_shards=2)
    assert list(read_documents([str(tmp_path / "one")], domain_field="topic")) == EXPECTED
    assert len(source_files([str(tmp_path / "one")])) == 2


def test_of_a_saved_dataset_with_splits_train_is_read(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(test=rows.select([0]), train=rows).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "other")
    assert list(read_documents([str(tmp_path / "both")], domain_field="topic")) == EXPECTED
    message = message_of([str(tmp_path / "other")])
    assert "no 'train'" in message
    assert str(tmp_path / "other" / "test") in message


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz", "d.txt.zst"])
def test_in_txt_a_blank_line_ends_a_document(tmp_path, name):
    content = b"\xef\xbb\xbf\n\n first\nstill first\r\nand  \n \t\n\nsecond \xc3\xa9\n\n\nthird"
    path = put(tmp_path / name, content)
    assert list(read_documents([path])) == [
        Document(f"{name}:3", " first\nstill first\nand", None),
        Document(f"{name}:8", "second é", None),
        Document(f"{name}:11", "third", None),
    ]


def test_a_long_txt_document_is_ended_at_a_line_break(tmp_path):
    line = "é" * 999 + "\n"
    path = put(tmp_path / "d.txt", (line * 1500).encode())
    found = texts([path])
    assert len(found) == 3
    assert all(len(text.encode()) <= TEXT_DOCUMENT_BYTES for text in found)
    assert all(set(text.split("\n")) == {line.strip()} for text in found)
    assert sum(text.count("é") for text in found) == 999 * 1500
    first_lines = [int(document.id.split(":")[1]) for document in read_documents([path])]
    assert first_lines == [1, 525, 1049]  # 524 lines of 1,999 bytes fit


@pytest.mark.parametrize("unit", ["word ", "é", "x" * (TEXT_DOCUMENT_BYTES // 3) + " "])
def test_a_single_endless_line_is_cut_at_a_space_and_never_in_a_character(tmp_path, unit):
    repeats = 3 * TEXT_DOCUMENT_BYTES // len(unit.encode())
    path = put(tmp_path / "d.txt", (unit * repeats).encode())
    found = texts([path])
    assert len(found) >= 3
    assert all(len(text.encode()) <= TEXT_DOCUMENT_BYTES for text in found)
    glue = " " if unit.endswith(" ") else ""
    assert glue.join(found) == (unit * repeats).rstrip()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"))))
def test_txt_loses_no_line(tmp_path_factory, lines):
    path = put(tmp_path_factory.mktemp("t") / "d.txt", "\n".join(lines).encode())
    kept = [line.rstrip() for text in texts([path]) for line in text.split("\n")]
    expected = [line.rstrip() for line in lines if line and not line.isspace()]
    assert kept == [
        line.removeprefix("\ufeff") if i == 0 else line for i, line in enumerate(expected)
    ]


def test_a_datasets_id_is_streamed(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": ""}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(read_documents(["owner/name:conf:test"]))
    assert found == [
        Document("owner/name:conf:test:1", "one", None),
        Document("owner/name:conf:test:3", "two", None),
    ]
    list(read_documents(["name"]))
    list(read_documents(["name::test"]))
    assert calls == [
        (("owner/name", "conf"), {"split": "test", "streaming": True}),
        (("name", None), {"split": "train", "streaming": True}),
        (("name", None), {"split": "test", "streaming": True}),
    ]


# --- ids, order, files ----------------------------------------------------------------------------


def test_without_an_id_the_row_of_the_file_is_the_id(tmp_path):
    rows = [
        {"text": "a"},
        {"id": None, "text": "b"},
        {"id": 7, "text": "c"},
        {"id": True, "text": "d"},
    ]
    jsonl = put(tmp_path / "d.jsonl", "\n\n".join(json.dumps(row) for row in rows).encode())
    assert [d.id for d in read_documents([jsonl])] == ["d.jsonl:1", "d.jsonl:3", "7", "d.jsonl:7"]
    parquet = str(tmp_path / "d.parquet")
    pq.write_table(pa.table({"text": [str(i) for i in range(1000)]}), parquet, row_group_size=300)
    assert [d.id for d in read_documents([parquet])] == [f"d.parquet:{i + 1}" for i in range(1000)]


def test_globs_are_sorted_descend_and_name_no_file_twice(tmp_path, monkeypatch):
    for name in ["b.txt", "a.txt", "sub/deep/c.txt", "other.jsonl"]:
        put(tmp_path / name, b'{"text": "j"}' if name.endswith("l") else name.encode())
    pattern = str(tmp_path / "**" / "*.txt")
    assert texts([pattern]) == ["a.txt", "b.txt", "sub/deep/c.txt"]
    assert texts([str(tmp_path / "b.txt"), pattern, pattern]) == [
        "b.txt",
        "a.txt",
        "sub/deep/c.txt",
    ]
    monkeypatch.chdir(tmp_path)
    assert texts(["other.jsonl", "./*.txt", str(tmp_path / "a.txt")]) == ["j", "a.txt", "b.txt"]
    assert texts("*.txt") == ["a.txt", "b.txt"]


def test_a_name_with_glob_characters_is_meant_as_it_stands(tmp_path):
    path = put(tmp_path / "a[1].txt", b"itself")
    put(tmp_path / "a1.txt", b"another")
    assert texts([path]) == ["itself"]
    inside = put(tmp_path / "news [2024]" / "x [1]" / "a.txt", b"inside")
    assert texts([str(tmp_path / "news [2024]" / "*" / "*.txt")]) == ["inside"]
    assert texts([str(tmp_path / "news [2024]" / "x [1]" / "[a-b].txt")]) == ["inside"]
    assert texts([str(tmp_path / "news [[]2024]" / "**" / "*.txt")]) == ["inside"]
    assert source_files([str(tmp_path / "news *" / "x *" / "*.txt")]) == [inside]


def test_source_files_are_each_told_once(tmp_path):
    path = put(tmp_path / "a.txt", b"12345")
    assert source_files([str(tmp_path / "*"), path]) == [path]
    assert source_files(["python-docs", "owner/name:config"]) == []


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["/no/such/file.txt", "no-such.jsonl", "no-such/*.txt", "./none"])
def test_a_source_that_does_not_exist_is_refused_at_the_call(entry):
    with pytest.raises(
        InputError, match="neither a file, a glob that matches files, nor a datasets"
    ):
        read_documents([entry])
    with pytest.raises(InputError, match="neither"):
        source_files([entry])


def test_a_datasets_id_that_cannot_be_loaded(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("the hub is away")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = message_of(["no-such-name"])
    assert "'no-such-name' is neither" in message
    assert "the hub is away" in message


def test_no_source_at_all():
    with pytest.raises(InputError, match="no corpus source"):
        read_documents([])


@pytest.mark.parametrize("name", ["d.rtf", "README", "d.parquet.gz", "d.gz"])
def test_an_unknown_extension_lists_the_known_ones(tmp_path, name):
    message = message_of([put(tmp_path / name, b"x")])
    assert name in message
    assert ".jsonl" in message
    assert ".parquet" in message


@pytest.mark.parametrize("name", ["a.txt", "b/c.jsonl.gz", "d/E.PARQUET", "README"])
def test_the_advice_about_a_directory_that_is_no_dataset_works(tmp_path, name):
    directory = tmp_path / "news [2024]"
    put_jsonl(directory / name, ROWS)
    message = message_of([str(directory)])
    pattern = message.split(" such as ")[-1]
    if name == "README":
        assert "holds no file of a supported type (.txt, .jsonl" in message
    else:
        assert source_files([pattern]) == [str(directory / name)]


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        return put_jsonl(path, rows)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return str(path)
    return put_arrow(path, table, pa.ipc.new_file)


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet", "d.arrow"])
def test_a_missing_field_names_file_record_fields_and_the_nearest(tmp_path, name):
    path = write_rows(tmp_path / name, [{"texts": "a", "kind": "b"}])
    message = message_of([path])
    assert f"{path}, record 1" in message
    assert "'text'" in message
    assert "texts, kind" in message
    assert "did you mean 'texts'?" in message
    message = message_of([path], text_field="texts", domain_field="kid")
    assert "'kid' (corpus.domain_field)" in message
    assert "did you mean 'kind'?" in message


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet", "d.arrow"])
@pytest.mark.parametrize(
    ("value", "part"), [(5, "holds 5 (a int)"), (["a"], "(a list)"), (None, "null")]
)
def test_a_text_that_is_no_string(tmp_path, name, value, part):
    path = write_rows(tmp_path / name, [{"text": value}])
    message = message_of([path])
    assert f"{path}, record 1" in message
    assert part in message


@pytest.mark.parametrize("line", ['{"text": "a"', "[1]", '"text"', "{}{}"])
def test_a_bad_json_line_is_named(tmp_path, line):
    path = put(tmp_path / "d.jsonl", f'{{"text": "a"}}\n\n{line}\n'.encode())
    assert f"{path}:3" in message_of([path])


def test_a_domain_field_that_txt_cannot_have(tmp_path):
    path = put(tmp_path / "d.txt", b"a text")
    assert "no field 'topic'" in message_of([path], domain_field="topic")


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz", "d.jsonl", "d.jsonl.zst"])
def test_bytes_that_are_not_utf8_name_file_and_line(tmp_path, name):
    path = put(tmp_path / name, b'{"text": "a"}\n{"text": "\xff"}\n')
    assert f"{path}:2: not UTF-8" in message_of([path])


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    path = put(tmp_path / "d.jsonl", b'{"text": "good \\ud83d\\ude00"}\n{"text": "bad \\ud83d"}')
    message = message_of([path])
    assert f"{path}, record 2" in message
    assert "surrogate" in message


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.txt.zst", "d.parquet", "d.arrow"])
def test_a_damaged_file_is_an_input_error(tmp_path, name):
    rows = [{"text": os.urandom(2000).hex()} for _ in range(50)]
    path = tmp_path / name
    if path.suffix in (".gz", ".zst"):
        put_jsonl(path, rows)
    else:
        write_rows(path, rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert f"{path} cannot be read" in message_of([str(path)])
    path.write_bytes(b"")
    if path.suffix in (".parquet", ".arrow"):
        assert f"{path} cannot be read" in message_of([str(path)])


# --- memory, imports ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.txt", "d.txt.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    path = put(tmp_path / name, line * 20_000)  # 20 MB
    tracemalloc.start()
    try:
        characters = sum(len(document.text) for document in read_documents([path]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert characters > 19e6
    assert peak < 5 * TEXT_DOCUMENT_BYTES


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_record_batches_are_streamed(tmp_path, name):
    table = pa.table({"text": [f"{i} " * 1000 for i in range(4000)], "other": ["o" * 5000] * 4000})
    path = tmp_path / name
    if name == "d.parquet":
        pq.write_table(table, path, row_group_size=100)
    else:
        put_arrow(path, table, pa.ipc.new_file)
    del table
    before = pa.total_allocated_bytes()
    peak = 0
    for number, document in enumerate(read_documents([str(path)])):
        assert document.text.startswith(f"{number} ")
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert number == 3999
    assert peak < 8e6  # the text column alone is 19 MB


def test_importing_it_is_cheap():
    code = (
        "import sys, rekindle.data.source.documents\n"
        "print({'torch', 'datasets'} & set(sys.modules))"
    )
    assert python(code) == "set()"


def test_real_wikipedia():
    path = SHARED / "corpus" / "wiki_heldout.jsonl"
    if not path.exists():
        pytest.skip(f"the real corpus is not here: {path}")
    found = list(read_documents([str(path)]))
    assert len(found) == len({document.id for document in found}) == 99
