"""What the tests of stage 2 share: two caches (masked and causal), and tiny students for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig

PADDING_ROWS = 7  # rows of a student's output matrix that are no tokens
NARROW = {"hidden_size": 16, "intermediate_size": 24}


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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are many times faster on one thread than on several that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _world(
    folder: Path, corpus: Path, tokenizer: Path, teachers: list[dict], student: Path
) -> World:
    torch.set_num_threads(1)
    values = {
        "corpus": {
            "source": str(corpus),
            "domain_field": "domain",
            "tokenizer": str(tokenizer),
            "sequence_length": 24,
        },
        "cache": {"path": str(folder), "sequences_per_shard": 40, "replicas": 2},
        "teachers": teachers,
    }
    config = RunConfig.model_validate(values)
    cache_teachers(config)
    return World(folder, config, tokenizer, student)


@pytest.fixture(scope="session")
def masked_world(
    tmp_path_factory: pytest.TempPathFactory,
    corpus_file: Path,
    wordpiece: Path,
    make_model: Callable[..., Path],
) -> World:
    """Masked-LM teachers of all kinds and an expert of every task, on the BERT tokenizer."""

    def bert(auto: str, seed: int, **extra: object) -> str:
        return str(make_model("bert", f"AutoModelFor{auto}", wordpiece, seed, **NARROW, **extra))

    def classifier(name: str, seed: int, task: str = "sequence_classification", **extra) -> dict:
        pairs = {"pairs": extra.pop("pairs")} if "pairs" in extra else {}
        model = bert("SequenceClassification", seed, **extra)
        return {"name": name, "model": model, "task": task, **pairs}

    def lm(name: str, seed: int, k: int | None, **extra: object) -> dict:
        targets = {"kind": "dense"} if k is None else {"k": k, "temperatures": [1.0, 2.0, 4.0]}
        model = bert("MaskedLM", seed)
        return {"name": name, "model": model, "task": "masked_lm", "targets": targets, **extra}

    tagger = bert("TokenClassification", 5, num_labels=5)
    teachers = [
        lm("big", 1, 8),
        lm("wide", 2, 24),
        lm("whole", 3, None),
        lm("odd.lm", 4, 8, domains=["odd"]),
        lm("even.lm", 5, 8, domains=["even"]),
        classifier("sense", 6, num_labels=3),
        classifier("score", 7, "regression", num_labels=1),
        classifier("topics", 8, num_labels=4, problem_type="multi_label_classification"),
        classifier("pair", 9, num_labels=2, pairs="adjacent"),
        {"name": "tags", "model": tagger, "task": "token_classification"},
    ]
    size = _size(wordpiece)
    student = bert("MaskedLM", 10, vocab_size=size + PADDING_ROWS)
    folder = tmp_path_factory.mktemp("masked") / "cache"
    return _world(folder, corpus_file, wordpiece, teachers, Path(student))


@pytest.fixture(scope="session")
def experts_world(
    tmp_path_factory: pytest.TempPathFactory,
    corpus_file: Path,
    wordpiece: Path,
    make_model: Callable[..., Path],
) -> World:
    """Experts to be merged: classifiers with label names of their own, which partly agree, with
    Monte-Carlo passes; some for one domain only, some for sentence pairs; and one masked LM.
    """

    def bert(auto: str, seed: int, **extra: object) -> str:
        return str(make_model("bert", f"AutoModelFor{auto}", wordpiece, seed, **NARROW, **extra))

    def classifier(name: str, seed: int, *labels: str, **extra: object) -> dict:
        names = dict(enumerate(labels))
        model = bert(
            "SequenceClassification",
            seed,
            id2label=names,
            label2id={n: i for i, n in names.items()},
        )
        task, passes = "sequence_classification", {"passes": 4}
        return {"name": name, "model": model, "task": task, "monte_carlo": passes, **extra}

    odd = {"domains": ["odd"]}
    score = bert("SequenceClassification", 7, num_labels=1)
    taggers = [bert("TokenClassification", seed, num_labels=5) for seed in (5, 25)]
    lm = {
        "name": "lm",
        "model": bert("MaskedLM", 1),
        "task": "masked_lm",
        "targets": {"kind": "topk", "k": 8},
    }
    teachers = [
        lm,
        classifier("animals", 21, "cat", "dog", "fish"),
        classifier("pets", 22, "bird", "dog", "cat"),
        classifier("weather", 23, "sun", "rain", "snow", "wind"),
        classifier("odd.plants", 24, "oak", "rose", **odd),
        classifier("unnamed", 26, "LABEL_0", "LABEL_1"),
        classifier("pair.a", 27, "yes", "no", pairs="adjacent"),
        classifier("pair.b", 28, "no", "maybe", "yes", pairs="adjacent"),
        {"name": "odd.score", "model": score, "task": "regression", **odd},
        {"name": "tags", "model": taggers[0], "task": "token_classification"},
        {"name": "odd.tags", "model": taggers[1], "task": "token_classification", **odd},
    ]
    size = _size(wordpiece)
    student = bert("MaskedLM", 10, vocab_size=size + PADDING_ROWS)
    folder = tmp_path_factory.mktemp("experts") / "cache"
    return _world(folder, corpus_file, wordpiece, teachers, Path(student))


@pytest.fixture(scope="session")
def causal_world(
    tmp_path_factory: pytest.TempPathFactory,
    corpus_file: Path,
    bytelevel: Path,
    make_model: Callable[..., Path],
) -> World:
    """Causal teachers and one classifier, on the GPT-2 tokenizer."""

    def gpt(auto: str, seed: int, **extra: object) -> str:
        return str(make_model("gpt2", f"AutoModelFor{auto}", bytelevel, seed, n_embd=16, **extra))

    teachers = [
        {
            "name": "lm",
            "model": gpt("CausalLM", 1),
            "task": "causal_lm",
            "targets": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]},
        },
        {
            "name": "odd",
            "model": gpt("CausalLM", 2),
            "task": "causal_lm",
            "targets": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]},
            "domains": ["odd"],
        },
        {
            "name": "sense",
            "model": gpt("SequenceClassification", 3, num_labels=3),
            "task": "sequence_classification",
        },
    ]
    student = gpt("CausalLM", 10, vocab_size=_size(bytelevel) + PADDING_ROWS)
    folder = tmp_path_factory.mktemp("causal") / "cache"
    return _world(folder, corpus_file, bytelevel, teachers, Path(student))


def _size(tokenizer: Path) -> int:
    from rekindle.data.corpus.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer)).size
