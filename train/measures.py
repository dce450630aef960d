"""Names of held-out values, and the versions of how a run measures them. Does not import torch.

``loss`` is the trained objective, with the last step's weights; ``ce`` the language model's
cross-entropy on the text, if that is trained; ``kl/NAME``, ``mse/NAME`` and ``agreement/NAME``
belong to a teacher, ``cosine/NAME`` to a sentence encoder; ``ce/DOMAIN`` (``loss/DOMAIN`` if there
is no ``ce``) to one domain; ``METHOD/…`` to a method.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

# How held-out values are measured. 1: kl and agreement took a sample for its teacher, and used all
# stored candidates, not the term's k. 2: `loss` was the cross-entropy, whatever was trained.
EVALUATION_VERSION = 3
TEACHER_VALUES_VERSION = 2  # since then, kl and agreement are measured as today
EVALUATION_SECTION = "evaluation"  # in a run's record; its key is `measure`
UNSEEN = "on sequences held out of training"  # printed after held-out values
# Prefixes of a term's gradient in the record of a step.
GRADIENT = "gradient/"  # its norm
GRADIENT_RATIO = "gradient_ratio/"  # that norm divided by the cross-entropy's

Value = TypeVar("Value")


def evaluation_version_of(record: Mapping[str, Any]) -> int:
    """Return the evaluation version of the run of a ``run.json``, which the run keeps."""
    if EVALUATION_SECTION in record:
        return int(record[EVALUATION_SECTION]["measure"])
    return 2 if "measured" in record["cache"] else 1


def true_names(values: Mapping[str, Value], evaluation_version: int) -> dict[str, Value]:
    """Return held-out values under today's names."""
    if evaluation_version >= EVALUATION_VERSION:
        return dict(values)
    parts = {name: name.partition("/") for name in values}
    return {
        ("ce" + slash + suffix if first == "loss" else name): values[name]
        for name, (first, slash, suffix) in parts.items()
    }
