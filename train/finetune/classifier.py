"""Load and score classifiers of texts and of words, and regressors. Trains nothing.

Fine-tuning and evaluation share one code path for an expert's inputs.
"""

import logging
import shlex
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.train.finetune.encoded import EncodedTexts, collate, padding_id_of
from rekindle.train.finetune.label_lists import TAGS
from rekindle.train.finetune.metrics import check_finite
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.causes import explaining_run_errors
from rekindle.train.model.files import load_config, load_weights, place
from rekindle.train.model.fitting import AUTO_CLASSES, check_fits, recorded_task
from rekindle.train.model.folder import resolve_model, tokenizer_folder
from rekindle.train.model.meta import check_shapes
from rekindle.train.model.padding import set_padding
from rekindle.train.model.sight import padding_influence

logger = logging.getLogger("rekindle")

# ---- models ------------------------------------------------------------------------------------


def padded_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """Load the model's fast tokenizer, which pads and truncates on the right."""
    directory = resolve_model(model)
    load_config(directory)  # transformers reads it for the tokenizer, and would blame the tokenizer
    tokenizer = load_tokenizer(str(tokenizer_folder(directory))).hf
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # so that users of the expert can pad
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def classifier_config(model: str, problem: str = "", trained: bool = False) -> PretrainedConfig:
    """Load the model's configuration, with a label for each output of its head.

    ``trained``: its head is used as it is; otherwise the body of a tagger serves a classifier too.
    """
    directory, task = resolve_model(model), task_of(problem)
    check_fits(load_config(directory), task, repr(model), trained)
    return load_config(directory, AUTO_CLASSES[task])


def task_of(problem: str) -> str:
    """Return the teacher's task that answers the ``problem`` of a labelled task."""
    return "token_classification" if problem == TAGS else "sequence_classification"


def load_classifier(
    model: str, tokenizer: PreTrainedTokenizerFast, data: TaskData
) -> PreTrainedModel:
    """Load ``model`` in fp32 with a head for ``data``, fresh from torch's generator if need be.

    A head trained for other labels is not reused: its output layer starts fresh too.
    """
    config = classifier_config(model, data.problem)
    if data.label_names:
        names = dict(enumerate(data.label_names))
        fits_labels = config.id2label == names and _same_problem(config, data.problem)
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    else:
        fits_labels = config.num_labels == data.outputs and config.problem_type == "regression"
        config.num_labels = data.outputs
    config.problem_type = None if data.problem == TAGS else data.head_problem
    network, unset = _load_weights(model, config, tokenizer, data.problem)
    if not fits_labels and not unset:
        logger.info("%s has a head for other labels; its output layer starts fresh", model)
        _renew_output_layer(network)
    return network


def _same_problem(config: PretrainedConfig, problem: str) -> bool:
    """Return whether the head of a model, if it has one, was trained for ``problem``."""
    if problem == TAGS or recorded_task(config) == task_of(TAGS):
        return recorded_task(config) == task_of(problem)
    return config.problem_type in (None, problem)


def _load_weights(
    model: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, problem: str
) -> tuple[PreTrainedModel, list[str]]:
    """Load the classifier, and the names of its head's weights that the checkpoint lacks."""
    set_padding(config, padding_id_of(config, tokenizer))
    auto_class = AUTO_CLASSES[task_of(problem)]
    problem_text = f"{model!r} cannot be loaded for {task_of(problem).replace('_', ' ')}"
    advice = "; give a model with config.json and safetensors weights (pickled ones are not loaded)"
    loaded = load_weights(
        resolve_model(model), auto_class, torch.float32, problem_text, advice, config
    )
    check_shapes(problem_text, {k: v for k, v in loaded.shapes.items() if k in loaded.body})
    # A pooler is in the body but belongs to the head: a masked LM has none.
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
    """Return fp32 logits as ``run_by_length`` does; never with autocast: the scores are the
    weights'.
    """
    model.train(dropout)

    def logits(inputs: dict[str, Tensor], positions: Tensor | None) -> Tensor:
        return classifier_logits(model, inputs, positions)

    equal_lengths = padding_influence(model) > 0
    return run_by_length(encoded, batch_size, model.device, logits, equal_lengths)


def classifier_logits(
    model: PreTrainedModel, inputs: dict[str, Tensor], positions: Tensor | None
) -> Tensor:
    """Return a classifier's logits: [B,C], or at flat ``positions`` [P] of the batch [P,C]. Raises
    InputError, naming the model, if its own code fails.
    """
    with explaining_run_errors(str(model.name_or_path)):
        logits: Tensor = model(**inputs).logits
    return logits if positions is None else logits.flatten(0, 1)[positions]


def kept_word_positions(
    encoded: EncodedTexts, rows: np.ndarray, inputs: dict[str, Tensor]
) -> Tensor | None:
    """Return the positions of some rows' words in a flattened batch of the rows; None for whole
    texts.
    """
    if encoded.word_positions is None:
        return None
    ids = inputs["input_ids"]
    return torch.from_numpy(encoded.kept_word_positions(rows, ids.shape[1])).to(ids.device)


@torch.inference_mode()
def run_by_length(
    encoded: EncodedTexts,
    batch_size: int,
    device: torch.device,
    run: Callable[[dict[str, Tensor], Tensor | None], Tensor],
    equal_lengths: bool = False,
) -> np.ndarray:
    """Run on batches of rows of similar length, and return fp32 logits [N,C] in row order; for
    lists of words [W,C], in the order of all words, with NaN for words that are not read.

    ``equal_lengths``: batches of one length, for models that padding changes. Raises InputError for
    words' logits that are not finite.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    ends = np.flatnonzero(np.diff(encoded.lengths[order]) * equal_lengths) + 1
    batches = [
        rows[start : start + batch_size]
        for rows in np.split(order, ends)
        for start in range(0, len(rows), batch_size)
    ]
    parts = []
    for rows in batches:
        inputs = collate(encoded, rows, device)
        parts.append(run(inputs, kept_word_positions(encoded, rows, inputs)).float().cpu().numpy())
    joined = np.concatenate(parts)
    if encoded.word_positions is None:
        logits = np.empty_like(joined)
        logits[order] = joined
        return logits
    check_finite(joined)
    logits = np.full((sum(map(len, encoded.word_positions)), joined.shape[1]), np.nan, np.float32)
    logits[encoded.kept_word_indices(order)] = joined
    return logits


def finetune_command(model: str) -> str:
    """Return the command that makes an expert of a model, for a message."""
    options = "--train train.jsonl --dev dev.jsonl --out EXPERT"
    return f"`pipeline finetune {shlex.quote(model)} {options}`"


def load_trained(
    model_dir: str, problem: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a classifier (or a tagger if that is the ``problem``) with all its weights onto its
    device, and its tokenizer; InputError if its head is untrained.
    """
    tokenizer = padded_tokenizer(model_dir)
    config = classifier_config(model_dir, problem, trained=True)
    network, unset = _load_weights(model_dir, config, tokenizer, problem)
    if unset:
        raise InputError(
            f"{model_dir!r} has no trained classification head (missing: {', '.join(unset)}); "
            f"fine-tune it first: {finetune_command(model_dir)}"
        )
    return network.to(place("fp32").device), tokenizer
