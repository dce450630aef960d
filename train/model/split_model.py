"""A Hugging Face language model split into a body and its output matrix.

Losses and top-k need logits at few positions; the split gives final hidden states at chosen
positions [N,H] and the head (weight [V,H], bias [V]), so that [batch, sequence, vocabulary] is
never made. The split is checked against the model's own logits when it is built. Knows nothing of
teachers, students or caches.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OutputHead(NamedTuple):
    """logits = softcap(scale · (hidden Wᵀ + b)); ``softcap`` None is none."""

    weight: Tensor  # [V,H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    def cut(self, vocabulary_size: int) -> "OutputHead":
        """The head of the first ``vocabulary_size`` ids: rows that pad it to a round size are no
        tokens.
        """
        if len(self.weight) == vocabulary_size:
            return self  # a slice's gradient would be one more [V,H]
        bias = None if self.bias is None else self.bias[:vocabulary_size]
        return self._replace(weight=self.weight[:vocabulary_size], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [N,V] of ``hidden`` [N,H]."""
        out = F.linear(hidden, self.weight, self.bias).float() * self.logit_scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


class SplitLanguageModel:
    """Body and head of a masked or causal LM; the model itself stays whole and saveable."""

    def __init__(self, model: nn.Module, causal: bool):
        self.model = cast("PreTrainedModel", model)
        self.causal = causal
        self._select: Tensor | None = None
        self._states: Tensor | None = None
        self._output = self.model.get_output_embeddings()
        if not causal:
            self._install_hooks()
        self._check()

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The body's final hidden states [B,S,H]."""
        body = self.model.base_model(**inputs)
        states: Tensor = body.last_hidden_state
        return states

    def hidden(self, inputs: Mapping[str, Tensor], select: Tensor) -> tuple[Tensor, Tensor]:
        """What the output matrix multiplies [N,H] at ``select`` [N], and the body's states [B,S,H].

        ``select`` holds flat indices into [B·S].
        """
        if self.causal:
            states = self.states(inputs)
            return states.flatten(0, 1)[select], states
        self._select = select
        try:
            picked = self.model(**inputs).logits
            assert self._states is not None
            return picked, self._states
        finally:
            self._select = self._states = None

    @property
    def head(self) -> OutputHead:
        """The output matrix, shared with the model (not a copy)."""
        config = self.model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return OutputHead(self._output.weight, self._output.bias, softcap, scale / divisor)

    def _install_hooks(self) -> None:
        """Masked LMs transform hidden states before the output matrix, each family in its own way.

        While rows are selected, whatever stands after the body sees only those rows, and the output
        matrix passes its input through: the model then returns transformed hidden states as its
        logits.
        """

        def pick(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._select is None or not arguments or arguments[0].dim() != 3:
                return None
            self._states = arguments[0]
            return (arguments[0].flatten(0, 1)[self._select], *arguments[1:])

        for name, child in self.model.named_children():
            if name != self.model.base_model_prefix:
                child.register_forward_pre_hook(pick)
        if self._output is not None:
            product = self._output.forward
            self._output.forward = lambda x: x if self._select is not None else product(x)

    @torch.no_grad()
    def _check(self) -> None:
        """Raise NotImplementedError unless the split reproduces the model's logits."""
        config, training = self.model.config, self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        ids = torch.arange(5, 13, device=device)[None] % config.get_text_config().vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            expected = self.model(**inputs).logits[0].float()
            hidden, _ = self.hidden(inputs, torch.arange(8, device=device))
            found = self.head.logits(hidden)
            known = expected.isfinite()  # NaN is for the user of the logits to report, not a split
            spread = float(expected[known].std(correction=0)) if known.any() else 0.0
            same = torch.allclose(found[known], expected[known], rtol=2e-2, atol=2e-2 * spread)
        except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise NotImplementedError(_unsupported(self.model, str(error))) from error
        finally:
            self.model.train(training)
        if not same:
            raise NotImplementedError(_unsupported(self.model, "its logits are not head(hidden)"))


def _unsupported(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__} cannot be split into a body and an output matrix ({reason}); "
        "Rekindle supports masked and causal LMs whose logits are one linear map of final hidden "
        "states"
    )
