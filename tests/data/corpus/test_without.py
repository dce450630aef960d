"""A corpus without the texts of tests: what is left out, counted and recorded."""

import json
import logging
import re

import fsspec
import pytest

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.corpus.remarks import remarks
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.source import without
from rekindle.data.source.held_texts import HeldCounts
from rekindle.data.source.records import read_records
from rekindle.data.source.without import read_held
from rekindle.data.storage.store import LocalStore

TEXTS = [
    f"question {number}: what runs over the {number} hills on days of rain" for number in range(40)
]
ASKED = [2, 3, 11, 20, 29, 39]  # of these each has a test
FILES = ("a.jsonl", "b.csv")


@pytest.fixture
def home(tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines.insert(20, "bad")
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    tests = [f"What runs over the {number} hills on days of rain?" for number in ASKED]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in tests[:3]))
    (tmp_path / "b.csv").write_text("label,sentence\n" + "".join(f"x,{t}\n" for t in tests[3:]))
    return tmp_path


@pytest.fixture
def build(home, wordpiece):
    def made(cache, stop=None, meanwhile=None, files=FILES, **values):
        given = {"source": str(home / "d.jsonl"), "tokenizer": str(wordpiece)}
        given |= {"sequence_length": 64, "on_bad_record": "skip"}
        given |= {"without": [str(home / name) for name in files]} if files else {}
        done = []

        def progress(sequences, tokens):
            done.append(sequences)
            if len(done) == stop:
                if meanwhile is None:
                    raise KeyboardInterrupt
                meanwhile()

        config = CorpusConfig(**given | values)
        return build_corpus(LocalStore(home / cache), config, 4, progress)

    return made


def texts(corpus):
    return [row for n in range(len(corpus.commits)) for row in corpus.shard(n).table()["text"]]


def test_records_that_hold_a_text_are_left_out_counted_and_said(home, build, caplog):
    caplog.set_level(logging.INFO, "rekindle")
    corpus = build("cache")
    left = [text for number, text in enumerate(TEXTS) if number not in ASKED]
    assert [str(text) for text in texts(corpus)] == left
    assert corpus.held == HeldCounts(exact=6)
    assert corpus.documents == len(left)
    assert corpus.bad_records == {"not JSON": 1}
    assert corpus.info["config"]["without"]["texts"] == 6
    (line,) = [line for line in remarks(corpus) if "a.jsonl" in line]
    assert line.startswith("6 records left out for texts of ")
    assert line.endswith(" (6 hold one exactly, 0 nearly)")
    assert "d.jsonl:3 holds: what runs over the 2 hills" in caplog.text
    assert f"texts of {home / 'b.csv'} are sentence\n" in caplog.text


def test_such_files_in_a_store_are_read_as_those_on_the_disk_and_anew_when_they_change(home, build):
    store = fsspec.filesystem("memory")
    for name in FILES:
        store.pipe_file(f"/tests/{name}", (home / name).read_bytes())
    places = ["memory://tests/*.jsonl", "memory://tests/b.csv"]
    corpus = build("stored", files=(), without=places)
    assert corpus.held == HeldCounts(exact=6)
    assert texts(corpus) == texts(build("local"))
    store.pipe_file("/tests/b.csv", f"label,sentence\nx,{TEXTS[5]}\n".encode())
    assert build("changed", files=(), without=places).held == HeldCounts(exact=4)


def test_without_such_files_a_corpus_is_as_it_was(build):
    corpus = build("cache", files=())
    assert len(corpus) == 40
    assert "without" not in corpus.info["config"]
    assert not [line for line in remarks(corpus) if "left out for texts" in line]
    end = corpus.store.read_bytes("corpus/complete.json")
    assert b"held" not in end


@pytest.mark.parametrize(("limit", "held"), [(None, 6), (2, 0), (3, 2), (9, 2), (10, 3), (33, 5)])
def test_the_count_is_the_same_wherever_a_run_was_killed(home, build, limit, held):
    """A record counts where a later one is in the corpus."""
    whole = build("whole", limit_sequences=limit)
    assert whole.held == HeldCounts(exact=held)
    for stop in range(1, len(whole.commits) + 1):
        with pytest.raises(KeyboardInterrupt):
            build(f"killed-{stop}", stop=stop, limit_sequences=limit)
        (line,) = [
            of for of in remarks(Corpus(LocalStore(home / f"killed-{stop}"))) if ".csv" in of
        ]
        assert line.endswith("are left out: counted when the corpus is finished")
        killed = build(f"killed-{stop}", limit_sequences=limit)
        assert (killed.held, killed.bad_records) == (whole.held, whole.bad_records)
        assert killed.fingerprint == whole.fingerprint


def test_another_process_beside_it_and_a_lost_shard_change_nothing(home, build):
    whole = build("whole")
    beside = build("beside", stop=2, meanwhile=lambda: build("beside"))
    assert (beside.held, beside.fingerprint) == (whole.held, whole.fingerprint)
    (home / "beside/corpus/commits/00003.json").unlink()
    (home / "beside/corpus/complete.json").unlink()
    again = build("beside")
    assert (again.held, again.fingerprint) == (whole.held, whole.fingerprint)


def test_what_grows_leaves_out_further_ones(home, build):
    first = build("cache", limit_sequences=9)
    assert first.held == HeldCounts(exact=2)
    assert build("cache").held == HeldCounts(exact=6)
    (home / "e.jsonl").write_text(
        json.dumps({"text": "Well: WHAT runs over the 2 hills on days of rain?"})
    )
    more = build("cache", source=[str(home / "d.jsonl"), str(home / "e.jsonl")])
    assert more.held == HeldCounts(exact=7)
    assert len(more) == len(TEXTS) - len(ASKED)


def test_files_are_known_by_their_texts_in_any_order_at_any_place(home, build):
    one = build("one")
    (home / "moved.csv").write_text((home / "b.csv").read_text())
    assert build("one", files=("moved.csv", "a.jsonl")).fingerprint == one.fingerprint
    assert build("other", files=FILES[::-1]).held == one.held


@pytest.mark.parametrize("files", [(), ("a.jsonl",), FILES])
def test_other_texts_are_another_corpus(home, build, files):
    build("cache")
    if files == FILES:
        (home / "a.jsonl").write_text(json.dumps({"text": "another question, and no more"}))
    here = {0: "nothing", 1: "3 texts of a.jsonl", 2: "4 texts of a.jsonl, b.csv"}[len(files)]
    with pytest.raises(CacheMismatchError, match=rf"without: 6 texts of .*there, {here}.* here\)"):
        build("cache", files=files)
    assert Corpus(LocalStore(home / "cache")).held == HeldCounts(exact=6)


def test_nothing_but_texts_of_tests_is_an_empty_corpus(home, build):
    (home / "few.jsonl").write_text(json.dumps({"text": TEXTS[2]}))
    told = r"corpus is empty.*give other text, or other files.*1 record left out for texts.*"
    told += r"first: few\.jsonl:1 holds: what runs"
    with pytest.raises(InputError, match=told):
        build("empty", source=str(home / "few.jsonl"))
    assert not (home / "empty" / "corpus" / "corpus.json").exists()


def test_of_a_long_text_the_beginning_is_said(home, build):
    long = " ".join(f"w{number}" for number in range(500))
    (home / "long.jsonl").write_text(json.dumps({"text": long}))
    with pytest.raises(InputError, match=r"holds: w0 w1 [w0-9 ]{90,110}…$"):
        build("empty", source=str(home / "long.jsonl"), files=("long.jsonl",))


# --- the files ------------------------------------------------------------------------------------


def held(path, fields=(), corpus=("text",)):
    return read_held([str(path)], fields, corpus)


@pytest.mark.parametrize(
    ("row", "fields", "size"),
    [
        ({"sentence1": "a b", "sentence2": "c d", "label": "no text"}, (), 2),
        ({"tokens": ["a", "b"], "tags": ["O", "O"]}, (), 1),
        ({"question": "a b", "text": "c d"}, ["question"], 1),
        ({"meta": {"q": "a b"}}, ["meta.q"], 1),
        ({"body": "a b"}, (), 1),
        ({"question": "a b", "sentence": "c d"}, (), 2),
        ({"premise": "a b", "hypothesis": "c d", "label": "no text"}, (), 2),
    ],
)
def test_the_fields_that_are_read(tmp_path, row, fields, size):
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    found = held(tmp_path / "t.jsonl", fields, ["body"])
    assert found.size == size
    assert found.find("A b.")
    assert not found.find("no text")


@pytest.mark.parametrize(
    ("row", "fields", "told"),
    [
        ({"text": "a", "context": "a text it is", "label": "b c"}, (), "text; context is not read"),
        ({"text": "a", "x": "a b c d", "y": "a b c d"}, (), "text; x, y are not read"),
        ({"text": "a", "context": "a text it is"}, ["text"], None),
        ({"text": "a", "label": "credit card lost"}, (), None),
    ],
)
def test_fields_that_look_like_texts_and_are_not_read_are_said(tmp_path, caplog, row, fields, told):
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    for _ in range(2):  # said once
        held(tmp_path / "t.jsonl", fields)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [told in line for line in warned] == ([True] if told else [])


def test_each_line_of_a_txt_file_is_a_text(tmp_path):
    (tmp_path / "t.txt").write_text("a b\nc d\n\ne f\n")
    assert held(tmp_path / "t.txt").size == 3


@pytest.mark.parametrize(
    ("content", "fields", "told"),
    [
        ('{"query": "a"}', (), r"has none of the fields text, sentence.*\(it has: query\)"),
        ('{"question": "a"}', ["questio"], r"no field 'questio'.*did you mean 'question'"),
        ('{"text": "a"}\n{"text": null}', (), r":2: text must be a string.*missing"),
        ('{"text": 3}', (), r":1: text must be a string.*an? int"),
        ("bad", (), "not JSON"),
        ("", (), "has no rows"),
        ('{"text": "?"}', (), "no text with a letter"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, content, fields, told):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InputError, match=rf"^corpus\.without: .*{told}"):
        held(tmp_path / "t.jsonl", fields)


def test_a_file_that_is_not_there_or_no_test_is_said(tmp_path):
    with pytest.raises(InputError, match=r"^corpus\.without: '.*none\.jsonl' is neither a file"):
        held(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="python-docs is not a test"):
        held("python-docs")
    with pytest.raises(ValueError, match="without_fields are fields of the files in without"):
        CorpusConfig(source="a.txt", tokenizer="t", without_fields="text")


def test_every_row_of_a_test_has_the_fields_of_its_first(tmp_path):
    """Else texts that are nowhere looked for would be left in the corpus."""
    file = tmp_path / "t.jsonl"
    pair = {"sentence1": "one", "sentence2": "two", "label": 1}

    def refused(rows, *fields):
        file.write_text("\n\n".join(map(json.dumps, rows)))  # the third line is the second row
        with pytest.raises(InputError) as caught:
            read_held([str(file)], fields, ["text"])
        return str(caught.value)

    lacking = rf"{file}:3: sentence2 must be a string .*missing; every row must have the fields"
    for fields in ((), ("sentence1", "sentence2")):
        assert re.search(lacking, refused([pair, {"sentence1": "one", "id": 4}], *fields))
        assert re.search(lacking, refused([pair, pair | {"sentence2": None}], *fields))
    told = refused([{"sentence1": "one"}, pair])
    assert f"{file}:3 has sentence2, but the first row of the file does not" in told
    assert "with corpus.without_fields" in told
    held = read_held([str(file)], ["sentence1"], ["text"])  # so it is as it is asked
    assert held.size == 1
    file.write_text("\n".join(map(json.dumps, [pair, pair | {"id": 3}])))  # no text
    assert read_held([str(file)], (), ["text"]).size == 2


def test_a_file_that_has_not_changed_is_read_once(tmp_path, monkeypatch):
    file, opened = tmp_path / "t.jsonl", []
    file.write_text(json.dumps({"text": "one"}))
    monkeypatch.setattr(
        without, "read_records", lambda *given: opened.append(given) or read_records(*given)
    )
    first = read_held([str(file)], (), ["text"])
    assert read_held([str(tmp_path / "*.jsonl")], (), ["text"]) is first
    assert len(opened) == 1
    assert read_held([str(file)], ("text",), ["text"]).digest == first.digest  # asked otherwise
    assert len(opened) == 2
    file.write_text(json.dumps({"text": "two"}))
    assert read_held([str(file)], (), ["text"]).digest != first.digest
    assert len(opened) == 3
