"""Tell a transformers model that a row holds several documents, each to be read as if alone.
``train/model/sight.py`` finds by trying which form a model understands.

B rows of S tokens. A pass's inputs have ``document_numbers`` [B,S], which says which document of
its row each token belongs to, −1 for padding; a form replaces it and the attention mask.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rekindle.data.batch import Ints
from rekindle.data.corpus.columns import DOCUMENTS
from rekindle.train.host.known import Known, copy_to, values_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Mapping[str, Tensor]
MASK = "attention_mask"


class Form(NamedTuple):
    """What a model is given, and the position ``first`` of a document's first token.

    mask: one mask [B,1,S,S] for all layers. windows: one for layers that see everything, and one
    for those of a bidirectional model that see a window. positions: position ids only, which causal
    transformers models understand if they get no mask. blocks: a block mask of flex attention.
    flat: all rows concatenated, and where each document begins, as flash attention's kernels for
    sequences of different lengths take it.
    """

    kind: Literal["mask", "windows", "positions", "blocks", "flat"]
    first: int


def possible_forms(model: "PreTrainedModel", causal: bool) -> Iterator[list[Form]]:
    """Yield the forms that a model with this attention may understand, the quickest first: each
    kind with every first position. Families like RoBERTa count from after their padding id.
    """
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    kinds: tuple[Any, ...] = ("mask", "positions" if causal else "windows")
    if "flash" in attention:
        kinds = ("flat",)
    elif attention == "flex_attention":
        kinds = ("blocks",)
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    first_positions = [0] if padding is None or padding < 0 else [0, padding + 1]
    for kind in kinds:
        yield [Form(kind, first) for first in first_positions]


def positions_of(numbers: Ints, first: int) -> Ints:
    """Return the position ids [B,S], starting from ``first`` in each document."""
    places = np.arange(numbers.shape[1])
    starts: Ints = np.maximum.accumulate(np.where(_begins(numbers), places, 0), axis=1)
    return places - starts + first


def _begins(numbers: Ints) -> NDArray[np.bool_]:
    """Return which tokens [B,S] begin a document. Padding counts as one."""
    begins = np.ones(numbers.shape, bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return begins


def block_mask(numbers: Tensor, causal: bool) -> Tensor:
    """Return [B,1,S,S]: whether a token (third dimension) sees another one."""
    sees = numbers[:, None, :, None] == numbers[:, None, None, :]
    return sees.tril() if causal else sees


def as_read(model: "PreTrainedModel", inputs: Inputs, form: Form, causal: bool) -> dict[str, Any]:
    """Return a pass's inputs with ``document_numbers`` replaced by that form. For ``flat`` they are
    a single row [1,B·S]. Waits for the device only if nobody has noted the numbers (``note``).
    """
    numbers, on_host = inputs[DOCUMENTS], values_of(inputs[DOCUMENTS])
    on_host = numbers.cpu().numpy() if on_host is None else on_host
    positions = positions_of(on_host, form.first)
    packed: dict[str, Any] = {k: v for k, v in inputs.items() if k not in (DOCUMENTS, MASK)}
    # transformers asks them whether any row has several documents, where there is no mask
    packed["position_ids"] = Known.of(copy_to(positions, numbers.device), positions)
    if form.kind == "mask":
        packed[MASK] = _for_attention(model, block_mask(numbers, causal))
    elif form.kind == "positions":
        packed |= {MASK: None, "use_cache": False}  # with a cache, position ids are ignored
    elif form.kind == "windows":
        packed[MASK] = _with_windows(model, block_mask(numbers, causal))
    elif form.kind == "flat":
        begins = np.append(np.flatnonzero(_begins(on_host)), on_host.size).astype(np.int32)
        edges, longest = copy_to(begins, numbers.device), int(np.diff(begins).max())
        packed = {name: value.reshape(1, -1) for name, value in packed.items()}
        packed |= {"use_cache": False} if causal else {}
        packed |= {MASK: None, "cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
        packed |= {"max_length_q": longest, "max_length_k": longest}
    else:
        packed[MASK] = _block_mask_of_flex(model, numbers, causal)
    return packed


def _for_attention(model: "PreTrainedModel", sees: Tensor) -> Tensor:
    """Return the mask as PyTorch's attention takes it; eager attention adds it to the scores."""
    if model.config._attn_implementation == "sdpa":
        return sees
    dtype = next(model.parameters()).dtype
    hidden = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return hidden.masked_fill_(~sees, torch.finfo(dtype).min)


def _with_windows(model: "PreTrainedModel", sees: Tensor) -> dict[str, Tensor]:
    """Return a mask for each type of a bidirectional model's layers."""
    from transformers.masking_utils import sliding_window_bidirectional_overlay

    places = torch.arange(sees.shape[-1], device=sees.device)
    size = model.config.get_text_config().sliding_window
    within_window = sliding_window_bidirectional_overlay(size)(0, 0, places[:, None], places)
    masks = {"full_attention": sees, "sliding_attention": sees & within_window}
    return {name: _for_attention(model, mask) for name, mask in masks.items()}


def _block_mask_of_flex(model: "PreTrainedModel", numbers: Tensor, causal: bool) -> Any:
    from transformers import masking_utils

    dtype = next(model.parameters()).dtype
    states = torch.empty((*numbers.shape, 0), dtype=dtype, device=numbers.device)
    within = masking_utils.packed_sequence_mask_function(numbers)
    arguments: dict[str, Any] = {"config": model.config.get_text_config(), "inputs_embeds": states}
    arguments |= {MASK: None, "and_mask_function": within}
    if causal:
        return masking_utils.create_causal_mask(**arguments, past_key_values=None)
    return masking_utils.create_bidirectional_mask(**arguments)
