"""Why a model cannot be had: the one list of causes, each in a sentence, all InputErrors.

The files are checked before transformers is asked; errors it raises then are explained by cause.
"""

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from rekindle.data.errors import InputError, RekindleError, first_words
from rekindle.train.model.folder import CONFIG_FILE, StoredTensor
from rekindle.train.outside.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The package with which transformers loads weights quantised by a method; for methods without an
# entry it asks for compiled kernels from the hub, which are not downloaded.
QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
    "torchao": "torchao",
    "hqq": "hqq",
    "quanto": "optimum.quanto",
    "aqlm": "aqlm",
    "fbgemm_fp8": "fbgemm_gpu",
    "auto-round": "auto_round",
    "quark": "quark",
    "vptq": "vptq",
    "spqr": "spqr_quant",
}
# Packages whose pip name differs from their Python name.
_PIP_NAMES = {"quark": "amd-quark"}
# Names that only quantised weights have beside them, and types that only they are stored in.
_QUANTISED_NAMES = re.compile(
    r"(\.absmax|\.quant_map|\.qweight|\.qzeros|\.SCB|\.weight_packed|\.weight_scale(_inv)?"
    r"|\.quant_state\..*)$"
)
_PLAIN_TYPES = {"F16", "BF16", "F32", "F64", "I64", "BOOL"}  # including those of buffers
FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}
PLAIN_ATTENTION = (None, "eager", "sdpa", "flex_attention")
PLAIN_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
# Why weights must be whole.
TRAINED = "what is trained begins from whole weights"
MERGED = "an adapter is merged into whole weights"
DEQUANTISE = "dequantise the model (model.dequantize()) and save it with save_pretrained"


@contextmanager
def explaining_load_errors(failure: str, advice: str = "") -> Iterator[None]:
    """Turn any error about a model that cannot be had into one InputError: ``failure``, the reason,
    and ``advice``. Running out of memory is not the model's fault.
    """
    try:
        with quiet_transformers():
            yield
    except (RekindleError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise InputError(f"{failure}: its weights are damaged ({error}){advice}") from None
    # the library's errors have no common base; all mean that it cannot be had
    except Exception as error:
        raise InputError(f"{failure}: {_explain(error)}{advice}") from error


@torch.no_grad()
def check_no_nan(directory: Path, model: nn.Module) -> None:
    """Raise InputError if a weight of the model in ``directory`` is NaN."""
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
            continue
        # The sum takes no memory; it is also NaN for infinities of both signs.
        if weight.sum().isnan() and (count := int(weight.isnan().sum())):
            raise InputError(
                f"{directory}: {count:,} of the {weight.numel():,} values of {name} are NaN, so "
                "all its outputs would be: its training diverged, or its files are damaged. Give "
                "a sound checkpoint of it"
            )


@contextmanager
def explaining_run_errors(model: str) -> Iterator[None]:
    """Name the model and the cause when its own code fails on its input.

    Errors of the device are passed on: running out of memory has other remedies.
    """
    try:
        yield
    except (RekindleError, RuntimeError):
        raise
    except Exception as error:
        raise InputError(
            f"{model} fails when it is run: {_explain(error)}. Its config.json may lack what its "
            "forward pass needs; run the model by itself on a text to see more"
        ) from error


def _explain(error: Exception) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "its code comes with the model (auto_map), but remote code is off: give a model "
            "whose code transformers has"
        )
    if isinstance(error, KeyError) and _raised_in(error, "activations"):
        return f"transformers knows no activation {text} (hidden_act in its config.json)"
    if isinstance(error, IndexError):
        return (
            f"{text}, as when a token's id has no row in the embedding: the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json, special_tokens_map.json) may belong to "
            "another model"
        )
    first = first_words(error).rstrip(".")
    if isinstance(error, OSError | ValueError | ImportError | RuntimeError) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _raised_in(error: Exception, module: str) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).stem == module if frames else False


# --- what the files say ---------------------------------------------------------------------------


def quantised_by(settings: Mapping[str, Any]) -> str | None:
    """Return the method by which config.json says the weights are quantised."""
    for part in (settings, *(v for v in settings.values() if isinstance(v, dict))):
        for key in ("quantization_config", "compression_config"):
            section = part.get(key)
            if isinstance(section, dict) and section:
                bits = section.get("load_in_4bit") or section.get("load_in_8bit")
                return str(section.get("quant_method") or ("bitsandbytes" if bits else "unknown"))
    return None


def check_quantisation(
    directory: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    whole_reason: str = "",
) -> None:
    """Raise InputError for quantised weights that cannot be loaded, or for any if there is a
    ``whole_reason`` why they must not be quantised.
    """
    method = quantised_by(settings)
    quantised = [
        name
        for name, tensor in tensors.items()
        if _QUANTISED_NAMES.search(name) or tensor.dtype.startswith(("F4_", "F6_", "F8_"))
    ]
    if method is None:
        if quantised:
            raise InputError(
                f"{directory}: its weights are quantised ({quantised[0]} is "
                f"{tensors[quantised[0]].dtype}), but its {CONFIG_FILE} has no "
                "quantization_config that says how. Give the folder as its maker wrote it, or "
                f"{DEQUANTISE}"
            )
        return
    types = sorted({tensor.dtype for tensor in tensors.values()})
    if not quantised and set(types) <= _PLAIN_TYPES:
        raise InputError(
            f"{directory}: its {CONFIG_FILE} says that the weights are quantised by {method}, "
            f"but they are plain ({', '.join(types)}): the section is left over. Remove "
            f"quantization_config from {directory / CONFIG_FILE}"
        )
    statement = f"{directory}: its weights are quantised by {method} (quantization_config)"
    if whole_reason:
        raise InputError(f"{statement}; {whole_reason}: {DEQUANTISE}")
    package = QUANTISERS.get(method)
    if package is None:
        raise InputError(f"{statement}, which is not supported here: {DEQUANTISE}")
    if not _installed(package):
        pip = _PIP_NAMES.get(package, re.sub(r"[._]", "-", package))
        raise InputError(
            f"{statement}, but {package} is not installed. Install it (pip install {pip}), or "
            f"{DEQUANTISE}"
        )


def check_implementations(config: "PretrainedConfig", source: str) -> None:
    """Refuse attention (or experts) that need a missing package, or a kernel that transformers
    would download: compiled code by strangers. ``source``: what asks for it.
    """
    for part in _configs(config):
        attention = getattr(part, "_attn_implementation", None)
        attention = attention.removeprefix("paged|") if isinstance(attention, str) else attention
        experts = getattr(part, "_experts_implementation", None)
        package = FLASH_PACKAGES.get(str(attention))
        if package is not None and not _installed(package):
            raise InputError(
                f"{source} asks for the attention {attention}, and the package {package} is not "
                'installed. Install it, or say "sdpa" there'
            )
        unsupported = [f"attention {attention!r}"] if attention not in PLAIN_ATTENTION else []
        unsupported += [f"experts {experts!r}"] if experts not in PLAIN_EXPERTS else []
        if unsupported and package is None:
            raise InputError(
                f"{source} asks for the {unsupported[0]}: compiled code that transformers would "
                'download from a hub, which is not done. Say "sdpa" there (of experts: "eager")'
            )


def _configs(config: "PretrainedConfig") -> Iterator["PretrainedConfig"]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield part


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that contains it is missing
        return False
