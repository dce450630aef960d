r"""Looks for why a guided student is (not) above its expert: six curves for each finished cell.

    OMP_NUM_THREADS=1 python tests/benchmarks/few_labels/why.py runs/few-trec-3 --bf16

Run in the folder of few_labels.yaml, whose paths are relative. Each measured point is a line of
``why.jsonl`` beside this file; a recorded one is skipped. All use the experts of the cell, and its
settings of fine-tuning:

- teachers: the accuracy of each seed of the expert and of their mean, on the task's own text (the
  rows that are in no split of the cell; their labels are used here only) and on test;
- agreement: how often each student answers test as its teacher does, and how often it is right
  where the teacher is right, and where it is wrong;
- head: the committee's student fine-tuned again from the head that it was taught with, not from a
  fresh one, at the arm's rate and at a tenth of it;
- temperature: students of the committee at other temperatures;
- texts: students of the committee that have seen fewer of the texts, in the same number of steps;
- steps: students of the committee that were taught for fewer steps, or twice as many.

``--curves teachers agreement head`` trains no student: some minutes a cell.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from rekindle.data.cache import Cache

HERE = Path(__file__).resolve().parent
ROWS = HERE / "why.jsonl"
SEEDS = 3
TEMPERATURES = (1.0, 2.0, 4.0)
TEXTS = (0.125, 0.25, 0.5)  # shares; all of them: the point of temperature 1
STEPS = (*TEXTS, 2.0)
RATES = (1.0, 0.1)  # of the arm's own, for fine-tuning again from the distilled head
CURVES = ("teachers", "agreement", "head", "temperature", "steps", "texts")
TAUGHT = {"pseudo": "expert", "kd": "expert", "both": "expert", "committee": "committee"}
LABELLED = {  # of each task's unlabelled text: a file with its labels, and the fields of its text
    "trec": ("shared/data/cls/trec6_train.jsonl", ("text",)),
    "clinc": ("data/few_labels/clinc_train.jsonl", ("text",)),
    "sst2": ("shared/data/glue/sst2_train.jsonl", ("sentence1",)),
    "mrpc": ("shared/data/glue/mrpc_train.jsonl", ("sentence1", "sentence2")),
}

Row = dict[str, Any]


def read(path: str | Path) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class Cell:
    """A finished cell: one task in one draw, in a folder of `pipeline rekindle`."""

    def __init__(self, run: Path, work: Path, bf16: bool):
        (self.home,) = (one for one in (run / "draws").iterdir() if (one / "experts").exists())
        self.run = run
        (self.task,) = (one.name for one in (self.home / "experts").iterdir())
        self.draw, self.work, self.bf16 = int(self.home.name), work, bf16
        work.mkdir(parents=True, exist_ok=True)

    @property
    def about(self) -> Row:
        """Return what names the cell in each of its rows."""
        return {"cells": self.run.name.split("-")[0], "task": self.task, "draw": self.draw}

    @property
    def experts(self) -> list[Path]:
        return [self.home / "experts" / self.task / "seeds" / f"seed-{k}" for k in range(SEEDS)]

    def split(self, name: str) -> Path:
        return self.home / "tasks" / self.task / f"{name}.jsonl"

    def pipeline(self, *words: object) -> None:
        """Run a command of ``pipeline`` in this process: importing torch takes as long as most."""
        if self.bf16:
            module("bf16_cpu", HERE)
        from rekindle.pipeline.cli import main

        sys.argv = ["pipeline", *map(str, words)]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise

    def answers(self, model: Path, rows: Path, head: str | None = None) -> list[Row]:
        """Return the model's answers to a file of labelled rows, asked once."""
        name = "-".join([*model.parts[-4:], rows.stem, *([head] if head else [])])
        out = self.work / f"{name}.jsonl"
        if not out.exists():
            heads = ["--head", head] if head else []
            self.pipeline("evaluate", model, "--test", rows, "--out", out, *heads)
        return read(out)

    def unlabelled(self) -> Path:
        """Return a file of the rows of the text that are in no split, with their labels."""
        out = self.work / "text.jsonl"
        if not out.exists():
            path, fields = LABELLED[self.task]
            splits = [one for name in ("train", "dev", "test") for one in read(self.split(name))]
            names = text_fields(self.split("test"))
            known = {tuple(one[name].strip() for name in names) for one in splits}
            wanted = None
            if self.task == "sst2":
                texts = read("data/few_labels/sst2_unlabelled.jsonl")
                wanted = {(one["text"].strip(),) for one in texts}
            with out.open("w", encoding="utf-8") as file:
                for row in read(path):
                    key = tuple(row[field].strip() for field in fields)
                    if key not in known and (wanted is None or key in wanted):
                        known.add(key)
                        values = dict(zip(names, (row[field] for field in fields), strict=True))
                        file.write(json.dumps(values | {"label": row["label"]}) + "\n")
        return out

    def finetune(self, student: Path, out: Path, head: str | None = None, rate: float = 1) -> None:
        """Fine-tune a student as the committee's was, from a fresh head or one of its own, at a
        share of that learning rate; once.
        """
        if not out.exists():
            splits = ["--train", self.split("train"), "--dev", self.split("dev")]
            heads = [f"--set=head={head}"] if head else []
            self.pipeline("finetune", student, *splits, "--out", out, *self.settings(rate), *heads)

    def settings(self, rate: float) -> list[str]:
        """Return the settings of the committee's fine-tuning, as options."""
        path = self.home / "fine-tuned" / "committee" / self.task / "metrics.json"
        config = json.loads(path.read_text())["config"]
        config["learning_rate"] *= rate
        keys = ("epochs", "batch_size", "learning_rate", "max_length", "positive")
        settings = [f"--set={key}={config[key]}" for key in keys if config[key] is not None]
        return [*settings, "--set=patience=null", f"--set=evaluate_every={config['epochs']}"]


def text_fields(rows: Path) -> list[str]:
    with rows.open(encoding="utf-8") as file:
        fields = json.loads(file.readline()).keys()
    return [one for one in ("text", "sentence1", "sentence2") if one in fields]


def labels(answers: Sequence[Row]) -> list[str]:
    return [str(one["label"]) for one in answers]


def given(answers: Sequence[Row]) -> list[str]:
    return [str(one["given_label"]) for one in answers]


def share(one: Sequence[str], other: Sequence[str]) -> float:
    """Return the share of places where two lists are equal."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def committee_labels(members: Sequence[Sequence[Row]]) -> list[str]:
    """Return the classes of the mean of the members' probabilities."""
    classes = []
    for rows in zip(*members, strict=True):
        names = rows[0]["probabilities"]
        means = {one: sum(row["probabilities"][one] for row in rows) for one in names}
        classes.append(max(means, key=lambda one: means[one]))
    return classes


def teachers(cell: Cell) -> Iterator[tuple[str, Row]]:
    """Yield a row for each seed, and one for the mean of all."""
    seen = {
        name: [cell.answers(expert, rows) for expert in cell.experts]
        for name, rows in (("text", cell.unlabelled()), ("test", cell.split("test")))
    }
    for seed in range(SEEDS):
        yield (
            f"seed {seed}",
            {name: share(labels(of[seed]), given(of[seed])) for name, of in seen.items()},
        )
    yield (
        "committee",
        {name: share(committee_labels(of), given(of[0])) for name, of in seen.items()},
    )


def agreement(cell: Cell) -> Iterator[tuple[str, Row]]:
    """Yield a row for each taught student, with its own head and fine-tuned again."""
    test = cell.split("test")
    members = [cell.answers(expert, test) for expert in cell.experts]
    expert = cell.answers(cell.home / "experts" / cell.task, test)
    teacher_labels = {"expert": labels(expert), "committee": committee_labels(members)}
    truth = given(expert)
    for arm, teacher in TAUGHT.items():
        student = cell.home / "students" / f"{arm}-{cell.task}"
        finetuned = cell.home / "fine-tuned" / arm / cell.task
        asked = {f"{arm} (own head)": (student, head_of(student)), arm: (finetuned, None)}
        for name, (model, head) in asked.items():
            yield (
                name,
                compared(labels(cell.answers(model, test, head)), truth, teacher_labels[teacher]),
            )


def compared(answered: Sequence[str], truth: Sequence[str], taught: Sequence[str]) -> Row:
    """Return the accuracy of answers, their agreement with the teacher's, and the accuracy where
    the teacher is right, and where it is wrong.
    """
    rows = list(zip(answered, truth, taught, strict=True))

    def accuracy(teacher_right: bool) -> float | None:
        some = [a == t for a, t, by in rows if (by == t) is teacher_right]
        return sum(some) / len(some) if some else None

    return {
        "test": share(answered, truth),
        "teacher": share(taught, truth),
        "agreement": share(answered, taught),
        "where_right": accuracy(True),
        "where_wrong": accuracy(False),
    }


def head_of(student: Path) -> str:
    """Return the name of a student's only head."""
    (name,) = json.loads((student / "rekindle_student.json").read_text())["heads"]
    return str(name)


def measured(cell: Cell, curve: str, recorded: set[str]) -> Iterator[tuple[str, Row]]:
    """Yield the points of a curve that are not recorded, with their rows."""
    if curve in ("teachers", "agreement"):
        if not any(one.startswith(curve) for one in recorded):
            yield from [*(teachers(cell) if curve == "teachers" else agreement(cell))]
        return
    values = {"head": RATES, "temperature": TEMPERATURES, "steps": STEPS, "texts": TEXTS}
    for value in values[curve]:
        if f"{curve} {value}" not in recorded:
            kept = curve == "head"
            yield str(value), kept_head(cell, value) if kept else trained(cell, **{curve: value})


def kept_head(cell: Cell, rate: float) -> Row:
    """Return the scores of the committee's student, fine-tuned again from the head it was taught
    with at a share of the arm's learning rate.
    """
    student, test = cell.home / "students" / f"committee-{cell.task}", cell.split("test")
    finetuned = cell.work / f"own-head-{rate}"
    cell.finetune(student, finetuned, head_of(student), rate)
    answers = cell.answers(finetuned, test)
    taught = committee_labels([cell.answers(expert, test) for expert in cell.experts])
    return {"fine-tuned": compared(labels(answers), given(answers), taught)}


def trained(cell: Cell, temperature: float = 1.0, texts: float = 1.0, steps: float = 1.0) -> Row:
    """Return the scores of a committee's student at a temperature, on a share of the texts, for a
    share of the steps; the cell itself has the one of temperature 1 and all of both.
    """
    path = cell.home / "students" / f"committee-{cell.task}.yaml"
    if temperature == texts == steps == 1.0:
        own = cell.home / "fine-tuned" / "committee" / cell.task
        return scored(cell, path.with_suffix(""), own)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    summary = json.loads((path.with_suffix("") / "summary.json").read_text())
    config["teachers"] = [
        {
            "name": f"{cell.task}.{seed}",
            "model": str(expert),
            "task": "sequence_classification",
            "targets": {"temperatures": list(TEMPERATURES)},
        }
        for seed, expert in enumerate(cell.experts)
    ]
    if texts < 1:
        sequences = len(Cache.open(cell.home / "cache" / cell.task).corpus)
        source = shuffled(config["corpus"]["source"], cell.work / "shuffled.jsonl")
        limit = round(texts * sequences)
        config["corpus"] |= {"source": source, "limit_sequences": limit}
    config["cache"]["path"] = str(cell.work / f"cache-{texts}")
    steps_taken = round(steps * summary["steps"])
    config["train"] |= {"epochs": None, "steps": steps_taken}
    config["train"]["objective"]["distill"][0]["temperature"] = temperature
    name = f"student-{temperature}-{texts}-{steps}"
    run = cell.work / f"{name}.yaml"
    run.write_text(yaml.safe_dump(config), encoding="utf-8")
    student = cell.work / name
    cell.pipeline("cache-teachers", run)
    cell.pipeline("train-student", run, "--out", student, *["--resume"] * student.exists())
    finetuned = cell.work / f"{name}-finetuned"
    cell.finetune(student, finetuned)
    return scored(cell, student, finetuned) | {"steps": steps_taken}


def shuffled(source: str | list[str], out: Path) -> str:
    """Return a copy of a source's rows in random order: some files have one class after another,
    and a limit takes the first rows.
    """
    (path,) = [source] if isinstance(source, str) else source
    rows = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    out.write_text("".join(rows), encoding="utf-8")
    return str(out)


def scored(cell: Cell, student: Path, finetuned: Path) -> Row:
    """Compare a committee's student, with its own head and fine-tuned again, with the teacher."""
    test = cell.split("test")
    taught = committee_labels([cell.answers(expert, test) for expert in cell.experts])
    own, again = cell.answers(student, test, head_of(student)), cell.answers(finetuned, test)
    return {
        "own head": compared(labels(own), given(own), taught),
        "fine-tuned": compared(labels(again), given(own), taught),
    }


def module(name: str, folder: Path) -> ModuleType:
    """Return a script of the benchmarks, imported once."""
    if name not in sys.modules:
        spec = spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def origin() -> Mapping[str, str]:
    """Return this machine, the commit and the day, as the cells' rows have them."""
    return vars(module("record", HERE.parent / "pages").Origin.here())


def recorded_rows(cell: Cell) -> list[Row]:
    """Return the recorded rows of a cell."""
    rows = read(ROWS) if ROWS.exists() else []
    return [row for row in rows if cell.about.items() <= row.items()]


def write(cell: Cell, curve: str, point: str, row: Row) -> None:
    """Record a point."""
    import torch

    from rekindle.train.precision import chosen_precision

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bf16" if cell.bf16 else chosen_precision("auto", device_type)
    line = cell.about | {"curve": curve, "point": point} | row | {"precision": precision}
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | dict(origin())) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished cells")
    parser.add_argument("--work", type=Path, default=Path("why"), help="for students and answers")
    parser.add_argument("--bf16", action="store_true", help="as bf16_cpu.py runs cells")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=CURVES)
    arguments = parser.parse_args()
    for run in arguments.runs:
        cell = Cell(run.resolve(), (arguments.work / run.name).resolve(), arguments.bf16)
        recorded = {f"{row['curve']} {row['point']}" for row in recorded_rows(cell)}
        for curve in arguments.curves:
            for point, row in measured(cell, curve, recorded):
                write(cell, curve, point, row)


if __name__ == "__main__":
    main()
