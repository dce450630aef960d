"""The language model of a student: pre-trained weights, or random ones of a configuration.

Nothing is known here of heads, prompts or losses.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rekindle.data.errors import InputError
from rekindle.train.model.files import load_weights, refusing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("rekindle")

AUTO_CLASSES = {"masked_lm": "AutoModelForMaskedLM", "causal_lm": "AutoModelForCausalLM"}


def new_language_model(
    directory: Path, task: str, attention: str | None = None
) -> "PreTrainedModel":
    """Make random weights of the configuration in ``directory``, in float32."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    with refusing(f"student {directory} cannot be made as {AUTO_CLASSES[task]}"):
        # The configuration may say bfloat16, as large models' do: weights are trained in float32.
        model: PreTrainedModel = getattr(transformers, AUTO_CLASSES[task]).from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    return model


def load_language_model(
    directory: Path, task: str, attention: str | None = None
) -> "PreTrainedModel":
    """Load pre-trained weights in float32; a body without LM head gets a fresh one, and that is
    said.
    """
    what = f"student {directory} cannot be loaded as {AUTO_CLASSES[task]}"
    with refusing(what, ". To start from its configuration alone, set student.from_scratch"):
        model, info = load_weights(
            directory, AUTO_CLASSES[task], torch.float32, attn_implementation=attention
        )
    body = sorted(k for k in info["missing_keys"] if k.startswith(f"{model.base_model_prefix}."))
    if body:
        raise InputError(
            f"student {directory} lacks weights of its body ({', '.join(body[:3])} …); "
            "to start from random weights, set student.from_scratch"
        )
    if info["missing_keys"]:
        log.info("student: fresh LM head, %s has none", directory)
    return model
