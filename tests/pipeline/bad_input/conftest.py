"""The folder in which every row of the table begins: sound, so that one thing is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from testlib.bad_input.row import Place
from testlib.command import pipeline

TEXTS = [("the old river runs", "good"), ("a small engine falls", "bad")]


@pytest.fixture(scope="session")
def sound(tmp_path_factory, wordpiece, corpus_file, make_teacher, one_thread) -> Path:
    """A run file with all that it names beside it, both stages run, and an expert's labels."""
    root = tmp_path_factory.mktemp("sound")
    own = {"problem_type": "single_label_classification", "num_labels": 2}
    own |= {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    lm = make_teacher("lm", "masked_lm")
    expert = make_teacher("expert", "sequence_classification", config=own)
    for source, name in ((lm["model"], "lm"), (expert["model"], "expert"), (wordpiece, "tokens")):
        shutil.copytree(source, root / name)
    shutil.copy(corpus_file, root / "text.jsonl")
    for name in ("train.jsonl", "dev.jsonl"):
        rows = [{"text": f"{text} {n}", "label": label} for n in range(4) for text, label in TEXTS]
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "corpus": {
            "source": ["text.jsonl"],
            "tokenizer": "tokens",
            "sequence_length": 24,
            "limit_sequences": 12,
        },
        "cache": {"path": "cache", "sequences_per_shard": 6, "replicas": 2},
        "teachers": [
            lm | {"model": "lm", "targets": {"kind": "topk", "k": 4}},
            expert | {"model": "expert"},
        ],
        "student": {"model": "lm"},
        "train": {
            "steps": 2,
            "batch_sequences": 4,
            "warmup_steps": 0,
            "checkpoint_every": 1,
            "objective": {"distill": [{"teachers": ["lm"]}, {"teachers": ["expert"]}]},
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for line in ("cache-teachers run.yaml", "train-student run.yaml --out student"):
            done = pipeline(*line.split())
            assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of ``sound`` that may be spoilt, as the working directory."""
    shutil.copytree(sound, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return Place(tmp_path / "here", monkeypatch)


@pytest.fixture
def contents(tmp_path: Path) -> Callable[[], dict[str, bytes | None]]:
    """contents() -> every folder (None) and every file's bytes below this test's folder."""

    def read() -> dict[str, bytes | None]:
        return {
            str(path.relative_to(tmp_path)): path.read_bytes() if path.is_file() else None
            for path in sorted(tmp_path.rglob("*"))
        }

    return read
