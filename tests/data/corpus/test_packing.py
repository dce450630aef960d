import unicodedata
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.corpus.encoded import Encoded
from rekindle.data.corpus.joining import join_rows
from rekindle.data.corpus.packing import BEGINNING, Position, packing_of
from rekindle.data.corpus.rows import EncodedDocuments, pack, rows_of_texts
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.source.documents import Document, read_documents
from testlib.corpora import SHARED


class Specials(NamedTuple):
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    eos_id: int | None


# Ids below 10 are special; those of text are its code points.
BERT = Specials((1,), (2,), None)
ROBERTA = Specials((1,), (2,), 2)
LLAMA = Specials((1,), (), 3)
GPT2 = Specials((), (), 3)
NOTHING = Specials((), (), None)
PADDED = Specials((1, 4), (5, 2), None)
EMPTY = (np.zeros(0, np.int32),) * 3 + (np.zeros(0, np.bool_),)
ALL = [BERT, ROBERTA, LLAMA, GPT2, NOTHING, PADDED]


def characters(text):
    """Every character that is no space is a token; words are what space separates."""
    places = [i for i, c in enumerate(text) if not c.isspace()]
    starts = np.array(places, np.int32).reshape(-1)
    begins = [i == 0 or text[i - 1].isspace() for i in places]
    ids = np.array([ord(text[i]) for i in places], np.int32).reshape(-1)
    return Encoded(ids, starts, starts + 1, np.array(begins, np.bool_).reshape(-1))


def corpus(texts):
    return [
        (Document(f"d{i}", text, f"domain{i % 3}"), characters(text))
        for i, text in enumerate(texts)
    ]


class Row(NamedTuple):
    input_ids: np.ndarray
    char_starts: np.ndarray
    word_starts: np.ndarray
    document_starts: np.ndarray
    document: str
    domain: str | None
    span: tuple[int, int]
    text: str
    digest: str


def batch_of(documents):
    encoded = [Encoded(*map(np.array, EMPTY)), *(found for _, found in documents)]
    lengths = np.array([len(found.ids) for _, found in documents], np.int64)
    return EncodedDocuments(
        [document for document, _ in documents], Encoded.concatenate(encoded), lengths
    )


def each_of(rows):
    """A row at a time, and the Position after it."""
    for number in range(len(rows)):
        one = rows.part(number, number + 1)
        span = tuple(one.spans[0].tolist())
        lists = (one.input_ids, one.char_starts, one.word_starts, one.document_starts)
        row = Row(*lists, one.documents[0], one.domains[0], span, one.texts[0], one.digests[0])
        yield row, Position(*one.ends[0].tolist())


def packed(documents, length, packing, specials, start=BEGINNING, at_a_time=100):
    how = packing_of(specials, length, packing)
    if how.one_document:
        found = rows_of_texts(batch_of(documents), 0, how, last=True)[0].after(start)
        return [*each_of(found)]
    rest = documents[start.document_index :]
    batches = [batch_of(rest[n : n + at_a_time]) for n in range(0, len(rest), at_a_time)]
    return [pair for found in pack(batches, how, start) for pair in each_of(found)]


def rows(texts, length, packing, specials):
    """The sequences' ids, those of text as characters."""
    found = packed(corpus(texts), length, packing, specials)
    return [[chr(i) if i >= 10 else int(i) for i in sequence.input_ids] for sequence, _ in found]


TEXTS = st.lists(st.text(alphabet="ab \n日é", max_size=30), max_size=8)
CASES = st.tuples(
    TEXTS, st.integers(1, 12), st.sampled_from(["document", "contiguous"]), st.sampled_from(ALL)
)


def case_of(case):
    texts, room, packing, specials = case
    length = room + len(specials.prefix) + len(specials.suffix)
    return corpus(texts), length, packing, specials


# --- properties -----------------------------------------------------------------------------------


@given(CASES)
def test_every_token_comes_once_and_in_order(case):
    documents, *how = case_of(case)
    found = [i for s, _ in packed(documents, *how) for i in s.input_ids[s.char_starts >= 0]]
    assert found == [i for _, encoded in documents for i in encoded.ids]


@given(CASES)
def test_every_sequence_is_wrapped_and_as_long_as_it_may_be(case):
    documents, length, packing, specials = case_of(case)
    found = [sequence for sequence, _ in packed(documents, length, packing, specials)]
    head, tail = len(specials.prefix), len(specials.suffix)
    for sequence in found:
        size = len(sequence.input_ids)
        assert head + tail < size <= length
        assert tuple(sequence.input_ids[:head]) == specials.prefix
        assert tuple(sequence.input_ids[size - tail :]) == specials.suffix
        assert (sequence.char_starts[head : size - tail] >= 0).any()
    between = 1 if tail else 0  # a separator and a token after it need two places
    if packing == "contiguous":
        assert all(len(sequence.input_ids) >= length - between for sequence in found[:-1])
    else:
        for sequence, following in pairwise(found):
            if sequence.document == following.document:
                assert len(sequence.input_ids) == length


@given(CASES)
def test_shapes_types_and_marks_of_special_tokens(case):
    documents, *how = case_of(case)
    for sequence, _ in packed(documents, *how):
        ids, starts, words = sequence.input_ids, sequence.char_starts, sequence.word_starts
        assert (ids.dtype, starts.dtype, words.dtype) == (np.int32, np.int32, np.bool_)
        assert sequence.document_starts.dtype == np.int32
        assert len(ids) == len(starts) == len(words)
        assert ((ids < 10) == (starts == -1)).all()
        assert not words[ids < 10].any()


@given(CASES)
def test_every_token_is_the_text_it_points_at(case):
    documents, *how = case_of(case)
    for sequence, _ in packed(documents, *how):
        for token, start in zip(sequence.input_ids, sequence.char_starts, strict=True):
            if start >= 0:
                assert sequence.text[start] == chr(token)


@given(CASES)
def test_word_starts_are_the_documents(case):
    documents, *how = case_of(case)
    found = [w for s, _ in packed(documents, *how) for w in s.word_starts[s.char_starts >= 0]]
    assert found == [w for _, encoded in documents for w in encoded.word_starts]


@given(CASES)
def test_document_domain_and_span_are_the_first_token_s(case):
    documents, *how = case_of(case)
    by_id = {document.id: document for document, _ in documents}
    for sequence, _ in packed(documents, *how):
        document = by_id[sequence.document]
        begin, end = sequence.span
        assert sequence.domain == document.domain
        assert sequence.text.startswith(document.text[begin:end])
        if len(sequence.document_starts) == 1:
            assert sequence.text == document.text[begin:end]
        assert sequence.char_starts[sequence.document_starts[0]] == 0


@given(CASES)
def test_document_starts_are_where_the_tokens_change_document(case):
    documents, *how = case_of(case)
    owners = [document.id for document, encoded in documents for _ in encoded.ids]
    taken = 0
    for sequence, _ in packed(documents, *how):
        places = np.flatnonzero(sequence.char_starts >= 0)
        mine = owners[taken : taken + len(places)]
        taken += len(places)
        changes = [p for i, p in enumerate(places) if i == 0 or mine[i] != mine[i - 1]]
        assert sequence.document_starts.tolist() == changes
        assert sequence.document == mine[0]
        if how[1] == "document":
            assert sequence.document_starts.tolist() == [len(how[2].prefix)]


@given(CASES)
def test_packing_goes_on_from_every_position(case):
    documents, *how = case_of(case)
    whole = packed(documents, *how)
    for number, (_, position) in enumerate(whole, start=1):
        rest = packed(documents, *how, start=position)
        assert [p for _, p in rest] == [p for _, p in whole[number:]]
        for (found, _), (wanted, _) in zip(rest, whole[number:], strict=True):
            assert_equal(found, wanted)


def assert_equal(one, two):
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@given(CASES)
def test_positions_name_the_next_token(case):
    documents, *how = case_of(case)
    counts = [len(encoded.ids) for _, encoded in documents]
    before = [0, *accumulate(counts)]
    taken = 0
    for sequence, position in packed(documents, *how):
        taken += int((sequence.char_starts >= 0).sum())
        assert before[position.document_index] + position.token == taken
        assert position.token < [*counts, 1][position.document_index] or position.token == 0


@given(CASES, st.integers(1, 3))
def test_sequences_do_not_depend_on_where_documents_are_parted(case, at_a_time):
    documents, *how = case_of(case)
    whole, parted = packed(documents, *how), packed(documents, *how, at_a_time=at_a_time)
    assert [position for _, position in parted] == [position for _, position in whole]
    for (found, _), (wanted, _) in zip(parted, whole, strict=True):
        assert_equal(found, wanted)


# --- examples: where the special tokens go --------------------------------------------------------


@pytest.mark.parametrize(
    ("specials", "expected"),
    [
        (BERT, [[1, "a", "b", "c", 2], [1, "d", "e", 2], [1, "f", 2]]),
        (ROBERTA, [[1, "a", "b", "c", 2], [1, "d", "e", 2], [1, "f", 2]]),
        (LLAMA, [[1, "a", "b", "c", "d"], [1, "e", 3], [1, "f", 3]]),
        (GPT2, [["a", "b", "c", "d", "e"], ["f", 3]]),
        (NOTHING, [["a", "b", "c", "d", "e"], ["f"]]),
    ],
)
def test_document_packing(specials, expected):
    assert rows(["ab cde", " ", "f"], 5, "document", specials) == expected


def test_the_end_token_of_document_packing_is_left_out_where_it_would_stand_alone():
    assert rows(["abcd", "abc"], 4, "document", GPT2) == [list("abcd"), ["a", "b", "c", 3]]


@pytest.mark.parametrize(
    ("specials", "length", "expected"),
    [
        (BERT, 7, [[1, "a", "b", 2, "c", "d", 2], [1, "e", "f", "g", "h", 2], [1, "i", 2]]),
        (ROBERTA, 7, [[1, "a", "b", 2, "c", "d", 2], [1, "e", "f", "g", "h", 2], [1, "i", 2]]),
        (LLAMA, 6, [[1, "a", "b", 3, "c", "d"], [1, "e", "f", "g", "h", 3], [1, "i", 3]]),
        (GPT2, 5, [["a", "b", 3, "c", "d"], ["e", "f", "g", "h", 3], ["i", 3]]),
        (GPT2, 2, [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"], ["i", 3]]),
        (NOTHING, 5, [["a", "b", "c", "d", "e"], ["f", "g", "h", "i"]]),
    ],
)
def test_contiguous_packing(specials, length, expected):
    assert rows(["ab", "", "cdefgh", "i"], length, "contiguous", specials) == expected


def test_the_text_of_a_contiguous_sequence_joins_its_documents():
    ((sequence, position),) = packed(corpus(["ab ", "\n", " 日é"]), 9, "contiguous", BERT)
    assert sequence.text == "ab\n\n日é"
    assert sequence.char_starts.tolist() == [-1, 0, 1, -1, 4, 5, -1]
    assert sequence.word_starts.tolist() == [False, True, False, False, True, False, False]
    assert sequence.document_starts.tolist() == [1, 4]
    assert (sequence.document, sequence.domain, sequence.span) == ("d0", "domain0", (0, 2))
    assert position == Position(3, 0)


def test_a_piece_has_its_own_text():
    (_, first), (sequence, second) = packed(corpus(["one two three"]), 6, "document", NOTHING)
    assert (first, second) == (Position(0, 6), Position(1, 0))
    assert sequence.text == "three"
    assert sequence.span == (8, 13)
    assert sequence.char_starts.tolist() == [0, 1, 2, 3, 4]


# --- bad calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("specials", "length"), [(BERT, 2), (PADDED, 4), (GPT2, 0), (NOTHING, -1)])
@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_no_room_for_text_is_refused_at_the_call(specials, length, packing):
    with pytest.raises(ValueError, match="no room for text"):
        packing_of(specials, length, packing)


def test_an_unknown_packing_is_refused():
    with pytest.raises(ValueError, match="'contiguous', 'packed'"):
        packing_of(BERT, 9, "both")


@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_a_start_beyond_the_document_is_refused(packing):
    with pytest.raises(ValueError, match="was changed"):
        packed(corpus(["ab", "cd"]), 9, packing, BERT, start=Position(1, 2))


# --- published tokenizers -------------------------------------------------------------------------

HARD = [
    "Héllo  world, don't 😀🧑‍🚀 x\nnew ﬁne 東京 e\u0301nd of\u00a0it",
    "👩‍👩‍👧‍👦" * 9 + " ñandú \t tab\n\n\nnext line… “quoted” — dash",
    "ascii only, but long enough to be cut into several pieces by every length tried here.",
    " \u200b",
]


def published(name):
    directory = SHARED / "tokenizers" / name
    if not directory.is_dir():
        pytest.skip(f"the published vocabulary is not here: {directory}")
    return load_tokenizer(str(directory))


def hard_corpus(tokenizer):
    texts = list(HARD)
    wiki = SHARED / "corpus" / "wiki_heldout.jsonl"
    if wiki.exists():
        texts += [document.text[:4000] for document in islice(read_documents([str(wiki)]), 5)]
    documents = [Document(str(i), text, None) for i, text in enumerate(texts)]
    return [*zip(documents, tokenizer.encode(texts), strict=True)]


def byte_of_symbol():
    """GPT-2's printable stand-in for each byte, reversed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@pytest.mark.covering
@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_gpt2_s_bytes_stand_where_char_starts_say(length, packing):
    tokenizer = published("gpt2")
    documents = hard_corpus(tokenizer)
    symbols = byte_of_symbol()
    bytes_seen = [
        "".join(tokenizer.hf.convert_ids_to_tokens(encoded.ids.tolist()))
        for _, encoded in documents
    ]
    # Every token's bytes are the document's bytes in order, so a token's first byte tells its
    # character exactly.
    places = []
    for (document, encoded), whole in zip(documents, bytes_seen, strict=True):
        assert bytes(symbols[s] for s in whole) == document.text.encode()
        owner = [i for i, c in enumerate(document.text) for _ in c.encode()]
        tokens = tokenizer.hf.convert_ids_to_tokens(encoded.ids.tolist())
        firsts = [0, *accumulate(len(token) for token in tokens)][:-1]
        places += [document.text[owner[byte] :][:1] for byte in firsts]
    found = []
    for sequence, _ in packed(documents, length, packing, tokenizer):
        found += [sequence.text[start] for start in sequence.char_starts if start >= 0]
    assert found == places


@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_bert_s_pieces_stand_where_char_starts_say(length, packing):
    tokenizer = published("bert-base-uncased")
    checked = 0
    for sequence, _ in packed(hard_corpus(tokenizer), length, packing, tokenizer):
        tokens = tokenizer.hf.convert_ids_to_tokens(sequence.input_ids.tolist())
        for token, start in zip(tokens, sequence.char_starts, strict=True):
            if start >= 0 and token != "[UNK]":
                here = unicodedata.normalize("NFD", sequence.text[start : start + 80].lower())
                plain = "".join(c for c in here if unicodedata.category(c) not in ("Mn", "Cf"))
                assert plain.startswith(token.removeprefix("##"))
                checked += 1
    assert checked > 80


@pytest.mark.covering
@pytest.mark.parametrize("name", ["bert-base-uncased", "gpt2"])
@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_published_tokenizers_resume(name, packing):
    tokenizer = published(name)
    documents = hard_corpus(tokenizer)
    whole = packed(documents, 16, packing, tokenizer)
    for number, (_, position) in enumerate(whole[:60], start=1):
        rest = packed(documents, 16, packing, tokenizer, start=position)
        assert len(rest) == len(whole) - number
        for (found, _), (wanted, _) in zip(rest, whole[number:], strict=True):
            assert_equal(found, wanted)


# --- packed: the sequences of single documents in rows --------------------------------------------


def sequences_of(documents, length, specials):
    how = packing_of(specials, length, "packed")
    return rows_of_texts(batch_of(documents), 0, how, last=True)[0]


def joined(parts, length):
    return [one for rows in join_rows(parts, length) for one in each_of(rows)]


@given(CASES, st.integers(1, 3))
def test_a_row_holds_whole_sequences_of_one_domain_as_many_as_fit(case, at_a_time):
    documents, length, _, specials = case_of(case)
    whole = sequences_of(documents, length, specials)
    edges = [*range(0, len(whole), at_a_time), len(whole)]
    parts = [whole.part(a, b) for a, b in pairwise(edges)]
    rows = joined(parts, length)
    alone = [*each_of(whole)]
    lengths = [len(one.input_ids) for one, _ in alone]
    counts = [len(row.document_starts) for row, _ in rows]
    assert sum(counts) == len(alone)
    for (row, position), stop, count in zip(rows, accumulate(counts), counts, strict=True):
        inside = alone[stop - count : stop]
        assert row.input_ids.tolist() == [i for one, _ in inside for i in one.input_ids]
        assert row.word_starts.tolist() == [w for one, _ in inside for w in one.word_starts]
        starts = accumulate(lengths[stop - count : stop - 1], initial=0)
        assert row.document_starts.tolist() == [*starts]
        assert len(row.input_ids) <= length
        assert row.text == "\n\n".join(one.text for one, _ in inside)
        for token, start in zip(row.input_ids, row.char_starts, strict=True):
            assert (start < 0) == (token < 10)
            assert start < 0 or row.text[start] == chr(token)
        first = inside[0][0]
        assert (row.document, row.domain, row.span) == (first.document, first.domain, first.span)
        assert {one.domain for one, _ in inside} == {row.domain}
        assert position == inside[-1][1]
        if stop < len(alone) and alone[stop][0].domain == row.domain:
            assert len(row.input_ids) + lengths[stop] > length


@given(CASES)
def test_rows_go_on_from_every_position(case):
    documents, length, _, specials = case_of(case)
    whole = sequences_of(documents, length, specials)
    rows = joined([whole], length)
    for number, (_, position) in enumerate(rows, start=1):
        rest = joined([whole.after(position)], length)
        assert [p for _, p in rest] == [p for _, p in rows[number:]]
        for (found, _), (wanted, _) in zip(rest, rows[number:], strict=True):
            assert_equal(found, wanted)


def test_each_document_of_a_row_has_its_own_special_tokens():
    one = [(Document(f"d{i}", text, None), characters(text)) for i, text in enumerate(["ab", "c"])]
    for specials, ids in (
        (BERT, [1, "a", "b", 2, 1, "c", 2]),
        (LLAMA, [1, "a", "b", 3, 1, "c", 3]),
        (GPT2, ["a", "b", 3, "c", 3]),
    ):
        ((row, _),) = joined([sequences_of(one, 9, specials)], 9)
        assert [chr(i) if i >= 10 else int(i) for i in row.input_ids] == ids


def test_rows_with_other_borders_are_others():
    """Of tokens without a text all else may be the same, and what each document sees is not."""
    found = set()
    for texts in (["ab", "c"], ["a", "bc"]):
        one = [(Document("d", text, None), characters(text)) for text in texts]
        whole = replace(sequences_of(one, 9, NOTHING), texts=["", ""])
        ((row, _),) = joined([whole], 9)
        found.add((row.input_ids.tobytes(), row.text, row.digest))
    assert len(found) == 2
    assert len({one[:2] for one in found}) == 1
