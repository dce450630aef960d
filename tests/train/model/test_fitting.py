"""A model that is not for a task is told the right one, by its configuration alone."""

import pytest
import transformers

from rekindle.data.errors import InputError
from rekindle.train.model.fitting import check_fits


def configured(family: str, saved_as: str | None = None, **values: object):
    config = getattr(transformers, f"{family}Config")(**values)
    config.architectures = [saved_as] if saved_as else None
    return config


# (the configuration, the task that is asked for, what is said of it)
WRONG = {
    "t5 as masked": (configured("T5"), "masked_lm", "encoder and a decoder.*can be sequence_class"),
    "bart as causal": (configured("Bart"), "causal_lm", "bart is an encoder and a decoder"),
    "bert as causal": (configured("Bert"), "causal_lm", "is_decoder: false .*`task: masked_lm`"),
    "xlm": (configured("XLM"), "causal_lm", "causal: false sees both sides.*`task: masked_lm`"),
    "xlnet": (configured("XLNet"), "causal_lm", "its permutations sees both sides"),
    "an embedder": (
        configured("Llama", is_causal=False),
        "causal_lm",
        "is_causal: false sees both",
    ),
    "gemma's embedder": (
        configured("Gemma3Text", use_bidirectional_attention=True),
        "causal_lm",
        "use_bidirectional_attention: true .*embedders are not language models",
    ),
    "llama as masked": (
        configured("Llama", "LlamaForCausalLM"),
        "masked_lm",
        "no AutoModelForMaskedLM of the family llama; say `task: causal_lm`",
    ),
    "modernbert as causal": (
        configured("ModernBert", "ModernBertForMaskedLM"),
        "causal_lm",
        "no AutoModelForCausalLM of the family modernbert; say `task: masked_lm`",
    ),
    "a body": (configured("Qwen2", "Qwen2Model"), "causal_lm", "Qwen2Model, which has no output"),
    "a reward model": (
        configured("Llama", "LlamaForSequenceClassification"),
        "causal_lm",
        "no output over the vocabulary.*say `task: sequence_classification`",
    ),
    "a tagger": (
        configured("Bert", "BertForTokenClassification"),
        "masked_lm",
        "say `task: token_classification`",
    ),
    "a classifier of texts as tagger": (
        configured("Bert", "BertForSequenceClassification"),
        "token_classification",
        "to classify a whole sequence.*say `task: sequence_classification`",
    ),
    "a tagger of words as scorer": (
        configured("Bert", "BertForTokenClassification"),
        "regression",
        "to classify each token.*say `task: token_classification`",
    ),
    "mamba as classifier": (
        configured("Mamba", "MambaForCausalLM"),
        "sequence_classification",
        "no AutoModelForSequenceClassification of the family mamba; say `task: causal_lm`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_right_task_is_said(name):
    config, task, told = WRONG[name]
    with pytest.raises(InputError, match=f"(?s)^teacher 'x': .*{told}"):
        check_fits(config, task, "teacher 'x'")


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (configured("Llama"), "causal_lm"),  # nothing said of its weights
        (configured("GPT2", "GPT2LMHeadModel"), "causal_lm"),
        (configured("Bert", "BertForPreTraining"), "masked_lm"),
        (configured("Bert", "BertLMHeadModel", is_decoder=True), "causal_lm"),
        (configured("BertGeneration", "BertGenerationDecoder"), "causal_lm"),
        (configured("XLM", "XLMWithLMHeadModel", causal=True), "causal_lm"),
        (configured("Llama", "MyOwnLlamaForCausalLM"), "causal_lm"),
        (configured("T5", "T5ForSequenceClassification"), "sequence_classification"),
        (configured("Bert", "BertModel"), "sequence_classification"),
        (configured("Bert", "BertForSequenceClassification"), "regression"),
    ],
)
def test_what_fits_is_not_refused(config, task):
    check_fits(config, task, "teacher 'x'")


def test_weights_alone_are_judged_by_the_class_that_saved_them():
    check_fits(configured("Qwen2", "Qwen2Model"), "causal_lm", "student 'x'", trained=False)
