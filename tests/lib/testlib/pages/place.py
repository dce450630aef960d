"""A folder in which the programs of the pages run: every model and text that they name is there,
and what an earlier page has made is made when a command needs it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.builtin.names import PREFIX, places
from testlib.pages.blocks import ROOT, blocks_of
from testlib.pages.shell import commands_of, run_command

# What the pages call models and files, as built-in ones.
MODELS = {
    "bert": ("path/to/encoder", "path/to/student", "path/to/big-lm", "path/to/code-lm"),
    "gpt2": ("path/to/model",),
    "expert-part": ("path/to/classifier", "path/to/topic-classifier"),
    "expert-next": ("path/to/pair-classifier",),
}
FILES = {
    "corpus": ("questions.jsonl", "wiki.jsonl", "own_texts.jsonl", "prompts.jsonl"),
    "part/train": ("train.jsonl",),
    "part/dev": ("dev.jsonl",),
    "part/test": ("test.jsonl", "new.jsonl"),
}
OF_CACHING = ROOT / "docs" / "caching.md"


def lay_out(folder: Path) -> None:
    """Put models and files under the names of the pages into an empty folder."""
    known = places()
    make_missing(*(str(known[PREFIX + name]) for name in (*MODELS, *FILES)))
    for ours, named in (MODELS | FILES).items():
        for name in named:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if ours in MODELS:
                place.symlink_to(known[PREFIX + ours])
            else:
                shutil.copyfile(known[PREFIX + ours], place)


def smaller(text: str) -> str:
    """A run file for models that take 64 tokens at most."""
    return text.replace("sequence_length: 128", "sequence_length: 48")


def _run(line: str) -> None:
    for command in commands_of(line):
        run_command(command, small=True)


def _run_file() -> None:
    """The first run file of docs/caching.md: the pages that show none go on from it."""
    first = next(block for block in blocks_of(OF_CACHING) if block.file == "run.yaml")
    Path("run.yaml").write_text(smaller(first.text), encoding="utf-8")


def _rows() -> None:
    """What an engine would say of the sequences in sequences.jsonl: a token and all else."""
    rows = [json.loads(line) for line in Path("sequences.jsonl").read_text("utf-8").splitlines()]
    with Path("rows.jsonl").open("w") as out:
        for row in rows:
            tokens = row["input_ids"][1:]
            said = {"index": row["index"], "input_ids": row["input_ids"]}
            said |= {"ids": [[token] for token in tokens], "log_probs": [[-0.5]] * len(tokens)}
            out.write(json.dumps(said) + "\n")


def _student() -> None:
    _run("pipeline train-student run.yaml --out runs/a")


MAKE: dict[str, Callable[[], None]] = {  # in this order: later ones need earlier ones
    "run.yaml": _run_file,
    "runs/cache": lambda: _run("pipeline cache-teachers run.yaml"),
    "runs/a": _student,
    "rows.jsonl": _rows,
}
NEEDS = {"runs/cache": ("run.yaml",), "runs/a": ("run.yaml", "runs/cache")}


def make_needed(words: list[str]) -> None:
    """Make what a command reads and no block of its page has made."""
    written = {words[n + 1] for n, word in enumerate(words) if word in ("--out", ">")}
    named = {word.partition("=")[2] or word for word in words} - written
    if words[1] == "train-student":
        named.add("runs/cache")
    named |= {needed for name in named for needed in NEEDS.get(name, ())}
    for name, make in MAKE.items():
        if name in named and not Path(name).exists():
            make()
