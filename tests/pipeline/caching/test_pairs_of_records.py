"""A corpus of pairs as experts, language models and the student see it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.run import plan_run
from rekindle.train.config import StudentConfig
from rekindle.train.device_batch import language_rows
from rekindle.train.finetune.result import RESULT_FILE, WRITER
from rekindle.train.loop import train_student
from rekindle.train.model.files import load_language_model, weights_fingerprint
from rekindle.train.student import Student
from testlib.loop import CPU, train_config
from testlib.vocabularies.roberta import save_roberta

WORDS = ["the", "old", "river", "runs", "under", "a", "new", "city", "and", "light", "falls"]
PAIRS = [
    (" ".join(WORDS[n % 5 :]), " ".join(WORDS[: 1 + n % 9]) + ("." if n % 2 else ""))
    for n in range(12)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "p.jsonl"
    path.write_text("\n".join(json.dumps({"a": a, "b": b}) for a, b in PAIRS))
    return {"source": [str(path)], "text_field": "a", "pair_field": "b", "domain_field": None}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, make_teacher, make_model):
    """A language model of the corpus's tokenizer, an expert of it, and one of another."""
    folder = tmp_path_factory.mktemp("roberta")
    save_roberta(folder)
    task = "sequence_classification"
    other = make_model("roberta", "AutoModelForSequenceClassification", folder, 3)
    return [
        make_teacher("lm", "masked_lm", targets={"kind": "dense"}),
        make_teacher("own", task),
        {"name": "other", "model": str(other), "task": task},
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory, source, teachers, make_cache):
    corpus = source | {"sequence_length": 14}
    return make_cache(tmp_path_factory.mktemp("made") / "cache", teachers, corpus)


@pytest.fixture
def cache(config):
    return Cache.open(config.cache.path)


@pytest.mark.parametrize("name", ["own", "other"])
def test_an_expert_sees_exactly_the_two_texts_with_its_own_tokenizer(cache, config, name):
    """Also what the student's sequence has no room for."""
    place = next(t.model for t in config.teachers if t.name == name)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    assert cache.teachers[name].info.view_class.paired
    for number, (a, b) in enumerate(PAIRS):
        with torch.no_grad():
            expected = model(**tokenizer(a, b, return_tensors="pt")).logits[0].numpy()
        (target,) = cache.example(number).targets[name]
        np.testing.assert_allclose(target.logits, expected, atol=1e-4)


def test_a_language_model_is_told_the_segments(cache, config):
    model = AutoModelForMaskedLM.from_pretrained(config.teachers[0].model).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.corpus.tokenizer)
    for number, (a, b) in enumerate(PAIRS):
        shown = tokenizer(a, b, truncation="longest_first", max_length=14, return_tensors="pt")
        for target in cache.example(number).targets["lm"]:
            seen = shown | {"input_ids": torch.tensor(target.input_ids[None]).long()}
            with torch.no_grad():
                logits = model(**seen).logits[0, torch.tensor(target.positions)]
            expected = torch.log_softmax(logits, dim=-1).numpy()
            found = np.take_along_axis(expected, target.ids, axis=1)
            np.testing.assert_allclose(target.log_probs, found, atol=2e-2)


def test_the_student_is_told_the_segments_in_every_pass(cache, config, make_model, wordpiece):
    student = Student(load_language_model(Path(config.teachers[0].model), "masked_lm"), "masked_lm")
    view = next(name for name in cache.views if name.startswith("masked"))
    batch = cache.gather(np.arange(5), ["own"], masked_view=view).take(slice(1, 4))
    rows = language_rows(batch, "masked_lm", CPU)
    types = batch.token_types
    assert types.shape == batch.input_ids.shape
    assert types.any()
    with torch.no_grad():
        model = student.model.eval()
        expected = model(**rows.inputs).logits.flatten(0, 1)[rows.select]
        without = {k: v for k, v in rows.inputs.items() if k != "token_type_ids"}
        other = model(**without).logits.flatten(0, 1)[rows.select]
        found = student.eval()(rows.inputs, rows.select).hidden
        logits = student.output_head.logits(found)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, other, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_student_learns_from_experts_on_pairs(tmp_path, cache, make_model, wordpiece, family):
    """With segments or, a model that knows none, without."""
    model = make_model(family, "AutoModelForMaskedLM", wordpiece)
    config = train_config([{"teachers": ["own", "other"]}], steps=2)
    about = StudentConfig(model=str(model), task="masked_lm")
    result = train_student(cache, about, config, tmp_path / "run")
    assert result.coverage["sequences_with_kd"] == 12
    assert weights_fingerprint(result.directory) != weights_fingerprint(model)


def test_a_plan_counts_as_the_cache_does(tmp_path, config, teachers, configure, source):
    corpus = source | {"sequence_length": 14, "limit_sequences": None}
    planned = plan_run(configure(tmp_path / "none", teachers, corpus), probe=False).corpus
    made = Cache.open(config.cache.path).corpus
    assert (planned.sequences, planned.tokens) == (len(made), made.tokens)


def refused(teacher, corpus, told):
    values = {"corpus": {"source": "p", "tokenizer": "t"} | corpus, "cache": {"path": "c"}}
    about = {"name": "x", "model": "m", "task": "sequence_classification"} | teacher
    with pytest.raises(InputError, match=told):
        parse_settings(RunConfig, values | {"teachers": [about]})


def test_teachers_that_cannot_read_pairs_are_refused():
    pairs = {"pair_field": "b"}
    refused({"pairs": "adjacent"}, pairs, "pairs is adjacent.*the records are the pairs; leave")
    refused({"task": "token_classification"}, pairs, "tags the words of single texts")
    refused({"pairs": "record"}, {}, "corpus.pair_field.*is missing")


def test_an_expert_on_single_texts_is_refused(tmp_path, configure, source, teachers):
    from shutil import copytree

    copytree(teachers[1]["model"], tmp_path / "single")
    about = {"written_by": WRITER, "metric": "accuracy", "config": {}, "pairs": False}
    (tmp_path / "single" / RESULT_FILE).write_text(json.dumps(about))
    one = teachers[1] | {"model": str(tmp_path / "single")}
    with pytest.raises(InputError, match=r"fine-tuned on single texts.*give an expert on pairs"):
        cache_teachers(configure(tmp_path / "cache", [one], source))
    assert not (tmp_path / "cache").exists()
