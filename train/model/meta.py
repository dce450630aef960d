"""A model without its weights: the tensors that transformers makes of a configuration, and those
that a folder lacks. Only headers are read.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rekindle.data.errors import InputError
from rekindle.train.deferred.recording import active_recording
from rekindle.train.model.causes import explaining_load_errors
from rekindle.train.model.folder import StoredTensor, read_header, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Shape = tuple[int, ...]
FILLING = {"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "zero_", "fill_"}

IN_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' variable: whether it does not load so
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Misfit(NamedTuple):
    """How the weights in a folder differ from those that a model needs."""

    body: list[str]  # names of tensors that the folder lacks
    head: list[str]
    shapes: dict[str, tuple[Shape, Shape]]  # by name: in the file, by config.json


def shape_only(config: "PretrainedConfig", auto_class: str) -> "PreTrainedModel":
    """Return the model of a configuration on torch's meta device: shapes without memory.

    Raises InputError if the configuration makes no model.
    """
    import transformers

    name = config.name_or_path or "the configuration"
    failure = f"{name} cannot be made as {auto_class} by its config.json"
    with explaining_load_errors(failure), torch.device("meta"), _Unfilled():
        model: PreTrainedModel = getattr(transformers, auto_class).from_config(config)
    return model


class _Unfilled(TorchFunctionMode):
    """Skips the initialisation of tensors: without memory it is half of the work."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def compare_tensors(model: "PreTrainedModel", tensors: Mapping[str, StoredTensor]) -> Misfit | None:
    """Compare a model with its folder's headers; transformers knows the names of older files.

    None if transformers converts tensors as it loads them: then only the load itself can tell.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    needed = model.state_dict()
    rules = get_model_conversion_mapping(model)
    if not all(isinstance(rule, WeightRenaming) for rule in rules):
        return None
    stored_shapes: dict[str, Shape] = {}
    for name, tensor in tensors.items():
        renamed, _ = rename_source_key(name, rules, [], model.base_model_prefix, needed)
        stored_shapes[renamed] = tensor.shape
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_sources = {
        source for name, source in tied.items() if name in stored_shapes
    }  # either gives the other
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [
        name
        for name in sorted(needed.keys() - stored_shapes.keys() - tied.keys() - tied_sources)
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    shapes = {
        name: (stored_shapes[name], tuple(values.shape))
        for name, values in needed.items()
        if name in stored_shapes and stored_shapes[name] != tuple(values.shape)
    }
    return Misfit(*split_names(model, missing), shapes)


def split_names(model: "PreTrainedModel", names: list[str]) -> tuple[list[str], list[str]]:
    """Return the names in the model's body, and those in its head."""
    body = [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
    return body, [name for name in names if name not in body]


def check_shapes(failure: str, shapes: Mapping[str, tuple[Shape, Shape]]) -> None:
    """Raise InputError if tensors have another shape than the configuration gives them."""
    if not shapes:
        return
    name = min(shapes, key=lambda name: (-len(shapes[name][1]), name))  # a matrix says more
    stored, expected = shapes[name]
    other_tensors = f", and {len(shapes) - 1} more do not fit" if len(shapes) > 1 else ""
    raise InputError(
        f"{failure}: the tensor {name} is {list(stored)} in the file and {list(expected)} by its "
        f"config.json{other_tensors}. Give the config.json that the weights were saved with"
    )


def check_none_missing(
    directory: Path, auto_class: str, config: "PretrainedConfig", missing: list[str]
) -> None:
    """Raise InputError naming weights that would be random: such a head would cache noise.

    An encoder's pooler is not used: its vectors are pooled of the last states.
    """
    if auto_class in ("AutoModel", "AutoModelForTextEncoding"):
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        saved_as = f" It was saved as {config.architectures[0]}." if config.architectures else ""
        raise InputError(
            f"{directory} has no weights for {', '.join(missing[:4])}"
            f"{' …' if len(missing) > 4 else ''}, which {auto_class} needs: they would be "
            f"random.{saved_as} Is the teacher's `task` right for this model?"
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file; within a recording, return tensors that are read when it is filled.

    Raises InputError for a damaged one.
    """
    header, recording = read_header(file), active_recording()
    if recording is None:
        return load_file(file)
    unknown_types = sorted({one.dtype for one in header.values()} - _TYPES.keys())
    if unknown_types:
        recording.refuse(f"{file.name} holds {unknown_types[0]}")
    return {
        k: recording.file_tensor(file, k, _TYPES[one.dtype], one.shape) for k, one in header.items()
    }


def load_later(
    auto_class: str, directory: str, config: "PretrainedConfig", **options_given: Any
) -> Any:
    """Load a folder as transformers does, but in a recording: files are read when it is filled."""
    model_shape = shape_only(copy.deepcopy(config), auto_class)  # a family may have several classes
    tensors: dict[str, Tensor] = {}
    for file in weight_files(Path(directory)):
        tensors |= read_tensors(file)
    with _in_this_thread():
        model, info = type(model_shape).from_pretrained(
            None, config=model_shape.config, state_dict=tensors, **options_given
        )
    model.name_or_path = model.config.name_or_path = directory
    if hasattr(model, "adjust_generation_fn"):
        empty_options = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
        options = {"force_download": False, "local_files_only": True, "subfolder": ""}
        model.adjust_generation_fn(
            None, True, False, directory, trust_remote_code=False, **empty_options, **options
        )
    return model, info


@contextmanager
def _in_this_thread() -> Iterator[None]:
    """Let transformers load in this thread: what other threads do is not recorded."""
    former_value = os.environ.get(IN_THREADS)
    os.environ[IN_THREADS] = "1"
    try:
        yield
    finally:
        if former_value is None:
            del os.environ[IN_THREADS]
        else:
            os.environ[IN_THREADS] = former_value
