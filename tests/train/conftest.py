"""What the tests of stage 2 share: two caches (masked and causal), and tiny students for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.pipeline.config import RunConfig
from testlib.models import AUTO, NARROW

PADDING_ROWS = 7  # rows of a student's output matrix that are no tokens


@dataclass(frozen=True)
class World:
    """A cache, its configuration, and model directories by name."""

    path: Path
    config: RunConfig
    tokenizer: Path
    student: Path  # padded vocabulary, dropout on

    def open(self) -> Cache:
        """The cache, freshly opened."""
        return Cache.open(self.path)


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test of this folder."""


def _whole(tokenizer: Path) -> dict[str, Any]:
    """The corpus of a world: every sequence of the text."""
    return {"tokenizer": str(tokenizer), "limit_sequences": None}


WHERE = {"sequences_per_shard": 40, "mask": {}}


@pytest.fixture(scope="session")
def masked_student(make_model: Callable[..., Path], wordpiece: Path) -> Path:
    """A narrow student whose output matrix has more rows than there are tokens."""
    size = load_tokenizer(str(wordpiece)).size + PADDING_ROWS
    return make_model("bert", AUTO["masked_lm"], wordpiece, 10, **NARROW, vocab_size=size)


@pytest.fixture(scope="session")
def masked_world(
    tmp_path_factory: pytest.TempPathFactory,
    wordpiece: Path,
    make_teacher: Callable[..., dict],
    make_cache: Callable[..., RunConfig],
    masked_student: Path,
) -> World:
    """Masked-LM teachers of all kinds and an expert of every task, on the BERT tokenizer."""

    def lm(name: str, seed: int, k: int | None, **extra: object) -> dict:
        targets = {"kind": "dense"} if k is None else {"k": k, "temperatures": [1.0, 2.0, 4.0]}
        return make_teacher(name, "masked_lm", seed, NARROW, targets=targets, **extra)

    classes, several = "sequence_classification", "multi_label_classification"
    teachers = [
        lm("big", 1, 8),
        lm("wide", 2, 24),
        lm("whole", 3, None),
        lm("odd.lm", 4, 8, domains=["odd"]),
        lm("even.lm", 5, 8, domains=["even"]),
        make_teacher("sense", classes, 6, NARROW | {"num_labels": 3}),
        make_teacher("score", "regression", 7, NARROW),
        make_teacher("topics", classes, 8, NARROW | {"num_labels": 4, "problem_type": several}),
        make_teacher("pair", classes, 9, NARROW | {"num_labels": 2}, pairs="adjacent"),
        make_teacher("tags", "token_classification", 5, NARROW | {"num_labels": 5}),
    ]
    path = tmp_path_factory.mktemp("masked") / "cache"
    config = make_cache(path, teachers, _whole(wordpiece), WHERE)
    return World(path, config, wordpiece, masked_student)


@pytest.fixture(scope="session")
def experts_world(
    tmp_path_factory: pytest.TempPathFactory,
    wordpiece: Path,
    make_teacher: Callable[..., dict],
    make_cache: Callable[..., RunConfig],
    masked_student: Path,
) -> World:
    """Experts to be merged: classifiers with label names of their own, which partly agree, with
    Monte-Carlo passes; some for one domain only, some for sentence pairs; and one masked LM.
    """

    def classifier(name: str, seed: int, *labels: str, **extra: object) -> dict:
        names = {
            "id2label": dict(enumerate(labels)),
            "label2id": {n: i for i, n in enumerate(labels)},
        }
        more = {"monte_carlo": {"passes": 4}} | extra
        return make_teacher(name, "sequence_classification", seed, NARROW | names, **more)

    odd, five = {"domains": ["odd"]}, NARROW | {"num_labels": 5}
    teachers = [
        make_teacher("lm", "masked_lm", 1, NARROW, targets={"kind": "topk", "k": 8}),
        classifier("animals", 21, "cat", "dog", "fish"),
        classifier("pets", 22, "bird", "dog", "cat"),
        classifier("weather", 23, "sun", "rain", "snow", "wind"),
        classifier("odd.plants", 24, "oak", "rose", **odd),
        classifier("unnamed", 26, "LABEL_0", "LABEL_1"),
        classifier("pair.a", 27, "yes", "no", pairs="adjacent"),
        classifier("pair.b", 28, "no", "maybe", "yes", pairs="adjacent"),
        make_teacher("odd.score", "regression", 7, NARROW, **odd),
        make_teacher("tags", "token_classification", 5, five),
        make_teacher("odd.tags", "token_classification", 25, five, **odd),
    ]
    path = tmp_path_factory.mktemp("experts") / "cache"
    config = make_cache(path, teachers, _whole(wordpiece), WHERE)
    return World(path, config, wordpiece, masked_student)


@pytest.fixture(scope="session")
def causal_world(
    tmp_path_factory: pytest.TempPathFactory,
    bytelevel: Path,
    make_model: Callable[..., Path],
    make_cache: Callable[..., RunConfig],
) -> World:
    """Causal teachers and one classifier, on the GPT-2 tokenizer."""

    def gpt(task: str, seed: int, **extra: object) -> dict:
        model = make_model("gpt2", AUTO[task], bytelevel, seed, n_embd=16, **extra)
        return {"model": str(model), "task": task}

    targets = {"targets": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}}
    teachers = [
        gpt("causal_lm", 1) | targets | {"name": "lm"},
        gpt("causal_lm", 2) | targets | {"name": "odd", "domains": ["odd"]},
        gpt("sequence_classification", 3, num_labels=3) | {"name": "sense"},
    ]
    size = load_tokenizer(str(bytelevel)).size + PADDING_ROWS
    student = gpt("causal_lm", 10, vocab_size=size)["model"]
    path = tmp_path_factory.mktemp("causal") / "cache"
    config = make_cache(path, teachers, _whole(bytelevel), WHERE)
    return World(path, config, bytelevel, Path(student))
