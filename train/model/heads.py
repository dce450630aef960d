"""Heads with weights in a folder: which of a family's heads a configuration means, and which
weights no class uses. Also the message about a fresh language-model head.
"""

import logging
import math
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.data.errors import InputError
from rekindle.train.model.folder import stored_tensors
from rekindle.train.model.meta import Shape
from rekindle.train.step_config import usual_head_steps

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("rekindle")

# DeBERTa's own LM head transforms and multiplies with the word embeddings. Its published weights
# have this head, but their configurations, which are older than the key, mean transformers'
# BERT-like head (`legacy: true`), for which they have no weights.
OWN_HEAD, LEGACY_HEAD = "lm_predictions.lm_head.", "cls.predictions."


def use_own_head(config: "PretrainedConfig", directory: Path) -> None:
    """Let a DeBERTa configuration mean the head that has weights in the folder."""
    if not config.model_type.startswith("deberta") or not getattr(config, "legacy", False):
        return
    names: Collection[str] = ()
    with suppress(InputError):  # a configuration alone: the loader reports missing weights
        names = stored_tensors(directory)
    has_own, has_legacy = (any(n.startswith(p) for n in names) for p in (OWN_HEAD, LEGACY_HEAD))
    if has_own and not has_legacy:
        config.legacy = False


def log_unused_weights(directory: Path, model: "PreTrainedModel", names: Collection[str]) -> None:
    """Log which weights outside the body were left out: those of other heads."""
    body = f"{model.base_model_prefix}."
    parts = sorted({name.rpartition(".")[0] for name in names if not name.startswith(body)})
    if parts:
        ellipsis = ", …" if len(parts) > 3 else ""
        message = "%s: weights of heads that %s does not have are not used: %s%s"
        log.info(message, directory, type(model).__name__, ", ".join(parts[:3]), ellipsis)


def copy_matching_weights(
    model: "PreTrainedModel", source: "PreTrainedModel", directory: Path
) -> tuple[set[str], dict[str, tuple[Shape, Shape]]]:
    """Give ``model`` the weights of one of its family, ``source``, from ``directory``.

    Returns the names of those that it does not get, and for those of another shape both shapes:
    there, and its own.
    """
    stored, needed = source.state_dict(), model.state_dict()
    shapes = {
        name: (tuple(stored[name].shape), tuple(values.shape))
        for name, values in needed.items()
        if name in stored and stored[name].shape != values.shape
    }
    matching = (stored.keys() & needed.keys()) - shapes.keys()
    model.load_state_dict({name: stored[name] for name in matching}, strict=False)
    log_unused_weights(directory, model, stored.keys() - needed.keys())
    return needed.keys() - matching, shapes


def describe_fresh_head(model: str, vocabulary: int, steps: int, taught_by: str = "") -> str:
    """Explain training a fresh head over ``vocabulary`` tokens, and the alternatives.

    ``steps``: of the run; 0: not known yet. ``taught_by``: by whom, if not by the text.
    """
    head_steps = str(usual_head_steps(steps)) if steps else "N, a fifth of the steps, at most 100"
    return (
        f"student {model!r} has no language-model head: a fresh one, with random weights, is "
        f"trained{taught_by}. Its cross-entropy begins near {math.log(vocabulary):.1f} nats (a "
        f"guess among {vocabulary:,} tokens), where a teacher's divergence is about 1: at first "
        "the loss, and most of the gradient that reaches the body, come from this head. Either "
        f"train it alone at first (train.warm_head_steps: {head_steps}), or, if its predictions do "
        "not matter, leave the text out (train.objective.hard.weight: 0)"
    )
