"""A model's tokenizer is another one only where an id of the corpus is another token to it."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.train.config import StudentConfig
from rekindle.train.prepare import load_checked_tokenizer
from testlib.models import NARROW
from testlib.run_alone import NOISE, logits_of
from testlib.vocabularies.changed import renumbered, with_gaps, with_more

CAUSAL = "AutoModelForCausalLM"
CHAT = ["<|im_start|>", "<|im_end|>"]
KINDS = {
    "topk": {"kind": "topk", "k": 8, "temperatures": [1.0]},
    "threshold": {"kind": "threshold", "k": 8},
    "random": {"kind": "random", "k": 40},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}


@pytest.fixture(scope="module")
def size(wordpiece):
    return load_tokenizer(str(wordpiece)).size


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, make_model, wordpiece, size):
    """Two tokens more, which get much of its mass, and rows that pad its vocabulary."""
    chat = with_more(wordpiece, tmp_path_factory.mktemp("chat") / "tokenizer", CHAT)
    made = make_model("gpt2", CAUSAL, chat, 3, n_embd=16, vocab_size=size + 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(made))
    with torch.no_grad():
        model.lm_head.weight[size:] = 1.2 * model.lm_head.weight[20:28]
    model.save_pretrained(made)
    return made


def teachers_of(model):
    base = {"model": str(model), "task": "causal_lm"}
    return [base | {"name": name, "targets": targets} for name, targets in KINDS.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_cache, chat_model):
    return make_cache(tmp_path_factory.mktemp("chat") / "cache", teachers_of(chat_model))


def test_what_a_teacher_has_above_joins_the_tail_and_else_takes_no_part(made, chat_model, size):
    assert verify_cache(made.cache.path).problems == []
    cache = Cache.open(made.cache.path)
    assert {cache.teacher(name).info.vocabulary_size for name in KINDS} == {size}
    moved = 0.0
    for index in range(0, len(cache), 4):
        example = cache.example(index)
        logits = logits_of(chat_model, CAUSAL, input_ids=example.input_ids)[:-1]
        common = torch.log_softmax(logits[:, :size], -1).numpy()
        own = torch.log_softmax(logits[:, : size + 2], -1).numpy()
        moved = max(moved, float(np.exp(own[:, size:]).sum(axis=1).max()))
        for name in KINDS:
            (found,) = example.targets[name]
            exact = own if name == "topk" else common
            gold = np.take_along_axis(exact, found.gold_ids[:, None], 1)[:, 0]
            assert np.abs(found.gold_log_prob - gold).max() < 1 / 1024 + NOISE, name
            assert found.ids.max() < size
        (top,) = example.targets["topk"]
        kept = np.take_along_axis(own, top.ids, 1).astype(np.float64)
        tail = 1 - np.exp(kept).sum(axis=1)
        assert np.abs(np.exp(top.log_tail[1.0]) - tail).max() < 2e-3
        (dense,), (hidden,) = example.targets["dense"], example.targets["hidden"]
        assert np.abs(dense.log_probs - common).max() < 2 * NOISE
        assert np.abs(np.exp(hidden.log_probs) - np.exp(common)).max() < 5e-3
    assert moved > 0.05


def test_an_audit_of_it_finds_nothing(made):
    report = audit_cache(made.cache.path, made, 3)
    assert report.problems == []
    assert {*report.values} == {*KINDS}


def test_a_teacher_without_the_students_chat_tokens(tmp_path, make_cache, make_model, wordpiece):
    """The corpus's tokenizer has the more tokens; its text has none of them."""
    chat = with_more(wordpiece, tmp_path / "chat", CHAT)
    model = make_model("gpt2", CAUSAL, wordpiece, 4, n_embd=16)
    make_cache(tmp_path / "cache", teachers_of(model), {"tokenizer": str(chat)})
    cache = Cache.open(tmp_path / "cache")
    size = cache.teacher("dense").info.vocabulary_size
    assert size == load_tokenizer(str(wordpiece)).size + len(CHAT)
    example = cache.example(0)
    exact = torch.log_softmax(logits_of(model, CAUSAL, input_ids=example.input_ids)[:-1], -1)
    for name in ("dense", "hidden"):
        (found,) = example.targets[name]
        assert np.exp(found.log_probs[:, size - 2 :]).max() < 1e-30
        error = np.abs(np.exp(found.log_probs[:, : size - 2]) - exact.exp().numpy()).max()
        assert error < 5e-3
    assert verify_cache(str(tmp_path / "cache")).problems == []


def test_a_token_that_no_text_has_may_be_another(
    tmp_path, configure, make_model, wordpiece, caplog
):
    """ "z" is in no word of the corpus; to the teacher its id is nothing."""
    vocabulary = load_tokenizer(str(wordpiece)).hf.get_vocab()
    path = renumbered(wordpiece, tmp_path / "other", {"z": 300})
    teacher = {
        "name": "lm",
        "model": str(make_model("gpt2", CAUSAL, path, 4, n_embd=16)),
        "task": "causal_lm",
        "targets": {"kind": "topk", "k": 100_000, "temperatures": [1.0]},
    }
    with caplog.at_level(logging.INFO, "rekindle"):
        cache_teachers(configure(tmp_path / "cache", [teacher]))
    assert "other tokens, or none, under 1 ids" in caplog.text
    cache = Cache.open(tmp_path / "cache")
    assert cache.teacher("lm").info.k == len(vocabulary) - 1
    (found,) = cache.example(0).targets["lm"]
    assert not (found.ids == vocabulary["z"]).any()
    masked = teacher | {
        "task": "masked_lm",
        "model": str(make_model("bert", "AutoModelForMaskedLM", path, 4, **NARROW)),
    }
    with pytest.raises(InputError, match=r"'z' here, no token there"):  # masks may draw it
        cache_teachers(configure(tmp_path / "masked", [masked]))


def test_a_students_attention_goes_before_its_folders(made, chat_model, tmp_path):
    model = Path(shutil.copytree(chat_model, tmp_path / "m"))
    settings = json.loads((model / "config.json").read_text())
    settings["attn_implementation"] = "flash_attention_2"
    (model / "config.json").write_text(json.dumps(settings))
    config = StudentConfig(model=str(model), task="causal_lm", attention="sdpa")
    assert load_checked_tokenizer(Cache.open(made.cache.path).corpus, config).size


def test_a_student_with_more_tokens_is_no_other(made, chat_model, tmp_path, make_model, wordpiece):
    cache = Cache.open(made.cache.path)

    def student(model, task="causal_lm"):
        return parse_settings(StudentConfig, {"model": str(model), "task": task})

    assert {"<|im_end|>"} < {
        *load_checked_tokenizer(cache.corpus, student(chat_model)).hf.get_vocab()
    }  # is kept
    other = with_gaps(wordpiece, tmp_path / "other", ["the"])
    model = make_model("gpt2", CAUSAL, other, 4, n_embd=16)
    with pytest.raises(InputError, match=r"student .* has another tokenizer.*'the' here, no token"):
        load_checked_tokenizer(cache.corpus, student(model))


def test_an_embedding_that_is_too_short_is_no_other_tokenizer(
    tmp_path, configure, make_model, wordpiece, size
):
    short = make_model("bert", "AutoModelForMaskedLM", wordpiece, vocab_size=size - 3, **NARROW)
    teacher = {"name": "lm", "model": str(short), "task": "masked_lm", "targets": {"kind": "dense"}}
    told = (
        rf"'lm' has {size - 3} rows in its embedding, fewer than its tokenizer has ids \({size}\)"
    )
    with pytest.raises(InputError, match=told + r".*id \d+ \('.*'\), which has no row.*resize_tok"):
        cache_teachers(configure(tmp_path / "cache", [teacher]))
