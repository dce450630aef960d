"""Models of which the tests of stage 1 know the answers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from testlib.models import AUTO
from testlib.stage_one.rehearsed import rehearsed_once


@pytest.fixture(autouse=True)
def _rehearsed_once() -> Iterator[None]:
    """In every test of this folder; ``test_first_checks`` has a new configuration each time."""
    with rehearsed_once():
        yield


@pytest.fixture
def padded_model(tmp_path, make_model, wordpiece) -> Callable[[str], tuple[Path, int]]:
    """padded_model(task) -> a model's directory, and how many of its outputs are tokens.

    There are six more, which hold nearly all of its mass.
    """
    loaded = transformers.AutoTokenizer.from_pretrained(str(wordpiece))
    size, folder = len(loaded), tmp_path / "model"

    def make(task: str) -> tuple[Path, int]:
        family = {"masked_lm": "bert", "causal_lm": "llama"}[task]
        extra = {} if task == "masked_lm" else {"tie_word_embeddings": False}
        padded = make_model(family, AUTO[task], wordpiece, 5, vocab_size=size + 6, **extra)
        model = getattr(transformers, AUTO[task]).from_pretrained(str(padded))
        with torch.no_grad():
            if task == "masked_lm":
                model.cls.predictions.bias[size:] = 40.0
            else:
                model.lm_head.weight[size:] = 50 * model.lm_head.weight[:6]
        model.save_pretrained(folder)
        loaded.save_pretrained(folder)
        return folder, size

    return make
