"""A sentence encoder: maps a text's tokens to a vector, equal to that of sentence-transformers.

Shapes: B texts, S tokens, D values of a vector.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rekindle.data.errors import InputError
from rekindle.train.embedding.folder import TANH, EncoderFolder, Step
from rekindle.train.model.files import load_config, load_model
from rekindle.train.model.fitting import auto_class_of
from rekindle.train.model.parts.head_config import Pooling
from rekindle.train.model.parts.pooling import pooled


class SentenceEncoder(nn.Module):
    """A transformer, pooling of its last states, and the steps after it; vectors are fp32."""

    def __init__(self, model: nn.Module, folder: EncoderFolder, device: str = "cpu"):
        super().__init__()
        self.model, self.folder = model, folder
        self.steps = nn.ModuleList(map(load_step, folder.steps)).to(device).eval()

    @property
    def config(self) -> Any:
        """Return the transformer's configuration."""
        return self.model.config

    def forward(self, inputs: Mapping[str, Tensor], skipped: int = 0) -> Tensor:
        """Return the vectors [B,D] of ``inputs``: input_ids and attention_mask [B,S], and
        token_type_ids if the model knows segments.

        ``skipped``: tokens of the prompt that pooling leaves out.
        """
        states = self.model(**inputs).last_hidden_state
        modes = cast("tuple[Pooling, ...]", self.folder.pooling)
        vectors = pooled(states, inputs["attention_mask"], modes, skipped)
        for step in self.steps:
            vectors = step(vectors)
        return vectors[:, : self.folder.dimensions]


def load_encoder(
    folder: EncoderFolder,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> SentenceEncoder:
    """Load an encoder in evaluation mode, on the CPU; ``options`` is for transformers.

    Raises InputError if a weight is missing that the vectors depend on.
    """
    kind = auto_class_of(load_config(folder.transformer), "embedding")
    return SentenceEncoder(load_model(folder.transformer, kind, dtype, options), folder).eval()


class Dense(nn.Module):
    """A linear map and its activation; its weights have sentence-transformers' names."""

    def __init__(self, settings: Mapping[str, Any], source: Path | None = None):
        super().__init__()
        sizes = settings["in_features"], settings["out_features"]
        self.linear = nn.Linear(*sizes, bias=settings["bias"])
        self.activation = activation(settings.get("activation_function", TANH), source)
        self.use_residual = settings.get("use_residual", False)
        if self.use_residual and sizes[0] != sizes[1]:
            self.residual = nn.Linear(*sizes, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return vectors [B,out_features]."""
        outputs: Tensor = self.activation(self.linear(vectors))
        if not self.use_residual:
            return outputs
        return outputs + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class LayerNorm(nn.Module):
    """A LayerNorm of vectors; its weights have sentence-transformers' names."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return vectors [B,D]."""
        outputs: Tensor = self.norm(vectors)
        return outputs


class Normalize(nn.Module):
    """Scales vectors to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Return vectors [B,D]."""
        return nn.functional.normalize(vectors, dim=-1)


def load_step(step: Step) -> nn.Module:
    """Return a step after pooling, with its weights."""
    if step.kind == "Normalize":
        return Normalize()
    source = step.weights and step.weights.parent
    if step.kind == "Dense":
        module: nn.Module = Dense(step.settings, source)
    else:
        module = LayerNorm(step.settings["dimension"])
    assert step.weights is not None
    module.load_state_dict({k: v.float() for k, v in load_file(step.weights).items()})
    return module


def activation(name: str, source: Path | None = None) -> nn.Module:
    """Return torch's module with that full name; raise InputError for one outside torch.nn.

    Anything else would be code from the folder, which is not run.
    """
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    try:
        module = kind() if isinstance(kind, type) and issubclass(kind, nn.Module) else None
    except TypeError:  # one that needs sizes
        module = None
    if module is None:
        raise InputError(
            f"{source or 'a Dense'}: its activation_function is {name}, which is not one of "
            f"torch.nn that needs no sizes; use one that is ({TANH})"
        )
    return module
