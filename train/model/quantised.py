"""Weights of an adapter's base, rounded to four bits (QLoRA, arXiv 2305.14314).

NF4 in blocks of 64, by bitsandbytes, which only this module imports; it has code for CPUs too. What
is trained on such weights is an adapter of these, not of those in the base's folder: whoever loads
it rounds the base first (``round_weights``).
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rekindle.data.errors import InputError

INSTALL = "install the extra, in Rekindle's checkout: pip install -e '.[quantized]'"
_OPTIONS: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": False}


def check_bitsandbytes_installed(subject: str) -> None:
    """Raise InputError, about ``subject``, if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise InputError(
            f"{subject} needs the package bitsandbytes, which is not installed: {INSTALL}"
        )


def quantised_layer(layer: nn.Module, subject: str) -> nn.Module:
    """Return a linear layer with the weights of ``layer`` in four bits. It computes with what
    ``rounded`` makes of them, and passes gradients through.

    Raises InputError, about ``subject``, for another kind of layer.
    """
    if not isinstance(layer, nn.Linear):
        raise InputError(
            f"{subject}: student.lora.quantize rounds linear layers, but a {type(layer).__name__} "
            "is adapted. Leave quantize out, or adapt only linear layers (target_modules)"
        )
    if layer.weight.is_meta:  # there are no weights: only shapes are needed
        return layer
    import bitsandbytes

    rounded_layer = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=None,
        quant_type=_OPTIONS["quant_type"],
        compress_statistics=_OPTIONS["compress_statistics"],
    )
    # On some CPUs (AVX-512 with bf16) it would compute in bf16 whenever it does not train, with a
    # layout that takes no small matrices.
    rounded_layer.support_avx512bf16_for_cpu = False
    rounded_layer.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, **_OPTIONS
    )
    rounded_layer.bias = layer.bias
    return rounded_layer.to(layer.weight.device)


def four_bit_shape(values: object) -> torch.Size | None:
    """Return the shape of a matrix held in four bits; None for other tensors."""
    state = getattr(values, "quant_state", None)
    return None if state is None else torch.Size(state.shape)


def rounded(weight: Tensor) -> Tensor:
    """Return a matrix after rounding to four bits, as the computation sees it; float32."""
    from bitsandbytes import functional

    four_bits, state = functional.quantize_4bit(weight.contiguous(), **_OPTIONS)
    return functional.dequantize_4bit(four_bits, state)


@torch.no_grad()
def round_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Round the weights of the layers ``names`` of ``model`` in place."""
    for name in names:
        layer: Any = model.get_submodule(name)
        weight: Tensor = layer.weight
        weight.copy_(rounded(weight.detach().float()))
