"""Wrap a student without memory for FSDP2 and fill it: each process fills its own rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rekindle.train.deferred.filling import Destination, Filling
from rekindle.train.deferred.recording import Recording, Ref


class _Place(NamedTuple):
    """Where a module keeps a tensor."""

    owner: nn.Module
    container: dict[str, Any]  # its parameters, buffers or other attributes
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
    places = _move_to_meta(module, recording)
    shard()
    setting_before = torch.__future__.get_swap_module_params_on_conversion()
    # so that a tied one stays the same object
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(setting_before)
    destinations: dict[int, list[tuple[Ref, Destination]]] = {}
    seen_tensors = set[int]()
    for place in places:
        if (tensor := place.container[place.name]) is None:
            destination = _into_attribute(place, device)
        elif id(tensor) in seen_tensors:
            continue
        else:
            seen_tensors.add(id(tensor))
            destination = _into_rows(*local_rows(tensor))
        destinations.setdefault(place.ref.cell, []).append((place.ref, destination))
    Filling(recording, destinations).run()


def _move_to_meta(module: nn.Module, recording: Recording) -> list[_Place]:
    """Replace the parameters and buffers of ``recording`` with ones on the meta device."""
    places, replacements = list[_Place](), dict[int, Tensor]()
    for owner in module.modules():
        containers: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers, vars(owner))
        for container in containers:
            for name, value in [*container.items()]:
                if not isinstance(value, FakeTensor):
                    continue
                places.append(_Place(owner, container, name, recording.ref(value)))
                if container is vars(owner):
                    container[name] = None
                else:
                    container[name] = replacements.setdefault(id(value), _empty_like(value))
    return places


def _empty_like(value: Tensor) -> Tensor:
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if not isinstance(value, nn.Parameter):
        return empty
    return nn.Parameter(empty, value.requires_grad)


def _into_rows(own_rows: Tensor, first: int) -> Destination:
    def fill(rows: Callable[[slice], Tensor], whole: Callable[[], Tensor]) -> None:
        if own_rows.dim() == 0:
            own_rows.copy_(whole())
        elif len(own_rows):
            own_rows.copy_(rows(slice(first, first + len(own_rows))))

    return fill


def _into_attribute(place: _Place, device: torch.device) -> Destination:
    def fill(rows: Callable[[slice], Tensor], whole: Callable[[], Tensor]) -> None:
        place.container[place.name] = whole().clone().to(device)

    return fill
