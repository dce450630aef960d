"""Views: stored masks are the computed ones, replicas extend, pairs are what their kind says."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import CacheFormatError, CacheMismatchError
from rekindle.data.source.documents import read_documents
from rekindle.data.source.sentences import split_sentences
from rekindle.data.storage.store import LocalStore
from rekindle.data.storage.units import unit_of
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import (
    MaskConfig,
    Masker,
    generator,
)
from rekindle.data.views.pairs import PairView, make_pairs
from rekindle.data.views.reader import ViewReader

PER_SHARD = 150  # two record batches in the first shard
MASKS = [
    MaskConfig(),
    MaskConfig(unit="span", probability=0.3, mask_token=0.5, random_token=0.5),
    MaskConfig(policy="cover", unit="word"),
]


def corpus_in(root, source, tokenizer, **values):
    given_values = {"sequence_length": 10, "domain_field": "domain"} | values
    config = CorpusConfig(source=str(source), tokenizer=str(tokenizer), **given_values)
    return build_corpus(LocalStore(root), config, PER_SHARD)


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus_file, wordpiece):
    """A finished corpus that no test writes into."""
    return corpus_in(tmp_path_factory.mktemp("made") / "cache", corpus_file, wordpiece)


@pytest.fixture
def corpus(made, tmp_path):
    """A copy of it to write views into."""
    shutil.copytree(made.store.root, tmp_path / "cache")
    return Corpus(LocalStore(tmp_path / "cache"))


def rows(corpus):
    out = []
    for number in range(len(corpus.commits)):
        out += corpus.shard(number).table().to_pylist()
    return out


def view_rows(corpus, name, replica=None):
    reader = ViewReader(corpus, name)
    out = []
    for shard in range(len(corpus.commits)):
        for index in range(corpus.shard(shard).batch_count):
            out += reader.batch(shard, index, replica).to_pylist()
    return out


def units(view):
    """The bytes of each committed unit."""
    return {
        unit: view.shards.open(commit).source.path.read_bytes()
        for unit, commit in view.shards.committed().items()
    }


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", MASKS)
def test_stored_masks_are_the_computed_ones(corpus, config):
    view = MaskedView(corpus, config, 5, 3)
    view.build()
    assert len(corpus.commits) > 1
    assert corpus.shard(0).batch_count > 1
    assert ViewReader(corpus, view.name).replicas == 3
    for replica in range(3):
        stored = view_rows(corpus, view.name, replica)
        for row, found in zip(rows(corpus), stored, strict=True):
            masker = Masker(config, 5, 3, view.masker.mask_id, view.masker.content_ids)
            content, words = np.array(row["char_starts"]) >= 0, np.array(row["word_starts"])
            chosen = masker.positions(content, words, row["digest"], replica)
            ids = np.array(row["input_ids"], np.int32)
            computed = masker.replacements(ids, chosen, row["digest"], replica)
            assert found["digest"] == row["digest"]
            assert found["positions"] == chosen.tolist()
            assert found["input_ids"] == computed.tolist()


def test_no_special_token_is_masked_and_none_stands_in(corpus):
    view = MaskedView(corpus, MaskConfig(probability=0.5), 0, 2)
    view.build()
    special = set(corpus.info["tokenizer"]["special_ids"])
    mask_id = corpus.info["tokenizer"]["mask_id"]
    for replica in range(2):
        stored = view_rows(corpus, view.name, replica)
        for row, found in zip(rows(corpus), stored, strict=True):
            assert not {row["input_ids"][p] for p in found["positions"]} & (special - {1})
            assert all(row["char_starts"][p] >= 0 for p in found["positions"])
            assert not set(found["input_ids"]) & (special - {mask_id, 1})  # 1: [UNK] that was kept


@pytest.mark.parametrize("config", MASKS[:2])
def test_adding_replicas_extends_the_view_and_leaves_what_is_there(corpus, config):
    first = MaskedView(corpus, config, 0, 2)
    first.build()
    before = units(first)
    more = MaskedView(corpus, config, 0, 4)
    assert more.name == first.name
    more.build()
    after = units(more)
    assert {unit: after[unit] for unit in before} == before
    assert len(after) == 2 * len(before)
    assert ViewReader(corpus, more.name).replicas == 4
    fewer = MaskedView(corpus, config, 0, 1)
    fewer.build()
    assert units(fewer) == after


def test_more_replicas_of_a_cover_are_another_view(corpus):
    """It deals the tokens out over all replicas: none of the old masks is one of the new."""
    two, three = (MaskedView(corpus, MaskConfig(policy="cover"), 0, count) for count in (2, 3))
    assert two.name != three.name
    two.build()
    three.build()
    for view in (two, three):
        masked = Counter()
        for replica in range(view.replicas):
            for number, found in enumerate(view_rows(corpus, view.name, replica)):
                masked.update((number, position) for position in found["positions"])
        content = sum(sum(c >= 0 for c in row["char_starts"]) for row in rows(corpus))
        assert len(masked) == content
        assert set(masked.values()) == {1}


def test_everything_that_decides_a_mask_is_in_its_name(corpus):
    names = [
        MaskedView(corpus, config, seed, 4).name
        for config in [*MASKS, MaskConfig(probability=0.2), MaskConfig(mask_token=0.7)]
        for seed in (0, 1)
    ]
    assert len(set(names)) == len(names)
    assert (
        MaskedView(corpus, MaskConfig(), 0, 4).name == MaskedView(corpus, MaskConfig(), 0, 9).name
    )


def test_killed_while_building_and_resumed_gives_the_same_bytes(corpus, monkeypatch):
    whole = MaskedView(corpus, MaskConfig(), 0, 3)
    whole.build()
    expected = units(whole)
    shutil.rmtree(corpus.store.root / "views")
    view = MaskedView(corpus, MaskConfig(), 0, 3)
    write = view.shards.write
    for count in range(len(expected)):
        left = [count > 0]

        def once(*args, left=left, **options):
            if not left.pop():
                raise KeyboardInterrupt
            left.append(False)
            return write(*args, **options)

        monkeypatch.setattr(view.shards, "write", once)
        with pytest.raises(KeyboardInterrupt):
            view.build()
        assert len(units(view)) == count
    monkeypatch.setattr(view.shards, "write", write)
    view.build()
    assert units(view) == expected


def test_a_view_that_is_half_made_says_what_is_missing(corpus):
    view = MaskedView(corpus, MaskConfig(), 0, 2)
    view.build()
    unit = unit_of(len(corpus.commits) - 1, 1)
    (corpus.store.root / f"views/{view.name}/commits/{unit}.json").unlink()
    reader = ViewReader(corpus, view.name)
    assert reader.replicas == 1
    assert reader.has(0, 1)
    assert not reader.has(len(corpus.commits) - 1, 1)
    with pytest.raises(CacheFormatError, match=f"no unit {unit}; run `pipeline cache-teachers`"):
        reader.batch(len(corpus.commits) - 1, 0, 1)


def test_a_view_of_another_corpus_is_refused(tmp_path, corpus, corpus_file, wordpiece):
    """The same configuration over other text: equal names, other digests."""
    source = tmp_path / "other.jsonl"
    source.write_text(corpus_file.read_text().replace("teacher", "student"))
    other = corpus_in(tmp_path / "other", source, wordpiece)
    view = MaskedView(corpus, MaskConfig(), 0, 1)
    view.build()
    assert MaskedView(other, MaskConfig(), 0, 1).name == view.name
    shutil.copytree(corpus.store.root / "views", other.store.root / "views")
    with pytest.raises(CacheMismatchError, match=r"row \d+ of record batch 0 does not belong"):
        view_rows(other, view.name, 0)


def test_the_shards_of_another_view_are_refused(corpus):
    """Copied by hand from one folder to the other: same rows, other masks."""
    ours, theirs = (MaskedView(corpus, MaskConfig(), seed, 1) for seed in (0, 1))
    ours.build()
    theirs.build()
    root = corpus.store.root / "views"
    shutil.rmtree(root / ours.name)
    shutil.copytree(root / theirs.name, root / ours.name)
    with pytest.raises(CacheMismatchError, match=r"\(in: view\)"):
        ViewReader(corpus, ours.name).batch(0, 0, 0)
    replicas = MaskedView(corpus, MaskConfig(), 1, 2)
    replicas.build()
    commits = root / theirs.name / "commits"
    for path in commits.glob("*-r001.json"):
        path.unlink()
    body = json.loads((commits / "00000-r000.json").read_text())
    assert body["unit"] == "00000-r000"  # a record that is only renamed is refused as such
    (commits / "00000-r001.json").write_text(json.dumps(body))
    with pytest.raises(CacheFormatError, match="names unit"):
        ViewReader(corpus, theirs.name)


def test_an_empty_cache_has_no_replicas(corpus):
    for path in (corpus.store.root / "corpus").glob("commits/*.json"):
        path.unlink()
    (corpus.store.root / "corpus/complete.json").unlink()
    assert ViewReader(Corpus(corpus.store), "masked-0").replicas == 0


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["document", "contiguous"])
@pytest.mark.parametrize("kind", ["adjacent", "same-document", "random"])
def test_pairs_are_what_their_kind_says(tmp_path, corpus_file, wordpiece, packing, kind):
    """Told by the documents themselves: every sentence is looked up in the source."""
    corpus = corpus_in(tmp_path / "c", corpus_file, wordpiece, packing=packing, sequence_length=48)
    view = PairView(corpus, kind, 0)
    view.build()
    documents = {d.id: d.text for d in read_documents([str(corpus_file)])}
    found = list(zip(rows(corpus), view_rows(corpus, view.name), strict=True))
    pairs = [(row, pair) for row, pair in found if pair["text_a"] is not None]
    assert len(pairs) > len(found) / 2
    for row, pair in pairs:
        a, b = pair["text_a"], pair["text_b"]
        assert a in row["text"]
        of_a, of_b = ({name for name, text in documents.items() if t in text} for t in (a, b))
        if kind == "adjacent":
            assert f"{a} {b}" in row["text"]
            assert of_a & of_b
        elif kind == "same-document":
            assert row["document"] in of_a & of_b
            assert a != b or documents[row["document"]].count(a) > 1
        else:
            assert row["document"] in of_a
            assert of_b - {row["document"]}


def test_a_pair_is_encoded_as_the_tokenizer_joins_pairs(corpus):
    view = PairView(corpus, "random", 0)
    view.build()
    tokenizer = corpus.tokenizer
    for row in view_rows(corpus, view.name):
        if row["text_a"] is None:
            assert row["input_ids"] == row["token_types"] == []
            assert row["text_b"] is None
            continue
        ids, types = tokenizer.encode_pair(row["text_a"], row["text_b"], 10)
        assert row["input_ids"] == ids.tolist()
        assert row["token_types"] == types.tolist()
        assert len(ids) <= 10
        assert set(types.tolist()) == {0, 1}


def test_pairs_of_an_older_cache_go_on_as_they_were_begun(corpus):
    """Their view has the name it had; a new one says how it cuts, and is another."""
    former = PairView(corpus, "random", 0, cut=1)
    golden = Path(__file__).parents[2] / "golden/cache-v2"
    old = Corpus(LocalStore(golden))
    kept = [path.name for path in (golden / "views").glob("pairs-*")]
    assert [PairView.as_stored(old, "adjacent", 0, old.store).name] == kept
    new = PairView.as_stored(corpus, "random", 0, corpus.store)
    assert new.name != former.name
    new.build()
    assert PairView.cut_of(ViewReader(corpus, new.name).identity) == 2
    former.build()
    again = PairView.as_stored(corpus, "random", 0, corpus.store)
    assert (again.name, again.cut) == (former.name, 1)
    reader = ViewReader(corpus, again.name)
    assert PairView.cut_of(reader.identity) == 1
    differ = 0
    for row, other in zip(view_rows(corpus, former.name), view_rows(corpus, new.name), strict=True):
        if row["text_a"] is not None:
            ids, _ = corpus.tokenizer.encode_pair(row["text_a"], row["text_b"], 10, cut=1)
            assert row["input_ids"] == ids.tolist()
            differ += row["input_ids"] != other["input_ids"]
    assert differ > 0


def test_rows_without_a_pair_are_null(tmp_path, wordpiece):
    """One sentence in all: nothing beside it, nothing else of its document, no other document."""
    source = tmp_path / "one.txt"
    source.write_text("The teacher reads.")
    corpus = corpus_in(tmp_path / "c", source, wordpiece, domain_field=None)
    for kind in ("adjacent", "same-document", "random"):
        view = PairView(corpus, kind, 0)
        view.build()
        (row,) = view_rows(corpus, view.name)
        assert (row["text_a"], row["text_b"], row["input_ids"]) == (None, None, [])


def test_other_seeds_and_kinds_are_other_views(corpus):
    names = {PairView(corpus, k, s).name for k in ("adjacent", "random") for s in (0, 1)}
    assert len(names) == 4


texts = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(shape=texts, owners=st.data(), kind=st.sampled_from(["adjacent", "same-document", "random"]))
def test_a_pair_is_made_wherever_there_is_one(shape, owners, kind):
    """Rows of up to three parts with up to four sentences each, of any document: none is missed."""
    count = len(shape)
    documents = owners.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    parts = [
        [" ".join(f"S{row}x{part}x{n}." for n in range(size)) for part, size in enumerate(sizes)]
        for row, sizes in enumerate(shape)
    ]
    generators = [generator("test", 0, str(row)) for row in range(count)]
    pairs = make_pairs(parts, documents, generators, kind)
    own = [[row[0][a:b] for a, b in split_sentences(row[0])] for row in parts]
    for row, pair in enumerate(pairs):
        same = kind == "same-document"
        if kind == "adjacent":
            possible = any(size > 1 for size in shape[row])
        else:
            partners = [
                sentence
                for other in range(count)
                if (documents[other] == documents[row]) == same
                for sentence in own[other]
            ]
            possible = bool(own[row]) and len(partners) > same
        assert (pair is not None) == possible
        if pair is None:
            continue
        a, b = (tuple(int(n) for n in t[1:-1].split("x")) for t in pair)
        assert a[0] == row
        if kind == "adjacent":
            assert b == (a[0], a[1], a[2] + 1)
        else:
            assert a[1] == b[1] == 0
            assert a != b
            assert (documents[b[0]] == documents[row]) == same


def test_every_partner_is_equally_likely():
    parts = [[f"S{row}." for _ in range(1)] for row in range(8)]
    documents = list("aabbbbcc")
    counts = Counter()
    for seed in range(1200):
        generators = [generator("test", seed, str(row)) for row in range(8)]
        counts[make_pairs(parts, documents, generators, "random")[2][1]] += 1
    assert set(counts) == {"S0.", "S1.", "S6.", "S7."}
    assert all(240 < n < 360 for n in counts.values())


def test_pairs_do_not_depend_on_the_process(corpus):
    first = PairView(corpus, "same-document", 3)
    first.build()
    before = units(first)
    shutil.rmtree(corpus.store.root / "views")
    again = PairView(Corpus(corpus.store), "same-document", 3)
    again.build()
    assert units(again) == before
    assert load_tokenizer(str(corpus.store.root / "corpus/tokenizer")).digest
