"""What tokens stand for, as bytes: finds what the vocabularies of two tokenizers have in common.

Supports byte-level BPE (GPT-2's and its successors) and pieces with "▁" for a space (Llama's,
T5's), with or without tokens for single bytes.
"""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError

_SPACE = "▁"
Ids = NDArray[np.int64]
Starts = NDArray[np.int64]


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes | None]:
    """Return [size]: the bytes of each id; None for special tokens and unused ids.

    Raises InputError for a tokenizer that changes texts, or whose tokens do not determine their
    bytes (WordPiece does both).
    """
    description = json.loads(tokenizer.encoder.backend.to_str())
    kinds = _kinds(description.get("decoder"))
    if "ByteLevel" in kinds:
        decode = _from_letters
    elif "ByteFallback" in kinds or "Metaspace" in kinds or "Replace" in kinds:
        decode = _from_pieces
    else:
        raise InputError(
            f"the bytes of the tokens of {tokenizer.name} are not known (its decoder is "
            f"{' + '.join(kinds) or 'none'}). Supported are byte-level BPE, and pieces with '▁' "
            "for a space"
        )
    added = tokenizer.hf.added_tokens_decoder
    result: list[bytes | None] = [None] * tokenizer.size
    for id, token in tokenizer.tokens():
        if id in added:  # stands for itself
            result[id] = None if added[id].special else added[id].content.encode()
        elif id not in tokenizer.special_ids:
            result[id] = decode(token)
    return result


def _kinds(part: object) -> list[str]:
    """Return the types of a decoder's steps."""
    if not isinstance(part, dict):
        return []
    inner = part.get("decoders")
    return [k for one in inner for k in _kinds(one)] if inner else [str(part.get("type"))]


@lru_cache(maxsize=1)
def _letters() -> dict[str, int]:
    """Return the byte that a letter of a byte-level vocabulary stands for: Latin-1's visible
    letters for themselves, the letters from U+0100 on for the other bytes, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(others)}


def _from_letters(token: str) -> bytes | None:
    letters = _letters()
    return bytes(letters[c] for c in token) if all(c in letters for c in token) else None


def _from_pieces(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_SPACE, " ").encode()


def common_tokens(tokens: Sequence[bytes | None], others: Sequence[bytes | None]) -> Ids:
    """Return [tokens]: the id among ``others`` that stands for the same bytes, −1 if there is none.

    If several ids of a vocabulary stand for the same bytes ("A" and "<0x41>"), the last one counts,
    because pieces come after the tokens for single bytes.
    """
    by_bytes = {content: id for id, content in enumerate(others) if content}
    own_by_bytes = {content: id for id, content in enumerate(tokens) if content}
    result = np.full(len(tokens), -1, np.int64)
    for content in by_bytes.keys() & own_by_bytes.keys():
        result[own_by_bytes[content]] = by_bytes[content]
    return result


def starts_of_tokens(
    ids: NDArray[np.integer], token_bytes: Sequence[bytes | None], text: bytes
) -> Starts | None:
    """Return where in ``text`` the bytes of each token begin, int64 [L]: −1 for a first token whose
    space is not in the text (Llama's tokenizers add it). None if the tokens are not the text's.

    A sequence may have been cut within a character that the text has whole.
    """
    parts = [token_bytes[id] for id in ids.tolist()]
    if any(part is None for part in parts):
        return None
    first = _text_offset(b"".join(part for part in parts if part is not None), text)
    if first is None:
        return None
    lengths = np.array([len(part or b"") for part in parts], np.int64)
    return first + np.cumsum(lengths) - lengths


def _text_offset(written: bytes, text: bytes) -> int | None:
    for first, candidate in ((0, text), (-1, b" " + text)):
        remainder = candidate[len(written) :]
        if candidate.startswith(written) and (not remainder or _starts_inside_character(remainder)):
            return first
    offset = len(text) - len(written)
    return (
        offset
        if offset > 0 and text.endswith(written) and _starts_inside_character(text[offset:])
        else None
    )


def _starts_inside_character(part: bytes) -> bool:
    """Return whether it begins within a character of UTF-8."""
    return part[0] & 0xC0 == 0x80
