"""Self-evolution: lessons of what a model says of text that it sees unmasked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rekindle.data.cache import Cache
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching import compute_unit
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig, load_config
from rekindle.pipeline.train_student import student_view, train_from_config
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.evaluate import EvaluationData, evaluate
from rekindle.train.loop import train_student
from rekindle.train.record.run_log import read_metrics
from testlib.models import STILL
from testlib.run_alone import NOISE
from testlib.self_evolution import (
    CPU,
    HARD,
    STEP,
    Step,
    content_of,
    examples,
    log_probs_of,
    losses_of,
    masked_rows,
    with_mask,
    with_student,
)
from testlib.students import same_gradients


@pytest.fixture(scope="module")
def whole(tmp_path_factory, evolve) -> tuple[Cache, RunConfig]:
    """Every probability of the reference is kept: k = V."""
    config = evolve(tmp_path_factory.mktemp("whole") / "cache", targets={"kind": "dense"})
    cache_teachers(config)
    return Cache.open(config.cache.path), config


@pytest.mark.parametrize("micro", [99, 5, 1])
def test_the_loss_is_token_specific_smoothing(whole, student, model, micro):
    """0.9·CE + 0.1·KL, whose gradient is that of the cross-entropy with the smoothed target."""
    cache, _ = whole
    step, index = Step(cache, student), np.arange(1, 11)
    loss, terms, gradients = step.run(index, micro=micro)
    step.student.zero_grad(set_to_none=True)
    smoothed, ce, kl, rows = torch.zeros(()), 0.0, 0.0, 0
    for number, logits, labels, positions in step.masked_logits(index):
        reference = log_probs_of(model, cache.example(number).input_ids)[positions]
        own = torch.log_softmax(logits.double(), -1)
        one_hot = F.one_hot(labels, own.shape[1]).double()
        smoothed = smoothed - ((0.9 * one_hot + 0.1 * reference.exp()) * own).sum()
        ce += float(F.nll_loss(own.detach(), labels, reduction="sum"))
        kl += float((reference.exp() * (reference - own.detach())).sum())
        rows += len(labels)
    assert rows > 50
    (smoothed / rows).backward()
    same_gradients(gradients, step.gradients(), 5e-5, 1e-4)
    assert terms["ce"] == pytest.approx(ce / rows, rel=1e-5)
    assert terms["kd/reference"] == pytest.approx(kl / rows, rel=1e-4)
    assert loss == pytest.approx(0.9 * ce / rows + 0.1 * kl / rows, rel=1e-5)


def test_top_k_with_its_tail_is_the_loss_of_a_sparse_reference(made, student):
    cache, _ = made
    step, index = Step(cache, student), np.arange(12)
    loss, terms, _ = step.run(index)
    ce, kl, rows = 0.0, 0.0, 0
    for number, logits, labels, positions in step.masked_logits(index):
        (target,) = cache.example(number).targets["reference"]
        place = np.searchsorted(target.positions, positions)
        own = torch.log_softmax(logits.double(), -1).detach()
        q = torch.tensor(np.exp(target.log_probs[place].astype(np.float64)))
        tail = torch.tensor(np.exp(target.log_tail[1.0][place].astype(np.float64)))
        q = q / q.sum(1, keepdim=True) * (1 - tail)[:, None]
        p = own.gather(1, torch.tensor(target.ids[place]))
        rest = 1 - p.exp().sum(1)
        kl += float((q * (q.log() - p)).sum() + (tail * (tail.log() - rest.log())).sum())
        ce += float(F.nll_loss(own, labels, reduction="sum"))
        rows += len(labels)
    assert terms["kd/reference"] == pytest.approx(kl / rows, rel=1e-3)
    assert loss == pytest.approx(0.9 * ce / rows + 0.1 * kl / rows, rel=1e-3)


def test_clean_targets_teach_under_random_masks_too(tmp_path, configure, model, student):
    """Only where something is masked: elsewhere the student has no loss."""
    reference = {"name": "reference", "model": str(model), "task": "masked_lm", "view": "clean"}
    config = configure(tmp_path, [reference | {"targets": {"kind": "dense"}}])
    config = parse_settings(
        RunConfig, config.model_dump(mode="json") | {"student": {"model": str(student)}}
    )
    cache_teachers(config)
    cache = Cache.open(tmp_path)
    assert cache.masked_view().replicas == 2
    objective = {"hard": {"weight": 0}, "distill": [{"teachers": ["reference"]}]}
    step, index = Step(cache, student, objective), np.arange(12)
    loss, _, _ = step.run(index)
    kl, rows = 0.0, 0
    for number, logits, _, positions in step.masked_logits(index):
        reference = log_probs_of(model, cache.example(number).input_ids)[positions]
        own = torch.log_softmax(logits.double(), -1).detach()
        kl, rows = kl + float((reference.exp() * (reference - own)).sum()), rows + len(positions)
    assert loss == pytest.approx(kl / rows, rel=1e-4)


@pytest.fixture(scope="module")
def two(tmp_path_factory, configure, model, make_model, wordpiece) -> tuple[Cache, RunConfig]:
    """Two references that see the text as it is, and random masks."""
    other = make_model("bert", "AutoModelForMaskedLM", wordpiece, 6, initializer_range=0.3)
    shared = {"task": "masked_lm", "view": "clean", "targets": {"kind": "dense"}}
    config = configure(
        tmp_path_factory.mktemp("two") / "cache",
        [
            {"name": "one", "model": str(model), **shared},
            {"name": "two", "model": str(other), **shared},
        ],
        cache={"mask": {"policy": "random", "probability": 0.3}},
    )
    values = config.model_dump(mode="json") | {"student": {"model": str(model)}}
    config = parse_settings(RunConfig, values)
    cache_teachers(config)
    return Cache.open(config.cache.path), config


COMBINED = [
    {"combine": "mixture"},
    {"combine": "route"},
    {"positions": "masked"},
    {"entropy_fraction": 0.5},
    {"divergence": "reverse_kl"},
]


@pytest.mark.parametrize("settings", COMBINED, ids=str)
def test_clean_references_combine_as_others_do(two, student, settings):
    cache, config = two
    objective = {"hard": {"weight": 0}, "distill": [{"teachers": ["one", "two"], **settings}]}
    step, index = Step(cache, student, objective), np.arange(12)
    loss, _, _ = step.run(index)
    sums, rows = [0.0, 0.0], 0
    for number, logits, _, positions in step.masked_logits(index):
        ids = cache.example(number).input_ids
        q = [log_probs_of(Path(t.model), ids)[positions].exp() for t in config.teachers]
        q = [(q[0] + q[1]) / 2] if settings.get("combine") == "mixture" else q
        q = q[:1] if settings.get("combine") == "route" else q
        log_p = torch.log_softmax(logits.detach().double(), -1)
        kept = torch.arange(len(positions))
        if "entropy_fraction" in settings:
            entropy = -(log_p.exp() * log_p).sum(1)
            kept = entropy.argsort(descending=True)[: -(-len(positions) // 2)]
        for place, one in enumerate(q):
            reverse = settings.get("divergence") == "reverse_kl"
            d = log_p.exp() * (log_p - one.log()) if reverse else one * (one.log() - log_p)
            sums[place] += float(d.sum(1)[kept].sum())
        rows += len(kept)
    assert loss == pytest.approx(sum(sums) / rows, rel=1e-4)


def test_an_evaluation_compares_at_the_masked_positions(two, student):
    cache, _ = two
    step, index = Step(cache, student, {}), np.arange(3, 12)
    name = cache.masked_view().name
    data = EvaluationData(cache, index, ("one", "two"), name, batch_sequences=4)
    found = evaluate(step.student, data, CPU)
    sums, agree, rows = 0.0, 0, 0
    for number, logits, _, positions in step.masked_logits(index):
        (target,) = cache.example(number).targets["one"]
        q = torch.tensor(target.log_probs[np.searchsorted(target.positions, positions)]).double()
        log_p = torch.log_softmax(logits.detach().double(), -1)
        sums += float((q.exp() * (q - log_p)).sum())
        agree += int((q.argmax(1) == log_p.argmax(1)).sum())
        rows += len(positions)
    assert found["kl/one"] == pytest.approx(sums / rows, rel=1e-4)
    assert found["agreement/one"] == pytest.approx(agree / rows)


@pytest.fixture(scope="module")
def rarely(tmp_path_factory, evolve) -> tuple[Cache, RunConfig]:
    """Few tokens are hard, and in half of the sequences none."""
    path = tmp_path_factory.mktemp("rarely") / "cache"
    cache_teachers(evolve(path))
    hardest = [hard.losses.max() for hard in Cache.open(path).hard_positions("reference")]
    config = evolve(path, {"loss_above": float(np.median(hardest))})
    cache_teachers(config)
    return Cache.open(path), config


def test_a_sequence_without_a_hard_token_weighs_nothing(rarely, student):
    cache, config = rarely
    view = student_view(cache, with_student(config))
    counts = np.array([len(positions) for positions, _ in masked_rows(cache, view)])
    without, some = np.flatnonzero(counts == 0), np.flatnonzero(counts)
    assert min(len(without), len(some)) >= 2
    step, every = Step(cache, student), np.concatenate([without, some])
    alone, both = step.run(some, view), step.run(every, view, micro=1)
    assert both[0] == pytest.approx(alone[0], rel=1e-5)
    same_gradients(both[2], alone[2], 5e-5, 1e-4)
    loss, terms, gradients = step.run(without, view)
    assert loss == 0
    assert all(value == 0 for value in terms.values())
    assert all(not g.any() for g in gradients.values())


def test_a_whole_run_survives_steps_without_a_hard_token(rarely, tmp_path):
    config = with_student(
        rarely[1], batch_sequences=1, steps=8, evaluate_every=4, checkpoint_every=4
    )
    train_from_config(config, tmp_path / "run")
    covered = json.loads((tmp_path / "run" / "summary.json").read_text())["coverage"]
    assert covered["positions_ce_only"] == covered["positions_neither"] == 0
    assert covered["sequences_ce_only"] > 0
    assert covered["sequences_with_kd"] + covered["sequences_ce_only"] == 8


def test_a_run_counts_what_it_taught_and_says_what_was_seen(made, tmp_path):
    cache, config = made
    config = with_student(config, evaluate_every=2)
    train_from_config(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    covered = summary["coverage"]
    assert covered["positions_with_kd"] > 0
    assert covered["positions_ce_only"] == covered["positions_neither"] == 0
    made_by = json.loads((tmp_path / "run" / "run.json").read_text())["cache"]
    assert made_by["masked_view"] == cache.masked_view().name
    assert made_by["teacher_views"] == {"reference": "clean"}
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "kl/reference" in metrics


def test_other_masks_are_another_run(made, tmp_path):
    _, config = made
    first = with_student(config)
    cache_teachers(with_mask(first, loss_above=2.0))
    train_from_config(first, tmp_path / "run")
    with pytest.raises(CheckpointError, match="masked_view"):
        train_from_config(with_mask(first, loss_above=2.0), tmp_path / "run", resume=True)


def test_masks_that_were_not_made_are_named(made):
    _, config = made
    with pytest.raises(InputError, match="pipeline cache-teachers"):
        student_view(Cache.open(config.cache.path), with_student(with_mask(config, limit=0.123)))


def test_a_run_teaches_the_next_generation(made, tmp_path, evolve):
    """The reference may be an earlier student: its directory is a model like any other."""
    _, config = made
    train_from_config(with_student(config), tmp_path / "run")
    second = evolve(tmp_path / "second", model=str(tmp_path / "run"), corpus={"limit_sequences": 4})
    cache_teachers(second)
    cache = Cache.open(tmp_path / "second")
    for example in (cache.example(index) for index in range(4)):
        (target,) = example.targets["reference"]
        losses = losses_of(tmp_path / "run", example.input_ids)[target.positions]
        assert np.abs(-target.gold_log_prob - losses).max() <= STEP / 2 + NOISE


# --- the recipe -----------------------------------------------------------------------------------


def test_the_recipe_masks_and_teaches_as_published(tmp_path, corpus_file, wordpiece, model):
    recipe = Path(compute_unit.__file__).parents[1] / "recipes" / "self-evolution.yaml"
    small = [f"corpus.source=[{corpus_file}]", f"corpus.tokenizer={wordpiece}"]
    small += [f"teachers.reference.model={model}", f"student.model={model}"]
    small += [f"cache.path={tmp_path / 'cache'}", "corpus.limit_sequences=40"]
    small += ["train.steps=3", "train.batch_sequences=4", "train.warmup_steps=1"]
    config = load_config(recipe, [*small, "cache.mask.limit=null"])
    assert (config.cache.mask.loss_above, config.teachers[0].view) == (HARD, "clean")
    hard, (distill,) = config.train.objective.hard, config.train.objective.distill
    assert (hard.weight, distill.weight, distill.temperature) == (0.9, 0.1, 1.0)
    cache_teachers(config)
    cache = Cache.open(tmp_path / "cache")
    for example, (positions, _) in zip(
        examples(tmp_path / "cache"), masked_rows(cache), strict=True
    ):
        content = content_of(example.input_ids)
        losses = losses_of(model, example.input_ids)[content]
        unclear = int((np.abs(losses - HARD) <= STEP / 2 + NOISE).sum())
        assert abs(len(positions) - int((losses > HARD).sum())) <= unclear
    train_from_config(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["coverage"]["positions_with_kd"] > 0
    assert summary["coverage"]["positions_ce_only"] == 0


# --- with other methods ---------------------------------------------------------------------------


def test_hard_masks_and_clean_targets_serve_other_methods(tmp_path, evolve, model):
    """Routing, the least certain positions, a curriculum by the clean teacher's losses, and
    replacements by a teacher that was shown the hard masks: in one run, in micro-batches as whole.
    """
    masked_lm = {"model": str(model), "task": "masked_lm", "targets": {"k": 12}}
    teachers = [masked_lm | {"name": "again", "view": "clean"}, masked_lm | {"name": "masked"}]
    config = evolve(tmp_path / "cache", {"limit": 0.3}, teachers)
    cache_teachers(config)
    quiet = shutil.copytree(model, tmp_path / "without-dropout")
    about = json.loads((quiet / "config.json").read_text())
    dropout = STILL
    (quiet / "config.json").write_text(json.dumps(about | dropout))
    student = StudentConfig(model=str(quiet), task="replaced_token_detection")
    cache = Cache.open(config.cache.path)
    view = student_view(cache, config.model_copy(update={"student": student}))
    term = {"teachers": ["reference", "again"], "combine": "route", "entropy_fraction": 0.5}
    values = {
        **{"steps": 4, "batch_sequences": 4, "warmup_steps": 1, "held_out": 0.2},
        **{"evaluate_every": 2, "checkpoint_every": 4},
        "curriculum": {"teacher": "reference", "score": "hard_share", "until": 0.5},
        "objective": {
            "hard": {"weight": 0.9},
            "distill": [term | {"weight": 0.1}],
            "methods": [{"method": "replaced_tokens", "teacher": "masked"}],
        },
    }
    losses = []
    for size in (None, 1):
        train = parse_settings(TrainConfig, values | {"micro_batch_sequences": size})
        out = tmp_path / f"run-{size}"
        result = train_student(cache, student, train, out, masked_view=view)
        assert {"kl/reference", "kl/again", "replaced_tokens/f1"} <= result.evaluation.keys()
        steps = [r for r in read_metrics(out) if r["kind"] == "train"]
        losses.append([(r["kd/reference+again"], r["replaced_tokens/loss"]) for r in steps])
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-3)
