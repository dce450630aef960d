"""Check by headers whether a folder's weights fit its configuration and a task; no weights are
read.

The errors are those of loading itself, which would come after expensive work.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.data.errors import naming
from rekindle.data.text_files import state_of
from rekindle.train.model.adapter import refuse_other_base, whole_tensors
from rekindle.train.model.causes import MERGED, TRAINED, check_quantisation, quantised_by
from rekindle.train.model.files import check_base, load_config, refuse_body, suit
from rekindle.train.model.fitting import AUTO_CLASSES, LANGUAGE, auto_class_of, check_fits
from rekindle.train.model.folder import base_of, check_headers, read_settings, stored_tensors
from rekindle.train.model.meta import (
    Misfit,
    misfit,
    refuse_missing,
    refuse_shapes,
    shape_only,
    split_names,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_teacher_files(directory: Path, task: str, who: str) -> "PretrainedConfig":
    """Return the configuration of a model for ``task``, all of whose weights must be there.

    Raises InputError, beginning with ``who``, if it does not fit.
    """
    with naming(who):
        config = load_config(directory)
    auto_class = auto_class_of(config, task)
    # An adapter has a head of its own; the class its base was saved as says nothing about that.
    check_fits(config, task, who, base_of(directory) is None or task in LANGUAGE)
    with naming(who):
        suit(config, directory, auto_class)
        found = _misfit_of(directory, auto_class, config)
        if found is not None:
            refuse_shapes(f"{directory} cannot be loaded as {auto_class}", found.shapes)
            refuse_missing(directory, auto_class, config, sorted(found.body + found.head))
    return config


def check_student_files(
    directory: Path, task: str, who: str, from_scratch: bool = False, attention: str | None = None
) -> "PretrainedConfig":
    """Return the configuration of a student, whose head, or all of it, may be fresh.

    Raises InputError, beginning with ``who``, if it cannot be made, or its body is missing.
    """
    kind = AUTO_CLASSES[task]
    # A masked LM's head may be fresh, which is logged; a causal one's is often its tied embeddings,
    # which no file would appear to lack.
    trained = task == "causal_lm" and not from_scratch
    config = load_config(directory, attention=attention)
    check_fits(config, task, who, trained)
    suit(config, directory, kind)
    if from_scratch:
        shape_only(config, kind)
        return config
    found = _misfit(directory, kind, config, TRAINED)
    if found is not None:
        refuse_shapes(f"student {directory} cannot be loaded as {kind}", found.shapes)
        refuse_body(directory, found.body)
    return config


def has_fresh_head(directory: Path, task: str, attention: str | None = None) -> bool:
    """Return whether a student made from these files would begin with a fresh language-model head,
    as far as the files tell.
    """
    kind = AUTO_CLASSES[task]
    found = _misfit(directory, kind, load_config(directory, kind, attention), TRAINED)
    return found is not None and bool(found.head)


def check_expert_files(directory: Path) -> None:
    """Check that a classifier can be made: its body must be there; a head of other labels is
    ignored.
    """
    kind = "AutoModelForSequenceClassification"
    config = load_config(directory, kind)
    found = _misfit(directory, kind, config, TRAINED)
    if found is not None:
        body, _ = split_names(shape_only(config, kind), [*found.shapes])
        what = f"{directory} cannot be loaded for text classification"
        refuse_shapes(what, {name: found.shapes[name] for name in body})


# Stage 1 checks each teacher three times: before any work, on a corpus's beginning, and on all.
_COMPARED: dict[tuple[object, ...], Misfit | None] = {}


def _misfit_of(directory: Path, auto_class: str, config: "PretrainedConfig") -> Misfit | None:
    """Do as ``_misfit``, only once for unchanged files."""
    base = base_of(directory)
    folders = [directory] if base is None else [directory, base]
    files = sorted(path for folder in folders for path in folder.iterdir())
    key = (auto_class, *((path, state_of(path)) for path in files))
    if key not in _COMPARED:
        _COMPARED[key] = _misfit(directory, auto_class, config)
    return _COMPARED[key]


def _misfit(
    directory: Path, auto_class: str, config: "PretrainedConfig", why: str = ""
) -> Misfit | None:
    """Return how the weights differ from those needed; None if only loading can tell.

    ``why`` they must not be quantised, if so. Raises InputError for an adapter of another base.
    """
    base = base_of(directory)
    whole = base or directory
    check_headers(whole)
    settings, tensors = read_settings(whole), stored_tensors(whole)
    check_quantisation(whole, settings, tensors, why if base is None else MERGED)
    if base is not None:
        check_headers(directory)
        tensors = tensors | whole_tensors(directory)
    if quantised_by(settings) is not None:
        return None
    if not config.name_or_path:
        config.name_or_path = str(directory)
    model = shape_only(config, auto_class)
    if base is not None:
        refuse_other_base(model, directory, base)
        check_base(directory, base)
    found = misfit(model, tensors)
    if found is None or base is None:
        return found
    # Tensors as long as the base's vocabulary are resized to the adapter's.
    plain = load_config(base, attention=config._attn_implementation)
    old, new = (c.get_text_config().vocab_size for c in (plain, config))
    grows = {((old, *rest), (new, *rest)) for (_, *rest), _ in found.shapes.values()}
    return found._replace(shapes={n: s for n, s in found.shapes.items() if s not in grows})
