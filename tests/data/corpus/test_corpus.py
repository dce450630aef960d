"""The corpus: the same bytes however often interrupted; no other text, tokenizer or rules."""

import gc
import json
import logging
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rekindle.data.corpus import in_order
from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.corpus.packing import packing_of
from rekindle.data.corpus.rows import BUCKETS, EncodedDocuments, rows_of_texts
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import CacheFormatError, CacheMismatchError, InputError
from rekindle.data.source.documents import read_documents
from rekindle.data.storage.columns import list_views
from rekindle.data.storage.seal import SEAL, seal
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import unit_of

PER_SHARD = 16
PACKINGS = ("document", "contiguous")


@pytest.fixture
def config(corpus_file, wordpiece):
    def make(**values):
        given = {"source": str(corpus_file), "tokenizer": str(wordpiece), "sequence_length": 24}
        return CorpusConfig(**(given | {"domain_field": "domain"} | values))

    return make


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "cache")


def contents(store):
    """The bytes of every committed shard, and of what stands beside them."""
    corpus = Corpus(store)
    shards = [corpus.shards.open(commit).source.path.read_bytes() for commit in corpus.commits]
    return shards, store.read_bytes("corpus/corpus.json"), store.read_bytes("corpus/complete.json")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus_file, wordpiece):
    """The bytes of a corpus made in one go, by packing."""
    made = {}
    for packing in PACKINGS:
        store = LocalStore(tmp_path_factory.mktemp(packing))
        config = CorpusConfig(
            source=str(corpus_file),
            tokenizer=str(wordpiece),
            sequence_length=24,
            domain_field="domain",
            packing=packing,
        )
        build_corpus(store, config, PER_SHARD)
        made[packing] = contents(store)
    return made


# --- what is in it --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_the_packed_sequences_of_the_source(store, config, packing):
    chosen = config(packing=packing)
    corpus = build_corpus(store, chosen, PER_SHARD)
    tokenizer = load_tokenizer(chosen.tokenizer)
    documents = [*read_documents(chosen.source, "text", "domain")]
    encoded = tokenizer.encoder.texts([document.text for document in documents])
    how = packing_of(tokenizer, 24, packing)
    expected, _ = rows_of_texts(EncodedDocuments(documents, *encoded), 0, how, last=True)
    assert len(corpus) == len(expected)
    assert [c.rows for c in corpus.commits[:-1]] == [PER_SHARD] * (len(corpus.commits) - 1)
    rows = [row for i in range(len(corpus.commits)) for row in corpus.shard(i).table().to_pylist()]
    for number, row in enumerate(rows):
        one = expected.part(number, number + 1)
        for name in ("input_ids", "char_starts", "word_starts", "document_starts"):
            assert row[name] == getattr(one, name).tolist(), name
        assert (row["text"], row["document"], row["domain"], row["digest"]) == (
            *one.texts,
            *one.documents,
            *one.domains,
            *one.digests,
        )
        assert [row["span_start"], row["span_end"]] == one.spans[0].tolist()
        assert 0 <= row["bucket"] < BUCKETS
    assert corpus.tokens == len(expected.input_ids)
    assert corpus.domains == Counter(expected.domains)
    assert len({row["digest"] for row in rows}) == len({(r["text"], *r["input_ids"]) for r in rows})


def test_every_sequence_number_is_located(store, config):
    corpus = build_corpus(store, config(), PER_SHARD)
    shards, rows = corpus.locate(np.arange(len(corpus)))
    expected = [(s, r) for s, c in enumerate(corpus.commits) for r in range(c.rows)]
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == expected
    assert [corpus.first(s) + r for s, r in expected] == list(range(len(corpus)))
    for outside in (-1, len(corpus)):
        with pytest.raises(IndexError, match=rf"0\.\.{len(corpus) - 1}"):
            corpus.locate(np.array([outside]))


def test_the_sequences_of_a_document_share_their_bucket(store, config):
    corpus = build_corpus(store, config(), PER_SHARD)
    tables = [corpus.shard(i).table() for i in range(len(corpus.commits))]
    pairs = {(r["document"], r["bucket"]) for table in tables for r in table.to_pylist()}
    assert len(pairs) == len({n for n, _ in pairs}) == 40


def test_the_tokenizer_is_kept(store, config, wordpiece):
    build_corpus(store, config(), PER_SHARD)
    kept, given = Corpus(store).tokenizer, load_tokenizer(str(wordpiece))
    assert (kept.digest, kept.size, kept.mask_id) == (given.digest, given.size, given.mask_id)
    texts = ["Students learn quickly.", "teacher"]
    for ours, theirs in zip(kept.encode(texts), given.encode(texts), strict=True):
        assert np.array_equal(ours.ids, theirs.ids)


def test_shards_describe_themselves(store, config):
    corpus = build_corpus(store, config(), PER_SHARD)
    for number in range(len(corpus.commits)):
        about = corpus.shard(number).metadata
        assert (about["kind"], about["shard"]) == ("corpus", number)
        assert about["config"] == corpus.info["config"]
        assert about["tokenizer"] == corpus.info["tokenizer"]


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_same_configuration_gives_the_same_bytes(store, config, packing, uninterrupted):
    build_corpus(store, config(packing=packing), PER_SHARD)
    assert contents(store) == uninterrupted[packing]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("packing", PACKINGS)
def test_killed_after_any_shard_and_resumed_gives_the_same_bytes(
    tmp_path, config, packing, uninterrupted
):
    count = len(uninterrupted[packing][0])
    assert count > 5
    for shard in range(count):
        store = LocalStore(tmp_path / str(shard))
        done = []

        def stop(sequences, tokens, done=done, shard=shard):
            done.append(sequences)
            if len(done) > shard:
                raise Killed

        with pytest.raises(Killed):
            build_corpus(store, config(packing=packing), PER_SHARD, stop)
        half = Corpus(store)
        assert len(half.commits) == shard + 1
        assert not half.complete
        more = []
        build_corpus(
            store, config(packing=packing), PER_SHARD, lambda s, t, more=more: more.append(s)
        )
        assert len(more) == count - shard - 1  # only what was missing
        assert contents(store) == uninterrupted[packing]


@pytest.mark.parametrize("packing", PACKINGS)
def test_killed_at_every_single_shard_gives_the_same_bytes(store, config, packing, uninterrupted):
    def stop(sequences, tokens):
        raise Killed

    for _ in uninterrupted[packing][0]:
        with pytest.raises(Killed):
            build_corpus(store, config(packing=packing), PER_SHARD, stop)
    build_corpus(store, config(packing=packing), PER_SHARD)
    assert contents(store) == uninterrupted[packing]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("complete", [True, False])
def test_any_shard_that_is_taken_away_is_made_again(
    tmp_path, config, packing, complete, uninterrupted
):
    """As the error about a damaged shard advises: delete its commit record and run again."""
    count = len(uninterrupted[packing][0])
    for gone in ([0], [count - 1], [1, 3], list(range(count))):
        store = LocalStore(tmp_path / "-".join(map(str, gone)))
        build_corpus(store, config(packing=packing), PER_SHARD)
        for shard in gone:
            (store.root / f"corpus/commits/{unit_of(shard)}.json").unlink()
        if complete:  # and if not, the last shards are like those that were never made
            with pytest.raises(CacheFormatError, match=f"lacks shard {gone[0]};"):
                Corpus(store)
        else:
            (store.root / "corpus/complete.json").unlink()
        made = []
        build_corpus(
            store, config(packing=packing), PER_SHARD, lambda s, t, made=made: made.append(s)
        )
        assert len(made) == len(gone)
        assert contents(store) == uninterrupted[packing]


def test_two_writers_at_once_make_one_corpus(store, config, uninterrupted):
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(build_corpus, store, config(), PER_SHARD) for _ in range(2)]
        first, second = (future.result().fingerprint for future in both)
    assert first == second
    assert contents(store) == uninterrupted["document"]
    data = list((store.root / "corpus/data").iterdir())
    assert len(data) == len(uninterrupted["document"][0])  # the loser's files are gone


SCRIPT = """
import sys
from pathlib import Path
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.storage.store import LocalStore
root, source, tokenizer = sys.argv[1:]
config = CorpusConfig(source=source, tokenizer=tokenizer, sequence_length=24, domain_field="domain")
print(build_corpus(LocalStore(Path(root)), config, 16).fingerprint)
"""


@pytest.mark.slow
def test_two_processes_at_once_make_one_corpus(store, corpus_file, wordpiece, uninterrupted):
    arguments = [str(store.root), str(corpus_file), str(wordpiece)]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
        )
        for seed in (1, 2)
    ]
    first, second = (process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    assert contents(store) == uninterrupted["document"]
    data = list((store.root / "corpus/data").iterdir())
    assert len(data) == len(uninterrupted["document"][0])  # the loser's files are gone


# --- limits and emptiness -------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 30, 10**6])
def test_limit_sequences(tmp_path, config, limit, uninterrupted):
    store = LocalStore(tmp_path / "a")
    corpus = build_corpus(store, config(limit_sequences=limit), PER_SHARD)
    assert corpus.complete
    everything = LocalStore(tmp_path / "b")
    whole = build_corpus(everything, config(), PER_SHARD)
    assert len(corpus) == min(limit, len(whole))
    ours, theirs = (
        [d for i in range(len(c.commits)) for d in c.shard(i).table()["digest"].to_pylist()]
        for c in (corpus, whole)
    )
    assert ours == theirs[:limit]


def test_an_interrupted_corpus_with_a_limit_ends_at_the_limit(tmp_path, config):
    chosen = config(limit_sequences=40)
    stores = [LocalStore(tmp_path / name) for name in "ab"]

    def stop(sequences, tokens):
        raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            build_corpus(stores[0], chosen, PER_SHARD, stop)
    for store in stores:
        assert len(build_corpus(store, chosen, PER_SHARD)) == 40
    assert contents(stores[0]) == contents(stores[1])


def test_a_source_without_text_is_an_error_and_does_not_claim_the_cache(
    tmp_path, store, config, corpus_file
):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n\n")
    with pytest.raises(InputError, match=r"the corpus is empty: .*empty\.txt.* a token"):
        build_corpus(store, config(source=str(empty), domain_field=None), PER_SHARD)
    with pytest.raises(InputError, match="no field 'txt'"):
        build_corpus(store, config(text_field="txt"), PER_SHARD)
    with pytest.raises(CacheFormatError, match="holds no corpus"):
        Corpus(store)
    assert len(build_corpus(store, config(), PER_SHARD))  # the mistake put right, the path is free


# --- another corpus, another tokenizer, another text ----------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sequence_length": 32}, "sequence_length: 24 there, 32 here"),
        ({"packing": "contiguous"}, "packing: 'document' there, 'contiguous' here"),
        ({"limit_sequences": 5}, "limit_sequences: None there, 5 here"),
        ({"domain_field": None}, "domain_field: 'domain' there, None here"),
    ],
)
def test_another_configuration_is_refused_by_name(store, config, values, told):
    build_corpus(store, config(), PER_SHARD)
    before = contents(store)
    with pytest.raises(CacheMismatchError, match=told):
        build_corpus(store, config(**values), PER_SHARD)
    assert contents(store) == before


def test_another_shard_size_is_refused_by_name(store, config):
    build_corpus(store, config(), PER_SHARD)
    with pytest.raises(CacheMismatchError, match="sequences_per_shard: 16 there, 13 here"):
        build_corpus(store, config(), 13)


def test_another_tokenizer_is_refused(store, config, bytelevel):
    build_corpus(store, config(), PER_SHARD)
    with pytest.raises(CacheMismatchError, match="another tokenizer"):
        build_corpus(store, config(tokenizer=str(bytelevel)), PER_SHARD)


def test_an_exchanged_tokenizer_is_noticed(store, config, bytelevel):
    build_corpus(store, config(), PER_SHARD)
    folder = store.root / "corpus/tokenizer"
    for file in folder.iterdir():
        file.unlink()
    load_tokenizer(str(bytelevel)).save(str(folder))
    with pytest.raises(CacheFormatError, match=r"tokenizer\.json is damaged"):
        assert Corpus(store).tokenizer
    (store.root / "corpus/tokenizer.json").unlink()  # as in format 1
    with pytest.raises(CacheMismatchError, match="not the tokenizer the corpus was made with"):
        assert Corpus(store).tokenizer


def changes(text):
    """Ways to change a file: longer, shorter, of the same length at its begin, middle and end."""
    middle = len(text) // 2
    yield text + '{"text": "More.", "domain": "odd"}\n'
    yield text[: text.rindex("\n", 0, -1) + 1]
    for place in (text.index("the"), text.index("the", middle), text.rindex("the")):
        yield text[:place] + "teh" + text[place + 3 :]


@pytest.mark.parametrize("complete", [True, False])
def test_a_changed_source_is_refused(tmp_path, store, config, corpus_file, complete):
    """Half-made above all: its rest would be cut from another text."""
    source = tmp_path / "docs.jsonl"
    text = corpus_file.read_text()
    source.write_text(text)
    chosen = config(source=str(source))

    def stop(sequences, tokens):
        raise Killed

    with pytest.raises(Killed):
        build_corpus(store, chosen, PER_SHARD, stop)
    if complete:
        build_corpus(store, chosen, PER_SHARD)
    for changed in changes(text):
        source.write_text(changed)
        with pytest.raises(CacheMismatchError, match=r"source has changed.*docs\.jsonl"):
            build_corpus(store, chosen, PER_SHARD)
    source.write_text(text)  # another time of modification is no change
    build_corpus(store, chosen, PER_SHARD)


def test_a_finished_corpus_outlives_its_source(tmp_path, store, config, corpus_file, caplog):
    source = tmp_path / "docs.jsonl"
    source.write_bytes(corpus_file.read_bytes())
    chosen = config(source=str(source))
    built = build_corpus(store, chosen, PER_SHARD)
    source.unlink()
    with caplog.at_level(logging.INFO, "rekindle"):
        again = build_corpus(store, chosen, PER_SHARD)
    assert again.fingerprint == built.fingerprint
    assert "no longer exists" in caplog.text


def test_an_edited_description_is_noticed_when_a_shard_is_read(store, config):
    """Every shard repeats what corpus.json says."""
    build_corpus(store, config(), PER_SHARD)
    path = store.root / "corpus/corpus.json"
    info = json.loads(path.read_text())
    del info[SEAL]
    for part, key in (("tokenizer", "mask_id"), ("config", "sequence_length")):
        changed = json.loads(json.dumps(info))
        changed[part][key] += 1
        path.write_bytes(seal(changed))
        with pytest.raises(CacheMismatchError, match=rf"differently from corpus \(in: {part}\)"):
            Corpus(store).shard(0)


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"shards": "x"}', "oops"])
def test_a_damaged_end_mark_is_named(store, config, content):
    build_corpus(store, config(), PER_SHARD)
    (store.root / "corpus/complete.json").write_text(content)
    with pytest.raises(CacheFormatError, match=r"complete\.json is damaged"):
        Corpus(store)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"config": {}}', "oops"])
def test_a_damaged_description_is_named(store, config, content):
    build_corpus(store, config(), PER_SHARD)
    (store.root / "corpus/corpus.json").write_text(content)
    with pytest.raises(CacheFormatError, match=r"corpus\.json is damaged"):
        build_corpus(store, config(), PER_SHARD)


def test_there_is_no_corpus(store):
    with pytest.raises(CacheFormatError, match="holds no corpus"):
        Corpus(store)


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
def test_memory_stays_flat(tmp_path, config, packing, monkeypatch):
    """A corpus twenty times as long takes no more memory to make."""
    monkeypatch.setattr(in_order, "cores", lambda: 2)  # each of which has some text in hand

    def peak(documents):
        source = tmp_path / f"{documents}.txt"
        text = "The river runs over the city and the teacher writes a paper. " * 20
        source.write_text("\n\n".join(f"{n} {text}" for n in range(documents)))
        chosen = config(source=str(source), packing=packing, domain_field=None, sequence_length=256)
        gc.collect()
        tracemalloc.start()
        build_corpus(LocalStore(tmp_path / f"cache-{documents}"), chosen, 128)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(50)  # what is imported and cached on first use
    short, long = peak(1000), peak(20_000)
    assert Path(tmp_path / "20000.txt").stat().st_size > 19 * (tmp_path / "1000.txt").stat().st_size
    assert long < 1.5 * short + (4 << 20)


def test_sequences_have_one_row_per_token_in_every_list(store, config):
    corpus = build_corpus(store, config(), PER_SHARD)
    for number in range(len(corpus.commits)):
        batch = corpus.shard(number).batch(0)
        lengths = {
            name: np.diff(list_views(batch[name], name)[0]).tolist()
            for name in ("input_ids", "char_starts", "word_starts")
        }
        assert lengths["input_ids"] == lengths["char_starts"] == lengths["word_starts"]
        assert max(lengths["input_ids"]) <= 24
