"""Which sequences are held out: whole documents, evenly over a corpus of any size and history."""

import tracemalloc
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.store import open_store
from rekindle.train.order.held_out import MOST_DOCUMENTS, PLACES, Ranges, split_corpus

ROOM = 10  # tokens of a sequence of the fakes


def everything(ranges):
    return ranges.select(np.arange(len(ranges), dtype=np.int64))


def sides(split):
    return set(everything(split.train).tolist()), set(everything(split.held_out).tolist())


# --- ranges ---


def ranges_of(lengths):
    """Ranges from alternating lengths of what is left out and what is in."""
    edges = np.cumsum([0, *lengths])
    return Ranges(list(zip(edges[1::2].tolist(), edges[2::2].tolist(), strict=False)))


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 9))
def test_ranges_are_an_index_array_and_their_complement_the_rest(lengths, beyond):
    lengths = lengths[: len(lengths) // 2 * 2]
    ranges, size = ranges_of(lengths), sum(lengths) + beyond
    inside = np.concatenate([np.zeros(0, int), *(np.arange(a, b) for a, b in ranges.bounds)])
    assert len(ranges) == len(inside) == sum(lengths[1::2])
    assert np.array_equal(everything(ranges), inside)
    shuffled = np.random.default_rng(0).permutation(len(inside))
    assert np.array_equal(ranges.select(shuffled), inside[shuffled])
    rest = ranges.complement(size)
    assert np.array_equal(
        np.sort(np.concatenate([inside, everything(rest)])), np.arange(size, dtype=np.int64)
    )
    assert np.array_equal(everything(rest.complement(size)), inside)


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 60))
def test_a_spread_is_even(lengths, count):
    ranges = ranges_of(lengths[: len(lengths) // 2 * 2])
    found = ranges.spread(count)
    assert len(found) == min(count, len(ranges))
    places = np.searchsorted(everything(ranges), found)
    assert np.array_equal(everything(ranges)[places], found)
    steps = np.diff(places)
    assert not len(steps) or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
    assert not len(places) or places[0] == 0


@given(st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 9), max_size=20))
def test_an_intersection_is_what_is_in_both(ours, theirs):
    one, other = ranges_of(ours[: len(ours) // 2 * 2]), ranges_of(theirs[: len(theirs) // 2 * 2])
    expected = np.intersect1d(everything(one), everything(other))
    assert np.array_equal(everything(one.intersection(other)), expected)
    assert np.array_equal(everything(other.intersection(one)), expected)


@given(st.sets(st.integers(0, 40)))
def test_ranges_of_numbers_are_as_few_as_can_be(numbers):
    ascending = np.array(sorted(numbers), np.int64)
    found = Ranges.of(ascending)
    assert np.array_equal(everything(found), ascending)
    assert (found.bounds[1:, 0] > found.bounds[:-1, 1]).all()


def test_ranges_that_overlap_or_places_outside_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        Ranges([(0, 5), (4, 6)])
    ranges = Ranges([(10, 13), (20, 22)])
    for outside in (-1, 5):
        with pytest.raises(IndexError, match=r"0\.\.4"):
            ranges.select(np.array([0, outside]))


def test_ranges_of_a_huge_corpus_are_small():
    ranges = Ranges([(10**11, 10**11 + 10**9)])
    tracemalloc.start()
    rest = ranges.complement(10**12)
    found = rest.select(np.array([0, 10**11 - 1, 10**11, len(rest) - 1]))
    spread = rest.spread(100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tolist() == [0, 10**11 - 1, 10**11 + 10**9, 10**12 - 1]
    assert spread.max() < 10**12
    assert len(rest) == 10**12 - 10**9
    assert peak < 50_000


# --- corpora, as far as a split asks of them ---


class FakeCorpus:
    """Rows (document, span_start) in additions of shards, each read is counted."""

    has_groups = False

    def __init__(self, additions, packing, limits):
        self.rows_of, self.reads = [row for rows in additions for row in rows], 0
        self.info = {"config": {"packing": packing}}
        self.store = SimpleNamespace(location="fake")
        shards, self._firsts, self.additions = 0, [0], []
        for rows, limit in zip(additions, limits, strict=True):
            config = {"limit_sequences": limit}
            self.additions.append(SimpleNamespace(first_shard=shards, config=config))
            for start in range(0, len(rows), 7):
                self._firsts.append(self._firsts[-1] + len(rows[start : start + 7]))
                shards += 1
        self.commits = range(shards)

    def __len__(self):
        return len(self.rows_of)

    def first(self, shard):
        return self._firsts[shard]

    def locate(self, numbers):
        assert 0 <= numbers.min() <= numbers.max() < len(self)
        shards = np.searchsorted(self._firsts, numbers, side="right") - 1
        return shards, numbers - np.array(self._firsts)[shards]

    def rows(self, shard, first, count):
        self.reads += count
        start = self._firsts[shard] + first
        rows = self.rows_of[start : start + count]
        return {
            "document": [pa.scalar(row[0]) for row in rows],
            "span_start": [pa.scalar(row[1]) for row in rows],
        }


def packed(lengths, packing, name=""):
    """Rows (first document, its token there, all documents) of documents of so many tokens."""
    whole = packing == "document"
    texts = [[(f"{name}{d}", t) for t in range(length)] for d, length in enumerate(lengths)]
    streams = texts if whole else [[token for text in texts for token in text]]
    pieces = [s[i : i + ROOM] for s in streams for i in range(0, len(s), ROOM)]
    return [(*piece[0], {document for document, _ in piece}) for piece in pieces]


def split_of(additions, packing, fraction, limits=None):
    corpus = FakeCorpus(additions, packing, limits or [None] * len(additions))
    return split_corpus(SimpleNamespace(corpus=corpus), fraction)


def documents_of(rows, numbers):
    return set().union(*(rows[number][2] for number in numbers))


LENGTHS = st.lists(st.one_of(st.integers(1, 60), st.integers(1, 900)), min_size=1, max_size=25)
PACKINGS = st.sampled_from(["document", "contiguous"])
FRACTIONS = st.one_of(st.just(0.02), st.floats(0.001, 0.9))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, PACKINGS, FRACTIONS)
def test_no_document_is_on_both_sides_and_nothing_is_lost(lengths, packing, fraction):
    rows = packed(lengths, packing)
    split = split_of([rows], packing, fraction)
    train, held_out = sides(split)
    assert not train & held_out
    assert train
    assert bool(held_out) == (len(rows) > 1)
    neither = set(range(len(rows))) - train - held_out
    assert len(neither) <= (packing == "contiguous") * 2 * len(split.held_out.bounds)
    assert all(len(rows[number][2]) > 1 for number in neither)
    if documents_of(rows, train) & documents_of(rows, held_out):
        # Sequences were held out: no document was short enough.
        most = max(MOST_DOCUMENTS, 4 * fraction) * len(rows)
        shortest = min(lengths) / ROOM + fraction * len(rows) + 1
        assert packing == "contiguous" or len(lengths) == 1 or shortest > most
        assert len(held_out) <= max(1, fraction * len(rows))


def test_of_nothing_or_for_nothing_nothing_is_held_out():
    rows = packed([25] * 8, "document")
    split = split_of([rows], "document", 0)
    assert sides(split) == (set(range(len(rows))), set())
    assert sides(split_of([[]], "document", 0.5)) == (set(), set())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=150, max_size=250), PACKINGS, st.floats(0.03, 0.5))
def test_the_share_is_about_what_was_asked_for(lengths, packing, fraction):
    rows = packed(lengths, packing)
    _, held_out = sides(split_of([rows], packing, fraction))
    # A document is six sequences at most; in a contiguous packing each stretch may lose one more.
    slack = 6 if packing == "document" else 6 + len(rows) / 8
    assert abs(len(held_out) - fraction * len(rows)) <= slack


def test_every_part_of_a_corpus_is_represented():
    """A corpus ordered by domain: each tenth of it has its share, of documents of any length."""
    for tokens in (5, 45, 145):
        rows = packed([tokens] * 2000, "document")
        train, held_out = (np.array(sorted(s)) for s in sides(split_of([rows], "document", 0.1)))
        share = np.histogram(held_out, 10, (0, len(rows)))[0] / len(rows)
        assert share == pytest.approx([0.01] * 10, abs=0.004)
        assert len(np.unique(held_out * PLACES // len(rows))) == PLACES
        assert len(train) + len(held_out) == len(rows)


@pytest.mark.parametrize(
    ("lengths", "held_out"),
    [
        ([20, 30] * 20, 2),  # 2 % of 40 documents is less than one: the nearest to it
        ([10, 9_990], 1),
        ([9_990, 10], 1),
        ([200, 300, 500], 20),  # a fifth for want of a shorter one
    ],
)
def test_a_document_is_held_out_where_less_than_one_is_due(lengths, held_out):
    rows = packed(lengths, "document")
    train, out = sides(split_of([rows], "document", 0.02))
    assert len(out) == held_out
    assert not documents_of(rows, train) & documents_of(rows, out)


@pytest.mark.parametrize("sequences", [1, 2, 3, 100, 5000])
def test_one_document_is_split_by_sequences(sequences):
    rows = packed([ROOM * sequences], "document")
    split = split_of([rows], "document", 0.1)
    train, held_out = sides(split)
    assert len(train) + len(held_out) == sequences
    assert len(held_out) == (max(1, sequences // 10) // 64 * 64 or max(1, sequences // 10)) * (
        sequences > 1
    )
    assert len(split.held_out.bounds) <= PLACES


# --- growth ---


def check_growth(before, after, size):
    """What was held out or trained on is so still; the first ``size`` sequences were there."""
    for old, new in zip(sides(before), sides(after), strict=True):
        assert old == {number for number in new if number < size}


@settings(max_examples=25, deadline=None)
@given(LENGTHS, PACKINGS, FRACTIONS, st.data())
def test_a_raised_limit_moves_no_sequence_to_the_other_side(lengths, packing, fraction, data):
    """The limit may cut a document, whose rest comes later."""
    rows = packed(lengths, packing)
    cuts = sorted(data.draw(st.lists(st.integers(1, len(rows)), min_size=1, max_size=3)))
    additions = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    limits = [*cuts, None]
    splits = [
        split_of(additions[:n], packing, fraction, limits[:n]) for n in range(1, len(additions) + 1)
    ]
    for cut, before, after in zip(cuts, splits, splits[1:], strict=False):
        check_growth(before, after, cut)
    train, held_out = sides(splits[-1])
    shared = documents_of(rows, train) & documents_of(rows, held_out)
    if shared:  # only of the first addition that can hold out anything, which then had one document
        begun = next(n for n, split in enumerate(splits) if len(split.held_out))
        assert shared <= documents_of(rows, range(sum(map(len, additions[: begun + 1]))))


@pytest.mark.parametrize("tokens", [12, 24])
def test_a_document_that_a_limit_cut_stays_on_the_side_of_its_beginning(tokens):
    """Wherever it cut it, also when its beginning shares a sequence with another document."""
    rows = packed([tokens] * 30, "contiguous")
    for cut in range(12, len(rows) - 2):
        for fraction in (0.3, 0.8):
            additions = [rows[:cut], rows[cut:]]
            train, held_out = sides(split_of(additions, "contiguous", fraction, [cut, None]))
            assert not documents_of(rows, train) & documents_of(rows, held_out)


@settings(max_examples=25, deadline=None)
@given(st.lists(LENGTHS, min_size=2, max_size=4), PACKINGS, FRACTIONS)
def test_appended_files_move_no_sequence_to_the_other_side(files, packing, fraction):
    additions = [packed(lengths, packing, f"{n}:") for n, lengths in enumerate(files)]
    splits = [split_of(additions[:n], packing, fraction) for n in range(1, len(additions) + 1)]
    for n, (before, after) in enumerate(pairwise(splits)):
        check_growth(before, after, sum(map(len, additions[: n + 1])))


def test_appended_text_is_represented():
    additions = [packed([35] * 100, "document", name) for name in ("a", "b")]
    _, held_out = sides(split_of(additions, "document", 0.1))
    assert sum(number < 400 for number in held_out) == pytest.approx(40, abs=4)
    assert sum(number >= 400 for number in held_out) == pytest.approx(40, abs=4)


def test_stages_in_another_order_are_refused():
    rows = packed([35] * 100, "document")
    corpus = FakeCorpus([rows, rows], "document", [None, None])
    corpus.additions.reverse()
    with pytest.raises(CacheFormatError, match="additions begin at shards"):
        split_corpus(SimpleNamespace(corpus=corpus), 0.1)


# --- size ---


class HugeCorpus:
    """10¹² sequences that are nowhere: 1000 to a document."""

    has_groups = False

    def __init__(self):
        self.reads, self.commits = 0, range(1)
        self.info = {"config": {"packing": "contiguous"}}
        self.additions = [SimpleNamespace(first_shard=0, config={})]

    def __len__(self):
        return 10**12

    def first(self, shard):
        return 0

    def locate(self, numbers):
        return numbers * 0, numbers

    def rows(self, shard, first, count):
        self.reads += 1
        return {
            "document": [pa.scalar(first // 1000)],
            "span_start": [pa.scalar(first % 1000)],
        }


def test_memory_and_reads_are_bounded_whatever_the_size():
    corpus = HugeCorpus()
    split_corpus(SimpleNamespace(corpus=corpus), 0.02)
    corpus.reads = 0
    tracemalloc.start()
    split = split_corpus(SimpleNamespace(corpus=corpus), 0.02)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
    assert corpus.reads < 100 * PLACES
    assert len(split.held_out) == pytest.approx(0.02 * 10**12, rel=1e-3)
    assert (split.held_out.bounds % 1000 == 0).all()  # clean borders: nothing on neither side
    assert len(split.train) + len(split.held_out) == 10**12


# --- real caches ---


def test_documents_of_a_real_cache_are_on_one_side(masked_world):
    cache = masked_world.open()
    split = split_corpus(cache, 0.2)
    again = split_corpus(masked_world.open(), 0.2)
    assert sides(split) == sides(again)
    examples = [cache.example(i) for i in range(len(cache))]
    train, held_out = sides(split)
    assert len(train) + len(held_out) == len(cache)
    assert not {examples[i].document for i in train} & {examples[i].document for i in held_out}
    assert len(held_out) == pytest.approx(0.2 * len(cache), abs=4)
    assert {examples[i].domain for i in held_out} == {"odd", "even"}


@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_a_real_corpus_that_grew_is_split_as_before(tmp_path, corpus_file, bytelevel, packing):
    store = open_store(tmp_path / "cache")
    common = {"source": str(corpus_file), "tokenizer": str(bytelevel), "sequence_length": 24}
    sizes, splits = [], []
    for limit in (30, 77, None):
        config = CorpusConfig(packing=packing, limit_sequences=limit, **common)
        corpus = build_corpus(store, config, 20)
        sizes.append(len(corpus))
        splits.append(split_corpus(SimpleNamespace(corpus=corpus), 0.15))
    assert sizes[:2] == [30, 77]
    for size, before, after in zip(sizes, splits, splits[1:], strict=False):
        check_growth(before, after, size)
    train, held_out = sides(splits[-1])
    assert len(held_out) == pytest.approx(0.15 * sizes[-1], abs=8)
    members = members_of(Corpus(store))
    assert not set().union(*(members[i] for i in train)) & set().union(
        *(members[i] for i in held_out)
    )


def members_of(corpus):
    """The numbers of the documents of each sequence (d0, d1, … in the file's order)."""
    found = []
    for shard in range(len(corpus.commits)):
        for row in corpus.shard(shard).table().select(["document", "document_starts"]).to_pylist():
            first = int(row["document"].removeprefix("d"))
            found.append(set(range(first, first + len(row["document_starts"]))))
    return found
