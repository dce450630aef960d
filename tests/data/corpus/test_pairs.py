"""A corpus of pairs: each record is two texts, and a sequence holds both as the tokenizer joins
them.
"""

import json
import logging
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoTokenizer

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.corpus.remarks import remarks
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.source.held_texts import HeldCounts
from rekindle.data.storage.store import LocalStore
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig
from rekindle.data.views.pairs import PairView
from rekindle.data.views.reader import ViewReader
from testlib.vocabularies.roberta import save_roberta

SENTENCE = "the old river runs under a new city and light falls over the quick engine"
WORDS = [*SENTENCE.split()]
PAIRS = [
    (
        " ".join(WORDS[n % 7 : n % 7 + 1 + n % 9]) + ("\n\n" if n == 3 else "."),
        " ".join(WORDS[-(1 + n % 11) :]) + ("?" if n % 2 else "  "),
    )
    for n in range(30)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, wordpiece, bytelevel):
    """Tokenizers by how they join pairs: [CLS] a [SEP] b [SEP], <s> a </s></s> b </s>, ab."""
    roberta = tmp_path_factory.mktemp("roberta")
    save_roberta(roberta)
    return {"bert": wordpiece, "roberta": roberta, "gpt2": bytelevel}


@pytest.fixture
def build(tmp_path, folders):
    def made(cache, tokenizer="bert", records=None, stop=None, **values):
        rows = records or [{"a": a, "b": b, "of": "xy"[len(a) % 2]} for a, b in PAIRS]
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = {"source": str(tmp_path / "p.jsonl"), "text_field": "a", "pair_field": "b"}
        given |= {"tokenizer": str(folders[tokenizer]), "sequence_length": 16}
        done = []

        def progress(sequences, tokens):
            done.append(sequences)
            if len(done) == stop:
                raise KeyboardInterrupt

        config = CorpusConfig(**given | values)
        return build_corpus(LocalStore(tmp_path / cache), config, 8, progress)

    return made


def rows(corpus):
    return [row for n in range(len(corpus.commits)) for row in corpus.shard(n).table().to_pylist()]


def special_ids(corpus):
    """Those that stand for nothing of a text: what is unknown does."""
    return corpus.tokenizer.special_ids - {corpus.tokenizer.hf.unk_token_id}


@pytest.mark.parametrize("length", [8, 11, 16, 64])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_a_sequence_is_what_the_tokenizer_makes_of_the_pair(build, folders, kind, length):
    theirs = AutoTokenizer.from_pretrained(folders[kind])
    corpus = build("cache", kind, sequence_length=length)
    assert len(corpus) == corpus.documents == len(PAIRS)
    for row, (a, b) in zip(rows(corpus), PAIRS, strict=True):
        expected = theirs(
            a, b, truncation="longest_first", max_length=length, return_token_type_ids=True
        )
        assert row["input_ids"] == expected["input_ids"]
        assert row["token_types"] == expected["token_type_ids"]
        assert any(row["token_types"]) == (kind != "roberta")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_tokens_know_their_place_in_the_two_texts(build, folders, kind):
    corpus = build("cache", kind, sequence_length=64)
    special = special_ids(corpus)
    found = [pair for n in range(4) for b in corpus.shard(n).batches() for pair in corpus.pairs(b)]
    assert found == PAIRS  # to the last blank
    for row, (a, _) in zip(rows(corpus), PAIRS, strict=True):
        starts = np.array(row["char_starts"])
        assert [start < 0 for start in starts] == [n in special for n in row["input_ids"]]
        begins = starts[np.array(row["word_starts"])]
        words = [row["text"][x:y].strip() for x, y in pairwise([*begins, len(row["text"])])]
        marks = row["text"].replace(".", " .").replace("?", " ?")
        assert " ".join(words).replace(".", " .").replace("?", " ?").split() == marks.split()
        assert len(a) + 2 in begins
        assert (row["span_start"], row["span_end"]) == (0, len(a))


@pytest.mark.parametrize(
    "mask",
    [
        MaskConfig(probability=0.9),
        MaskConfig(unit="span", probability=0.5),
        MaskConfig(policy="cover", unit="word"),
    ],
)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masks_never_hit_special_tokens(build, kind, mask):
    corpus = build("cache", kind)
    view = MaskedView(corpus, mask, 0, 2)
    for shard in range(len(corpus.commits)):
        ids = corpus.shard(shard).table()["input_ids"].to_pylist()
        for row, places in zip(ids, view.masked_positions(shard, 0), strict=True):
            assert not {row[place] for place in places} & special_ids(corpus)


def test_the_view_of_the_records_has_the_texts_whole_and_the_sequences_own_tokens(build):
    corpus = build("cache")
    view = PairView(corpus, "record", 0)
    view.build()
    reader, expected = ViewReader(corpus, view.name), iter(zip(rows(corpus), PAIRS, strict=True))
    for shard in range(len(corpus.commits)):
        for shown in (row for batch in reader.batches(shard) for row in batch.to_pylist()):
            row, pair = next(expected)
            assert (shown["text_a"], shown["text_b"]) == pair
            same = ("digest", "input_ids", "token_types")
            assert [shown[name] for name in same] == [row[name] for name in same]
    assert next(expected, None) is None


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_killed_run_goes_on_to_the_same_corpus(build, stop):
    with pytest.raises(KeyboardInterrupt):
        build("killed", stop=stop)
    assert build("killed").fingerprint == build("whole").fingerprint


def test_pairs_that_are_cut_are_said(build, folders):
    theirs = AutoTokenizer.from_pretrained(folders["bert"])
    lost = [len(theirs(a, b)["input_ids"]) - 16 for a, b in PAIRS]
    lost = [tokens for tokens in lost if tokens > 0]
    (line,) = [line for line in remarks(build("cache")) if "pair of texts" in line]
    told = f"{len(lost)} pairs cut, the longer text first: {sum(lost)} tokens lost"
    assert line == f"each sequence is a pair of texts: a and b; {told}"
    (line,) = [line for line in remarks(build("long", sequence_length=64)) if "texts" in line]
    assert line == "each sequence is a pair of texts: a and b"


BAD = [
    ({"a": "x", "b": " "}, "an empty text of a pair", "the field 'b' is empty"),
    ({"a": "", "b": "x"}, "an empty text of a pair", "the field 'a' is empty"),
    ({"a": "", "b": ""}, "an empty text of a pair", "the field 'a' is empty"),
    ({"a": "x"}, "no text", r"no field 'b' \(corpus\.pair_field\); it has: a"),
    ({"a": "x", "b": None}, "no text", r"the field 'b' \(corpus\.pair_field\) is null"),
    ({"a": "x", "b": 3}, "text is no string", "the field 'b' holds 3"),
    ({"a": "x", "b": "\ud800"}, "half a surrogate pair", "half of a surrogate pair"),
]


@pytest.mark.parametrize(("record", "kind", "told"), BAD)
def test_a_record_that_is_no_pair_is_a_bad_one(build, caplog, record, kind, told):
    records = [{"a": "the river", "b": "the city"}, record]
    with pytest.raises(InputError, match=rf"record 2: .*{told}"):
        build("strict", records=records)
    corpus = build("cache", records=records, on_bad_record="skip")
    assert (len(corpus), corpus.bad_records) == (1, {kind: 1})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"packing": "contiguous"}, "packing contiguous joins records.*leave packing out"),
        ({"pair_field": "a"}, "pair_field and text_field are both a; name the two texts"),
    ],
)
def test_what_makes_no_pairs_is_refused(build, values, told):
    with pytest.raises(ValueError, match=told):
        build("cache", **values)


@pytest.mark.parametrize("name", ["t.txt", "python-docs"])
def test_a_source_without_fields_is_refused(tmp_path, build, name):
    (tmp_path / "t.txt").write_text("a text")
    source = name if name == "python-docs" else str(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} has no fields.*pair_field: b.*leave pair_field"):
        build("cache", source=source)


def test_another_pair_field_is_another_corpus(tmp_path, build):
    corpus = build("cache", domain_field="of")
    assert corpus.info["config"]["pair_field"] == "b"
    assert corpus.domains == Counter("xy"[len(a) % 2] for a, _ in PAIRS)
    for field, here in ((None, "None"), ("of", "'of'")):
        with pytest.raises(CacheMismatchError, match=rf"pair_field: 'b' there, {here} here"):
            build("cache", domain_field="of", pair_field=field)
    single = build("single", pair_field=None)
    assert "pair_field" not in single.info["config"]
    assert "token_types" not in single.shard(0).table().column_names
    assert Corpus(LocalStore(tmp_path / "cache")).fingerprint == corpus.fingerprint


def test_a_text_of_a_test_in_either_field_leaves_the_pair_out(tmp_path, build, caplog):
    caplog.set_level(logging.INFO, "rekindle")
    eight = "three four five six seven eight nine ten"
    (tmp_path / "test.jsonl").write_text(json.dumps({"a": "one two", "b": eight}))
    records = [
        {"a": "One two.", "b": "the city"},
        {"a": "the river", "b": f"it is {eight} here"},
        {"a": "one", "b": "two"},
    ]
    corpus = build("cache", records=records, without=[str(tmp_path / "test.jsonl")])
    assert (len(corpus), corpus.held) == (1, HeldCounts(exact=2))
