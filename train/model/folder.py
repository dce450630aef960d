"""Find a model's folder (local, hub, store, GGUF), and read its configuration and safetensors
headers.

Only headers are read, and torch is not imported: a wrong folder is found before expensive work
begins.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rekindle.data.corpus.tokenizer_files import has_tokenizer_files, is_gguf
from rekindle.data.errors import InputError, first_words
from rekindle.data.hub.names import may_be_hub_id, no_such_model
from rekindle.data.storage.client import is_remote
from rekindle.data.storage.folders import folder_copy
from rekindle.data.text_files import refuse_pointer
from rekindle.train.model.unfinished import describe_unfinished, usable_checkpoint
from rekindle.train.outside.gguf import folder_of_gguf

log = logging.getLogger("rekindle")

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ABOUT_FILE = "rekindle_student.json"  # beside a student: its record
SHARDS = "model-*-of-*.safetensors"
_AS_SAVED = "give the file as save_pretrained wrote it"
# Whole weights, as transformers looks for them.
WHOLE_WEIGHTS = ("model*.safetensors", INDEX_FILE, "pytorch_model*.bin")
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2}
_WIDTHS |= {"I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}
_OTHERS = ("C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SIZES: tuple[str, ...] = (
    "vocab_size",
    "type_vocab_size",
    "max_position_embeddings",
    "hidden_size",
)
_SIZES += ("embedding_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "head_dim", "n_embd", "n_layer", "n_head", "n_positions")
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor according to a header."""

    dtype: str  # safetensors' name: F32, BF16, U8, …
    shape: tuple[int, ...]


def resolve_model(path_or_id: str, check: Callable[[Path], None] | None = None) -> Path:
    """Return the local directory of a model; a hub id is downloaded (or found in the hub's cache),
    a folder in a store (``s3://…``) gets a local copy, and a GGUF file is converted into a folder.

    ``check`` raises InputError for an invalid folder; by default it is ``check_folder``. Raises
    InputError if it is none of these.
    """
    if is_gguf(path_or_id):
        return folder_of_gguf(path_or_id)
    if is_remote(path_or_id):
        local_copy = folder_copy(path_or_id.rstrip("/"))
        try:
            (check or check_folder)(local_copy)
        except InputError as error:
            raise InputError(str(error).replace(str(local_copy), path_or_id)) from None
        return local_copy
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        (check or check_folder)(path)
        return path
    if not may_be_hub_id(path_or_id):
        raise no_such_model(path_or_id)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds, all meaning "not there"
        reason = first_words(error) or type(error).__name__
        raise InputError(
            f"model {path_or_id!r} is not a local directory and cannot be loaded from the hub "
            f"({reason}); give a directory written by save_pretrained, or an id that is on the "
            "hub or in its local cache"
        ) from None


def check_folder(directory: Path) -> None:
    """Raise InputError unless ``directory`` has a config.json or an adapter's configuration
    (weights are not looked for), or if it holds both an adapter and whole weights.
    """
    names = {path.name for pattern in WHOLE_WEIGHTS for path in directory.glob(pattern)}
    if (directory / ADAPTER_FILE).is_file():
        if names:
            raise InputError(
                f"{directory} holds an adapter ({ADAPTER_FILE}) beside whole weights "
                f"({', '.join(sorted(names)[:3])}), so it is unclear which is the model. Move the "
                "adapter into a folder of its own, or remove the other"
            )
        return
    if (directory / CONFIG_FILE).is_file():
        return
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    if ggufs:
        raise InputError(
            f"{directory} holds a GGUF file ({ggufs[0]}) but no {CONFIG_FILE}. Name the file: "
            f"{directory / ggufs[0]}, or give `gguf_file: {ggufs[0]}` beside `model`"
        )
    if list(directory.glob("adapter_model.*")):
        raise InputError(
            f"{directory} holds an adapter's weights without {ADAPTER_FILE}, which names its "
            "base. Give the whole folder of the adapter"
        )
    if (state := describe_unfinished(directory)) is not None:
        checkpoint = usable_checkpoint(directory)
        raise InputError(
            f"{state}{f', or give a checkpoint of it: {checkpoint}' if checkpoint else ''}"
        )
    raise InputError(
        f"{directory} is not a model directory: it has no {CONFIG_FILE}. "
        "Give a directory written by save_pretrained"
    )


def is_adapter(directory: Path) -> bool:
    """Return whether the folder holds an adapter; raise InputError if it holds whole
    weights too.
    """
    check_folder(directory)
    return (directory / ADAPTER_FILE).is_file()


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise InputError, naming the file, for anything else."""
    refuse_pointer(path)
    content = path.read_bytes()
    try:
        content_object = json.loads(content)
    except ValueError as error:  # also for bytes that are not UTF-8
        raise InputError(f"{path} is not JSON ({error}); {_AS_SAVED}") from None
    if not isinstance(content_object, dict):
        raise InputError(
            f"{path} holds {type(content_object).__name__}, not an object; {_AS_SAVED}"
        )
    return content_object


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json (for an adapter its base's), which must say what kind of model it is."""
    path = config_folder_of(directory) / CONFIG_FILE
    model_config = read_object(path)
    if not isinstance(model_config.get("model_type"), str):
        raise InputError(
            f"{path} has no model_type, so the kind of model is unknown. Save the model again "
            'with save_pretrained, or add it ("model_type": "bert")'
        )
    _check_label_numbers(model_config.get("id2label"), path)
    _check_values(model_config, path)
    return model_config


def _check_values(model_config: Mapping[str, Any], path: Path) -> None:
    """Raise InputError for values that transformers accepts unchecked, and fails on later."""
    architectures = model_config.get("architectures")
    are_names = isinstance(architectures, list) and all(
        isinstance(name, str) for name in architectures
    )
    if architectures is not None and not are_names:
        raise InputError(
            f"{path}: architectures is {architectures!r:.200}; it is a list of the class that the "
            'model was saved as: ["BertForMaskedLM"]'
        )
    for key in _SIZES:
        if type(size := model_config.get(key)) is int and not 0 <= size <= _LARGEST_SIZE:
            raise InputError(f"{path}: {key} is {size:,}; it must be from 0 to {_LARGEST_SIZE:,}")
    for key, share in model_config.items():
        if "dropout" in key and type(share) in (int, float) and not 0 <= share <= 1:
            raise InputError(f"{path}: {key} is {share}; it must be from 0 to 1")


def _check_label_numbers(names: object, path: Path) -> None:
    if names is None:
        return
    rule = 'It gives each output\'s number its name: {"0": "no", "1": "yes"}'
    if not isinstance(names, dict):
        raise InputError(f"{path}: id2label is a {type(names).__name__}, not an object. {rule}")
    if not_numbers := [key for key in names if not re.fullmatch(r"-?[0-9]+", key)]:
        raise InputError(
            f"{path}: id2label has the key {not_numbers[0]!r}, which is not a number. {rule}"
        )


# --- weights --------------------------------------------------------------------------------------


def weight_files(directory: Path) -> list[Path]:
    """Return the files with the model's weights, or the adapter's: one, or those that an index
    names.

    If both exist, transformers loads the single file: the index is left from an older save.

    Raises InputError if there are none, or some are missing.
    """
    index = directory / INDEX_FILE
    name = ADAPTER_WEIGHTS if is_adapter(directory) else WEIGHTS_FILE
    if (directory / name).is_file():
        if index.is_file():
            _log_left_over(index, name)
        return [directory / name]
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise InputError(f"{index} has no weight_map from names to files")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        if outside := [file.name for file in files if file.parent != directory]:
            raise InputError(f"{index} names {outside[0]!r}, which is not in its folder")
    elif shards := sorted(path.name for path in directory.glob(SHARDS)):
        raise InputError(f"{directory} holds {shards[0]}, but no {INDEX_FILE}: copy it too")
    elif name == ADAPTER_WEIGHTS:
        raise InputError(
            f"{directory} is an adapter ({ADAPTER_FILE}) without its weights, {name}. Copy them "
            "too, or save the adapter again with save_pretrained"
        )
    else:
        raise InputError(
            f"{directory} has no *.safetensors weights ({name}). Pickled weights are not "
            "loaded; save the model again with save_pretrained (or let a student begin from "
            "its configuration alone: set student.from_scratch)"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{directory} lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}, which "
            f"{INDEX_FILE} names. Copy or download the missing files"
        )
    return files


@cache
def _log_left_over(index: Path, name: str) -> None:
    """Log it once: a folder is looked at several times in a run."""
    log.info("%s is ignored: beside it is %s, which is loaded", index, name)


def own_files(directory: Path) -> list[Path]:
    """Return the model's weights, and the safetensors files beside them (a student's heads),
    sorted; without shards left from an older save.
    """
    left_over = {*directory.glob(SHARDS)} - {*weight_files(directory)}
    return sorted({*directory.glob("*.safetensors")} - left_over)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return the headers' entries of the model's weights, or the adapter's, by name.

    Raises InputError for anything wrong with a file: a git-lfs pointer, a truncated one.
    """
    return {k: v for file in weight_files(directory) for k, v in read_header(file).items()}


def check_headers(directory: Path) -> None:
    """Raise InputError for a damaged safetensors file of the model, whatever it is for."""
    for file in own_files(directory):
        read_header(file)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file; raise InputError unless its length is right."""
    refuse_pointer(file)
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        size = file.stat().st_size
        if len(start) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise InputError(f"{file} is damaged or truncated: {_describe_no_header(size)}")
        content = stream.read(length)
    try:
        entries = json.loads(content, parse_constant=_refuse_constant)
        entries.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{file} is damaged: {_describe_no_header(size)}") from None
    tensors = {name: _stored_tensor(file, name, entry) for name, entry in entries.items()}
    data_bytes = _check_places(file, entries)
    expected_size = 8 + length + data_bytes
    if size != expected_size:
        raise InputError(
            f"{file} is damaged or truncated: it has {size:,} bytes, but its header announces "
            f"{expected_size:,}. Copy or download it again"
        )
    return tensors


def _refuse_constant(word: str) -> object:
    """Refuse NaN and the like: they are not JSON, but Python reads them."""
    raise ValueError(word)


def _describe_no_header(size: int) -> str:
    return f"its {size:,} bytes hold no whole safetensors header. Copy or download it again"


def _stored_tensor(file: Path, name: str, entry: object) -> StoredTensor:
    """Return a header's entry; raise InputError, naming its tensor, if it is impossible."""
    fields: Any = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    has_lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    numbers = [*shape, *offsets] if has_lists else [-1]
    if dtype not in (*_WIDTHS, *_OTHERS) or any(type(one) is not int or one < 0 for one in numbers):
        raise _damaged(file, name, f"the header says {entry!r:.200} of it")
    width = _WIDTHS.get(dtype)
    if width is not None and math.prod(shape) * width != offsets[1] - offsets[0]:
        problem = (
            f"{dtype} values of the shape {shape} are not its {offsets[1] - offsets[0]:,} bytes"
        )
        raise _damaged(file, name, problem)
    return StoredTensor(dtype, tuple(shape))


def _check_places(file: Path, entries: Mapping[str, Any]) -> int:
    """Return where the last tensor ends; raise InputError if one does not begin where
    another ends.
    """
    position = 0
    for name, entry in sorted(entries.items(), key=lambda one: tuple(one[1]["data_offsets"])):
        begin, end = entry["data_offsets"]
        if begin != position:
            raise _damaged(
                file, name, f"it begins at byte {begin:,}, but the one before ends at {position:,}"
            )
        position = end
    return position


def _damaged(file: Path, tensor: str, problem: str) -> InputError:
    return InputError(
        f"{file} is damaged: its header is wrong about the tensor {tensor!r}: {problem}. Copy or "
        "download it again"
    )


# --- adapters -------------------------------------------------------------------------------------


def base_of(directory: Path) -> Path | None:
    """Return the folder of an adapter's base; None for a whole model.

    A base named by a relative path is searched from the current directory, then from the adapter's
    folder and each parent of it, because its trainer named the path from a folder of their own.
    Raises InputError if there is none.
    """
    if not is_adapter(directory):
        return None
    file = directory / ADAPTER_FILE
    name = read_object(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{file} names no base (base_model_name_or_path)")
    path, adapter_folder = Path(name).expanduser(), directory.resolve()
    places = [path, *(folder / path for folder in (adapter_folder, *adapter_folder.parents))]
    base_path = next((str(path_tried) for path_tried in places if path_tried.is_dir()), str(path))
    try:
        base = resolve_model(name if is_remote(name) else base_path)
    except InputError as error:
        raise InputError(
            f"{directory} is an adapter, but its base cannot be had: {error}. Put the base's path "
            f"into base_model_name_or_path in {file}"
        ) from None
    if is_adapter(base):
        raise InputError(
            f"{directory} is an adapter of {base}, which is an adapter itself: merge that into "
            "its own base first (merge_and_unload), and name the result as the base"
        )
    return base


def config_folder_of(directory: Path) -> Path:
    """Return the folder of a model's config.json: for an adapter, its base's."""
    return base_of(directory) or directory


def tokenizer_folder(directory: Path) -> Path:
    """Return the folder of a model's tokenizer: for an adapter without one, its base's."""
    base = base_of(directory)
    return directory if base is None or has_tokenizer_files(directory) else base
