"""A temperature between stored ones: against the exact value of full logits, in float64."""

import logging

import numpy as np
import pytest
import torch

from rekindle.data.batch import TokenTargetBatch
from rekindle.data.errors import InputError
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.interpolation import expected_error, knots, parabola
from rekindle.data.targets.schema import TeacherInfo
from rekindle.kernels.losses import kd_loss
from rekindle.train.config import DistillTerm
from rekindle.train.device_batch import kd_targets, sparse_targets
from rekindle.train.objective.terms import check_terms
from rekindle.train.to_device import to_device
from testlib.loop import run, train_config
from testlib.students import metrics

CPU = torch.device("cpu")
VOCABULARY = 8000
STORED = (4.0, 1.0, 2.0)  # in any order: extensions are added at the end
BETWEEN = (1.1, 1.3, 1.5, 1.8, 2.5, 3.0, 3.7)
INTERPOLATE = {"temperature_between": "interpolate"}


def language_like():
    """Log-probabilities [P,V] of rows between nearly sure and nearly even, by falling value."""
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2.5, (48, VOCABULARY))
    logits[:16, :40] += draw.exponential(6, (16, 40))  # a few likely words
    logits[16:32] = -draw.uniform(0.8, 1.8, (16, 1)) * np.log(np.arange(1, VOCABULARY + 1))  # Zipf
    logits[32:40, 0] += 20
    logits = -np.sort(-logits, axis=1)
    return logits - np.logaddexp.reduce(logits, axis=1)[:, None]


def exact(log_probs, k, tau):
    """The kept ids' probabilities and the mass outside them, [P,k+1], by all of the vocabulary."""
    tempered = log_probs / tau
    tempered = tempered - np.logaddexp.reduce(tempered, axis=1)[:, None]
    rest = np.logaddexp.reduce(tempered[:, k:], axis=1)
    return np.exp(np.concatenate([tempered[:, :k], rest[:, None]], axis=1))


def stored(log_probs, k, codec="default", temperatures=STORED):
    ids = np.tile(np.arange(k), (len(log_probs), 1))
    masses = [exact(log_probs, k, tau)[:, k] for tau in temperatures]
    odds = np.stack([np.log1p(-mass) - np.log(mass) for mass in masses], axis=1)
    kept = log_probs[:, :k].astype(np.float32)
    columns = CODECS[codec].encode(ids, kept, odds.astype(np.float32), VOCABULARY)
    info = TeacherInfo(
        name="t",
        task="causal_lm",
        kind="topk",
        view="clean",
        vocabulary_size=VOCABULARY,
        k=k,
        temperatures=temperatures,
        codec=codec,
    )
    places = np.arange(len(log_probs))
    return TokenTargetBatch(info, places * 0, places, columns)


def divergence(q, p):
    return (q * (np.log(q) - np.log(p))).sum(axis=1)


@pytest.mark.covering
@pytest.mark.parametrize("codec", ["default", "precise"])
@pytest.mark.parametrize("k", [8, 64])
def test_an_interpolated_target_is_within_its_stated_error(codec, k):
    """As the device and as the cache decode it; the stored mass of a neighbour is much worse."""
    log_probs = language_like()
    batch = stored(log_probs, k, codec).interpolating()
    for tau in BETWEEN:
        ids, kept, log_tail = batch.decode(tau)
        found = sparse_targets(batch, tau, None, CPU)
        assert np.array_equal(found.ids.numpy(), ids)
        read = np.exp(np.concatenate([kept, log_tail[:, None]], axis=1).astype(np.float64))
        on_device = torch.cat([found.probs, found.tail[:, None]], dim=1).double().numpy()
        np.testing.assert_allclose(on_device, read, rtol=2.1 / 1024)
        truth = exact(log_probs, k, tau)
        stated = expected_error(tau, STORED, k)
        assert divergence(truth, on_device).max() < stated
        assert divergence(truth, on_device).mean() < stated / 3
        near = min(STORED, key=lambda one: abs(1 / one - 1 / tau))
        rest = exact(log_probs, k, near)[:, k:]
        guess = np.concatenate([truth[:, :k] * (1 - rest) / (1 - truth[:, k:]), rest], axis=1)
        assert divergence(truth, guess).max() > 4 * divergence(truth, on_device).max()


@pytest.mark.parametrize("k", [8, 32, 64])
def test_rows_that_are_hard_to_interpolate_are_within_the_stated_error(k):
    """Steep ones, and a hundred words before a cliff, at the worst temperature: it is `up to`."""
    draw = np.random.default_rng(5)
    steep, cliff = draw.normal(0, 6, (24, VOCABULARY)), draw.normal(0, 1, (24, VOCABULARY))
    cliff[:, 100:] -= 12
    logits = -np.sort(-np.concatenate([steep, cliff]), axis=1)
    log_probs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    _, kept, log_tail = stored(log_probs, k).interpolating().decode(1.3)
    read = np.exp(np.concatenate([kept, log_tail[:, None]], axis=1).astype(np.float64))
    found = divergence(exact(log_probs, k, 1.3), read).max()
    assert expected_error(1.3, STORED, k) / 20 < found < expected_error(1.3, STORED, k)


def test_a_smaller_k_leaves_the_rest_to_the_tail():
    log_probs = language_like()
    found = sparse_targets(stored(log_probs, 64).interpolating(), 1.5, 8, CPU)
    probs = torch.cat([found.probs, found.tail[:, None]], dim=1).double().numpy()
    assert divergence(exact(log_probs, 8, 1.5), probs).max() < expected_error(1.5, STORED, 64)


def test_a_stored_temperature_is_read_as_it_is_stored():
    batch = stored(language_like(), 8)
    for tau in STORED:
        plain, allowed = (kd_targets(b, tau, None, CPU) for b in (batch, batch.interpolating()))
        assert torch.equal(plain.tail_log_odds, allowed.tail_log_odds)
        assert all(map(np.array_equal, batch.decode(tau), batch.interpolating().decode(tau)))


def test_rows_without_a_tail_have_none_between():
    batch = stored(language_like(), 8).interpolating()
    batch.columns["tail_log_odds"][:5] = 32767
    assert (kd_targets(batch, 3.0, None, CPU).tail_log_odds[:5] == 32767).all()
    assert (batch.decode(3.0)[2][:5] == -np.inf).all()
    assert (batch.decode(3.0)[2][5:] > -np.inf).all()


def test_the_parabola_goes_through_the_nearest_in_1_over_tau():
    """Exact for what is quadratic in 1/τ, whichever three are taken."""
    many = (0.5, 8.0, 1.0, 2.0, 4.0)
    assert [many[slot] for slot in knots(3.0, many)] == [8.0, 2.0, 4.0]
    assert [many[slot] for slot in knots(1.2, many)] == [1.0, 2.0, 4.0]
    for tau in (0.7, 1.2, 3.0, 7.9):
        at = [many[slot] for slot in knots(tau, many)]
        value = sum(w * (3 - 2 / t + 5 / t**2) for w, t in zip(parabola(tau, at), at, strict=True))
        assert value == pytest.approx(3 - 2 / tau + 5 / tau**2)
        assert min(at) < tau < max(at)
    for tau, some in ((0.4, many), (8.1, many), (2.0, many), (1.5, (1.0, 2.0))):
        assert knots(tau, some) == ()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_the_gradient_is_the_derivative(kind):
    """Of the returned loss, in float64; and the loss is that of the exact target, nearly."""
    log_probs = language_like()[::6]
    draw = np.random.default_rng(1)
    logits = torch.from_numpy(log_probs + draw.normal(0, 1.5, log_probs.shape)).requires_grad_()
    options = {"temperature": 3.0, "impl": "torch", "divergence": kind}
    targets = kd_targets(stored(log_probs, 64).interpolating(), 3.0, None, CPU)
    loss = kd_loss(logits, targets, **options).loss
    assert loss.dtype == torch.float64
    loss.backward()
    truth = exact(log_probs, 64, 3.0)
    ids = torch.arange(64).expand(len(log_probs), -1)
    probs, tail = torch.from_numpy(truth[:, :64]), torch.from_numpy(truth[:, 64])
    wanted = kd_loss(logits.detach(), ids, probs, tail_prob=tail, **options).loss
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=0.05)
    for _ in range(4):
        way = torch.from_numpy(draw.normal(0, 1, log_probs.shape))
        step = 1e-5
        ends = [kd_loss(logits.detach() + s * way, targets, **options).loss for s in (step, -step)]
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert float((logits.grad * way).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_a_loop_of_ones_own_asks_for_it(masked_world):
    """The whole batch moved to a device: the tails that our own loop reads, or a refusal."""
    cache = masked_world.open()
    view = cache.masked_view().name
    batch = cache.gather(np.arange(4), ["big", "wide"], masked_view=view)
    with pytest.raises(InputError, match="temperature_between: interpolate"):
        to_device(batch, CPU, temperature=3.0)
    moved = to_device(batch, CPU, temperature=3.0, temperature_between="interpolate")
    for name in ("big", "wide"):
        target = batch.targets[name].interpolating()
        found = moved.targets[name].targets
        assert torch.equal(found.tail_log_odds, kd_targets(target, 3.0, None, CPU).tail_log_odds)
        assert found.temperature == 3.0


def check(term, **about):
    info = stored(language_like()[:2], 8).info.model_copy(update=about)
    check_terms([DistillTerm(teachers=("t",), **term)], {"t": info}, "causal_lm")


@pytest.mark.parametrize(
    ("term", "about", "told"),
    [
        ({"temperature": 3.0}, {}, r"distillation term interpolate it \(temperature_between: int"),
        ({"temperature": 8.0} | INTERPOLATE, {}, "not 8.0: .* below and above it"),
        ({"temperature": 0.9} | INTERPOLATE, {}, "not 0.9: .* below and above it"),
        (
            {"temperature": 1.5} | INTERPOLATE,
            {"temperatures": (1.0, 2.0)},
            "Interpolation needs three or more",
        ),
        (
            {"temperature": 3.0} | INTERPOLATE,
            {"kind": "threshold", "temperatures": (1.0,)},
            "a sample is of one distribution",
        ),
    ],
)
def test_what_is_refused(term, about, told):
    with pytest.raises(InputError, match=told):
        check(term, **about)
    if term["temperature"] == 3.0 and not about:
        check(term | INTERPOLATE)


def test_a_student_trains_between_and_is_told_the_error(masked_world, tmp_path, caplog):
    """One teacher, a mixture, and the held-out loss; without the option the run is refused."""
    terms = [
        {"teachers": ["big", "wide"], "combine": "mixture", "temperature": 3.0},
        {"teachers": ["odd.lm"], "temperature": 1.5, "divergence": "reverse_kl"},
    ]
    objective = {"distill": [term | INTERPOLATE for term in terms]}
    with caplog.at_level(logging.INFO, "rekindle"):
        run(masked_world, tmp_path / "run", train_config(steps=2, objective=objective))
    told = [line for line in caplog.messages if "is interpolated from those stored at" in line]
    assert len(told) == 3
    assert "teacher odd.lm: at temperature 1.5 the mass outside its top 8 is" in told[2]
    assert "errors of up to 0.03 nats of KL (docs/targets.md)" in told[2]
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) > 1
    assert np.isfinite(losses).all()
    with pytest.raises(InputError, match="temperature_between: interpolate"):
        run(masked_world, tmp_path / "no", train_config(steps=2, objective={"distill": terms}))
