"""A small world on disk: texts, labels, models, a run file, its cache, a finished run and an
interrupted one. A case changes one of its files; afterwards everything is restored.
"""

import json
import os
import random
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from testlib.command import pipeline
from testlib.one_place.commands import SWEEP, TEACH

WORDS = ["the", "of", "in", "to", "and", "model", "teacher", "student", "learns", "guides"]
WORDS += ["writes", "reads", "small", "large"]
LETTERS = [chr(number) for number in range(ord("a"), ord("z") + 1)]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ":"]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ ' ' }}{% endfor %}"
)
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 16, "max_position_embeddings": 64}


class World:
    """The files below ``root``, as they were made and as they are now."""

    def __init__(self, root: Path):
        self.root = root
        self.made: dict[str, bytes] = {}

    def remember(self) -> None:
        """Remember everything for ``restore``."""
        self.made = self.files()

    def files(self) -> dict[str, bytes]:
        """Return the bytes of every file, by its place."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}

    def changed(self) -> list[str]:
        """Return the files that were changed, added or removed, without locks."""
        now = self.files()
        names = [name for name in {*now, *self.made} if now.get(name) != self.made.get(name)]
        return sorted(name for name in names if not name.endswith(".lock"))

    def restore(self) -> None:
        """Restore every file."""
        for name in self.changed():
            (self.root / name).unlink(missing_ok=True)
            if name in self.made:
                self.write(name, self.made[name])
        for folder, _, _ in os.walk(self.root, topdown=False):
            if folder != str(self.root) and not os.listdir(folder):
                os.rmdir(folder)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, but never in place, because it may be mapped."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(".new").write_bytes(content)
        os.replace(path.with_name(".new"), path)


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(4, 9))) + "."


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(root: Path) -> None:
    draw = random.Random(0)
    said = [sentence(draw) for _ in range(40)]
    names = ["no", "yes"]
    lines(root / "docs.jsonl", [{"text": t, "domain": "ab"[n % 2]} for n, t in enumerate(said[:9])])
    lines(root / "labels.jsonl", [{"text": t, "label": names[n % 2]} for n, t in enumerate(said)])
    turns = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(said[:6], said[6:12], strict=True)
    ]
    lines(root / "chat.jsonl", [{"messages": turn} for turn in turns])
    ids = [[draw.randrange(len(MARKS), 60) for _ in range(12)] for _ in range(6)]
    masks = [[int(place > 3) for place in range(12)] for _ in ids]
    rows = zip(ids, masks, strict=True)
    lines(root / "tokens.jsonl", [{"input_ids": i, "assistant_masks": m} for i, m in rows])


def write_models(root: Path) -> None:
    import torch
    import transformers

    vocabulary = [*MARKS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    (root / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    kind = transformers.BertTokenizerFast
    tokenizer = kind(vocab=str(root / "vocab.txt"), model_max_length=64)
    tokenizer.chat_template = CHAT
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    made = {
        "lm": (transformers.BertConfig, "AutoModelForMaskedLM", {}),
        "expert": (transformers.BertConfig, "AutoModelForSequenceClassification", labels),
        "student": (transformers.BertConfig, "AutoModelForMaskedLM", {}),
        "causal": (transformers.LlamaConfig, "AutoModelForCausalLM", {"eos_token_id": 3}),
    }
    for seed, (name, (config, auto, more)) in enumerate(made.items()):
        torch.manual_seed(seed)
        settings = config(vocab_size=len(tokenizer), pad_token_id=0, **SHAPE, **more)
        model = getattr(transformers, auto).from_config(settings)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        marks = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        (root / name / "special_tokens_map.json").write_text(json.dumps(marks))
    shutil.move(root / "vocab.txt", root / "words.txt")


def run_values(root: Path) -> dict[str, Any]:
    """Return the run file of the world."""
    lm = {"name": "lm", "model": str(root / "lm"), "task": "masked_lm"}
    expert = {"name": "expert", "model": str(root / "expert"), "task": "sequence_classification"}
    return {
        "corpus": {
            "source": [str(root / "docs.jsonl")],
            "tokenizer": str(root / "student"),
            "sequence_length": 16,
            "domain_field": "domain",
        },
        "cache": {"path": str(root / "cache"), "sequences_per_shard": 6, "replicas": 2},
        "teachers": [lm | {"targets": {"kind": "topk", "k": 4}}, expert],
        "student": {"model": str(root / "student")},
        "train": {
            "steps": 2,
            "batch_sequences": 4,
            "warmup_steps": 1,
            "checkpoint_every": 1,
            "evaluate_every": 2,
            "held_out": 0.2,
            "objective": {
                "hard": {"weight": 0.5},
                "distill": [{"teachers": ["lm"]}, {"teachers": ["expert"]}],
            },
        },
    }


def write_cycle(root: Path, values: Mapping[str, Any]) -> None:
    """Write the file of a cycle, with the labels in two splits."""
    rows = (root / "labels.jsonl").read_text().splitlines()
    for name, part in (("train", rows[:28]), ("test", rows[28:])):
        (root / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in part))
    task = {"name": "said", "train": str(root / "train.jsonl"), "test": str(root / "test.jsonl")}
    write_yaml(
        root / "cycle.yaml",
        {
            "corpus": values["corpus"],
            "cache": {"replicas": 1},
            "student": values["student"],
            "train": {"steps": 2, "batch_sequences": 4, "warmup_steps": 1, "keep_best": None},
            "tasks": [task],
            "finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3},
            "seeds": 2,
        },
    )


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def done(*arguments: object) -> None:
    """Run a command that must succeed."""
    found = pipeline(*arguments)
    assert found.returncode == 0, found.stderr


def make_world(root: Path, subjects: Collection[str]) -> World:
    """Write everything, run its commands, and remember the files. What takes long is made only for
    the ``subjects`` that need it.
    """
    write_texts(root)
    write_models(root)
    values = run_values(root)
    write_yaml(root / "run.yaml", values)
    for form in ("text", "chat", "tokens"):
        name = "docs" if form == "text" else form
        corpus = {k: v for k, v in values["corpus"].items() if k != "domain_field"}
        corpus |= {"source": [str(root / f"{name}.jsonl")], "format": form}
        causal = {"name": "said", "model": str(root / "causal"), "task": "causal_lm"}
        teachers = values["teachers"] if form == "text" else [causal | {"targets": {"k": 4}}]
        other = {"corpus": corpus | {"sequence_length": 64}, "teachers": teachers}
        other["cache"] = values["cache"] | {"path": str(root / f"new-{form}")}
        write_yaml(root / f"{form}.yaml", values | other)
    write_cycle(root, values)
    done("cache-teachers", root / "run.yaml")
    done("train-student", root / "run.yaml", "--out", root / "whole")
    if "sweep" in subjects:
        done(*SWEEP.format(root=root).split()[:-1])
    if "expert done" in subjects:
        done(*TEACH.format(root=root).split())
    whole = {"name": "whole", "model": str(root / "whole"), "task": "masked_lm"}
    cache = values["cache"] | {"path": str(root / "new-student")}
    write_yaml(root / "student.yaml", values | {"cache": cache, "teachers": [whole]})
    shutil.copytree(root / "whole", root / "half")
    interrupt(root / "half")
    found = World(root)
    found.remember()
    return found


def interrupt(run: Path) -> None:
    """Turn a finished run of two steps into one killed after its first checkpoint."""
    kept = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    for path in [*run.iterdir()]:
        if path.is_file() and path.name not in ("run.json",):
            path.unlink()
    for path in run.glob("checkpoints/step-00000002"):
        shutil.rmtree(path)
    lines(run / "metrics.jsonl", [kept])
