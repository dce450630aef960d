"""A tokenizer with the facts that packing, masks and fingerprints need, and fast encoding.

Importing this module imports neither transformers nor torch. It knows nothing of sequences and
files of text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.tokenizer_files import read_tokenizer_files
from rekindle.data.errors import InputError
from rekindle.data.source.documents import Document

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

NEWEST_CUT = 2  # how pairs that are too long are cut; 1: see ``_longest_first_once``
_HIGHEST_SPACE = 0x3000  # no character above it is white space
_NOWHERE = np.iinfo(np.int32).max  # past the last character of any text


class Encoded(NamedTuple):
    """One text's L tokens, without special tokens.

    ids [L] int32; starts, ends [L] int32: the characters text[start:end] that a token stands for,
    as the tokenizer counts them (byte-level ones include the space before a word, and the tokens of
    one emoji all span that emoji); neither ever decreases. word_starts [L] bool: the token begins
    a new word.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    word_starts: NDArray[np.bool_]

    def first(self, count: int) -> "Encoded":
        """The first tokens, so many."""
        ids, starts, ends, words = self
        return Encoded(ids[:count], starts[:count], ends[:count], words[:count])

    def tokens_at(self, characters: NDArray[np.int64], room: int) -> NDArray[np.int64]:
        """The first token that stands for each of some characters of the text; -1 where none of the
        first ``room`` tokens does.
        """
        token = np.searchsorted(self.ends[:room], characters, side="right")
        begins = np.append(self.starts[:room], _NOWHERE)  # none covers what was cut off
        return np.where(begins[token] <= characters, token, -1)


class EncodedPair(NamedTuple):
    """Two texts as the tokenizer joins a pair, L tokens with the special ones.

    ids, types (segments) [L] int32. of [L] int32: 0 for a token of the first text, 1 of the second,
    -1 for special tokens. parts: the tokens of each text that are kept. lost: how many are not.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    of: NDArray[np.int32]
    parts: tuple[Encoded, Encoded]
    lost: int


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A fast Hugging Face tokenizer and what we need to know of it.

    size: one past the largest id, added tokens included: what a model's embedding needs. holes:
    (first, past the last) of each gap in the ids below; they are no tokens. digest: sha256 over
    the sorted (id, token) pairs, the identity of the vocabulary. special_ids: every special token,
    the unknown token included. prefix, suffix: what it puts around one text ([CLS] and [SEP]; BOS
    alone for Llama; nothing for GPT-2). pad_id is 0 for a tokenizer that has no padding token.
    """

    hf: "PreTrainedTokenizerFast"
    name: str
    size: int
    holes: tuple[tuple[int, int], ...]
    digest: str
    mask_id: int | None
    pad_id: int
    eos_id: int | None
    special_ids: frozenset[int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    _backend: "Backend" = field(repr=False)

    def reading_special_tokens(self) -> "Tokenizer":
        """The same, that reads a special token's name within a text as the token."""
        return wrap_tokenizer(self.hf, self.name, special_names_are_text=False)

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Each text's tokens: no special tokens, no truncation, all cores.

        A special token's name within a text ("[MASK]", "</s>") is text like any other (except to a
        Unigram model that has it among its pieces), unless ``reading_special_tokens`` gave this.
        """
        return [_encoded(*pair) for pair in zip(texts, self._encodings(texts), strict=True)]

    def encode_documents(
        self, documents: Iterable[Document], batch_characters: int = 1 << 20
    ) -> Iterator[tuple[Document, Encoded]]:
        """``documents`` in their order, each with its tokens.

        Works in batches of about ``batch_characters``; while one is handed out the next is already
        being encoded.
        """
        for one, encodings in self._encoded_ahead(documents, batch_characters):
            yield one, _encoded(one.text, encodings[0])

    def encode_pairs(
        self, documents: Iterable[Document], max_length: int, batch_characters: int = 1 << 20
    ) -> Iterator[tuple[Document, EncodedPair]]:
        """``documents``, each of two texts, in their order, with what ``encode_pair`` makes of it.

        Works in batches as ``encode_documents`` does.
        """
        for one, encodings in self._encoded_ahead(documents, batch_characters):
            whole = [_encoded(*pair) for pair in zip(one.texts, encodings, strict=True)]
            joined = self._joined(encodings[0], encodings[1], max_length, NEWEST_CUT)
            kept = [len(encoding) for encoding in encodings]  # they were shortened
            of = np.full(len(joined), -1, np.int32)
            of[np.array(joined.special_tokens_mask) == 0] = np.repeat([0, 1], kept)
            parts = (whole[0].first(kept[0]), whole[1].first(kept[1]))
            lost = sum(len(part.ids) for part in whole) - sum(kept)
            yield one, EncodedPair(*_ids_and_types(joined), of, parts, lost)

    def encode_pair(
        self, a: str, b: str, max_length: int, cut: int = NEWEST_CUT
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Two texts as the tokenizer joins a pair: (input_ids [L], token_type_ids [L]), both int32.

        Special tokens included, L ≤ max_length; the longer text is shortened first, as the
        tokenizers library does it (``cut`` 1: as older caches have it). Raises ValueError when
        ``max_length`` leaves no room for a token of each.
        """
        first, second = self._encodings([a, b])
        return _ids_and_types(self._joined(first, second, max_length, cut))

    def _joined(
        self, first: "Encoding", second: "Encoding", max_length: int, cut: int
    ) -> "Encoding":
        """The two, shortened in place, with special tokens."""
        room = max_length - self._backend.num_special_tokens_to_add(is_pair=True)
        if room < 2:
            raise ValueError(f"max_length {max_length} leaves no room for a pair of texts")
        keep_first, keep_second = _CUTS[cut](len(first), len(second), room)
        first.truncate(keep_first)
        second.truncate(keep_second)
        return self._backend.post_process(first, second, True)

    def _encoded_ahead(
        self, documents: Iterable[Document], batch_characters: int
    ) -> "Iterator[tuple[Document, list[Encoding]]]":
        """Each of the documents with an encoding of each of its texts."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: tuple[list[Document], Future[list[Encoding]]] | None = None
            for batch in chain(_batches(documents, batch_characters), [[]]):
                running = pool.submit(self._encodings, [t for one in batch for t in one.texts])
                if waiting:
                    found = iter(waiting[1].result())
                    yield from ((one, [next(found) for _ in one.texts]) for one in waiting[0])
                waiting = (batch, running)

    def tokens(self) -> frozenset[tuple[int, str]]:
        """Every (id, token)."""
        return frozenset((id, token) for token, id in self.hf.get_vocab().items())

    def whole_lengths(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> NDArray[np.int64]:
        """Tokens of each text, or of it and the other of its pair, special ones included, before
        anything is cut: int64 [N].
        """
        added = self._backend.num_special_tokens_to_add(is_pair=pairs is not None)
        parts = (texts,) if pairs is None else (texts, pairs)
        each = [[len(found) for found in self._encodings([*part])] for part in parts]
        return np.array(each, np.int64).reshape(len(parts), -1).sum(axis=0) + added

    def save(self, directory: str | Path) -> None:
        """Write it so that ``load_tokenizer(directory)`` and transformers read it back."""
        self.hf.save_pretrained(str(directory))

    def _encodings(self, texts: list[str]) -> "list[Encoding]":
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def __reduce__(self) -> tuple[object, ...]:
        # The backend's own pickle forgets encode_special_tokens.
        return wrap_tokenizer, (self.hf, self.name, self._backend.encode_special_tokens)


def wrap_tokenizer(
    hf: "PreTrainedTokenizerFast", name: str, special_names_are_text: bool = True
) -> Tokenizer:
    """A Tokenizer around a fast Hugging Face tokenizer, which is left as it is."""
    # Our own copy: padding, truncation and special tokens written in a text are settings of the
    # backend, and some tokenizer.json files come with them switched on.
    backend = deepcopy(hf.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = special_names_are_text
    added = hf.added_tokens_decoder
    special = {*hf.all_special_ids, *(id for id, token in added.items() if token.special)}
    prefix, suffix = _affixes(backend)
    vocabulary = sorted((id, token) for token, id in hf.get_vocab().items())
    if not vocabulary:
        raise InputError(f"tokenizer {name!r} has no tokens; give one that was trained")
    return Tokenizer(
        hf=hf,
        name=name,
        size=vocabulary[-1][0] + 1,
        holes=_gaps([id for id, _ in vocabulary]),
        digest=hashlib.sha256(json.dumps(vocabulary, separators=(",", ":")).encode()).hexdigest(),
        mask_id=hf.mask_token_id,
        pad_id=0 if hf.pad_token_id is None else hf.pad_token_id,
        eos_id=hf.eos_token_id,
        special_ids=frozenset(special),
        prefix=prefix,
        suffix=suffix,
        _backend=backend,
    )


def _gaps(ids: list[int]) -> tuple[tuple[int, int], ...]:
    """(first, past the last) of the numbers from 0 on that are missing in the ascending ``ids``."""
    return tuple((a + 1, b) for a, b in pairwise([-1, *ids]) if b > a + 1)


def _affixes(backend: "Backend") -> tuple[tuple[int, ...], tuple[int, ...]]:
    probe = backend.encode("a")
    content = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    if not content:
        return tuple(probe.ids), ()
    return tuple(probe.ids[: content[0]]), tuple(probe.ids[content[-1] + 1 :])


def load_tokenizer(path_or_id: str) -> Tokenizer:
    """The tokenizer of a local directory or of a Hugging Face id; no remote code is run.

    Beside what transformers' AutoTokenizer reads, a directory may hold vocabulary files alone:
    ``vocab.txt`` is BERT WordPiece, which lower-cases exactly when no token but the bracketed ones
    has an ASCII capital; ``encoder.json`` + ``vocab.bpe`` or ``vocab.json`` + ``merges.txt`` is
    GPT-2's byte-level BPE, ended by <|endoftext|>.

    Raises InputError: no such directory, no tokenizer files in it, an id that cannot be loaded, a
    tokenizer without a fast (Rust) implementation.
    """
    return wrap_tokenizer(read_tokenizer_files(path_or_id), path_or_id)


# --- encoding -------------------------------------------------------------------------------------


def _encoded(text: str, encoding: "Encoding") -> Encoded:
    length = len(encoding)
    spans = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * length)
    # Tokenizers that trim white space off the spans move some of them back (a lone "▁", say).
    starts, ends = np.maximum.accumulate(spans[0::2]), np.maximum.accumulate(spans[1::2])
    word_starts = _word_starts(np.array(encoding.word_ids, np.int64), _words(text)[starts])
    return Encoded(np.array(encoding.ids, np.int32), starts, ends, word_starts)


def _ids_and_types(encoding: "Encoding") -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)


def _word_starts(word_ids: NDArray[np.int64], words: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[L]: the pre-tokenizer's word changes, or white space lies between.

    The second rule alone decides for tokenizers that take the whole text for one word (Llama's
    Metaspace), and sees line breaks inside a word of those that split at "▁" only.
    """
    starts = np.ones(len(word_ids), np.bool_)
    starts[1:] = (word_ids[1:] != word_ids[:-1]) | (words[1:] != words[:-1])
    return starts


def _words(text: str) -> NDArray[np.int32]:
    """[characters + 1]: the number of a character's word; white space belongs to the word after."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    space = _space_table()[np.minimum(codes, _HIGHEST_SPACE + 1)]
    begins = np.zeros(len(codes) + 1, np.bool_)
    begins[1:-1] = space[1:] & ~space[:-1]
    return np.cumsum(begins, dtype=np.int32)


@lru_cache(maxsize=1)
def _space_table() -> NDArray[np.bool_]:
    return np.array([chr(code).isspace() for code in range(_HIGHEST_SPACE + 2)])


def _batches(documents: Iterable[Document], batch_characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document.texts))
        if characters >= batch_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text stay, as the tokenizers library has it: the shorter text keeps
    no more than half, and the longer one (of equals the second) what is left, an odd token too.
    """
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (room - short, short) if first > second else (short, room - short)


def _longest_first_once(first: int, second: int, room: int) -> tuple[int, int]:
    """The rule of older views: an odd token is the first text's."""
    kept = min(second, max(room // 2, room - first))
    return min(first, room - kept), kept


_CUTS = {1: _longest_first_once, NEWEST_CUT: _longest_first}
