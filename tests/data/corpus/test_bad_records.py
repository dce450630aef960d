"""Bad records: what they are, that each is told with its place, and what is left without them."""

import gzip
import json
import logging
import random

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.corpus.remarks import remarks
from rekindle.data.errors import InputError
from rekindle.data.source import json_lines
from rekindle.data.source.documents import Document, read_documents
from rekindle.data.source.left_out import LeftOut
from rekindle.data.storage.store import LocalStore

GOOD = b'{"text": "good", "domain": "d"}\n'
BAD = [
    (b'{"text": "a"', "not JSON", "not JSON"),
    (b"{" * 3, "not JSON", "not JSON"),
    (b'{"text": ' + b"[" * 100_000, "not JSON", "nested too deeply"),
    (
        b'{"text": "a", "m": {"x": 1, "x\\n": 1, "x": 2}}',
        "a key twice",
        "the key 'x' appears twice",
    ),
    (b'{"text": "a", "text": "b"}', "a key twice", "the key 'text' appears twice"),
    (b"[1]", "no object", "each line must be one JSON object"),
    (b'{"text": "\xff", "domain": "d"}', "not UTF-8", "not UTF-8"),
    (b'{"domain": "d"}', "no text", "no field 'text'"),
    (b'{"text": null, "domain": "d"}', "no text", "is null"),
    (b'{"text": 3, "domain": "d"}', "text is no string", "holds 3 (a int)"),
    (b'{"text": "a"}', "no domain", "no field 'domain'"),
    (b'{"text": "a", "domain": {"name": "x"}}', "domain is no name", "number: domain.name"),
    (b'{"text": "a", "domain": ["x"]}', "domain is no name", "holds ['x'] (a list)"),
    (b'{"text": "\\ud83d", "domain": "d"}', "half a surrogate pair", "character 1 of the text"),
    (b'{"text": "a", "domain": "x\\ud83d"}', "half a surrogate pair", "character 2 of the domain"),
    (b'{"text": "a", "id": "\\ude00", "domain": "d"}', "half a surrogate pair", "1 of the id"),
]


def read(path, left_out=None, **fields):
    return list(
        read_documents([str(path)], left_out=left_out, **{"domain_field": "domain"} | fields)
    )


@pytest.mark.parametrize(("line", "kind", "told"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_a_bad_line_is_told_with_its_place_or_left_out(tmp_path, line, kind, told):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith((f"{path}:2: ", f"{path}, record 2: "))
    assert told in str(caught.value)
    left_out = LeftOut()
    assert [d.id for d in read(path, left_out)] == ["d.jsonl:1", "d.jsonl:3"]
    assert left_out.counts() == {kind: 1}
    assert left_out.describe() == f"bad records left out: 1 {kind}; the first: {left_out.first}"
    leave_out = "; or leave such records out (corpus.on_bad_record: skip)"
    assert str(caught.value) == left_out.first + leave_out


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet", "arrow"])
def test_a_git_lfs_pointer_is_no_bad_record(tmp_path, suffix):
    path = tmp_path / f"d.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=rf"d\.{suffix} is a git-lfs pointer.*`git lfs pull`"):
        read(path, LeftOut(), domain_field=None)


def test_of_a_txt_file_the_document_with_other_bytes_is_left_out(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"one\nmore\n\ntwo\n\xff\xfe\nmore\n\n\xff\n\nthree")
    left_out = LeftOut()
    assert read(path, left_out, domain_field=None) == [
        Document("d.txt:1", "one\nmore", None),
        Document("d.txt:10", "three", None),
    ]
    assert left_out.counts() == {"not UTF-8": 2}
    assert f"{path}:5: not UTF-8" in left_out.first


def with_other_bytes(column, name):
    """A column of text in which row 2 is no UTF-8, which Arrow does not look at."""
    values = pa.array([b"one", b"t\xffo", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    table = pa.table({"text": ["x", "y", "z"], "domain": ["d"] * 3, "id": ["1", "2", "3"]})
    return table.set_column(table.schema.get_field_index(column), column, text)


@pytest.mark.parametrize("column", ["text", "domain", "id"])
@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_a_column_that_is_no_utf8_names_file_and_row(tmp_path, column, name):
    path, table = tmp_path / name, with_other_bytes(column, name)
    if name == "d.parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as sink:
            sink.write_table(table)
    with pytest.raises(InputError, match=rf"{name}, record 2: the field '{column}' is not UTF-8"):
        read(path)
    left_out = LeftOut()
    assert len(read(path, left_out)) == 2
    assert left_out.counts() == {"not UTF-8": 1}


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_two_columns_of_one_name_are_refused_where_they_are_meant(tmp_path, name):
    path = tmp_path / name
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    for names, meant in ((("text", "text", "domain"), True), (("x", "x", "text"), False)):
        table = pa.Table.from_arrays(columns, names=list(names))
        if name == "d.parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(str(path), table.schema) as sink:
                sink.write_table(table)
        if meant:
            with pytest.raises(InputError, match=rf"{name} has 2 columns called 'text'"):
                read(path)
        else:
            assert read(path, domain_field=None)[0].text == "c"


def test_an_arrow_file_whose_offsets_lead_nowhere_is_damaged(tmp_path):
    table = pa.table({"text": ["one", "two", "three"]})
    path = tmp_path / "d.arrow"
    with pa.ipc.new_file(str(path), table.schema) as sink:
        sink.write_table(table)
    content, offsets = path.read_bytes(), np.array([0, 3, 6, 11], np.int32).tobytes()
    assert content.count(offsets) == 1
    wrong = np.array([0, 3_000_000, 6, 11], np.int32).tobytes()
    path.write_bytes(content.replace(offsets, wrong))
    with pytest.raises(InputError, match=r"d\.arrow cannot be read as arrow"):
        read(path, domain_field=None)


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "d.jsonl.gz", "d.jsonl.zst"])
def test_whatever_bytes_are_damaged_it_is_an_input_error(tmp_path, name):
    rows = [{"id": str(n), "text": f"some words {n}", "meta": {"d": "x"}} for n in range(40)]
    path, table = tmp_path / name, pa.Table.from_pylist(rows)
    if name == "d.parquet":
        pq.write_table(table, path, row_group_size=20)
    elif name == "d.arrow":
        with pa.ipc.new_stream(str(path), table.schema) as sink:
            sink.write_table(table, max_chunksize=20)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        packed = gzip.compress(text) if name.endswith("gz") else pa.compress(text, "zstd")
        path.write_bytes(packed)
    good, draw, refused = path.read_bytes(), random.Random(name), 0
    for _ in range(100):
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path, domain_field="meta.d")
        except InputError as error:
            refused += str(path) in str(error)
    assert refused > 10


# --- what is wrong with a whole file --------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[{"text": "a"}]', r":1: the file begins with a JSON array.*jq -c '\.\[\]' "),
        (b'[\n  {\n    "text": "a"\n  }\n]\n', "begins with a JSON array"),
        (b'{\n  "text": "a"\n}\n', r"objects span several lines: jq -c '\.' "),
        (b'{"text": "a"}\r{"text": "b"}\r', r"carriage return only: tr '\\r' '\\n' < "),
    ],
)
def test_json_that_is_no_lines_says_how_to_make_some(tmp_path, content, told):
    path = tmp_path / "my texts.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=told) as caught:
        read(path, domain_field=None)
    assert f"'{path}' > lines" in str(caught.value)


def test_text_with_carriage_returns_alone_is_not_one_document(tmp_path):
    path = tmp_path / "d.txt"
    one_line = b"one\r\rtwo\r\rthree\r"
    for content in (one_line, one_line + b"\n", b"header\n" + one_line, b"one\rtwo\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"d\.txt: its lines end in a carriage return only"):
            read(path, domain_field=None)
    path.write_bytes(b"one\rmore\n\ntwo\n\r")  # within lines they are characters
    assert [d.text for d in read(path, domain_field=None)] == ["one\rmore", "two"]


def test_joined_files_have_a_byte_order_mark_anywhere(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\xef\xbb\xbf" + GOOD)
    assert len(read(path)) == 2


def test_a_line_without_end_is_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"x" * (1 << 21) + b'"}\n')
    with pytest.raises(InputError, match=r"d\.jsonl:2: a line of more than 1 MiB"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"text": " "}\n'])
def test_a_file_without_text_is_said(tmp_path, caplog, content):
    for name, given in (("a.jsonl", content), ("b.jsonl", b'{"text": "b"}')):
        (tmp_path / name).write_bytes(given)
    assert len(read(tmp_path / "*.jsonl", domain_field=None)) == 1
    assert f"{tmp_path / 'a.jsonl'}: there is no text in it" in caplog.text
    assert "b.jsonl" not in caplog.text


@pytest.mark.parametrize("error", [ConnectionError("gone"), RuntimeError("x"), ValueError("y")])
def test_a_stream_that_breaks_off_says_where_and_that_work_is_kept(monkeypatch, error):
    def rows():
        yield from ({"text": f"text {n}"} for n in range(3))
        raise error

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
    stream = read_documents(["owner/name"])
    assert [next(stream).text for _ in range(3)] == ["text 0", "text 1", "text 2"]
    with pytest.raises(
        InputError, match=r"broke off after 3 records \(\w+: .*run the same"
    ) as told:
        next(stream)
    assert type(error).__name__ in str(told.value)


# --- fields ---------------------------------------------------------------------------------------

NESTED = {"meta": {"set": {"name": "inner"}, "n": 7}, "meta.set": {"name": "literal"}, "text": "a"}


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet", "d.arrow"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("meta.set.name", "literal"), ("meta.n", "7"), ("meta.set", None), ("meta.set.nam", None)],
)
def test_a_dotted_field_is_inside_another_unless_one_is_called_so(tmp_path, name, field, value):
    path, table = tmp_path / name, pa.Table.from_pylist([NESTED])
    if name == "d.jsonl":
        path.write_text(json.dumps(NESTED))
    elif name == "d.parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as sink:
            sink.write_table(table)
    if value is not None:
        assert read(path, domain_field=field)[0].domain == value
        assert field == "meta.n" or read(path, text_field=field, domain_field=None)[0].text == value
    else:
        with pytest.raises(InputError, match=r"number: meta\.set\.name|no field 'meta\.set\.nam'"):
            read(path, domain_field=field)


@pytest.mark.parametrize(("value", "domain"), [("x", "x"), (3, "3"), (2.5, "2.5"), (True, "True")])
def test_a_number_is_a_domain_as_it_is_written(tmp_path, value, domain):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a", "domain": value}))
    assert read(tmp_path / "d.jsonl")[0].domain == domain


# --- a corpus without them ------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path, wordpiece):
    source = tmp_path / "d.jsonl"
    lines = [
        json.dumps({"text": f"the river {n} runs over the city {n}"}).encode() for n in range(30)
    ]
    for place in (28, 20, 19, 11, 3):
        lines.insert(place, b"bad")
    source.write_bytes(b"\n".join(lines) + b'\n{"text": 3}\n')

    def made(cache, stop=None, **values):
        given = {"source": str(source), "tokenizer": str(wordpiece), "sequence_length": 16}
        config = CorpusConfig(**given | {"on_bad_record": "skip"} | values)
        done = []

        def progress(sequences, tokens):
            done.append(sequences)
            if len(done) == stop:
                raise KeyboardInterrupt

        return build_corpus(LocalStore(tmp_path / cache), config, 4, progress)

    return made


def test_bad_records_are_counted_and_said_once_it_is_known_how_many(tmp_path, build, caplog):
    with pytest.raises(InputError, match=r"d\.jsonl:4: not JSON"):
        build("strict", on_bad_record="error")
    whole = build("whole")
    assert whole.bad_records == {"not JSON": 5, "text is no string": 1}
    assert "the first bad record that was left out: " in caplog.text
    assert "bad records left out: 5 not JSON, 1 text is no string" in remarks(whole)
    assert build("whole", on_bad_record="error").bad_records == whole.bad_records  # it is finished
    with pytest.raises(KeyboardInterrupt):
        build("killed", stop=3)
    with pytest.raises(InputError, match=r"d\.jsonl:4: not JSON"):
        build("killed", on_bad_record="error")
    killed = build("killed")
    assert killed.fingerprint == whole.fingerprint
    assert killed.bad_records == whole.bad_records
    assert Corpus(LocalStore(tmp_path / "killed")).bad_records == whole.bad_records


def test_what_stopped_at_a_bad_record_goes_on_without_it(build, caplog):
    caplog.set_level(logging.INFO, "rekindle")
    with pytest.raises(InputError):
        build("one", on_bad_record="error")
    assert build("one").fingerprint == build("other").fingerprint


@pytest.mark.parametrize("limit", [1, 5, 9, 14])
def test_of_a_limited_corpus_those_before_its_end_count(build, limit):
    with pytest.raises(KeyboardInterrupt):
        build("killed", stop=1, limit_sequences=limit)
    assert (
        build("killed", limit_sequences=limit).bad_records
        == build("straight", limit_sequences=limit).bad_records
    )
    grown = build("killed", limit_sequences=None)
    assert grown.bad_records == {"not JSON": 5, "text is no string": 1}


def test_nothing_but_bad_records_is_an_empty_corpus(tmp_path, build):
    (tmp_path / "bad.jsonl").write_text("bad\nworse\n")
    with pytest.raises(InputError, match=r"corpus is empty.*left out: 2 not JSON; the first"):
        build("empty", source=str(tmp_path / "bad.jsonl"))
    assert not (tmp_path / "empty" / "corpus" / "corpus.json").exists()


def test_a_corpus_goes_on_where_the_stream_broke_off(tmp_path, wordpiece, monkeypatch):
    def build(cache, breaks_after):
        def rows():
            yield from ({"text": f"the river {n} runs"} for n in range(breaks_after))
            if breaks_after < 30:
                raise ConnectionError("reset by peer")

        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
        config = CorpusConfig(source="owner/name", tokenizer=str(wordpiece), sequence_length=16)
        return build_corpus(LocalStore(tmp_path / cache), config, 4)

    with pytest.raises(InputError, match="broke off after 20 records"):
        build("broken", 20)
    assert build("broken", 30).fingerprint == build("straight", 30).fingerprint
