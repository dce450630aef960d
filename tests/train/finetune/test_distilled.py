"""Fine-tuning that goes on from a student's distilled head."""

import json
import logging

import numpy as np
import pytest
import torch

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.train.answers.judge import StudentHead
from rekindle.train.answers.score import evaluate, score_model
from rekindle.train.config import StudentConfig
from rekindle.train.export.folder import export_head
from rekindle.train.export.start import distilled_model
from rekindle.train.finetune.classifier import padded_tokenizer
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.run import finetune
from rekindle.train.finetune.task_data import read_task
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import build_student

# Of the classes the task's order is another than the head's.
HEAD = HeadConfig(
    kind="sequence",
    num_labels=3,
    label_names=("sun", "dog", "cat"),
    problem="single_label_classification",
)
SCORE = HeadConfig(kind="sequence", num_labels=1, problem="regression")
TAGS = HeadConfig(kind="token", num_labels=3, label_names=("sun", "dog", "cat"))
SEVERAL = "multi_label_classification"
STILL = FinetuneConfig(epochs=1, learning_rate=1e-30, weight_decay=0.0)


@pytest.fixture(scope="module")
def student(make_model, wordpiece, tmp_path_factory):
    base = make_model("bert", "AutoModelForMaskedLM", wordpiece, hidden_size=16)
    tokenizer, folder = load_tokenizer(str(base)), tmp_path_factory.mktemp("student")
    heads = {"sense": HEAD, "score": SCORE, "tags": TAGS}
    made = build_student(StudentConfig(model=str(base)), heads, tokenizer.size, 0).eval()
    torch.manual_seed(2)
    for parameter in made.heads.parameters():
        torch.nn.init.normal_(parameter)
    made.save_pretrained(folder)
    tokenizer.save(str(folder))
    return made, str(folder)


def head_logits(made, folder, name, data):
    judge = StudentHead(made, folder, name)
    return judge.logits(judge.read(data, None), 5)


def write(path, labels, rows=24):
    draw = np.random.default_rng(1)
    words = ["river", "city", "engine", "light", "paper", "the", "old", "water"]
    lines = [
        {"text": " ".join(draw.choice(words, 1 + n % 9)), "label": labels[n % len(labels)]}
        for n in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write(tmp_path_factory.mktemp("task") / "t.jsonl", ("cat", "dog", "sun"))


@pytest.mark.parametrize("name", ["tags", "several"])
def test_heads_of_the_family_go_on_with_tags_and_several_labels(student, tmp_path, name):
    """Equal scores before and after a step that is none."""
    base = student[1]
    kind, problem = {"tags": ("token", None), "several": ("sequence", SEVERAL)}[name]
    head = TAGS.model_copy(update={"kind": kind, "problem": problem})
    tokenizer = load_tokenizer(base)
    config = StudentConfig(model=base, head="family")
    made = build_student(config, {name: head}, tokenizer.size, 0, tokenizer=tokenizer)
    torch.manual_seed(2)
    for parameter in made.heads.parameters():
        torch.nn.init.normal_(parameter)
    made.save_pretrained(tmp_path / "student")
    tokenizer.save(str(tmp_path / "student"))
    export_head(str(tmp_path / "student"), str(tmp_path / "out"), name)
    words = ["river", "city", "light", "water"]
    rows = [
        {
            "tokens": words[n % 3 :],
            "tags": [HEAD.label_names[(n + m) % 3] for m in range(4 - n % 3)],
        }
        if name == "tags"
        else {"text": " ".join(words[n % 3 :]), "label": list(HEAD.label_names[: n % 4])}
        for n in range(12)
    ]
    task = tmp_path / "t.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = str(task), str(task)
    config = STILL.model_copy(update={"head": name})
    result = finetune(str(tmp_path / "student"), *given, str(tmp_path / "e"), config=config)
    scored = score_model(
        str(tmp_path / "out"), *given, str(tmp_path / "s"), config=FinetuneConfig(epochs=0)
    )
    assert scored.per_seed[0].scores == pytest.approx(result.per_seed[0].scores)
    assert 0 < result.mean < 1


def test_it_starts_with_the_heads_logits(student, task):
    made, folder = student
    data = read_task(task)[0]
    model = distilled_model(folder, "sense", data)
    own = head_logits(made, folder, "sense", data)
    assert list(model.config.id2label.values()) == list(data.label_names) == ["cat", "dog", "sun"]
    inputs = padded_tokenizer(folder)(data.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(**inputs).logits.numpy()
    np.testing.assert_allclose(found, own[:, [2, 1, 0]], rtol=1e-5, atol=1e-5)


def test_without_a_step_worth_its_name_the_scores_are_the_heads(student, task, tmp_path):
    made, folder = student
    data = read_task(task)[0]
    own = head_logits(made, folder, "sense", data)
    right = np.array(HEAD.label_names)[own.argmax(1)] == np.array(data.label_names)[data.labels]
    config = STILL.model_copy(update={"head": "sense"})
    result = finetune(folder, task, task, str(tmp_path / "expert"), config=config)
    assert result.mean == pytest.approx(right.mean())
    assert evaluate(str(tmp_path / "expert"), data, batch_size=8)[0]["accuracy"] == result.mean


def test_a_score_head_goes_on_too(student, tmp_path):
    made, folder = student
    task = write(tmp_path / "t.jsonl", (0.5, 1.25, 2.75))
    config = STILL.model_copy(update={"head": "score"})
    result = finetune(folder, task, task, str(tmp_path / "expert"), config=config)
    data = read_task(task)[0]
    own = head_logits(made, folder, "score", data)
    assert result.mean == pytest.approx(np.corrcoef(own[:, 0], data.labels)[0, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("head", "labels", "told"),
    [
        ("sense", ("cat", "dog"), "it alone knows sun"),
        ("sense", ("cat", "dog", "sun", "rain"), "the task alone has rain"),
        ("sense", (0.5, 1.5), "is for single_label_classification, but the task is regression"),
        ("score", ("cat", "dog"), "is for regression, but the task is single_label"),
        ("tags", ("cat", "dog", "sun"), "is for token_classification, but the task is single"),
        ("sens", ("cat", "dog", "sun"), "has the task heads .*sense.*, not 'sens'"),
    ],
)
def test_a_head_for_another_task_is_refused(student, tmp_path, head, labels, told):
    task = write(tmp_path / "t.jsonl", labels)
    config = STILL.model_copy(update={"head": head})
    with pytest.raises(InputError, match=f"{told}.* leave head out"):
        finetune(student[1], task, task, str(tmp_path / "expert"), config=config)
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_whoever_leaves_it_out_is_told_of_it(student, task, tmp_path, caplog):
    caplog.set_level(logging.INFO, "rekindle")
    finetune(student[1], task, task, str(tmp_path / "expert"), config=STILL)
    (told,) = [r.getMessage() for r in caplog.records if "distilled" in r.getMessage()]
    assert "has a distilled head for these labels, sense: --head sense goes on from it" in told
    caplog.clear()
    other = write(tmp_path / "other.jsonl", ("cat", "rain"))
    finetune(student[1], other, other, str(tmp_path / "other"), config=STILL)
    assert not [r for r in caplog.records if "distilled" in r.getMessage()]
