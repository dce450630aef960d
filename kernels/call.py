"""What the operator of a loss is told, as records, and the operator's schema made of them."""

from collections.abc import Sequence
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from rekindle.kernels.blocks import compute_dtype, matrix_dtype
from rekindle.kernels.hidden import WholeTeacher
from rekindle.kernels.targets import LossSettings, SparseTargets

Wanted = Sequence[bool]  # of the student's inputs, weight and bias


class StudentLogits(NamedTuple):
    """The student's logits [N,V]: `inputs`, or inputs [N,H] @ weight.T + bias."""

    inputs: Tensor
    weight: Tensor | None = None  # [V,H]
    bias: Tensor | None = None  # [V]

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.inputs.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def fused_dtype(self) -> torch.dtype:
        """What the Triton path's logits are in."""
        if self.weight is None:
            return self.inputs.dtype
        return matrix_dtype(self.inputs, self.weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 if any factor is, else float32."""
        return compute_dtype(*(t for t in self[:2] if t is not None))


class Computation(NamedTuple):
    """How a loss is computed."""

    impl: str  # triton | torch
    product_dtype: torch.dtype | None = None  # of a head's products; None: that of the arithmetic
    wanted: Wanted = (False, False, False)  # gradients


class Call(NamedTuple):
    """What the operator is told."""

    student: StudentLogits
    targets: SparseTargets  # of a whole teacher: labels and weights, no ids
    teacher: WholeTeacher
    settings: LossSettings
    computation: Computation

    def wanting(self, wanted: Wanted) -> "Call":
        """The same, but for the gradients that are wanted."""
        return self._replace(computation=self.computation._replace(wanted=wanted))

    def flat(self) -> list[object]:
        """The fields of all parts, in the order of the schema."""
        return [value for part in self for value in part]

    @classmethod
    def of(cls, flat: Sequence[object]) -> "Call":
        """The record that `flat` was made of."""
        return cls._make(part._make(flat[place]) for part, place in _PARTS)


_TYPES: dict[object, str] = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", torch.dtype | None: "ScalarType?"},
    **{
        int: "int",
        bool: "bool",
        float: "float",
        float | None: "float?",
        str: "str",
        Wanted: "bool[]",
    },
    Sequence[float]: "float[]",
}
ARGUMENTS: list[str] = []  # of the schema, one per field of a part of Call
_PARTS: list[tuple[type[NamedTuple], slice]] = []  # of Call, with their places in `Call.flat`
for _name, _part in get_type_hints(Call).items():
    _fields = [f"{_TYPES[kind]} {_name}_{f}" for f, kind in get_type_hints(_part).items()]
    _PARTS.append((_part, slice(len(ARGUMENTS), len(ARGUMENTS) + len(_fields))))
    ARGUMENTS += _fields
SCHEMA = ", ".join(ARGUMENTS)
TENSORS = sum(argument.startswith("Tensor") for argument in ARGUMENTS)  # at the head of them
