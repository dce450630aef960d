"""Tokenizer directories made from another: with gaps in their ids, or with more tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def renumbered(source: Path, target: Path, ids: Mapping[str, int]) -> Path:
    """Copy the tokenizer in ``source`` with other ids for some tokens."""
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    tokenizer.save_pretrained(target)
    file = target / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] |= ids
    file.write_text(json.dumps(values))
    return target


def with_gaps(source: Path, target: Path, lifted: Sequence[str], by: int = 20) -> Path:
    """Copy a tokenizer with the ids of the tokens ``lifted`` raised by the vocabulary's size plus
    ``by``.
    """
    vocabulary = AutoTokenizer.from_pretrained(str(source)).get_vocab()
    return renumbered(source, target, {t: vocabulary[t] + len(vocabulary) + by for t in lifted})


def with_more(source: Path, target: Path, tokens: Sequence[str]) -> Path:
    """Copy a tokenizer with more special tokens at the end, like chat models."""
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens]})
    tokenizer.save_pretrained(target)
    return target


def that_begins_only(source: Path, target: Path) -> Path:
    """Copy a byte-level tokenizer that puts <s> before a text and nothing after it, like
    Llama's.
    """
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s> $B:1",
        special_tokens=[("<s>", backend.token_to_id("<s>"))],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", model_max_length=256
    ).save_pretrained(target)
    return target
