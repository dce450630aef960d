"""What held-out values are called, and by which rule a run measures them. Torch is not imported.

``loss`` is the objective that is trained, at the weights of the last step; ``ce`` the cross-entropy
of the language model on the text, where that is trained; ``kl/NAME``, ``mse/NAME`` and
``agreement/NAME`` are a teacher's, ``cosine/NAME`` (to its vectors) a sentence encoder's;
``ce/DOMAIN`` (``loss/DOMAIN`` where there is no ``ce``) are of one domain; ``METHOD/…`` a method's
own.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

# 1: kl and agreement took a sample for its teacher, and all that is kept, not the term's k.
# 2: `loss` was the cross-entropy, whatever was trained.
MEASURE = 3
TEACHERS_SINCE = 2  # kl and agreement are measured as they are today
SECTION = "evaluation"  # of a run's record; its key is `measure`
UNSEEN = "on sequences held out of training"  # what held-out values are of, where they are printed
# What a step's record says of a term's gradient, before the term's name.
PULL = "gradient/"  # its norm
RATIO = "gradient_ratio/"  # that, over the norm of the cross-entropy's

Value = TypeVar("Value")


def measure_of(record: Mapping[str, Any]) -> int:
    """Return by which rule the run of a ``run.json`` measures: it goes on with that one."""
    if SECTION in record:
        return int(record[SECTION]["measure"])
    return 2 if "measured" in record["cache"] else 1


def true_names(values: Mapping[str, Value], measure: int) -> dict[str, Value]:
    """Return held-out values under the names that they have today."""
    if measure >= MEASURE:
        return dict(values)
    former = {name: name.partition("/") for name in values}
    return {
        ("ce" + slash + rest if first == "loss" else name): values[name]
        for name, (first, slash, rest) in former.items()
    }
