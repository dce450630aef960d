"""Makes a golden cache and what it decodes to. Run once per format version; never for an old one.

    python tests/golden/make_cache.py tests/golden/cache-v2

Tiny random models; the bytes need not be reproducible, they are frozen in the repository.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import BertWordPieceTokenizer

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig

TEXTS = [
    "The cache keeps what the teacher said. The student reads it many times.",
    "A mask hides a token. The teacher guesses the token, and the guess is kept.",
    "Rivers rise in the mountains and fall to the sea.",
    "Numbers are small, and light, and they fit into a byte.",
    "The quick student learns from the slow teacher.",
]


def main(out: Path) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "docs.jsonl").write_text(
            "".join(
                json.dumps({"id": f"d{i}", "text": t, "domain": f"{i % 2}"}) + "\n"
                for i, t in enumerate(TEXTS)
            )
        )
        trainer = BertWordPieceTokenizer(lowercase=True)
        trainer.train_from_iterator(TEXTS, vocab_size=90, min_frequency=1, show_progress=False)
        (work / "tokenizer").mkdir()
        trainer.save_model(str(work / "tokenizer"))
        tokenizer = load_tokenizer(str(work / "tokenizer"))
        shape = {
            "vocab_size": tokenizer.size,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 32,
            "initializer_range": 0.6,
        }
        models = {
            "lm": transformers.BertForMaskedLM(transformers.BertConfig(**shape)),
            "expert": transformers.BertForSequenceClassification(
                transformers.BertConfig(**shape, num_labels=3)
            ),
            "tagger": transformers.BertForTokenClassification(
                transformers.BertConfig(**shape, num_labels=4)
            ),
        }
        for name, model in models.items():
            model.save_pretrained(work / name)
            tokenizer.save(str(work / name))
        teachers = [
            {"name": "lm", "model": "lm", "task": "masked_lm", "targets": {"kind": "topk", "k": 6}},
            {
                "name": "whole",
                "model": "lm",
                "task": "masked_lm",
                "targets": {"kind": "dense"},
                "domains": ["1"],
            },
            {"name": "expert", "model": "expert", "task": "sequence_classification"},
            {
                "name": "pairs",
                "model": "expert",
                "task": "sequence_classification",
                "pairs": "adjacent",
            },
            {"name": "tagger", "model": "tagger", "task": "token_classification"},
            *(
                {
                    "name": name,
                    "model": "lm",
                    "task": "masked_lm",
                    "targets": {"kind": "topk", "k": 6} | kept,
                }
                for name, kept in {
                    "precise": {"codec": "precise"},
                    "compact": {"codec": "compact"},
                    "threshold": {"kind": "threshold", "temperatures": [2.0]},
                    "random": {"kind": "random"},
                    "hidden": {"kind": "hidden"},
                }.items()
            ),
        ]
        # Extended afterwards by a longer corpus, a larger k and a further temperature.
        extended = [{"k": 6}, {"k": 9}, {"k": 9, "temperatures": [1.0, 3.0]}]
        values = {
            "corpus": {
                "source": [str(work / "docs.jsonl")],
                "domain_field": "domain",
                "tokenizer": str(work / "tokenizer"),
                "sequence_length": 16,
                "limit_sequences": 5,
            },
            "cache": {"path": str(out), "sequences_per_shard": 4, "replicas": 2},
            "teachers": [t | {"model": str(work / str(t["model"]))} for t in teachers],
        }
        for targets in extended:
            values["teachers"][0]["targets"] = targets
            cache_teachers(parse_settings(RunConfig, values))
            values["corpus"]["limit_sequences"] = None
    expected = [decoded(out, index) for index in range(len(Cache.open(out)))]
    (out.with_suffix(".json")).write_text(json.dumps(expected) + "\n")


def decoded(path: Path, index: int) -> dict:
    """Everything one example decodes to, as plain JSON."""
    example = Cache.open(path).example(index)
    plain = {k: v for k, v in vars(example).items() if k != "targets"}
    targets = {n: [_plain(vars(t)) for t in found] for n, found in example.targets.items()}
    return _plain(plain) | {"targets": targets}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        # float32 survives the way through decimal digits; −inf has no JSON, so it is a word.
        return [_plain(v) for v in value.tolist()]
    return "-inf" if value == float("-inf") else value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
