"""From labels to a student's head: experts of several labels and of tags, fine-tuned, named as
teachers, imitated, and scored.
"""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.answers.score import score_model
from rekindle.train.finetune.config import FinetuneConfig, TaskSettings
from rekindle.train.finetune.run import finetune
from rekindle.train.finetune.task_data import read_task
from rekindle.train.student import Student

PLACES = ("river", "city")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(folder, kind, corpus_file):
    """Sentences of the corpus; what holds of one, or of a word, is which places are in it."""
    rows = []
    for line in corpus_file.read_text().splitlines():
        for sentence in json.loads(line)["text"].split(". "):
            words = sentence.removesuffix(".").lower().split()
            if kind == "several":
                rows.append({"text": sentence, "label": [one for one in PLACES if one in words]})
            else:
                tags = ["B-LOC" if word in PLACES else "O" for word in words]
                rows.append({"tokens": sentence.removesuffix(".").split(), "tags": tags})
    return write(folder / "train.jsonl", rows), write(folder / "dev.jsonl", rows[::4])


@pytest.mark.parametrize(
    ("kind", "task", "problem", "measured"),
    [
        ("several", "sequence_classification", "multi_label_classification", "f1_micro"),
        ("tags", "token_classification", "token_classification", "f1"),
    ],
)
def test_an_expert_is_taught_to_a_head_that_is_scored(
    tmp_path, configure, make_teacher, corpus_file, kind, task, problem, measured
):
    lm = make_teacher("lm", "masked_lm", config={"initializer_range": 0.1})
    train, dev = labelled(tmp_path, kind, corpus_file)
    config = FinetuneConfig(max_steps=90, epochs=9, batch_size=16, learning_rate=1e-2)
    expert = finetune(lm["model"], train, dev, str(tmp_path / "expert"), config=config)
    assert (expert.problem, expert.metric) == (problem, measured)
    assert expert.mean > 0.5

    teacher = {"name": "places", "model": str(tmp_path / "expert"), "task": task}
    distill = [{"teachers": ["places"]}]
    values = configure(tmp_path / "c", [teacher]).model_dump(mode="json") | {
        "student": {"model": lm["model"]},
        "train": {
            "steps": 40, "batch_sequences": 12, "warmup_steps": 0, "learning_rate": 1e-2,
            "objective": {"hard": {"weight": 0.0}, "distill": distill},
        },
    }  # fmt: skip
    run = parse_settings(RunConfig, values)
    cache_teachers(run)
    info = Cache.open(tmp_path / "c").teacher("places").info
    names = ("city", "river") if kind == "several" else ("B-LOC", "I-LOC", "O")
    assert info.label_names == names
    assert train_from_config(run, tmp_path / "run") is not None

    student = Student.from_pretrained(str(tmp_path / "run")).eval()
    head = student.head_configs["places"]
    assert (head.label_names, head.problem) == (names, problem if kind == "several" else None)
    given = (str(tmp_path / "run"), dev, dev, str(tmp_path / "scored"))
    scored = score_model(*given, config=FinetuneConfig(epochs=0))
    assert scored.metric == measured
    data = read_task(dev, settings=TaskSettings())[0]
    assert scored.mean == pytest.approx(by_hand(student, lm["model"], data, kind), abs=1e-6)
    assert scored.mean > 0.2


def by_hand(student, tokenizer, data, kind):
    """F1 of the head on one text at a time; all entities here are one word."""
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    right = both = 0
    for row, text in enumerate(data.texts):
        inputs = theirs(text, return_tensors="pt", return_offsets_mapping=True)
        spans = inputs.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            states = student.model.base_model(**inputs).last_hidden_state[0]
            logits = student.heads["places"](states).numpy()
        if kind == "several":
            given, true = logits[0] >= 0, data.labels[row]
        else:
            starts = np.cumsum([0, *(len(word) + 1 for word in data.words[row])])[:-1]
            first = [next(n for n, (a, b) in enumerate(spans) if a <= at < b) for at in starts]
            tags = [data.label_names[n] for n in logits[first].argmax(axis=1)]
            assert "I-LOC" not in tags  # nothing was of such a tag
            given = np.array([tag == "B-LOC" for tag in tags])
            true = np.array(
                [data.label_names[n] == "B-LOC" for n in data.by_text(data.labels)[row]]
            )
        right += int((given & true).sum())
        both += int(given.sum() + true.sum())
    return 2 * right / both
