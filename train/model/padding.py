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


def drop_outside_padding(config: "PretrainedConfig", source: str) -> None:
    """Remove a padding id outside the vocabulary from the configuration in ``source``: no weight
    belongs to it.

    Logs it in a line, except for −1, which some write for none. Raises InputError for a family that
    numbers its positions from it.
    """
    text = config.get_text_config()
    padding, rows = padding_of(config), getattr(text, "vocab_size", None)
    if not isinstance(padding, int) or not isinstance(rows, int) or 0 <= padding < rows:
        return
    problem = f"{source}: pad_token_id {padding:,} is outside the vocabulary of {rows:,} tokens"
    if text.model_type in COUNT_PAST_PADDING:
        raise InputError(
            f"{problem}, and {text.model_type} numbers its positions from it; write the "
            "tokenizer's padding id there"
        )
    if padding != -1:
        _log_once(f"{problem}; the model is used without one")
    set_padding(config, None)


def attend_fully(config: "PretrainedConfig", source: str) -> None:
    """Let BigBird attend to all tokens from the start, and log it: sparse attention changes to that
    at the first short text and stays so, and its output for a longer text would depend on the texts
    before.
    """
    if getattr(config, "attention_type", None) == "block_sparse":
        change = "attention_type block_sparse changes to original_full at the first short text"
        _log_once(f"{source}: {change}, for good; original_full is used from the start")
        config.attention_type = "original_full"


def padding_of_new(config: "PretrainedConfig", tokenizer: Tokenizer, subject: str) -> None:
    """Give a model that begins with random weights a padding id that no text contains: if that of
    its configuration is an ordinary token of the ``tokenizer``, the tokenizer's own, or none.

    Logs it in a line. Raises InputError for a family that numbers its positions from the padding id
    if there is no such token, or if its positions would not suffice.
    """
    text = config.get_text_config()
    configured, replacement = padding_of(config), tokenizer.hf.pad_token_id
    if configured is None or configured in _never_in_text(tokenizer):
        return
    replacement = replacement if replacement in _never_in_text(tokenizer) else None
    name = tokenizer.hf.convert_ids_to_tokens(configured) if configured < tokenizer.size else None
    token = "no token" if name is None else repr(name)
    problem = (
        f"{subject}: pad_token_id {configured:,} of its config.json is {token} of the tokenizer"
    )
    if text.model_type in COUNT_PAST_PADDING and (
        replacement is None or replacement >= text.max_position_embeddings - 1
    ):
        suggestion = "another" if replacement is None else f"{replacement:,}"
        raise InputError(
            f"{problem}, which would never be embedded, and {text.model_type} numbers its "
            f"positions from it. Write {suggestion} there, with as many max_position_embeddings "
            "more"
        )
    replacement_text = "none" if replacement is None else f"the tokenizer's, {replacement:,},"
    _log_once(f"{problem}, which would never be embedded; {replacement_text} is used instead")
    set_padding(config, replacement)


def _never_in_text(tokenizer: Tokenizer) -> set[int]:
    """Return the special tokens that occur in sequences only as padding."""
    used_specials = (tokenizer.eos_id, tokenizer.mask_id, tokenizer.hf.unk_token_id)
    return {*tokenizer.special_ids} - {*used_specials, *tokenizer.prefix, *tokenizer.suffix}


@cache
def _log_once(message: str) -> None:
    """Log it once: a configuration is read several times in a run."""
    log.info(message)
