"""A tokenizer with the facts that packing, masks and fingerprints need, and fast encoding.

Importing this module imports neither transformers nor torch. Sequences and text files are unknown
here.
"""

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.encoded import Encoded
from rekindle.data.corpus.encoder import LATEST_CUT_RULE, Encoder
from rekindle.data.corpus.tokenizer_files import read_tokenizer_files
from rekindle.data.errors import InputError, naming

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A fast Hugging Face tokenizer and the facts we need about it.

    size: one past the largest id, added tokens included: what a model's embedding needs. gaps:
    (first, past the last) of each gap in the ids below; these are not tokens. digest: sha256 over
    the sorted (id, token) pairs, the identity of the vocabulary. special_ids: every special token,
    the unknown token included. prefix, suffix: what it puts around one text ([CLS] and [SEP]; only
    BOS for Llama; nothing for GPT-2). pad_id is 0 for a tokenizer without a padding token.
    """

    hf: "PreTrainedTokenizerFast"
    name: str
    size: int
    gaps: tuple[tuple[int, int], ...]
    digest: str
    mask_id: int | None
    pad_id: int
    eos_id: int | None
    special_ids: frozenset[int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    encoder: Encoder = field(repr=False)

    def reading_special_tokens(self) -> "Tokenizer":
        """Return the same tokenizer, reading a special token's name within a text as the token."""
        return wrap_tokenizer(self.hf, self.name, special_names_are_text=False)

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Return each text's tokens: no special tokens, no truncation, all cores.

        A special token's name within a text ("[MASK]", "</s>") is text like any other (except to a
        Unigram model that has it among its pieces), unless ``reading_special_tokens`` made this.
        """
        return self.encoder.texts(texts).each()

    def encode_pair(
        self, a: str, b: str, max_length: int, cut: int = LATEST_CUT_RULE
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return two texts joined as a pair: (input_ids [L], token_type_ids [L]), both int32.

        Special tokens included, L ≤ max_length; the longer text is shortened first, as in the
        tokenizers library (``cut`` 1: as in older caches). Raises ValueError if ``max_length``
        leaves no room for a token of each.
        """
        first, second = self.encoder.encodings([a, b])
        joined = self.encoder.joined(first, second, max_length, cut)
        return np.array(joined.ids, np.int32), np.array(joined.type_ids, np.int32)

    def tokens(self) -> frozenset[tuple[int, str]]:
        """Return every (id, token)."""
        return frozenset((id, token) for token, id in self.hf.get_vocab().items())

    def uncut_lengths(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> NDArray[np.int64]:
        """Return the tokens of each text, or of each pair, special ones included, before anything
        is cut: int64 [N].
        """
        added = self.encoder.backend.num_special_tokens_to_add(is_pair=pairs is not None)
        parts = (texts,) if pairs is None else (texts, pairs)
        counts = [[len(encoding) for encoding in self.encoder.encodings(part)] for part in parts]
        return np.array(counts, np.int64).reshape(len(parts), -1).sum(axis=0) + added

    def save(self, directory: str | Path) -> None:
        """Write it so that ``load_tokenizer(directory)`` and transformers can read it."""
        self.hf.save_pretrained(str(directory))

    def __reduce__(self) -> tuple[object, ...]:
        # The backend's own pickle forgets encode_special_tokens.
        return wrap_tokenizer, (self.hf, self.name, self.encoder.backend.encode_special_tokens)


def wrap_tokenizer(
    hf: "PreTrainedTokenizerFast", name: str, special_names_are_text: bool = True
) -> Tokenizer:
    """Return a Tokenizer around a fast Hugging Face tokenizer, which is not changed."""
    # Our own copy: padding, truncation and special tokens written in a text are settings of the
    # backend, and some tokenizer.json files come with them switched on.
    backend = deepcopy(hf.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = special_names_are_text
    added = hf.added_tokens_decoder
    special = {*hf.all_special_ids, *(id for id, token in added.items() if token.special)}
    encoder = Encoder(backend)
    with naming(f"tokenizer {name!r}"):
        encoder.encodings(["a"])
    prefix, suffix = _affixes(backend)
    ids_of_tokens = hf.get_vocab()
    vocabulary = sorted(zip(ids_of_tokens.values(), ids_of_tokens, strict=True))
    if not vocabulary:
        raise InputError(f"tokenizer {name!r} has no tokens; give one that was trained")
    return Tokenizer(
        hf=hf,
        name=name,
        size=vocabulary[-1][0] + 1,
        gaps=_gaps([id for id, _ in vocabulary]),
        digest=hashlib.sha256(json.dumps(vocabulary, separators=(",", ":")).encode()).hexdigest(),
        mask_id=hf.mask_token_id,
        pad_id=0 if hf.pad_token_id is None else hf.pad_token_id,
        eos_id=hf.eos_token_id,
        special_ids=frozenset(special),
        prefix=prefix,
        suffix=suffix,
        encoder=encoder,
    )


def _gaps(ids: list[int]) -> tuple[tuple[int, int], ...]:
    """Return (first, past the last) of the numbers from 0 on missing in the ascending ``ids``."""
    return tuple((a + 1, b) for a, b in pairwise([-1, *ids]) if b > a + 1)


def _affixes(backend: "Backend") -> tuple[tuple[int, ...], tuple[int, ...]]:
    probe = backend.encode("a")
    content = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    if not content:
        return tuple(probe.ids), ()
    return tuple(probe.ids[: content[0]]), tuple(probe.ids[content[-1] + 1 :])


def load_tokenizer(path_or_id: str) -> Tokenizer:
    """Return the tokenizer of a local directory or of a Hugging Face id; no remote code is run.

    Besides what transformers' AutoTokenizer reads, a directory may hold only vocabulary files:
    ``vocab.txt`` is BERT WordPiece, which lower-cases if no token except the bracketed ones has an
    ASCII capital; ``encoder.json`` + ``vocab.bpe`` or ``vocab.json`` + ``merges.txt`` is GPT-2's
    byte-level BPE, ended by <|endoftext|>.

    Raises InputError: no such directory, no tokenizer files in it, an id that cannot be loaded, a
    tokenizer without a fast (Rust) implementation.
    """
    return wrap_tokenizer(read_tokenizer_files(path_or_id), path_or_id)
