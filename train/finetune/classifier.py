"""Text classifiers and regressors: their tokens, their loading, their scoring. Trains nothing.

One code path makes an expert's inputs for fine-tuning and for evaluation.
"""

import logging
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rekindle.data.batch import pad
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.train.device_batch import model_inputs
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.causes import running
from rekindle.train.model.files import load_config, load_weights, longest_input, place
from rekindle.train.model.fitting import check_fits
from rekindle.train.model.folder import resolve_model, tokenizer_folder
from rekindle.train.model.meta import refuse_shapes
from rekindle.train.model.padding import padding_of, set_padding
from rekindle.train.model.segments import knows_segments
from rekindle.train.model.sight import moved_by_padding

logger = logging.getLogger("rekindle")

MOST_TOKENS = 512  # of a text, unless a length is given: what most encoders were trained with
CLASSIFIER = "AutoModelForSequenceClassification"

Row = list[int] | NDArray[np.int32]


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids per example, unpadded; segment ids only where tokenizer and model know them."""

    input_ids: Sequence[Row]
    token_type_ids: Sequence[Row] | None
    padding_id: int
    limit: int = 0  # tokens, from which on texts are cut
    takes: float = math.inf  # tokens that the model takes
    cut: int = 0  # texts that were
    longest: int = 0  # tokens of the longest of these before

    @property
    def count(self) -> int:
        """How many texts there are."""
        return len(self.input_ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per example: int64 [N]."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)


@dataclass(frozen=True)
class Cuts:
    """What is cut of texts that come in blocks: the last fields of EncodedTexts, summed up."""

    limit: int = 0
    takes: float = math.inf
    cut: int = 0
    longest: int = 0
    count: int = 0

    def and_of(self, texts: "EncodedTexts | Cuts") -> "Cuts":
        """Return these and those of one more block."""
        cut, longest = self.cut + texts.cut, max(self.longest, texts.longest)
        return Cuts(texts.limit, texts.takes, cut, longest, self.count + texts.count)


# ---- tokens ------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerFast,
    model_config: PretrainedConfig,
    data: TaskData,
    max_length: int | None,
) -> EncodedTexts:
    """Tokenize a split, cut to ``max_length`` (MOST_TOKENS) and to what model and tokenizer take.

    ``tokenizer`` is a fast Hugging Face one; pairs are joined by its own template (GPT-2 and Llama
    put nothing between), as stage 1 joins them. A special token's name within a text is text. An
    empty text is one padding token, so that no row is empty.
    """
    padding_id = _padding_id(model_config, tokenizer)
    takes = min(longest_input(model_config) or math.inf, tokenizer.model_max_length)
    most = int(min(max_length or MOST_TOKENS, takes))
    found = tokenizer(
        data.texts, data.pairs, truncation=True, max_length=most, split_special_tokens=True
    )
    ids = [row or [padding_id] for row in found["input_ids"]]
    # A generic tokenizer also gives segments to models that would read them as something else.
    types = found.get("token_type_ids") if knows_segments(model_config) else None
    cut = [row for row, encoding in enumerate(found.encodings) if encoding.overflowing]
    longest = 0
    if cut:
        pairs = data.pairs and [data.pairs[row] for row in cut]
        texts, apart = [data.texts[row] for row in cut], {"split_special_tokens": True}
        whole = tokenizer(texts, pairs, truncation=False, verbose=False, **apart)
        longest = max(map(len, whole["input_ids"]))
    return EncodedTexts(ids, types, padding_id, most, takes, len(cut), longest)


def _padding_id(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """The model's own padding id; without one the tokenizer's, the end of text, or 0: one that it
    can embed.
    """
    rows = model_config.get_text_config().vocab_size
    known = (padding_of(model_config), tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in known if number is not None and number < rows), 0)


def collate(encoded: EncodedTexts, rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """The model's arguments for some rows: int64 [B, longest], padded on the right."""
    lengths, types = encoded.lengths[rows], encoded.token_type_ids
    ids = pad([encoded.input_ids[row] for row in rows], lengths, encoded.padding_id)
    segments = None if types is None else pad([types[row] for row in rows], lengths, 0)
    return model_inputs(ids, lengths, device, segments)


def tell_cut(splits: Mapping[str, EncodedTexts | Cuts]) -> dict[str, float]:
    """Say which share of each split's texts was cut, loudly where one was, and return it."""
    shares = {name: texts.cut / max(texts.count, 1) for name, texts in splits.items()}
    limit = max((texts.limit for texts in splits.values()), default=0)
    if not any(shares.values()):
        logger.info("no text is cut (at most %d tokens)", limit)
        return shares
    told = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
    longest = max(texts.longest for texts in splits.values())
    takes = min(texts.takes for texts in splits.values())
    advice = "the model takes no more"
    if limit < takes:
        advice = f"max_length={min(longest, takes)} reads {'all' if longest <= takes else 'more'}"
    logger.warning(
        "texts are cut at %d tokens: %s (the longest has %d); what follows is never read: %s",
        *(limit, told, longest, advice),
    )
    return shares


# ---- models ------------------------------------------------------------------------------------


def padded_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """Load the model's fast tokenizer, which pads and cuts on the right."""
    directory = resolve_model(model)
    load_config(directory)  # transformers reads it for the tokenizer, and would blame that
    tokenizer = load_tokenizer(str(tokenizer_folder(directory))).hf
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # so that whoever loads the expert can pad
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def classifier_config(model: str) -> PretrainedConfig:
    """Load the model's configuration, with a label for each output that its head has."""
    directory = resolve_model(model)
    # A tagger's body is as good as any: its head starts fresh.
    check_fits(load_config(directory), "sequence_classification", repr(model), trained=False)
    return load_config(directory, CLASSIFIER)


def load_classifier(
    model: str, tokenizer: PreTrainedTokenizerFast, data: TaskData
) -> PreTrainedModel:
    """Load ``model`` in fp32 with a head for ``data``, fresh from torch's generator if need be.

    A head that was trained for other labels is not reused: its output layer starts fresh too.
    """
    config = classifier_config(model)
    if data.label_names:
        names = dict(enumerate(data.label_names))
        same = config.id2label == names
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    else:
        same = config.num_labels == data.outputs and config.problem_type == "regression"
        config.num_labels = data.outputs
    config.problem_type = data.problem
    network, unset = _load_weights(model, config, tokenizer)
    if not same and not unset:
        logger.info("%s has a head for other labels; its output layer starts fresh", model)
        _renew_output_layer(network)
    return network


def _load_weights(
    model: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, list[str]]:
    """Load the classifier and the names of its head's weights that the checkpoint does not set."""
    set_padding(config, _padding_id(config, tokenizer))
    what = f"{model!r} cannot be loaded for text classification"
    advice = "; give a model with config.json and safetensors weights (pickled ones are not loaded)"
    loaded = load_weights(resolve_model(model), CLASSIFIER, torch.float32, what, advice, config)
    refuse_shapes(what, {k: v for k, v in loaded.shapes.items() if k in loaded.body})
    # A pooler sits in the body but belongs to the head: a masked LM has none.
    missing = [key for key in loaded.body if ".pooler." not in key]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise InputError(
            f"the checkpoint {model!r} lacks {counted(len(missing), 'weight')} of the "
            f"{config.model_type} body: {shown}; give a checkpoint that fits its config.json"
        )
    return loaded.model, loaded.head


def _renew_output_layer(network: PreTrainedModel) -> None:
    width = network.config.num_labels
    head = [
        module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == width
        and not name.startswith(f"{network.base_model_prefix}.")
    ][-1]
    torch.nn.init.normal_(head.weight, std=getattr(network.config, "initializer_range", 0.02))
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)


# ---- scoring -----------------------------------------------------------------------------------


def predict(
    model: PreTrainedModel, encoded: EncodedTexts, batch_size: int, *, dropout: bool = False
) -> np.ndarray:
    """fp32 logits [N,C] in row order; never autocast, so that the scores are the weights'."""
    model.train(dropout)

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        with running(str(model.name_or_path)):
            found: Tensor = model(**inputs).logits
        return found

    equal = moved_by_padding(model) > 0
    return by_length(encoded, batch_size, model.device, logits, equal)


@torch.inference_mode()
def by_length(
    encoded: EncodedTexts,
    batch_size: int,
    device: torch.device,
    run: Callable[[dict[str, Tensor]], Tensor],
    equal: bool = False,
) -> np.ndarray:
    """Run on batches of rows of like length, and return fp32 logits [N,C] in row order.

    ``equal``: of one length, for models that padding changes.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    ends = np.flatnonzero(np.diff(encoded.lengths[order]) * equal) + 1
    batches = [
        rows[start : start + batch_size]
        for rows in np.split(order, ends)
        for start in range(0, len(rows), batch_size)
    ]
    each = [run(collate(encoded, rows, device)).float().cpu().numpy() for rows in batches]
    found = np.concatenate(each)
    logits = np.empty_like(found)
    logits[order] = found
    return logits


def to_fine_tune(model: str) -> str:
    """The command that makes an expert of a model, in a message."""
    where = "--train train.jsonl --dev dev.jsonl --out EXPERT"
    return f"`pipeline finetune {shlex.quote(model)} {where}`"


def load_trained(model_dir: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a classifier with all its weights onto its device, and its tokenizer; InputError for one
    without a trained head.
    """
    tokenizer, config = padded_tokenizer(model_dir), classifier_config(model_dir)
    network, unset = _load_weights(model_dir, config, tokenizer)
    if unset:
        raise InputError(
            f"{model_dir!r} has no trained classification head (missing: {', '.join(unset)}); "
            f"fine-tune it first: {to_fine_tune(model_dir)}"
        )
    return network.to(place("fp32").device), tokenizer
