"""What marks the end of a text, and special tokens that are written in one."""

import json

import pytest

from rekindle.data.corpus import config as corpus_config
from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.corpus.remarks import end_of_text, remarks, special_names
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import CacheMismatchError
from rekindle.data.storage.store import LocalStore
from testlib.vocabularies.changed import that_begins_only

PER_SHARD = 4


@pytest.fixture(scope="module")
def begins(tmp_path_factory, bytelevel):
    return that_begins_only(bytelevel, tmp_path_factory.mktemp("begins") / "tokenizer")


@pytest.fixture
def build(tmp_path, corpus_file):
    def make(tokenizer, name="cache", **values):
        given = {"source": str(corpus_file), "tokenizer": str(tokenizer), "sequence_length": 24}
        chosen = CorpusConfig(**(given | values))
        return build_corpus(LocalStore(tmp_path / name), chosen, PER_SHARD)

    return make


def rows(corpus):
    return [row for n in range(len(corpus.commits)) for row in corpus.shard(n).table().to_pylist()]


def test_each_document_ends_where_the_tokenizer_only_begins_one(build, begins):
    corpus = build(begins)
    assert corpus.info["config"]["end_of_text"] is True
    end = end_of_text(corpus)
    assert end == load_tokenizer(str(begins)).eos_id
    last = {row["document"]: row for row in rows(corpus)}
    ended = [row["input_ids"][-1] == end for row in last.values()]
    full = [len(row["input_ids"]) == 24 for row in last.values()]
    assert all(here or there for here, there in zip(ended, full, strict=True))
    assert sum(ended) > len(ended) * 0.8
    inside = [row["input_ids"][:-1] for row in rows(corpus)]
    assert not any(end in ids for ids in inside)
    assert any("comes after each document" in line for line in remarks(corpus))


def test_a_corpus_that_was_begun_without_goes_on_so(build, begins, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(corpus_config, "lacks_end", lambda tokenizer: False)
        build(begins, limit_sequences=9)
        whole = rows(build(begins, "whole", limit_sequences=30))
    with caplog.at_level("INFO", "rekindle"):
        grown = build(begins, limit_sequences=30)
    assert "begun without end-of-text tokens" in caplog.text
    assert rows(grown) == whole
    assert "end_of_text" not in grown.info["config"]
    assert end_of_text(grown) is None
    assert rows(build(begins, "new", limit_sequences=30)) != whole


@pytest.mark.parametrize("name", ["wordpiece", "bytelevel"])
@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_corpora_of_other_tokenizers_are_described_as_ever(build, request, name, packing):
    """Their bytes, too, are those of every version."""
    corpus = build(request.getfixturevalue(name), packing=packing)
    assert {*corpus.info["config"]} == {
        *("source", "text_field", "domain_field", "sequence_length", "packing"),
        *("limit_sequences", "sequences_per_shard"),
    }
    assert (end_of_text(corpus) is None) == (name == "wordpiece")


# --- special tokens in the text -------------------------------------------------------------------


@pytest.fixture
def named(tmp_path):
    """Five of eleven documents hold names of special tokens, some of them long."""
    path = tmp_path / "named.jsonl"
    with path.open("w") as file:
        for number in range(11):
            special = "<|endoftext|> [MASK]" if number % 2 else "plain"
            text = "the river runs. " * (1 + number) + special + " a city falls."
            file.write(json.dumps({"id": f"d{number}", "text": text}) + "\n")
    return str(path)


@pytest.mark.parametrize("mode", ["text", "token"])
def test_names_in_the_text_are_counted_and_read_as_was_chosen(build, bytelevel, named, mode):
    corpus = build(bytelevel, source=named, special_tokens=mode)
    assert special_names(corpus) == 5
    assert len(corpus.commits) > 3
    (line,) = [line for line in remarks(corpus) if "names of special tokens" in line]
    assert "in their text: 5;" in line
    assert ("these tokens" if mode == "token" else "as text") in line
    end = end_of_text(corpus)
    inside = sum(row["input_ids"][:-1].count(end) for row in rows(corpus))
    assert inside == (5 if mode == "token" else 0)


def test_the_count_is_that_of_a_corpus_made_in_one_go(build, bytelevel, named, tmp_path):
    whole = build(bytelevel, "whole", source=named)
    counts = [commit.facts.get("special_names", 0) for commit in whole.commits]
    build(bytelevel, source=named, limit_sequences=6)
    grown = build(bytelevel, source=named)
    assert special_names(grown) == sum(counts) == 5
    (tmp_path / "whole/corpus/commits/00001.json").unlink()
    again = build(bytelevel, "whole", source=named)
    assert [commit.facts.get("special_names", 0) for commit in again.commits] == counts


def test_a_corpus_keeps_how_it_reads_them(build, bytelevel, named, tmp_path):
    corpus = build(bytelevel, source=named, special_tokens="token")
    with pytest.raises(CacheMismatchError, match="special_tokens: 'token' there, 'text' here"):
        build(bytelevel, source=named)
    reopened = Corpus(LocalStore(tmp_path / "cache"))
    text = "a <|endoftext|> b"
    assert end_of_text(corpus) in reopened.tokenizer.encode([text])[0].ids
    assert end_of_text(corpus) not in load_tokenizer(str(bytelevel)).encode([text])[0].ids
