"""Perplexity and pseudo-perplexity, against transformers' own loss, a text at a time."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rekindle.data.errors import InputError
from rekindle.train.answers.config import PerplexityConfig
from rekindle.train.answers.perplexity import text_perplexity
from rekindle.train.config import StudentConfig
from rekindle.train.student import build_student
from testlib.answers.judges import classifier, write

TEXTS = ["the river runs", "a city of light", "paper " * 30, "old water falls under the mountain."]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def causal(make_model, bytelevel, wordpiece, family):
    tokenizer = bytelevel if family == "gpt2" else wordpiece
    return str(make_model(family, "AutoModelForCausalLM", tokenizer, 3))


def loaded(auto, path):
    return auto.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_perplexity_is_transformers_own_loss_weighted_by_tokens(
    file, make_model, bytelevel, wordpiece, family
):
    path = causal(make_model, bytelevel, wordpiece, family)
    found = text_perplexity(path, file, config=PerplexityConfig(batch_tokens=64))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    total = count = 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        total += float(loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found.tokens == count
    assert found.ce == pytest.approx(total / count, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found.summary().splitlines()[1] == f"ce: {found.ce:.4f} nats per token"
    assert (found.measure, found.task, found.texts) == ("perplexity", "causal_lm", len(TEXTS))


@pytest.mark.parametrize("begins", [True, False])
def test_guessing_bytes_costs_eight_bits_each_with_a_token_before_the_first_or_not(
    tmp_path, make_model, begins
):
    signs = {one: number for number, one in enumerate(sorted(ByteLevel.alphabet()))}
    backend = HuggingFaceTokenizer(BPE(signs | {"<s>": 256} if begins else signs, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if begins:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "bytes")
    path = make_model(
        "gpt2", "AutoModelForCausalLM", tmp_path / "bytes", initializer_range=1e-7, begins=begins
    )
    file = write(tmp_path / "short.jsonl", [{"text": text} for text in ("ab", "é!", " 🙂", "x")])
    found = text_perplexity(str(path), file)
    assert found.tokens == 2 + 3 + 5 + 1 - 4 * (not begins)
    assert found.bits_per_byte == pytest.approx(math.log2(256 + begins))


def test_longer_texts_are_read_in_windows_that_overlap(tmp_path, make_model, bytelevel):
    path = str(make_model("gpt2", "AutoModelForCausalLM", bytelevel, 3))
    file = write(tmp_path / "one.jsonl", [{"text": TEXTS[2] + TEXTS[3]}])
    config = PerplexityConfig(max_length=8, stride=3)
    found = text_perplexity(path, file, config=config)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    ids = tokenizer(TEXTS[2] + TEXTS[3], return_tensors="pt").input_ids[0]
    losses, before = [], 0
    for begin in range(0, len(ids), 3):  # as transformers' guide on perplexity does it
        end = min(begin + 8, len(ids))
        labels = ids[begin:end].clone()
        labels[: len(labels) - (end - before)] = -100
        with torch.no_grad():
            logits = model(ids[begin:end][None]).logits[0, :-1].double()
        each = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
        losses += each[labels[1:] >= 0].tolist()
        before = end
        if end == len(ids):
            break
    assert found.tokens == len(losses) == len(ids) - 1
    assert found.ce == pytest.approx(np.mean(losses), abs=1e-4)
    assert found.standard_error == pytest.approx(np.std(losses) / len(losses) ** 0.5, rel=1e-3)


def pseudo_losses(path, texts):
    """Each token masked in turn, by transformers alone."""
    model, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        for place in range(1, ids.shape[1] - 1):
            masked, labels = ids.clone(), torch.full_like(ids, -100)
            masked[0, place], labels[0, place] = tokenizer.mask_token_id, ids[0, place]
            with torch.no_grad():
                losses.append(float(model(masked, labels=labels).loss))
    return losses


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_pseudo_perplexity_masks_each_token_in_turn(file, make_model, wordpiece, family):
    path = str(make_model(family, "AutoModelForMaskedLM", wordpiece, 3))
    found = text_perplexity(path, file, config=PerplexityConfig(tokens="all", batch_tokens=100))
    losses = pseudo_losses(path, TEXTS)
    assert (found.tokens, found.tokens_in_all) == (len(losses), len(losses))
    assert found.ce == pytest.approx(np.mean(losses), abs=1e-4)
    assert (found.measure, found.bits_per_byte) == ("pseudo-perplexity", None)
    some = text_perplexity(path, file, config=PerplexityConfig(tokens=20))
    assert (some.tokens, some.tokens_in_all) == (20, len(losses))
    assert abs(some.ce - found.ce) < 4 * some.standard_error
    again = text_perplexity(path, file, config=PerplexityConfig(tokens=20, seed=0))
    assert again.ce == some.ce
    assert "at most 20 tokens" in some.rule
    assert "95 %" in some.summary()


def test_a_student_is_asked_as_the_language_model_it_is(tmp_path, file, make_model, wordpiece):
    """With a domain prompt it is asked with that of no domain, which its plain folder lacks."""
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 3)
    for prompted in (False, True):
        config = StudentConfig(model=str(model), domain_prompts=prompted)
        size = len(AutoTokenizer.from_pretrained(str(model)))
        built = build_student(config, {}, size, 0, domains=["a"])
        where = tmp_path / f"student-{prompted}"
        built.save_pretrained(where)
        AutoTokenizer.from_pretrained(str(model)).save_pretrained(where)
        found = text_perplexity(str(where), file, config=PerplexityConfig(tokens=50))
        plain = text_perplexity(str(model), file, config=PerplexityConfig(tokens=50))
        assert (found.ce == pytest.approx(plain.ce, abs=1e-5)) is not prompted
        coarse = PerplexityConfig(tokens=50, precision="bf16")  # its weights are rounded, as asked
        rounded = text_perplexity(str(where), file, config=coarse)
        assert rounded.ce != found.ce
        if not prompted:
            of_model = text_perplexity(str(model), file, config=coarse)
            assert rounded.ce == pytest.approx(of_model.ce, abs=1e-5)


def test_texts_are_read_as_a_corpus_reads_them(tmp_path, make_model, bytelevel):
    path = str(make_model("gpt2", "AutoModelForCausalLM", bytelevel, 3))
    rows = [{"body": text} for text in TEXTS]
    (tmp_path / "t.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "t.csv").write_text("body\n" + "".join(f'"{text}"\n' for text in TEXTS))
    write(tmp_path / "t.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = {
        name: text_perplexity(path, str(tmp_path / name), text_field="body")
        for name in ("t.jsonl", "t.csv", "t.parquet", "t.txt")
    }
    texts = found.pop("t.txt")  # which lose the blanks at their ends
    assert f" tokens of {len(TEXTS)} texts between blank lines)" in texts.summary()
    assert [one.ce for one in found.values()] == pytest.approx([found["t.jsonl"].ce] * 3)
    with pytest.raises(InputError, match=r"no field 'text' \(--text-field\)"):
        text_perplexity(path, str(tmp_path / "t.jsonl"))


def test_what_has_no_perplexity_is_told_what_to_do(tmp_path, file, make_model, wordpiece):
    expert = classifier(make_model, wordpiece, 3, "a", "b")
    with pytest.raises(InputError, match=f"is an expert .*pipeline predict {expert} --text {file}"):
        text_perplexity(expert, file)
    body = str(make_model("bert", "AutoModel", wordpiece, 3))
    with pytest.raises(InputError, match="was saved as BertModel, which has no output over"):
        text_perplexity(body, file)
    model = str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 3))
    empty = write(tmp_path / "empty.jsonl", [{"text": "  "}])
    with pytest.raises(InputError, match="there is no token to predict"):
        text_perplexity(model, empty)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "a"}) + "\nno json\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:2: not JSON .*; repair or remove it"):
        text_perplexity(model, str(tmp_path / "bad.jsonl"))
    for settings in ({"max_length": 4, "stride": 4}, {"stride": 2000}):
        with pytest.raises(InputError, match="is not less than the window"):
            text_perplexity(model, file, config=PerplexityConfig(**settings))
