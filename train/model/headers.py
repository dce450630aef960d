"""Check by headers whether a folder's weights fit its configuration and a task; no weights are
read.

The errors are those of loading itself, which would come after expensive work.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.data.errors import naming
from rekindle.data.text_files import state_of
from rekindle.train.model.adapter import check_base_shapes, whole_tensors
from rekindle.train.model.causes import MERGED, TRAINED, check_quantisation, quantised_by
from rekindle.train.model.files import adapt_config, check_base, check_body_complete, load_config
from rekindle.train.model.fitting import AUTO_CLASSES, LANGUAGE, auto_class_of, check_fits
from rekindle.train.model.folder import base_of, check_headers, read_config, stored_tensors
from rekindle.train.model.meta import (
    Misfit,
    check_none_missing,
    check_shapes,
    compare_tensors,
    shape_only,
    split_names,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_teacher_files(directory: Path, task: str, subject: str) -> "PretrainedConfig":
    """Return the configuration of a model for ``task``, all of whose weights must be there.

    Raises InputError, beginning with ``subject``, if it does not fit.
    """
    with naming(subject):
        config = load_config(directory)
    auto_class = auto_class_of(config, task)
    # An adapter has a head of its own; the class its base was saved as says nothing about that.
    check_fits(config, task, subject, base_of(directory) is None or task in LANGUAGE)
    with naming(subject):
        adapt_config(config, directory, auto_class)
        misfit = _cached_misfit(directory, auto_class, config)
        if misfit is not None:
            check_shapes(f"{directory} cannot be loaded as {auto_class}", misfit.shapes)
            check_none_missing(directory, auto_class, config, sorted(misfit.body + misfit.head))
    return config


def check_student_files(
    directory: Path,
    task: str,
    subject: str,
    from_scratch: bool = False,
    attention: str | None = None,
) -> "PretrainedConfig":
    """Return the configuration of a student, whose head, or all of it, may be fresh.

    Raises InputError, beginning with ``subject``, if it cannot be made, or its body is missing.
    """
    auto_class = AUTO_CLASSES[task]
    # A masked LM's head may be fresh, which is logged; a causal one's is often its tied embeddings,
    # which no file would appear to lack.
    is_trained = task == "causal_lm" and not from_scratch
    config = load_config(directory, attention=attention)
    check_fits(config, task, subject, is_trained)
    adapt_config(config, directory, auto_class)
    if from_scratch:
        shape_only(config, auto_class)
        return config
    misfit = _misfit(directory, auto_class, config, TRAINED)
    if misfit is not None:
        check_shapes(f"student {directory} cannot be loaded as {auto_class}", misfit.shapes)
        check_body_complete(directory, misfit.body)
    return config


def has_fresh_head(directory: Path, task: str, attention: str | None = None) -> bool:
    """Return whether a student made from these files would begin with a fresh language-model head,
    as far as the files tell.
    """
    auto_class = AUTO_CLASSES[task]
    misfit = _misfit(directory, auto_class, load_config(directory, auto_class, attention), TRAINED)
    return misfit is not None and bool(misfit.head)


def check_expert_files(directory: Path) -> None:
    """Check that a classifier can be made: its body must be there; a head of other labels is
    ignored.
    """
    auto_class = "AutoModelForSequenceClassification"
    config = load_config(directory, auto_class)
    misfit = _misfit(directory, auto_class, config, TRAINED)
    if misfit is not None:
        body, _ = split_names(shape_only(config, auto_class), [*misfit.shapes])
        failure = f"{directory} cannot be loaded for text classification"
        check_shapes(failure, {name: misfit.shapes[name] for name in body})


# Stage 1 checks each teacher three times: before any work, on a corpus's beginning, and on all.
_COMPARED: dict[tuple[object, ...], Misfit | None] = {}


def _cached_misfit(directory: Path, auto_class: str, config: "PretrainedConfig") -> Misfit | None:
    """Do as ``_misfit``, only once for unchanged files."""
    base = base_of(directory)
    folders = [directory] if base is None else [directory, base]
    files = sorted(path for folder in folders for path in folder.iterdir())
    key = (auto_class, *((path, state_of(path)) for path in files))
    if key not in _COMPARED:
        _COMPARED[key] = _misfit(directory, auto_class, config)
    return _COMPARED[key]


def _misfit(
    directory: Path, auto_class: str, config: "PretrainedConfig", whole_reason: str = ""
) -> Misfit | None:
    """Return how the weights differ from those needed; None if only loading can tell.

    ``whole_reason``: why they must not be quantised, if so. Raises InputError for an adapter of
    another base.
    """
    base = base_of(directory)
    weights_folder = base or directory
    check_headers(weights_folder)
    model_config, tensors = read_config(weights_folder), stored_tensors(weights_folder)
    check_quantisation(
        weights_folder, model_config, tensors, whole_reason if base is None else MERGED
    )
    if base is not None:
        check_headers(directory)
        tensors = tensors | whole_tensors(directory)
    if quantised_by(model_config) is not None:
        return None
    if not config.name_or_path:
        config.name_or_path = str(directory)
    model = shape_only(config, auto_class)
    if base is not None:
        check_base_shapes(model, directory, base)
        check_base(directory, base)
    misfit = compare_tensors(model, tensors)
    if misfit is None or base is None:
        return misfit
    # Tensors as long as the base's vocabulary are resized to the adapter's.
    base_config = load_config(base, attention=config._attn_implementation)
    old, new = (c.get_text_config().vocab_size for c in (base_config, config))
    resized = {((old, *rest), (new, *rest)) for (_, *rest), _ in misfit.shapes.values()}
    return misfit._replace(shapes={n: s for n, s in misfit.shapes.items() if s not in resized})
