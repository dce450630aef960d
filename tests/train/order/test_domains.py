"""The ranges of domains, against the domains that the rows themselves have."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.storage.store import open_store
from rekindle.train.order.domains import check_domains, domain_ranges


def numbers_of(ranges):
    return ranges.select(np.arange(len(ranges), dtype=np.int64)).tolist()


def build(folder, tokenizer, domains, sequences_per_shard=4, field="domain"):
    """A corpus of short documents, each a sequence, of these domains."""
    source = folder / "docs.jsonl"
    lines = [{"text": f"number {n} runs."} | ({"domain": d} if d else {}) for n, d in domains]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = CorpusConfig(
        source=[str(source)], tokenizer=str(tokenizer), sequence_length=16, domain_field=field
    )
    return build_corpus(open_store(str(folder / "cache")), config, sequences_per_shard)


@pytest.mark.parametrize(
    "pattern", ["aaaabbbbcccc", "abcabcabcab", "aaaaaaaabb.b", "a..bb..aa...b"]
)
def test_every_sequence_is_in_the_ranges_of_its_domain(tmp_path, wordpiece, pattern):
    """Also where it is not asked for a domain, here that of the dots."""
    found = list(pattern)
    corpus = build(tmp_path, wordpiece, list(enumerate(found)))
    assert len(corpus) == len(pattern)
    names = sorted(set(found) - {"."})
    ranges = domain_ranges(corpus, names)
    for name in names:
        assert numbers_of(ranges[name]) == [n for n, d in enumerate(found) if d == name]
        touching = ranges[name].bounds[1:, 0] == ranges[name].bounds[:-1, 1]
        assert not touching.any()
    one = domain_ranges(corpus, [names[-1], names[-1]])
    assert numbers_of(one[names[-1]]) == numbers_of(ranges[names[-1]])


def test_shards_that_lie_in_one_domain_are_not_opened(tmp_path, wordpiece, monkeypatch):
    corpus = build(tmp_path, wordpiece, list(enumerate("aaaabbbbabab")))
    opened = []
    real = corpus.shard
    monkeypatch.setattr(corpus, "shard", lambda number: opened.append(number) or real(number))
    assert numbers_of(domain_ranges(corpus, ["b"])["b"]) == [4, 5, 6, 7, 9, 11]
    assert set(opened) == {2}


def test_unknown_domains_are_refused_with_those_there_are(tmp_path, wordpiece):
    corpus = build(tmp_path, wordpiece, list(enumerate("aaab")))
    check_domains(corpus, ["a", "b"], "train.domains")
    with pytest.raises(InputError, match=r"train\.domains.*'c'.*a \(3 sequences\), b \(1"):
        check_domains(corpus, ["a", "c"], "train.domains")


def test_a_corpus_without_domains_says_which_key_makes_them(tmp_path, wordpiece):
    corpus = build(tmp_path, wordpiece, [(n, None) for n in range(3)], field=None)
    check_domains(corpus, [], "train.domains")
    with pytest.raises(InputError, match=r"corpus\.domain_field"):
        check_domains(corpus, ["a"], "train.domains")


def test_rows_that_are_not_what_their_record_counts_are_refused(tmp_path, wordpiece):
    corpus = build(tmp_path, wordpiece, list(enumerate("abab")))
    commit = corpus.commits[0]
    corpus.commits_by_unit.add(replace(commit, facts=commit.facts | {"domains": {"a": 1, "b": 3}}))
    with pytest.raises(CacheFormatError, match="commit record counts"):
        domain_ranges(corpus, ["a", "b"])
