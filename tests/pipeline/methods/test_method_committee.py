"""A committee: averaging cached targets is averaging the models, and all that a small k loses is
tail.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import load_config
from rekindle.pipeline.train_student import student_view, train_from_config
from rekindle.train.device_batch import sparse_targets
from rekindle.train.objective.objective import Objective
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student
from testlib.models import NARROW, STILL

TASK, TAU, K, MEMBERS = "masked_lm", 2.0, 64, (1, 2, 3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm(make_model, wordpiece):
    auto = "AutoModelForMaskedLM"
    return lambda seed: str(make_model("bert", auto, wordpiece, seed, **NARROW, **STILL))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, lm, method_run):
    """Three members, each kept whole (k = V) and as its top 64."""
    kept = {"whole": {"kind": "dense"}, "top": {"k": K, "temperatures": [1.0, TAU]}}
    teachers = [
        {"name": f"{kind}-{n}", "model": lm(n), "task": TASK, "targets": targets}
        for n in MEMBERS
        for kind, targets in kept.items()
    ]
    folder = tmp_path_factory.mktemp("committee")
    path = method_run(folder, teachers, {"model": lm(5)}, committee("whole"))
    cache_teachers(load_config(path))
    return path


def committee(kind):
    names = [f"{kind}-{n}" for n in MEMBERS]
    term = {"teachers": names, "combine": "mixture", "temperature": TAU}
    return {"hard": {"weight": 0.0}, "distill": [term]}


@pytest.fixture(scope="module")
def parts(run_file, lm):
    """Cache, batch of all sequences, student, and the members' average at τ [P,V]."""
    config = load_config(run_file)
    cache = Cache.open(config.cache.path)
    size = cache.corpus.info["tokenizer"]["size"]
    names = [f"{kind}-{n}" for kind in ("whole", "top") for n in MEMBERS]
    view = student_view(cache, config)
    batch = cache.gather(np.arange(12), names, epoch=0, masked_view=view)
    student = Student(AutoModelForMaskedLM.from_pretrained(lm(5)), TASK, vocabulary_size=size)
    members = [
        torch.softmax(logits_of(AutoModelForMaskedLM.from_pretrained(lm(n)), batch, size) / TAU, 1)
        for n in MEMBERS
    ]
    return cache, batch, student.eval(), torch.stack(members).mean(0).detach()


def logits_of(model, batch, size):
    """Of the whole model, at the masked positions [P,V]."""
    masked, model = batch.masked, model.eval()
    inputs = {"input_ids": torch.tensor(masked.input_ids).long()}
    inputs["attention_mask"] = torch.tensor(batch.attention_mask).long()
    return model(**inputs).logits[masked.rows, masked.positions, :size]


def gradients(student):
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return found


def cached_loss(run_file, parts, kind):
    """(loss, gradients) of the committee's term on the batch."""
    cache, batch, student, _ = parts
    chosen = load_config(run_file).train.objective.model_validate(committee(kind))
    infos = {f"{kind}-{n}": cache.teacher(f"{kind}-{n}").info for n in MEMBERS}
    objective = Objective(chosen, infos, TASK, 10)
    batch = objective.select_targets(batch, objective.plan(0))
    loss = objective.loss(
        student, batch, objective.counts(batch, objective.plan(0)), objective.plan(0), CPU
    ).total
    loss.backward()
    return float(loss.detach()), gradients(student)


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    scale = max(float(g.abs().max()) for g in expected[1].values())
    for name in found[1].keys() | expected[1].keys():
        zero = torch.zeros(())
        gap = found[1].get(name, zero) - expected[1].get(name, zero)
        assert float(gap.abs().max()) < 1e-4 * scale, name


def test_where_k_is_v_it_is_the_average_of_the_models(run_file, parts):
    """Loss and gradient of KL(mean of softmax(z_j/τ) ‖ p_S(τ)), from all logits of all models."""
    cache, batch, student, q = parts
    size = cache.corpus.info["tokenizer"]["size"]
    log_p = torch.log_softmax(logits_of(student.model, batch, size) / TAU, 1)
    loss = TAU**2 * (q * (q.log() - log_p)).sum(1).mean()
    loss.backward()
    expected = float(loss.detach()), gradients(student)
    found = cached_loss(run_file, parts, "whole")
    assert expected[0] > 0.1
    assert_same(found, expected)


def test_the_training_run_shows_that_loss(run_file, parts, tmp_path):
    train_from_config(load_config(run_file), tmp_path / "s")
    found = read_metrics(tmp_path / "s")[0]["loss"]
    assert found == pytest.approx(cached_loss(run_file, parts, "whole")[0], rel=1e-5)


def kept(parts, n):
    """Of one member: its likeliest ids as a mask [P,V], and its probabilities at τ [P,V].

    By the cache's own account: what a codec rounds is not what k loses.
    """
    cache, batch, _, _ = parts
    found = sparse_targets(batch.targets[f"top-{n}"], TAU, None, CPU)
    size = cache.corpus.info["tokenizer"]["size"]
    probs = torch.zeros(len(found.ids), size).scatter(1, found.ids.long(), found.probs)
    return probs > 0, probs, found.tail


def test_below_it_the_average_loses_nothing_but_tail(parts):
    """On an id that all members keep, it is the models' average; on one that some keep, it lacks at
    most the others' tails, and all that is lacking anywhere is in its tail.
    """
    _, _, _, q = parts
    members = [kept(parts, n) for n in MEMBERS]
    merged = torch.stack([probs for _, probs, _ in members]).mean(0)
    tail = torch.stack([t for _, _, t in members]).mean(0)
    by_all = torch.stack([mask for mask, _, _ in members]).all(0)
    by_some = torch.stack([mask for mask, _, _ in members]).any(0)
    rounding = 0.02 * q + 1e-4
    assert by_all.any()
    assert (by_some & ~by_all).any()
    assert ((merged - q).abs() <= rounding)[by_all].all()
    assert (merged <= q + rounding)[by_some].all()
    missing = (q - merged).sum(1)
    assert missing.numpy() == pytest.approx(tail.numpy(), abs=5e-3)
    assert (tail > 0.01).all()


def test_its_loss_is_that_of_the_average_with_its_tail(run_file, parts):
    """KL over the ids that anyone keeps and one outcome for all others, by hand."""
    cache, batch, student, _ = parts
    size = cache.corpus.info["tokenizer"]["size"]
    members = [kept(parts, n) for n in MEMBERS]
    q = torch.stack([probs for _, probs, _ in members]).mean(0)
    tail = torch.stack([t for _, _, t in members]).mean(0)
    some = q > 0
    p = torch.softmax(logits_of(student.model, batch, size) / TAU, 1)
    rest = (p * ~some).sum(1)
    inside = torch.where(some, q * (q.clamp(min=1e-30).log() - p.log()), 0.0).sum(1)
    loss = TAU**2 * (inside + tail * (tail.log() - rest.log())).mean()
    loss.backward()
    expected = float(loss.detach()), gradients(student)
    assert_same(cached_loss(run_file, parts, "top"), expected)


def test_it_is_no_mean_of_losses(run_file, parts):
    """KL(mean ‖ p) lies below the mean of the KLs: the members' disagreement is no lesson."""
    cache, batch, student, _ = parts
    size = cache.corpus.info["tokenizer"]["size"]
    log_p = torch.log_softmax(logits_of(student.model, batch, size) / TAU, 1).detach()
    each = []
    for n in MEMBERS:
        q = sparse_targets(batch.targets[f"whole-{n}"], TAU, None, CPU).probs
        each.append(float(TAU**2 * (q * (q.log() - log_p)).sum(1).mean()))
    assert cached_loss(run_file, parts, "whole")[0] < 0.95 * np.mean(each)
