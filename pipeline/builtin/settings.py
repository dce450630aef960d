"""How large the built-in models are and how they are trained. Everything here is in their folder's
name: who changes a number gets new models and leaves the old ones alone.
"""

from typing import Any

from rekindle.data.settings import Settings
from rekindle.pipeline.builtin.tasks import TaskSizes

Numbers = dict[str, int | float]  # settings by name


class BuiltInSettings(Settings):
    """Sizes and training of the built-in models: near those of ``pipeline demo --quick``."""

    vocabulary: int = 2000
    documents: int | None = 1500  # of the unlabelled corpus, at most
    sizes: TaskSizes = TaskSizes(train=640, dev=160, test=640)
    # Room for what a recipe puts before a sequence, and for longer pairs; trained on 48 tokens.
    positions: int = 64
    sequence_length: int = 48
    batch_sequences: int = 32
    replicas: int = 2
    seed: int = 0
    bert: Numbers
    bert_larger: Numbers
    gpt2: Numbers
    gpt2_larger: Numbers
    pretrain: dict[str, Any]
    further: dict[str, Any]  # of a domain's model, which starts from bert
    finetune: dict[str, Any]


# One layer, and weights that start larger than BERT's 0.02: it learns most in a minute on a core.
_BERT = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "initializer_range": 0.06,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
}
_LARGER = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
_GPT2 = {"n_embd": 128, "n_layer": 1, "n_head": 2, "n_inner": 256, "initializer_range": 0.06}

SETTINGS = BuiltInSettings(
    bert=_BERT,
    bert_larger=_BERT | _LARGER | {"intermediate_size": 384},
    gpt2=_GPT2,
    gpt2_larger=_GPT2 | {"n_embd": 192, "n_layer": 2, "n_head": 3, "n_inner": 384},
    pretrain={"steps": 160, "learning_rate": 2e-3, "warmup_steps": 40, "evaluate_every": 160},
    further={"steps": 80, "learning_rate": 1e-3, "warmup_steps": 10, "evaluate_every": 80},
    finetune={"epochs": 4, "batch_size": 16, "learning_rate": 1.5e-3},
)
