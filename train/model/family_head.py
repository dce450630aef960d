"""The head of a model's own family in transformers, on the states of a student's body.

It is the family's class for the task, complete except for its body, which is replaced by a module
that returns the states the student has computed. So pooling, dropout and layers are the family's
code, and the head's weights have the names that they have in a folder of that class.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rekindle.data.errors import InputError, first_words
from rekindle.train.deferred.recording import try_when_filled
from rekindle.train.model.adapter import whole_shapes_of
from rekindle.train.model.files import longest_input
from rekindle.train.model.fitting import AUTO_CLASSES
from rekindle.train.model.meta import shape_only
from rekindle.train.model.padding import padding_of, set_padding
from rekindle.train.model.sight import MODEL_ERRORS, evaluating, sample_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Kind = Literal["sequence", "token"]  # what a head classifies
TASKS = {"sequence": "sequence_classification", "token": "token_classification"}
SECTION = "student.head: family"  # key of the configuration
POOLERS = ("pooler", "pooler_activation")  # parts of a body that belong to the head
SAME = 1e-5  # of a logit, or of the largest one above 1
LENGTHS = (7, 2, 5)  # tokens of the rows that heads are tried with


class FamilyHead(nn.Module):
    """What transformers' class of a family does with the states of its body."""

    def __init__(self, frame: "PreTrainedModel"):
        super().__init__()
        self.frame = frame

    @classmethod
    def of(
        cls,
        model: "PreTrainedModel",
        kind: Kind,
        outputs: int,
        padding: int | None,
        causal: bool = False,
    ) -> "FamilyHead":
        """Make a fresh one for ``model``, drawn from torch's generator, and check that it works.

        Raises InputError, with the reason, if the family has none, or none for this body.
        """
        head = cls.fresh(model, kind, outputs, padding, causal)
        try_when_filled(lambda: head._check(model.base_model, kind), SECTION)
        return head

    @classmethod
    def fresh(
        cls,
        model: "PreTrainedModel",
        kind: Kind,
        outputs: int,
        padding: int | None,
        causal: bool = False,
        settings: Mapping[str, object] = MappingProxyType({}),
    ) -> "FamilyHead":
        """Do as ``of`` without the check, which runs the body; ``settings``: for its
        configuration.
        """
        config = head_config(model.config, outputs, padding, settings)
        frame = shape_only(config, auto_class(config, kind))
        name, body, model_body = type(frame).__name__, frame.base_model, model.base_model
        if type(body) is not type(model_body) or _shapes(body) != _shapes(model_body):
            raise InputError(f"the body of {name} is another than that of {type(model).__name__}")
        setattr(frame, frame.base_model_prefix, _FixedStates(body))
        if any(True for _ in frame.buffers()):
            raise InputError(f"{name} keeps more in its head than weights")
        for module in frame.modules():
            for key, weight in module._parameters.items():
                if weight is not None:
                    empty = torch.empty(weight.shape, device="cpu")
                    module._parameters[key] = nn.Parameter(empty, weight.requires_grad)
        for module in frame.modules():
            frame._init_weights(module)
        head = cls(frame)
        if causal and kind == "sequence":
            width = model.config.get_text_config().hidden_size
            try_when_filled(lambda: head._check_reads_on(width), SECTION)
        return head

    def forward(self, states: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits [B,C], or [B,S,C] for a head on tokens, of the body's ``states``
        [B,S,H].
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if (padding := padding_of(self.frame.config)) is not None:
            # some look for the last token that is not padding
            ids = ids.masked_fill(mask == 0, padding)
        fixed = self._fixed_states
        fixed.states = states
        try:
            logits: Tensor = self.frame(input_ids=ids, attention_mask=mask).logits
        finally:
            fixed.states = None
        return logits

    @property
    def _fixed_states(self) -> "_FixedStates":
        fixed: _FixedStates = getattr(self.frame, self.frame.base_model_prefix)
        return fixed

    def _check(self, body: nn.Module, kind: Kind) -> None:
        """Raise InputError unless it gives the family class's output on ``body``."""
        name, inputs = type(self.frame).__name__, self._sample()
        is_token = inputs["attention_mask"].bool()
        try:
            with evaluating(self), evaluating(body):
                with self._with_body(body):
                    expected = self.frame(**inputs).logits
                logits = self(body(**inputs).last_hidden_state, inputs)
        except (InputError, torch.OutOfMemoryError):
            raise
        except MODEL_ERRORS as error:
            raise InputError(f"{name} cannot be run: {first_words(error, 200)}") from None
        if kind == "token":
            logits, expected = logits[is_token], expected[is_token]
        if difference(logits, expected) > SAME:
            raise InputError(f"{name} runs its body otherwise than the language model does")

    def _check_reads_on(self, width: int) -> None:
        """Raise InputError if it reads only the first token's states [``width``]."""
        inputs = self._sample()
        generator, ids = torch.Generator().manual_seed(0), inputs["input_ids"]
        states = torch.randn(*ids.shape, width, generator=generator).to(ids.device)
        changed = states.clone()
        changed[:, 1:] += 1.0
        with evaluating(self):
            if torch.equal(self(states, inputs), self(changed, inputs)):
                raise InputError(
                    f"{type(self.frame).__name__} classifies a text by its first token, which in "
                    "a causal LM has seen no other"
                )

    def _sample(self) -> dict[str, Tensor]:
        """Return the rows it is tried with, on the device of its weights."""
        device = next((p.device for p in self.frame.parameters()), torch.device("cpu"))
        return {k: v.to(device) for k, v in sample_inputs(self.frame.config).items()}

    @contextmanager
    def _with_body(self, body: nn.Module) -> Iterator[None]:
        """Put ``body`` in its place temporarily."""
        frame, fixed = self.frame, self._fixed_states
        own_poolers = {name: getattr(body, name, None) for name in fixed.poolers}
        try:
            for name, pooler in fixed.poolers.items():
                setattr(body, name, pooler)
            setattr(frame, frame.base_model_prefix, body)
            yield
        finally:
            setattr(frame, frame.base_model_prefix, fixed)
            for name, own in own_poolers.items():
                setattr(body, name, own)


class _FixedStates(nn.Module):
    """Replaces a body: returns known states, and the output of its pooler for them."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.states: Tensor | None = None
        for name in POOLERS:
            if isinstance(part := getattr(body, name, None), nn.Module):
                self.add_module(name, part)

    @property
    def poolers(self) -> dict[str, nn.Module]:
        """Return the parts of the body that belong to the head."""
        return dict(self.named_children())

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return what the body would."""
        states, parts, pooled = self.states, self.poolers, None
        assert states is not None
        if "pooler_activation" in parts:  # ALBERT's pooler is only a matrix
            pooled = parts["pooler_activation"](parts["pooler"](states[:, 0]))
        elif "pooler" in parts:
            pooled = parts["pooler"](states)
        return _Output(states, pooled)


class _Output(tuple[Tensor, ...]):
    """A body's output, in the forms in which classes take it; anything else they look for
    is None.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None

    def __new__(cls, states: Tensor, pooled: Tensor | None) -> "_Output":
        output = super().__new__(cls, (states,) if pooled is None else (states, pooled))
        output.last_hidden_state, output.pooler_output = states, pooled
        return output

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def auto_class(config: "PretrainedConfig", kind: Kind) -> str:
    """Return the Auto class for a head of ``kind``; raise InputError if the family has none."""
    import transformers

    name = AUTO_CLASSES[TASKS[kind]]
    if type(config) not in getattr(transformers, name)._model_mapping:
        raise InputError(f"transformers has no {name} of the family {config.model_type}")
    return name


def head_config(
    config: "PretrainedConfig",
    outputs: int,
    padding: int | None,
    settings: Mapping[str, object] = MappingProxyType({}),
) -> "PretrainedConfig":
    """Return ``config`` for a head with that many outputs; ``padding``: the id, if it has none."""
    changed = copy.deepcopy(config)
    for key, value in ({"num_labels": outputs} | dict(settings)).items():
        setattr(changed, key, value)
    if padding_of(changed) is None:
        set_padding(changed, padding)
    return changed


def sample_inputs(config: "PretrainedConfig") -> dict[str, Tensor]:
    """Return padded rows of several lengths, with which heads are tried."""
    width = min(max(LENGTHS), longest_input(config) or max(LENGTHS))
    lengths = torch.tensor([min(length, width) for length in LENGTHS])
    ids = sample_ids(config, width * len(LENGTHS)).reshape(len(LENGTHS), width)
    mask = torch.arange(width) < lengths[:, None]
    return {
        "input_ids": ids.masked_fill(~mask, padding_of(config) or 0),
        "attention_mask": mask.long(),
    }


def difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two logits, as a share of the largest one if that is above
    1.
    """
    largest = max(1.0, float(expected.abs().max()))
    return float((logits - expected).abs().max()) / largest


def _shapes(body: nn.Module) -> dict[str, torch.Size]:
    shapes = whole_shapes_of(body).items()
    return {name: shape for name, shape in shapes if not name.startswith(POOLERS)}
