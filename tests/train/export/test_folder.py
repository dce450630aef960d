"""An exported folder: what transformers alone makes of it, and what is refused before."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.train.answers.score import evaluate
from rekindle.train.config import StudentConfig
from rekindle.train.export import folder as module
from rekindle.train.export.folder import export_head
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.files import load_model
from rekindle.train.model.headers import check_teacher_files
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import build_student
from testlib.command import pipeline
from testlib.models import AUTO

LENGTH = 12
SINGLE = "single_label_classification"
# One text is longer than the student was trained with; one names a special token, which is text.
TEXTS = ["the old river", "a [MASK] and </s> of light", "water runs under the mountain " * 6, "x"]
PAIRS = ["of the city", "", "light " * 20, "y"]


def head(kind, *names, problem=SINGLE):
    problem = problem if kind == "sequence" else None
    return HeadConfig(kind=kind, num_labels=len(names), label_names=names, problem=problem)


HEADS = {
    "trec": head("sequence", "NUM", "LOC", "élan\n"),
    "a+b": head("sequence", "a/x", "b/y", "b/z"),
    "several.labels": head("sequence", "p", "q", problem="multi_label_classification"),
    "score": head("sequence", "LABEL_0", problem="regression"),
}
TAGGED = {"tags": head("token", "O", "B-x", "I-x"), "trec": HEADS["trec"]}


def saved(directory, folder, heads, task="masked_lm", **config):
    """A student with heads that say something, as a run would leave it."""
    tokenizer = load_tokenizer(str(directory))
    values = {"model": str(directory), "task": task} | config
    student = build_student(
        StudentConfig(**values), heads, tokenizer.size, 0, LENGTH, ["d"], tokenizer
    ).eval()
    torch.manual_seed(1)
    for parameter in student.heads.parameters():
        torch.nn.init.normal_(parameter)
    student.save_pretrained(folder)
    tokenizer.save(str(folder))
    return student


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def base(make_model, wordpiece):
    return make_model("bert", "AutoModelForMaskedLM", wordpiece, hidden_size=16)


@pytest.fixture(scope="module")
def student(base, place):
    return saved(base, place / "student", HEADS)


def own_logits(student, name, tokenizer, texts, pairs=None):
    """The head's own, text by text, as training shows them: cut, and not padded."""
    found = []
    for number, text in enumerate(texts):
        if pairs is None:
            room = LENGTH - len(tokenizer.prefix) - len(tokenizer.suffix)
            ids = [*tokenizer.prefix, *tokenizer.encode([text])[0].ids[:room], *tokenizer.suffix]
            types = [0] * len(ids)
        else:
            ids, types = tokenizer.encode_pair(text, pairs[number], LENGTH)
        inputs = {"input_ids": torch.tensor([list(ids)]), "attention_mask": torch.ones(1, len(ids))}
        inputs["attention_mask"] = inputs["attention_mask"].long()
        if student.task == "masked_lm":
            inputs["token_type_ids"] = torch.tensor([list(types)])
        with torch.no_grad():
            if student.head_configs[name].kind == "token":
                places = {name: torch.arange(len(ids))}
                found.append(student(inputs, token_heads=places).logits[name])
            else:
                found.append(student(inputs, sequence_heads=[name]).logits[name][0])
    return found


def plain_logits(folder, task, texts, pairs=None):
    """What transformers alone says of a batch."""
    model = getattr(transformers, AUTO[task]).from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(texts, pairs, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model, given["attention_mask"].sum(dim=1).tolist(), model(**given).logits


def assert_same(student, name, folder, texts=TEXTS, pairs=None):
    task = "token_classification" if student.head_configs[name].kind == "token" else "regression"
    model, lengths, found = plain_logits(folder, task, texts, pairs)
    own = own_logits(student, name, load_tokenizer(str(folder)), texts, pairs)
    for row, (expected, length) in enumerate(zip(own, lengths, strict=True)):
        ours = found[row][:length] if expected.dim() == 2 else found[row]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize("name", HEADS)
def test_transformers_alone_gives_the_heads_logits(place, student, tmp_path, name):
    out = tmp_path / "out"
    found = export_head(str(place / "student"), str(out), name)
    model = assert_same(student, name, out)
    assert_same(student, name, out, pairs=PAIRS)
    names = {"a+b": ("x", "y", "z")}.get(name, HEADS[name].label_names)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {label: number for number, label in enumerate(names)}
    assert model.config.problem_type == HEADS[name].problem
    assert model.config.architectures == ["BertForSequenceClassification"]
    assert (found.difference, found.max_length) == (pytest.approx(0, abs=1e-5), LENGTH)
    assert found.head in (out / "README.md").read_text()
    assert not {"rekindle_student.json", "heads.safetensors"} & {p.name for p in out.iterdir()}


@pytest.mark.covering
@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2"])
@pytest.mark.parametrize("name", TAGGED)
def test_heads_of_a_family_come_out_whole(make_model, wordpiece, bytelevel, tmp_path, family, name):
    """Tags, too; GPT-2's, which has no padding token, finds the last one of each text."""
    causal = family == "gpt2"
    kind = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
    more = {"pad_token_id": None} if causal else {}
    base = make_model(family, kind, bytelevel if causal else wordpiece, **more)
    task = "causal_lm" if causal else "masked_lm"
    if family == "modernbert":
        task = "masked_lm"
    student = saved(base, tmp_path / "student", TAGGED, task, head="family")
    export_head(str(tmp_path / "student"), str(tmp_path / "out"), name)
    texts = TEXTS if causal else [text for text in TEXTS if "</s>" not in text]
    if family == "modernbert":  # it has no segments
        student.task = "causal_lm"
    assert_same(student, name, tmp_path / "out", texts)


def test_it_is_an_expert_like_any_other(place, student, tmp_path):
    """To evaluate, to predict with, to cache as a teacher."""
    out = tmp_path / "out"
    export_head(str(place / "student"), str(out), "trec")
    texts = [text for text in TEXTS if len(text) < 40]
    labels = np.arange(len(texts)) % 2
    data = TaskData(texts, None, labels, ("LOC", "NUM"))
    _, logits = evaluate(str(out), data, batch_size=2)
    own = own_logits(student, "trec", load_tokenizer(str(out)), texts)
    np.testing.assert_allclose(logits, torch.stack(own).numpy(), rtol=1e-5, atol=1e-5)
    settings = check_teacher_files(out, "sequence_classification", "teacher 'trec'")
    assert settings.num_labels == 3
    load_model(out, AUTO["sequence_classification"], torch.float32)


def test_the_command_says_what_it_did(place, student, tmp_path):
    done = pipeline("export", place / "student", "--head", "trec", "--out", tmp_path / "o")
    assert (done.returncode, done.stdout) == (0, f"exported: {tmp_path / 'o'}\n")
    assert "AutoModelForSequenceClassification.from_pretrained(" in done.stderr
    assert f"cuts texts at {LENGTH} tokens" in done.stderr
    done = pipeline("export", place / "student", "--head", "trec", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "--force to replace it" in done.stderr
    again = ["export", place / "student", "--head", "score", "--out", tmp_path / "o", "--force"]
    told = json.loads(pipeline(*again, "--json").stdout)
    assert (told["head"], told["problem"]) == ("score", "regression")
    assert json.loads((tmp_path / "o/export.json").read_text())["head"] == "score"


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    base, place, student, tmp_path
):
    saved(base, place / "prompted", HEADS, domain_prompts=True)
    saved(base, place / "plain", {})
    saved(base, place / "tagged", TAGGED)
    saved(base, place / "bare", {"trec": HEADS["trec"]})
    for file in (place / "bare").glob("*token*"):
        file.unlink()
    for name, wanted, told in (
        ("student", None, r"the task heads a\+b, score, several.labels, trec; say which with"),
        ("student", "b", "not 'b'"),
        ("prompted", "trec", "has domain prompts"),
        ("plain", None, "has no task heads: it is a language model, which needs no export"),
        ("tagged", "tags", "Train a student with `student.head: family`"),
        ("bare", None, "has no tokenizer beside it"),
        (base, None, "not a student of Rekindle's"),
    ):
        with pytest.raises(InputError, match=told):
            export_head(str(place / name), str(tmp_path / "o"), wanted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_nothing_but_an_export_is_replaced(place, student, tmp_path, force):
    (tmp_path / "mine.txt").write_text("dear")
    for out in (tmp_path, place / "student", tmp_path / "mine.txt"):
        with pytest.raises(InputError, match="is not an export; it is left as it is"):
            export_head(str(place / "student"), str(out), "trec", force=force)
    assert (tmp_path / "mine.txt").read_text() == "dear"


def test_an_export_is_whole_or_not_there(place, student, tmp_path, monkeypatch):
    """The earlier one stays where a new one fails, or is not what it should be."""
    out = tmp_path / "o"
    export_head(str(place / "student"), str(out), "trec")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(module, "logit_distance", lambda *given: 1e-3)
    with pytest.raises(InputError, match=r"transformers loads as .* is 0.001 off"):
        export_head(str(place / "student"), str(out), "score", force=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
