"""The language model of a student: pre-trained weights, or random ones of a configuration.

Nothing is known here of heads, prompts or losses.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from rekindle.data.errors import InputError
from rekindle.train.model.files import quiet_transformers

log = logging.getLogger("rekindle")

AUTO_CLASSES = {"masked_lm": "AutoModelForMaskedLM", "causal_lm": "AutoModelForCausalLM"}


def new_language_model(directory: Path, task: str, attention: str | None = None) -> Any:
    """Random weights of the configuration in ``directory``, in float32."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    try:
        # The configuration may say bfloat16, as large models' do: weights are trained in float32.
        return getattr(transformers, AUTO_CLASSES[task]).from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"student {directory} cannot be made as {AUTO_CLASSES[task]}: {reason}"
        ) from None


def load_language_model(directory: Path, task: str, attention: str | None = None) -> Any:
    """Pre-trained weights in float32; a body without LM head gets a fresh one, and that is said."""
    import transformers

    factory = getattr(transformers, AUTO_CLASSES[task])
    with quiet_transformers():
        try:
            model, info = factory.from_pretrained(
                str(directory),
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"student {directory} cannot be loaded as {AUTO_CLASSES[task]}: {reason}. To "
                "start from its configuration alone, set student.from_scratch"
            ) from None
    body = sorted(k for k in info["missing_keys"] if k.startswith(model.base_model_prefix + "."))
    if body:
        raise InputError(
            f"student {directory} lacks weights of its body ({', '.join(body[:3])} …); "
            "to start from random weights, set student.from_scratch"
        )
    if info["missing_keys"]:
        log.info("student: fresh LM head, %s has none", directory)
    return model
