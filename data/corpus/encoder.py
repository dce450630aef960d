"""The part of a tokenizer that cuts texts into tokens: everything a process needs for that."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.encoded import (
    Encoded,
    EncodedPairs,
    EncodedTexts,
    encoded_pairs,
    encoded_texts,
    lengths_of,
)
from rekindle.data.errors import InputError, first_words
from rekindle.data.forms.dialogue import MAX_NAMES, write_as_token
from rekindle.data.forms.marks import Marks
from rekindle.data.forms.spans import tokens_in
from rekindle.data.source.content import Dialogue, RichContent, TokenRow
from rekindle.data.source.documents import Document

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding
    from tokenizers import Tokenizer as Backend

LATEST_CUT_RULE = 2  # how pairs that are too long are cut; 1: see ``_longest_first_once``


@dataclass(frozen=True, eq=False)
class Encoder:
    """Encodes texts: no special tokens, no padding, no truncation."""

    backend: "Backend"

    def encodings(self, texts: Sequence[str]) -> "list[Encoding]":
        """Return the tokenizers library's encoding of each; raise InputError if one cannot be
        encoded.
        """
        try:
            return self.backend.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library's own errors have no closer class
            raise InputError(
                f"a tokenizer cannot encode a text: {first_words(error)}. One that does not know "
                "every character needs an unknown token (unk_token) that is in its vocabulary"
            ) from error

    def texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Return the tokens of each text."""
        return encoded_texts(texts, self.encodings(texts))

    def pairs(self, texts: Sequence[str], max_length: int) -> EncodedPairs:
        """Return the tokens of pairs, each the texts at an even and the next place; see
        ``joined``.
        """
        encodings = self.encodings(texts)
        uncut = encoded_texts(texts, encodings)
        pairs = zip(encodings[0::2], encodings[1::2], strict=True)
        joined = [self.joined(*pair, max_length, LATEST_CUT_RULE) for pair in pairs]
        return encoded_pairs(uncut, lengths_of(encodings), joined)

    def joined(
        self, first: "Encoding", second: "Encoding", max_length: int, cut: int
    ) -> "Encoding":
        """Return the two, shortened in place, joined with special tokens.

        Raises ValueError if ``max_length`` leaves no room for a token of each.
        """
        room = max_length - self.backend.num_special_tokens_to_add(is_pair=True)
        if room < 2:
            raise ValueError(f"max_length {max_length} leaves no room for a pair of texts")
        keep_first, keep_second = _CUTS[cut](len(first), len(second), room)
        first.truncate(keep_first)
        second.truncate(keep_second)
        return self.backend.post_process(first, second, True)

    def for_dialogues(self) -> "DialogueEncoder":
        """Return the encoder of dialogues as their template has written them."""
        return DialogueEncoder.of(self.backend)

    def __reduce__(self) -> tuple[object, ...]:
        # The backend's own pickle forgets encode_special_tokens.
        return _read, (self.backend.to_str(), self.backend.encode_special_tokens)


def _read(content: str, special_names_are_text: bool) -> Encoder:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(content)
    backend.encode_special_tokens = special_names_are_text
    return Encoder(backend)


# --- dialogues ------------------------------------------------------------------------------------


def special_tokens(backend: "Backend") -> "dict[int, AddedToken]":
    """Return the special tokens that are recognised in a text, by id."""
    added = backend.get_added_tokens_decoder()
    return {id: added[id] for id in sorted(added) if added[id].special and added[id].content}


@dataclass(frozen=True, eq=False)
class DialogueEncoder:
    """Encodes dialogues in which special tokens are written as ``write_as_token`` says, and their
    names are text. ``token_of`` [its own ids]: the token that each stands for.
    """

    backend: "Backend"
    token_of: NDArray[np.int32]

    @classmethod
    def of(cls, backend: "Backend") -> "DialogueEncoder":
        """Return a tokenizer's. Raise InputError for more special tokens than there are characters
        to write them with.
        """
        from tokenizers import AddedToken

        special = special_tokens(backend)
        if len(special) > MAX_NAMES:
            raise InputError(f"the tokenizer has {len(special):,} special tokens, too many")
        extended = deepcopy(backend)
        extended.encode_special_tokens = True
        size = 1 + max(extended.get_vocab(with_added_tokens=True).values())
        token_of = np.arange(size + len(special), dtype=np.int32)
        for number, (id, token) in enumerate(special.items()):
            written = write_as_token(number, token.content)
            # Not special, so that it is recognised where names of special tokens are text.
            sides = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
            extended.add_tokens([AddedToken(written, normalized=False, **sides)])
            alias = int(extended.token_to_id(written) or 0)
            if alias >= len(token_of):
                token_of = np.append(token_of, np.arange(len(token_of), alias + 1, dtype=np.int32))
            token_of[alias] = id
        return cls(extended, token_of)

    def texts(
        self, texts: Sequence[str], written: Sequence[str]
    ) -> tuple[EncodedTexts, NDArray[np.bool_]]:
        """Return the tokens of the ``texts`` that are ``written`` so, and which are meant as
        special.
        """
        encodings = self.backend.encode_batch(written, add_special_tokens=False)
        encoded = encoded_texts(texts, encodings)
        ids = self.token_of[encoded.tokens.ids]
        is_special = ids != encoded.tokens.ids
        return encoded._replace(tokens=encoded.tokens._replace(ids=ids)), is_special

    def __reduce__(self) -> tuple[object, ...]:
        return _read_dialogues, (self.backend.to_str(), self.token_of)


@dataclass(frozen=True, eq=False)
class GivenEncoder:
    """Tokenises documents that are not plain texts. ``is_special`` [size]: the ids without text.
    ``dialogues``: None if there are none.
    """

    dialogues: DialogueEncoder | None
    is_special: NDArray[np.bool_]

    def cut(
        self, documents: Sequence[Document], length: int
    ) -> tuple[Encoded, NDArray[np.int64], Marks]:
        """Return the tokens of documents of one kind, each one's number of tokens, and their marks.
        Dialogues, and rows that mark what is trained, are cut to their first ``length`` tokens.
        """
        tokens, lengths, trained, is_special = self._encode(documents)
        index_in_document = np.arange(len(trained)) - np.repeat(
            np.cumsum(lengths) - lengths, lengths
        )
        is_kept = (index_in_document < length) | ~np.repeat(_marks_trained(documents), lengths)
        kept_lengths = np.where(_marks_trained(documents), np.minimum(lengths, length), lengths)
        trained_after = np.zeros(len(lengths), np.bool_)
        marks = Marks(trained[is_kept], is_special[is_kept], trained_after, lengths - kept_lengths)
        return tokens.part(is_kept), kept_lengths, marks

    def cut_affixes(
        self, documents: Sequence[Document], begin: tuple[int, ...], end: tuple[int, ...]
    ) -> tuple[Encoded, NDArray[np.int64], Marks]:
        """Return the same uncut, without the tokens that packing puts before and after them."""
        tokens, lengths, trained, is_special = self._encode(documents)
        is_kept = np.ones(len(trained), np.bool_)
        trained_after = ~_marks_trained(documents)
        last = 0
        for number, count in enumerate(lengths.tolist()):
            first, last = last, last + count
            ids = tuple(tokens.ids[first:last].tolist())
            if begin and ids[: len(begin)] == begin:
                is_kept[first : first + len(begin)] = False
            if end and ids[-len(end) :] == end:
                is_kept[max(first, last - len(end)) : last] = False
                trained_after[number] = trained[last - 1]
        document_of = np.repeat(np.arange(len(lengths)), lengths)[is_kept]
        kept_lengths = np.bincount(document_of, minlength=len(lengths)).astype(np.int64)
        marks = Marks(
            trained[is_kept], is_special[is_kept], trained_after, np.zeros_like(kept_lengths)
        )
        return tokens.part(is_kept), kept_lengths, marks

    def _encode(self, documents: Sequence[Document]) -> "_EncodedGiven":
        if isinstance(documents[0].content, TokenRow):
            return self._tokens([one.content for one in documents])
        return self._dialogues(documents)

    def _dialogues(self, documents: Sequence[Document]) -> "_EncodedGiven":
        assert self.dialogues is not None
        texts = [document.text for document in documents]
        contents = [one.content for one in documents if isinstance(one.content, Dialogue)]
        encoded, is_special = self.dialogues.texts(texts, [one.written for one in contents])
        tokens, lengths = encoded
        spans = [one.trained for one in contents]
        trained = tokens_in(spans, [*map(len, texts)], tokens.starts, tokens.ends, lengths)
        return tokens, lengths, trained, is_special

    def _tokens(self, contents: Sequence[RichContent | None]) -> "_EncodedGiven":
        rows = [one for one in contents if isinstance(one, TokenRow)]
        lengths = np.array([len(one.ids) for one in rows], np.int64)
        ids = np.concatenate([one.ids for one in rows])
        all_trained = (np.ones(count, np.bool_) for count in lengths.tolist())
        rows_and_masks = zip(rows, all_trained, strict=True)
        trained = np.concatenate(
            [mask if row.trained is None else row.trained for row, mask in rows_and_masks]
        )
        no_text = np.zeros(len(ids), np.int32)  # there is no text
        tokens = Encoded(ids, no_text, no_text, np.ones(len(ids), np.bool_))
        return tokens, lengths, trained, self.is_special[ids]


def _marks_trained(documents: Sequence[Document]) -> NDArray[np.bool_]:
    """Return which are dialogues, or rows of tokens with labels or a mask."""
    contents = [one.content for one in documents]
    return np.array([not isinstance(g, TokenRow) or g.trained is not None for g in contents], bool)


_EncodedGiven = tuple[Encoded, NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]


def _read_dialogues(content: str, token_of: NDArray[np.int32]) -> DialogueEncoder:
    return DialogueEncoder(_read(content, special_names_are_text=True).backend, token_of)


# --- pairs that are too long ----------------------------------------------------------------------


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each text stay, as in the tokenizers library: the shorter text
    keeps at most half, and the longer one (the second of equals) the rest, including an odd token.
    """
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (room - short, short) if first > second else (short, room - short)


def _longest_first_once(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the same by the rule of older views: an odd token is the first text's."""
    kept_second = min(second, max(room // 2, room - first))
    return min(first, room - kept_second), kept_second


_CUTS = {1: _longest_first_once, LATEST_CUT_RULE: _longest_first}
