"""Makes the golden cache of format version 5, 6, 8, 9, 11 or 12, and what it decodes to. Run once
for each; never for an old one.

    PYTHONPATH=tests/lib python tests/golden/make_younger.py tests/golden/cache-v9

5: commit records that are rolled up (of a set as small as this one by `MIN_UNITS` alone). 6: a
dialogue, tokens with labels, and text. 8: several documents in a row, for a masked and a causal LM.
9: a teacher with a tokenizer of its own. 11: vectors of sentence encoders. 12: pairs in groups, and
an expert that scores them.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from make_cache import TEXTS, decoded, train_tokenizer
from tokenizers import ByteLevelBPETokenizer

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.settings import parse_settings
from rekindle.data.storage import records
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from testlib.vocabularies.dialogues import MARKED, chat_tokenizer, said, write_rows
from testlib.vocabularies.pieces import save_pieces

UNITS = 2  # a set of so many is rolled up here
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 16, "max_position_embeddings": 64, "initializer_range": 0.6}
AUTO = {"masked_lm": transformers.BertForMaskedLM, "causal_lm": transformers.LlamaForCausalLM}


def teacher(work: Path, tokenizer: Path, task: str, **more: object) -> dict:
    """A tiny random one of that tokenizer."""
    found = load_tokenizer(str(tokenizer))
    config = AUTO[task].config_class(vocab_size=found.size, **SHAPE)
    config.pad_token_id = found.pad_id
    AUTO[task](config).save_pretrained(work / task)
    found.save(str(work / task))
    kept = {"kind": "topk", "k": 4, "temperatures": [1.0, 2.0]}
    return {"name": task, "model": str(work / task), "task": task, "targets": kept, **more}


def rolled_up(work: Path) -> dict:
    records.MIN_UNITS = UNITS
    (work / "docs.txt").write_text("\n\n".join(TEXTS) + "\n")
    folder = work / "tokenizer"
    train_tokenizer(folder)
    corpus = {"source": [str(work / "docs.txt")], "tokenizer": str(folder)}
    return {"corpus": corpus, "teachers": [teacher(work, folder, "masked_lm")]}


def trained(work: Path) -> dict:
    train_tokenizer(work / "plain")
    folder = chat_tokenizer(work / "plain", work / "tokenizer", MARKED)
    dialogue = {"messages": said("u: who guesses?", "a: the teacher.", "u: who?", "a: teacher")}
    ids = load_tokenizer(str(folder)).hf(TEXTS[2])["input_ids"]
    labels = [-100 if number % 3 == 0 else one for number, one in enumerate(ids)]
    rows = [{"input_ids": ids, "labels": labels}, {"input_ids": ids[::-1], "labels": ids[::-1]}]
    source = [
        {"path": str(write_rows(work / "chat.jsonl", [dialogue])), "format": "chat"},
        {"path": str(write_rows(work / "rows.jsonl", rows)), "format": "tokens"},
        str(write_rows(work / "texts.jsonl", [{"text": text} for text in TEXTS[:2]])),
    ]
    corpus = {"source": source, "tokenizer": str(folder), "sequence_length": 48}
    return {"corpus": corpus, "teachers": [teacher(work, folder, task) for task in AUTO]}


def packed(work: Path) -> dict:
    folder = work / "tokenizer"
    train_tokenizer(folder)
    texts = [part for text in TEXTS for part in text.split(". ")]
    source = str(write_rows(work / "texts.jsonl", [{"text": text} for text in texts]))
    corpus = {"source": [source], "tokenizer": str(folder), "packing": "packed"}
    corpus["sequence_length"] = 32
    return {"corpus": corpus, "teachers": [teacher(work, folder, task) for task in AUTO]}


def mapped(work: Path) -> dict:
    byte_level = ByteLevelBPETokenizer()
    settings = {"vocab_size": 280, "special_tokens": ["<|endoftext|>"], "show_progress": False}
    byte_level.train_from_iterator(TEXTS, **settings)
    (work / "tokenizer").mkdir()
    byte_level.save_model(str(work / "tokenizer"))
    files = {name: str(work / "tokenizer" / name) for name in ("vocab.json", "merges.txt")}
    fast = transformers.GPT2TokenizerFast(vocab=files["vocab.json"], merges=files["merges.txt"])
    fast.save_pretrained(work / "tokenizer")
    own = save_pieces(work / "own", TEXTS, 300)
    source = str(write_rows(work / "texts.jsonl", [{"text": text} for text in TEXTS[:3]]))
    corpus = {"source": [source], "tokenizer": str(work / "tokenizer"), "sequence_length": 24}
    return {"corpus": corpus, "teachers": [teacher(work, own, "causal_lm", vocabulary="map")]}


def vectors(work: Path) -> dict:
    folder = work / "tokenizer"
    tokenizer = train_tokenizer(folder)
    config = transformers.BertConfig(vocab_size=tokenizer.size, **SHAPE)
    transformers.BertModel(config).save_pretrained(work / "encoder")
    tokenizer.save(str(work / "encoder"))
    own = {"model": str(work / "encoder"), "task": "embedding"}
    whole = {"pooling": "mean", "normalise": True}
    few = {"pooling": "cls", "normalise": False, "domains": ["1"], "prompt": "the text: "}
    source = write_rows(
        work / "texts.jsonl",
        [{"text": text, "domain": f"{n % 2}"} for n, text in enumerate(TEXTS)],
    )
    corpus = {"source": [str(source)], "tokenizer": str(folder), "domain_field": "domain"}
    teachers = [own | whole | {"name": "halves"}, own | few | {"name": "bytes"}]
    teachers[1]["targets"] = {"vectors": "int8"}
    return {"corpus": corpus, "teachers": teachers}


def grouped(work: Path) -> dict:
    folder = work / "tokenizer"
    found = train_tokenizer(folder)
    texts = [part for text in TEXTS for part in text.split(". ")]
    rows = [{"q": texts[n % 3], "d": texts[-1 - n], "of": n % 3} for n in range(6)]
    source = str(write_rows(work / "pairs.jsonl", rows))
    corpus = {"source": [source], "text_field": "q", "pair_field": "d", "group_field": "of"}
    config = transformers.BertConfig(vocab_size=found.size, num_labels=1, **SHAPE)
    config.pad_token_id = found.pad_id
    transformers.BertForSequenceClassification(config).save_pretrained(work / "ranker")
    found.save(str(work / "ranker"))
    expert = {"name": "ranker", "model": str(work / "ranker"), "task": "regression"}
    return {"corpus": corpus | {"tokenizer": str(folder)}, "teachers": [expert]}


MADE: dict[str, Callable[[Path], dict]] = {
    "cache-v5": rolled_up,
    "cache-v6": trained,
    "cache-v8": packed,
    "cache-v9": mapped,
    "cache-v11": vectors,
    "cache-v12": grouped,
}


def main(out: Path) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        values = MADE[out.name](Path(folder))
        values["corpus"] = {"sequence_length": 16} | values["corpus"]
        values["cache"] = {"path": str(out), "sequences_per_shard": 4, "replicas": 1}
        cache_teachers(parse_settings(RunConfig, values))
    expected = [decoded(out, index) for index in range(len(Cache.open(out)))]
    out.with_suffix(".json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
