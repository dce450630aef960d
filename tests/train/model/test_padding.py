"""Padding ids that no embedding has, and those that are tokens of a text."""

import json
import logging
import shutil

import pytest
import torch
import transformers

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.plan.run import plan_run
from rekindle.train.config import StudentConfig
from rekindle.train.finetune.classifier import load_classifier, padded_tokenizer
from rekindle.train.finetune.task_data import read_task
from rekindle.train.model import padding
from rekindle.train.model.files import load_config, load_language_model
from rekindle.train.student import build_student
from testlib.families.language import language_model
from testlib.models import AUTO, NARROW
from testlib.vocabularies.changed import that_begins_only


@pytest.fixture(autouse=True)
def _told_anew():
    padding._log_once.cache_clear()


def with_padding(model, target, number):
    shutil.copytree(model, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | {"pad_token_id": number}))
    return target


@pytest.fixture
def outside(tmp_path, make_model, wordpiece):
    """outside(family, task): a model whose padding id, 5,000, is outside its vocabulary."""

    def make(family, task):
        model = make_model(family, AUTO[task], wordpiece, 3, **NARROW)
        return with_padding(model, tmp_path / f"{family}-{task}", 5_000)

    return make


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "masked_lm"),
        ("modernbert", "masked_lm"),
        ("llama", "causal_lm"),
        ("llama", "sequence_classification"),
    ],
)
def test_a_teacher_whose_padding_id_is_outside_its_vocabulary(
    tmp_path, configure, outside, caplog, family, task
):
    """A finished teacher has no need of it: plan and stage 1 go on without, and say so once."""
    teacher = {"name": "t", "model": str(outside(family, task)), "task": task}
    config = configure(tmp_path / "cache", [teacher], {"limit_sequences": 5})
    with caplog.at_level(logging.INFO, "rekindle"):
        plan_run(config, probe=False)
        assert cache_teachers(config).units_done > 0
    told = [r.message for r in caplog.records if "pad_token_id" in r.message]
    assert len(told) == 1
    assert "pad_token_id 5,000 is outside the vocabulary of 168 tokens" in told[0]


def test_a_student_and_a_classifier_whose_padding_id_is_outside(tmp_path, outside):
    student = StudentConfig(model=str(outside("bert", "masked_lm")))
    assert build_student(student, {}, 168, 0).model.config.pad_token_id is None
    (tmp_path / "train.jsonl").write_text(
        "".join(
            json.dumps({"text": f"the river {n}", "label": "ab"[n % 2]}) + "\n" for n in range(8)
        )
    )
    (data,) = read_task(str(tmp_path / "train.jsonl"))
    model = str(outside("llama", "causal_lm"))
    network = load_classifier(model, padded_tokenizer(model), data)
    assert network.config.pad_token_id == 0  # its tokenizer's


def test_positions_that_are_numbered_from_an_impossible_id_are_refused(outside):
    with pytest.raises(InputError, match=r"pad_token_id 5,000 is outside.*numbers its positions"):
        load_config(outside("roberta", "masked_lm"))


# --- new weights ----------------------------------------------------------------------------------


def scratch(model, tokenizer, task="masked_lm"):
    config = StudentConfig(model=str(model), task=task, from_scratch=True)
    loaded = load_tokenizer(str(tokenizer))
    return build_student(config, {}, loaded.size, 0, tokenizer=loaded).model


def test_modernberts_own_default_in_a_small_vocabulary(tmp_path, wordpiece):
    """50,283 is what transformers fills in where config.json names none."""
    sizes = NARROW | {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 168}
    values = {"model_type": "modernbert", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert transformers.ModernBertConfig().pad_token_id > 168
    assert scratch(tmp_path, wordpiece).config.pad_token_id is None


@pytest.mark.parametrize(("own", "right"), [(60, 0), (2, 0), (4, 0), (0, 0), (None, None)])
def test_no_token_of_a_text_is_taken_for_padding(tmp_path, make_model, wordpiece, own, right):
    """An ordinary token, [CLS] and [MASK]: they would stay zeros. [PAD] is right."""
    made = make_model("bert", AUTO["masked_lm"], wordpiece, 3, **NARROW)
    model = scratch(with_padding(made, tmp_path / "model", own), wordpiece)
    assert model.config.pad_token_id == right
    weights = model.get_input_embeddings().weight
    assert [row for row in range(168) if not weights[row].any()] == ([] if right is None else [0])
    model(input_ids=torch.tensor([[2, 60, 4, 3]])).logits.sum().backward()
    assert weights.grad[60].any()


def test_an_end_of_text_that_pads_is_embedded(tmp_path, make_model, bytelevel, caplog):
    """As causal models are often padded."""
    tokenizer = that_begins_only(bytelevel, tmp_path / "tokenizer")
    end = load_tokenizer(str(tokenizer)).eos_id
    made = make_model("llama", AUTO["causal_lm"], tokenizer, 3, **NARROW)
    with caplog.at_level(logging.INFO, "rekindle"):
        model = scratch(with_padding(made, tmp_path / "model", end), tokenizer, "causal_lm")
    assert model.config.pad_token_id is None
    assert model.get_input_embeddings().weight[end].any()
    assert "'<|endoftext|>' of the tokenizer, which would never be embedded; none" in caplog.text


def test_roberta_counts_from_the_padding_id_that_it_is_given(
    tmp_path, make_model, wordpiece, bytelevel
):
    made = make_model("roberta", AUTO["masked_lm"], wordpiece, 3, **NARROW)
    model = scratch(with_padding(made, tmp_path / "model", 60), wordpiece)
    assert model.config.pad_token_id == 0
    made = make_model("roberta", AUTO["masked_lm"], bytelevel, 3, **NARROW)
    with pytest.raises(InputError, match=r"numbers its positions from it\. Write another there"):
        scratch(with_padding(made, tmp_path / "bytes", 60), bytelevel)  # it has no padding token


def test_a_configuration_without_the_key_and_one_with_a_text_part():
    """CodeGen has none; heads of composite models read that of the text part."""
    assert padding.padding_of(transformers.CodeGenConfig()) is None
    config = transformers.Gemma3Config()
    padding.set_padding(config, 7)
    assert config.pad_token_id == config.get_text_config().pad_token_id == 7


def test_a_big_bird_says_the_same_whatever_it_was_shown_before(tmp_path, caplog):
    """transformers' changes to full attention at a short text, for good."""
    language_model("BigBird").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    sparse = settings | {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    with caplog.at_level(logging.INFO, "rekindle"):
        model = load_language_model(tmp_path, "masked_lm").eval()
    assert "original_full is used from the start" in caplog.text
    long, short = torch.arange(5, 25)[None], torch.arange(5, 9)[None]
    with torch.no_grad():
        before, _, after = (model(input_ids=ids).logits for ids in (long, short, long))
    assert torch.equal(before, after)
