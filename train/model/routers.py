"""The load-balancing loss of mixture-of-experts models, as transformers' own models form it."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def load_balancing_weight(model: "PreTrainedModel") -> float:
    """Return the weight of the load-balancing loss beside the others; 0 if none is configured.

    As in transformers: ``router_aux_loss_coef``, if ``output_router_logits`` is true.
    """
    text = model.config.get_text_config()
    return _coefficient(text) if getattr(text, "output_router_logits", False) else 0.0


def describe_load_balancing(model: "PreTrainedModel") -> str | None:
    """Return a line about load balancing of a model's experts; None if it has none."""
    text = model.config.get_text_config()
    weight, possible = load_balancing_weight(model), _coefficient(text)
    if weight:
        return f"load-balancing loss of its routers (router) at weight {weight:g}"
    if possible and hasattr(text, "output_router_logits"):
        return (
            "no load-balancing loss of its routers, as its configuration has "
            "output_router_logits: "
            f"false; with true it has weight {possible:g}"
        )
    return None


def states_with_load_balancing(
    model: "PreTrainedModel", inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the body's final hidden states [B,S,H], and the unweighted load-balancing loss.

    The model's own forward pass forms it, with logits of the last position only.
    """
    states: list[Tensor] = []

    def keep_states(module: Any, arguments: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    hook = model.base_model.register_forward_hook(keep_states)
    try:
        loss: Tensor = model(**inputs, output_router_logits=True, **options).aux_loss
    finally:
        hook.remove()
    return states[0], loss


def _coefficient(text: Any) -> float:
    return next((float(v) for name in COEFFICIENTS if (v := getattr(text, name, None))), 0.0)
