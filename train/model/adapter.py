"""peft's adapters: what one changes in its base's configuration, and how it is merged.

Only complete, mergeable adapters: the result is an ordinary model. peft is imported only here and
in ``lora``.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.data.errors import InputError
from rekindle.train.model.causes import explaining_load_errors
from rekindle.train.model.fitting import AUTO_CLASSES
from rekindle.train.model.folder import (
    ABOUT_FILE,
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    StoredTensor,
    own_files,
    read_object,
    stored_tensors,
)
from rekindle.train.model.labels import outputs_in_file
from rekindle.train.model.meta import shape_only
from rekindle.train.model.quantised import (
    check_bitsandbytes_installed,
    four_bit_shape,
    round_weights,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Keys of adapter_config.json that do not change the model.
_VOLATILE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
# Kinds that put something before the text or between the layers: nothing can be merged.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
INSTALL = "install the extra, in Rekindle's checkout: pip install -e '.[peft]'"
PREFIX = "base_model.model."  # prefix of the names in an adapter's file
# In a model that contains an adapter: which names belong to the model, and which do not.
_INSIDE = re.compile(r"\.(base_layer|modules_to_save\.default)(?=\.)")
_BESIDE = re.compile(r"\.(lora_\w+|original_module)\.")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save|original_module|token_adapter)(?=\.)")


def check_mergeable(directory: Path) -> None:
    """Raise InputError unless the adapter in ``directory`` can be loaded and merged at all."""
    kind = str(read_object(directory / ADAPTER_FILE).get("peft_type"))
    if kind in (*_PROMPTS, "ADAPTION_PROMPT"):
        raise InputError(
            f"{directory} is an adapter of the kind {kind}, which cannot be merged into its base. "
            "Give one that can (LoRA and its kin), or a whole model"
        )
    if list(directory.glob("adapter_model.bin")) and not (directory / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{directory} has pickled weights (adapter_model.bin), which are not loaded. Save the "
            f"adapter again with save_pretrained, which writes {ADAPTER_WEIGHTS}"
        )
    if find_spec("peft") is None:
        raise InputError(
            f"{directory} is an adapter, but the package peft, which loads it, is not installed. "
            "Merge it (`pipeline merge-adapter`, or peft's merge_and_unload) where peft is "
            f"installed, and give the whole model, or {INSTALL}"
        )


def adapter_fingerprints(directory: Path) -> dict[str, str]:
    """Return the digest of the adapter's own files, including a student's heads and prompts, and
    the version of peft that merges it.
    """
    settings = read_object(directory / ADAPTER_FILE)
    lasting = {k: v for k, v in settings.items() if k not in _VOLATILE}
    if kind := recorded_base(directory).get("quantize"):
        lasting["quantize"] = kind
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode())
    other_files = [file for file in own_files(directory) if file.name != ADAPTER_WEIGHTS]
    for file in (directory / ADAPTER_WEIGHTS, *other_files):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"adapter": digest.hexdigest(), "peft": version("peft")}


def complete_config(config: "PretrainedConfig", directory: Path, auto_class: str) -> None:
    """Give a base's configuration the outputs and the vocabulary of the adapter's weights.

    The names of labels stay if the base has as many. Raises InputError for a tokenizer beside the
    adapter with more tokens than there are embeddings.
    """
    tensors = whole_tensors(directory)
    labels = outputs_in_file(config, auto_class, tensors)
    if labels is not None and auto_class.endswith("Classification"):
        config.num_labels = labels
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, _embedding_rows(config, auto_class, directory, tensors))
    if has_tokenizer_files(directory):
        tokens = load_tokenizer(str(directory)).size
        if tokens > text.vocab_size:
            raise InputError(
                f"{directory}: its tokenizer has {tokens:,} tokens, but neither the adapter nor "
                f"its base has embeddings for more than {text.vocab_size:,}. Save the adapter "
                "with its embeddings (save_embedding_layers=True), or give the tokenizer it "
                "belongs to"
            )


def whole_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return the tensors that an adapter stores whole (such as a head), by their names in the
    model.
    """
    return {_name_in_model(key): tensor for key, tensor in stored_tensors(directory).items()}


def check_base_shapes(model: "PreTrainedModel", directory: Path, base: Path) -> None:
    """Raise InputError if low-rank changes are for matrices of another size than ``model``'s."""
    shapes = {layer: tuple(values.shape) for layer, values in model.state_dict().items()}
    stored = whole_tensors(directory)
    for key, low in stored.items():
        layer, is_low_rank, _ = key.partition(".lora_A.")
        high, matrix = stored.get(f"{layer}.lora_B.weight"), shapes.get(f"{layer}.weight", ())
        if (
            not is_low_rank
            or high is None
            or not len(low.shape) == len(high.shape) == len(matrix) == 2
        ):
            continue
        changed = (high.shape[0], low.shape[1])
        if sorted(changed) != sorted(matrix):  # some families store theirs transposed
            raise InputError(
                f"{directory}: the adapter changes {layer}.weight by a matrix {list(changed)}, but "
                f"that of its base {base} is {list(matrix)}: it was trained on another base. Put "
                f"the right one's path into base_model_name_or_path in {directory / ADAPTER_FILE}"
            )


def _name_in_model(key: str) -> str:
    return _WRAPPED.sub("", key.removeprefix(PREFIX))


def _embedding_rows(
    config: "PretrainedConfig",
    auto_class: str,
    directory: Path,
    tensors: Mapping[str, StoredTensor],
) -> int:
    """Return how many embeddings the adapter has or has learnt to change; 0 if it changes none."""
    model = shape_only(config, auto_class)
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    rows = [0]
    if (full_matrix := tensors.get(f"{embedding}.weight")) is not None:
        rows.append(full_matrix.shape[0])
    if (low_rank := tensors.get(f"{embedding}.lora_embedding_A")) is not None:
        rows.append(low_rank.shape[1])
    token_ids = read_object(directory / ADAPTER_FILE).get("trainable_token_indices")
    lists = [*token_ids.values()] if isinstance(token_ids, dict) else [token_ids or []]
    rows += [1 + max(ids) for ids in lists if ids]
    return max(rows)


def merge_adapter(
    base: "PreTrainedModel", directory: Path, vocabulary_size: int, failure: str
) -> tuple["PreTrainedModel", set[str]]:
    """Merge the adapter into ``base``, after resizing its embeddings to ``vocabulary_size``.

    Returns the whole model, all of it trainable like any other, and the names of the tensors that
    the adapter stored whole. Raises InputError, beginning with ``failure``, if the two do not fit.
    """
    import peft

    stored = stored_tensors(directory)
    with explaining_load_errors(failure), quiet_peft():
        is_larger = vocabulary_size > base.get_input_embeddings().weight.shape[0]
        if is_larger:
            base.resize_token_embeddings(vocabulary_size, mean_resizing=False)
        names = base.state_dict().keys()
        whole_names = {_name_in_model(key) for key in stored} & names
        adapted = peft.PeftModel.from_pretrained(base, str(directory), torch_device="cpu")
        loaded_names = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        unused = sorted(
            key for key in stored.keys() - loaded_names if _name_in_model(key) not in names
        )
        if unused or (loaded_names - stored.keys()):
            mismatched = unused or sorted(loaded_names - stored.keys())
            verb = "has weights for" if unused else "lacks weights of"
            raise InputError(
                f"{failure}: the adapter {verb} {_name_in_model(mismatched[0])}"
                f"{f' and {len(mismatched) - 1} more' if mismatched[1:] else ''}, "
                f"{'which this kind of model has not' if unused else 'which it says it adapts'}. "
                "Is the task right for it, and the base the one it was trained on?"
            )
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        if is_larger:
            _check_new_rows(merged, whole_names, directory)
    merged.requires_grad_(True)  # peft froze the base
    merged.config._name_or_path = str(directory)
    return merged, whole_names


def _check_new_rows(model: "PreTrainedModel", whole_names: set[str], directory: Path) -> None:
    """Refuse rows of a longer vocabulary, in or out, that the adapter did not store."""
    if read_object(directory / ADAPTER_FILE).get("trainable_token_indices"):
        return
    names = {module: name for name, module in model.named_modules()}
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    matrices = [(f"{names[table]}.weight", table.weight) for table in tables if table is not None]
    stored_matrices = [values for name, values in matrices if name in whole_names]
    for name, values in matrices:
        if not any(values is one for one in stored_matrices):
            raise InputError(
                f"{directory}: it was trained with a longer vocabulary, but {name} is not in "
                f"{ADAPTER_WEIGHTS}: its new rows would be random. Save it with its embeddings "
                "(save_embedding_layers=True)"
            )


def whole_shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a module's tensors, under the names they have without an adapter, and
    none of them in four bits.
    """
    four_bit_shapes = {
        f"{name}.weight": size
        for name, part in module.named_modules()
        if (size := four_bit_shape(getattr(part, "weight", None))) is not None
    }
    scales = tuple(f"{name}." for name in four_bit_shapes)  # stored beside it: `weight.absmax`
    return {
        _INSIDE.sub("", name): four_bit_shapes.get(name, values.shape)
        for name, values in module.state_dict().items()
        if not _BESIDE.search(name) and not name.startswith(scales)
    }


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence peft's warnings: about what it corrects itself, and about what is refused here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def round_as_trained(base: "PreTrainedModel", directory: Path) -> None:
    """Round those weights of ``base`` that were in four bits when the adapter in ``directory`` was
    trained: it belongs to the rounded ones.
    """
    if (kind := recorded_base(directory).get("quantize")) is None:
        return
    if kind != "nf4":
        raise InputError(
            f"{directory} was trained on weights rounded to {kind!r}, which this version of "
            "Rekindle does not know"
        )
    check_bitsandbytes_installed(f"{directory}, an adapter of weights in four bits,")
    ending = ".lora_A.weight"
    names = [name for name in whole_tensors(directory) if name.endswith(ending)]
    round_weights(base, [name.removesuffix(ending) for name in names])


def recorded_base(directory: Path) -> dict[str, str]:
    """Return what a student that is an adapter records of its base: where it was (model), the
    digests of its weights and its configuration, and how it was rounded (quantize), if so. Empty
    for other adapters.
    """
    if not (directory / ABOUT_FILE).is_file():
        return {}
    base = read_object(directory / ABOUT_FILE).get("base")
    return base if isinstance(base, dict) else {}


def trained_as(directory: Path) -> str | None:
    """Return the class of transformers that a student which is an adapter was trained as; None for
    other adapters.
    """
    about = directory / ABOUT_FILE
    return AUTO_CLASSES[str(read_object(about)["task"])] if about.is_file() else None


def check_base_unchanged(directory: Path, base: Path, digests: Mapping[str, str]) -> None:
    """Raise InputError if, by its ``digests``, the base is not the one that the adapter in
    ``directory`` was trained on.
    """
    recorded = recorded_base(directory)
    differing = [name for name, digest in digests.items() if recorded.get(name, digest) != digest]
    if differing:
        raise InputError(
            f"{directory} is an adapter, but {base} is not the base that it was trained on: its "
            f"{' and its '.join(differing)} differ from those of {recorded.get('model')} at that "
            f"time (digests in {directory / ABOUT_FILE}). Put the right one's path into "
            f"base_model_name_or_path in {directory / ADAPTER_FILE}"
        )
