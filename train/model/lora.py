"""A student's own adapter (LoRA): how it is put into the model, what of it is trained, and how it
is saved. ``adapter`` merges a saved one into its base.
"""

import json
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rekindle.data.errors import InputError
from rekindle.train.model.adapter import INSTALL, PREFIX, quiet_peft
from rekindle.train.model.causes import explaining_load_errors
from rekindle.train.model.folder import ADAPTER_FILE, ADAPTER_WEIGHTS
from rekindle.train.model.quantised import (
    check_bitsandbytes_installed,
    four_bit_shape,
    quantised_layer,
)
from rekindle.train.model.student_config import ALL_LINEAR, LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapter:
    """A fresh LoRA adapter within ``model``, in place: B is 0, so the model computes what it did.
    From then on only the adapter, and what it saves whole, has gradients.

    Raises InputError, beginning with ``subject``, if peft is missing or cannot adapt this model so,
    and if the input embeddings or the output matrix would be adapted.
    """

    def __init__(self, model: "PreTrainedModel", config: LoraConfig, task: str, subject: str):
        check_peft_installed()
        if config.quantize is not None:
            check_bitsandbytes_installed("student.lora.quantize")
        import peft

        matrices_before = _embeddings_and_output(model)
        names = config.target_modules
        settings: dict[str, Any] = {
            "r": config.r,
            "lora_alpha": config.r if config.alpha is None else config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": ALL_LINEAR if names == (ALL_LINEAR,) else list(names),
            "bias": config.bias,
            "use_rslora": config.rslora,
            "use_dora": config.dora,
            "modules_to_save": list(config.modules_to_save) or None,
            "task_type": "CAUSAL_LM" if task == "causal_lm" else None,
        }
        self.model, self.merges, self.quantize = model, config.merge, config.quantize
        kinds = ("Linear", "Conv1D")
        linear = {n.split(".")[-1] for n, m in model.named_modules() if type(m).__name__ in kinds}
        advice = f". Its linear layers are called {', '.join(sorted(linear))}"
        with explaining_load_errors(f"{subject}: student.lora", advice), quiet_peft():
            self._tuner = peft.LoraModel(model, peft.LoraConfig(**settings), "default")
        _check_embeddings_and_output(subject, matrices_before, _embeddings_and_output(model))
        self._check_layer_names(subject, config)
        if config.quantize is not None:
            self._quantise(subject)

    def _check_layer_names(self, subject: str, config: LoraConfig) -> None:
        """Refuse names of no layer: peft is content if one of ``target_modules`` exists, and does
        not check ``modules_to_save``.
        """
        from peft.utils import ModulesToSaveWrapper

        modules = self.model.named_modules()
        whole_layers = [
            name for name, module in modules if isinstance(module, ModulesToSaveWrapper)
        ]
        adapted = [f".{name}" for name in self._tuner.targeted_module_names]
        named = [layer_name for layer_name in config.target_modules if layer_name != ALL_LINEAR]
        missing = [
            ("target_modules", layer_name)
            for layer_name in named
            if not _has_ending(adapted, f".{layer_name}")
        ]
        saved = config.modules_to_save
        missing += [
            ("modules_to_save", layer_name)
            for layer_name in saved
            if not _has_ending(whole_layers, layer_name)
        ]
        for key, layer_name in missing:
            raise InputError(
                f"{subject}: student.lora.{key} names {layer_name!r}, but the model has no layer "
                "whose name ends so. Correct it, or leave it out"
            )

    def _quantise(self, subject: str) -> None:
        if parameters := self._tuner.targeted_parameter_names:
            raise InputError(
                f"{subject}: student.lora.quantize rounds linear layers, but {parameters[0]}, "
                "which is not one, is adapted too. Leave quantize out, or adapt only linear layers "
                "(target_modules)"
            )
        for name in self._tuner.targeted_module_names:
            layer: Any = self.model.get_submodule(name)
            layer.base_layer = quantised_layer(layer.base_layer, subject)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained, under the names in an adapter's file; the memory is the
        model's.
        """
        import peft

        trained = peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {f"{PREFIX}{name}": values for name, values in trained.items()}

    def save(self, folder: Path, base: str) -> None:
        """Write it into ``folder`` as peft does, so that ``PeftModel.from_pretrained`` loads it;
        ``base``: the location of the model that it adapts.
        """
        settings = self._tuner.peft_config["default"].to_dict() | {
            "base_model_name_or_path": base,
            "inference_mode": True,
        }
        # otherwise the class of peft's that loads it must be recorded
        if settings["task_type"] is None:
            kind = type(self.model)
            class_record = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            settings["auto_mapping"] = class_record
        # sets become lists
        content = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
        (folder / ADAPTER_FILE).write_text(content + "\n", encoding="utf-8")
        # Two names may share memory (a tied bias), which the format does not allow.
        tensors = {name: values.detach().cpu().clone() for name, values in self.tensors().items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def merge(self) -> None:
        """Make ``model`` the sum, a whole model again. Nothing is trained any more."""
        with torch.no_grad():
            self._tuner.merge_and_unload(safe_merge=True)

    def unsaved_parameters(self) -> list[str]:
        """Return the names of parameters in the model that have gradients but would not
        be saved.
        """
        saved = {values.data_ptr() for values in self.tensors().values()}
        named = self.model.named_parameters()
        return [name for name, p in named if p.requires_grad and p.data_ptr() not in saved]


def check_peft_installed() -> None:
    """Raise InputError if peft is not installed."""
    if find_spec("peft") is None:
        raise InputError(f"student.lora needs the package peft, which is not installed: {INSTALL}")


def _embeddings_and_output(model: "PreTrainedModel") -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _has_ending(names: Collection[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)


def _check_embeddings_and_output(
    subject: str, original: tuple[Any, Any], adapted: tuple[Any, Any]
) -> None:
    """Refuse an adapter of the input embeddings or the output matrix; they may be saved whole if
    they are two matrices.
    """
    words, output = original
    tied = output is not None and getattr(words, "weight", 0) is getattr(output, "weight", 1)
    for name, old, new in zip(
        ("input embeddings", "output matrix"), original, adapted, strict=True
    ):
        if new is old:
            continue
        if hasattr(new, "base_layer"):
            raise InputError(
                f"{subject}: student.lora.target_modules names the {name}, which cannot be adapted "
                "here: the losses multiply with the matrix itself. Leave it out"
            )
        if tied:
            raise InputError(
                f"{subject}: student.lora.modules_to_save names the {name}, but here the output "
                "matrix is the input embeddings: saved whole, they would be two. Leave it out"
            )


def describe_missing_head(model: str) -> str:
    """Return what to do with a base without a language-model head if the text is to train it."""
    return (
        f"student {model!r} has no language-model head, and with student.lora a fresh one would "
        "neither be trained nor saved. Train a whole student first (without student.lora) and "
        "adapt that, or leave the text out (train.objective.hard.weight: 0, and no teachers of "
        "its words)"
    )


def describe_adapter(student: nn.Module, adapter: Adapter, model: str) -> str:
    """Return a line on how many parameters are trained, of how many.

    Raises InputError if some of them are neither the adapter's nor beside the model, and would not
    be saved.
    """
    if unsaved := adapter.unsaved_parameters():
        raise InputError(
            f"student.lora: the objective puts parameters into the model {model!r} ({unsaved[0]}), "
            "which the adapter's file has no place for. Train it without student.lora"
        )
    # Count each once: a tied bias has two names.
    sizes = {id(p): (_parameter_count(p), p.requires_grad) for p in student.parameters()}
    trained = sum(size for size, gradients in sizes.values() if gradients)
    total = sum(size for size, _ in sizes.values())
    adapter_size = sum({t.data_ptr(): t.numel() for t in adapter.tensors().values()}.values())
    heads_note = f", {trained - adapter_size:,} of them in heads" if trained > adapter_size else ""
    return (
        f"student: an adapter of {model}; {trained:,} of {total:,} parameters are trained "
        f"({trained / total:.2%}){heads_note}"
    )


def _parameter_count(values: Tensor) -> int:
    return (four_bit_shape(values) or values.shape).numel()
