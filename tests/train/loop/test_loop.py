"""Stage 2 as a whole: what is left behind, what a step does, what coverage counts."""

import json
import shlex
import shutil
import threading
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.train import loop as module
from rekindle.train.config import StudentConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.loop import autocast
from rekindle.train.objective import ready
from rekindle.train.objective.objective import Objective
from rekindle.train.order.held_out import split_corpus
from rekindle.train.order.sequences import Order
from rekindle.train.order.stream import TrainingStream
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student, build_student
from testlib.command import pipeline
from testlib.loop import ALL, CPU, run, sequences, train_config
from testlib.models import STILL
from testlib.students import metrics, weights


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


def test_its_card_begins_with_how_to_use_it(whole, tmp_path):
    """What it says works as it stands there; of a head that cannot be exported it says why."""
    card = (whole.directory / "README.md").read_text()
    block, _, card = card.partition("---\n\n")
    assert yaml.safe_load(block.removeprefix("---\n")) == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["rekindle", "knowledge-distillation"],
    }
    first = card.splitlines()[:12]
    assert "**random** head" in first[2]
    commands = [shlex.split(line, comments=True) for line in first if "pipeline export" in line]
    assert {c[c.index("--head") + 1] for c in commands} == {"sense", "pair"}
    for command in commands:
        command[-1] = str(tmp_path / command[-1].rpartition("/")[2])
        done = pipeline(*command[1:])
        assert done.returncode == 0, done.stderr
        AutoModelForSequenceClassification.from_pretrained(command[-1])
    assert "The head 'tags' cannot be exported" in card
    assert "student.head=family" in card
    assert f'AutoModelForMaskedLM.from_pretrained("{whole.directory}")' in card


def test_the_card_of_a_student_whose_head_for_tokens_saw_no_loss_says_so(masked_world, tmp_path):
    chosen = train_config([{"teachers": ["sense"]}], hard=0.0, steps=1)
    made = run(masked_world, tmp_path / "run", chosen).directory
    block, _, card = (made / "README.md").read_text().partition("---\n\n")
    assert "pipeline_tag: feature-extraction" in block
    assert card.startswith("# The body of a masked language model with task heads")
    assert "**It is no language model**" in card
    load = f'AutoModel.from_pretrained("{made}")'
    assert f"Its body needs no export: `{load}`" in card
    AutoModel.from_pretrained(made)


def test_its_card_says_what_made_it(masked_world, whole):
    """Its teachers by name and weights, the text, the steps and the scores; no folder of ours but
    its own.
    """
    card = (whole.directory / "README.md").read_text()
    cache = masked_world.open()
    for name in ("big", "odd.lm", "sense", "tags", "pair"):
        info = cache.teacher(name).info
        [line] = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        assert f"{info.task} | {info.kind}" in line
        assert info.fingerprints["weights"][:12] in line
    assert f"fingerprint `{cache.corpus.fingerprint[:12]}`" in card
    assert "10 steps" in card
    for name, value in whole.evaluation.items():
        assert f"| {name} | {value:.4f} |" in card
    assert "license: …" in card
    assert str(masked_world.student) not in card


def test_the_best_checkpoint_is_named(masked_world, whole, tmp_path):
    """And which step's model the directory is."""
    evaluations = {
        r["step"]: r["loss"] for r in metrics(whole.directory) if r["kind"] == "evaluate"
    }
    step = min(evaluations, key=evaluations.__getitem__)
    value = pytest.approx(evaluations[step], rel=1e-6)
    assert whole.best == {"step": step, "name": "loss", "value": value}
    assert json.loads((whole.directory / "summary.json").read_text())["best"] == whole.best
    earlier = replace(whole, best={"step": 5, "name": "kl/big", "value": 0.25})
    assert earlier.describe_best() == (
        "the best kl/big on sequences held out of training was 0.2500 at step 5 "
        f"({whole.directory}/checkpoints/step-00000005); the model is that of step 10, the last"
    )
    last = run(masked_world, tmp_path / "run", train_config(steps=1, keep_best=None))
    assert last.best is None
    told = "the model is that of step 1, the last; no best one was looked for"
    assert last.describe_best() == told


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
        **STILL,
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
    order = Order(split_corpus(cache, 0.1).train, 6, 0)
    plan = objective.plan(0)
    batch = TrainingStream(cache, order, lambda step: plan.teachers, view).batch(0)
    counts = objective.counts(batch, plan)
    objective.loss(student.train(), batch, counts, plan, CPU).total.backward()
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
        **STILL,
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
            cache.teachers["big"]._lists.clear()
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
    assert result.evaluation.keys() == {"loss", "ce", "kl/wide", "agreement/wide"}


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
    order = Order(split_corpus(cache, 0.1).train, 6, 0)
    stream = TrainingStream(cache, order, lambda step: [], cache.masked_view().name)
    domains = [d for step in range(10) for d in stream.batch(step).domains]
    assert kd == domains.count("odd")


def test_held_out_sequences_are_never_trained_on(masked_world, tmp_path, monkeypatch):
    seen = []
    step = module.take_step

    def noting(training, ready, *rest):
        seen.extend(ready.batch.index.tolist())
        return step(training, ready, *rest)

    monkeypatch.setattr(module, "take_step", noting)
    run(masked_world, tmp_path / "run", train_config(steps=30))
    cache = masked_world.open()
    split = split_corpus(cache, 0.1)
    assert len(seen) == 180 > len(split.train)
    train = split.train.spread(len(split.train)).tolist()
    assert set(seen) == set(train)
    assert not set(seen) & set(split.held_out.spread(len(split.held_out)).tolist())
    assert sorted(seen[: len(train)]) == train


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


def test_split_batch_is_what_the_loop_accumulates_over(masked_world, tmp_path, monkeypatch):
    sizes = []

    def noting(batch, size):
        parts = split_batch(batch, size)
        sizes.append([len(p.index) for p in parts])
        return parts

    monkeypatch.setattr(ready, "split_batch", noting)
    run(masked_world, tmp_path / "run", train_config(steps=2, micro_batch_sequences=4))
    assert sizes == [[4, 2]] * 2
