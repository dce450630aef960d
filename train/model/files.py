"""Find and load model directories: local or from the hub, checked, fingerprinted, never with remote
code.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.errors import InputError
from rekindle.data.settings import Settings
from rekindle.train.deferred.recording import active_recording
from rekindle.train.model.adapter import (
    adapter_fingerprints,
    check_base_unchanged,
    check_mergeable,
    complete_config,
    merge_adapter,
    round_as_trained,
    trained_as,
)
from rekindle.train.model.causes import (
    MERGED,
    TRAINED,
    check_implementations,
    check_no_nan,
    check_quantisation,
    explaining_load_errors,
    quantised_by,
)
from rekindle.train.model.fitting import AUTO_CLASSES
from rekindle.train.model.folder import (
    CONFIG_FILE,
    base_of,
    check_headers,
    config_folder_of,
    is_adapter,
    own_files,
    read_config,
    stored_tensors,
)
from rekindle.train.model.heads import copy_matching_weights, log_unused_weights, use_own_head
from rekindle.train.model.labels import complete_labels
from rekindle.train.model.meta import (
    Shape,
    check_none_missing,
    check_shapes,
    load_later,
    split_names,
)
from rekindle.train.model.padding import (
    COUNT_PAST_PADDING,
    attend_fully,
    drop_outside_padding,
    padding_of,
    padding_of_new,
    set_padding,
)
from rekindle.train.outside.digest import digest_of
from rekindle.train.precision import chosen_precision

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("rekindle")

# Keys that a save changes without changing the model; left out of the configuration's fingerprint.
VOLATILE_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


def weights_fingerprint(directory: Path) -> str:
    """Return sha256 over the names and contents of the directory's safetensors files; for an
    adapter, over its base's and its own.
    """
    if prints := adapted_fingerprints(directory):
        return hashlib.sha256(f"{prints['base']}\0{prints['adapter']}".encode()).hexdigest()
    digest = hashlib.sha256()
    for file in own_files(directory):
        digest.update(f"{file.name}\0".encode())
        digest.update(digest_of(file))
    return digest.hexdigest()


def adapted_fingerprints(directory: Path) -> dict[str, str]:
    """Return what identifies an adapter besides its weights as a whole: the digest of its base, its
    own, and the version of peft that merges them. Empty for a whole model.
    """
    base = base_of(directory)
    if base is None:
        return {}
    check_mergeable(directory)
    check_base(directory, base)
    return {"base": weights_fingerprint(base)} | adapter_fingerprints(directory)


def check_base(directory: Path, base: Path) -> None:
    """Raise InputError if a student that is the adapter in ``directory`` had another base."""
    check_base_unchanged(directory, base, base_fingerprints(base))


def base_fingerprints(base: Path) -> dict[str, str]:
    """Return the digests of a model that is adapted."""
    return {"weights": weights_fingerprint(base), "config": config_fingerprint(base)}


def config_fingerprint(directory: Path) -> str:
    """Return sha256 over the model's configuration, without what every save changes."""
    lasting = {k: v for k, v in read_config(directory).items() if k not in VOLATILE_KEYS}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


class Loaded(NamedTuple):
    """A model loaded by transformers, and what its folder lacked."""

    model: "PreTrainedModel"
    body: list[str]  # names of weights that are not in the folder, or in another shape
    head: list[str]
    shapes: dict[str, tuple[Shape, Shape]]  # of the latter, by name: in the file, by config.json


def load_config(
    directory: Path, auto_class: str | None = None, attention: str | None = None
) -> "PretrainedConfig":
    """Read a model's configuration; no remote code is run.

    With a classifier's ``auto_class`` it gets a label for each output that the weights have.
    ``attention``: an implementation to use instead of the one it may name. Raises InputError.
    """
    import transformers

    file = config_folder_of(directory) / CONFIG_FILE
    read_config(directory)  # its error for an invalid file says more than transformers'
    with explaining_load_errors(f"{file} cannot be used"):
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            str(file.parent), trust_remote_code=False
        )
    use_own_head(config, file.parent)
    if attention is not None:
        config._attn_implementation = attention
    drop_outside_padding(config, f"{file}")
    attend_fully(config, f"{file}")
    source = file if attention is None else "student.attention"
    check_implementations(config, f"{source}")
    if is_adapter(directory):
        check_mergeable(directory)
    if auto_class is not None:
        adapt_config(config, directory, auto_class)
    return config


def adapt_config(config: "PretrainedConfig", directory: Path, auto_class: str) -> None:
    """Adapt a configuration that was read for no class to ``auto_class``: see load_config."""
    config_folder = config_folder_of(directory)
    if auto_class.endswith("Classification") and quantised_by(read_config(directory)) is None:
        complete_labels(config, auto_class, stored_tensors(config_folder), config_folder)
    if is_adapter(directory):
        complete_config(config, directory, auto_class)


def load_weights(
    directory: Path,
    auto_class: str,
    dtype: torch.dtype,
    failure: str,
    advice: str = "",
    config: "PretrainedConfig | None" = None,
    whole_reason: str = TRAINED,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Loaded:
    """Load safetensors weights through a transformers Auto class, never with remote code.

    ``config``: the directory's, changed. ``whole_reason``: why they must not be quantised, if
    so. Weights that are missing, or have another shape than the configuration's, are random; the
    caller decides. ``failure`` and ``advice`` are for ``explaining_load_errors``; ``options`` are
    for transformers. Raises InputError for everything that cannot be loaded.
    """
    import transformers

    config = config or load_config(directory, auto_class)
    if (base := base_of(directory)) is not None:
        return _load_adapted(directory, base, auto_class, dtype, failure, config)
    check_headers(directory)
    check_quantisation(directory, read_config(directory), stored_tensors(directory), whole_reason)
    load: Any = getattr(transformers, auto_class).from_pretrained
    if active_recording() is not None:
        load = partial(load_later, auto_class)
    with explaining_load_errors(failure, advice):
        model, info = load(
            str(directory),
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them; the caller refuses
            **options,
        )
    shapes = {name: (tuple(old), tuple(new)) for name, old, new in info["mismatched_keys"]}
    missing = sorted({*info["missing_keys"], *shapes})
    log_unused_weights(directory, model, info["unexpected_keys"])
    if active_recording() is None:
        check_no_nan(directory, model)
    return Loaded(model, *split_names(model, missing), shapes)


def _load_adapted(
    directory: Path,
    base: Path,
    auto_class: str,
    dtype: torch.dtype,
    failure: str,
    config: "PretrainedConfig",
) -> Loaded:
    """Load an adapter's base in float32, merge the adapter into it, and round the result to
    ``dtype``.

    A student is merged as the language model that it was trained as, whatever the class. If that,
    or ``config``, has another head than the adapter, the head is random.
    """
    import transformers

    check_base(directory, base)
    attention = config._attn_implementation  # student.attention, if that is set
    kind = trained_as(directory) or auto_class
    own_config = load_config(directory, kind, attention)
    base_config = copy.deepcopy(own_config)
    stored_config = load_config(base, attention=attention)
    base_config.get_text_config().vocab_size = stored_config.get_text_config().vocab_size
    base_failure = f"{failure}: its base"
    base_model = load_weights(
        base, kind, torch.float32, base_failure, config=base_config, whole_reason=MERGED
    )
    round_as_trained(base_model.model, directory)
    size = own_config.get_text_config().vocab_size
    merged, whole_names = merge_adapter(base_model.model, directory, size, failure)
    body, head = (sorted({*names} - whole_names) for names in (base_model.body, base_model.head))
    shapes = {name: pair for name, pair in base_model.shapes.items() if name not in whole_names}
    if kind != auto_class or config.num_labels != own_config.num_labels:
        with explaining_load_errors(failure):
            model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
        fresh, shapes = copy_matching_weights(model.eval(), merged, directory)
        fresh |= {*body, *head} & model.state_dict().keys()
        return Loaded(model.to(dtype), *split_names(model, sorted(fresh)), shapes)
    for key in ("id2label", "label2id", "problem_type"):  # what callers set
        setattr(merged.config, key, getattr(config, key))
    set_padding(merged.config, padding_of(config))
    return Loaded(merged.to(dtype), body, head, shapes)


def load_model(
    directory: Path,
    auto_class: str,
    dtype: torch.dtype,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """Load a teacher; every weight must come from the directory. ``options``: transformers' options
    for devices.

    Raises InputError naming the missing weights: a randomly initialised head would cache noise.
    """
    failure = f"{directory} cannot be loaded as {auto_class}"
    loaded = load_weights(directory, auto_class, dtype, failure, whole_reason="", options=options)
    check_shapes(failure, loaded.shapes)
    check_none_missing(
        directory, auto_class, loaded.model.config, sorted(loaded.body + loaded.head)
    )
    return loaded.model


def new_language_model(
    directory: Path,
    task: str,
    attention: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> "PreTrainedModel":
    """Make random weights for the configuration in ``directory``, in float32.

    With the ``tokenizer`` of the text, none of its tokens is taken for padding.
    """
    import transformers

    config = load_config(directory, attention=attention)
    if tokenizer is not None:
        padding_of_new(config, tokenizer, f"student {directory}")
    for key in ("quantization_config", "compression_config"):
        if getattr(config, key, None) is not None:  # of weights that are not loaded
            log.info("student: the new weights are not quantised; %s is left out", key)
            delattr(config, key)
    failure = f"student {directory} cannot be made as {AUTO_CLASSES[task]} by its config.json"
    with explaining_load_errors(failure):
        # The configuration may ask for bfloat16, as large models' do; weights are trained in
        # float32.
        model: PreTrainedModel = getattr(transformers, AUTO_CLASSES[task]).from_config(
            config, dtype=torch.float32
        )
    return model


def load_language_model(
    directory: Path, task: str, attention: str | None = None
) -> "PreTrainedModel":
    """Load pre-trained weights in float32; a body without LM head gets a fresh one, which is
    logged.
    """
    return load_student_model(directory, task, attention).model


def load_student_model(directory: Path, task: str, attention: str | None = None) -> Loaded:
    """Do the same, and return the names of what is fresh in its head."""
    failure = f"student {directory} cannot be loaded as {AUTO_CLASSES[task]}"
    advice = ". To start from its configuration alone, set student.from_scratch"
    auto_class = AUTO_CLASSES[task]
    config = load_config(directory, auto_class, attention)
    loaded = load_weights(directory, auto_class, torch.float32, failure, advice, config)
    check_shapes(failure, loaded.shapes)
    check_body_complete(directory, loaded.body)
    if loaded.head:
        log.info("student: fresh LM head, %s has none", directory)
    return loaded


def check_body_complete(directory: Path, missing: list[str]) -> None:
    """Raise InputError for a student whose body would be partly random."""
    if missing:
        raise InputError(
            f"student {directory} lacks weights of its body ({', '.join(missing[:3])} …); "
            "to start from random weights, set student.from_scratch"
        )


def longest_input(config: "PretrainedConfig") -> int | None:
    """Return how many tokens a model of this configuration takes; None if it does not say."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not limit or limit < 0:
        return None
    offset = (padding_of(config) or 0) + 1 if text.model_type in COUNT_PAST_PADDING else 0
    return int(limit) - offset


class Placement(Settings):
    """Where and how a model runs."""

    device: str
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Return the torch dtype of ``precision``."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            self.precision
        ]


def place(precision: str) -> Placement:
    """Return the device of this process, and the precision that ``auto`` means on it."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda:{torch.cuda.current_device()}" if kind == "cuda" else kind
    return Placement(device=device, precision=chosen_precision(precision, kind))
