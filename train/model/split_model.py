"""A Hugging Face language model split into a body and its output matrix.

Losses and top-k need logits at few positions; the split gives final hidden states at chosen
positions [N,H] and the head (weight [V,H], bias [V]), so that [batch, sequence, vocabulary] is
never made. The split is checked against the model's own logits when it is built. Knows nothing of
teachers, students or caches.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rekindle.data.corpus.columns import DOCUMENTS
from rekindle.data.errors import InputError
from rekindle.train.deferred.recording import try_when_filled
from rekindle.train.model.files import longest_input
from rekindle.train.model.routers import load_balancing_weight, states_with_load_balancing
from rekindle.train.model.sight import (
    MODEL_ERRORS,
    SightError,
    check_sight,
    evaluating,
    find_form,
    sample_ids,
)
from rekindle.train.packed.forms import Form, as_read

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The families' names for numbers that change logits after the output matrix. If two families mean
# different things by one name (Granite divides by logits_scaling, HyperCLOVA X multiplies with it),
# the model's own logits decide.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The split is checked with the model's own states and with large ones: their logits have this
# spread, at which every cap in use (15 to 50) cuts them off.
LARGE = 100.0
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3}  # of a logit, and of the logits' spread
COARSEST = 2e-2  # in bfloat16, and in coarser types


class OutputHead(NamedTuple):
    """logits = softcap(scale · (hidden Wᵀ + b)); ``softcap`` None: none."""

    weight: Tensor  # [V,H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    def cut(self, vocabulary_size: int) -> "OutputHead":
        """Return the head of the first ``vocabulary_size`` ids: rows that pad it to a round size
        are not tokens.
        """
        if len(self.weight) == vocabulary_size:
            return self  # a slice's gradient would be one more [V,H]
        bias = None if self.bias is None else self.bias[:vocabulary_size]
        return self._replace(weight=self.weight[:vocabulary_size], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [N,V] of ``hidden`` [N,H]."""
        out = F.linear(hidden, self.weight, self.bias).float() * self.logit_scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


class SplitLanguageModel:
    """Body and head of a masked or causal LM; the model itself stays whole and saveable."""

    def __init__(self, model: nn.Module, causal: bool):
        self.model = cast("PreTrainedModel", model)
        self.causal = causal
        self._select: Tensor | None = None
        self._states: Tensor | None = None
        self._form: Form | None = None  # for rows of several documents, once it is known
        self._has_load_balancing = causal and load_balancing_weight(self.model) > 0
        self.load_balancing_loss: Tensor | None = (
            None  # the load-balancing loss of the last pass in training
        )
        self.head_alone = False  # only the head is trained: the body makes no gradients
        self._softcap: float | None = None
        self._logit_scale = 1.0
        self._output = _output_matrix_of(self.model)
        words = getattr(model, "get_input_embeddings", lambda: None)()
        self._is_tied = words is not None and self._output.weight is words.weight
        body = self.model.base_model
        run_body = body.forward

        @wraps(run_body)
        def forward(*arguments: Any, **named: Any) -> Any:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.head_alone):
                return run_body(*arguments, **named)

        body.forward = forward
        self._uses_hooks = not causal
        if not causal:
            self._install_hooks()
        try_when_filled(self._check_or_hook, "student")  # teachers have their weights

    def _check_or_hook(self) -> None:
        try:
            self._check()
        except NotImplementedError:
            if self._uses_hooks:
                raise
            self._uses_hooks = True  # decoders that transform their states, as BERT's do
            self._install_hooks()
            self._check()

    def check_packed(self, room: int) -> None:
        """Find how to tell the model that rows of up to ``room`` tokens hold several documents;
        raise SightError if it cannot read them.
        """
        if self._has_load_balancing:
            raise SightError(
                f"{type(self.model).__name__} has a load-balancing loss of its routers, which is "
                "not "
                "formed for rows of several documents (corpus.packing: packed). Set "
                "output_router_logits to false in its config.json, or use packing: document"
            )
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, enabled=False):  # which rounds more than the weights do
            self._form = find_form(self.model, self.causal, room)

    def _model_inputs(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the model's inputs: for rows of several documents, with what separates them."""
        if DOCUMENTS not in inputs:
            return inputs
        if self._form is None:
            self.check_packed(inputs[DOCUMENTS].shape[1])
        assert self._form is not None
        return as_read(self.model, inputs, self._form, self.causal)

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the body's final hidden states [B,S,H]."""
        return _in_rows(self._states_of(self._model_inputs(inputs)), inputs)

    def _states_of(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.load_balancing_loss = None
        if self._has_load_balancing and self.model.training:
            states, self.load_balancing_loss = states_with_load_balancing(self.model, inputs)
            return states
        states = self.model.base_model(**inputs).last_hidden_state
        return states

    def hidden(self, inputs: Mapping[str, Tensor], select: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output matrix's input [N,H] at ``select`` [N], and the body's states [B,S,H].

        ``select`` holds flat indices into [B·S].
        """
        if not self._uses_hooks:
            states = self.states(inputs)
            rows, weight = states.flatten(0, 1)[select.to(states.device)], self._output.weight
            if weight.is_floating_point() and weight.dtype.itemsize < rows.dtype.itemsize:
                rows = rows.to(weight.dtype)  # Mamba's states stay in float32, as its residuals do
            return rows, states
        self._select = select
        try:
            picked = self.model(**self._model_inputs(inputs)).logits
            assert self._states is not None
            return picked, _in_rows(self._states, inputs)
        finally:
            self._select = self._states = None

    @property
    def head(self) -> OutputHead:
        """Return the output matrix, shared with the model (not a copy)."""
        weight, bias = self._output.weight, self._output.bias
        if self.head_alone and self._is_tied:  # a changed matrix would give the body other inputs
            weight = weight.detach()
        return OutputHead(weight, bias, self._softcap, self._logit_scale)

    def _install_hooks(self) -> None:
        """Let only the selected rows pass what follows the body: masked LMs (and some causal ones)
        transform hidden states before the output matrix, each family in its own way.

        While rows are selected, the output matrix passes its input through: the model then returns
        the transformed hidden states as its logits.
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
            self._output.pass_through(lambda: self._select is not None)

    def _check(self) -> None:
        """Find what changes the logits after the output matrix, and what the model sees.

        Raises SightError, and NotImplementedError unless the split reproduces the model's logits
        for its own states and for large ones.
        """
        config, is_reproduced = self.model.config, False
        first = next(self.model.parameters())
        tolerance = TOLERANCE.get(first.dtype, COARSEST)
        ids = sample_ids(config, min(8, longest_input(config) or 8))[None].to(first.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            with evaluating(self.model):
                expected = [self.model(**inputs).logits[0].float()]
                check_sight(self.model, self.causal)
                hidden, _ = self.hidden(inputs, torch.arange(ids.shape[1], device=ids.device))
                spread = float(self.head.logits(hidden).nan_to_num().std(correction=0))
                # NaN is reported by the users of the logits, not here.
                factor = LARGE / spread if spread > 0 and math.isfinite(spread) else 1.0
                with self._output.scaled(factor):
                    expected.append(self.model(**inputs).logits[0].float())
                states = [hidden, hidden * factor]
                for self._softcap, self._logit_scale in _logit_changes(config):
                    logits = [self.head.logits(each) for each in states]
                    pairs = zip(logits, expected, strict=True)
                    if is_reproduced := all(
                        _are_close(own, model_logits, tolerance) for own, model_logits in pairs
                    ):
                        break
        except (InputError, torch.OutOfMemoryError):
            raise
        except MODEL_ERRORS as error:
            raise NotImplementedError(_unsupported(self.model, str(error))) from error
        if not is_reproduced:
            raise NotImplementedError(_unsupported(self.model, "its logits are not head(hidden)"))


def _in_rows(states: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return states as [B,S,H], also if rows of several documents were read one after another."""
    return states if DOCUMENTS not in inputs else states.reshape(*inputs[DOCUMENTS].shape, -1)


class _OutputMatrix:
    """A model's output matrix: a module that multiplies its input with ``weight``."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def weight(self) -> Tensor:
        """[V,H]."""
        return cast("Tensor", self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        """[V]."""
        return cast("Tensor | None", self.module.bias)

    def pass_through(self, when: Callable[[], bool]) -> None:
        """Let it return its input while ``when()`` is true."""
        product = self.module.forward
        self.module.forward = lambda x: x if when() else product(x)

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Multiply its input."""
        hook = self.module.register_forward_pre_hook(lambda _, arguments: (arguments[0] * factor,))
        try:
            yield
        finally:
            hook.remove()


class _EmbeddingOutputMatrix(_OutputMatrix):
    """DeBERTa's own head (not the BERT-like one of its ``legacy`` class): it transforms its input,
    and multiplies it with the word embeddings that it is given.
    """

    def __init__(self, module: nn.Module, embeddings: nn.Module):
        super().__init__(module)
        self.embeddings = embeddings

    @property
    def weight(self) -> Tensor:
        """[V,H]."""
        return cast("Tensor", self.embeddings.weight)

    def pass_through(self, when: Callable[[], bool]) -> None:
        """Let it return what it would multiply while ``when()`` is true."""
        run_head, head = self.module.forward, cast("Any", self.module)

        def forward(hidden: Tensor, words: nn.Module) -> Tensor:
            if not when():
                return cast("Tensor", run_head(hidden, words))
            return cast("Tensor", head.LayerNorm(head.transform_act_fn(head.dense(hidden))))

        self.module.forward = forward

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Multiply what the embeddings are multiplied with."""
        norm = cast("nn.Module", self.module.LayerNorm)
        hook = norm.register_forward_hook(lambda _, arguments, output: output * factor)
        try:
            yield
        finally:
            hook.remove()


def _output_matrix_of(model: "PreTrainedModel") -> _OutputMatrix:
    deberta_head = getattr(getattr(model, "lm_predictions", None), "lm_head", None)
    if deberta_head is not None:
        return _EmbeddingOutputMatrix(deberta_head, model.get_input_embeddings())
    output = model.get_output_embeddings()
    if output is None:
        raise NotImplementedError(_unsupported(model, "it has no output matrix"))
    return _OutputMatrix(output)


def output_width(model: "PreTrainedModel") -> int:
    """Return the width of the output matrix's input: for some models (RemBERT, OPT-350m) not
    ``hidden_size``. Raises NotImplementedError for a model without one.
    """
    return _output_matrix_of(model).weight.shape[1]


@contextmanager
def splittable() -> Iterator[None]:
    """Turn the error about a model that cannot be split into an InputError."""
    try:
        yield
    except NotImplementedError as error:
        raise InputError(str(error)) from None


def _logit_changes(config: "PretrainedConfig") -> Iterator[tuple[float | None, float]]:
    """Return softcaps and factors that the configuration may mean, the likeliest first."""
    text = config.get_text_config()

    def configured(names: tuple[str, ...]) -> list[float]:
        values = (getattr(text, name, None) or getattr(config, name, None) for name in names)
        return [float(value) for value in values if value]

    multiplier, divisor = math.prod(configured(MULTIPLIERS)), math.prod(configured(DIVISORS))
    factors = dict.fromkeys([multiplier / divisor, multiplier * divisor, 1.0])
    yield from product([*configured(SOFTCAPS), None], factors)


def _are_close(logits: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether logits are equal where the expected ones are finite."""
    is_finite = expected.isfinite()
    spread = float(expected[is_finite].std(correction=0)) if is_finite.any() else 0.0
    return torch.allclose(
        logits[is_finite], expected[is_finite], rtol=tolerance, atol=tolerance * spread
    )


def _unsupported(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__} cannot be split into a body and an output matrix ({reason}); "
        "Rekindle supports masked and causal LMs whose logits are one linear map of final hidden "
        "states"
    )
