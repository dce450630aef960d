"""The arguments of the loss operator as records, and the operator's schema derived from them."""

from collections.abc import Sequence
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from rekindle.kernels.blocks import compute_dtype, matrix_dtype
from rekindle.kernels.hidden import WholeLogits
from rekindle.kernels.targets import KernelTargets, LossSettings

GradientFlags = Sequence[bool]  # one flag each for the student's inputs, weight and bias


class StudentLogits(NamedTuple):
    """The student's logits [N,V]: `inputs`, or inputs [N,H] @ weight.T + bias."""

    inputs: Tensor
    weight: Tensor | None = None  # [V,H]
    bias: Tensor | None = None  # [V]

    @property
    def vocabulary(self) -> int:
        """Return V."""
        return self.inputs.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def fused_dtype(self) -> torch.dtype:
        """Return the dtype of the logits on the Triton path."""
        if self.weight is None:
            return self.inputs.dtype
        return matrix_dtype(self.inputs, self.weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return float64 if inputs or weight are float64, else float32."""
        return compute_dtype(*(t for t in self[:2] if t is not None))


class Computation(NamedTuple):
    """How a loss is computed."""

    impl: str  # triton | torch
    product_dtype: torch.dtype | None = None  # of a head's matrix products; None: compute_dtype
    needs_grad: GradientFlags = (False, False, False)  # which gradients to compute


class Call(NamedTuple):
    """All arguments of the operator."""

    student: StudentLogits
    targets: KernelTargets  # for a whole-vocabulary teacher: labels and weights, no ids
    whole: WholeLogits
    settings: LossSettings
    computation: Computation

    def with_needs_grad(self, needs_grad: GradientFlags) -> "Call":
        """Return the same call with other gradients to compute."""
        return self._replace(computation=self.computation._replace(needs_grad=needs_grad))

    def flat(self) -> list[object]:
        """Return the fields of all parts in the order of the schema."""
        return [value for part in self for value in part]

    @classmethod
    def of(cls, flat: Sequence[object]) -> "Call":
        """Return the record that `flat` was made from."""
        return cls._make(part._make(flat[place]) for part, place in _PARTS)


_TYPES: dict[object, str] = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", torch.dtype | None: "ScalarType?"},
    **{
        int: "int",
        bool: "bool",
        float: "float",
        float | None: "float?",
        str: "str",
        GradientFlags: "bool[]",
    },
    Sequence[float]: "float[]",
}
ARGUMENTS: list[str] = []  # of the schema, one per field of each part of Call
# the parts of Call and their places in `Call.flat`
_PARTS: list[tuple[type[NamedTuple], slice]] = []
for _name, _part in get_type_hints(Call).items():
    _fields = [f"{_TYPES[kind]} {_name}_{f}" for f, kind in get_type_hints(_part).items()]
    _PARTS.append((_part, slice(len(ARGUMENTS), len(ARGUMENTS) + len(_fields))))
    ARGUMENTS += _fields
SCHEMA = ", ".join(ARGUMENTS)
# the tensors come first among the arguments
TENSORS = sum(argument.startswith("Tensor") for argument in ARGUMENTS)
