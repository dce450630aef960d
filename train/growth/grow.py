"""Grow a language model in width and depth (ELLE, Findings of ACL 2022).

Takes a model and returns a larger one; students and caches are unknown here.

Width: hidden dimension j of the new model copies dimension g(j) of the old; rows are copied,
columns are copied and divided by the multiplicity of g(j). There is one g for every use of the
hidden size, one per layer for the feed-forward neurons, and one per layer for whole attention heads
(their size, and the number of query heads per key/value head, stay the same). Depth: copies of
layers come directly after their originals. How well the old model's logits are kept, up to
rounding:

  what grows             BERT, RoBERTa (post-LN)  GPT-2 (pre-LN)    Llama, Mistral, Qwen2 (RMS)
  feed-forward, heads    exact                    exact             exact
  hidden size, multiple  exact                    exact             exact
  hidden size, other     not; exact: refused      exact on request  exact on request
  layers                 exact on request         exact on request  exact on request

"On request" means ``preserve: exact``; ``approximate`` is ELLE's rule alone.

- Hidden size, not a multiple: some dimensions have more copies than others, so the mean and
  variance that a LayerNorm uses (the mean square that an RMSNorm uses) change. ``exact`` for
  RMSNorm: rows and columns are both divided by √multiplicity, which keeps the sum of squares; it is
  then divided by D dimensions instead of d, which weight·√(d/D) and eps·d/D correct. ``exact`` for
  a pre-LN LayerNorm: the new dimensions hold the mean of the old ones (the residual stream is a sum
  of outputs of linear maps, so rows that are means do that); the mean stays the same and the
  variance is d/D of the old one.
- This is impossible for post-LN: there a LayerNorm's output y = γ∘x̂ + β is the residual stream
  itself. The new dimensions would have to hold mean(y), which varies with the text unless γ is
  constant, but a LayerNorm turns a dimension that holds the mean into its constant β. With the old
  dimensions unchanged and D < 2d − 1, nothing else keeps the variance: Σ over new dimensions of
  (a−1/d)(a−1/d)ᵀ would have to be a multiple of the centring matrix, whose rank is d − 1.
- Layers, ``approximate``: a layer applied twice is another function. ``exact``: the copies' output
  projections are zero. In pre-LN that makes them the identity. In post-LN a layer without output is
  LN(LN(y)), and the LayerNorm of γ∘x̂ + β is not the identity: it loses the mean and variance of y.
  But the LayerNorm of x̂ is (up to eps: a relative error of about eps/2). So the original's last
  LayerNorm loses its affine part, those in between are plain, and the last copy's has it.
- ``noise_std`` (from ELLE) is the noise added to the divided columns of every copy but the first:
  equal units get equal gradients, and stay equal for ever unless dropout separates them. It changes
  the logits a little; with ``exact`` the first copy takes the negative sum, so they do not change.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from rekindle.data.errors import InputError
from rekindle.train.growth.families import Embedding, Linear, Norm, Role, family_of
from rekindle.train.growth.maps import Axis, balanced_sources, in_blocks, layer_sources
from rekindle.train.model.student_config import GrowConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Model = TypeVar("Model", bound=nn.Module)
State = dict[str, Tensor]


class Shape(NamedTuple):
    """The sizes that may grow."""

    layers: int
    hidden_size: int
    heads: int
    key_value_heads: int
    intermediate_size: int

    @classmethod
    def of(cls, config: "PretrainedConfig") -> "Shape":
        """Return the shape of a transformers configuration."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        # GPT-2's name first, because a configuration also keeps values given under other names.
        inner = config.n_inner if hasattr(config, "n_inner") else config.intermediate_size
        groups = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, hidden, heads, groups, inner or 4 * hidden)


def grown_shape(old: Shape, config: GrowConfig) -> Shape:
    """Return the shape asked for, with missing sizes filled in proportion.

    Raises InputError if something would shrink, or a head's size would change.
    """
    heads, hidden = config.heads, config.hidden_size
    if hidden is None:
        hidden = old.hidden_size if heads is None else -(-heads * old.hidden_size // old.heads)
    if heads is None:
        heads = hidden * old.heads // old.hidden_size
    inner = config.intermediate_size or -(-old.intermediate_size * hidden // old.hidden_size)
    groups = heads * old.key_value_heads // old.heads
    new = Shape(config.layers or old.layers, hidden, heads, groups, inner)
    for name, before, after in zip(Shape._fields, old, new, strict=True):
        if after < before:
            raise InputError(
                f"student.grow: {name} would shrink from {before} to {after}; a model can only grow"
            )
    if heads * old.hidden_size != hidden * old.heads:
        head_size = old.hidden_size / old.heads
        raise InputError(
            f"student.grow: hidden_size {hidden} with {heads} heads: whole heads are added, so "
            f"there must be {head_size:g} hidden dimensions per head, as now "
            f"({old.hidden_size} with {old.heads}). Give a multiple of it, or only heads"
        )
    if groups * old.heads != heads * old.key_value_heads:
        raise InputError(
            f"student.grow: {heads} heads: one key/value head serves "
            f"{old.heads // old.key_value_heads} of them, so give a multiple of that"
        )
    return new


@dataclass(frozen=True)
class LayerAxes:
    """How the units of one layer grow."""

    heads: Axis  # [heads·head size]
    groups: Axis  # [key/value heads·head size]
    ffn: Axis


class Growth:
    """How one model grows: its new configuration, and which unit copies which.

    Raises InputError if it cannot grow so.
    """

    def __init__(self, model: nn.Module, config: GrowConfig):
        old = cast("PretrainedConfig", model.config)
        self.family = family_of(model)
        self.settings = config
        self.old, self.new = Shape.of(old), grown_shape(Shape.of(old), config)
        self.tied = bool(old.tie_word_embeddings)
        self._draw = torch.Generator().manual_seed(config.seed)
        self.hidden = self._hidden_axis()
        self.sources = layer_sources(self.old.layers, self.new.layers, config.copies)
        head_size = getattr(old, "head_dim", None) or self.old.hidden_size // self.old.heads
        self.layers = [self._layer_axes(head_size) for _ in self.sources]
        self.config = self._config(old)

    def model(self, old: Model) -> Model:
        """Return the grown model, on the CPU, with its tied weights tied."""
        grown = type(old)(self.config)
        grown.load_state_dict(self._widen(self._deepen(old.state_dict())))
        grown.to(next(old.parameters()).dtype).train(old.training)
        if getattr(old, "generation_config", None) is not None:
            grown.generation_config = copy.deepcopy(old.generation_config)
        return grown

    def _hidden_axis(self) -> Axis:
        old, new = self.old.hidden_size, self.new.hidden_size
        source = balanced_sources(old, new, self._draw)
        if self.settings.preserve == "approximate" or new % old == 0:
            return Axis.copied(source)
        if self.family.norms_after is not None:
            raise InputError(
                f"student.grow: preserve: exact is impossible from hidden_size {old} to {new}: "
                "after a LayerNorm on the residual stream, mean and variance stay the same only "
                f"if all dimensions have equally many copies. Use {old * math.ceil(new / old)} (a "
                "multiple), or preserve: approximate; layers and intermediate_size may be any"
            )
        return Axis.shared(source) if self.family.rms else Axis.averaged(source)

    def _layer_axes(self, head_size: int) -> LayerAxes:
        groups = balanced_sources(self.old.key_value_heads, self.new.key_value_heads, self._draw)
        heads = in_blocks(groups, self.old.heads // self.old.key_value_heads)
        ffn = balanced_sources(self.old.intermediate_size, self.new.intermediate_size, self._draw)
        sources = (in_blocks(heads, head_size), in_blocks(groups, head_size), ffn)
        return LayerAxes(*map(Axis.copied, sources))

    def _config(self, old: "PretrainedConfig") -> "PretrainedConfig":
        new = copy.deepcopy(old)
        changes: dict[str, object] = {
            "num_hidden_layers": self.new.layers,
            "hidden_size": self.new.hidden_size,
            "num_attention_heads": self.new.heads,
            "num_key_value_heads": self.new.key_value_heads,
            "intermediate_size": self.new.intermediate_size,
            "n_inner": self.new.intermediate_size,
            self.family.eps: getattr(old, self.family.eps) * self.hidden.norm_scale**2,
        }
        if getattr(old, "layer_types", None):
            changes["layer_types"] = [old.layer_types[layer] for layer in self.sources]
        for key, value in changes.items():
            if hasattr(old, key):
                setattr(new, key, value)
        return new

    # ---- depth -------------------------------------------------------------------------------

    def _deepen(self, state: Mapping[str, Tensor]) -> State:
        """Return the weights of all new layers, still with the old width."""
        tensors: State = {}
        for name, tensor in state.items():
            layer, inner_name = self.family.split_name(name)
            if layer is None:
                tensors[name] = tensor.cpu()
                continue
            start = name.removesuffix(f"{layer}.{inner_name}")
            places = [place for place, source in enumerate(self.sources) if source == layer]
            for place in places:
                copied = tensor.cpu()
                if self.settings.preserve == "exact":
                    copied = self._without_effect(name, copied, place, places)
                tensors[f"{start}{place}.{inner_name}"] = copied
        return tensors

    def _without_effect(self, name: str, tensor: Tensor, place: int, places: list[int]) -> Tensor:
        """Return a parameter of a layer copied to ``places``, changed so that the copies have no
        effect.
        """
        module, _, kind = self.family.split_name(name)[1].rpartition(".")
        is_copy, is_last, role = place != places[0], place == places[-1], self.family.role(name)
        if is_copy and isinstance(role, Linear) and role.out == "hidden":
            return torch.zeros_like(tensor)  # it adds to the residual stream
        inner, outer = self.family.norms_after or ("", "")
        if (module == inner and is_copy) or (module == outer and not is_last):
            return torch.zeros_like(tensor) if kind == "bias" else torch.ones_like(tensor)
        return tensor

    # ---- width -------------------------------------------------------------------------------

    def _widen(self, state: State) -> State:
        return {
            name: self._widen_parameter(name, tensor).contiguous() for name, tensor in state.items()
        }

    def _widen_parameter(self, name: str, tensor: Tensor) -> Tensor:
        role, layer = self.family.role(name), self.family.split_name(name)[0]
        axes = None if layer is None else self.layers[layer]
        if isinstance(role, Linear):
            return self._linear(role, tensor, axes)
        if isinstance(role, Norm):
            divided = role.last and self.tied
            return self.hidden.norm(tensor, bias=name.endswith(".bias"), read=divided)
        return self._table(role, tensor)

    def _linear(self, role: Linear, tensor: Tensor, axes: LayerAxes | None) -> Tensor:
        out, into = self._axis(role.out, axes), self._axis(role.into, axes)
        row_dim = 1 if role.transposed and tensor.dim() == 2 else 0
        parts = [out.rows(part, row_dim) for part in tensor.chunk(role.parts, row_dim)]
        grown = torch.cat(parts, row_dim) if role.parts > 1 else parts[0]
        return grown if grown.dim() == 1 else self.columns(into, grown, 1 - row_dim)

    def _table(self, role: Role | None, tensor: Tensor) -> Tensor:
        """Return a table of a vector per token or position, or the output matrix, tied to it or
        not.
        """
        if tensor.dim() == 1:  # the output's bias
            return tensor
        if isinstance(role, Embedding) or self.tied:
            return self.hidden.rows(tensor, 1)
        return self.columns(self.hidden, tensor, 1)

    def columns(self, axis: Axis, tensor: Tensor, dim: int) -> Tensor:
        """Return the grown columns that read the units of ``axis``, with the
        configuration's noise.
        """
        keep_sum = self.settings.preserve == "exact"
        return axis.columns(tensor, dim, self.settings.noise_std, self._draw, keep_sum)

    def _axis(self, units: str, axes: LayerAxes | None) -> Axis:
        axis: Axis = self.hidden if units == "hidden" else getattr(axes, units)
        return axis


def grow(model: Model, config: GrowConfig) -> Model:
    """Return a larger model that copies ``model`` (BERT, RoBERTa, GPT-2, Llama, Mistral or Qwen2
    with an LM head), on the CPU. The table above says how well its logits are kept.

    Raises InputError for other models, and for shapes that it cannot grow to.
    """
    return Growth(model, config).model(model)
