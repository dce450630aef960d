"""Finds the best sparse target: students of one teacher, from caches of equal bytes per token.

A causal teacher is trained on Wikipedia, then students on its stored targets: the top k
(renormalised, or with a tail bucket), a random sample, a threshold sample, everything (the ceiling)
and nothing (the floor). Reported on documents that neither has seen: loss, expected calibration
error, and the share of the way from floor to ceiling, over several seeds.

    python tests/benchmarks/sparse_targets.py --work DIR            # everything, resumable
    python tests/benchmarks/sparse_targets.py --work DIR --csv      # and write results.csv's rows

Each student is one `train-student` run of this package; only the last evaluation is made here, with
transformers alone, so that no part of the loss under test judges itself.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from results_csv import Row, append, hardware, versions

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.outside.quiet import quiet_transformers

SHARED = Path(os.environ.get("REKINDLE_SHARED", Path(__file__).parents[3] / "shared" / "data"))
BINS = 15  # of the calibration error
EVALUATED = 800  # sequences of held-out documents


class Size(NamedTuple):
    """The size of the experiment. Steps are of 16 sequences for students, 32 for the teacher."""

    vocabulary: int
    length: int
    sequences: int  # of the corpus
    cached: int  # the first ones of them: what students are trained on, once
    teacher: dict[str, int]  # GPT-2's n_layer, n_embd, n_head
    teacher_steps: int
    student: dict[str, int]
    student_steps: int
    k: int  # kept by topk and threshold; the others get as many bytes


SIZES = {
    "toy": Size(
        1000, 64, 400, 300, {"n_layer": 1, "n_embd": 32, "n_head": 2}, 20,
        {"n_layer": 1, "n_embd": 32, "n_head": 2}, 10, 8,
    ),
    "two-cores": Size(
        4096, 128, 24_000, 6600, {"n_layer": 4, "n_embd": 256, "n_head": 4}, 720,
        {"n_layer": 2, "n_embd": 128, "n_head": 2}, 400, 12,
    ),
    "gpu": Size(
        16_384, 256, 17_000, 17_000, {"n_layer": 8, "n_embd": 768, "n_head": 12}, 3000,
        {"n_layer": 4, "n_embd": 512, "n_head": 8}, 1500, 12,
    ),
}  # fmt: skip


class Variant(NamedTuple):
    """What a student learns from."""

    name: str
    teacher: str | None
    tail: str = "bucket"


VARIANTS = (
    Variant("no KD", None),
    Variant("top-k, renormalised", "topk", "renormalise"),
    Variant("top-k, tail bucket", "topk"),
    Variant("random sample", "random", "none"),
    Variant("threshold sample", "threshold", "none"),
    Variant("full KD", "full"),
)
FLOOR, CEILING = "no KD", "full KD"
# KD alone shows what the targets are worth; together with the text's own tokens it is what people
# run.
MIXES = {"KD alone": (0.0, 1.0), "CE + KD": (0.5, 0.5)}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="two-cores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", action="store_true")
    args = parser.parse_args()
    with quiet_transformers():
        run(args.work / args.size, args.size, args.seeds, args.csv)


def run(work: Path, name: str, seeds: int, write: bool) -> None:
    """Run everything of one size, in the folder ``work``."""
    size = SIZES[name]
    work.mkdir(parents=True, exist_ok=True)
    make_models(work, size)
    train_teacher(work, size)
    draws = equal_draws(work, size)
    bytes_of = cache_targets(work, size, draws)
    for seed in range(seeds):
        for mix in MIXES:
            for variant in VARIANTS:
                run_student(work, size, variant, mix, seed)
    rows = table(work, seeds)
    print(json.dumps({"bytes per token": bytes_of, "draws": draws, "teacher": judged(work)}))
    for row in rows:
        print(row)
    if write:
        write_csv(rows, bytes_of, name)


def make_models(work: Path, size: Size) -> None:
    """Make a byte-level tokenizer of the corpus, and the configurations of teacher and student."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2TokenizerFast

    if (work / "student" / "config.json").exists():
        return
    texts = list(_texts("wiki_train.jsonl", 300))
    trained = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    trained.train_from_iterator(texts, size.vocabulary, 2, False, [end])
    for name, shape in (("teacher-config", size.teacher), ("student", size.student)):
        (work / name).mkdir(exist_ok=True)
        trained.save_model(str(work / name))
        vocab, merges = (str(work / name / file) for file in ("vocab.json", "merges.txt"))
        fast = GPT2TokenizerFast(vocab=vocab, merges=merges, model_max_length=size.length)
        fast.save_pretrained(work / name)
        ids = {"bos_token_id": fast.eos_token_id, "eos_token_id": fast.eos_token_id}
        plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        # with GPT-2's 0.02, so narrow a model only counts words for a long time
        if name == "student":
            plain["initializer_range"] = 0.06
        GPT2Config(
            vocab_size=len(fast), n_positions=size.length, **shape, **ids, **plain
        ).save_pretrained(work / name)


def _texts(name: str, limit: int | None = None) -> Iterator[str]:
    with open(SHARED / "corpus" / name, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if limit is not None and number == limit:
                return
            yield json.loads(line)["text"]


def configuration(work: Path, size: Size, cache: str, **sections: Any) -> RunConfig:
    """Return a run on the first ``size.sequences`` of the corpus, in the cache of that name."""
    corpus = {
        "source": [str(SHARED / "corpus" / "wiki_train.jsonl")],
        "tokenizer": str(work / "student"),
        "sequence_length": size.length,
        "packing": "contiguous",
        "limit_sequences": size.sequences,
    }
    where = {"path": str(work / cache), "sequences_per_shard": 2048}
    return parse_settings(RunConfig, {"corpus": corpus, "cache": where} | sections)


def train_teacher(work: Path, size: Size) -> None:
    """Train the teacher from random weights with cross-entropy."""
    if (work / "teacher" / "summary.json").exists():
        return
    student = {"model": str(work / "teacher-config"), "from_scratch": True, "task": "causal_lm"}
    train = {
        "steps": size.teacher_steps, "batch_sequences": 32, "learning_rate": 2e-3,
        "warmup_steps": 40, "schedule": "cosine", "evaluate_every": 100, "checkpoint_every": 100,
    }  # fmt: skip
    config = configuration(work, size, "cache", student=student, train=train)
    cache_teachers(config)
    resume = (work / "teacher").exists()
    train_from_config(config, work / "teacher", resume=resume)


def _teachers(work: Path, size: Size, draws: int) -> list[dict[str, Any]]:
    kinds = {
        "topk": {"kind": "topk", "k": size.k, "temperatures": [1.0]},
        "threshold": {"kind": "threshold", "k": size.k},
        "random": {"kind": "random", "k": draws},
        "full": {"kind": "hidden"},
    }
    model = {"model": str(work / "teacher"), "task": "causal_lm"}
    return [{"name": name, "targets": kept} | model for name, kept in kinds.items()]


def equal_draws(work: Path, size: Size) -> int:
    """Return the draws of a random sample with as many bytes as top-k, found on one
    sequence in 40.
    """
    found = work / "draws.json"
    if found.exists():
        return int(json.loads(found.read_text()))
    probe = size._replace(sequences=max(size.cached // 40, 32))
    spent: dict[int, float] = {}
    low, high, wanted = size.k, 250, None
    while high - low > 1:
        draws = (low + high) // 2 if spent else 3 * size.k
        path = f"probe-{draws}"
        teachers = [t for t in _teachers(work, size, draws) if t["name"] in ("topk", "random")]
        cache_teachers(configuration(work, probe, path, teachers=teachers))
        sizes = _bytes_per_token(Cache.open(str(work / path)))
        wanted, spent[draws] = sizes["topk"], sizes["random"]
        low, high = (draws, high) if spent[draws] <= wanted else (low, draws)
    best = max((d for d, b in spent.items() if wanted is not None and b <= wanted), default=size.k)
    found.write_text(json.dumps(best))
    return best


def cache_targets(work: Path, size: Size, draws: int) -> dict[str, float]:
    """Cache all targets of the teacher; return bytes per token by kind."""
    taught = size._replace(sequences=size.cached)
    cache_teachers(configuration(work, taught, "targets", teachers=_teachers(work, size, draws)))
    return _bytes_per_token(Cache.open(str(work / "targets")))


def _bytes_per_token(cache: Cache) -> dict[str, float]:
    return {name: t.bytes_read / cache.corpus.tokens for name, t in cache.teachers.items()}


def run_student(work: Path, size: Size, variant: Variant, mix: str, seed: int) -> None:
    """Train and judge one student, unless that is done."""
    out = _directory(work, variant, mix, seed)
    if (out / "judged.json").exists():
        return
    hard, kd = MIXES[mix]
    objective: dict[str, Any] = {"hard": {"weight": 1.0 if variant.teacher is None else hard}}
    if variant.teacher is not None:
        term = {"teachers": [variant.teacher], "weight": kd, "tail": variant.tail}
        objective["distill"] = [term]
    student = {"model": str(work / "student"), "from_scratch": True, "task": "causal_lm"}
    train = {
        "steps": size.student_steps, "batch_sequences": 16, "learning_rate": 3e-3, "seed": seed,
        "warmup_steps": 20, "schedule": "cosine", "evaluate_every": 10_000, "keep_best": None,
        "evaluate_sequences": 16, "checkpoint_every": 10_000, "objective": objective,
    }  # fmt: skip
    taught = size._replace(sequences=size.cached)
    config = configuration(work, taught, "targets", student=student, train=train)
    began = time.monotonic()
    train_from_config(config, out, resume=out.exists())
    found = judge(out, size.length) | {"seconds": time.monotonic() - began}
    (out / "judged.json").write_text(json.dumps(found))
    print(f"{out.name}: {found}", flush=True)


def _directory(work: Path, variant: Variant, mix: str, seed: int) -> Path:
    # Without KD there is nothing to mix: one student a seed.
    mix = "" if variant.teacher is None else f" {mix}"
    return work / f"{variant.name}{mix} {seed}".replace(", ", "-").replace(" ", "-")


def judged(work: Path) -> dict[str, float]:
    """Return held-out values of the teacher."""
    file = work / "teacher" / "judged.json"
    if not file.exists():
        config = json.loads((work / "teacher" / "config.json").read_text())
        file.write_text(json.dumps(judge(work / "teacher", config["n_positions"])))
    return json.loads(file.read_text())


@torch.no_grad()
def judge(directory: Path, length: int) -> dict[str, float]:
    """Return loss (nats a token) and expected calibration error on documents nobody was
    trained on.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    ids: list[int] = []
    for text in _texts("wiki_heldout.jsonl"):
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= EVALUATED * length:
            break
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:EVALUATED]
    loss, confidence, right = [], [], []
    for part in rows.split(16):
        logits = model(part.to(device)).logits[:, :-1].float()
        log_probs = logits.log_softmax(dim=2).flatten(0, 1)
        gold = part[:, 1:].flatten().to(device)
        top = log_probs.max(dim=1)
        loss.append(-log_probs.gather(1, gold[:, None])[:, 0].cpu())
        confidence.append(top.values.exp().cpu())
        right.append((top.indices == gold).float().cpu())
    values = {"loss": float(torch.cat(loss).mean()), "accuracy": float(torch.cat(right).mean())}
    return values | {"ece": _ece(torch.cat(confidence).numpy(), torch.cat(right).numpy())}


def _ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Σ bins share · |mean confidence − accuracy|, bins of equal width (Guo et al., 2017)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    chosen = [bins == b for b in range(BINS) if (bins == b).any()]
    return float(sum(b.mean() * abs(confidence[b].mean() - right[b].mean()) for b in chosen))


def table(work: Path, seeds: int) -> list[dict[str, Any]]:
    """Return one row per mix and variant: mean and spread over seeds, and the gap closed."""
    rows = []
    for mix in MIXES:
        found = {
            v.name: [
                json.loads((_directory(work, v, mix, seed) / "judged.json").read_text())
                for seed in range(seeds)
            ]
            for v in VARIANTS
        }
        for name, runs in found.items():
            gaps = [
                (floor["loss"] - run["loss"]) / (floor["loss"] - ceiling["loss"])
                for floor, run, ceiling in zip(found[FLOOR], runs, found[CEILING], strict=True)
            ]
            row: dict[str, Any] = {"mix": mix, "variant": name}
            for what in ("loss", "ece", "accuracy"):
                row |= _spread(what, [run[what] for run in runs])
            rows.append(row | _spread("gap closed", gaps))
    return rows


def _spread(name: str, values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: round(statistics.fmean(values), 4), f"{name} ±": round(spread, 4)}


def write_csv(rows: list[dict[str, Any]], bytes_of: dict[str, float], size: str) -> None:
    """Append the table to results.csv."""
    teacher_of = {v.name: v.teacher for v in VARIANTS}
    found: list[Row] = []
    for row in rows:
        spent = bytes_of.get(teacher_of[row["variant"]] or "", 0.0)
        values = {k: v for k, v in row.items() if k not in ("mix", "variant")}
        values["bytes per token"] = round(spent, 1)
        case = f"{size}, {row['mix']}"
        found += [(case, row["variant"], metric, value, "") for metric, value in values.items()]
    append(found, "sparse-targets", hardware(), versions("torch", "transformers"))


if __name__ == "__main__":
    main()
