"""The commands that read the world's files: what is typed, and the result to compare."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file

from rekindle.pipeline.yaml_text import parse_yaml
from testlib.caches import committed

Result = Callable[[Path, str], Any]


@dataclass(frozen=True)
class Command:
    """``typed``: words, where {root} is the world. ``result``: computes the result from the world
    and the printed output. ``again``: additional words when resuming.
    """

    typed: str
    result: Result
    again: str = ""

    def words(self, root: Path, again: bool = False) -> list[str]:
        return [word.format(root=root) for word in f"{self.typed} {self.again * again}".split()]


def printed(root: Path, said: str) -> Any:
    """Return the JSON on stdout, without times and rates."""
    return timeless(json.loads(said))


TIMES = ("second", "hour", "minute", "bytes", "break_even", "cost", "disk", "path")


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(t in k for t in TIMES)}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def text(root: Path, said: str) -> str:
    return said


def rows(name: str) -> Result:
    return lambda root, said: [json.loads(x) for x in (root / name).read_text().splitlines()]


def weights(name: str) -> Result:
    def read(root: Path, said: str) -> Any:
        files = sorted((root / name).glob("*.safetensors"))
        return {f"{f.name} {k}": v for f in files for k, v in load_file(f).items()}

    return read


def targets(name: str) -> Result:
    """Return every column of every unit of a cache, by set, unit and column."""

    def read(root: Path, said: str) -> Any:
        found = {}
        for unit, content in committed(root / name).items():
            table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
            found |= {
                f"{unit} {column}": table[column].to_pylist() for column in table.schema.names
            }
        return found

    return read


def numbers(value: Any) -> Iterator[float]:
    """Yield every number in a result."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, np.ndarray):
        yield from value.astype(np.float64).ravel().tolist()
    elif isinstance(value, int | float):
        yield float(value)


def finite(value: Any) -> bool:
    return all(map(math.isfinite, numbers(value)))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)


TRAIN = "train-student {root}/run.yaml --out {root}/new"
TEACH = (
    "finetune {root}/student --train {root}/train.jsonl --dev {root}/test.jsonl "
    "--out {root}/taught --set max_steps=1 --set max_length=5 --set learning_rate=0.01"
)
SWEEP = "train-student {root}/run.yaml --out {root}/swept --sweep train.seed=0,1 --resume"
COMMANDS = {
    "train": Command(TRAIN, weights("new"), "--resume"),
    "resume": Command(TRAIN.replace("new", "half") + " --resume", weights("half")),
    "cache": Command("cache-teachers {root}/run.yaml", targets("cache")),
    "cache text": Command("cache-teachers {root}/text.yaml", targets("new-text")),
    "cache chat": Command("cache-teachers {root}/chat.yaml", targets("new-chat")),
    "cache tokens": Command("cache-teachers {root}/tokens.yaml", targets("new-tokens")),
    "plan": Command("plan {root}/run.yaml --no-probe --json", printed),
    "verify": Command("verify {root}/cache --json", printed),
    "inspect": Command("inspect {root}/cache --json", printed),
    "example": Command("inspect {root}/cache --example 1", text),
    "audit": Command("verify {root}/cache --audit 2 --config {root}/run.yaml --json", printed),
    "predict": Command(
        "predict {root}/expert --text {root}/docs.jsonl --out {root}/said.jsonl",
        rows("said.jsonl"),
    ),
    "evaluate": Command("evaluate {root}/expert --test {root}/labels.jsonl --json", printed),
    "perplexity": Command("evaluate {root}/lm --text {root}/docs.jsonl --json", printed),
    "of student": Command(
        "evaluate {root}/whole --head expert --test {root}/labels.jsonl --json", printed
    ),
    "finetune": Command(
        "finetune {root}/student --train {root}/labels.jsonl --dev {root}/labels.jsonl "
        "--out {root}/tuned --set max_steps=1",
        weights("tuned"),
    ),
    "tune student": Command(
        "finetune {root}/whole --train {root}/labels.jsonl --dev {root}/labels.jsonl "
        "--out {root}/tuned --head expert --set max_steps=1",
        weights("tuned"),
    ),
    "generate": Command(
        "generate {root}/causal --prompts {root}/chat.jsonl --out {root}/said.jsonl "
        "--set max_new_tokens=4 --set temperature=0",
        rows("said.jsonl"),
    ),
    "export": Command("export {root}/whole --head expert --out {root}/given", weights("given")),
    "sweep": Command(
        SWEEP, lambda root, said: {n: weights(f"swept/{n}")(root, said) for n in "01"}
    ),
    "compare sweep": Command("compare {root}/swept --json", printed),
    "cycle": Command(
        "rekindle {root}/cycle.yaml --out {root}/cycle",
        lambda root, said: parse_yaml((root / "cycle/run.yaml").read_text(), "run.yaml"),
    ),
    "ask taught": Command("evaluate {root}/taught --test {root}/labels.jsonl --json", printed),
    "cache student": Command("cache-teachers {root}/student.yaml", targets("new-student")),
    "compare": Command("compare {root}/whole {root}/half --json", printed),
}
