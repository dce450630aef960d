"""Heads that a folder has weights of: which of a family's heads a configuration means, and what of
them no class takes.
"""

import logging
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.data.errors import InputError
from rekindle.train.model.folder import stored_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("rekindle")

# DeBERTa's own LM head transforms and multiplies with the word embeddings. Its published weights
# have it, while their configurations, which are older than the key, mean transformers' BERT-like
# head (`legacy: true`), of which they have nothing.
OWN_HEAD, LEGACY_HEAD = "lm_predictions.lm_head.", "cls.predictions."


def use_own_head(config: "PretrainedConfig", directory: Path) -> None:
    """Let a DeBERTa configuration mean the head that the folder has weights of."""
    if not config.model_type.startswith("deberta") or not getattr(config, "legacy", False):
        return
    names: Collection[str] = ()
    with suppress(InputError):  # a configuration alone: of its weights the loader speaks
        names = stored_tensors(directory)
    own, legacy = (any(n.startswith(p) for n in names) for p in (OWN_HEAD, LEGACY_HEAD))
    if own and not legacy:
        config.legacy = False


def say_unused(directory: Path, model: "PreTrainedModel", names: Collection[str]) -> None:
    """Say which weights outside of the body were left out: those of other heads."""
    body = f"{model.base_model_prefix}."
    parts = sorted({name.rpartition(".")[0] for name in names if not name.startswith(body)})
    if parts:
        more = ", …" if len(parts) > 3 else ""
        told = "%s: weights of heads that %s does not have are left unused: %s%s"
        log.info(told, directory, type(model).__name__, ", ".join(parts[:3]), more)
