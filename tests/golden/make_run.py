"""Makes a golden run: one that was stopped after its checkpoint, and what the whole of it came to.

    python tests/golden/make_run.py tests/golden/run-v1

Run once per version of the run's record; never for an old one. The paths of the student and of the
cache are written as STUDENT and CACHE: who opens the run puts its own student there.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.storage.seal import SEAL, seal
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student

HERE = Path(__file__).parent
CACHE = HERE / "cache-v2"
STUDENT = "STUDENT"
CONFIG = {
    "steps": 8,
    "batch_sequences": 3,
    "warmup_steps": 1,
    "learning_rate": 0.01,
    "checkpoint_every": 4,
    "keep_checkpoints": 1,
    "keep_best": None,
    "evaluate_every": 4,
    "held_out": 0.2,
    "objective": {
        "distill": [{"teachers": ["lm"], "temperature": 3.0}, {"teachers": ["expert"]}],
    },
}


def make_student(folder: Path) -> Path:
    """Write the configuration of the student, which begins from scratch."""
    size = json.loads((CACHE / "corpus/corpus.json").read_text())["tokenizer"]["size"]
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 8, "max_position_embeddings": 32, "vocab_size": size}
    transformers.BertConfig(**shape, architectures=["BertForMaskedLM"]).save_pretrained(folder)
    return folder


def train(student: Path, out: Path, stop: int | None = None, **options: bool) -> None:
    """Train it; ``stop`` after so many steps, as Ctrl-C does."""

    def report(step: int, values: object) -> None:
        if step == stop:
            raise KeyboardInterrupt

    config = StudentConfig(model=str(student), from_scratch=True)
    cache = Cache.open(CACHE)
    train_student(cache, config, TrainConfig(**CONFIG), out, report=report, **options)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        student, whole = make_student(Path(folder) / "student"), Path(folder) / "whole"
        train(student, whole)
        shutil.copy(whole / "metrics.jsonl", out.with_suffix(".jsonl"))
        try:
            train(student, out, stop=6)
        except KeyboardInterrupt:
            shutil.rmtree(out / "tensorboard")
        for record in (out / "run.json", *out.glob("checkpoints/*/trainer.json")):
            text = record.read_text().replace(str(student), STUDENT).replace(str(CACHE), "CACHE")
            values = json.loads(text)
            sealed = seal({key: value for key, value in values.items() if key != SEAL})
            record.write_bytes(sealed if SEAL in values else text.encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
