"""The other reading of the changed files: by transformers and json alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def probabilities(folder: Path, texts: list[str]) -> np.ndarray:
    """Return the probabilities of each text by the classifier in ``folder``, one at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, return_tensors="pt", max_length=64)
        with torch.no_grad():
            found.append(model(**inputs).logits.softmax(-1)[0].numpy())
    return np.array(found)


def pieces(folder: Path, text: str) -> list[int]:
    """Return the ids of a text, without special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
