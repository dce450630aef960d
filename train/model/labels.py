"""The labels of a classifier: one name for each of its head's outputs."""

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.data.errors import InputError
from rekindle.data.text_files import surrogate_problem
from rekindle.train.model.folder import StoredTensor
from rekindle.train.model.meta import shape_only

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger("rekindle")

SAY_SCORES = 'if they are scores, write "problem_type": "regression" into its config.json'
# transformers' names for heads that classify whole texts.
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
_PROBE_LABELS = 1009  # a number of labels, used to find the tensors with a row for each


def problem_of_outputs(recorded: str | None, outputs: int) -> str:
    """Return the kind of task that this many outputs answer: the ``recorded`` one or, if
    transformers does not know it, the one it would assume for one output, or several.
    """
    if recorded in PROBLEMS:
        return recorded
    return "regression" if outputs == 1 else "single_label_classification"


def complete_labels(
    config: "PretrainedConfig",
    auto_class: str,
    tensors: Mapping[str, StoredTensor],
    directory: Path,
) -> None:
    """Give ``config`` a name for each output of the head in the file, and log what was done.

    id2label may begin at 1 or have gaps: an output without a name is LABEL_i, as in transformers; a
    name without an output is ignored.
    """
    count = outputs_in_file(config, auto_class, tensors) or config.num_labels
    recorded_names = config.id2label or {}
    if count is None or set(recorded_names) == set(range(count)):
        return
    names = {i: str(recorded_names.get(i, f"LABEL_{i}")) for i in range(count)}
    unnamed = [names[i] for i in range(count) if i not in recorded_names]
    without_output = [
        f"{key} ({recorded_names[key]!r})" for key in sorted(recorded_names) if not 0 <= key < count
    ]
    _warn_once(
        f"{directory}: its head has {count} outputs, id2label in its config.json has the keys "
        + _shortened([str(key) for key in sorted(recorded_names)])
        + (f"; outputs without a name are called {_shortened(unnamed)}" if unnamed else "")
        + (f"; {_shortened(without_output)}: no output has that number" if without_output else "")
    )
    config.id2label = names
    config.label2id = {name: number for number, name in names.items()}


@cache
def _warn_once(message: str) -> None:
    """Warn once: a folder is looked at several times in a run."""
    log.warning("%s", message)


def outputs_in_file(
    config: "PretrainedConfig", auto_class: str, tensors: Mapping[str, StoredTensor]
) -> int | None:
    """Return how many outputs the head in the file has; None if it has no head of this class."""
    names = output_tensors(config, auto_class)
    rows = {tensors[name].shape[0] for name in names if name in tensors}
    return rows.pop() if len(rows) == 1 else None


# By class and configuration: every reading of a classifier's configuration needs them.
_OUTPUT_TENSORS: dict[tuple[object, ...], list[str]] = {}


def output_tensors(config: "PretrainedConfig", auto_class: str) -> list[str]:
    """Return the names of a head's tensors that have a row for each output."""
    probe = copy.deepcopy(config)
    probe.num_labels = _PROBE_LABELS
    probe.problem_type = None
    key = (auto_class, type(config), repr(vars(probe)))
    if key not in _OUTPUT_TENSORS:
        model = shape_only(probe, auto_class)
        body = f"{model.base_model_prefix}."
        _OUTPUT_TENSORS[key] = [
            name
            for name, values in model.state_dict().items()
            if values.shape[:1] == (_PROBE_LABELS,) and not name.startswith(body)
        ]
    return list(_OUTPUT_TENSORS[key])


def gives_scores(config: "PretrainedConfig") -> bool:
    """Return whether a head's outputs are scores: by ``problem_type`` or, if unset, because it has
    one.
    """
    is_single_unset = config.problem_type is None and config.num_labels == 1
    return is_single_unset or config.problem_type == "regression"


def check_label_names(names: Sequence[str], subject: str) -> None:
    """Raise InputError if two outputs have one name, because labels are matched by name, and for a
    name that cannot be written.
    """
    for number, name in enumerate(names):
        if problem := surrogate_problem(f"name of output {number}", name):
            raise InputError(f"{subject}: {problem} (id2label in its config.json)")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        places = [str(number) for number, name in enumerate(names) if name == repeated[0]]
        others = f"; so have others: {_shortened(repeated[1:])}" if repeated[1:] else ""
        raise InputError(
            f"{subject}: the outputs {' and '.join(places)} have one name, {repeated[0]!r} "
            f"(id2label in its config.json){others}. Give each output a name of its own"
        )


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
