"""Which tasks and inputs a model is for, by its configuration alone: no weights are read.

What a language model actually sees is tried once it is loaded (``sight.py``).
"""

import re
from typing import TYPE_CHECKING

from rekindle.data.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AUTO_CLASSES = {
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
}
TEXT_ENCODER = "AutoModelForTextEncoding"  # the encoder alone, for families that have a decoder too
LANGUAGE = ("masked_lm", "causal_lm")
# Settings that make a model's attention two-sided.
TWO_SIDED = {
    "is_causal": (False,),
    "use_bidirectional_attention": (True, "all"),
    "causal": (False,),
}
# Of the names of classes: those of language models, and the task that other ones say.
LANGUAGE_MODELS = r"CausalLM|LMHead|MaskedLM|ForPreTraining|ConditionalGeneration|DoubleHeads"
CLASSIFIERS = r"(Sequence|Token)Classification"
CLASS_TASKS = {
    r"MaskedLM|ForPreTraining$": "masked_lm",
    r"CausalLM|LMHead": "causal_lm",
    r"SequenceClassification": "sequence_classification",
    r"TokenClassification": "token_classification",
}


def check_fits(config: "PretrainedConfig", task: str, subject: str, trained: bool = True) -> None:
    """Raise InputError, naming the right task, if a model of ``config`` does not fit ``task``.

    Messages begin with ``subject``: teacher 'x', student 'y'. ``trained``: weights are loaded, so
    what ``architectures`` says of them counts. Two-sided families that can be made causal are asked
    whether they were.
    """
    family, alternative = config.model_type, _alternative(config, task)
    if task in LANGUAGE and getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{subject}: {family} is an encoder and a decoder: it predicts another text, not the "
            "tokens of its own. A masked_lm is an encoder alone, a causal_lm a "
            f"decoder{alternative}"
        )
    if not _has_class(config, task):
        raise InputError(
            f"{subject}: transformers has no {auto_class_of(config, task)} of the family "
            f"{family}{alternative}"
        )
    if task == "causal_lm" and (setting := _two_sided(config)) is not None:
        is_masked_lm = _has_class(config, "masked_lm")
        advice = "say `task: masked_lm`" if is_masked_lm else "embedders are not language models"
        raise InputError(
            f"{subject}: {family} with {setting} sees both sides of a token, so it is not a causal "
            f"LM and would have seen what it predicts; {advice}"
        )
    architectures = config.architectures or []
    if (
        trained
        and task in LANGUAGE
        and architectures
        and not any(map(_is_language_model, architectures))
    ):
        raise InputError(
            f"{subject}: it was saved as {architectures[0]}, which has no output over the "
            f"vocabulary: as a {task} it would predict with a matrix that was never trained for it"
            f"{_alternative(config, task, architectures[0])}"
        )
    class_ending = AUTO_CLASSES[task].removeprefix("AutoModel")
    heads = [name for name in architectures if re.search(CLASSIFIERS, name)]
    if (
        trained
        and task not in LANGUAGE
        and heads
        and not any(class_ending in name for name in heads)
    ):
        unit = "a whole sequence" if "Sequence" in heads[0] else "each token"
        raise InputError(
            f"{subject}: it was saved as {heads[0]}, whose head was trained to classify {unit}: as "
            f"{task} it would answer what it never learnt{_alternative(config, task)}"
        )


def auto_class_of(config: "PretrainedConfig", task: str) -> str:
    """Return the Auto class that loads a model for ``task``."""
    if task != "embedding":
        return AUTO_CLASSES[task]
    import transformers

    encoders = getattr(transformers, TEXT_ENCODER)._model_mapping
    # T5's encoder, saved alone, says that it is not an encoder and decoder, yet AutoModel makes
    # both.
    is_encoder_alone = type(config) in encoders and encoders[type(config)].__name__.endswith(
        "EncoderModel"
    )
    has_decoder = getattr(config, "is_encoder_decoder", False)
    return TEXT_ENCODER if is_encoder_alone or has_decoder else AUTO_CLASSES[task]


def recorded_task(config: "PretrainedConfig") -> str | None:
    """Return the task that a model was saved for, if the name of its class says one."""
    for name in config.architectures or []:
        for form, task in CLASS_TASKS.items():
            if re.search(form, name):
                return task
    return None


def _two_sided(config: "PretrainedConfig") -> str | None:
    """Return the setting by which a model says that it sees later tokens."""
    text = config.get_text_config()
    for name, values in TWO_SIDED.items():
        if (value := getattr(text, name, None)) in values and value is not None:
            return f"{name}: {str(value).lower()}"
    decides = _has_class(config, "masked_lm") and not getattr(text, "causal", False)
    if decides and getattr(text, "is_decoder", None) is False:
        return "is_decoder: false"
    return "its permutations" if text.model_type == "xlnet" else None


def _is_language_model(name: str) -> bool:
    from transformers.models.auto import modeling_auto as auto

    known = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    listed = any(name in names.values() for names in known)  # for BertGenerationDecoder
    return listed or re.search(LANGUAGE_MODELS, name) is not None


def _has_class(config: "PretrainedConfig", task: str) -> bool:
    import transformers

    return type(config) in getattr(transformers, auto_class_of(config, task))._model_mapping


def _alternative(config: "PretrainedConfig", task: str, saved_as: str = "") -> str:
    """Return the end of a message: the task that is meant, as far as known."""
    recorded = recorded_task(config)
    if recorded not in (None, task) and (recorded not in LANGUAGE or _has_class(config, recorded)):
        return f"; say `task: {recorded}`"
    if saved_as:
        return ". Give the language model itself, saved by AutoModelFor…LM"
    language = () if getattr(config, "is_encoder_decoder", False) else LANGUAGE
    tasks = [t for t in AUTO_CLASSES if t != "embedding"]  # any model can give embeddings
    possible = [t for t in tasks if t not in (task, *LANGUAGE) or t in language]
    possible = [t for t in possible if t != task and _has_class(config, t)]
    return f"; it can be {', '.join(possible)}" if possible else ""


def knows_segments(config: "PretrainedConfig") -> bool:
    """Return whether a model has embeddings of two segments or more.

    ``token_type_ids`` are only for such models: GPT-2 and similar models take them for words, and
    add the embedding of token 0 to every place.
    """
    return (getattr(config.get_text_config(), "type_vocab_size", None) or 0) >= 2
