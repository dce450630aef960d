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
from rekindle.train.model.causes import refusing
from rekindle.train.model.folder import ADAPTER_FILE, ADAPTER_WEIGHTS
from rekindle.train.model.quantised import four_bit_shape, need_bitsandbytes, quantised_layer
from rekindle.train.model.student_config import ALL_LINEAR, LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapter:
    """A fresh LoRA adapter within ``model``, in place: B is 0, so the model computes what it did.
    From then on only the adapter, and what it saves whole, has gradients.

    Raises InputError, beginning with ``what``, if peft is missing or cannot adapt this model so,
    and if the input embeddings or the output matrix would be adapted.
    """

    def __init__(self, model: "PreTrainedModel", config: LoraConfig, task: str, what: str):
        need_extra()
        if config.quantize is not None:
            need_bitsandbytes("student.lora.quantize")
        import peft

        ends = _ends(model)
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
        with refusing(f"{what}: student.lora", advice), quiet_peft():
            self._tuner = peft.LoraModel(model, peft.LoraConfig(**settings), "default")
        _check_ends(what, ends, _ends(model))
        self._check_found(what, config)
        if config.quantize is not None:
            self._quantise(what)

    def _check_found(self, what: str, config: LoraConfig) -> None:
        """Refuse names of no layer: peft is content if one of ``target_modules`` exists, and does
        not check ``modules_to_save``.
        """
        from peft.utils import ModulesToSaveWrapper

        modules = self.model.named_modules()
        whole = [name for name, module in modules if isinstance(module, ModulesToSaveWrapper)]
        adapted = [f".{name}" for name in self._tuner.targeted_module_names]
        named = [one for one in config.target_modules if one != ALL_LINEAR]
        missing = [("target_modules", one) for one in named if not _ends_so(adapted, f".{one}")]
        saved = config.modules_to_save
        missing += [("modules_to_save", one) for one in saved if not _ends_so(whole, one)]
        for key, one in missing:
            raise InputError(
                f"{what}: student.lora.{key} names {one!r}, but the model has no layer whose name "
                "ends so. Correct it, or leave it out"
            )

    def _quantise(self, what: str) -> None:
        if beside := self._tuner.targeted_parameter_names:
            raise InputError(
                f"{what}: student.lora.quantize rounds linear layers, but {beside[0]}, which is "
                "not one, is adapted too. Leave quantize out, or adapt only linear layers "
                "(target_modules)"
            )
        for name in self._tuner.targeted_module_names:
            layer: Any = self.model.get_submodule(name)
            layer.base_layer = quantised_layer(layer.base_layer, what)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained, under the names in an adapter's file; the memory is the
        model's.
        """
        import peft

        found = peft.get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {f"{PREFIX}{name}": values for name, values in found.items()}

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
            about = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            settings["auto_mapping"] = about
        # sets become lists
        content = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
        (folder / ADAPTER_FILE).write_text(content + "\n", encoding="utf-8")
        # Two names may share memory (a tied bias), which the format does not allow.
        own = {name: values.detach().cpu().clone() for name, values in self.tensors().items()}
        save_file(own, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def merge(self) -> None:
        """Make ``model`` the sum, a whole model again. Nothing is trained any more."""
        with torch.no_grad():
            self._tuner.merge_and_unload(safe_merge=True)

    def strange(self) -> list[str]:
        """Return the names of parameters in the model that have gradients but would not
        be saved.
        """
        saved = {values.data_ptr() for values in self.tensors().values()}
        named = self.model.named_parameters()
        return [name for name, p in named if p.requires_grad and p.data_ptr() not in saved]


def need_extra() -> None:
    """Raise InputError if peft is not installed."""
    if find_spec("peft") is None:
        raise InputError(f"student.lora needs the package peft, which is not installed: {INSTALL}")


def _ends(model: "PreTrainedModel") -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _ends_so(names: Collection[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)


def _check_ends(what: str, before: tuple[Any, Any], after: tuple[Any, Any]) -> None:
    """Refuse an adapter of the input embeddings or the output matrix; they may be saved whole if
    they are two matrices.
    """
    words, output = before
    tied = output is not None and getattr(words, "weight", 0) is getattr(output, "weight", 1)
    for name, old, new in zip(("input embeddings", "output matrix"), before, after, strict=True):
        if new is old:
            continue
        if hasattr(new, "base_layer"):
            raise InputError(
                f"{what}: student.lora.target_modules names the {name}, which cannot be adapted "
                "here: the losses multiply with the matrix itself. Leave it out"
            )
        if tied:
            raise InputError(
                f"{what}: student.lora.modules_to_save names the {name}, but here the output "
                "matrix is the input embeddings: saved whole, they would be two. Leave it out"
            )


def no_head_to_adapt(model: str) -> str:
    """Return what to do with a base without a language-model head if the text is to train it."""
    return (
        f"student {model!r} has no language-model head, and with student.lora a fresh one would "
        "neither be trained nor saved. Train a whole student first (without student.lora) and "
        "adapt that, or leave the text out (train.objective.hard.weight: 0, and no teachers of "
        "its words)"
    )


def told_of_adapter(student: nn.Module, adapter: Adapter, model: str) -> str:
    """Return a line on how many parameters are trained, of how many.

    Raises InputError if some of them are neither the adapter's nor beside the model, and would not
    be saved.
    """
    if strange := adapter.strange():
        raise InputError(
            f"student.lora: the objective puts parameters into the model {model!r} ({strange[0]}), "
            "which the adapter's file has no place for. Train it without student.lora"
        )
    # Count each once: a tied bias has two names.
    sizes = {id(p): (_size(p), p.requires_grad) for p in student.parameters()}
    trained = sum(size for size, gradients in sizes.values() if gradients)
    whole = sum(size for size, _ in sizes.values())
    own = sum({t.data_ptr(): t.numel() for t in adapter.tensors().values()}.values())
    beside = f", {trained - own:,} of them in heads" if trained > own else ""
    return (
        f"student: an adapter of {model}; {trained:,} of {whole:,} parameters are trained "
        f"({trained / whole:.2%}){beside}"
    )


def _size(values: Tensor) -> int:
    return (four_bit_shape(values) or values.shape).numel()
