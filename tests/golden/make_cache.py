"""Makes a golden cache and what it decodes to. Run once per format version; never for an old one.

    python tests/golden/make_cache.py tests/golden/cache-v3

From version 3 on with gaps in the ids, names of special tokens in a text, and the end-of-text token
after each document of a tokenizer that only begins one. Tiny random models; the bytes need not be
reproducible, they are frozen in the repository.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import BertWordPieceTokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import Tokenizer, load_tokenizer
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig

TEXTS = [
    "The cache keeps what the teacher said. The student reads it many times.",
    "A mask hides a token. The teacher guesses the token, and the guess is kept.",
    "Rivers rise in the mountains and fall to the sea.",
    "Numbers are small, and light, and they fit into a byte.",
    "The quick student learns from the slow teacher.",
    "A text may hold [MASK] or [END] as it is written.",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LIFTED = ("the", "token", "##er", "[END]")  # their ids lie above a gap


def train_tokenizer(folder: Path) -> Tokenizer:
    """WordPiece that puts [CLS] before a text, [END] after none, and has a gap in its ids."""
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(TEXTS, vocab_size=90, min_frequency=1, show_progress=False)
    found = trainer.get_vocab()
    words = sorted((n, token) for token, n in found.items() if token not in SPECIAL)
    chosen = [token for _, token in words if token not in LIFTED]
    ids = {token: n for n, token in enumerate([*SPECIAL, *chosen])}
    ids |= {token: len(ids) + 9 + n for n, token in enumerate(LIFTED)}
    backend = Backend(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([*SPECIAL, "[END]"])
    cls = ("[CLS]", ids["[CLS]"])
    backend.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B:1", [cls])
    names = dict(zip(("pad", "unk", "cls", "sep", "mask", "eos"), [*SPECIAL, "[END]"], strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)
    return load_tokenizer(str(folder))


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
        tokenizer = train_tokenizer(work / "tokenizer")
        shape = {
            "vocab_size": tokenizer.size,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 32,
            "initializer_range": 0.6,
        }
        made = {
            "lm": transformers.BertForMaskedLM(transformers.BertConfig(**shape)),
            "expert": transformers.BertForSequenceClassification(
                transformers.BertConfig(**shape, num_labels=3)
            ),
            "tagger": transformers.BertForTokenClassification(
                transformers.BertConfig(**shape, num_labels=4)
            ),
        }
        for name, model in made.items():
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
        kept = [{"k": 6}, {"k": 9}, {"k": 9, "temperatures": [1.0, 3.0]}]
        extended = [{"kind": "topk"} | targets for targets in kept]
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
