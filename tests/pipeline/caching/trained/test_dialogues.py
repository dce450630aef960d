"""Both stages on a corpus of dialogues and texts: teachers and students at trained tokens alone.

The truth is transformers' own, dialogue by dialogue: the ids of the chat template, and its mask of
what the assistant says.
"""

import json
from shutil import copytree

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.checks.inspect import inspect_cache, inspect_example
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.text import format_plan
from rekindle.train.config import StudentConfig
from rekindle.train.hf.collator import labels_of
from rekindle.train.loop import train_student
from rekindle.train.record.run_log import read_metrics
from testlib.loop import train_config
from testlib.vocabularies.dialogues import DIALOGUES, MARKED, chat_tokenizer, write_rows

TEXTS = ["the old river runs under a new city", "light falls over the quick engine"]
SHOWN = [d for d in DIALOGUES if d["messages"][-1]["content"] != "without an answer"]
LENGTH = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory, wordpiece):
    return chat_tokenizer(wordpiece, tmp_path_factory.mktemp("chat"), MARKED)


@pytest.fixture(scope="module")
def models(make_model, folder):
    """A teacher and a student, decoders of the corpus's tokenizer."""
    return [str(make_model("llama", "AutoModelForCausalLM", folder, seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, folder):
    """Names of special tokens in messages are tokens, as transformers has it."""
    path = tmp_path_factory.mktemp("rows")
    chat = write_rows(path / "chat.jsonl", [d | {"domain": "chat"} for d in DIALOGUES])
    texts = write_rows(path / "texts.jsonl", [{"text": t, "domain": "text"} for t in TEXTS])
    return {
        "source": [{"path": str(chat), "format": "chat"}, str(texts)],
        "tokenizer": str(folder),
        "sequence_length": LENGTH,
        "special_tokens": "token",
        "limit_sequences": None,
    }


@pytest.fixture(scope="module")
def teachers(models):
    return [{"name": "t", "model": models[0], "task": "causal_lm", "targets": {"kind": "dense"}}]


@pytest.fixture(scope="module")
def config(tmp_path_factory, teachers, corpus, make_cache):
    return make_cache(tmp_path_factory.mktemp("made") / "cache", teachers, corpus)


@pytest.fixture
def cache(config):
    return Cache.open(config.cache.path)


@pytest.fixture(scope="module")
def truth(folder):
    """(ids, what is trained) of each sequence."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for dialogue in SHOWN:
        whole = tokenizer.apply_chat_template(
            dialogue["messages"],
            tools=dialogue.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        found.append((whole["input_ids"][:LENGTH], whole["assistant_masks"][:LENGTH]))
    return found + [(ids, [1] * len(ids)) for ids in map(tokenizer.encode, TEXTS)]


def log_probs(model, ids):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model).eval()(torch.tensor([ids])).logits
    return torch.log_softmax(logits[0].double(), dim=-1)


def test_a_teacher_is_kept_where_the_next_token_is_trained(cache, models, truth):
    assert len(cache) == len(truth)
    for number, (ids, trained) in enumerate(truth):
        example = cache.example(number)
        assert example.input_ids.tolist() == ids
        (target,) = example.targets["t"]
        places = [place for place in range(len(ids) - 1) if trained[place + 1]]
        assert target.positions.tolist() == places
        expected = log_probs(models[0], ids)[places]
        gold = expected[range(len(places)), [ids[place + 1] for place in places]]
        np.testing.assert_allclose(target.gold_log_prob, gold, atol=2e-3)
    assert not verify_cache(str(cache.store.location)).problems


def test_both_losses_are_means_over_trained_tokens(tmp_path, cache, models, truth):
    """One step on all sequences, at the weights that the student begins with."""
    ce, kd = [], []
    for ids, trained in truth:
        places = [place for place in range(len(ids) - 1) if trained[place + 1]]
        theirs, ours = (log_probs(model, ids)[places] for model in models)
        ce += (-ours[range(len(places)), [ids[place + 1] for place in places]]).tolist()
        kd += (theirs.exp() * (theirs - ours)).sum(dim=1).tolist()
    more = {"steps": 1, "batch_sequences": len(truth), "held_out": 0, "warmup_steps": 0}
    config = train_config([{"teachers": ["t"]}], **more, micro_batch_sequences=3)
    about = StudentConfig(model=models[1], task="causal_lm")
    result = train_student(cache, about, config, tmp_path / "run")
    (step,) = [one for one in read_metrics(tmp_path / "run") if one["kind"] == "train"]
    assert step["ce"] == pytest.approx(np.mean(ce), rel=2e-3)
    assert step["kd/t"] == pytest.approx(np.mean(kd), rel=5e-3)
    assert result.coverage["positions_with_kd"] == len(ce) == sum(sum(t[1:]) for _, t in truth)
    assert result.coverage["positions_ce_only"] == 0


def test_labels_of_any_batch_are_those_of_its_sequences(cache, truth):
    """Whatever the order, the batch and the part of it."""
    for batch in cache.batches(batch_sequences=4, seed=3):
        for part in (batch, batch.take(slice(1, 3))):
            labels = labels_of(part, "causal_lm").numpy()
            for number, row, length in zip(part.index, labels, part.lengths, strict=True):
                ids, trained = truth[number]
                wanted = [i if t else -100 for i, t in zip(ids, trained, strict=True)]
                assert row[:length].tolist() == wanted
                assert (row[length:] == -100).all()


def test_targets_of_an_engine_are_taken_where_they_are_trained(tmp_path, config, models, truth):
    """It says something of every token of a dialogue."""
    copytree(config.cache.path, tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    rows = []
    for number, (ids, _) in enumerate(truth):
        top = log_probs(models[1], ids)[:-1].topk(5, dim=1)
        said = {"ids": top.indices.tolist(), "log_probs": top.values.tolist()}
        rows.append({"index": number, "input_ids": ids} | said)
    cache.import_targets("there", rows, {"model": "x"}, task="causal_lm", k=5)
    for number, (ids, trained) in enumerate(truth):
        (target,) = cache.example(number).targets["there"]
        places = [place for place in range(len(ids) - 1) if trained[place + 1]]
        assert target.positions.tolist() == places
        assert target.ids[:, 0].tolist() == [rows[number]["ids"][place][0] for place in places]


def test_it_is_told_what_is_trained(tmp_path, config, cache, configure, teachers, corpus, truth):
    trained, every = (sum(map(sum, part)) for part in ([t for _, t in truth], []))
    every = sum(len(ids) for ids, _ in truth)
    said = f"{trained / every:.1%}"
    assert f"trained: {trained} tokens, {said} of all" in inspect_cache(config.cache.path)
    facts = json.loads(inspect_cache(config.cache.path, as_json=True))["corpus"]
    assert (facts["tokens"], facts["trained_tokens"]) == (every, trained)
    assert "tokens: runs under a river" in inspect_example(config.cache.path, 0, None)
    planned = plan_run(configure(tmp_path / "none", teachers, corpus), probe=False)
    assert (planned.corpus.sequences, planned.corpus.tokens) == (len(truth), every)
    assert planned.corpus.trained == trained / every
    assert f"({said} of them trained)" in " ".join(format_plan(planned).split())
    assert planned.teachers[0].positions == pytest.approx(trained, abs=len(truth))


def test_an_expert_on_texts_is_refused_where_there_are_tokens_alone():
    values = {"corpus": {"source": "p", "tokenizer": "t", "format": "tokens"}}
    expert = {"name": "x", "model": "m", "task": "sequence_classification"}
    with pytest.raises(InputError, match="reads texts, and rows of the format tokens have none"):
        parse_settings(RunConfig, values | {"cache": {"path": "c"}, "teachers": [expert]})
