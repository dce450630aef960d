"""The network of a student: a Hugging Face language model plus one head per task expert.

It never makes [N,V] logits in training. ``rekindle.train.student`` saves and loads it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rekindle.data.errors import InputError, naming
from rekindle.train.host.known import copy_to, note
from rekindle.train.model.family_head import SECTION, FamilyHead
from rekindle.train.model.fitting import knows_segments
from rekindle.train.model.meta import read_tensors
from rekindle.train.model.parts.head_config import HeadConfig as HeadConfig
from rekindle.train.model.parts.head_config import width_of
from rekindle.train.model.parts.prompts import (
    DOMAINS,
    SEGMENTS,
    DomainPrompts,
    with_prompt,
    without_prompt,
)
from rekindle.train.model.parts.vectors import VectorHead
from rekindle.train.model.passes import RecordedPasses, with_known_padding
from rekindle.train.model.split_model import OutputHead, SplitLanguageModel, splittable
from rekindle.train.outside.quiet import quiet_transformers

HEADS_FILE = "heads.safetensors"  # beside a model: the weights of its heads


class TaskHead(nn.Module):
    """Dense, tanh, dropout, linear: BERT's pooler and classifier, on any hidden states [...,H]."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden_size, num_labels)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits [...,C]."""
        logits: Tensor = self.out(self.dropout(torch.tanh(self.dense(states))))
        return logits


class StudentOutput(NamedTuple):
    """The result of one forward pass. What was not asked for is None or empty."""

    hidden: Tensor | None  # [N,H] the output matrix's input, at the selected positions
    logits: dict[str, Tensor]  # by head: [B,C], or [P,C] at the positions asked for
    load_balancing_loss: Tensor | None = None  # in training, of routers


class StudentNetwork(nn.Module):
    """A masked or causal LM with task heads.

    ``vocabulary_size`` is the tokenizer's; rows of the output matrix past it are padding and take
    no part in any loss. ``domains``: every sequence gets the prompt of its domain (or of none);
    None: no prompts. All positions are those of the sequence without the prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Literal["masked_lm", "causal_lm"],
        heads: Mapping[str, HeadConfig] | None = None,
        vocabulary_size: int | None = None,
        domains: Sequence[str] | None = None,
    ):
        super().__init__()
        self.model: Any = model  # a PreTrainedModel
        self.task = task
        self.head_configs: dict[str, HeadConfig] = {}
        self.heads = nn.ModuleDict()  # of experts, and what methods add
        # the settings of the methods that added something
        self.methods: dict[str, dict[str, object]] = {}
        self.source: Path | None = None  # the directory that its weights come from
        self.has_fresh_head = False  # a fresh language-model head beside a body that is not fresh
        self.sequence_length: int | None = None  # tokens that it was trained with, if known
        self._passes: RecordedPasses | None = None  # None: each pass is run, and forgotten
        with naming("student"), splittable():
            self._split = SplitLanguageModel(model, causal=task == "causal_lm")
        self.vocabulary_size = vocabulary_size or self._split.head.weight.shape[0]
        self.prompts = None if domains is None else DomainPrompts(self.model, domains)
        self.add_heads(heads or {})

    def check_packed(self, room: int) -> None:
        """Raise InputError for a model that cannot read rows of up to ``room`` tokens that hold
        several documents, or has domain prompts (a row has only one).
        """
        if self.prompts is not None:
            raise InputError(
                "student.domain_prompts: a sequence has one prompt, but with "
                "corpus.packing: packed it holds several documents. Leave domain_prompts out, or "
                "use packing: document"
            )
        with naming("student"):
            self._split.check_packed(room)

    def add_heads(self, heads: Mapping[str, HeadConfig]) -> None:
        """Add freshly initialised heads where none has that name and shape."""
        for name, head in heads.items():
            if self.head_configs.get(name) != head:
                self.heads[head_key(name)] = self._fresh_head(head)
                self.head_configs[name] = head

    def _fresh_head(self, head: HeadConfig) -> nn.Module:
        if head.form == "family":
            with naming(SECTION):
                sizes = (head.judges, head.num_labels, head.padding)
                return FamilyHead.of(self.model, *sizes, causal=self.task == "causal_lm")
        config, width = self.model.config.get_text_config(), width_of(self.model.config)
        if head.kind == "embedding":
            assert head.pooling is not None
            size = head.num_labels if head.projection else None
            return VectorHead(width, size, head.pooling, bool(head.normalise))
        module = TaskHead(width, head.num_labels, _dropout(config))
        for linear in (module.dense, module.out):
            nn.init.normal_(linear.weight, std=getattr(config, "initializer_range", 0.02))
            nn.init.zeros_(linear.bias)
        return module

    def add_method(
        self, name: str, settings: Mapping[str, object], module: nn.Module | None
    ) -> None:
        """Add a method's own parameters. If the directory that the weights come from has those of
        an earlier student and all fit, take them over.
        """
        self.methods[name] = dict(settings)
        if module is None:
            return
        key = _method_key(name)
        self.heads[key] = module
        if self.source is not None and (self.source / HEADS_FILE).is_file():
            stored = weights_below(read_tensors(self.source / HEADS_FILE), key)
            shapes = {k: v.shape for k, v in module.state_dict().items()}
            if shapes == {k: v.shape for k, v in stored.items()}:
                module.load_state_dict(stored)

    def method_module(self, name: str) -> nn.Module:
        """Return the module that a method has added."""
        return self.heads[_method_key(name)]

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        select: Tensor | None = None,
        sequence_heads: Sequence[str] = (),
        token_heads: Mapping[str, Tensor] | None = None,
    ) -> StudentOutput:
        """Run the body once.

        ``inputs``: input_ids [B,S], attention_mask [B,S], token_type_ids? (left out for a model
        without segments), and what ``with_domains`` adds (without it the prompt is that of no
        domain). ``select`` [N]: flat indices into [B·S] whose hidden states the LM loss needs.
        ``sequence_heads``: heads run on the pooled state (the first token; the last one of a causal
        LM; or what the family's own head takes; for an embedding what its configuration says: there
        the "logits" are vectors). ``token_heads``: head -> flat indices [P].
        """
        hidden, states = self._run(inputs, select)
        logits: dict[str, Tensor] = {}
        for name in sequence_heads:
            head = self.heads[head_key(name)]
            if isinstance(head, FamilyHead | VectorHead):
                logits[name] = head(states, inputs)
            else:
                logits[name] = head(self._pool(states, inputs["attention_mask"]))
        for name, places in (token_heads or {}).items():
            head = self.heads[head_key(name)]
            if isinstance(head, FamilyHead):
                logits[name] = head(states, inputs).flatten(0, 1)[places]
            else:
                logits[name] = head(states.flatten(0, 1)[places])
        return StudentOutput(hidden, logits, self._split.load_balancing_loss)

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the body's final hidden states [B,S,H] of one forward pass."""
        return self._run(inputs, None)[1]

    def _run(
        self, inputs: Mapping[str, Tensor], select: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Return the output matrix's input [N,H] at ``select``, and the body's states [B,S,H]."""
        if self._passes is None:
            return self._run_body(inputs, select)
        return self._passes.run(inputs, select, self._run_body)

    @contextmanager
    def through(self, passes: RecordedPasses) -> Iterator[None]:
        """Let ``passes`` stand before the body in this context."""
        self._passes = passes
        try:
            yield
        finally:
            self._passes = None

    def _run_body(
        self, inputs: Mapping[str, Tensor], select: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        body_inputs = inputs
        if SEGMENTS in inputs and not knows_segments(self.model.config):
            body_inputs = {name: value for name, value in inputs.items() if name != SEGMENTS}
        body_inputs = with_known_padding(body_inputs, self.model.config)
        if self.prompts is not None:
            body_inputs = self.prompts.insert(body_inputs, self.model.get_input_embeddings())
            select = None if select is None else with_prompt(select, inputs["input_ids"].shape[1])
        hidden, states = (
            (None, self._split.states(body_inputs))
            if select is None
            else self._split.hidden(body_inputs, select)
        )
        return hidden, states if self.prompts is None else without_prompt(states)

    def with_domains(
        self, inputs: Mapping[str, Tensor], domains: Sequence[str | None]
    ) -> Mapping[str, Tensor]:
        """Return the inputs of a pass over sequences of these ``domains`` [B], for the prompts, if
        there are any.
        """
        if self.prompts is None:
            return inputs
        numbers = np.array(self.prompts.numbers(domains), np.int64)
        return {**inputs, DOMAINS: note(copy_to(numbers, inputs["input_ids"].device), numbers)}

    @property
    def output_head(self) -> OutputHead:
        """Return the output matrix over real tokens."""
        head = self._split.head
        if self._passes is not None and self._passes.stops_gradients:
            bias = None if head.bias is None else head.bias.detach()
            head = head._replace(weight=head.weight.detach(), bias=bias)
        return head.cut(self.vocabulary_size)

    def train_head_alone(self, alone: bool) -> None:
        """From now on, give gradients only to the language model's own head, or to all again."""
        self._split.head_alone = alone

    @property
    def own_head(self) -> dict[str, nn.Parameter]:
        """Return the weights of the language model's own head, by name: what follows the body, but
        not an output matrix that is the body's input embeddings.
        """
        body = {id(parameter) for parameter in self.model.base_model.parameters()}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in body}

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass from now on; raise InputError if the model
        cannot.
        """
        model = self.model
        # Try transformers' newer name first: version 6 drops the older one.
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        try:
            with quiet_transformers():
                enable({"use_reentrant": False})
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"train.gradient_checkpointing: {type(model).__name__} has none ({error}); "
                "set it to false, and lower micro_batch_sequences to save memory"
            ) from None

    def _pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        if self.task == "masked_lm":
            return states[:, 0]
        last = attention_mask.sum(dim=1).clamp_min(1) - 1
        return states[torch.arange(len(states), device=states.device), last]


def _dropout(config: Any) -> float:
    """Return the model's own dropout rate for heads; 0.1, BERT's, if it names none."""
    for name in ("classifier_dropout", "hidden_dropout_prob", "resid_pdrop"):
        if (rate := getattr(config, name, None)) is not None:
            return float(rate)
    return 0.1


def head_key(name: str) -> str:
    """Return the name of a head's module: without a dot, and no attribute of a ModuleDict."""
    key = name.replace(".", "·")
    return key + "*" if hasattr(nn.ModuleDict(), key) else key


def _method_key(name: str) -> str:
    """Return the same for a method's module; no teacher's name has a colon."""
    return f"method:{name}"


def weights_below(weights: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """Select the weights of the module ``key``, by their names in it."""
    prefix = key + "."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
