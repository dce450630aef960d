"""Classifiers of texts and of words, and regressors: their loading, their scoring. Trains nothing.

One code path makes an expert's inputs for fine-tuning and for evaluation.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import InputError
from rekindle.train.finetune.encoded import (
    EncodedTexts,
    collate,
    encode,
    padding_id_of,
    tell_cut,
)
from rekindle.train.finetune.label_lists import SEVERAL, TAGS
from rekindle.train.finetune.metrics import check_finite, scores_of
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.causes import quiet_transformers, running
from rekindle.train.model.files import load_config, load_weights, place
from rekindle.train.model.fitting import AUTO_CLASSES, check_fits, task_said
from rekindle.train.model.folder import resolve_model, tokenizer_folder
from rekindle.train.model.labels import SAY_SCORES, check_label_names, gives_scores
from rekindle.train.model.meta import refuse_shapes
from rekindle.train.model.padding import set_padding
from rekindle.train.model.sight import moved_by_padding

logger = logging.getLogger("rekindle")

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


def classifier_config(model: str, problem: str = "", trained: bool = False) -> PretrainedConfig:
    """Load the model's configuration, with a label for each output that its head has.

    ``trained``: its head is used as it is; else a tagger's body is as good as any for a classifier.
    """
    directory, task = resolve_model(model), task_of(problem)
    check_fits(load_config(directory), task, repr(model), trained)
    return load_config(directory, AUTO_CLASSES[task])


def task_of(problem: str) -> str:
    """A teacher's task of that name, that answers what the ``problem`` of a labelled task asks."""
    return "token_classification" if problem == TAGS else "sequence_classification"


def load_classifier(
    model: str, tokenizer: PreTrainedTokenizerFast, data: TaskData
) -> PreTrainedModel:
    """Load ``model`` in fp32 with a head for ``data``, fresh from torch's generator if need be.

    A head that was trained for other labels is not reused: its output layer starts fresh too.
    """
    config = classifier_config(model, data.problem)
    if data.label_names:
        names = dict(enumerate(data.label_names))
        same = config.id2label == names and _same_problem(config, data.problem)
        config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    else:
        same = config.num_labels == data.outputs and config.problem_type == "regression"
        config.num_labels = data.outputs
    config.problem_type = None if data.problem == TAGS else data.problem
    network, unset = _load_weights(model, config, tokenizer, data.problem)
    if not same and not unset:
        logger.info("%s has a head for other labels; its output layer starts fresh", model)
        _renew_output_layer(network)
    return network


def _same_problem(config: PretrainedConfig, problem: str) -> bool:
    """Whether the head of a model, if it has one, was trained for ``problem``."""
    if problem == TAGS or task_said(config) == task_of(TAGS):
        return task_said(config) == task_of(problem)
    return config.problem_type in (None, problem)


def _load_weights(
    model: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, problem: str
) -> tuple[PreTrainedModel, list[str]]:
    """Load the classifier and the names of its head's weights that the checkpoint does not set."""
    set_padding(config, padding_id_of(config, tokenizer))
    auto_class = AUTO_CLASSES[task_of(problem)]
    what = f"{model!r} cannot be loaded for {task_of(problem).replace('_', ' ')}"
    advice = "; give a model with config.json and safetensors weights (pickled ones are not loaded)"
    loaded = load_weights(resolve_model(model), auto_class, torch.float32, what, advice, config)
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
    """fp32 logits as ``by_length`` returns them; never autocast: the scores are the weights'."""
    model.train(dropout)

    def logits(inputs: dict[str, Tensor], places: Tensor | None) -> Tensor:
        return answers(model, inputs, places)

    equal = moved_by_padding(model) > 0
    return by_length(encoded, batch_size, model.device, logits, equal)


def answers(model: PreTrainedModel, inputs: dict[str, Tensor], places: Tensor | None) -> Tensor:
    """A classifier's logits: [B,C], or at flat ``places`` [P] of the batch [P,C]. InputError,
    naming the model, where its own code fails.
    """
    with running(str(model.name_or_path)):
        logits: Tensor = model(**inputs).logits
    return logits if places is None else logits.flatten(0, 1)[places]


def places_of(encoded: EncodedTexts, rows: np.ndarray, inputs: dict[str, Tensor]) -> Tensor | None:
    """Where the words of some rows that are read are in a batch of them; None: whole texts."""
    if encoded.words is None:
        return None
    ids = inputs["input_ids"]
    return torch.from_numpy(encoded.places(rows, ids.shape[1])).to(ids.device)


@torch.inference_mode()
def by_length(
    encoded: EncodedTexts,
    batch_size: int,
    device: torch.device,
    run: Callable[[dict[str, Tensor], Tensor | None], Tensor],
    equal: bool = False,
) -> np.ndarray:
    """Run on batches of rows of like length, and return fp32 logits [N,C] in row order; of lists of
    words [W,C], in the order of all words, with NaN for those that are not read.

    ``equal``: of one length, for models that padding changes. Raises InputError for words' logits
    that are not finite.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    ends = np.flatnonzero(np.diff(encoded.lengths[order]) * equal) + 1
    batches = [
        rows[start : start + batch_size]
        for rows in np.split(order, ends)
        for start in range(0, len(rows), batch_size)
    ]
    each = []
    for rows in batches:
        inputs = collate(encoded, rows, device)
        each.append(run(inputs, places_of(encoded, rows, inputs)).float().cpu().numpy())
    found = np.concatenate(each)
    if encoded.words is None:
        logits = np.empty_like(found)
        logits[order] = found
        return logits
    check_finite(found)
    logits = np.full((sum(map(len, encoded.words)), found.shape[1]), np.nan, np.float32)
    logits[encoded.read_words(order)] = found
    return logits


def load_expert(
    model_dir: str, data: TaskData, max_length: int | None
) -> tuple[PreTrainedModel, EncodedTexts]:
    """Load a classifier with all its weights onto its device, and the texts as it reads them;
    InputError for one without a trained head.
    """
    tokenizer = padded_tokenizer(model_dir)
    config = classifier_config(model_dir, data.problem, trained=True)
    network, unset = _load_weights(model_dir, config, tokenizer, data.problem)
    if unset:
        raise InputError(
            f"{model_dir!r} has no trained classification head (missing: {', '.join(unset)}); "
            "fine-tune it first"
        )
    return network.to(place("fp32").device), encode(tokenizer, config, data, max_length)


def evaluate(
    model_dir: str, data: TaskData, *, max_length: int | None = None, batch_size: int = 64
) -> tuple[dict[str, float], np.ndarray]:
    """Score a fine-tuned model: (all fitting scores, fp32 logits [N,C] in the model's class order).

    Classes are matched by name, whatever their order; ``data`` may lack some of the model's. Raises
    InputError for a model without a trained head, of another problem or with other classes.
    """
    return evaluation(model_dir, data, max_length, batch_size)[:2]


def evaluation(
    model_dir: str, data: TaskData, max_length: int | None, batch_size: int
) -> tuple[dict[str, float], np.ndarray, float]:
    """``evaluate``, and which share of the texts was cut."""
    with quiet_transformers():
        names = _names_for(model_dir, data)
        network, encoded = load_expert(model_dir, data, max_length)
        cut = tell_cut({"dev": encoded})["dev"]
        logits = predict(network, encoded, batch_size)
    return scores_of(data, logits, names), logits, cut


def _names_for(model_dir: str, data: TaskData) -> list[str]:
    """The labels of a model's outputs; empty for scores. InputError where it does not answer what
    the task asks.
    """
    known = classifier_config(model_dir, data.problem, trained=True)
    names, who = [*known.id2label.values()], f"the {known.num_labels} outputs of {model_dir!r}"
    check_label_names(names, repr(model_dir))
    fits = not data.label_names and known.num_labels == data.outputs
    if fits and known.num_labels > 1 and known.problem_type is None:
        raise InputError(
            f"the task has scores, and the {known.num_labels} outputs of {model_dir!r} may be "
            f"classes: {SAY_SCORES}"
        )
    if fits and gives_scores(known):
        return []
    check_several_alike(data, known.problem_type, who)
    data.check_known(names, who)
    return names


def check_several_alike(data: TaskData, problem: str | None, who: str) -> None:
    """Raise InputError where labels exclude each other in the task, and not to ``who`` that answers
    by ``problem``, or the other way round.
    """
    if data.problem == SEVERAL and problem != SEVERAL:
        said = "may exclude each other" if problem is None else f"are a {problem}"
        wrong = '"problem_type": "multi_label_classification"'
        unsaid = f": if they do not, write {wrong} into its config.json" if problem is None else ""
        raise InputError(f"the task has labels of which several may hold, and {who} {said}{unsaid}")
    if data.problem != SEVERAL and problem == SEVERAL:
        raise InputError(
            f"{who} are labels of which several may hold, and the task is a {data.problem}: the "
            "largest would be taken for the only one. Give a task with lists of labels"
        )
