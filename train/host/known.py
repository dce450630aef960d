"""Tensors whose values the host knows too: whoever asks for these does not wait for the device.

On a GPU a question such as ``mask.all()`` waits for all earlier work. transformers asks it of every
mask that it is given, to leave out one that hides nothing; but the host has made the mask.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T", bound=Tensor)
WHOLE = (torch.bool, torch.int32, torch.int64)  # types whose values are the same on every device


def copy_to(values: NDArray, device: torch.device) -> Tensor:
    """Return a copy on ``device``; for a GPU from pinned memory, so that nothing waits for it."""
    # Read-only memory maps are never written through this: every consumer copies or computes out of
    # place.
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def note(tensor: T, values: NDArray) -> T:
    """Note a tensor's ``values`` on it, for ``values_of``; they must not be changed later."""
    noted: Any = tensor
    noted.on_host = (np.asarray(values), _version(tensor))
    return tensor


def values_of(tensor: Tensor) -> NDArray | None:
    """Return the values that were noted, unless the tensor was changed since; None: not known."""
    noted: tuple[NDArray, int | None] | None = getattr(tensor, "on_host", None)
    return None if noted is None or noted[1] != _version(tensor) else noted[0]


def _version(tensor: Tensor) -> int | None:
    """Return how often the tensor's memory was written; None: PyTorch does not count it."""
    return None if tensor.is_inference() else tensor._version


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal; waits for a device only if the host does not know."""
    if one is other:
        return True
    ones, others = values_of(one), values_of(other)
    if ones is None or others is None:
        return torch.equal(one, other)
    return np.array_equal(ones, others)


class Known(Tensor):
    """A tensor of whole numbers or truth values that carries what is known of it through the
    functions of ``_COMPUTED``, and says it itself.

    The device computes everything as always. What any other function returns is a plain tensor. A
    write to one in place makes it forget; in inference mode, where PyTorch counts no writes, one
    through a plain view of it is not noticed.
    """

    on_host: tuple[NDArray, int | None] | None

    @classmethod
    def of(cls, tensor: Tensor, values: NDArray) -> Tensor:
        """Return the tensor with its values; of another type than ``WHOLE``, without."""
        if tensor.dtype not in WHOLE:
            return tensor
        kind = np.bool_ if tensor.dtype == torch.bool else np.int64
        return note(tensor.as_subclass(cls), values.astype(kind, copy=False))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do what the function does, but do not ask the device for what is known."""
        named, name = dict(kwargs or {}), getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            known = _compute(name, args, named)
            if name == "nonzero" and known is not None:
                return copy_to(known, args[0].device)
            result = func(*args, **named)
            if not isinstance(result, Tensor):
                if result is None and name == "__setitem__":
                    _forget(args)
                return result
            given = (*args, *named.values())
            if known is None and any(result is each for each in given):  # as if changed in place
                _forget(given)
            result = result.as_subclass(Tensor) if isinstance(result, cls) else result
            if known is None or known.shape != result.shape:
                return result
            return cls.of(result, known)

    def __bool__(self) -> bool:
        values = self._one
        return super().__bool__() if values is None else bool(values)

    def __int__(self) -> int:
        values = self._one
        return super().__int__() if values is None else int(values)

    def item(self) -> bool | int | float:
        """Return the number of a tensor that has one."""
        values = self._one
        return super().item() if values is None else values.item()

    @property
    def _one(self) -> NDArray | None:
        values = values_of(self)
        return None if values is None or values.size != 1 else values.reshape(())


def plain(value: Any) -> Any:
    """Return a plain tensor for one of ``Known``; any other value as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Known) else value


def give_plain_tensors(block: Any) -> None:
    """Let a compiled module see none of ``Known``: PyTorch compiles for no such class."""
    compiled = block._compiled_call_impl

    def call(*arguments: Any, **named: Any) -> Any:
        return compiled(*map(plain, arguments), **{name: plain(one) for name, one in named.items()})

    block._compiled_call_impl = call


def _forget(tensors: tuple[Any, ...]) -> None:
    for tensor in tensors:
        if isinstance(tensor, Known):
            tensor.on_host = None


def _compute(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> NDArray | None:
    """Return what a function gives on the host; None for one, or arguments, not understood."""
    compute = _COMPUTED.get(name)
    if compute is None:
        return None
    try:
        on_host = [_on_host(one) for one in args]
        return np.asarray(compute(*on_host, **{key: _on_host(one) for key, one in named.items()}))
    except (_NotKnown, TypeError, ValueError, IndexError):
        return None


class _NotKnown(Exception):
    """The host does not know a value."""


def _on_host(argument: Any) -> Any:
    """Return an argument with values for tensors; raise _NotKnown if some are not known."""
    if isinstance(argument, Tensor):
        values = values_of(argument) if isinstance(argument, Known) else None
        if values is None:
            raise _NotKnown
        return values
    if isinstance(argument, (list, tuple)):
        return type(argument)(_on_host(one) for one in argument)
    return argument


def _slice(values: NDArray, index: Any) -> NDArray:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is ... or type(part) in (int, slice) for part in parts):
        raise _NotKnown
    found: NDArray = values[index]
    return found


def _difference(values: NDArray, *, prepend: NDArray, dim: int) -> NDArray:
    return np.diff(values, prepend=prepend, axis=dim)


def _places(values: NDArray, *, as_tuple: bool = False) -> NDArray:
    if as_tuple:
        raise _NotKnown
    return np.argwhere(values)


def _kept(values: NDArray, *_: object, **__: object) -> NDArray:
    return values


# By name: what the host computes beside the device, with the arguments that are understood.
_COMPUTED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("to", "bool", "long", "int"), _kept),
    **dict.fromkeys(("eq", "__eq__"), lambda values, other: values == other),
    **dict.fromkeys(("ne", "__ne__"), lambda values, other: values != other),
    "__invert__": lambda values: ~values,
    "sub": lambda values, other: values - other,
    "__getitem__": _slice,
    "cat": lambda tensors, dim=0: np.concatenate(tensors, axis=dim),
    "flatten": lambda values: values.reshape(-1),
    **dict.fromkeys(("view", "reshape"), lambda values, *shape: values.reshape(*shape)),
    "all": lambda values: values.all(),
    "max": lambda values: values.max(),
    "sum": lambda values, dim=None, dtype=None: values.sum(dim),
    "cumsum": lambda values, dim: values.cumsum(dim),
    "diff": _difference,
    "nonzero": _places,
}
