"""From texts to vectors: the encoder's own tokenizer, its prompt, and its limits.

A special token's name in a text is text, as for all experts here; sentence-transformers reads it as
the token.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rekindle.data.corpus.tokenizer import Tokenizer, load_tokenizer, wrap_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.padding import length_buckets, pad
from rekindle.train.embedding.encoder import SentenceEncoder, load_encoder
from rekindle.train.embedding.folder import (
    POOLINGS,
    EncoderFolder,
    check_encoder_folder,
    is_encoder_folder,
    plain_encoder,
    read_encoder_folder,
)
from rekindle.train.model.files import longest_input, place
from rekindle.train.model.fitting import knows_segments
from rekindle.train.model.folder import resolve_model
from rekindle.train.model.padding import padding_of
from rekindle.train.model.sight import padding_influence

UNLIMITED = 2**31 - 1  # tokens; tokenizers without a limit say 10^30
BATCH_TOKENS = 4096  # of a forward pass, padding included

Ids = NDArray[np.int32]
Vectors = NDArray[np.float32]


def describe_encoder(
    model: str,
    pooling: str | None = None,
    normalise: bool | None = None,
    prompt: str | None = None,
) -> EncoderFolder:
    """Return how ``model`` makes vectors, by its files and by the settings given.

    Raises InputError for a plain encoder without settings for pooling and normalising, and if a
    folder of sentence-transformers contradicts them.
    """
    directory = resolve_model(model, check_encoder_folder)
    return describe_encoder_in(directory, model, pooling, normalise, prompt)


def describe_encoder_in(
    directory: Path,
    model: str,
    pooling: str | None = None,
    normalise: bool | None = None,
    prompt: str | None = None,
) -> EncoderFolder:
    """Do as ``describe_encoder`` for a known directory."""
    if pooling is not None and {*pooling.split("+")} - {*POOLINGS}:
        raise InputError(f"pooling {pooling!r} is not known; known are {', '.join(POOLINGS)}")
    if not is_encoder_folder(directory):
        if pooling is None or normalise is None:
            raise InputError(
                f"{model!r} is a plain encoder: it has no modules.json to tell how the states of "
                f"a text's tokens become one vector. Set pooling ({', '.join(POOLINGS)}) and "
                "normalise (true or false), or give a folder of sentence-transformers"
            )
        return plain_encoder(directory, pooling, normalise, prompt or "")
    encoder_folder = read_encoder_folder(directory, prompt)
    stored_pooling, stored_normalise = encoder_folder.pooling_name, encoder_folder.normalised
    settings = {"pooling": (pooling, stored_pooling), "normalise": (normalise, stored_normalise)}
    for key, (stated, stored) in settings.items():
        if stated is not None and stated != stored:
            raise InputError(
                f"{model!r} is a folder of sentence-transformers, whose modules say {key}: "
                f"{str(stored).lower()}, not {str(stated).lower()}. Leave {key} out, or change the "
                "folder's modules"
            )
    return encoder_folder


def describe_prompts(folder: EncoderFolder, has_prompt_setting: bool) -> str | None:
    """Return a line on an encoder's prompts; None if it has none."""
    if folder.prompt:
        return f"each text is read after {folder.prompt!r}"
    if folder.prompts and not has_prompt_setting:
        return (
            f"it has prompts ({', '.join(folder.prompts)}), but no default one: texts are "
            "read without one, unless `prompt` gives the text to put before each"
        )
    return None


def own_tokenizer(folder: EncoderFolder, tokenizer: Tokenizer | None = None) -> Tokenizer:
    """Return the encoder's tokenizer, lower-casing if its folder says so."""
    tokenizer = tokenizer or load_tokenizer(str(folder.transformer))
    if not folder.lower_case:
        return tokenizer
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as InOrder

    hf = deepcopy(tokenizer.hf)
    normalizer = hf.backend_tokenizer.normalizer
    normalizers: list[Any] = [Lowercase()] if normalizer is None else [Lowercase(), normalizer]
    hf.backend_tokenizer.normalizer = InOrder(normalizers)
    return wrap_tokenizer(hf, tokenizer.name)


def longest_text(folder: EncoderFolder, tokenizer: Tokenizer, settings: Any) -> int:
    """Return the number of tokens that it reads of a text, with special ones; UNLIMITED for all."""
    limit = folder.max_length or int(tokenizer.hf.model_max_length)
    return min(limit, longest_input(settings) or UNLIMITED, UNLIMITED)


def skipped_tokens(folder: EncoderFolder, tokenizer: Tokenizer) -> int:
    """Return how many tokens of each text pooling leaves out: those of the prompt."""
    if not folder.prompt or not folder.skips_prompt:
        return 0
    prompt_ids = [*tokenizer.prefix, *tokenizer.encode([folder.prompt])[0].ids, *tokenizer.suffix]
    return len(prompt_ids) - (prompt_ids[-1] in tokenizer.special_ids)


@dataclass(frozen=True)
class TextEncoder:
    """A loaded encoder and its tokenizer: texts in, vectors out."""

    folder: EncoderFolder
    encoder: SentenceEncoder
    tokenizer: Tokenizer
    max_length: int
    device: str
    # only texts of equal length go together: padding changes its outputs
    needs_equal_lengths: bool = False

    @classmethod
    def of(cls, folder: EncoderFolder) -> "TextEncoder":
        """Load what ``folder`` describes onto this process's device, in float32."""
        placement = place("fp32")
        encoder = load_encoder(folder).to(placement.device)
        tokenizer = own_tokenizer(folder)
        longest = longest_text(folder, tokenizer, encoder.config)
        needs_equal_lengths = padding_influence(encoder.model) > 0
        return cls(folder, encoder, tokenizer, longest, placement.device, needs_equal_lengths)

    def ids(
        self, texts: Sequence[str], prompt: str | None = None, longest: int | None = None
    ) -> list[Ids]:
        """Return each text's tokens as the model reads them, after the ``prompt`` (None: its own).

        ``longest``: tokens, if less than it reads.
        """
        prompt = self.folder.prompt if prompt is None else prompt
        prefix, suffix = self.tokenizer.prefix, self.tokenizer.suffix
        room = max(0, (longest or self.max_length) - len(prefix) - len(suffix))
        encoded = self.tokenizer.encode([prompt + text for text in texts])
        return [np.array([*prefix, *one.ids[:room], *suffix], np.int32) for one in encoded]

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors [N,D] of ``texts`` [N]."""
        skipped = self.skipped(self.folder.prompt)
        return self.vectors_of(self.ids(texts), [skipped] * len(texts))

    def skipped(self, prompt: str) -> int:
        """Return how many tokens of a text after that prompt pooling leaves out."""
        return skipped_tokens(replace(self.folder, prompt=prompt), self.tokenizer)

    def vectors_of(self, ids: Sequence[Sequence[int] | Ids], skipped: Sequence[int]) -> Vectors:
        """Return the vectors [N,D] of texts given as tokens; ``skipped`` [N]: how many pooling
        leaves out.
        """
        lengths = np.array([len(one) for one in ids], np.int64)
        if empty := np.flatnonzero(lengths == 0).tolist():
            raise InputError(f"text {empty[0] + 1} has no tokens, so it has no vector")
        vectors_by_row: dict[int, Vectors] = {}
        for skipped_count in sorted({*skipped}):
            masked_lengths = lengths * (np.array(skipped) == skipped_count)
            for rows in length_buckets(masked_lengths, BATCH_TOKENS, self.needs_equal_lengths):
                inputs = self._inputs([ids[row] for row in rows])
                with torch.inference_mode():
                    vectors = self.encoder(inputs, skipped_count).cpu().numpy()
                vectors_by_row |= dict(zip(rows.tolist(), vectors, strict=True))
        return np.stack([vectors_by_row[row] for row in range(len(ids))])

    def _inputs(self, ids: Sequence[Sequence[int] | Ids]) -> dict[str, torch.Tensor]:
        """Return one batch, padded at its end."""
        lengths = np.array([len(one) for one in ids], np.int64)
        padding_id = padding_of(self.encoder.config)
        padded = pad(
            [np.asarray(one, np.int32) for one in ids],
            lengths,
            padding_id if isinstance(padding_id, int) and padding_id >= 0 else 0,
        )
        mask = np.arange(padded.shape[1]) < lengths[:, None]
        inputs = {"input_ids": padded, "attention_mask": mask}
        has_segments = "token_type_ids" in self.tokenizer.hf.model_input_names
        if has_segments and knows_segments(self.encoder.config):
            inputs["token_type_ids"] = np.zeros_like(padded)
        return {k: torch.from_numpy(v.astype(np.int64)).to(self.device) for k, v in inputs.items()}
