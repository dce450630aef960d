"""Wrap a student without memory for FSDP2 and fill it: each process fills its own rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rekindle.train.deferred.filling import Filling, Home
from rekindle.train.deferred.recording import Recording, Ref


class _Place(NamedTuple):
    """Where a module keeps a tensor."""

    owner: nn.Module
    kept: dict[str, Any]  # its parameters, buffers or other attributes
    name: str
    ref: Ref


def fill_in_shards(
    module: nn.Module,
    recording: Recording,
    shard: Callable[[], None],
    device: torch.device,
    local_rows: Callable[[Tensor], tuple[Tensor, int]],
) -> None:
    """Let ``shard`` divide the parameters of ``module`` on the meta device, then fill in this
    process's rows (``local_rows``), and whole buffers, on ``device``. Tied parameters stay tied.
    """
    places = _on_meta(module, recording)
    shard()
    before = torch.__future__.get_swap_module_params_on_conversion()
    # so that a tied one stays the same object
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    homes: dict[int, list[tuple[Ref, Home]]] = {}
    seen = set[int]()
    for place in places:
        if (tensor := place.kept[place.name]) is None:
            home = _attribute(place, device)
        elif id(tensor) in seen:
            continue
        else:
            seen.add(id(tensor))
            home = _rows_of(*local_rows(tensor))
        homes.setdefault(place.ref.cell, []).append((place.ref, home))
    Filling(recording, homes).run()


def _on_meta(module: nn.Module, recording: Recording) -> list[_Place]:
    """Replace the parameters and buffers of ``recording`` with ones on the meta device."""
    found, made = list[_Place](), dict[int, Tensor]()
    for owner in module.modules():
        held: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers, vars(owner))
        for kept in held:
            for name, value in [*kept.items()]:
                if not isinstance(value, FakeTensor):
                    continue
                found.append(_Place(owner, kept, name, recording.ref(value)))
                if kept is vars(owner):
                    kept[name] = None
                else:
                    kept[name] = made.setdefault(id(value), _empty(value))
    return found


def _empty(value: Tensor) -> Tensor:
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if not isinstance(value, nn.Parameter):
        return empty
    return nn.Parameter(empty, value.requires_grad)


def _rows_of(own: Tensor, first: int) -> Home:
    def home(rows: Callable[[slice], Tensor], whole: Callable[[], Tensor]) -> None:
        if own.dim() == 0:
            own.copy_(whole())
        elif len(own):
            own.copy_(rows(slice(first, first + len(own))))

    return home


def _attribute(place: _Place, device: torch.device) -> Home:
    def home(rows: Callable[[slice], Tensor], whole: Callable[[], Tensor]) -> None:
        place.kept[place.name] = whole().clone().to(device)

    return home
