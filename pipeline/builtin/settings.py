"""How large the built-in models are and how they are trained. Everything here is in their folder's
name: who changes a number gets new models and leaves the old ones alone.
"""

from typing import Any

from rekindle.data.settings import Settings
from rekindle.pipeline.demo.settings import QUICK
from rekindle.pipeline.demo.tasks import TaskSizes


class BuiltInSettings(Settings):
    """Sizes and training of the built-in models: near those of ``pipeline demo --quick``."""

    vocabulary: int = QUICK.vocabulary
    documents: int | None = QUICK.documents
    sizes: TaskSizes = TaskSizes(train=640, dev=160, test=640)
    # Room for what a recipe puts before a sequence, and for longer pairs; trained on 48 tokens.
    positions: int = 64
    sequence_length: int = QUICK.sequence_length
    batch_sequences: int = QUICK.batch_sequences
    replicas: int = QUICK.replicas
    seed: int = QUICK.seed
    bert: dict[str, Any] = QUICK.model
    bert_larger: dict[str, Any]
    gpt2: dict[str, Any]
    gpt2_larger: dict[str, Any]
    pretrain: dict[str, Any] = QUICK.base
    further: dict[str, Any]  # of a domain's model, which starts from bert
    finetune: dict[str, Any]


_LARGER = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
_GPT2 = {"n_embd": 128, "n_layer": 1, "n_head": 2, "n_inner": 256, "initializer_range": 0.06}

SETTINGS = BuiltInSettings(
    bert_larger=QUICK.model | _LARGER | {"intermediate_size": 384},
    gpt2=_GPT2,
    gpt2_larger=_GPT2 | {"n_embd": 192, "n_layer": 2, "n_head": 3, "n_inner": 384},
    further={"steps": 80, "learning_rate": 1e-3, "warmup_steps": 10, "evaluate_every": 80},
    finetune={"epochs": 4, "batch_size": 16, "learning_rate": 1.5e-3},
)
