"""What the loss is given of every kind of target and codec: against the cache's own decoding, in
float64; and a short training run on each.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.kernels import blocks
from rekindle.kernels.encoded import EncodedTargets
from rekindle.kernels.hidden import DenseTargets, HiddenTargets
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.kernels.targets import DecodedTargets
from rekindle.pipeline.checks.inspect import _token_table, inspect_example
from rekindle.train.config import ObjectiveConfig, StudentConfig, TrainConfig
from rekindle.train.device_batch import kd_targets, sparse_targets, split_batch
from rekindle.train.evaluate import EvaluationData, evaluate
from rekindle.train.loop import train_student
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.ready import BatchPreparer
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import build_student
from testlib.models import NARROW
from testlib.objective.ahead import Noted, Sends

CPU = torch.device("cpu")
K = 8
TAUS = [1.0, 2.0, 4.0]
KINDS = {
    **{
        f"{kind}-{codec}": {"kind": kind, "k": K, "codec": codec}
        | ({"temperatures": TAUS} if kind == "topk" else {})
        for kind, codec in itertools.product(
            ["topk", "threshold"], ["default", "precise", "compact"]
        )
    },
    "threshold-2": {"kind": "threshold", "k": K, "temperatures": [2.0]},
    "random": {"kind": "random", "k": 15},
    "random-2": {"kind": "random", "k": 15, "temperatures": [2.0]},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}
TASKS = {
    "masked_lm": ("bert", "AutoModelForMaskedLM"),
    "causal_lm": ("llama", "AutoModelForCausalLM"),
}
SMALL = NARROW | {"initializer_range": 0.3}


def temperatures_of(name):
    if name in ("dense", "hidden"):
        return [1.0, 3.0]
    return KINDS[name].get("temperatures", [1.0])


def prefixes_of(name):
    if name.startswith(("threshold", "random")):
        return [None]
    return [None, K, 3, 1]


CASES = [
    (name, tau, k) for name in KINDS for tau in temperatures_of(name) for k in prefixes_of(name)
]


@pytest.fixture(scope="module", params=TASKS)
def world(request, tmp_path_factory, wordpiece, make_model, make_cache):
    """(cache, task, student directory): one teacher of each kind, all of one model."""
    family, auto = TASKS[request.param]
    model = make_model(family, auto, wordpiece, 1, **SMALL)
    student = make_model(family, auto, wordpiece, 2, **SMALL)
    path = tmp_path_factory.mktemp("estimators") / "cache"
    teacher = {"model": str(model), "task": request.param}
    teachers = [teacher | {"name": n, "targets": targets} for n, targets in KINDS.items()]
    corpus = {"domain_field": None, "limit_sequences": 30}
    make_cache(path, teachers, corpus, {"sequences_per_shard": 16, "mask": {}})
    return path, request.param, student


@pytest.fixture(scope="module")
def cache(world):
    return Cache.open(world[0])


def gathered(cache, names, index=None, epoch=0):
    view = cache.teachers[names[0]].info.view
    masked = view if view.startswith("masked-") else None
    index = np.arange(len(cache)) if index is None else index
    return cache.gather(index, names, epoch=epoch, masked_view=masked)


def logits_for(target, seed=0, size=None):
    size = size or target.info.vocabulary_size
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(len(target.rows), size, generator=draw, dtype=torch.float64) * 3


def divergence(q, tail_q, p, tail_p, kind):
    """Σ over outcomes, the tail being one of them, with 0·log 0 = 0."""
    q, p = torch.cat([q, tail_q[:, None]], 1), torch.cat([p, tail_p[:, None]], 1)

    def kl(a, b):
        both = a > 0
        ratio = torch.where(both, a, 1.0) / torch.where(both, b, 1.0)
        return torch.where(both, a * ratio.log(), 0.0).sum(1)

    if kind == "forward_kl":
        return kl(q, p)
    if kind == "reverse_kl":
        return kl(p, q)
    if kind == "tvd":
        return (q - p).abs().sum(1) / 2
    if kind == "skew_kl":
        return kl(q, 0.1 * q + 0.9 * p)
    return (kl(q, (p + q) / 2) + kl(p, (p + q) / 2)) / 2


def reference(logits, target, tau, k, kind="forward_kl", tail="bucket"):
    """The loss [N] in float64, from ``decode``."""
    ids, log_probs, log_tail = target.decode(tau, k)
    there = torch.from_numpy(ids >= 0)
    ids = torch.from_numpy(np.maximum(ids, 0))
    q = torch.from_numpy(np.exp(log_probs.astype(np.float64))) * there
    tail_q = torch.from_numpy(np.exp(log_tail.astype(np.float64)))
    p = torch.softmax(logits / tau, 1)
    kept = p.gather(1, ids) * there
    outside = p.scatter(1, ids, p.gather(1, ids) * ~there)
    tail_p = outside.sum(1)
    if tail == "renormalise":
        q = q / q.sum(1, keepdim=True)  # its fixed point is q/Σq on the ids and 0 elsewhere
    if tail == "none":
        q_log_q = torch.where(q > 0, q * torch.where(q > 0, q, 1.0).log(), 0.0)
        return (q_log_q - torch.where(q > 0, q * torch.where(q > 0, kept, 1.0).log(), 0.0)).sum(1)
    zero = torch.zeros_like(tail_q)
    both = (zero, zero) if tail == "renormalise" else (tail_q, tail_p)
    return divergence(q, both[0], kept, both[1], kind)


def check_loss(target, tau, k, rtol=2e-5, **choice):
    """Value and gradient of the loss, given the targets as training gives them."""
    mine = logits_for(target).requires_grad_()
    found = kd_loss(
        mine,
        kd_targets(target, tau, k, CPU),
        temperature=tau,
        impl="torch",
        reduction="none",
        **choice,
    ).loss
    theirs = logits_for(target).requires_grad_()
    kind = choice.get("divergence", "forward_kl")
    expected = tau**2 * reference(theirs, target, tau, k, kind, choice.get("tail", "bucket"))
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=2e-5 * max(1, tau**2))
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=5e-6)
    assert mine.grad.abs().max() > 1e-2
    # Only the target's own mass pulls at its ids: a row's gradient sums to zero.
    assert mine.grad.sum(1).abs().max() < 1e-5


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize(("name", "tau", "k"), CASES)
def test_loss_and_gradient_are_those_of_the_decoded_targets(cache, name, tau, k):
    target = gathered(cache, [name]).targets[name]
    assert len(target.rows) > 40
    check_loss(target, tau, k)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "tvd", "skew_kl"])
@pytest.mark.parametrize("name", ["topk-precise", "topk-compact", "dense", "hidden"])
def test_other_divergences(cache, name, kind):
    target = gathered(cache, [name]).targets[name]
    check_loss(target, 1.0, 5, rtol=1e-4, divergence=kind)


@pytest.mark.parametrize("tail", ["renormalise", "none"])
@pytest.mark.parametrize(
    "name", ["topk-precise", "topk-compact", "threshold-precise", "threshold-compact", "random"]
)
def test_other_tails(cache, name, tail):
    target = gathered(cache, [name]).targets[name]
    logits = logits_for(target)
    found = kd_loss(
        logits,
        kd_targets(target, 1.0, None, CPU),
        tail=tail,
        impl="torch",
        reduction="none",
    )
    expected = reference(logits, target, 1.0, None, tail=tail)
    torch.testing.assert_close(found.loss.double(), expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_fused_loss_takes_every_kind(cache, name):
    """As the objective calls it: hidden states and a matrix instead of logits."""
    tau = temperatures_of(name)[-1]
    target = gathered(cache, [name]).targets[name]
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(target.rows), 12, generator=draw)
    weight = torch.randn(target.info.vocabulary_size, 12, generator=draw)
    found = linear_kd_loss(
        hidden,
        weight,
        kd_targets(target, tau, None, CPU),
        temperature=tau,
        reduction="none",
    )
    expected = reference(hidden.double() @ weight.double().T, target, tau, None)
    torch.testing.assert_close(found.kd.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_targets_on_the_device_are_those_of_the_cache(cache, name):
    target = gathered(cache, [name], epoch=1).targets[name]
    for tau, k in itertools.product(temperatures_of(name), prefixes_of(name)):
        ids, log_probs, log_tail = target.decode(tau, k)
        found = sparse_targets(target, tau, k, CPU)
        width = found.ids.shape[1]  # of random samples: the widest row's
        assert (ids[:, width:] == -1).all()
        if name in ("dense", "hidden") and k is not None:
            # Equal probabilities may change places.
            np.testing.assert_allclose(found.probs, np.exp(log_probs), rtol=2e-4, atol=1e-7)
        else:
            assert np.array_equal(found.ids, ids[:, :width])
            expected = np.exp(log_probs[:, :width])
            np.testing.assert_allclose(found.probs, expected, rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(found.tail, np.exp(log_tail), rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(found.probs.sum(1) + found.tail, 1, atol=1e-5)


def test_which_targets_are_sent_as_they_are_stored(cache):
    """Eight-bit codes are decoded in the kernel, hidden states meet the matrix there; the others
    are values by then.
    """
    names = list(KINDS)
    batch = gathered(cache, names)
    for name in names:
        found = kd_targets(batch.targets[name], temperatures_of(name)[0], None, CPU)
        encoded = name.endswith(("default", "compact")) or name == "threshold-2"
        assert isinstance(found, EncodedTargets) == encoded, name
        assert isinstance(found, HiddenTargets) == (name == "hidden")
        assert isinstance(found, DenseTargets) == (name == "dense")
        as_stored = encoded or name in ("hidden", "dense")
        assert isinstance(found, DecodedTargets) != as_stored


def test_hidden_states_are_sent_as_integers_beside_one_matrix(cache):
    """No logits are made of them, and the matrix goes to the device once."""
    target = gathered(cache, ["hidden"]).targets["hidden"]
    one, other = (
        kd_targets(gathered(cache, ["hidden"], np.arange(n)).targets["hidden"], 1.0, None, CPU)
        for n in (30, 3)
    )
    assert one.states.dtype == torch.int16
    assert np.array_equal(one.states, target.columns["hidden"])
    assert np.array_equal(one.scale, target.columns["hidden_scale"])
    assert one.weight is other.weight
    assert np.array_equal(one.weight, target.head.weight)
    whole = kd_targets(target, 1.0, target.info.vocabulary_size, CPU)
    assert isinstance(whole, HiddenTargets)  # all of it is no part of it


@pytest.mark.covering
@pytest.mark.parametrize("name", ["dense", "hidden"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl"])
def test_the_whole_distribution_under_every_divergence(cache, name, kind):
    """Not their top 5, but every probability, at temperatures that nothing was stored for."""
    target = gathered(cache, [name]).targets[name]
    for tau in (0.7, 1.0, 2.5):
        check_loss(target, tau, None, rtol=1e-4, divergence=kind)


@pytest.mark.parametrize("name", ["dense", "hidden"])
def test_the_top_of_hidden_states_is_found_in_blocks_of_any_size(cache, name, monkeypatch):
    target = gathered(cache, [name]).targets[name]
    whole = sparse_targets(target, 2.0, 5, CPU)
    for rows in (1, 3):
        budget = rows * 12 * target.info.vocabulary_size
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", budget)
        parts = sparse_targets(target, 2.0, 5, CPU)
        torch.testing.assert_close(parts.probs, whole.probs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts.tail, whole.tail, rtol=1e-4, atol=1e-6)
        assert parts.ids.shape == whole.ids.shape


def test_compact_and_default_train_alike_to_the_bit(cache):
    """Of one name and seed; here of one deterministic kind."""
    batch = gathered(cache, ["topk-default", "topk-compact"])
    for tau in TAUS:
        one, other = (sparse_targets(t, tau, None, CPU) for t in batch.targets.values())
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_without_positions(cache):
    """The teachers of a step may have nothing to say of its sequences."""
    for name in KINDS:
        whole = gathered(cache, [name], np.arange(3)).targets[name]
        nothing = replace(
            whole,
            rows=whole.rows[:0],
            positions=whole.positions[:0],
            columns={key: values[:0] for key, values in whole.columns.items()},
        )
        found = sparse_targets(nothing, temperatures_of(name)[0], None, CPU)
        assert len(found.ids) == len(found.probs) == len(found.tail) == 0


# --- micro-batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1, 7])
def test_micro_batches_have_the_targets_of_their_rows(cache, name, size):
    batch = gathered(cache, [name])
    tau = temperatures_of(name)[0]
    whole = sparse_targets(batch.targets[name], tau, None, CPU)
    parts = [
        sparse_targets(part.targets[name], tau, None, CPU) for part in split_batch(batch, size)
    ]
    at = 0
    for part in parts:
        here = slice(at, at + len(part.ids))
        width = part.ids.shape[1]
        assert torch.equal(part.ids, whole.ids[here, :width])
        torch.testing.assert_close(part.probs, whole.probs[here, :width], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(part.tail, whole.tail[here], rtol=1e-4, atol=1e-6)
        at = here.stop
    assert at == len(whole.ids)


# --- what an objective may ask for ----------------------------------------------------------------


def objective(cache, task, **term):
    config = parse_settings(ObjectiveConfig, {"distill": [term]})
    teachers = {name: reader.info for name, reader in cache.teachers.items()}
    return Objective(config, teachers, task, steps=10)


@pytest.mark.parametrize(
    ("name", "tau"),
    [
        ("threshold-default", 2.0),
        ("threshold-2", 1.0),
        ("random", 2.0),
        ("random-2", 1.0),
        ("topk-precise", 3.0),
    ],
)
def test_a_temperature_that_is_not_stored_is_refused(world, cache, name, tau):
    with pytest.raises(InputError, match=rf"distill\.0: teacher '{name}' stores .*not {tau}"):
        objective(cache, world[1], teachers=[name], temperature=tau)
    target = gathered(cache, [name]).targets[name]
    for act in (target.decode, lambda t: kd_targets(target, t, None, CPU)):
        with pytest.raises(InputError, match=f"not {tau}"):
            act(tau)


@pytest.mark.parametrize("name", [n for n in KINDS if n.startswith(("threshold", "random"))])
def test_a_part_of_a_sample_is_refused(world, cache, name):
    tau = temperatures_of(name)[0]
    with pytest.raises(InputError, match=r"distill\.0: .*keeps a sample of \d+.*biased"):
        objective(cache, world[1], teachers=[name], temperature=tau, k=3)
    target = gathered(cache, [name]).targets[name]
    for act in (
        lambda: target.decode(tau, 3),
        lambda: kd_targets(target, tau, 3, CPU),
        lambda: sparse_targets(target, tau, 3, CPU),
    ):
        with pytest.raises(InputError, match="a part of it would be biased"):
            act()
    # The whole sample is no part of it.
    whole = target.info.k
    assert objective(cache, world[1], teachers=[name], temperature=tau, k=whole)
    sparse_targets(target, tau, whole, CPU)
    target.decode(tau, whole)


@pytest.mark.parametrize("name", ["dense", "hidden"])
def test_whole_distributions_serve_any_temperature_and_k(world, cache, name):
    for tau, k in itertools.product((0.3, 1.0, 7.7), (None, 1, 50)):
        assert objective(cache, world[1], teachers=[name], temperature=tau, k=k)
        check_loss(gathered(cache, [name], np.arange(4)).targets[name], tau, k, rtol=1e-4)


def test_more_candidates_than_are_kept_are_refused(world, cache):
    with pytest.raises(InputError, match=r"teacher 'topk-precise' keeps 8 candidates; k = 9"):
        objective(cache, world[1], teachers=["topk-precise"], k=9)
    target = gathered(cache, ["topk-precise"]).targets["topk-precise"]
    with pytest.raises(InputError, match="keeps 8 candidates; k = 9 is not cached"):
        kd_targets(target, 1.0, 9, CPU)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.8"):
        target.decode(1.0, 9)


@pytest.mark.parametrize("name", KINDS)
def test_targets_of_every_kind_are_sent_ahead(world, cache, name, monkeypatch):
    """As they are stored, once; the step itself sends nothing, and its loss stays what it is."""
    task, size = world[1], cache.corpus.info["tokenizer"]["size"]
    student = build_student(StudentConfig(model=str(world[2]), task=task), {}, size, 0).eval()
    found = objective(cache, task, teachers=[name], temperature=temperatures_of(name)[-1])
    batch, plan = gathered(cache, [name]), found.plan(0)
    counts = found.counts(found.select_targets(batch, plan), plan)
    copies, expected = Noted(), found.loss(student, batch, counts, plan, CPU)
    (part,) = BatchPreparer(found, None, copies)(0, batch).parts
    sends = Sends(monkeypatch)
    assert torch.equal(found.loss(student, part, counts, plan, CPU).total, expected.total)
    assert not sends.late
    assert not sends.unused(copies)


def test_a_mixture_of_all_kinds_is_their_mean(world, cache):
    """Of one model: dense and hidden alike, a sample and the top beside them."""
    task, names = world[1], ["dense", "hidden", "random", "topk-precise"]
    size = cache.corpus.info["tokenizer"]["size"]
    student = build_student(StudentConfig(model=str(world[2]), task=task), {}, size, 0).eval()
    batch = gathered(cache, names)

    def total(**term):
        found = objective(cache, task, **term)
        plan = found.plan(0)
        own = found.select_targets(batch, plan)
        return found.loss(student, own, found.counts(own, plan), plan, CPU).total

    parts = [["dense", "hidden", "random"], ["dense", "hidden", "topk-precise"]]
    assert all(torch.isfinite(total(teachers=some, combine="mixture")) for some in parts)
    one = total(teachers=["dense", "hidden"], combine="mixture")
    other = total(teachers=["dense"])
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# --- held-out values of samples -------------------------------------------------------------------


def held_out(cache, world, *names):
    config = StudentConfig(model=str(world[2]), task=world[1])
    student = build_student(config, {}, cache.corpus.info["tokenizer"]["size"], 0)
    view = cache.teachers[names[0]].info.view
    masked = view if view.startswith("masked-") else None
    return evaluate(student, EvaluationData(cache, np.arange(len(cache)), names, masked, 8), CPU)


def test_the_held_out_kl_of_a_sample_is_an_estimate_of_that_to_the_teacher(world, cache):
    found = held_out(cache, world, "dense", "random", "threshold-precise", "random-2")
    assert found["kl/random"] == pytest.approx(found["kl/dense"], abs=0.2)
    assert found["kl/threshold-precise"] == pytest.approx(found["kl/dense"], abs=0.2)
    # Of another temperature the teacher's entropy is not stored: larger by a constant.
    assert found["kl/random-2"] > found["kl/dense"] + 0.5


def test_agreement_is_over_the_positions_where_a_sample_tells_the_likeliest_id(world, cache):
    found = held_out(cache, world, "dense", "random", "threshold-precise")
    assert "agreement/random" not in found
    with pytest.raises(InputError, match=r"keep_best is 'agreement/random'; this run measures"):
        train(world, Path("unused"), "random", keep_best="agreement/random")
    batch = gathered(cache, ["dense", "threshold-precise"])
    exact = batch.targets["dense"].columns["log_probs"]
    ids, values, _ = batch.targets["threshold-precise"].decode()
    sure = np.exp(values).max(axis=1) > 1.001 / K
    assert 0 < sure.sum() < len(sure)
    assert (ids[np.arange(len(ids)), values.argmax(axis=1)] == exact.argmax(axis=1))[sure].all()
    assert found["agreement/threshold-precise"] * sure.sum() == pytest.approx(
        round(found["agreement/threshold-precise"] * sure.sum()), abs=1e-6
    )


@pytest.mark.parametrize("name", ["random-2", "threshold-2"])
def test_a_sample_of_another_temperature_is_shown(world, name):
    assert "sampled predictions" in inspect_example(str(world[0]), 0, name)


def test_draws_that_all_fell_on_one_id_are_shown(world, cache):
    """The others' places are padding."""
    (target, *_) = cache.example(0).targets["random"]
    ids, log_probs = np.full_like(target.ids, -1), np.full_like(target.log_probs, -np.inf)
    ids[:, 0], log_probs[:, 0] = 7, 0.0
    one = replace(target, ids=ids, log_probs=log_probs)
    shown = _token_table(cache.teacher("random").info, one, cache.corpus.tokenizer)
    (column,) = (column for column in shown.columns if column.title == "sampled predictions")
    assert all(cell.endswith(" 1.000") and "0.000" not in cell for cell in column.cells)


# --- training -------------------------------------------------------------------------------------


def train(world, out, *names, resume=False, **values):
    path, task, student = world
    terms = [
        {"teachers": [name], "temperature": temperatures_of(name)[-1], "weight": 0.5}
        for name in names
    ]
    quick = {
        "steps": 4,
        "batch_sequences": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "checkpoint_every": 4,
        "evaluate_every": 4,
        "evaluate_sequences": 4,
        "held_out": 0.2,
        "objective": {"distill": terms},
    }
    config = parse_settings(TrainConfig, quick | values)
    return train_student(
        Cache.open(path), StudentConfig(model=str(student), task=task), config, out, resume=resume
    )


def test_a_run_that_an_older_version_began_is_measured_as_it_was(world, tmp_path):
    """By the sample itself, and everywhere; `loss` is the cross-entropy. It is all that the last
    evaluation is made of.
    """
    run = tmp_path / "run"
    now = train(world, run, "random").evaluation
    record = json.loads((run / "run.json").read_text())
    assert record["cache"].pop("measured") == {"random": 2}
    assert record.pop("evaluation") == {"measure": 3}
    (run / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "version"}))
    for _ in range(2):  # the first leaves a record of this version
        (run / "summary.json").unlink()
        then = train(world, run, "random", resume=True).evaluation
        assert then["kl/random"] > now["kl/random"] + 0.1
        assert 0 <= then["agreement/random"] <= 1
        assert then["loss"] == now["ce"] != now["loss"]
        assert "ce" not in then


def check_trained(result, run, names):
    """That every step learnt from each of the ``names``, and each was measured at the end."""
    assert result.steps == 4
    assert result.coverage["sequences_with_kd"] > 0
    assert result.coverage["sequences_ce_only"] == result.coverage["sequences_neither"] == 0
    for name in names:
        steps = [r for r in read_metrics(run) if f"kd/{name}" in r]
        assert len(steps) == 4
        assert all(np.isfinite(r[f"kd/{name}"]) and r[f"kd/{name}"] > 0 for r in steps)
        assert np.isfinite(result.evaluation[f"kl/{name}"])
        if not name.startswith(("random", "threshold")):
            assert 0 <= result.evaluation[f"agreement/{name}"] <= 1


def test_a_student_trains_on_every_kind(world, tmp_path):
    """On all at once; below, on one of each way to keep a distribution alone."""
    check_trained(train(world, tmp_path / "run", *KINDS), tmp_path / "run", KINDS)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["topk-compact", "random", "hidden"])
def test_micro_batches_train_as_the_whole_batch_does(world, tmp_path, name):
    still = {"learning_rate": 1e-9}  # dropout draws otherwise in other batches; compare step one
    one = train(world, tmp_path / "whole", name, **still)
    check_trained(one, tmp_path / "whole", [name])
    other = train(world, tmp_path / "parts", name, micro_batch_sequences=2, **still)
    assert one.coverage == other.coverage
    first, second = (
        next(r for r in read_metrics(tmp_path / folder) if f"kd/{name}" in r)
        for folder in ("whole", "parts")
    )
    # The mean is over the step, not over the micro-batches; dropout moves it a little.
    assert second[f"kd/{name}"] == pytest.approx(first[f"kd/{name}"], rel=0.5)
