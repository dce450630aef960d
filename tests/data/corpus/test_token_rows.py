"""Corpora of rows of tokens: taken as they are; labels or a mask of them say what is trained."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.corpus.remarks import remarks
from rekindle.data.corpus.texts import CorpusTexts
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.storage.store import LocalStore
from testlib.vocabularies.dialogues import write_rows

IDS = list(range(10, 40))
HALF = [-100] * 15 + IDS[15:]


@pytest.fixture
def build(tmp_path, bytelevel):
    def made(rows, name="rows.jsonl", tokenizer=bytelevel, **values):
        path = write_rows(tmp_path / name, rows) if isinstance(rows, list) else rows
        given = {"source": str(path), "format": "tokens", "tokenizer": str(tokenizer)}
        config = CorpusConfig(**given | {"sequence_length": 24} | values)
        return build_corpus(LocalStore(tmp_path / f"cache-{name}"), config, 4)

    return made


def rows(corpus):
    return [row for n in range(len(corpus.commits)) for row in corpus.shard(n).table().to_pylist()]


def found(corpus):
    return [(row["input_ids"], row["trained"]) for row in rows(corpus)]


def test_a_row_is_a_sequence_as_it_is_and_a_long_one_is_cut_or_split(build):
    """Without labels it is like a text, of which nothing is lost; with them its end is cut."""
    corpus = build(
        [
            {"input_ids": IDS},
            {"input_ids": IDS, "labels": HALF},
            {"input_ids": IDS[:4], "loss_mask": [0, 1, 1, 0]},
            {"input_ids": IDS, "labels": [-100] * 30},
            {"input_ids": IDS, "labels": [-100] * 29 + IDS[29:]},  # what is trained is cut off
        ]
    )
    assert found(corpus) == [
        (IDS[:24], [True] * 24),
        (IDS[24:], [True] * 6),
        (IDS[:24], [False] * 15 + [True] * 9),
        (IDS[:4], [False, True, True, False]),
    ]
    assert remarks(corpus) == [
        "trained: 41 tokens, 70.7% of all",
        "left out, with no trained token: 2 sequences",
        "longer than sequence_length, the end cut: 1 dialogue (or rows of tokens), 6 tokens lost",
    ]
    assert CorpusTexts(corpus)[3] == corpus.tokenizer.hf.decode(IDS[:4])


@pytest.mark.parametrize("width", [pa.int16(), pa.uint32(), pa.int64(), pa.uint8()])
def test_integers_of_any_width(build, tmp_path, width):
    labels = pa.int16() if width == pa.uint8() else width
    table = {
        "input_ids": pa.array([IDS[:9], IDS[5:]], pa.list_(width)),
        "loss_mask": pa.array([[1] * 9, [0] * 20 + [1] * 5], pa.list_(labels)),
    }
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    corpus = build(tmp_path / "rows.parquet", sequence_length=32)
    assert found(corpus) == [(IDS[:9], [True] * 9), (IDS[5:], [False] * 20 + [True] * 5)]


def test_two_rows_that_are_trained_elsewhere_are_different_sequences(build):
    masks = [[1] * 30, [0] * 29 + [1]]
    corpus = build([{"input_ids": IDS, "loss_mask": m} for m in masks], sequence_length=32)
    assert len({row["digest"] for row in rows(corpus)}) == 2


def test_rows_that_are_joined_lose_no_token_and_have_no_doubled_ones(build, wordpiece):
    """[CLS] and [SEP] stand around each sequence anyway."""
    tokenizer = load_tokenizer(str(wordpiece))
    whole = [[*tokenizer.prefix, *IDS[:20], *tokenizer.suffix], [*IDS[:5]]]
    given = [{"input_ids": ids, "labels": ids} for ids in whole]
    corpus = build(given, tokenizer=wordpiece, packing="contiguous", sequence_length=16)
    special = {*tokenizer.prefix, *tokenizer.suffix}
    content = [n for ids, _ in found(corpus) for n in ids if n not in special]
    assert content == [*IDS[:20], *IDS[:5]]
    for ids, _ in found(corpus):
        assert ids[0] == tokenizer.prefix[0]
        assert ids[-1] == tokenizer.suffix[0]
        assert not any(a == b for a, b in pairwise(ids) if a in special)


BAD = [
    ({"tokens": IDS}, "no field 'input_ids'; it has: tokens"),
    ({"input_ids": []}, "it must be a list of ids, one or more"),
    ({"input_ids": [1, 2.0]}, "it must be a list of ids"),
    ({"input_ids": [1, True]}, "it must be a list of ids"),
    ({"input_ids": [[1]]}, "it must be a list of ids"),
    ({"input_ids": [1, 10**6]}, r"input_ids\[1\] is 1000000, which is not a token"),
    ({"input_ids": [-1]}, r"input_ids\[0\] is -1, which is not a token"),
    ({"input_ids": IDS, "labels": IDS[1:]}, r"as many numbers as input_ids \(30\), but has 29"),
    ({"input_ids": IDS, "labels": [*IDS[1:], -100]}, r"labels\[0\] is 11 .*shifted by one"),
    ({"input_ids": IDS, "labels": [*IDS[:29], 7]}, r"labels\[29\] is 7 but input_ids\[29\] is 39"),
    ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "loss_mask must be 1 .trained. or 0"),
    (
        {"input_ids": [1], "loss_mask": [1], "labels": [1]},
        "so it is unclear which says what is trained",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_row_that_is_none_is_named_or_left_out(build, row, message):
    given = [{"input_ids": IDS[:3], "loss_mask": [True, False, True]}, row]
    with pytest.raises(InputError, match=rf"rows\.jsonl, record 2: .*{message}"):
        build(given)
    corpus = build(given, on_bad_record="skip")
    assert found(corpus) == [(IDS[:3], [True, False, True])]
    assert sum(corpus.bad_records.values()) == 1


def test_gaps_in_the_ids_are_no_tokens(build, tmp_path, wordpiece):
    from testlib.vocabularies.changed import with_gaps

    gapped = with_gaps(wordpiece, tmp_path / "gaps", ["the"])
    hole = load_tokenizer(str(gapped)).gaps[0][0]
    with pytest.raises(InputError, match=rf"input_ids\[0\] is {hole}, which is not a token"):
        build([{"input_ids": [hole]}], tokenizer=gapped)


def test_what_is_special_is_never_masked(build, wordpiece):
    tokenizer = load_tokenizer(str(wordpiece))
    whole = [*tokenizer.prefix, *IDS, *tokenizer.suffix]
    corpus = build([{"input_ids": whole}], tokenizer=wordpiece)
    starts = np.concatenate([row["char_starts"] for row in rows(corpus)])
    ids = np.concatenate([row["input_ids"] for row in rows(corpus)])
    unknown = tokenizer.hf.unk_token_id
    assert [start < 0 for start in starts] == [n in tokenizer.special_ids - {unknown} for n in ids]
    assert rows(corpus)[0]["text"] == ""
