"""The settings of a term for vectors: a key for each file of ``losses/``, and the projection.

The keys are found, not listed: a new file is a new key. Does not import torch.
"""

import pkgutil
from collections.abc import Mapping
from functools import cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, create_model, model_validator

import rekindle.train.objective.embedding.losses as package
from rekindle.data.settings import Settings
from rekindle.train.objective.embedding.base import VectorLoss

DEFAULT = "cosine"  # the loss of a term that names none


@cache
def vector_losses() -> Mapping[str, type[VectorLoss]]:
    """Return the losses by name, which is that of their file."""
    losses: dict[str, type[VectorLoss]] = {}
    for file in sorted(pkgutil.iter_modules(package.__path__), key=lambda file: file.name):
        module = f"{package.__name__}.{file.name}"
        classes = [v for v in vars(resolve_name(module)).values() if _is_defined_in(v, module)]
        if len(classes) != 1:
            raise ImportError(
                f"{module} must define one subclass of VectorLoss, it has {len(classes)}"
            )
        losses[file.name] = classes[0]
    return losses


def _is_defined_in(value: object, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, VectorLoss) and value.__module__ == module


def with_weight(value: object) -> object:
    """Read a single number as the weight."""
    if isinstance(value, bool):
        raise ValueError("must be a weight or a section, not true or false")
    return {"weight": value} if isinstance(value, int | float) else value


class VectorTerm(Settings):
    """How the vectors of embedding teachers are learnt: a sum of losses; none named: cosine."""

    projection: bool | None = Field(
        None,
        description="a linear layer from the student's vector to the size of the teacher's. null: "
        "where the sizes differ and a loss compares the vectors number by number; true: always; "
        "false: never, and such a loss is then refused where the sizes differ",
    )

    @model_validator(mode="after")
    def _learns_something(self) -> "VectorTerm":
        sections = [getattr(self, name) for name in vector_losses()]
        if any(section is not None for section in sections) and not self.losses:
            raise ValueError("every loss has the weight 0; give one of them a weight")
        return self

    @property
    def losses(self) -> dict[str, VectorLoss]:
        """Return the losses with a weight above 0, by name."""
        kinds = vector_losses()
        sections = {name: getattr(self, name) for name in kinds}
        if all(section is None for section in sections.values()):
            sections[DEFAULT] = kinds[DEFAULT].Settings()
        return {
            name: kinds[name](settings)
            for name, settings in sections.items()
            if settings is not None and settings.weight > 0
        }

    @property
    def compares_rows(self) -> bool:
        """Return whether a row's loss depends on the other rows of its step."""
        return any(loss.compares_rows for loss in self.losses.values())

    @property
    def needs_equal_sizes(self) -> bool:
        """Return whether the student's vectors must have the length of the teacher's."""
        return any(loss.needs_equal_sizes for loss in self.losses.values())


def _keys() -> dict[str, Any]:
    """Return a key for each loss: its settings, or only its weight."""
    return {
        name: (
            Annotated[
                kind.Settings | None,
                BeforeValidator(with_weight, json_schema_input_type=float | kind.Settings | None),
            ],
            Field(None, description=f"{_first_line(kind)} A number alone is its weight"),
        )
        for name, kind in vector_losses().items()
    }


def _first_line(kind: type[VectorLoss]) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


if TYPE_CHECKING:
    VectorConfig = VectorTerm
else:
    VectorConfig = create_model(
        "VectorConfig",
        __base__=VectorTerm,
        __module__=__name__,
        __doc__=VectorTerm.__doc__,
        **_keys(),
    )
