"""The inputs of the runs of ``digests.py``: text, tokenizers, tiny random models. All from fixed
seeds; nothing is trained or downloaded.
"""

import json
import random
from pathlib import Path

Values = dict[str, object]

VOCABULARY = """
the a of in to and model teacher student learns guides writes reads small large old new quick cache
token masked causal gradient loss river mountain city engine paper number light water runs falls
rises gives takes keeps under over between beside without against
"""
WORDS = VOCABULARY.split()
LARGE = 66_000  # tokens of the large vocabulary: ids beyond 65,536 have a plane of their own


# --- text -----------------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> list[str]:
    """Return sentences of 3 to 12 words."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(3, 12))).capitalize() + "."
        for _ in range(count)
    ]


def write_lines(path: Path, records: list[Values]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_text(work: Path) -> None:
    """Write the corpus, and two labelled tasks: classes of single texts, scores of pairs."""
    write_lines(
        work / "docs.jsonl",
        [
            {
                "id": f"d{number}",
                "text": " ".join(sentences(1 + number * 5 % 7, number)),
                "domain": ("north", "south")[number % 2],
            }
            for number in range(14)
        ],
    )
    for split, first in (("train", 100), ("dev", 200)):
        texts = [sentences(2, first + number) for number in range(24)]
        write_lines(
            work / f"classes-{split}.jsonl",
            [{"text": a, "label": ("short", "long")[len(a) > 40]} for a, _ in texts],
        )
        write_lines(
            work / f"scores-{split}.jsonl",
            [{"sentence1": a, "sentence2": b, "label": len(a) / len(b)} for a, b in texts],
        )


# --- tokenizers and models ------------------------------------------------------------------------


def write_tokenizer(work: Path, name: str) -> None:
    """Write a tokenizer. It is not trained: the trainers break ties anew in every process."""
    folder = work / name
    folder.mkdir()
    if name == "bytelevel":
        _write_byte_level(folder)
        return
    from transformers import BertTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    begin = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters]
    begin += ["##" + letter for letter in letters]
    pieces = [piece for word in WORDS for piece in (word[:2], "##" + word[-2:])]
    vocabularies = {
        "wordpiece": [*begin, *pieces, *WORDS[::2]],
        "foreign": [*begin, *WORDS],
        "large": [*begin, *(f"unused{number}" for number in range(LARGE)), *WORDS],
    }
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabularies[name])) + "\n")
    fast = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    fast.save_pretrained(folder)


def _write_byte_level(folder: Path) -> None:
    from transformers import GPT2TokenizerFast

    merges = [
        pair
        for word in WORDS[::2]
        if len(word) > 2
        for pair in (("Ġ", word[0]), (word[0], word[1]), (word[:2], word[2]))
    ]
    merges = list(dict.fromkeys(merges))
    alphabet = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    tokens = ["<|endoftext|>", *alphabet, *(left + right for left, right in merges)]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    GPT2TokenizerFast(**files, model_max_length=64).save_pretrained(folder)


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
GPT = {
    **{"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3},
    **{"bos_token_id": 0, "eos_token_id": 0},
}


def labels(*names: str) -> Values:
    """Return the configuration of a classifier with these classes."""
    ids = {name: number for number, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": ids}


CLASSIFIER, TAGGER = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
MASKED, CAUSAL = "AutoModelForMaskedLM", "AutoModelForCausalLM"
# Name -> (tokenizer, transformers class, configuration beside that of the family).
MODELS: dict[str, tuple[str, str, Values]] = {
    "lm": ("wordpiece", MASKED, {}),
    "lm-padded": ("wordpiece", MASKED, {"padding": 5}),
    "lm-large": ("large", MASKED, {"hidden_size": 16, "num_hidden_layers": 1}),
    "gpt": ("bytelevel", CAUSAL, {}),
    "gpt-wordpiece": ("wordpiece", CAUSAL, {}),
    "sense": ("wordpiece", CLASSIFIER, labels("good", "bad", "none")),
    "sense-foreign": ("foreign", CLASSIFIER, labels("bad", "so", "best", "none")),
    "several": (
        "wordpiece",
        CLASSIFIER,
        labels("warm", "wet", "light") | {"problem_type": "multi_label_classification"},
    ),
    "score": ("wordpiece", CLASSIFIER, {"num_labels": 1, "problem_type": "regression"}),
    "tags": ("wordpiece", TAGGER, labels("noun", "verb", "other", "stop")),
    "sense-gpt": ("bytelevel", CLASSIFIER, labels("good", "bad")),
    "student": ("wordpiece", MASKED, {}),
    "student-gpt": ("bytelevel", CAUSAL, {}),
}


def write_model(work: Path, name: str) -> None:
    """Write a model with random weights, from a seed of its own, and its tokenizer."""
    import torch
    import transformers

    tokenizer, auto, given = MODELS[name]
    fast = transformers.AutoTokenizer.from_pretrained(work / tokenizer)
    extra = dict(given)
    ids = {"vocab_size": len(fast) + int(str(extra.pop("padding", 0))), "pad_token_id": 0}
    gpt = "gpt" in name
    config_class = transformers.GPT2Config if gpt else transformers.BertConfig
    config = config_class(**((GPT if gpt else BERT) | ids | extra))
    torch.manual_seed(list(MODELS).index(name))
    getattr(transformers, auto).from_config(config).save_pretrained(work / "models" / name)
    fast.save_pretrained(work / "models" / name)


def write_material(work: Path, run_files: dict[str, Values]) -> None:
    """Write the run files, and everything that commands read."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    write_text(work)
    used = json.dumps(run_files)
    models = [name for name in MODELS if f'"models/{name}"' in used or name == "student"]
    for name in sorted({MODELS[model][0] for model in models}):
        write_tokenizer(work, name)
    for name in models:
        write_model(work, name)
    for name, values in run_files.items():
        (work / f"{name}.yaml").write_text(json.dumps(values, indent=1) + "\n")  # YAML, too
