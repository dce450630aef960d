"""Run configurations over tiny corpora, and a cache with a teacher of each kind of target."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small lose more at OpenMP's barriers than they gain, once cores are shared."""
    import torch

    torch.set_num_threads(1)


Configure = Callable[..., Any]


@pytest.fixture(scope="session")
def configure(corpus_file: Path, wordpiece: Path) -> Configure:
    """configure(path, teachers, corpus={…}, cache={…}) -> RunConfig over 12 short sequences.

    Three shards of 5, 5 and 2 sequences, two replicas that mask every token once between them.
    """
    from rekindle.data.settings import parse_settings
    from rekindle.pipeline.config import RunConfig

    def make(
        path: Path,
        teachers: Sequence[Mapping[str, Any]],
        corpus: Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        text = {
            "source": [str(corpus_file)],
            "tokenizer": str(wordpiece),
            "domain_field": "domain",
            "sequence_length": 24,
            "limit_sequences": 12,
        }
        where = {
            "path": str(path),
            "sequences_per_shard": 5,
            "replicas": 2,
            "mask": {"policy": "cover"},
        }
        values = {
            "corpus": text | dict(corpus or {}),
            "cache": where | dict(cache or {}),
            "teachers": [dict(teacher) for teacher in teachers],
        }
        return parse_settings(RunConfig, values)

    return make
