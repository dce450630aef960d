"""Cached predictions as text: every line is what the expert itself would have said."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.source.documents import read_documents
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import PromptsConfig, fill_template, load_config
from rekindle.pipeline.stages.prompts import most_probable, write_prompts
from rekindle.pipeline.stages.run import cache_stages, run_stages

NAMES = ("water", "city", "paper")
WORDS = {"water": "river", "city": "old city", "paper": "paper"}
TEMPLATE = "It is {label} : {text}"


@pytest.fixture(scope="module")
def experts(wordpiece, make_model):
    """A classifier of texts, and other heads."""
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    kind = "AutoModelForSequenceClassification"
    several = {"problem_type": "multi_label_classification"}
    return {
        "classes": str(make_model("bert", kind, wordpiece, **labels)),
        "score": str(make_model("bert", kind, wordpiece, num_labels=1)),
        "several": str(make_model("bert", kind, wordpiece, num_labels=3, **several)),
    }


@pytest.fixture(scope="module")
def teachers(experts):
    def teacher(name, model, **more):
        return {"name": name, "model": experts[model], "task": "sequence_classification"} | more

    return [
        teacher("classes", "classes"),
        teacher("odd", "classes", domains=["odd"]),
        teacher("pairs", "classes", pairs="random"),
        teacher("score", "score", task="regression"),
        teacher("several", "several"),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, configure, teachers):
    """A cache of three shards of 5, 5 and 2 sequences."""
    path = tmp_path_factory.mktemp("prompts") / "cache"
    cache_teachers(configure(path, teachers))
    return Cache.open(path)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def judged(cache, experts):
    """(label, probability) of every sequence, by a forward pass of its own for each."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(experts["classes"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(experts["classes"])
    found = []
    for index in range(len(cache)):
        with torch.no_grad():
            inputs = tokenizer(cache.example(index).text, return_tensors="pt", truncation=True)
            probs = model(**inputs).logits[0].double().softmax(dim=0)
        found.append((NAMES[int(probs.argmax())], float(probs.max())))
    assert len({name for name, _ in found}) > 1  # or the words below would say nothing
    return found


# --- the lines ------------------------------------------------------------------------------------


def test_every_line_is_what_a_forward_pass_of_the_expert_says(cache, judged, tmp_path):
    counts = write_prompts(cache, "classes", tmp_path / "p.jsonl", template=TEMPLATE, words=WORDS)
    examples = [cache.example(index) for index in range(len(cache))]
    assert lines_of(tmp_path / "p.jsonl") == [
        {"id": e.document, "text": f"It is {WORDS[name]} : {e.text}", "domain": e.domain}
        for e, (name, _) in zip(examples, judged, strict=True)
    ]
    names = [name for name, _ in judged]
    assert counts.labels == {name: names.count(name) for name in set(names)}
    assert (counts.written, counts.not_judged, counts.below_confidence) == (12, 0, 0)
    assert "12 lines" in counts.as_text()


def test_only_the_sequences_an_expert_is_sure_of(cache, judged, tmp_path):
    ranked = sorted(probability for _, probability in judged)
    threshold = (ranked[5] + ranked[6]) / 2
    counts = write_prompts(cache, "classes", tmp_path / "p.jsonl", confidence=threshold)
    sure = [i for i, (_, probability) in enumerate(judged) if probability >= threshold]
    assert len(sure) == counts.written == counts.below_confidence == 6
    assert [line["text"] for line in lines_of(tmp_path / "p.jsonl")] == [
        f"{cache.example(i).text} This is about {judged[i][0]}." for i in sure
    ]


def test_only_the_sequences_an_expert_judged(cache, judged, tmp_path):
    counts = write_prompts(cache, "odd", tmp_path / "p.jsonl")
    odd = [i for i in range(12) if cache.example(i).domain == "odd"]
    assert 0 < len(odd) < 12
    assert (counts.written, counts.not_judged) == (len(odd), 12 - len(odd))
    assert {line["domain"] for line in lines_of(tmp_path / "p.jsonl")} == {"odd"}
    assert [line["id"] for line in lines_of(tmp_path / "p.jsonl")] == [
        cache.example(i).document for i in odd
    ]


@given(
    logits=st.lists(
        st.lists(st.floats(-80, 80, width=32), min_size=3, max_size=3), min_size=1, max_size=4
    )
)
def test_the_most_probable_class_and_its_softmax(logits):
    best, probability = most_probable(np.array(logits, np.float32))
    exact = torch.tensor(logits, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(torch.from_numpy(probability), exact.max(dim=1).values)
    rows = torch.arange(len(logits))
    assert torch.equal(exact[rows, torch.from_numpy(best)], exact.max(dim=1).values)


def test_braces_in_the_text_are_no_placeholders():
    assert fill_template(TEMPLATE, "a {label} {text} {x}", "w") == "It is w : a {label} {text} {x}"


def test_the_new_corpus_can_be_read(cache, tmp_path):
    write_prompts(cache, "classes", tmp_path / "p.jsonl")
    found = list(read_documents([str(tmp_path / "p.jsonl")], "text", "domain"))
    read = [{"id": one.id, "text": one.text, "domain": one.domain} for one in found]
    assert read == lines_of(tmp_path / "p.jsonl")


# --- the file -------------------------------------------------------------------------------------


def test_a_kill_leaves_no_half_of_it_and_twice_is_the_same(cache, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "p.jsonl"
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(os, "fsync", lambda number: os.kill(os.getpid(), signal.SIGKILL))
        write_prompts(cache, "classes", path)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not path.exists()
    write_prompts(cache, "classes", path)
    first, time = path.read_bytes(), path.stat().st_mtime_ns
    write_prompts(Cache.open(cache.store.location), "classes", path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (first, time)
    assert [p.name for p in path.parent.iterdir()] == ["p.jsonl"]


def test_other_content_is_not_written_over(cache, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("mine\n")
    with pytest.raises(InputError, match="exists with other content"):
        write_prompts(cache, "classes", path)
    assert path.read_text() == "mine\n"
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "changed", "message"),
    [
        ("classes", {"template": "{text}"}, r"has no \{label\}"),
        ("classes", {"template": "about {label}"}, r"has no \{text\}"),
        ("classes", {"template": "{text} {label} {mask}"}, r"has \{mask\}"),
        ("classes", {"template": "{text} {}{label}"}, r"has \{\}"),
        (
            "classes",
            {"words": WORDS | {"fire": "red"}},
            "'fire' is not a label.*water, city, paper",
        ),
        ("classes", {"words": {"water": "river"}}, "none is given for the label 'city'"),
        ("classes", {"words": WORDS | {"city": "Ω"}}, "no tokens for 'Ω'"),
        ("classes", {"words": WORDS | {"city": " "}}, "no tokens for ' '"),
        ("classes", {"confidence": 1.0}, "no line to write.*12 sequences below"),
        ("nobody", {}, "no teacher 'nobody'"),
        ("pairs", {}, "judged pairs of texts"),
        ("score", {}, "is of regression"),
        ("several", {}, "is of multi_label_classification"),
    ],
)
def test_what_cannot_be_written_is_refused(cache, tmp_path, teacher, changed, message):
    with pytest.raises(InputError, match=message):
        write_prompts(cache, teacher, tmp_path / "p.jsonl", **changed)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_expert_is_refused(tmp_path, configure, teachers):
    cache_teachers(configure(tmp_path / "cache", teachers[:1]))
    (tmp_path / "cache/targets/classes/commits/00001.json").unlink()
    with pytest.raises(InputError, match=r"has judged \d+\.\d% of the corpus"):
        write_prompts(Cache.open(tmp_path / "cache"), "classes", tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "{text} {word}"}, r"template: .*has no \{label\}"),
        ({"to": "p.txt"}, "to: "),
        ({"confidence": 2}, "confidence: "),
        ({"confidance": 0.5}, "did you mean 'confidence'"),
    ],
)
def test_a_bad_section_is_refused_when_it_is_read(values, message):
    with pytest.raises(InputError, match=message):
        parse_settings(PromptsConfig, {"teacher": "t", "to": "p.jsonl"} | values)


# --- as a stage -----------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path, small_corpus, wordpiece, make_model, teachers):
    """write(**write_prompts) -> a run file: plain training, then training on prompts."""
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    prompts = {"teacher": "classes", "template": TEMPLATE, "words": WORDS}
    prompts |= {"to": str(tmp_path / "p.jsonl")}
    prompted = {
        "corpus.source": [prompts["to"]],
        "corpus.sequence_length": 32,
        "cache.path": str(tmp_path / "prompted-cache"),
        "teachers": [],
    }
    values = {
        "corpus": small_corpus,
        "cache": {"path": str(tmp_path / "cache"), "replicas": 2},
        "teachers": teachers[:1],
        "student": {"model": str(model)},
        "train": {"steps": 2, "batch_sequences": 4, "warmup_steps": 1, "held_out": 0.2},
    }

    def write(changed=None, **more):
        stages = [
            {"name": "plain"},
            {
                "name": "prompted",
                "set": prompted | (changed or {}),
                "write_prompts": prompts | more,
            },
        ]
        path = tmp_path / "pcp.yaml"
        path.write_text(yaml.safe_dump(values | {"stages": stages}))
        return path

    return write


def test_a_stage_trains_on_the_lines(run_file, tmp_path):
    config = load_config(run_file())
    assert len(run_stages(config, tmp_path / "out")) == 2
    cache, made = Cache.open(tmp_path / "cache"), Cache.open(tmp_path / "prompted-cache")
    write_prompts(cache, "classes", tmp_path / "own.jsonl", template=TEMPLATE, words=WORDS)
    assert (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "p.jsonl").read_bytes()
    texts = [line["text"] for line in lines_of(tmp_path / "p.jsonl")]
    assert [made.example(i).text for i in range(len(made))] == texts
    about = json.loads((tmp_path / "out/prompted/run.json").read_text())
    assert about["cache"]["corpus"] == made.corpus.fingerprint
    assert run_stages(config, tmp_path / "out", resume=True) == []


def test_caching_alone_writes_the_lines_too(run_file, tmp_path):
    done = cache_stages(load_config(run_file()))
    assert [one.done.corpus_sequences for one in done] == [12, 12]
    assert len(lines_of(tmp_path / "p.jsonl")) == 12


@pytest.mark.parametrize(
    ("changed", "prompts", "message"),
    [
        (
            {},
            {"teacher": "class"},
            "write_prompts.teacher names the teacher 'class', which nothing",
        ),
        ({}, {"cache": "elsewhere"}, r"which nothing puts into elsewhere"),
        ({"corpus.source": ["python-docs"]}, {}, "the stage does not read"),
        ({"cache.path": None}, {}, "stage 'prompted': cache.path"),
        ({}, {"words": {"water": "a"}}, "stage 'prompted': words: none is given for .* 'city'"),
        ({}, {"words": WORDS | {"city": "Ω"}}, "stage 'prompted': words: .*'Ω'"),
        ({}, {"template": "{label}"}, r"stages.1.write_prompts.template: .*no \{text\}"),
    ],
)
def test_a_bad_stage_is_refused_before_the_first_runs(
    run_file, tmp_path, changed, prompts, message
):
    path = run_file(changed, **prompts)
    with pytest.raises(InputError, match=message):
        run_stages(load_config(path), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["pcp.yaml"]


def test_prompts_do_not_go_into_the_cache_they_are_made_from(run_file, tmp_path):
    path = run_file({"cache.path": str(tmp_path / "cache")})
    with pytest.raises(InputError, match="the prompts would be cached there as well"):
        run_stages(load_config(path), tmp_path / "out")
