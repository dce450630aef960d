"""MUKI on CLINC150: experts of disjoint intents become one classifier of all, without a label.

The ten domains are three groups. An expert for each is fine-tuned on half of its group's training
texts; students learn from the experts' outputs on the other half, whose labels they never see. They
are compared with every expert, with ways to merge experts without a student, and with models
fine-tuned on the true labels of the same texts for as many steps.

    python tests/benchmarks/muki_clinc.py --work DIR --model MODEL          # everything, resumable
    python tests/benchmarks/muki_clinc.py --work DIR --model MODEL --csv    # and results.csv's rows

Data: ``clinc150_{train,val,test}.jsonl`` (text, label, domain). Every stage is the package's own:
``finetune``, ``cache-teachers``, ``train-student``, and the functions that score the results.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from muki_clinc_tables import (
    differences,
    judge,
    judged_runs,
    markdown,
    rows_of,
    write_csv,
)
from muki_clinc_texts import GROUPS, Counts, Row, domains_of, read_rows, write_splits
from results_csv import hardware
from safetensors.torch import load_file, save_file

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.answers.judge import open_judge
from rekindle.train.answers.score import ExpertOutput, evaluate, expert_output
from rekindle.train.finetune.classifier import classifier_config
from rekindle.train.finetune.config import ComparisonFinetuneConfig
from rekindle.train.finetune.merge_baselines import merged_probabilities
from rekindle.train.finetune.run import finetune
from rekindle.train.finetune.task_data import TaskData, read_task
from rekindle.train.model.folder import resolve_model
from rekindle.train.objective.label_union import LabelUnion
from rekindle.train.outside.quiet import quiet_transformers
from rekindle.train.record.versions import package_versions

SHARED = Path(os.environ.get("REKINDLE_SHARED", Path(__file__).parents[3] / "shared" / "data"))
LENGTH = 40  # tokens; the longest text has 33


class Size(NamedTuple):
    """The size of the experiment."""

    texts: Counts
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
    "toy": Size(Counts(4, 4, 2), 1, 1, 8, 1e-3, 2, 2, "fp32", 2, 2, 1),
    "cpu": Size(Counts(50, 20, 5), 4, 3, 32, 5e-4, 16, 4, "bf16", 5, 3, 2),
    "gpu": Size(Counts(50, 50, 20), 10, 10, 32, 3e-4, 16, 16, "bf16", 10, 10, 5),
}


class Variant(NamedTuple):
    """The settings of a student's distillation term, which define its targets."""

    name: str
    term: dict[str, Any]
    longer: int = 1  # times the steps


class Oracle(NamedTuple):
    """The start model, fine-tuned on true labels."""

    name: str
    texts: str
    longer: int = 1
    fresh: bool = False  # without the start model's pooler, which no student has either


def _muki(**settings: Any) -> dict[str, Any]:
    return {"combine": "uncertainty", "uncertainty": settings}


MUKI, PLAIN, HARD = "MUKI, soft, margin", "MUKI, soft, no margin", "MUKI, hard, margin"
UNIFORM, CONCATENATED = "uniform mixture", "concatenated logits"
ORACLE = "oracle, the same texts"
FRESH, LONGER = f"{ORACLE}, fresh pooler", "twice the steps"
# The first answers the question; the others follow in this order, with fewer seeds.
STUDENTS = (Variant(MUKI, _muki()), Variant(UNIFORM, {"combine": "mixture"}))
SUPERVISED = Oracle(ORACLE, "seen")
OTHERS = (
    Variant(PLAIN, _muki(margin=False)),
    Variant(HARD, _muki(selection="hard")),
    Variant(f"{UNIFORM}, {LONGER}", {"combine": "mixture"}, longer=2),
    Variant(f"{MUKI}, {LONGER}", _muki(), longer=2),
    Oracle(FRESH, "seen", fresh=True),
    Variant(CONCATENATED, {"combine": "concatenate"}),
    Variant("MUKI, soft, margin, sharpness 0.05", _muki(sharpness=0.05)),
    Oracle(f"{ORACLE}, {LONGER}", "seen", longer=2),
    Oracle("oracle, the experts' texts", "experts"),
    Variant("MUKI, hard, no margin", _muki(selection="hard", margin=False)),
)
Job = tuple[Variant | Oracle, int]  # and its seed
COMPARED = (
    (MUKI, UNIFORM),
    (MUKI, ORACLE),
    (MUKI, FRESH),
    (PLAIN, UNIFORM),
    (PLAIN, MUKI),
    (PLAIN, ORACLE),
    (HARD, MUKI),
    (CONCATENATED, UNIFORM),
    (f"{UNIFORM}, {LONGER}", UNIFORM),
    (f"{MUKI}, {LONGER}", MUKI),
    (f"{MUKI}, {LONGER}", f"{UNIFORM}, {LONGER}"),
)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=SHARED / "cls")
    parser.add_argument("--model", required=True, help="the start model: a directory or a hub id")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--tables", action="store_true", help="only of the existing runs")
    parser.add_argument("--csv", action="store_true")
    args = parser.parse_args()
    work = args.work / args.size
    if not args.tables:
        with quiet_transformers():
            run(work, args.data, args.model, SIZES[args.size])
    found = results(work, args.model, args.size)
    (work / "table.md").write_text(markdown(found))
    print(markdown(found))
    if args.csv:
        write_csv(found, args.size)


def run(work: Path, data: Path, model: str, size: Size) -> None:
    """Run everything of one size, in the folder ``work``: what answers the question first, so that
    a run ended early is a smaller experiment.
    """
    write_splits(data, work / "data", size.texts)
    experts = {group: train_expert(work, model, size, group) for group in GROUPS}
    cache_teachers(configuration(work, model, size))
    merged_from_cache(work, model, size)
    merged(work, size, experts)
    for job, seed in schedule(size):
        if isinstance(job, Variant):
            student(work, model, size, job, seed)
        else:
            oracle(work, model, size, job, seed)


def schedule(size: Size) -> list[Job]:
    """Return the jobs: the headline's students and their oracle, one seed each while it has any;
    the others once; the headline's further seeds; the others' further seeds.
    """
    paired: list[Job] = [
        (job, seed) for seed in range(size.oracles) for job in (*STUDENTS, SUPERVISED)
    ]
    further: list[Job] = [
        (job, seed) for seed in range(size.oracles, size.seeds) for job in STUDENTS
    ]
    rest: list[Job] = [(job, seed) for seed in range(size.fewer) for job in OTHERS]
    return paired + rest[: len(OTHERS)] + further + rest[len(OTHERS) :]


def results(work: Path, model: str, name: str) -> dict[str, Any]:
    """Return the contents of ``results.json``, from the runs that exist, and write it."""
    files = sorted((work / "data").glob("*.jsonl"))
    runs = judged_runs(work, [job.name for job in (*STUDENTS, *OTHERS, SUPERVISED)])
    found = {
        "size": name,
        **SIZES[name]._asdict(),
        "model": model,
        "versions": package_versions(),
        "device": hardware(),
        "texts": {file.stem: len(read_rows(file)) for file in files},
        "domains": domains_of(read_rows(work / "data" / "test.jsonl")),
        "rows": rows_of(work, runs),
        "differences": differences(runs, COMPARED),
    }
    (work / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


# ---- models ------------------------------------------------------------------------------------


def _fine_tuned(work: Path, model: str, size: Size, texts: str, out: Path, **settings: Any) -> None:
    """Do one ``finetune`` run, unless it exists; the last epoch is kept, so that dev decides
    nothing.
    """
    if (out / "metrics.json").exists():
        return
    config = ComparisonFinetuneConfig(
        batch_size=size.batch, learning_rate=size.learning_rate, precision=size.precision,
        max_length=LENGTH, **{"epochs": size.epochs} | settings.pop("config", {}),
    )  # fmt: skip
    group = texts.partition("-")[2]
    dev = work / "data" / (f"dev-{group}.jsonl" if group else "dev.jsonl")
    train = work / "data" / f"{texts}.jsonl"
    finetune(model, str(train), str(dev), str(out), config=config, **settings)


def train_expert(work: Path, model: str, size: Size, group: str) -> Path:
    """Train the expert of a group, on the labels of its half."""
    out = work / "experts" / group
    epochs = {"epochs": size.expert_epochs}
    _fine_tuned(work, model, size, f"experts-{group}", out, config=epochs)
    return out


def steps_of(work: Path, size: Size) -> int:
    """Return the steps of students and oracles, unless they train longer."""
    return size.epochs * -(-len(read_rows(work / "data" / "seen.jsonl")) // size.batch)


def configuration(
    work: Path, model: str, size: Size, variant: Variant = STUDENTS[0], seed: int = 0
) -> RunConfig:
    """Return the run file of the cache and of one student; every text is a sequence of its own."""
    experts = [
        {
            "name": group, "model": str(work / "experts" / group),
            "task": "sequence_classification", "precision": size.precision,
            "monte_carlo": {"passes": size.passes},
        }
        for group in GROUPS
    ]  # fmt: skip
    steps = variant.longer * steps_of(work, size)
    train = {
        "steps": steps, "batch_sequences": size.batch, "learning_rate": size.learning_rate,
        "warmup_steps": -(-steps // 10), "precision": size.precision, "seed": seed,
        "held_out": 0.0, "keep_best": None, "evaluate_every": steps, "checkpoint_every": steps,
        "objective": {
            "hard": {"weight": 0.0}, "distill": [{"teachers": list(GROUPS), **variant.term}]
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
        config = configuration(work, model, size, variant, seed)
        if not (out / "summary.json").exists():
            train_from_config(config, out, resume=out.exists())
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        judge = open_judge(str(out), "+".join(GROUPS))
        return judge.logits(judge.read(_test(work), LENGTH), 64), judge.answers.names

    _judge_once(work, variant.name, seed, answers)


def oracle(work: Path, model: str, size: Size, job: Oracle, seed: int) -> None:
    """Fine-tune and judge one supervised model, in as many steps as a student."""
    out = work / "oracles" / f"{_slug(job.name)}-{seed}"

    def answers() -> tuple[np.ndarray, Sequence[str]]:
        start = without_pooler(model, work / "start") if job.fresh else model
        config = {
            "max_steps": job.longer * steps_of(work, size),
            "epochs": job.longer * size.epochs,
        }
        _fine_tuned(work, start, size, job.texts, out, first_seed=seed, config=config)
        labels = classifier_config(str(out)).id2label
        logits = evaluate(str(out), _test(work), max_length=LENGTH)[1]
        return logits, [labels[number] for number in range(len(labels))]

    _judge_once(work, job.name, seed, answers)


def without_pooler(model: str, out: Path) -> str:
    """Return a copy of ``model`` with a fresh pooler, like the dense layer of a student's head."""
    if not (out / "model.safetensors").exists():
        shutil.copytree(resolve_model(model), out, dirs_exist_ok=True)
        weights = load_file(out / "model.safetensors")
        left = {name: value for name, value in weights.items() if "pooler." not in name}
        save_file(left, out / "model.safetensors", {"format": "pt"})
    return str(out)


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
    found = judge(values, labels, read_rows(work / "data" / "test.jsonl"))
    found |= {"name": name, "seed": seed, "seconds": time.monotonic() - began}
    _save(file, found)
    print(f"{name}, seed {seed}: {found['accuracy']:.4f} in {found['seconds']:.0f} s", flush=True)


def _save(file: Path, found: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found) + "\n")


def merged(work: Path, size: Size, experts: Mapping[str, Path]) -> None:
    """Score the experts on the test texts, alone and merged, without a student."""
    if (work / "scores" / "merged.json").exists():
        return
    outputs = [
        expert_output(group, str(path), _test(work), size.test_passes, 0, LENGTH, 64)
        for group, path in experts.items()
    ]
    _save(
        work / "scores" / "merged.json", _merges(outputs, read_rows(work / "data" / "test.jsonl"))
    )


def merged_from_cache(work: Path, model: str, size: Size) -> None:
    """Score the same on the students' own texts, from the cache: how good their targets are."""
    cache = Cache.open(configuration(work, model, size).cache.path)
    batch = cache.gather(np.arange(len(cache)), list(GROUPS))
    outputs = [
        ExpertOutput(cache.teacher(g).info, batch.targets[g].logits, batch.targets[g].mc_probs)
        for g in GROUPS
    ]
    _save(
        work / "scores" / "targets.json", _merges(outputs, read_rows(work / "data" / "seen.jsonl"))
    )


def _merges(outputs: Sequence[ExpertOutput], rows: Sequence[Row]) -> dict[str, Any]:
    union = LabelUnion.of([output.info for output in outputs], "merge")
    logits = {o.info.name: torch.from_numpy(np.array(o.logits)).float() for o in outputs}
    means = {o.info.name: torch.from_numpy(np.array(o.mc_probs)).float() for o in outputs}
    found = merged_probabilities(union, logits, means)
    return {name: judge(probs.numpy(), union.names, rows) for name, probs in found.items()}


if __name__ == "__main__":
    main()
