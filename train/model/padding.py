"""The padding id of a model: within its vocabulary, and for a new model one that no text contains.

transformers builds the embedding with it: an id outside is an AssertionError there, and the row of
one inside starts as zeros and is never trained. Other changes to a configuration when it is read
are here too.
"""

import logging
from functools import cache
from typing import TYPE_CHECKING

from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger("rekindle")

# Families of RoBERTa's kind, which number positions from pad_token_id + 1.
COUNT_PAST_PADDING = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "ibert"),
    *("longformer", "mpnet", "data2vec-text", "xmod", "luke", "esm", "lilt"),
)


def padding_of(config: "PretrainedConfig") -> int | None:
    """Return the padding id; the configurations of some families have no such key."""
    return getattr(config.get_text_config(), "pad_token_id", None)


def set_padding(config: "PretrainedConfig", number: int | None) -> None:
    """Set it, in a text part too: heads read it there."""
    text = config.get_text_config()
    for part in {id(config): config, id(text): text}.values():
        part.pad_token_id = number


def drop_outside_padding(config: "PretrainedConfig", where: str) -> None:
    """Remove a padding id outside the vocabulary from the configuration in ``where``: no weight
    belongs to it.

    Logs it in a line, except for −1, which some write for none. Raises InputError for a family that
    numbers its positions from it.
    """
    text = config.get_text_config()
    padding, rows = padding_of(config), getattr(text, "vocab_size", None)
    if not isinstance(padding, int) or not isinstance(rows, int) or 0 <= padding < rows:
        return
    told = f"{where}: pad_token_id {padding:,} is outside the vocabulary of {rows:,} tokens"
    if text.model_type in COUNT_PAST_PADDING:
        raise InputError(
            f"{told}, and {text.model_type} numbers its positions from it; write the tokenizer's "
            "padding id there"
        )
    if padding != -1:
        _say_once(f"{told}; the model is used without one")
    set_padding(config, None)


def attend_fully(config: "PretrainedConfig", where: str) -> None:
    """Let BigBird attend to all tokens from the start, and log it: sparse attention changes to that
    at the first short text and stays so, and its output for a longer text would depend on the texts
    before.
    """
    if getattr(config, "attention_type", None) == "block_sparse":
        told = "attention_type block_sparse changes to original_full at the first short text"
        _say_once(f"{where}: {told}, for good; original_full is used from the start")
        config.attention_type = "original_full"


def padding_of_new(config: "PretrainedConfig", tokenizer: Tokenizer, who: str) -> None:
    """Give a model that begins with random weights a padding id that no text contains: if that of
    its configuration is an ordinary token of the ``tokenizer``, the tokenizer's own, or none.

    Logs it in a line. Raises InputError for a family that numbers its positions from the padding id
    if there is no such token, or if its positions would not suffice.
    """
    text = config.get_text_config()
    own, right = padding_of(config), tokenizer.hf.pad_token_id
    if own is None or own in _never_in_text(tokenizer):
        return
    right = right if right in _never_in_text(tokenizer) else None
    name = tokenizer.hf.convert_ids_to_tokens(own) if own < tokenizer.size else None
    meant = "no token" if name is None else repr(name)
    told = f"{who}: pad_token_id {own:,} of its config.json is {meant} of the tokenizer"
    if text.model_type in COUNT_PAST_PADDING and (
        right is None or right >= text.max_position_embeddings - 1
    ):
        better = "another" if right is None else f"{right:,}"
        raise InputError(
            f"{told}, which would never be embedded, and {text.model_type} numbers its positions "
            f"from it. Write {better} there, with as many max_position_embeddings more"
        )
    instead = "none" if right is None else f"the tokenizer's, {right:,},"
    _say_once(f"{told}, which would never be embedded; {instead} is used instead")
    set_padding(config, right)


def _never_in_text(tokenizer: Tokenizer) -> set[int]:
    """Return the special tokens that occur in sequences only as padding."""
    others = (tokenizer.eos_id, tokenizer.mask_id, tokenizer.hf.unk_token_id)
    return {*tokenizer.special_ids} - {*others, *tokenizer.prefix, *tokenizer.suffix}


@cache
def _say_once(told: str) -> None:
    """Log it once: a configuration is read several times in a run."""
    log.info(told)
