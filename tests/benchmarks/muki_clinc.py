"""MUKI on CLINC150: experts of disjoint intents become one classifier of all, without a label.

The ten domains are three groups. An expert of each is fine-tuned on half of its group's training
texts; students learn from what the experts say of the other half, whose labels they never see, and
are compared with every expert, with ways to merge experts without a student, and with models that
were fine-tuned on the true labels of the same texts in as many steps.

    python tests/benchmarks/muki_clinc.py --work DIR --model MODEL          # everything, resumable
    python tests/benchmarks/muki_clinc.py --work DIR --model MODEL --csv    # and results.csv's rows

Data: ``clinc150_{train,val,test}.jsonl`` (text, label, domain). Every stage is the package's own:
``finetune``, ``cache-teachers``, ``train-student``, and the functions that score what came out.
"""

import argparse
import csv
import datetime
import json
import os
import random
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.classifier import evaluate, load_config
from rekindle.train.expert_outputs import ExpertOutput, expert_output, student_logits
from rekindle.train.finetune import finetune
from rekindle.train.finetune_config import FinetuneConfig
from rekindle.train.merge_baselines import merged_probabilities
from rekindle.train.models import package_versions, quiet_transformers
from rekindle.train.student import Student
from rekindle.train.task_data import TaskData, read_task
from rekindle.train.union import LabelUnion

SHARED = Path(os.environ.get("REKINDLE_SHARED", Path(__file__).parents[3] / "shared" / "data"))
GROUPS = {"group-1": slice(0, 3), "group-2": slice(3, 6), "group-3": slice(6, None)}
LENGTH = 40  # tokens; the longest text has 33
Row = dict[str, str]


class Size(NamedTuple):
    """How large the experiment is; texts are counted per intent."""

    expert_texts: int  # with labels, for the expert that knows the intent
    seen_texts: int  # without labels, for all experts and all students
    dev_texts: int
    expert_epochs: int
    epochs: int  # of students and oracles over the texts they see
    batch: int
    learning_rate: float
    passes: int  # Monte-Carlo passes over the students' texts
    test_passes: int  # and over the test texts
    precision: str
    seeds: int  # of MUKI and the uniform mixture
    oracles: int  # seeds of the oracle that sees the students' texts
    fewer: int  # seeds of everything else


SIZES = {
    "toy": Size(4, 4, 2, 1, 1, 8, 1e-3, 2, 2, "fp32", 2, 2, 1),
    "cpu": Size(50, 20, 5, 4, 3, 32, 5e-4, 16, 4, "bf16", 5, 3, 2),
    "gpu": Size(50, 50, 20, 10, 10, 32, 3e-4, 16, 16, "bf16", 10, 10, 5),
}


class Variant(NamedTuple):
    """What a student's target is made of: the settings of its distillation term."""

    name: str
    term: dict[str, Any]
    headline: bool = False  # as many seeds as there are


def _muki(**settings: Any) -> dict[str, Any]:
    return {"combine": "uncertainty", "uncertainty": settings}


MUKI, UNIFORM, ORACLE = "MUKI, soft, margin", "uniform mixture", "oracle, the same texts"
ORACLE_EXPERTS = "oracle, the experts' texts"
VARIANTS = (
    Variant(MUKI, _muki(), headline=True),
    Variant(UNIFORM, {"combine": "mixture"}, headline=True),
    Variant("MUKI, soft, no margin", _muki(margin=False)),
    Variant("MUKI, hard, margin", _muki(selection="hard")),
    Variant("MUKI, hard, no margin", _muki(selection="hard", margin=False)),
    Variant("concatenated logits", {"combine": "concatenate"}),
)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=SHARED / "cls")
    parser.add_argument("--model", required=True, help="the start model: a directory or a hub id")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--csv", action="store_true")
    args = parser.parse_args()
    with quiet_transformers():
        found = run(args.work / args.size, args.data, args.model, args.size)
    text = markdown(found)
    (args.work / args.size / "table.md").write_text(text)
    print(text)
    if args.csv:
        write_csv(found, args.size)


def run(work: Path, data: Path, model: str, name: str) -> dict[str, Any]:
    """Everything of one size, in the folder ``work``; returns what ``results.json`` holds."""
    size = SIZES[name]
    write_splits(data, work / "data", size)
    experts = {group: train_expert(work, model, size, group) for group in GROUPS}
    cache_teachers(configuration(work, model, size))
    merged_from_cache(work, model, size)
    merged(work, size, experts)
    for seed in range(size.seeds):
        for variant in VARIANTS:
            if seed < (size.seeds if variant.headline else size.fewer):
                student(work, model, size, variant, seed)
        if seed < size.oracles:
            oracle(work, model, size, ORACLE, "seen", seed)
        if seed < size.fewer:
            oracle(work, model, size, ORACLE_EXPERTS, "experts", seed)
    found = {
        "size": name, **size._asdict(), "model": model, "versions": package_versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "texts": {file.stem: len(_rows(file)) for file in sorted((work / "data").glob("*.jsonl"))},
        "domains": domains_of(_rows(data / "clinc150_train.jsonl")),
        "rows": rows_of(work, size), "differences": differences(work),
    }  # fmt: skip
    (work / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


# ---- texts -------------------------------------------------------------------------------------


def _rows(file: Path) -> list[Row]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def domains_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The domains of each group, in alphabetical order: nothing was chosen."""
    names = sorted({row["domain"] for row in rows})
    return {group: names[part] for group, part in GROUPS.items()}


def splits(train: Sequence[Row], dev: Sequence[Row], size: Size) -> dict[str, list[Row]]:
    """``experts`` and ``seen`` halves of the training texts, ``dev``; each also by group.

    Of every intent the first texts in a fixed random order go to its expert, texts of the second
    half to the students. No text stands in both.
    """
    half: dict[str, list[Row]] = {"experts": [], "seen": [], "dev": []}
    for rows in _by_intent(train).values():
        random.Random(0).shuffle(rows)
        middle = len(rows) // 2
        half["experts"] += rows[: min(size.expert_texts, middle)]
        half["seen"] += rows[middle : middle + size.seen_texts]
    for rows in _by_intent(dev).values():
        half["dev"] += rows[: size.dev_texts]
    found = {}
    for name, rows in half.items():
        random.Random(1).shuffle(rows)
        found[name] = rows
        for group, domains in domains_of(train).items():
            found[f"{name}-{group}"] = [row for row in rows if row["domain"] in domains]
    return found


def _by_intent(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[row["label"]].append(row)
    return dict(sorted(found.items()))


def write_splits(data: Path, out: Path, size: Size) -> None:
    """The splits as files; ``corpus.jsonl`` holds the texts of ``seen`` and nothing else."""
    if (out / "corpus.jsonl").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    train, dev = (_rows(data / f"clinc150_{name}.jsonl") for name in ("train", "val"))
    made = splits(train, dev, size) | {"test": _rows(data / "clinc150_test.jsonl")}
    for name, rows in made.items():
        _write(out / f"{name}.jsonl", rows)
    _write(out / "corpus.jsonl", [{"text": row["text"]} for row in made["seen"]])


def _write(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- models ------------------------------------------------------------------------------------


def _fine_tuned(work: Path, model: str, size: Size, texts: str, out: Path, **settings: Any) -> None:
    """One ``finetune`` run, unless it is there; the last epoch is kept, so that dev decides
    nothing.
    """
    if (out / "metrics.json").exists():
        return
    config = FinetuneConfig(
        batch_size=size.batch, learning_rate=size.learning_rate, precision=size.precision,
        max_length=LENGTH, **{"epochs": size.epochs} | settings.pop("config", {}),
    )  # fmt: skip
    group = texts.partition("-")[2]
    dev = work / "data" / (f"dev-{group}.jsonl" if group else "dev.jsonl")
    train = work / "data" / f"{texts}.jsonl"
    finetune(model, str(train), str(dev), str(out), config=config, **settings)


def train_expert(work: Path, model: str, size: Size, group: str) -> Path:
    """The expert of a group, on the labels of its half."""
    out = work / "experts" / group
    epochs = {"epochs": size.expert_epochs}
    _fine_tuned(work, model, size, f"experts-{group}", out, config=epochs)
    return out


def student_steps(work: Path, size: Size) -> int:
    """Steps of every student and oracle."""
    return size.epochs * -(-len(_rows(work / "data" / "seen.jsonl")) // size.batch)


def configuration(
    work: Path, model: str, size: Size, term: Mapping[str, Any] | None = None, seed: int = 0
) -> RunConfig:
    """The run file of the cache and of one student; every text is a sequence of its own."""
    experts = [
        {
            "name": group, "model": str(work / "experts" / group),
            "task": "sequence_classification", "precision": size.precision,
            "monte_carlo": {"passes": size.passes},
        }
        for group in GROUPS
    ]  # fmt: skip
    steps = student_steps(work, size)
    train = {
        "steps": steps, "batch_sequences": size.batch, "learning_rate": size.learning_rate,
        "warmup_steps": -(-steps // 10), "precision": size.precision, "seed": seed,
        "held_out": 0.0, "keep_best": None, "evaluate_every": steps, "checkpoint_every": steps,
        "objective": {
            "hard": {"weight": 0.0}, "distill": [{"teachers": list(GROUPS), **(term or _muki())}]
        },
    }  # fmt: skip
    values = {
        "corpus": {
            "source": [str(work / "data" / "corpus.jsonl")], "tokenizer": model,
            "sequence_length": LENGTH, "packing": "document",
        },
        "cache": {"path": str(work / "cache"), "replicas": 1, "sequences_per_shard": 1000},
        "teachers": experts, "student": {"model": model}, "train": train,
    }  # fmt: skip
    return parse_settings(RunConfig, values)


def student(work: Path, model: str, size: Size, variant: Variant, seed: int) -> None:
    """Train and judge one student, unless that is done."""
    out = work / "students" / f"{_slug(variant.name)}-{seed}"

    def answers() -> tuple[np.ndarray, Sequence[str]]:
        config = configuration(work, model, size, variant.term, seed)
        if not (out / "summary.json").exists():
            train_from_config(config, out, resume=out.exists())
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        made, head = Student.from_pretrained(out), "+".join(GROUPS)
        logits = student_logits(made, head, str(out), _test(work), LENGTH, 64)
        return logits, made.head_configs[head].label_names

    _judge_once(work, variant.name, seed, answers)


def oracle(work: Path, model: str, size: Size, name: str, texts: str, seed: int) -> None:
    """The start model on true labels, in as many steps as a student."""
    out = work / "oracles" / f"{texts}-{seed}"

    def answers() -> tuple[np.ndarray, Sequence[str]]:
        steps = student_steps(work, size)
        config = {"max_steps": steps, "epochs": size.epochs}
        _fine_tuned(work, model, size, texts, out, first_seed=seed, config=config)
        labels = load_config(str(out)).id2label
        logits = evaluate(str(out), _test(work), max_length=LENGTH)[1]
        return logits, [labels[number] for number in range(len(labels))]

    _judge_once(work, name, seed, answers)


# ---- judging -----------------------------------------------------------------------------------


def _test(work: Path) -> TaskData:
    return read_task(*[str(work / "data" / "test.jsonl")] * 2)[1]


def _slug(name: str) -> str:
    return name.replace(",", "").replace("'", "").replace(" ", "-")


def _judge_once(
    work: Path, name: str, seed: int, answers: Callable[[], tuple[np.ndarray, Sequence[str]]]
) -> None:
    file = work / "scores" / f"{_slug(name)}-{seed}.json"
    if file.exists():
        return
    began = time.monotonic()
    values, labels = answers()
    found = judge(values, labels, _rows(work / "data" / "test.jsonl"))
    found |= {"name": name, "seed": seed, "seconds": time.monotonic() - began}
    _save(file, found)
    print(f"{name}, seed {seed}: {found['accuracy']:.4f} in {found['seconds']:.0f} s", flush=True)


def _save(file: Path, found: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found) + "\n")


def judge(values: np.ndarray, labels: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy of logits or probabilities [N,U] of ``labels`` [U] among all labels; by group; and
    within each group, where only the labels of the text's own group can be answered.
    """
    groups = domains_of(rows)
    number = {label: place for place, label in enumerate(labels)}
    gold = np.array([number[row["label"]] for row in rows])
    right = values.argmax(axis=1) == gold
    found: dict[str, Any] = {"accuracy": float(right.mean()), "by group": {}, "within group": {}}
    for group, domains in groups.items():
        own = np.array([row["domain"] in domains for row in rows])
        places = np.unique(gold[own])
        inside = places[values[own][:, places].argmax(axis=1)] == gold[own]
        found["by group"][group] = float(right[own].mean())
        found["within group"][group] = float(inside.mean())
    return found


def merged(work: Path, size: Size, experts: Mapping[str, Path]) -> None:
    """What the experts say of the test texts, alone and together, without a student."""
    if (work / "scores" / "merged.json").exists():
        return
    outputs = [
        expert_output(group, str(path), _test(work), size.test_passes, 0, LENGTH, 64)
        for group, path in experts.items()
    ]
    _save(work / "scores" / "merged.json", _merges(outputs, _rows(work / "data" / "test.jsonl")))


def merged_from_cache(work: Path, model: str, size: Size) -> None:
    """The same of the students' own texts, from the cache: how good their targets are."""
    cache = Cache.open(configuration(work, model, size).cache.path)
    batch = cache.gather(np.arange(len(cache)), list(GROUPS))
    outputs = [
        ExpertOutput(cache.teacher(g).info, batch.targets[g].logits, batch.targets[g].mc_probs)
        for g in GROUPS
    ]
    _save(work / "scores" / "targets.json", _merges(outputs, _rows(work / "data" / "seen.jsonl")))


def _merges(outputs: Sequence[ExpertOutput], rows: Sequence[Row]) -> dict[str, Any]:
    union = LabelUnion.of([output.info for output in outputs], "merge")
    logits = {o.info.name: torch.from_numpy(np.array(o.logits)).float() for o in outputs}
    means = {o.info.name: torch.from_numpy(np.array(o.mc_probs)).float() for o in outputs}
    found = merged_probabilities(union, logits, means)
    return {name: judge(probs.numpy(), union.names, rows) for name, probs in found.items()}


# ---- tables ------------------------------------------------------------------------------------


def _runs(work: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Judged runs by name and seed, in the order of the variants."""
    found: dict[str, dict[int, dict[str, Any]]] = {
        name: {} for name in (*(v.name for v in VARIANTS), ORACLE, ORACLE_EXPERTS)
    }
    for file in sorted((work / "scores").glob("*.json")):
        one = json.loads(file.read_text())
        if "seed" in one:
            found.setdefault(one["name"], {})[one["seed"]] = one
    return {name: runs for name, runs in found.items() if runs}


def rows_of(work: Path, size: Size) -> list[dict[str, Any]]:
    """One row per merge, kind of student and oracle."""
    on_test, on_seen = (
        json.loads((work / "scores" / f"{name}.json").read_text()) for name in ("merged", "targets")
    )
    rows = [
        {"kind": "experts", "name": name, "seeds": 1, "targets": on_seen[name]["accuracy"]} | one
        for name, one in on_test.items()
    ]
    for name, runs in _runs(work).items():
        each = list(runs.values())
        row = {"kind": "oracle" if "oracle" in name else "student", "name": name}
        row |= {"seeds": len(each), "seconds": statistics.fmean(r["seconds"] for r in each)}
        for key in ("by group", "within group"):
            row[key] = {g: statistics.fmean(r[key][g] for r in each) for g in GROUPS}
        rows.append(row | spread([one["accuracy"] for one in each]))
    return rows


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample deviation and 95 % t-interval of the mean; the latter two of two or more."""
    found: dict[str, Any] = {"accuracy": statistics.fmean(values), "sd": None, "interval": None}
    if len(values) > 1:
        found["sd"] = statistics.stdev(values)
        half = scipy.stats.t.ppf(0.975, len(values) - 1) * found["sd"] / len(values) ** 0.5
        found["interval"] = [found["accuracy"] - half, found["accuracy"] + half]
    return found


def differences(work: Path) -> list[dict[str, Any]]:
    """Paired by seed: every other run minus the uniform mixture, and MUKI minus the oracle."""
    runs = _runs(work)
    pairs = [(name, UNIFORM) for name in runs if name != UNIFORM] + [(MUKI, ORACLE)]
    found = []
    for one, other in pairs:
        common = sorted(runs[one].keys() & runs[other].keys())
        each = [runs[one][s]["accuracy"] - runs[other][s]["accuracy"] for s in common]
        p = None
        if len(each) > 1:
            p = float(scipy.stats.ttest_1samp(each, 0.0).pvalue)
        found.append({"of": one, "minus": other, "seeds": len(each), "p": p, **spread(each)})
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The tables, in per cent."""
    lines = [
        "| what answers | seeds | 150-way | 95 % interval | groups 1 / 2 / 3, 150-way | within the "
        "group | on the students' texts |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in found["rows"]]
    lines += ["", "| paired by seed | seeds | difference, points | 95 % interval | p |"]
    lines += ["|---|---|---|---|---|"]
    for row in found["differences"]:
        p = "–" if row["p"] is None else f"{row['p']:.2g}"
        name = f"{row['of']} − {row['minus']}"
        lines.append(f"| {name} | {row['seeds']} | {_value(row, '+')} | {_interval(row, '+')} | {p} |")
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    by_group = " / ".join(f"{100 * v:.1f}" for v in row["by group"].values())
    inside = {g: v for g, v in row["within group"].items() if row["name"] == f"{g} alone"}
    inside = inside or (row["within group"] if "alone" not in row["name"] else {})
    within = " / ".join(f"{100 * v:.1f}" for v in inside.values())
    targets = f"{100 * row['targets']:.1f}" if "targets" in row else "–"
    name = row["name"] if row["kind"] == "experts" else f"{row['kind']}: {row['name']}"
    cells = (name, row["seeds"], _value(row), _interval(row), by_group, within, targets)
    return "| " + " | ".join(map(str, cells)) + " |"


def _value(row: Mapping[str, Any], sign: str = "") -> str:
    deviation = f" ± {100 * row['sd']:.2f}" if row.get("sd") is not None else ""
    return f"{100 * row['accuracy']:{sign}.2f}{deviation}"


def _interval(row: Mapping[str, Any], sign: str = "") -> str:
    if row.get("interval") is None:
        return "–"
    low, high = row["interval"]
    return f"{100 * low:{sign}.2f} … {100 * high:{sign}.2f}"


def write_csv(found: Mapping[str, Any], size: str) -> None:
    """Append the tables to results.csv."""
    packages = ("torch", "transformers")
    versions = "; ".join(f"{name} {found['versions'][name]}" for name in packages)
    start = (datetime.date.today().isoformat(), "muki-clinc", found["device"], versions)
    with open(Path(__file__).with_name("results.csv"), "a", newline="") as file:
        writer = csv.writer(file)
        for case, name, metric, value in _csv_values(found):
            writer.writerow((*start, f"{size}, {case}", name, metric, round(value, 5), ""))


def _csv_values(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    for row in found["rows"]:
        for metric in ("accuracy", "sd", "seeds", "targets"):
            if row.get(metric) is not None:
                yield row["kind"], row["name"], metric, row[metric]
    for row in found["differences"]:
        name = f"{row['of']} - {row['minus']}"
        for metric, key in (("difference", "accuracy"), ("sd", "sd"), ("p", "p")):
            if row[key] is not None:
                yield "paired", name, metric, row[key]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = [line for line in lines if line.startswith("model name")]
    name = found[0].partition(":")[2].strip() if found else "CPU"
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
