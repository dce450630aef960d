"""Make what the stages of a cycle leave, without running any: a folder for ``read_results``."""

import json
import math
from collections.abc import Sequence
from itertools import product
from statistics import fmean, stdev

from rekindle.pipeline.cycle.finetuned import folder_of, own_head_folder
from rekindle.pipeline.cycle.scores import CycleResults
from rekindle.pipeline.cycle.tables import tables_of
from rekindle.pipeline.report.table import Table

ARMS = ["expert", "longer", "mlm", "kd", "both", "mixture"]
TASKS = {
    "cola": {"metric": "matthews", "train": 8000, "dev": 551, "test": 1043, "pairs": False},
    "mrpc": {"metric": "f1", "train": 3300, "dev": 368, "test": 408, "pairs": True},
    "stsb": {"metric": "pearson", "train": 5000, "dev": 749, "test": 1500, "pairs": True},
}
MORE_ARMS = ["start", "pseudo", "committee"]
GRID = {"learning_rate": [2e-5, 5e-5, 1e-4]}
SEEDS = 5
CONFIG = {
    "epochs": 3,
    "max_steps": None,
    "batch_size": 32,
    "learning_rate": 5e-5,
    "schedule": "linear",
    "warmup": 0.1,
    "weight_decay": 0.01,
    "max_length": 128,
    "precision": "auto",
    "patience": None,
    "head": None,
    "merge": None,
}


def score(arm, task, seed, draw=0):
    """Return made-up scores, all different and in no order."""
    place = [*ARMS, *MORE_ARMS].index(arm)
    gain = 0.01 * place * (1 + list(TASKS).index(task))
    drawn = 0.013 * math.sin(7 * draw * (1 + place) + draw)
    return 0.5 + gain + 0.011 * math.sin(17 * seed + 5 * place) + 0.003 * seed + drawn


def scores_of(task, main):
    if task == "stsb":
        return {"pearson": main, "spearman": main - 0.01}
    return {"accuracy": main + 0.2, "f1": main, "matthews": main}


def metrics_of(out, arm, task, *, seeds=SEEDS, config=None, test=True, dev=None, draw=0):
    """Write what `pipeline finetune` writes (FinetuneResult.as_dict), with the scores above."""
    splits = ("train", "dev", "test") if test else ("train", "dev")
    dev = dev or [0.4 + 0.05 * ((3 * seed + 1) % 5) for seed in range(seeds)]
    per_seed = [
        {
            "seed": seed,
            "scores": scores_of(task, dev[seed]),
            "test_scores": scores_of(task, score(arm, task, seed, draw)) if test else None,
            "epochs": [],
            "seconds": 1.5,
        }
        for seed in range(seeds)
    ]
    regression = task == "stsb"
    config = CONFIG | (config or {})
    if arm == "longer":
        config["epochs"] *= 2
    return {
        "written_by": "rekindle finetune",
        "model": "start" if arm in ("expert", "longer") else str(out / "students" / arm),
        "files": {split: str(out / "tasks" / task / f"{split}.jsonl") for split in splits},
        "problem": "regression" if regression else "single_label_classification",
        "label_names": [] if regression else ["no", "yes"],
        "metric": TASKS[task]["metric"],
        "per_seed": per_seed,
        "mean": fmean(dev),
        "std": stdev(dev) if seeds > 1 else None,
        "test_mean": None,
        "best_seed": dev.index(max(dev)),
        "seconds": 1.5 * seeds,
        "precision": "fp32",
        "config": config,
        "versions": {"rekindle": "0.1.0", "torch": "2.13"},
        "baselines": None,
    }


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def finetuned(out, arm, task, **changes):
    write(out / folder_of(arm, task) / "metrics.json", metrics_of(out, arm, task, **changes))


def searched(out, arm, task, **changes):
    """Write a search in which the middle point, which CONFIG has, is best on dev."""
    for value, dev in zip(GRID["learning_rate"], (0.45, 0.55, 0.5), strict=True):
        metrics = metrics_of(
            out,
            arm,
            task,
            **{"seeds": 2, "test": False, "dev": [dev, dev - 0.1]} | changes,
            config={"learning_rate": value},
        )
        write(out / "search" / arm / task / f"{value:g}" / "metrics.json", metrics)


def about(arms=ARMS, tasks=TASKS, search=GRID, seeds=SEEDS, **settings):
    told = {"settings": settings} if settings else {}
    return told | {
        "written_by": "rekindle cycle",
        "arms": list(arms),
        "tasks": {name: TASKS[name] for name in tasks},
        "search": search,
        "seeds": seeds,
        "finetune": {"epochs": 3},
        "teacher_of": {"mixture": list(tasks)},
    }


def cycle(out, arms=ARMS, tasks=TASKS, search=GRID, seeds=SEEDS, draw=0, **settings):
    write(out / "cycle.json", about(arms, tasks, search, seeds, **settings))
    for arm, task in product(arms, tasks):
        if search and draw == 0:
            searched(out, arm, task)
        finetuned(out, arm, task, seeds=seeds, draw=draw)
    return out


def drawn(out, arms=ARMS, tasks=TASKS, search=GRID, seeds=SEEDS, draws=3, **settings):
    """Write a finished cycle with several draws of the labels."""
    write(out / "cycle.json", about(arms, tasks, search, seeds, label_draws=draws, **settings))
    for draw in range(draws):
        one = cycle(out / "draws" / str(draw), arms, tasks, search, seeds, draw, **settings)
        write(one / "results.json", {})
    return out


def own_head_gain(draw):
    return 0.1 + 0.01 * draw


def own_head_scored(out, arm, task, *, student=0, draw=0):
    """Write the score of a student's own head: above the first seed's by its gain."""
    metrics = metrics_of(out, arm, task, seeds=1, draw=draw)
    (one,) = metrics["per_seed"]
    one["seed"] = metrics["best_seed"] = student
    one["test_scores"] = scores_of(task, score(arm, task, student, draw) + own_head_gain(draw))
    write(out / own_head_folder(arm, task) / "metrics.json", metrics)


def student(out, name, seconds, **passes):
    home = out / "students" / name
    write(home / "summary.json", {"steps": 10, "seconds": seconds})
    write(home / "run.json", {"cache": {"teachers": {}, "teacher_seconds": passes}})


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --- in Markdown ----------------------------------------------------------------------------------


def as_markdown(results: CycleResults) -> str:
    """Return the tables and notes of a cycle in Markdown, as in RESULTS.md."""
    notes = "\n".join(f"- {escaped(note)}" for note in results.notes)
    return "\n\n".join([*map(markdown_of, tables_of(results)), notes]) + "\n"


def markdown_of(table: Table) -> str:
    """Return the title in bold, and the table."""
    dashes = "|".join("---" if column.words else "---:" for column in table.columns)
    head = [column.title for column in table.columns]
    lines = [_piped(head), f"|{dashes}|", *map(_piped, rows_of(table))]
    return "\n".join([f"**{escaped(table.title)}**", "", *lines])


def _piped(row: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell.strip()) for cell in row) + " |"


def escaped(text: str) -> str:
    """Escape text for Markdown."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


def rows_of(table: Table) -> list[tuple[str, ...]]:
    """Return the cells, row by row."""
    return list(zip(*(column.cells for column in table.columns), strict=True))
