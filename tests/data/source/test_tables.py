"""Csv and tsv files: the same corpus as from lines of JSON, packed or not; rows that are none."""

import csv
import io
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.errors import InputError
from rekindle.data.source.documents import Document, read_documents
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.tables import bytes_of_rows, table_rows
from rekindle.data.storage.store import LocalStore

ROWS = [
    {"id": str(n), "question": f'the "{word}" was, at {n}, over', "part": f"p{n % 2}"}
    for n, word in enumerate(["river", "city", "light", "engine", "bridge", "harbour"] * 4)
]


def table(name, rows):
    stream = io.StringIO()
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
    writer = csv.DictWriter(stream, [*rows[0]], **(how if ".tsv" in name else {}))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.bz2", "a.csv.zst"])
def test_a_corpus_of_a_table_is_that_of_lines_and_is_resumed_and_moved(tmp_path, wordpiece, name):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / name
    with pa.output_stream(str(path), compression="detect") as stream:
        stream.write(table(name, ROWS))

    def corpus_of(source, where):
        given = {"text_field": "question", "domain_field": "part", "sequence_length": 16}
        config = CorpusConfig(source=str(source), tokenizer=str(wordpiece), **given)
        made = build_corpus(LocalStore(tmp_path / where), config, 8)
        return [made.shard(n).table().to_pylist() for n in range(len(made.commits))]

    expected = corpus_of(tmp_path / "a.jsonl", "lines")
    assert corpus_of(path, "table") == expected
    for gone in ("commits/00001.json", "complete.json"):
        (tmp_path / "table/corpus" / gone).unlink()
    moved = path.rename(tmp_path / f"moved-{name}")
    assert corpus_of(moved, "table") == expected


@given(
    st.lists(st.tuples(st.text("ab \",'\n\r\té", max_size=6), st.text("x,", max_size=2))),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_python_writes_as_csv_is_read_as_it_was(tmp_path_factory, rows, end):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "b"), *rows])
    assert [*table_rows(str(path), tabbed=False)] == [["text", "b"], *map(list, rows)]
    assert bytes_of_rows(str(path), False, len(rows)) == path.stat().st_size


BAD = [
    (b"a,b,c", "row 2: has 3 fields, but the first line names 2 (split at each comma)"),
    (b"a", "row 2: has 1 field, but the first line names 2"),
    (b'"a"b,c', "row 2: text follows a closing quotation mark"),
    (b'"a,b', "row 2: text follows a closing quotation mark"),
    (b"a\xff,b", "row 2: text is not UTF-8 (invalid start byte at byte 2)"),
]


@pytest.mark.parametrize(("line", "told"), BAD, ids=map(str, range(len(BAD))))
def test_a_bad_row_is_told_with_its_place_or_left_out_alone(tmp_path, line, told):
    path = tmp_path / "d.csv"
    path.write_bytes(b'text,domain\n"one, or",x\n' + line + b'\n\n"two\nlines",y\nthree,y\n')
    with pytest.raises(InputError) as caught:
        list(read_documents([str(path)], domain_field="domain"))
    assert str(caught.value).startswith(f"{path}, {told}")
    assert "corpus.on_bad_record: skip" in str(caught.value)
    left_out = LeftOut()
    found = [*read_documents([str(path)], "text", "domain", left_out)]
    assert sum(left_out.counts().values()) == 1
    assert found == [
        Document("d.csv:1", "one, or", "x"),
        Document("d.csv:3", "two\nlines", "y"),
        Document("d.csv:4", "three", "y"),
    ]


def test_a_quotation_mark_that_is_never_closed_takes_no_other_row_with_it(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('text,n\none,1\n"two,2\nthree,3\n\nfour,4\n')
    left_out = LeftOut()
    assert [d.text for d in read_documents([str(path)], left_out=left_out)] == [
        *("one", "three", "four")
    ]
    assert "row 2: a quotation mark is opened but never closed" in left_out.first


def test_a_table_without_names_of_columns_is_told_what_its_first_line_is_taken_for(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text("what is a river\t3\nwhere is the city\t4\n")
    with pytest.raises(InputError, match="the first line names its columns: what is a river, 3"):
        list(read_documents([str(path)]))


def test_bytes_of_a_beginning_are_those_of_its_rows(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('text\none\n\n"tw\no"\nthree\n')
    assert bytes_of_rows(str(path), False, 2) == len('text\none\n\n"tw\no"\n')
