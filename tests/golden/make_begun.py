"""Makes golden records of a cycle, of stages and of a sweep that were begun and not finished.

    python tests/golden/make_begun.py tests/golden/begun-1

Run once, with a version whose configuration lacks keys that the next one has; never for an old
one. Paths are written as HOME and GOLDEN: who opens the records puts its own there. Nothing is
computed.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers

from rekindle.data.settings import parse_settings
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.cycle.config import CycleConfig
from rekindle.pipeline.cycle.run import run_cycle
from rekindle.pipeline.stages.run import run_stages
from rekindle.pipeline.sweep.grid import plan_sweep
from rekindle.pipeline.sweep.run import run_sweep

GOLDEN = Path(__file__).parent
CACHE = GOLDEN / "cache-v2"
TOKENIZER = CACHE / "corpus" / "tokenizer"
OUTS = {"cycle": "cycle.json", "stages": "stages.json", "sweep": "sweep.json"}
SWEPT = ["train.seed=1,2"]


def make_home(home: Path) -> None:
    """Write what the configurations name: a model, a corpus and the files of a task."""
    size = json.loads((CACHE / "corpus/corpus.json").read_text())["tokenizer"]["size"]
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 8, "max_position_embeddings": 32, "vocab_size": size}
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**shape))
    model.save_pretrained(home / "model")
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(home / "model")
    (home / "text.jsonl").write_text('{"text": "river mountain"}\n')
    for split, count in (("train", 20), ("test", 6)):
        rows = [{"text": f"{split} {n}", "label": ["red", "blue"][n % 2]} for n in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (home / f"{split}.jsonl").write_text(lines)


def cycle(home: Path) -> dict:
    """A cycle; neither the length of its examples nor the warm-up is given, as in the others."""
    return {
        "corpus": {"source": [str(home / "text*.jsonl")], "tokenizer": str(home / "model")},
        "student": {"model": str(home / "model")},
        "train": {"steps": 300, "batch_sequences": 4},
        "tasks": [
            {"name": "colour", "train": str(home / "train.jsonl"), "test": str(home / "test.jsonl")}
        ],
        "finetune": {"epochs": 1},
        "seeds": 2,
    }


def stages(home: Path) -> dict:
    """Two stages, with every section."""
    lm = {"name": "lm", "model": str(home / "model"), "task": "masked_lm"}
    distill = [{"teachers": ["lm"]}]
    return {
        "corpus": {"source": [str(home / "text*.jsonl")], "tokenizer": str(home / "model")},
        "cache": {"path": str(home / "cache")},
        "teachers": [lm],
        "student": {"model": str(home / "model"), "grow": {"layers": 2, "seed": 3}},
        "train": {"steps": 300, "objective": {"distill": distill}},
        "stages": [{"name": "first", "set": {"train.seed": 3}}, {"name": "second", "set": {}}],
    }


def sweep(home: Path) -> dict:
    """The run file of a sweep over the golden cache."""
    return {
        "corpus": {"source": ["python-docs"], "tokenizer": str(TOKENIZER)},
        "cache": {"path": str(CACHE)},
        "student": {"model": str(home / "model"), "grow": {"layers": 2}},
        "train": {"steps": 300, "held_out": 0.2},
    }


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Leave out all that is computed once the record is written."""
    places = ("cycle.run.run_counted", "cycle.run.warm_up", "stages.run._cache")
    places += ("stages.run.train_from_config", "sweep.run._train_missing")
    with contextlib.ExitStack() as held:
        for place in places:
            held.enter_context(mock.patch(f"rekindle.pipeline.{place}"))
        yield


def begin(home: Path, which: str, change: Callable[[dict], object] = lambda _: None) -> None:
    """Begin one, or go on with the one that is there; ``change`` its configuration before."""
    values = {"cycle": cycle, "stages": stages, "sweep": sweep}[which](home)
    change(values)
    out = home / which
    with nothing_runs():
        if which == "cycle":
            run_cycle(parse_settings(CycleConfig, values), out)
        elif which == "stages":
            run_stages(parse_settings(RunConfig, values), out, resume=True)
        else:
            (home / "sweep.yaml").write_text(json.dumps(values))
            run_sweep(plan_sweep(home / "sweep.yaml", SWEPT), out, resume=True)


def main(out: Path) -> None:
    out.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_home(home)
        for which, file in OUTS.items():
            begin(home, which)
            text = (home / which / file).read_text()
            text = text.replace(str(home), "HOME").replace(str(GOLDEN), "GOLDEN")
            (out / file).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
