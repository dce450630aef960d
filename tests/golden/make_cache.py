"""Makes a golden cache and what it decodes to. Run once per format version; never for an old one.

    python tests/golden/make_cache.py tests/golden/cache-v4

From version 3 on with gaps in the ids, names of special tokens in a text, and the end-of-text token
after each document of a tokenizer that only begins one. Version 3 has every kind of target, and
extensions; version 4, which is 3 with imported targets, those, and the rows that they are of. Tiny
random models; the bytes need not be reproducible, they are frozen in the repository.
"""

import itertools
import json
import math
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
PROVENANCE = {"model": "made-up", "engine": "make_cache.py"}
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
        }
        for name, model in made.items():
            model.save_pretrained(work / name)
            tokenizer.save(str(work / name))
        top = {"kind": "topk", "k": 6}
        teachers = [
            {"name": "lm", "task": "masked_lm", "targets": top},
            {"name": "expert", "task": "sequence_classification"},
        ]
        values = {
            "corpus": {
                "source": [str(work / "docs.jsonl")],
                "domain_field": "domain",
                "tokenizer": str(work / "tokenizer"),
                "sequence_length": 16,
            },
            "cache": {"path": str(out), "sequences_per_shard": 4, "replicas": 2},
            "teachers": [t | {"model": str(work / str(t["name"]))} for t in teachers],
        }
        cache_teachers(parse_settings(RunConfig, values))
    cache, imported = Cache.open(out), {}
    for name, (settings, rows) in elsewhere(cache).items():
        cache.import_targets(name, rows, PROVENANCE, **settings)
        imported[name] = {"settings": settings, "rows": rows}
    rows_of(out).write_text(json.dumps(imported) + "\n")
    expected = [decoded(out, index) for index in range(len(Cache.open(out)))]
    (out.with_suffix(".json")).write_text(json.dumps(expected) + "\n")


def elsewhere(cache: Cache) -> dict[str, tuple[dict, list[dict]]]:
    """What is imported: made-up distributions; the settings and the rows of each teacher."""
    whole = {index: made_up(cache, index) for index in range(len(cache))}
    told = {"tails": (1.0, (2.0, 4.0)), "served": (2.0, ()), "packed": (1.0, ())}
    causal = {
        name: [about(cache, index) | top(logits, *at) for index, logits in whole.items()]
        for name, at in told.items()
    }
    for row in causal["tails"]:
        gold = cache.example(row["index"]).input_ids[1:]
        log_probs = log_softmax(whole[row["index"]], 1.0)
        own = log_probs[np.arange(len(gold)), gold]
        row["gold_log_probs"] = own.tolist()
        row["gold_ranks"] = (log_probs > own[:, None]).sum(axis=1).tolist()
        row["entropy"] = (-np.exp(log_probs) * log_probs).sum(axis=1).tolist()
    masked, view = [], cache.masked_view().name
    for replica, index in itertools.product((0, 1), whole):
        shown = cache.gather(np.array([index]), [], epoch=replica, masked_view=view).masked
        assert shown.replica == replica
        row = about(cache, index) | top(made_up(cache, index, 50)[shown.positions - 1])
        masked.append(row | {"replica": replica, "positions": shown.positions.tolist()})
    logits = np.random.default_rng(99).normal(0, 2, (len(cache), 3)).round(4).tolist()
    judge = [about(cache, index) | {"logits": each} for index, each in enumerate(logits)]
    return {
        "tails": ({}, causal["tails"]),
        "served": ({"codec": "precise"}, causal["served"]),
        "packed": ({"codec": "compact"}, causal["packed"]),
        "masked": ({"task": "masked_lm"}, masked),
        "judge": ({"task": "sequence_classification", "labels": ["a", "b", "c"]}, judge),
    }


def made_up(cache: Cache, index: int, seed: int = 0) -> np.ndarray:
    """Logits [S−1,V] that no model gave; none of an id that is no token."""
    facts = cache.corpus.info["tokenizer"]
    shape = (len(cache.example(index).input_ids) - 1, facts["size"])
    logits = np.random.default_rng(seed + index).normal(0, 3, shape)
    for first, last in facts["holes"]:
        logits[:, first:last] = -100
    return logits


def about(cache: Cache, index: int) -> dict:
    return {"index": index, "input_ids": cache.example(index).input_ids.tolist()}


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    cold = logits / temperature
    return cold - np.logaddexp.reduce(cold, axis=1, keepdims=True)


def top(logits: np.ndarray, own: float = 1.0, further: tuple[float, ...] = (), k: int = 5) -> dict:
    """The k likeliest, and, with ``further`` temperatures, the mass of the others."""
    ids = np.argsort(-logits, axis=1)[:, :k]
    log_probs = np.take_along_axis(log_softmax(logits, own), ids, axis=1)
    row = {"ids": ids.tolist(), "log_probs": log_probs.tolist()}
    row |= {} if own == 1 else {"temperature": own}
    tails = {}
    for at in (own, *further) if further else ():
        rest = log_softmax(logits, at)
        np.put_along_axis(rest, ids, -np.inf, axis=1)
        tails[f"{at:g}"] = np.logaddexp.reduce(rest, axis=1).tolist()
    return row | ({"log_tail": tails.pop(f"{own:g}"), "log_tails": tails} if tails else {})


def rows_of(path: Path) -> Path:
    """Where the rows lie that a cache's imported targets were made of."""
    return path.with_name(f"{path.name}-rows.json")


def decoded(path: Path, index: int) -> dict:
    """Everything one example decodes to, as plain JSON."""
    cache = Cache.open(path)
    example = cache.example(index)
    plain = {k: v for k, v in vars(example).items() if k != "targets"}
    if plain["trained"] is None:  # as it was before a corpus could say it
        del plain["trained"]
    if plain["group"] is None:
        del plain["group"]
    numbers = cache.gather([index], []).document_numbers
    if numbers is not None:
        plain["document_numbers"] = numbers[0]
    targets = {n: [_plain(vars(t)) for t in found] for n, found in example.targets.items()}
    return _plain(plain) | {"targets": targets}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        # float32 survives the way through decimal digits; −inf and NaN have no JSON: words.
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
