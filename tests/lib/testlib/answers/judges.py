"""Tiny experts, heads of students, and files of rows."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rekindle.train.config import StudentConfig
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import build_student

SINGLE = "single_label_classification"
LABELS = ("cat", "dog", "sun", "rain")


def classifier(make_model, tokenizer, seed, *labels, family="bert", **extra):
    names = dict(enumerate(labels))
    about = {"id2label": names, "label2id": {n: i for i, n in names.items()}} | extra
    model = "AutoModelForSequenceClassification"
    return str(make_model(family, model, tokenizer, seed, hidden_size=16, **about))


def head(*names, problem=SINGLE, kind="sequence"):
    return HeadConfig(kind=kind, num_labels=len(names), label_names=names, problem=problem)


def saved_student(folder, model, heads, seed=1):
    """Save a student of a masked LM into ``folder``; ``seed`` decides its heads' answers."""
    student = build_student(StudentConfig(model=str(model)), heads, 100, 0)
    with torch.no_grad():
        for parameter in student.heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(seed)))
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(model)).save_pretrained(folder)
    return student


def write(path, rows):
    """Write rows as jsonl; return the path as text."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
