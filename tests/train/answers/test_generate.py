"""What a causal LM writes on from prompts: rows of tokens for a corpus."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.corpus.remarks import remarks
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.store import LocalStore
from rekindle.train.answers.config import GenerateConfig
from rekindle.train.answers.generate import generate_file
from rekindle.train.model.files import weights_fingerprint
from testlib.vocabularies.dialogues import MARKED, chat_tokenizer, said, write_rows

NEW = 6
PROMPTS = [
    {"prompt": "the old river", "domain": "a"},
    {"prompt": "light", "id": "own", "domain": "b"},
    {"messages": said("u: which city?"), "domain": "a"},
    {"messages": said("s: be quick", "u: water?", "a: the answer that is left away")},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bytelevel):
    return chat_tokenizer(bytelevel, tmp_path_factory.mktemp("chat"), MARKED)


@pytest.fixture(scope="module")
def model(make_model, folder):
    return str(make_model("gpt2", "AutoModelForCausalLM", folder, 5))


@pytest.fixture
def generate(tmp_path, model):
    def made(rows=PROMPTS, out="out.jsonl", of=model, force=False, **settings):
        path = write_rows(tmp_path / "prompts.jsonl", rows)
        config = parse_settings(
            GenerateConfig, {"max_new_tokens": NEW, "precision": "fp32"} | settings
        )
        target = tmp_path / out
        found = generate_file(of, str(path), str(target), config=config, force=force)
        return found, [json.loads(line) for line in target.read_text().splitlines()]

    return made


def prompts_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [PROMPTS[2]["messages"], PROMPTS[3]["messages"][:-1]]
    written = {"add_generation_prompt": True, "return_dict": False}
    texts = [tokenizer(row["prompt"])["input_ids"] for row in PROMPTS[:2]]
    return texts + [tokenizer.apply_chat_template(messages, **written) for messages in chat]


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_the_likeliest_tokens_by_hand_whatever_the_batch(generate, model, folder, batch_tokens):
    found, rows = generate(temperature=0, batch_tokens=batch_tokens)
    network, tokens = AutoModelForCausalLM.from_pretrained(model).eval(), 0
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    for row, prompt in zip(rows, prompts_of(folder), strict=True):
        ids = [*prompt]
        while len(ids) < len(prompt) + NEW and end not in ids[len(prompt) :]:
            with torch.no_grad():
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        assert row["input_ids"] == ids
        assert row["loss_mask"] == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        tokens += len(ids) - len(prompt)
    assert (found.rows, found.tokens) == (4, tokens)
    names = ["prompts.jsonl:1", "own", "prompts.jsonl:3", "prompts.jsonl:4"]
    assert [row["id"] for row in rows] == names
    assert [row.get("domain") for row in rows] == ["a", "b", "a", None]


def test_draws_are_of_the_models_own_distribution(generate, model, folder):
    count = 4000
    _, rows = generate(PROMPTS[:1], samples=count, max_new_tokens=1, batch_tokens=10**6)
    assert [row["id"] for row in rows[:2]] == ["prompts.jsonl:1#0", "prompts.jsonl:1#1"]
    (prompt, *_) = prompts_of(folder)
    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(model).eval()
        probs = network(torch.tensor([prompt])).logits[0, -1].double().softmax(0).numpy()
    drawn = Counter(row["input_ids"][-1] for row in rows)
    found = np.array([drawn[number] for number in range(len(probs))]) / count
    spread = np.sqrt(probs * (1 - probs) / count)
    assert (np.abs(found - probs) < 5 * spread + 1.5 / count).all()


def test_a_text_may_be_cut_to_its_beginning(generate, folder):
    _, rows = generate(PROMPTS[:1], prompt_tokens=2)
    assert rows[0]["input_ids"][:2] == prompts_of(folder)[0][:2]
    assert rows[0]["loss_mask"][:3] == [0, 0, 1]


def test_a_seed_says_what_is_drawn(generate):
    first, again = (generate(out=name, seed=1)[1] for name in ("a", "b"))
    other = generate(out="c", seed=2)[1]
    assert first == again != other


def test_a_corpus_is_made_of_it_that_knows_where_it_is_from(generate, tmp_path, model, folder):
    _, rows = generate()
    about = json.loads((tmp_path / "out.jsonl.about.json").read_text())
    assert about["weights"] == weights_fingerprint(Path(model))
    source = {"path": str(tmp_path / "out.jsonl"), "format": "tokens"}
    given = {"source": [source], "domain_field": None, "sequence_length": 64}
    config = CorpusConfig(**given, tokenizer=model)
    corpus = build_corpus(LocalStore(tmp_path / "cache"), config, 4)
    found = corpus.shard(0).table().to_pylist()
    assert [row["input_ids"] for row in found] == [row["input_ids"] for row in rows]
    assert [row["trained"] for row in found] == [[*map(bool, row["loss_mask"])] for row in rows]
    told = f"generated by {model} (weights {weights_fingerprint(Path(model))[:12]})"
    assert any(told in line for line in remarks(corpus))


@pytest.mark.parametrize("step", range(4))
def test_killed_at_any_step_no_rows_stand_without_what_tells_of_them(
    generate, tmp_path, monkeypatch, step
):
    first, _ = generate(seed=0, limit=1)
    taken = []

    def killed(change):
        def stopped(*given, **named):
            taken.append(change)
            if len(taken) > step:
                raise KeyboardInterrupt
            return change(*given, **named)

        return stopped

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink"):
            patch.setattr(os, name, killed(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            generate(seed=1, limit=2, force=True)
    out, beside = Path(first.out), Path(f"{first.out}.about.json")
    if out.exists():
        told = json.loads(beside.read_text())["settings"]
        assert told["limit"] == len(out.read_text().splitlines())


def test_another_tokenizer_is_refused(generate, tmp_path, bytelevel):
    generate()
    source = {"path": str(tmp_path / "out.jsonl"), "format": "tokens"}
    config = CorpusConfig(source=[source], tokenizer=str(bytelevel))
    with pytest.raises(InputError, match=r"with another tokenizer than corpus\.tokenizer"):
        build_corpus(LocalStore(tmp_path / "cache"), config, 4)
    (tmp_path / "out.jsonl.about.json").write_text("{}")
    with pytest.raises(InputError, match=r"cannot be read \(it must say model"):
        build_corpus(LocalStore(tmp_path / "cache"), config, 4)


def test_an_end_that_is_no_token_is_refused_by_its_key(generate, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    settings = json.dumps({"eos_token_id": [3, {"a": 3}]})
    (tmp_path / "model/generation_config.json").write_text(settings)
    told = r"model/generation_config\.json: eos_token_id is \[3, \{'a': 3\}\]"
    with pytest.raises(InputError, match=told):
        generate(of=str(tmp_path / "model"))


def test_what_cannot_be_generated_is_refused(generate, tmp_path, make_model, wordpiece):
    bert = str(make_model("bert", "AutoModelForMaskedLM", wordpiece))
    with pytest.raises(InputError, match="is a masked_lm: only a causal language model"):
        generate(of=bert)
    with pytest.raises(InputError, match="leaves room for max_new_tokens 255: the model takes 256"):
        generate(max_new_tokens=255)
    with pytest.raises(InputError, match="row 1: text must be a string"):
        generate([{"id": "a"}])
    with pytest.raises(InputError, match="row 1: the prompt has no token"):
        generate([{"prompt": ""}])
    assert not (tmp_path / "out.jsonl").exists()
    found, _ = generate(max_new_tokens=250)
    assert found.too_long == 2
    with pytest.raises(InputError, match="already exists"):
        generate()
    generate(force=True)
