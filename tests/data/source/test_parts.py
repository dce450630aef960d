"""A source in parts comes to the documents that it has as a whole, however it is cut."""

import gzip
import json
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data.errors import InputError
from rekindle.data.source import parts
from rekindle.data.source.documents import Fields, origins_of, read_documents
from rekindle.data.source.held_texts import HeldTexts
from rekindle.data.source.left_out import LeftOut
from rekindle.data.source.parts import Reader, cut_parts

FIELDS = Fields("text", "domain", None)
HELD = HeldTexts(["the very text of a test that nobody should have read before"])
SUFFIXES = ["jsonl", "jsonl.gz", "parquet", "arrow", "csv", "tsv", "txt"]


def lines(count):
    """Records of all lengths: some bad, some blank, some that hold a test's text."""
    draw = random.Random(0)
    for number in range(count):
        text = " ".join(draw.choices(["é", "word", "longer words", "东京"], k=draw.randint(0, 30)))
        if number % 11 == 3:
            text += " the very text of a test that nobody should have read before"
        yield {"text": text, "domain": "ab"[number % 2]}


def written(folder, suffix, count=50):
    path, records = folder / f"d.{suffix}", [*lines(count)]
    if suffix.startswith("jsonl"):
        given = [json.dumps(record, ensure_ascii=False).encode() for record in records]
        given[7::9] = [b"no record", b"", b"\xff{}", b"{}", b'{"text": 3}'][: len(given[7::9])]
        content = b"\n".join(given)  # the last line is not ended
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    elif suffix == "arrow":
        table = pa.Table.from_pylist(records)
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=13)
    elif suffix == "txt":
        path.write_text("\n\n".join(record["text"] for record in records))
    else:
        between = {"csv": ",", "tsv": "\t"}[suffix]
        rows = [["text", "domain"], *([*record.values()] for record in records), ["short"]]
        path.write_text("\n".join(between.join(row) for row in rows))
    return path


def in_parts(source, fields, monkeypatch, size):
    """Each part read as another process would: nothing but its pickle is known there."""
    monkeypatch.setattr(parts, "PART_BYTES", size)
    read, left_out, reader = [], LeftOut(held_texts=HELD), Reader(fields, skip_bad=True, held=HELD)
    for part in cut_parts(origins_of(source), fields):
        found = pickle.loads(pickle.dumps(reader))(pickle.loads(pickle.dumps(part)))
        if found.error:
            raise found.error
        read += found.documents
        left_out.extend(found.left_out)
    return read, left_out


@pytest.mark.parametrize("size", [1, 300, 1 << 20])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_documents_and_what_is_left_out_are_those_of_the_whole(tmp_path, monkeypatch, suffix, size):
    (tmp_path / "empty.jsonl").write_text("")
    source = [str(written(tmp_path, suffix)), str(tmp_path / "empty.jsonl")]
    whole, fields = (
        LeftOut(held_texts=HELD),
        FIELDS._replace(domain=None if suffix == "txt" else "domain"),
    )
    expected = [*read_documents(source, *fields[:2], left_out=whole)]
    assert sum(whole.held()) > 0
    read, left_out = in_parts(source, fields, monkeypatch, size)
    assert read == expected
    assert left_out.kept_documents == len(expected)
    assert (left_out.first, left_out.first_held) == (whole.first, whole.first_held)
    for last in (None, *range(len(expected))):
        assert left_out.counts(last) == whole.counts(last)
        assert left_out.held(last) == whole.held(last)


def test_an_error_of_the_source_comes_after_the_documents_before_it(tmp_path, monkeypatch):
    good = json.dumps({"text": "good", "domain": "a"}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(good * 9)
    (tmp_path / "b.parquet").write_bytes(b"no such file")
    source = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    reader = Reader(FIELDS, skip_bad=True, held=None)
    found = [reader(part) for part in cut_parts(origins_of(source), FIELDS)]
    assert sum(len(one.documents) for one in found) == 9
    assert [one.error for one in found[:-1]] == [None] * (len(found) - 1)
    with pytest.raises(InputError, match=r"b\.parquet cannot be read as parquet"):
        raise found[-1].error


def test_a_bad_record_is_told_by_its_line_wherever_it_is_read(tmp_path, monkeypatch):
    good = json.dumps({"text": "good", "domain": "a"}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(good * 20 + b"oops\n" + good)
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    reader = Reader(FIELDS, skip_bad=False, held=None)
    source = [str(tmp_path / "a.jsonl")]
    found = [reader(part) for part in cut_parts(origins_of(source), FIELDS)]
    (error,) = [one.error for one in found if one.error]
    assert str(error).startswith(f"{source[0]}:21: not JSON")
    assert sum(len(one.documents) for one in found) >= 20
