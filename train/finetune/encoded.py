"""The texts of a task as a model's tokens: one way for fine-tuning, scoring and predicting."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from rekindle.data.corpus.tokenizer import wrap_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.data.padding import pad
from rekindle.train.device_batch import model_inputs
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.finetune.words import EncodedWords, encode_words
from rekindle.train.model.files import longest_input
from rekindle.train.model.fitting import knows_segments
from rekindle.train.model.padding import padding_of

logger = logging.getLogger("rekindle")

DEFAULT_MAX_LENGTH = 512  # tokens of a text: as many as most encoders were trained with
# Batches of an epoch that are sorted by length together: little padding, and still mixed.
BUCKET_BATCHES = 32

Row = list[int] | NDArray[np.int32]


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids per example, unpadded; segment ids only if tokenizer and model know them.

    ``word_positions``, if the examples are lists of words: for each example the position of each
    word's first token, -1 if the word was cut off or has no token.
    """

    input_ids: Sequence[Row]
    token_type_ids: Sequence[Row] | None
    padding_id: int
    limit: int = 0  # tokens; longer texts are cut
    model_limit: float = math.inf  # tokens that the model takes
    cut_count: int = 0  # texts that were cut
    longest_uncut: int = 0  # tokens of the longest text before any cut
    word_positions: Sequence[NDArray[np.int64]] | None = None
    words_cut: int = 0  # words not read because the text is cut
    words_empty: int = 0  # words of which the tokenizer makes no token

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens per example: int64 [N]."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    @property
    def unread(self) -> dict[str, int]:
        """Return the numbers of words that are not read, by reason."""
        return {"cut": self.words_cut, "without a token": self.words_empty}

    @property
    def count(self) -> int:
        """Return how many texts there are."""
        return len(self.input_ids)

    @cached_property
    def _word_ends(self) -> np.ndarray:
        return np.cumsum(
            [len(positions) for positions in self.word_positions or ()], dtype=np.int64
        )

    def kept_word_indices(self, rows: np.ndarray) -> np.ndarray:
        """Return the indices, among all words of all examples, of the words of some rows that have
        a token and were not cut off: int64 [P].
        """
        assert self.word_positions is not None
        each = [(self._word_ends[row], self.word_positions[row]) for row in rows]
        return np.concatenate(
            [end - len(positions) + np.flatnonzero(positions >= 0) for end, positions in each]
        )

    def kept_word_positions(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Return the positions of these words' first tokens in a batch of the rows, flattened from
        [B,width]: int64 [P].
        """
        assert self.word_positions is not None
        each = [self.word_positions[row] for row in rows]
        flat = [number * width + positions for number, positions in enumerate(each)]
        return np.concatenate(flat)[np.concatenate(each) >= 0]


@dataclass(frozen=True)
class Cuts:
    """What is cut of texts that come in blocks: the values of EncodedTexts, summed up."""

    limit: int = 0
    model_limit: float = math.inf
    cut_count: int = 0
    longest_uncut: int = 0
    count: int = 0
    unread: dict[str, int] = field(default_factory=dict)

    def add(self, texts: "EncodedTexts | Cuts") -> "Cuts":
        """Return these combined with those of one more block."""
        unread = {
            reason: self.unread.get(reason, 0) + count for reason, count in texts.unread.items()
        }
        return Cuts(
            texts.limit,
            texts.model_limit,
            self.cut_count + texts.cut_count,
            max(self.longest_uncut, texts.longest_uncut),
            self.count + texts.count,
            unread,
        )


def encode(
    tokenizer: PreTrainedTokenizerFast,
    model_config: PretrainedConfig,
    data: TaskData,
    max_length: int | None,
) -> EncodedTexts:
    """Tokenize a split, cut to ``max_length`` (by default DEFAULT_MAX_LENGTH) or, if lower, to what
    model and tokenizer take.

    ``tokenizer`` is a fast Hugging Face one; its own template joins pairs (GPT-2 and Llama put
    nothing between), as in stage 1. A special token written in a text, such as [SEP], is
    tokenized as ordinary text. An empty text becomes one padding token, so that no row is empty.
    Lists of words are read as in ``encode_words``.
    """
    padding_id = padding_id_of(model_config, tokenizer)
    model_limit = min(longest_input(model_config) or math.inf, tokenizer.model_max_length)
    limit = int(min(max_length or DEFAULT_MAX_LENGTH, model_limit))
    if data.words is not None:
        wrapped = wrap_tokenizer(tokenizer, tokenizer.name_or_path)
        encoded_words = encode_words(wrapped, data.words, limit)
        largest = max((int(row.max(initial=0)) for row in encoded_words.ids), default=0)
        _refuse_unknown(tokenizer, model_config, largest)
        return from_words(encoded_words, padding_id, limit, model_limit)
    encodings = tokenizer(
        data.texts, data.pairs, truncation=True, max_length=limit, split_special_tokens=True
    )
    ids = [row or [padding_id] for row in encodings["input_ids"]]
    # A generic tokenizer also gives segments to models that would misread them.
    types = encodings.get("token_type_ids") if knows_segments(model_config) else None
    cut_rows = [row for row, encoding in enumerate(encodings.encodings) if encoding.overflowing]
    longest_uncut = max(map(len, ids), default=0)
    if cut_rows:
        pairs = data.pairs and [data.pairs[row] for row in cut_rows]
        texts, options = [data.texts[row] for row in cut_rows], {"split_special_tokens": True}
        uncut = tokenizer(texts, pairs, truncation=False, verbose=False, **options)
        longest_uncut = max(map(len, uncut["input_ids"]))
    _refuse_unknown(tokenizer, model_config, max(map(max, ids), default=0))
    return EncodedTexts(ids, types, padding_id, limit, model_limit, len(cut_rows), longest_uncut)


def _refuse_unknown(
    tokenizer: PreTrainedTokenizerFast, model_config: PretrainedConfig, largest: int
) -> None:
    """Raise InputError if the model cannot embed the ``largest`` id."""
    embedding_rows = model_config.get_text_config().vocab_size
    if largest >= embedding_rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} gives id {largest} ({token!r}), but the "
            f"model's embedding has {embedding_rows:,} rows. Give the tokenizer files "
            "(tokenizer.json, tokenizer_config.json, special_tokens_map.json) that the model was "
            "saved with, or make the embedding larger (transformers' resize_token_embeddings)"
        )


def from_words(
    words: EncodedWords, padding_id: int, limit: int, model_limit: float
) -> EncodedTexts:
    """Return texts that were given as words; an empty one is a padding token."""
    ids = [row if len(row) else np.array([padding_id], np.int32) for row in words.ids]
    return EncodedTexts(
        ids,
        None,
        padding_id,
        limit,
        model_limit,
        cut_count=int((words.lengths > limit).sum()),
        longest_uncut=int(words.lengths.max(initial=0)),
        word_positions=words.positions,
        words_cut=words.cut,
        words_empty=words.empty,
    )


def padding_id_of(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return an id to pad with that the model can embed: its own padding id, else the tokenizer's,
    the end of text, or 0.
    """
    embedding_rows = model_config.get_text_config().vocab_size
    candidates = (padding_of(model_config), tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next(
        (number for number in candidates if number is not None and number < embedding_rows), 0
    )


def collate(encoded: EncodedTexts, rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """Return the model's arguments for some rows: int64 [B, longest], padded on the right."""
    lengths, types = encoded.lengths[rows], encoded.token_type_ids
    ids = pad([encoded.input_ids[row] for row in rows], lengths, encoded.padding_id)
    segments = None if types is None else pad([types[row] for row in rows], lengths, 0)
    return model_inputs(ids, lengths, device, segments)


def epoch_batches(
    lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int
) -> list[np.ndarray]:
    """Return the row numbers of each batch of an epoch: every row once, rows of similar length
    together.

    Rows are shuffled, sorted by length within stretches of ``BUCKET_BATCHES`` batches, cut, and the
    batches shuffled again. A pure function of its arguments; only one batch may be short.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(len(lengths))
    stretch = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), stretch):
        rows = order[start : start + stretch]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return [batches[number] for number in generator.permutation(len(batches))]


def log_cut_texts(
    splits: Mapping[str, EncodedTexts | Cuts], trained_split: str = ""
) -> dict[str, float]:
    """Return the share of each split's texts that was cut, and log it, as a warning if any was.

    Also warn of unread words: in ``trained_split`` they teach nothing, in others they count as
    wrong.
    """
    for name, texts in splits.items():
        for reason, count in texts.unread.items():
            if count:
                wrong = "have no answer, and count as wrong"
                consequence = "teach nothing" if name == trained_split else wrong
                words = counted(count, "word")
                logger.warning("%s of %s: %s; they %s", words, name, reason, consequence)
    shares = {name: texts.cut_count / max(texts.count, 1) for name, texts in splits.items()}
    limit = max((texts.limit for texts in splits.values()), default=0)
    if not any(shares.values()):
        logger.info("no text is cut (at most %d tokens)", limit)
        return shares
    shares_text = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
    longest = max(texts.longest_uncut for texts in splits.values())
    model_limit = min(texts.model_limit for texts in splits.values())
    advice = "the model takes no more"
    if limit < model_limit:
        amount = "all" if longest <= model_limit else "more"
        advice = f"max_length={min(longest, model_limit)} reads {amount}"
    logger.warning(
        "texts are cut at %d tokens: %s (the longest has %d); what follows is never read: %s",
        *(limit, shares_text, longest, advice),
    )
    return shares
