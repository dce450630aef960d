"""Which models tell the two texts of a pair apart by segment ids."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def knows_segments(config: "PretrainedConfig") -> bool:
    """Whether a model has embeddings of two segments or more.

    ``token_type_ids`` are for such models alone: GPT-2 and its like take them for words, and add
    the embedding of token 0 to every place.
    """
    return (getattr(config.get_text_config(), "type_vocab_size", None) or 0) >= 2
