r"""What tokens stand for in a text: their pieces without the tokenizer's notation.

A piece that begins a word begins with the blank before it, in every family of tokenizers. Bytes
that are not a whole character are shown as in Python: ``\\xc3``.
"""

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile("<0x([0-9A-F]{2})>")  # sentencepiece's notation for a byte without a piece


class PieceTexts:
    """Texts of the tokens of a fast tokenizer, by id."""

    def __init__(self, hf: "PreTrainedTokenizerFast"):
        self._hf = hf
        # The decoder and pre-tokenizer reveal the family.
        backend = hf.backend_tokenizer
        states = [part.__getstate__() for part in (backend.decoder, backend.pre_tokenizer) if part]
        self._kinds = {kind for state in states for kind in _types(json.loads(state))}
        self._added = hf.added_tokens_decoder

    def __getitem__(self, number: int) -> str:
        """Return the text of a token; ``<7>`` for an id that is not a token."""
        piece = self._hf.convert_ids_to_tokens(number) if number not in self._added else None
        if number in self._added:
            return str(self._added[number].content)
        if piece is None:
            return f"<{number}>"
        if "ByteLevel" in self._kinds:
            return _from_bytes(bytes(_BYTES.get(letter, 63) for letter in piece))
        if byte := _BYTE.fullmatch(piece):
            return _from_bytes(bytes([int(byte[1], 16)]))
        if "WordPiece" in self._kinds:
            return piece.removeprefix("##") if piece.startswith("##") else f" {piece}"
        return piece.replace("▁", " ").replace("</w>", " ")


def _types(state: object) -> set[str]:
    """Return every ``type`` in the state of a tokenizer's part."""
    if isinstance(state, list):
        return {kind for part in state for kind in _types(part)}
    if not isinstance(state, dict):
        return set()
    kinds = {state["type"]} if isinstance(state.get("type"), str) else set()
    return kinds | {kind for part in state.values() for kind in _types(part)}


def _from_bytes(content: bytes) -> str:
    return content.decode("utf-8", errors="backslashreplace")


def _byte_letters() -> dict[str, int]:
    """Return GPT-2's letters for bytes: printable ones as they are, others from U+0100."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_letters()
