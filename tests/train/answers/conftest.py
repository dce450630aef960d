"""A labelled file, experts and a student that know its labels, in part."""

import numpy as np
import pytest

from testlib.answers.judges import LABELS, classifier, head, saved_student, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("score")


@pytest.fixture(scope="module")
def task(folder):
    """Texts of random labels: what is tested is who says what, not who is right."""
    draw = np.random.default_rng(3)
    words = ["river", "city", "engine", "light", "paper", "the", "old", "water"]
    rows = [
        {"text": " ".join(draw.choice(words, 1 + n % 9)), "label": LABELS[draw.integers(4)]}
        for n in range(30)
    ]
    return write(folder / "test.jsonl", rows)


@pytest.fixture(scope="module")
def experts(make_model, wordpiece):
    return [
        classifier(make_model, wordpiece, 1, "dog", "cat"),
        classifier(make_model, wordpiece, 2, "rain", "sun", "dog"),
    ]


@pytest.fixture(scope="module")
def student(folder, make_model, wordpiece):
    """A student with a head over a union, one whose labels stand apart, and one of scores."""
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, hidden_size=16)
    heads = {
        "a+b": head("rain", "dog", "cat", "sun"),
        "a+c": head("a/rain", "a/dog", "c/dog", "c/cat", "c/sun"),
        "score": head("x", problem="regression"),
    }
    return saved_student(folder / "student", model, heads).eval()
