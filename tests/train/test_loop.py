"""Stage 2 as a whole: bit-equal runs, interruptions, what is left behind, and what is refused."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.seal import SEAL, seal
from rekindle.data.views.masking import MaskConfig
from rekindle.data.views.views import MaskedView
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.train import loop as module
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.loop import autocast, train_student
from rekindle.train.objective.objective import Objective, StepLoss
from rekindle.train.order.split import split_corpus
from rekindle.train.order.stream import TrainingStream
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student, build_student

CPU = torch.device("cpu")
ALL = [
    {"teachers": ["big"], "temperature": 2.0, "weight": {"over": 0.6}},
    {"teachers": ["odd.lm"], "weight": 0.3},
    {"teachers": ["sense", "tags"], "weight": 0.2},
    {"teachers": ["pair"], "weight": 0.2},
]
TIMES = ("tokens_per_second", "data_wait", "seconds")


def train_config(distill=(), **values):
    """Ten short steps; ``hard`` goes into the objective."""
    hard = {"hard": {"weight": values.pop("hard")}} if "hard" in values else {}
    quick = {
        "steps": 10,
        "batch_sequences": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "checkpoint_every": 4,
        "evaluate_every": 5,
        "evaluate_sequences": 8,
        "held_out": 0.1,
        "objective": {**hard, "distill": list(distill)},
    }
    return parse_settings(TrainConfig, quick | values)


def run(world, out, config=None, **options):
    """Train the world's student."""
    cache = options.pop("cache", None) or world.open()
    task = "masked_lm" if any("masked" in v for v in cache.views) else "causal_lm"
    student = StudentConfig(model=str(options.pop("model", world.student)), task=task)
    return train_student(cache, student, config or train_config(), out, **options)


def weights(out):
    found = load_file(out / "model.safetensors")
    return found | {f"heads.{k}": v for k, v in load_file(out / "heads.safetensors").items()}


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def metrics(out):
    """Every record without what depends on the clock."""
    records = read_metrics(out)
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def sequences(result):
    """How many sequences were trained with what."""
    return {n: result.coverage[f"sequences_{n}"] for n in ("with_kd", "ce_only", "neither")}


def stop_at(step, error=KeyboardInterrupt):
    def report(done, values):
        if done == step:
            raise error

    return report


def no_reader_left():
    return not [t for t in threading.enumerate() if t.name == "prefetch" and t.is_alive()]


@pytest.fixture(scope="module")
def whole(masked_world, tmp_path_factory):
    """An uninterrupted run with everything in it, dropout on, and its result."""
    out = tmp_path_factory.mktemp("whole") / "run"
    config = json.loads((masked_world.student / "config.json").read_text())
    assert config["hidden_dropout_prob"] > 0
    seen = []
    result = run(
        masked_world, out, train_config(ALL), report=lambda step, values: seen.append(step)
    )
    assert seen == list(range(1, 11))
    return result


# --- the same run twice, and a run in two parts ---


def test_the_same_configuration_gives_the_same_weights_to_the_bit(masked_world, whole, tmp_path):
    result = run(masked_world, tmp_path / "again", train_config(ALL))
    assert same_weights(result.directory, whole.directory)
    assert metrics(result.directory) == metrics(whole.directory)
    other = run(masked_world, tmp_path / "other", train_config(ALL, seed=1))
    assert not same_weights(other.directory, whole.directory)


@pytest.mark.parametrize("step", [1, 4, 5, 10])
def test_an_interrupted_run_goes_on_to_the_same_bits(masked_world, whole, tmp_path, step):
    """Before the first checkpoint, at one (not yet saved), after it, and when all is done."""
    out, config = tmp_path / "run", train_config(ALL)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(masked_world, out, config, report=stop_at(step))
    assert no_reader_left()  # though the traceback still holds the loop's frame
    del caught
    assert not (out / "model.safetensors").exists()
    result = run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert result.coverage == whole.coverage
    assert result.evaluation == whole.evaluation


def test_a_run_may_be_interrupted_again_and_again(masked_world, whole, tmp_path):
    out, config = tmp_path / "run", train_config(ALL)
    for step in (5, 7, 9):
        with pytest.raises(KeyboardInterrupt):
            run(masked_world, out, config, report=stop_at(step), resume=step > 5)
    trainer = out / "checkpoints/step-00000008/trainer.json"
    content = json.loads(trainer.read_text()) | {"seconds": 5000.0}
    trainer.write_bytes(seal({k: v for k, v in content.items() if k != SEAL}))
    result = run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert 5000 < result.seconds < 6000  # earlier parts are counted


def test_an_interrupt_while_the_model_is_written(masked_world, whole, tmp_path, monkeypatch):
    out, config = tmp_path / "run", train_config(ALL)
    with monkeypatch.context() as patched:
        patched.setattr(module.json, "dumps", stop_at_summary(json.dumps))
        with pytest.raises(KeyboardInterrupt):
            run(masked_world, out, config)
    result = run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)
    assert (result.coverage, result.evaluation) == (whole.coverage, whole.evaluation)
    assert not (out / ".final").exists()


def stop_at_summary(dumps):
    def patched(values, **options):
        if isinstance(values, dict) and "evaluation" in values:
            raise KeyboardInterrupt
        return dumps(values, **options)

    return patched


def test_a_finished_run_may_be_resumed(masked_world, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole.directory, out)
    result = run(masked_world, out, train_config(ALL), resume=True)
    assert replace(result, directory=whole.directory, seconds=0) == replace(whole, seconds=0)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)


def test_resume_of_a_run_that_is_not_there_starts_it(masked_world, whole, tmp_path):
    run(masked_world, tmp_path / "run", train_config(ALL), resume=True)
    assert same_weights(tmp_path / "run", whole.directory)


def test_a_damaged_newest_checkpoint_is_passed_over(masked_world, whole, tmp_path, caplog):
    out, config = tmp_path / "run", train_config(ALL)
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, out, config, report=stop_at(9))
    newest = out / "checkpoints/step-00000008/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    with caplog.at_level(logging.INFO, logger="rekindle"):
        run(masked_world, out, config, resume=True)
    assert "step-00000008 is damaged (model.safetensors)" in caplog.text
    assert "at step 5" in caplog.text  # the best on what is held out
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)


KILLED = """
import json, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from rekindle.data.cache import Cache
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student

given = json.loads(sys.argv[1])
def report(step, values):
    print(step, flush=True)
    time.sleep(0.05)
train_student(
    Cache.open(given["cache"]),
    StudentConfig.model_validate(given["student"]),
    TrainConfig.model_validate(given["train"]),
    Path(given["out"]),
    resume=True,
    report=report,
)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(masked_world, whole, tmp_path):
    """SIGKILL at several moments, among them while a checkpoint is being written."""
    out, config = tmp_path / "run", train_config(ALL)
    given = {
        "cache": str(masked_world.path),
        "student": {"model": str(masked_world.student)},
        "train": config.model_dump(mode="json", by_alias=True),
        "out": str(out),
    }
    command = [sys.executable, "-c", KILLED, json.dumps(given)]
    for step, wait in ((2, 0.0), (4, 0.06), (5, 0.0), (8, 0.07), (9, 0.05)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if int(line) >= step:
                time.sleep(wait)
                os.kill(process.pid, signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    run(masked_world, out, config, resume=True)
    assert same_weights(out, whole.directory)
    assert metrics(out) == metrics(whole.directory)


# --- what a run leaves behind ---


def test_metrics_have_every_step_and_every_evaluation(whole):
    records = metrics(whole.directory)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 11))
    assert [r["step"] for r in records if r["kind"] == "evaluate"] == [5, 10]
    first, last = records[0], records[-1]
    assert {"loss", "ce", "kd/big", "kd/odd.lm", "kd/sense", "kd/tags", "kd/pair"} <= first.keys()
    assert {"learning_rate", "grad_norm", "tokens"} <= first.keys()
    assert first["learning_rate"] == pytest.approx(5e-4)  # the first of two warm-up steps
    assert last["kind"] == "evaluate"
    assert {k: v for k, v in last.items() if k not in ("kind", "step")} == pytest.approx(
        whole.evaluation, rel=1e-6
    )
    assert "kl/big" not in last  # its weight was 0 by then
    assert "kl/big" in next(r for r in records if r["kind"] == "evaluate")


def test_the_directory_tells_what_it_is(masked_world, whole):
    names = {p.name for p in whole.directory.iterdir()}
    assert {"config.json", "model.safetensors", "heads.safetensors", "summary.json"} <= names
    assert {"tokenizer.json", "metrics.jsonl", "run.json", "rekindle_student.json"} <= names
    assert not [n for n in names if n.startswith(".")]
    about = json.loads((whole.directory / "rekindle_student.json").read_text())
    cache = masked_world.open()
    assert about["made_by"]["cache"]["corpus"] == cache.corpus.fingerprint
    assert about["made_by"]["cache"]["teachers"]["big"] == cache.teacher("big").fingerprint
    assert about["made_by"]["student"]["model"] == str(masked_world.student)
    summary = json.loads((whole.directory / "summary.json").read_text())
    assert summary["evaluation"] == whole.evaluation
    assert summary["coverage"] == whole.coverage
    kept = sorted(p.name for p in (whole.directory / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000010"]


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_the_directory_is_an_ordinary_model(masked_world, causal_world, tmp_path, kind):
    world = masked_world if kind == "masked" else causal_world
    distill = [
        {
            "teachers": [
                "big" if kind == "masked" else "lm",
            ]
        },
        {"teachers": ["sense"]},
    ]
    out = run(world, tmp_path / "run", train_config(distill, steps=3)).directory
    factory = AutoModelForMaskedLM if kind == "masked" else AutoModelForCausalLM
    model, info = factory.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    student = Student.from_pretrained(out).eval()
    ids = torch.arange(5, 25)[None]
    expected = student.output_head.logits(
        student({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(20)).hidden
    )
    found = model.eval()(ids).logits[0]
    torch.testing.assert_close(found[:, : student.vocabulary_size], expected)
    assert load_tokenizer(str(out)).digest == world.open().tokenizer_digest
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("the model reads")["input_ids"]
    assert student.head_configs.keys() == {"sense"}
    initial = factory.from_pretrained(world.student).state_dict()
    trained = model.state_dict()
    assert all((initial[n] != trained[n]).any() for n in initial if "bias" in n)


def test_a_student_may_be_a_student_and_a_teacher_again(masked_world, whole, tmp_path):
    """Generations: a student of run n teaches run n + 1, and goes on itself with its heads."""
    teacher = {"name": "grown", "model": str(whole.directory), "task": "masked_lm"}
    teacher["targets"] = {"kind": "topk"}  # the KL to a sample is not 0 where the models are equal
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    config = masked_world.config.model_copy(
        update={
            "cache": masked_world.config.cache.model_copy(update={"path": str(folder)}),
            "teachers": (type(masked_world.config.teachers[0]).model_validate(teacher),),
        }
    )
    cache_teachers(config)
    cache = Cache.open(folder)
    assert cache.teachers["grown"].coverage == 1
    distill = [{"teachers": ["grown"]}, {"teachers": ["sense"]}]
    chosen = train_config(distill, steps=2, learning_rate=1e-9, held_out=0.2)
    result = run(masked_world, tmp_path / "run", chosen, cache=cache, model=whole.directory)
    assert result.evaluation["kl/grown"] < 5e-3
    assert result.evaluation["agreement/grown"] == 1
    before, after = weights(whole.directory), weights(result.directory)
    assert after.keys() < before.keys()  # the heads of tags and pair are not asked for here
    moved = {n: float((before[n] - after[n]).abs().max()) for n in after}
    assert max(moved.values()) < 1e-6
    assert any(n.startswith("heads.sense.") for n in moved)


def test_two_students_from_one_cache_without_any_teacher_left(
    masked_world, corpus_file, wordpiece, make_model, tmp_path
):
    """The cache is all that stage 2 needs: models, corpus and tokenizer are deleted."""
    values = masked_world.config.model_dump(mode="json", by_alias=True)
    shutil.copytree(wordpiece, tmp_path / "tokenizer")
    shutil.copy(corpus_file, tmp_path / "docs.jsonl")
    values["corpus"] |= {
        "source": str(tmp_path / "docs.jsonl"),
        "tokenizer": str(tmp_path / "tokenizer"),
        "limit_sequences": 30,
    }
    values["cache"]["path"] = str(tmp_path / "cache")
    values["teachers"] = [t for t in values["teachers"] if t["name"] in ("big", "sense")]
    for number, teacher in enumerate(values["teachers"]):
        shutil.copytree(teacher["model"], tmp_path / f"teacher-{number}")
        teacher["model"] = str(tmp_path / f"teacher-{number}")
    cache_teachers(type(masked_world.config).model_validate(values))
    for name in ("tokenizer", "teacher-0", "teacher-1"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "docs.jsonl").unlink()
    chosen = train_config([{"teachers": ["big"]}, {"teachers": ["sense"]}], steps=3)
    small = make_model("bert", "AutoModelForMaskedLM", wordpiece, num_hidden_layers=1)
    for name, model in (("a", masked_world.student), ("b", small)):
        cache = Cache.open(tmp_path / "cache")
        result = run(masked_world, tmp_path / name, chosen, cache=cache, model=model)
        assert sequences(result) == {"with_kd": 18, "ce_only": 0, "neither": 0}


# --- the steps themselves ---


def test_a_step_is_adamw_on_the_clipped_gradient(masked_world, make_model, wordpiece, tmp_path):
    """One step by hand: AdamW's first step is lr · g / (|g| + ε), after decay of the matrices."""
    model = make_model(
        *("bert", "AutoModelForMaskedLM", wordpiece),
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    chosen = train_config(
        [{"teachers": ["big"]}],
        **{"steps": 1, "warmup_steps": 0, "weight_decay": 0.3, "max_grad_norm": 0.01},
    )
    out = run(masked_world, tmp_path / "run", chosen, model=model).directory
    cache = masked_world.open()
    infos = {"big": cache.teacher("big").info}
    objective = Objective(chosen.objective, infos, "masked_lm", 1)
    student = build_student(StudentConfig(model=str(model)), {}, infos["big"].vocabulary_size, 0)
    view = cache.masked_view().name
    train = split_corpus(cache, 0.1).train
    batch = TrainingStream(cache, train, 6, 0, objective.teachers_at, view).batch(0)
    counts = objective.counts(batch, 0)
    objective.loss(student.train(), batch, counts, 0, CPU).total.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    assert read_metrics(out)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert norm > 0.02
    found = AutoModelForMaskedLM.from_pretrained(out).state_dict()
    for name, p in student.model.named_parameters():
        if p.grad is None:
            continue
        g = p.grad * (0.01 / norm)
        decayed = p * (1 - 1e-3 * 0.3) if p.dim() > 1 else p
        expected = (decayed - 1e-3 * g / (g.abs() + 1e-8)).detach()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=2e-5)


def test_micro_batches_train_the_same_student(masked_world, make_model, wordpiece, tmp_path):
    model = make_model(
        *("bert", "AutoModelForMaskedLM", wordpiece),
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    found = []
    for micro in (None, 4):
        chosen = train_config(
            [{"teachers": ["big"]}, {"teachers": ["odd.lm"]}],
            **{"steps": 3, "micro_batch_sequences": micro},
        )
        found.append(run(masked_world, tmp_path / str(micro), chosen, model=model).directory)
    losses = [[r["loss"] for r in metrics(out)] for out in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_distillation_brings_the_student_near_its_teacher(masked_world, tmp_path):
    distill = [{"teachers": ["big"]}, {"teachers": ["sense"]}]
    chosen = train_config(
        distill, hard=0.0, steps=40, learning_rate=1e-2, batch_sequences=12, evaluate_every=20
    )
    result = run(masked_world, tmp_path / "run", chosen)
    curve = [r for r in metrics(result.directory) if r["kind"] == "evaluate"]
    assert curve[-1]["kl/big"] < curve[0]["kl/big"]
    train = [r for r in metrics(result.directory) if r["kind"] == "train"]
    assert train[-1]["kd/big"] < 0.5 * train[0]["kd/big"]
    assert train[-1]["kd/sense"] < 0.7 * train[0]["kd/sense"]
    assert sequences(result) == {"with_kd": 480, "ce_only": 0, "neither": 0}


def test_bf16_stays_near_float32(masked_world, tmp_path):
    found = []
    for precision in ("fp32", "bf16"):
        chosen = train_config(ALL, steps=2, precision=precision)
        found.append(metrics(run(masked_world, tmp_path / precision, chosen).directory)[0])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=0.05)
    assert found[1]["loss"] != found[0]["loss"]


def test_autocast_is_what_the_configuration_says():
    x, w = torch.randn(2, 3), torch.randn(3, 3)
    for precision, dtype in (
        ("fp32", torch.float32),
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        with autocast(precision, CPU):
            assert (x @ w).dtype == dtype


# --- what is read ---


def test_a_teacher_of_weight_zero_is_read_no_more(masked_world, tmp_path, monkeypatch):
    """Knowledge inheritance: once α is 0 its shards may be deleted, evaluation included."""
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    cache = Cache.open(folder)
    read = []
    gather = Cache.gather

    def noting(self, index, teachers, **options):
        read.append((threading.current_thread().name, tuple(teachers)))
        return gather(self, index, teachers, **options)

    def report(done, values):
        assert ("kd/big" in values) == (done <= 6)
        if done == 7:
            cache.teachers["big"]._views.clear()
            cache.teachers["big"]._open.clear()
            shutil.rmtree(folder / "targets/big/data")

    monkeypatch.setattr(Cache, "gather", noting)
    fall = {"schedule": "linear", "from": 1.0, "to": 0.0, "over": 0.6}
    rise = {"schedule": "linear", "from": 0.0, "to": 1.0, "over": 0.6}
    chosen = train_config(
        [{"teachers": ["big"], "temperature": 2.0, "weight": fall}], hard=rise, evaluate_every=2
    )
    run(masked_world, tmp_path / "run", chosen, cache=cache, report=report)
    trained = [teachers for thread, teachers in read if thread == "prefetch"]
    assert trained == [("big",)] * 6 + [()] * 4
    evaluated = [teachers for thread, teachers in read if thread != "prefetch"]
    assert set(evaluated[:3]) == {("big",)}
    assert evaluated[-1] == ()


def test_a_teacher_that_never_weighs_anything_is_never_opened(masked_world, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    shutil.rmtree(folder / "targets/big/data")
    distill = [{"teachers": ["big"], "weight": 0}, {"teachers": ["wide"]}]
    chosen = train_config(distill, steps=2)
    result = run(masked_world, tmp_path / "run", chosen, cache=Cache.open(folder))
    assert result.evaluation.keys() == {"loss", "kl/wide", "agreement/wide"}


def test_coverage_counts_sequences(masked_world, tmp_path):
    """60 sequences: those of one domain have a target, the others train on the text, or not."""
    chosen = train_config([{"teachers": ["odd.lm"]}])
    one = run(masked_world, tmp_path / "a", chosen).coverage
    kd, positions = one["sequences_with_kd"], one["positions_with_kd"]
    assert 0 < kd < 60
    assert one["sequences_ce_only"] == 60 - kd
    assert one["sequences_neither"] == one["positions_neither"] == 0
    assert positions > kd
    assert one["positions_ce_only"] > 0
    alone = train_config([{"teachers": ["odd.lm"]}], hard=0.0)
    two = run(masked_world, tmp_path / "b", alone).coverage
    for what in ("sequences", "positions"):
        assert two[f"{what}_with_kd"] == one[f"{what}_with_kd"]
        assert two[f"{what}_neither"] == one[f"{what}_ce_only"]
        assert two[f"{what}_ce_only"] == 0
    cache = masked_world.open()
    train = split_corpus(cache, 0.1).train
    stream = TrainingStream(cache, train, 6, 0, lambda step: [], cache.masked_view().name)
    domains = [d for step in range(10) for d in stream.batch(step).domains]
    assert kd == domains.count("odd")


def test_held_out_sequences_are_never_trained_on(masked_world, tmp_path, monkeypatch):
    seen = []
    step = module._step

    def noting(training, batch, *rest):
        seen.extend(batch.index.tolist())
        return step(training, batch, *rest)

    monkeypatch.setattr(module, "_step", noting)
    run(masked_world, tmp_path / "run", train_config(steps=30))
    cache = masked_world.open()
    split = split_corpus(cache, 0.1)
    assert len(seen) == 180 > len(split.train)
    train = split.train.spread(len(split.train)).tolist()
    assert set(seen) == set(train)
    assert not set(seen) & set(split.held_out.spread(len(split.held_out)).tolist())
    assert sorted(seen[: len(train)]) == train


# --- what stops a run ---


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_loss_that_is_not_finite_stops_the_run(masked_world, tmp_path, monkeypatch, clip):
    loss = Objective.loss

    def broken(self, student, batch, counts, step, device):
        result = loss(self, student, batch, counts, step, device)
        return replace(result, total=result.total * torch.nan) if step == 5 else result

    monkeypatch.setattr(Objective, "loss", broken)
    with pytest.raises(InputError, match=r"the loss is nan at step 6\. Its 6 examples are named"):
        run(masked_world, tmp_path / "run", train_config(max_grad_norm=clip))
    assert no_reader_left()
    assert len(metrics(tmp_path / "run")) == 6  # five steps and an evaluation
    suspect = json.loads((tmp_path / "run/stopped-at-step-00000006.json").read_text())
    cache = masked_world.open()
    view = cache.masked_view().name
    stream = TrainingStream(cache, split_corpus(cache, 0.1).train, 6, 0, lambda step: [], view)
    assert suspect["sequences"] == stream.batch(5).index.tolist()
    assert suspect["digests"] == [cache.example(i).digest for i in suspect["sequences"]]
    assert suspect["reason"] == "the loss is nan"


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_stops_the_run(masked_world, tmp_path, monkeypatch, clip):
    """A finite loss with an infinite gradient would poison the weights and the next checkpoint."""
    loss = Objective.loss

    def broken(self, student, batch, counts, step, device):
        result = loss(self, student, batch, counts, step, device)
        weight = next(student.parameters())
        spike = (weight.sum() * 0).sqrt() if step == 3 else 0.0
        return StepLoss(result.total + spike, result.terms)

    monkeypatch.setattr(Objective, "loss", broken)
    chosen = train_config(checkpoint_every=1, max_grad_norm=clip)
    with pytest.raises(InputError, match="the grad_norm is nan at step 4"):
        run(masked_world, tmp_path / "run", chosen)
    last = Student.from_pretrained(tmp_path / "run/checkpoints/step-00000003")
    assert all(torch.isfinite(p).all() for p in last.parameters())


def test_an_error_of_the_reader_stops_the_run(masked_world, tmp_path, monkeypatch):
    batch = TrainingStream.batch

    def broken(self, step):
        if step == 3:
            raise OSError("the disk is on fire")
        return batch(self, step)

    monkeypatch.setattr(TrainingStream, "batch", broken)
    with pytest.raises(OSError, match="on fire"):
        run(masked_world, tmp_path / "run")
    assert no_reader_left()
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3]


# --- what is refused, before anything is written ---


def refused(world, tmp_path, message, config=None, error=InputError, **options):
    out = tmp_path / "refused"
    with pytest.raises(error, match=message):
        run(world, out, config, **options)
    assert not out.exists()  # the next try, with the mistake mended, finds a free directory


def test_another_tokenizer_is_refused(masked_world, make_model, tmp_path):
    tokens = sorted(masked_world.open().corpus.tokenizer.hf.get_vocab().items(), key=lambda t: t[1])
    names = [token for token, _ in tokens]
    names[50], names[51] = names[51], names[50]
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "vocab.txt").write_text("\n".join(names) + "\n")
    from transformers import BertTokenizerFast

    BertTokenizerFast(vocab=str(other / "vocab.txt")).save_pretrained(other)
    model = make_model("bert", "AutoModelForMaskedLM", other)
    refused(masked_world, tmp_path, "has another tokenizer than the cache", model=model)


def test_a_student_without_tokenizer_files_needs_a_large_enough_vocabulary(
    masked_world, make_model, wordpiece, tmp_path
):
    size = load_tokenizer(str(wordpiece)).size
    for less in (0, 1):
        made = make_model("bert", "AutoModelForMaskedLM", wordpiece, vocab_size=size - less)
        bare = tmp_path / f"bare-{less}"
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(made / name, bare)
    run(masked_world, tmp_path / "run", train_config(steps=1), model=tmp_path / "bare-0")
    message = f"vocabulary of {size - 1}, the corpus tokenizer has {size} tokens"
    refused(masked_world, tmp_path, message, model=tmp_path / "bare-1")


def test_a_student_that_takes_shorter_sequences_is_refused(
    masked_world, make_model, wordpiece, tmp_path
):
    short = make_model("bert", "AutoModelForMaskedLM", wordpiece, max_position_embeddings=23)
    refused(masked_world, tmp_path, "takes at most 23 tokens, .* up to 24", model=short)


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ([{"teachers": ["bigg"]}], r"no teacher 'bigg' \(it has: big, even.lm,"),
        ([{"teachers": ["big"], "temperature": 3.0}], "stores the temperatures"),
        ([{"teachers": ["big"], "k": 9}], "teacher 'big' keeps 8 candidates; k = 9"),
    ],
)
def test_what_the_cache_does_not_have_is_refused(masked_world, tmp_path, distill, message):
    refused(masked_world, tmp_path, message, train_config(distill))


def test_a_causal_student_cannot_learn_from_a_masked_teacher(
    masked_world, make_model, wordpiece, tmp_path
):
    model = make_model("gpt2", "AutoModelForCausalLM", wordpiece)
    student = StudentConfig(model=str(model), task="causal_lm")
    chosen = train_config([{"teachers": ["big"]}])
    with pytest.raises(InputError, match="a causal_lm student has no loss at its positions"):
        train_student(masked_world.open(), student, chosen, tmp_path / "run")
    # Text experts have no such bounds.
    chosen = train_config([{"teachers": ["sense"]}], steps=1)
    found = train_student(masked_world.open(), student, chosen, tmp_path / "run")
    assert found.coverage["sequences_with_kd"] == 6


def test_a_masked_student_needs_masks(causal_world, make_model, bytelevel, tmp_path):
    student = StudentConfig(model=str(make_model("bert", "AutoModelForMaskedLM", bytelevel)))
    with pytest.raises(InputError, match="has the masked views none"):
        train_student(causal_world.open(), student, train_config(), tmp_path / "run")


def test_a_best_that_nobody_measures_is_refused(masked_world, tmp_path):
    chosen = train_config([{"teachers": ["big"]}, {"teachers": ["score"]}], keep_best="kl/score")
    refused(masked_world, tmp_path, "'kl/score'; of this run loss, kl/big, .*, mse/score", chosen)


@pytest.mark.parametrize(("name", "best"), [("loss", 6), ("agreement/big", 4), (None, None)])
def test_the_best_checkpoint_is_kept(masked_world, tmp_path, monkeypatch, name, best):
    """At the last of equals nothing improves; agreement is better the higher it is."""
    losses = iter([5.0, 4.0, 3.0, 3.0, 7.0, 4.0])
    agreements = iter([0.1, 0.6, 0.5, 0.6, 0.2, 0.3])

    def measured(*_):
        return {"loss": next(losses), "agreement/big": next(agreements)}

    monkeypatch.setattr(module, "evaluate", measured)
    chosen = train_config(
        [{"teachers": ["big"]}],
        steps=12, evaluate_every=2, checkpoint_every=5, keep_checkpoints=1, keep_best=name,
    )  # fmt: skip
    out = run(masked_world, tmp_path / "run", chosen).directory
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names == {"step-00000012"} | ({f"step-{best:08d}"} if best else set())
    state = json.loads((out / "checkpoints/step-00000012/trainer.json").read_text())
    assert (state["best"] or {}).get("step") == best
    if best:
        Student.from_pretrained(out / "checkpoints" / f"step-{best:08d}")


def test_a_teacher_of_other_masks_is_refused(masked_world, tmp_path):
    """The same positions with other tokens in them: nothing but the view's name can tell."""
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    first = masked_world.open().masked_view().name
    corpus = Cache.open(folder).corpus
    other = MaskedView(corpus, MaskConfig(mask_token=1.0, random_token=0.0), seed=0, replicas=2)
    other.build()
    cache = Cache.open(folder)
    a, b = (cache.gather(np.arange(9), [], masked_view=v).masked for v in (first, other.name))
    assert np.array_equal(a.positions, b.positions)
    assert not np.array_equal(a.input_ids, b.input_ids)
    chosen = train_config([{"teachers": ["big"]}], steps=1)
    message = f"'big' saw the masks {first}, the student would see {other.name}"
    refused(masked_world, tmp_path, message, chosen, cache=cache, masked_view=other.name)
    refused(masked_world, tmp_path, "name one", chosen, cache=cache)
    run(masked_world, tmp_path / "run", chosen, cache=cache, masked_view=first)


def test_holes_are_refused_or_trained_without_distillation(masked_world, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    for unit in ("00001-r000", "00001-r001"):
        (folder / f"targets/big/commits/{unit}.json").unlink()
    (folder / "targets/sense/commits/00000.json").unlink()
    cache = Cache.open(folder)
    distill = [{"teachers": ["big"]}, {"teachers": ["sense"]}]
    refused(
        masked_world,
        tmp_path,
        "'big' has targets for .*% of the cache",
        train_config(distill),
        cache=cache,
    )
    message = "'sense' has targets for .*% of the cache"
    some = train_config(distill, allow_missing=["big"])
    refused(masked_world, tmp_path, message, some, cache=cache)
    for holes, names in ((["big"], ["big"]), (["big", "sense"], ["big", "sense"])):
        chosen = train_config([{"teachers": [n]} for n in names], allow_missing=holes, steps=12)
        found = run(masked_world, tmp_path / "-".join(names), chosen, cache=Cache.open(folder))
        total = sum(sequences(found).values())
        assert total == 72
        if names == ["big"]:
            assert 20 < found.coverage["sequences_with_kd"] < 60
            assert found.coverage["sequences_ce_only"] == 72 - found.coverage["sequences_with_kd"]
        else:  # where one has a hole, the other has none
            assert found.coverage["sequences_with_kd"] == 72
        assert found.evaluation["kl/big"] > 0


def test_a_directory_in_use_is_refused(masked_world, whole, tmp_path):
    with pytest.raises(InputError, match="or --resume to go on with the run in it"):
        run(masked_world, whole.directory, train_config(ALL))
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no run"):
            run(masked_world, tmp_path, train_config(ALL), resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"learning_rate": 2e-3}, "train.learning_rate: 0.001 there, 0.002 here"),
        ({"steps": 11}, "train.steps"),
        ({"hard": 0.5}, "train.objective"),
    ],
)
def test_a_run_is_not_resumed_as_another(masked_world, whole, values, key):
    with pytest.raises(CheckpointError, match=key):
        run(masked_world, whole.directory, train_config(ALL, **values), resume=True)


def test_a_run_is_not_resumed_with_another_student_or_cache(
    masked_world, whole, tmp_path, make_model, wordpiece
):
    other = make_model("bert", "AutoModelForMaskedLM", wordpiece, seed=77)
    with pytest.raises(CheckpointError, match=r"student\.model"):
        run(masked_world, whole.directory, train_config(ALL), model=other, resume=True)
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    about = folder / "targets/big/teacher.json"
    values = json.loads(about.read_text())
    values["fingerprints"]["weights"] = "0" * 64
    about.write_bytes(seal({k: v for k, v in values.items() if k != SEAL}))
    (folder / "cache.json").write_bytes(seal({}))
    with pytest.raises(CheckpointError, match=r"cache\.teachers"):
        run(masked_world, whole.directory, train_config(ALL), cache=Cache.open(folder), resume=True)


def test_a_mistake_leaves_the_directory_free(masked_world, tmp_path):
    """An impossible teacher, then the same --out again without it."""
    out = tmp_path / "run"
    with pytest.raises(InputError):
        run(masked_world, out, train_config([{"teachers": ["nobody"]}]))
    with pytest.raises(InputError):
        run(masked_world, out, train_config(), model=Path("/nowhere"))
    run(masked_world, out, train_config(steps=1))


def test_split_batch_is_what_the_loop_accumulates_over(masked_world, tmp_path, monkeypatch):
    sizes = []

    def noting(batch, size):
        parts = split_batch(batch, size)
        sizes.append([len(p.index) for p in parts])
        return parts

    monkeypatch.setattr(module, "split_batch", noting)
    run(masked_world, tmp_path / "run", train_config(steps=2, micro_batch_sequences=4))
    assert sizes == [[4, 2]] * 2
