"""Tiny models of common families: two layers, six embedding rows without tokens, random weights
away from their initial values, no dropout. Their tokenizers know single letters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_letters
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from testlib.models import AUTO
from testlib.run_alone import CLASSIFIER

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's order: padding is not 0
SPACE = "Ġ"  # as byte-level tokenizers write it
WORDS = [*ascii_letters]
TOKENS = len(SPECIAL) + 1 + 2 * len(WORDS)  # a space; each word, and each after a space
ROWS = 116
LABELS = 3
LEFT_OUT = object()  # a setting that a family lacks
COMMON = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 26,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
IDS = {
    "masked_lm": {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2, "mask_token_id": 4},
    "causal_lm": {"pad_token_id": None},
}
TEACHER, STUDENT, EXPERT = ROLES = ("teacher", "student", "expert")


@dataclass(frozen=True)
class Family:
    """A row of the grid: a family as its users have it, and the result in each role."""

    name: str
    kind: str  # transformers' model_type
    task: str  # masked_lm or causal_lm
    own: Mapping[str, Any] = field(default_factory=dict)  # settings of its own
    saved_as: str = ""  # the Auto class it is saved with, if not the task's
    refused: Mapping[str, str] = field(default_factory=dict)  # role -> the expected error
    moved_by_padding: bool = False
    fresh_head: bool = False  # whether it starts as a student with a fresh head
    quick: bool = False
    note: str = ""  # which of its models, if it has several rows

    @property
    def title(self) -> str:
        """The title of its row."""
        return f"{self.name} ({self.note})" if self.note else self.name

    def config(self, **more: Any) -> transformers.PretrainedConfig:
        """Return its configuration, without dropout and noise."""
        values = {**COMMON, **IDS[self.task], **self.own}
        if "text_config" in self.own:  # a model for images and text
            values = {**self.own, "text_config": {**COMMON, **self.own["text_config"]}}
        given = {k: v for k, v in (values | more).items() if v is not LEFT_OUT}
        config = transformers.AutoConfig.for_model(self.kind, **given)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            for name, value in vars(part).items():
                if ("drop" in name or "jitter" in name) and isinstance(value, float):
                    setattr(part, name, 0.0)
        return config

    def build(self, auto: str = "", **more: Any) -> transformers.PreTrainedModel:
        """Return a model of its saved class, or of ``auto``; biases and norms are random, too."""
        made = getattr(transformers, auto or self.saved_as or AUTO[self.task])
        torch.manual_seed(0)
        model = made.from_config(self.config(**more), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()

    def save(self, folder: Path, role: str) -> Path:
        """Write a model for ``role`` and its tokenizer."""
        head = role == EXPERT
        model = self.build(CLASSIFIER, num_labels=LABELS) if head else self.build()
        model.save_pretrained(folder)
        return save_tokenizer(folder, self.task)


def save_tokenizer(folder: Path, task: str) -> Path:
    """Write a tokenizer of single letters.

    Encoders put a token between two letters. For decoders it has no padding token, and ends texts
    with a token that Qwen2's class would add; it works on bytes, as that class requires.
    """
    end = "</s>" if task == "masked_lm" else "<|endoftext|>"
    names = [end if token == "</s>" else token for token in SPECIAL]
    names += [SPACE, *WORDS, *(SPACE + word for word in WORDS)]
    words = {word: number for number, word in enumerate(names)}
    merges = [(SPACE, word) for word in WORDS]
    backend = Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    more = {"bos_token": "<s>", "eos_token": end}
    if task == "masked_lm":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
        more |= {"cls_token": "<s>", "sep_token": "</s>"}
        more |= {"pad_token": "<pad>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", model_max_length=38, **more
    ).save_pretrained(folder)
    return folder
