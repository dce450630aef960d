"""Tables of what each parameter of a model family computes and reads, used to grow models.

A new family of the same kind is one more table. Names are those of transformers' modules; within
layers, without the layer's prefix and number.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from torch import nn

from rekindle.data.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# hidden: of the residual stream; heads, groups: of all query or key/value heads; ffn: neurons.
Units = Literal["hidden", "heads", "groups", "ffn"]


@dataclass(frozen=True)
class Linear:
    """y = Wx + b. ``transposed``: W is stored as [in, out], as in GPT-2. ``parts``: number of
    matrices side by side in one (query, key and value).
    """

    out: Units
    into: Units
    transposed: bool = False
    parts: int = 1


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm over the hidden size. ``last``: the output matrix reads its output."""

    last: bool = False


@dataclass(frozen=True)
class Embedding:
    """One vector of the hidden size per row."""


@dataclass(frozen=True)
class Output:
    """The output matrix [V, hidden] and its bias [V]."""


Role = Linear | Norm | Embedding | Output


@dataclass(frozen=True)
class Family:
    """A kind of model: the names of its parts."""

    types: tuple[str, ...]  # config.model_type
    layer: str  # a regular expression of a layer's prefix, which its number follows
    layer_roles: dict[str, Role]  # by a regular expression of a module's name within a layer
    other_roles: dict[str, Role]
    eps: str  # its key in the configuration
    rms: bool = False
    # Post-LN: the norm after attention, and the one at a layer's end, which makes the layer's
    # output.
    norms_after: tuple[str, str] | None = None
    # Settings that must have these values; others would need too many changes.
    required_settings: dict[str, object] = field(default_factory=dict)

    def split_name(self, name: str) -> tuple[int | None, str]:
        """Return the layer number of the parameter ``name``, if any, and its name within
        the layer.
        """
        match = re.match(rf"{self.layer}(\d+)\.", name)
        return (int(match.group(1)), name[match.end() :]) if match else (None, name)

    def role(self, name: str) -> Role | None:
        """Return the role of the parameter ``name``; None if unknown."""
        number, inner_name = self.split_name(name.rpartition(".")[0])
        roles = self.other_roles if number is None else self.layer_roles
        return next(
            (role for pattern, role in roles.items() if re.fullmatch(pattern, inner_name)), None
        )


BERT = Family(
    types=("bert", "roberta"),
    layer=r"(?:bert|roberta)\.encoder\.layer\.",
    layer_roles={
        r"attention\.self\.(query|key|value)": Linear("heads", "hidden"),
        r"attention\.output\.dense": Linear("hidden", "heads"),
        r"intermediate\.dense": Linear("ffn", "hidden"),
        r"output\.dense": Linear("hidden", "ffn"),
        r"(attention\.)?output\.LayerNorm": Norm(),
    },
    other_roles={
        r"(bert|roberta)\.embeddings\.(word|position|token_type)_embeddings": Embedding(),
        r"(bert|roberta)\.embeddings\.LayerNorm": Norm(),
        r"cls\.predictions\.transform\.dense|lm_head\.dense": Linear("hidden", "hidden"),
        r"cls\.predictions\.transform\.LayerNorm|lm_head\.layer_norm": Norm(last=True),
        r"cls\.predictions(\.decoder)?|lm_head(\.decoder)?": Output(),
    },
    norms_after=("attention.output.LayerNorm", "output.LayerNorm"),
    eps="layer_norm_eps",
    # A decoder's transform stands between its body's last norm and its output matrix.
    required_settings={"add_cross_attention": False, "is_decoder": False},
)
GPT2 = Family(
    types=("gpt2",),
    layer=r"transformer\.h\.",
    layer_roles={
        r"attn\.c_attn": Linear("heads", "hidden", transposed=True, parts=3),
        r"attn\.c_proj": Linear("hidden", "heads", transposed=True),
        r"mlp\.c_fc": Linear("ffn", "hidden", transposed=True),
        r"mlp\.c_proj": Linear("hidden", "ffn", transposed=True),
        r"ln_[12]": Norm(),
    },
    other_roles={
        r"transformer\.(wte|wpe)": Embedding(),
        r"transformer\.ln_f": Norm(last=True),
        r"lm_head": Output(),
    },
    eps="layer_norm_epsilon",
    # A scale by the layer's number would give a layer's copy different attention.
    required_settings={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
)
LLAMA = Family(
    types=("llama", "mistral", "qwen2"),
    layer=r"model\.layers\.",
    layer_roles={
        r"self_attn\.q_proj": Linear("heads", "hidden"),
        r"self_attn\.[kv]_proj": Linear("groups", "hidden"),
        r"self_attn\.o_proj": Linear("hidden", "heads"),
        r"mlp\.(gate|up)_proj": Linear("ffn", "hidden"),
        r"mlp\.down_proj": Linear("hidden", "ffn"),
        r"(input|post_attention)_layernorm": Norm(),
    },
    other_roles={
        r"model\.embed_tokens": Embedding(),
        r"model\.norm": Norm(last=True),
        r"lm_head": Output(),
    },
    eps="rms_norm_eps",
    rms=True,
)
FAMILIES = (BERT, GPT2, LLAMA)


def family_of(model: nn.Module) -> Family:
    """Return the family of a transformers model. Raise InputError for other models."""
    config = cast("PretrainedConfig", model.config)
    growable_types = [kind for family in FAMILIES for kind in family.types]
    family = next((f for f in FAMILIES if config.model_type in f.types), None)
    if family is None:
        raise InputError(
            f"student.grow: {type(model).__name__} ({config.model_type}) cannot be grown; only "
            f"models of the types {', '.join(growable_types)} can"
        )
    for key, value in family.required_settings.items():
        if getattr(config, key, value) != value:
            raise InputError(
                f"student.grow: a {config.model_type} model with {key}: {getattr(config, key)} "
                f"cannot be grown, only one with {key}: {value}"
            )
    unknown_parameters = [name for name in model.state_dict() if family.role(name) is None]
    if unknown_parameters:
        raise InputError(
            f"student.grow: {type(model).__name__} has parameters that {config.model_type} models "
            f"do not have ({', '.join(unknown_parameters[:3])}); it cannot be grown"
        )
    return family
