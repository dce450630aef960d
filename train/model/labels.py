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
_A_COUNT = 1009  # a number of labels, used to find the tensors with a row for each


def problem_of_outputs(said: str | None, outputs: int) -> str:
    """Return the kind of task that this many outputs answer: the one ``said`` or, if transformers
    does not know it, the one it would assume for one output, or several.
    """
    if said in PROBLEMS:
        return said
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
    named = config.id2label or {}
    if count is None or set(named) == set(range(count)):
        return
    names = {i: str(named.get(i, f"LABEL_{i}")) for i in range(count)}
    gaps = [names[i] for i in range(count) if i not in named]
    beyond = [f"{key} ({named[key]!r})" for key in sorted(named) if not 0 <= key < count]
    _warn_once(
        f"{directory}: its head has {count} outputs, id2label in its config.json has the keys "
        + _some([str(key) for key in sorted(named)])
        + (f"; outputs without a name are called {_some(gaps)}" if gaps else "")
        + (f"; {_some(beyond)}: no output has that number" if beyond else "")
    )
    config.id2label = names
    config.label2id = {name: number for number, name in names.items()}


@cache
def _warn_once(told: str) -> None:
    """Warn once: a folder is looked at several times in a run."""
    log.warning("%s", told)


def outputs_in_file(
    config: "PretrainedConfig", auto_class: str, tensors: Mapping[str, StoredTensor]
) -> int | None:
    """Return how many outputs the head in the file has; None if it has no head of this class."""
    named = output_tensors(config, auto_class)
    rows = {tensors[name].shape[0] for name in named if name in tensors}
    return rows.pop() if len(rows) == 1 else None


# By class and configuration: every reading of a classifier's configuration needs them.
_ROWS: dict[tuple[object, ...], list[str]] = {}


def output_tensors(config: "PretrainedConfig", auto_class: str) -> list[str]:
    """Return the names of a head's tensors that have a row for each output."""
    probe = copy.deepcopy(config)
    probe.num_labels = _A_COUNT
    probe.problem_type = None
    key = (auto_class, type(config), repr(vars(probe)))
    if key not in _ROWS:
        model = shape_only(probe, auto_class)
        body = f"{model.base_model_prefix}."
        _ROWS[key] = [
            name
            for name, values in model.state_dict().items()
            if values.shape[:1] == (_A_COUNT,) and not name.startswith(body)
        ]
    return list(_ROWS[key])


def gives_scores(config: "PretrainedConfig") -> bool:
    """Return whether a head's outputs are scores: by ``problem_type`` or, if unset, because it has
    one.
    """
    unsaid = config.problem_type is None and config.num_labels == 1
    return unsaid or config.problem_type == "regression"


def check_label_names(names: Sequence[str], whose: str) -> None:
    """Raise InputError if two outputs have one name, because labels are matched by name, and for a
    name that cannot be written.
    """
    for number, name in enumerate(names):
        if told := surrogate_problem(f"name of output {number}", name):
            raise InputError(f"{whose}: {told} (id2label in its config.json)")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        places = [str(number) for number, name in enumerate(names) if name == twice[0]]
        raise InputError(
            f"{whose}: the outputs {' and '.join(places)} have one name, {twice[0]!r} (id2label in "
            f"its config.json){f'; so have others: {_some(twice[1:])}' if twice[1:] else ''}. Give "
            "each output a name of its own"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
