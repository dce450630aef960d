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
    own, legacy = (any(n.startswith(p) for n in names) for p in (OWN_HEAD, LEGACY_HEAD))
    if own and not legacy:
        config.legacy = False


def say_unused(directory: Path, model: "PreTrainedModel", names: Collection[str]) -> None:
    """Log which weights outside the body were left out: those of other heads."""
    body = f"{model.base_model_prefix}."
    parts = sorted({name.rpartition(".")[0] for name in names if not name.startswith(body)})
    if parts:
        more = ", …" if len(parts) > 3 else ""
        told = "%s: weights of heads that %s does not have are not used: %s%s"
        log.info(told, directory, type(model).__name__, ", ".join(parts[:3]), more)


def take_weights(
    model: "PreTrainedModel", whole: "PreTrainedModel", directory: Path
) -> tuple[set[str], dict[str, tuple[Shape, Shape]]]:
    """Give ``model`` the weights of one of its family, ``whole``, from ``directory``.

    Returns the names of those that it does not get, and for those of another shape both shapes:
    there, and its own.
    """
    held, wanted = whole.state_dict(), model.state_dict()
    shapes = {
        name: (tuple(held[name].shape), tuple(values.shape))
        for name, values in wanted.items()
        if name in held and held[name].shape != values.shape
    }
    taken = (held.keys() & wanted.keys()) - shapes.keys()
    model.load_state_dict({name: held[name] for name in taken}, strict=False)
    say_unused(directory, model, held.keys() - wanted.keys())
    return wanted.keys() - taken, shapes


def told_of_fresh_head(model: str, vocabulary: int, steps: int, taught: str = "") -> str:
    """Explain training a fresh head over ``vocabulary`` tokens, and the alternatives.

    ``steps``: of the run; 0: not known yet. ``taught``: by whom, if not by the text.
    """
    alone = str(usual_head_steps(steps)) if steps else "N, a fifth of the steps, at most 100"
    return (
        f"student {model!r} has no language-model head: a fresh one, with random weights, is "
        f"trained{taught}. Its cross-entropy begins near {math.log(vocabulary):.1f} nats (a guess "
        f"among {vocabulary:,} tokens), where a teacher's divergence is about 1: at first the "
        "loss, and most of the gradient that reaches the body, come from this head. Either train "
        f"it alone at first (train.warm_head_steps: {alone}), or, if its predictions do not "
        "matter, leave the text out (train.objective.hard.weight: 0)"
    )
