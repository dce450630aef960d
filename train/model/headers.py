"""Whether a folder's weights fit its configuration and a task, told by headers: none is read.

The errors are those of the load itself, which would come after dear work.
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
    """Return the configuration of a model for ``task`` whose every weight must be there.

    Raises InputError, of ``who``, if it is none.
    """
    with naming(who):
        config = load_config(directory)
    auto_class = auto_class_of(config, task)
    # An adapter brings a head of its own; what its base was saved as says nothing of that.
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
    """Return the configuration of a student, whose head may be fresh, or all of it.

    Raises InputError, of ``who``, where it cannot be made, or its body is not there.
    """
    kind = AUTO_CLASSES[task]
    # A masked LM's head may be a fresh one, and is said to be; a causal one's is often its tied
    # embeddings, which no file would be seen to lack.
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
    """Whether a student of what is there would begin with a fresh language-model head, as far as
    the files say it.
    """
    kind = AUTO_CLASSES[task]
    found = _misfit(directory, kind, load_config(directory, kind, attention), TRAINED)
    return found is not None and bool(found.head)


def check_expert_files(directory: Path) -> None:
    """Check what a classifier is to be made of: a body; a head of other labels is no matter."""
    kind = "AutoModelForSequenceClassification"
    config = load_config(directory, kind)
    found = _misfit(directory, kind, config, TRAINED)
    if found is not None:
        body, _ = split_names(shape_only(config, kind), [*found.shapes])
        what = f"{directory} cannot be loaded for text classification"
        refuse_shapes(what, {name: found.shapes[name] for name in body})


# Stage 1 asks of each teacher three times: before any work, on a corpus's beginning, and on all.
_COMPARED: dict[tuple[object, ...], Misfit | None] = {}


def _misfit_of(directory: Path, auto_class: str, config: "PretrainedConfig") -> Misfit | None:
    """``_misfit``, of files that are as they were worked out once only."""
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
    """How the weights differ from those that are needed; None where only the load can tell.

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
    # What is as long as the base's vocabulary is made as long as the adapter's.
    plain = load_config(base, attention=config._attn_implementation)
    old, new = (c.get_text_config().vocab_size for c in (plain, config))
    grows = {((old, *rest), (new, *rest)) for (_, *rest), _ in found.shapes.values()}
    return found._replace(shapes={n: s for n, s in found.shapes.items() if s not in grows})
