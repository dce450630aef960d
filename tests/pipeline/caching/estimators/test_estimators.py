"""Every kind of vocabulary target, end to end, against the model itself.

Sampled kinds are also held to their promise of being unbiased, over all positions of a corpus.
"""

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rekindle.data.cache import Cache
from rekindle.data.example import TokenTargets
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from testlib.estimators import (
    CODECS,
    CODED,
    DRAWS,
    FAMILY,
    SAMPLES,
    TARGETS,
    TASKS,
    TAUS,
    K,
    World,
    about,
    in_world,
    log_softmax,
    logits_once,
    stated_precision,
    targets_of,
    teachers_of,
    theta_of,
    whole_batch,
)
from testlib.models import AUTO
from testlib.run_alone import NOISE, model_of


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_kept_is_recorded(world, codec):
    size = world.open().teachers["dense"].vocabulary_size
    expected = {
        "topk": ("topk", K, [0.5, 1.0, 2.0, 4.0], "biased"),
        "threshold": ("threshold", K, [1.0], "unbiased"),
        "threshold-2": ("threshold", K, [2.0], "unbiased"),
        "whole": ("threshold", size, [1.0], "exact"),
        "every": ("topk", size, [1.0], "exact"),
        "random": ("random", DRAWS, [1.0], "unbiased"),
        "random-2": ("random", DRAWS, [2.0], "unbiased"),
        "dense": ("dense", None, [], "exact"),
        "hidden": ("hidden", None, [], "exact"),
    }
    for name in TARGETS if codec == "default" else CODED:
        found = about(world.folders[codec], name)
        kind, k, temperatures, bias = expected[name]
        assert (found["kind"], found["k"]) == (kind, k), name
        assert found["temperatures"] == temperatures, name
        assert found["estimator"]["bias"] == bias, name
        # Hidden states hold the whole distribution, as dense targets do.
        assert found["estimator"]["kind"] == {"hidden": "dense"}.get(kind, kind), name
        assert found["codec"] == (codec if name in CODED else "default")
        assert found["vocabulary_size"] == size
        assert found["hidden_size"] == (32 if kind == "hidden" else None)
        assert found["seed"] == 0
        info = world.open(codec).teachers[name].info
        assert info.temperatures == tuple(temperatures)
        assert info.estimator == found["estimator"]


def test_the_seed_of_samples_is_recorded_and_no_other(tmp_path, configure, make_model, wordpiece):
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    teachers = teachers_of(model, "causal_lm", ["topk", "dense", "threshold", "random"])
    corpus = {"limit_sequences": 3}
    cache_teachers(configure(tmp_path, teachers, corpus=corpus, cache={"seed": 7}))
    seeds = {t["name"]: about(tmp_path, t["name"])["seed"] for t in teachers}
    assert seeds == {"topk": 0, "dense": 0, "threshold": 7, "random": 7}


def test_every_cache_is_sound(world):
    for folder in world.folders.values():
        report = verify_cache(str(folder))
        assert report.problems == []
        assert set(report.coverage.values()) == {1.0}


# --- what is decoded is what the model says -------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["topk", "every"])
def test_topk_in_every_codec(world, name, codec):
    for target, logits in in_world(world, name, codec):
        exact = log_softmax(logits)
        kept = np.take_along_axis(exact, target.ids, axis=1)
        outside = exact.copy()
        np.put_along_axis(outside, target.ids, -np.inf, axis=1)
        assert (kept.min(axis=1) >= outside.max(axis=1) - NOISE).all()
        assert (np.diff(kept, axis=1) < NOISE).all()
        relative = kept - kept[:, :1]
        error = np.where(relative > -31.9, np.abs(target.log_probs - kept), 0)
        assert (error <= stated_precision(codec, relative, 1.0) + NOISE).all()
        for tau, log_tail in target.log_tail.items():
            tempered = log_softmax(logits / tau)
            inside = np.take_along_axis(tempered, target.ids, axis=1)
            np.put_along_axis(tempered, target.ids, -np.inf, axis=1)
            if name == "every":
                assert (log_tail == -np.inf).all()
                continue
            tail = np.logaddexp.reduce(tempered, axis=1)
            seen = tail - np.logaddexp.reduce(inside, axis=1) > -31.9
            assert np.abs(log_tail - tail)[seen].max() <= 1 / 2048 + NOISE / tau
            assert (log_tail[~seen] < -31.9).all()


@pytest.mark.parametrize("codec", CODECS)
def test_topk_at_every_temperature_in_every_codec(world, codec):
    target = whole_batch(world.open(codec), "topk")
    exact = np.concatenate(
        [logits for found, logits in in_world(world, "topk", codec) if not found.replica]
    )
    for tau in TAUS:
        ids, log_probs, log_tail = target.decode(tau)
        tempered = np.take_along_axis(log_softmax(exact / tau), ids, axis=1)
        here = np.take_along_axis(exact, ids, axis=1)
        relative = here - here[:, :1]
        error = np.where(relative > -31.9, np.abs(log_probs - tempered), 0)
        assert (error <= stated_precision(codec, relative, tau) + NOISE / tau).all()
        total = np.logaddexp(log_tail, np.logaddexp.reduce(log_probs, axis=1))
        assert np.abs(total).max() < 1e-5


def test_dense_is_the_whole_distribution(world):
    for target, logits in in_world(world, "dense"):
        assert (target.ids == np.arange(logits.shape[1])).all()
        assert np.abs(target.log_probs - log_softmax(logits)).max() <= NOISE
        assert (target.log_tail[1.0] == -np.inf).all()


def test_hidden_states_decode_to_the_models_log_probs(world):
    """A coordinate is off by at most half its row's step, so a logit by ½·step·Σ|W_v|."""
    cache = world.open()
    weight = model_of(world.model, AUTO[world.task]).get_output_embeddings().weight
    reach = np.abs(weight.detach().double().numpy()).sum(axis=1).max()
    worst = []
    for index in range(len(cache)):
        for target in cache.example(index).targets["hidden"]:
            shard, row = (int(x[0]) for x in cache.corpus.locate(np.array([index])))
            lists, first, last = cache.teachers["hidden"].cut((shard, row), target.replica)
            scale = lists.columns["hidden_scale"][first:last].astype(np.float64)
            whole = logits_once(world.model, AUTO[world.task], tuple(map(int, target.input_ids)))
            exact = log_softmax(whole[target.positions])
            error = np.abs(target.log_probs - exact).max(axis=1)
            assert (error <= 2 * 0.5 * scale * reach + NOISE).all()
            worst.append(error.max())
    assert max(worst) < 0.01  # the bound means something: far below the default codec's


@pytest.mark.covering
@pytest.mark.parametrize("name", TARGETS)
def test_scalars_are_the_models_own_whatever_is_kept_beside_them(world, name):
    """At τ = 1, also for samples of another temperature."""
    for target, logits in in_world(world, name):
        exact = log_softmax(logits)
        rows = np.arange(len(exact))
        gold = exact[rows, target.gold_ids]
        assert np.abs(target.gold_log_prob - gold.clip(-63.999)).max() <= 1 / 2048 + NOISE
        entropy = -(np.exp(exact) * exact).sum(axis=1)
        assert np.abs(target.entropy - entropy).max() <= 1 / 2048 + NOISE
        above = (exact > gold[:, None] + NOISE).sum(axis=1)
        near = (exact > gold[:, None] - NOISE).sum(axis=1)
        assert ((above <= target.gold_rank) & (target.gold_rank <= near)).all()


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["threshold", "threshold-2"])
def test_threshold_keeps_what_is_above_theta_and_draws_the_rest_at_theta(world, name, codec):
    tau, exact_kept, drawn_seen = SAMPLES[name], 0, 0
    for target, logits in in_world(world, name, codec):
        probs = np.exp(log_softmax(logits / tau))
        assert target.ids.shape == (len(probs), K)
        assert np.abs(np.logaddexp.reduce(target.log_probs, axis=1)).max() < 1e-5
        assert all((log_tail == -np.inf).all() for log_tail in target.log_tail.values())
        for row, (p, ids) in enumerate(zip(probs, target.ids, strict=True)):
            assert len(set(ids.tolist())) == K
            theta = theta_of(p, K)
            # Noise may move an entry over the threshold; its value is then the same.
            expected = np.log(np.maximum(p[ids], theta))
            bound = stated_precision(codec, (expected - expected.max())[None] * tau, tau)
            error = np.abs(target.log_probs[row] - expected)
            assert error.max() <= bound.max() + 4 * NOISE
            assert np.isin(np.flatnonzero(p > theta * (1 + 4 * NOISE)), ids).all()
            exact_kept += int((p[ids] > theta).sum())
            drawn_seen += int((p[ids] < theta).sum())
    assert exact_kept > 100 or tau == 2  # where hardly any entry stands out
    assert drawn_seen > 100


@pytest.mark.parametrize("name", ["random", "random-2"])
def test_random_counts_are_draws_of_likely_ids(world, name):
    tau = SAMPLES[name]
    for target, logits in in_world(world, name):
        assert target.ids.shape == (len(logits), DRAWS)
        counts = np.exp(target.log_probs.astype(np.float64)) * DRAWS
        assert np.abs(counts - np.rint(counts)).max() < 1e-4
        assert (np.rint(counts).sum(axis=1) == DRAWS).all()
        assert ((target.ids >= 0) == (counts > 0.5)).all()
        assert (np.diff(counts, axis=1) < 1e-4).all()
        assert all((log_tail == -np.inf).all() for log_tail in target.log_tail.values())
        log_probs = log_softmax(logits / tau)
        for ids, p in zip(target.ids, log_probs, strict=True):
            drawn = ids[ids >= 0]
            assert len(set(drawn.tolist())) == len(drawn)
            assert p[drawn].min() > -20  # e^-20 · 20 draws · 10,000 rows


def estimates(target: TokenTargets, size: int) -> np.ndarray:
    """The sample as vectors [P,V]."""
    out = np.zeros((len(target.ids), size + 1))
    np.put_along_axis(out, target.ids, np.exp(target.log_probs.astype(np.float64)), axis=1)
    return out[:, :size]


@pytest.fixture(scope="module", params=TASKS)
def many(request, tmp_path_factory, configure, make_model, wordpiece) -> World:
    """Samples of every position of the whole corpus, in values precise enough to see a bias."""
    task = request.param
    model = make_model(FAMILY[task], AUTO[task], wordpiece, seed=4, initializer_range=0.15)
    folder = tmp_path_factory.mktemp("many")
    teachers = [
        *teachers_of(model, task, ["threshold", "threshold-2"], "precise"),
        *teachers_of(model, task, ["random", "random-2"]),
    ]
    config = configure(
        folder, teachers, corpus={"limit_sequences": 150}, cache={"sequences_per_shard": 150}
    )
    cache_teachers(config)
    return World(task, model, {"default": folder}, config)


@pytest.mark.covering
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_unbiased(many, name):
    """For every token, the sum over all positions of (sample − probability) is a sum of
    independent errors of known variance: systematic sampling takes an entry t < θ at θ with
    probability t/θ, and N draws with replacement have p(1 − p)/N.
    """
    tau, positions = SAMPLES[name], 0
    error: Any = 0.0
    variance: Any = 0.0
    allowed: Any = 0.0
    for target, logits in in_world(many, name):
        p = np.exp(log_softmax(logits / tau))
        error = error + (estimates(target, p.shape[1]) - p).sum(axis=0)
        if name.startswith("random"):
            variance = variance + (p * (1 - p) / DRAWS).sum(axis=0)
            allowed = allowed + (p * 1e-5).sum(axis=0)
        else:
            theta = np.array([theta_of(row, K) for row in p])[:, None]
            variance = variance + np.where(p < theta, p * (theta - p), 0).sum(axis=0)
            allowed = allowed + (p * (1 / (2048 * tau) + 1 / 2048 + NOISE)).sum(axis=0)
        positions += len(p)
    assert positions > 2000
    common = variance > 1e-3  # tokens that are drawn often enough for a normal distribution
    assert common.sum() > 100
    z = (np.abs(error) - allowed).clip(0)[common] / np.sqrt(variance[common])
    assert z.max() < 5  # of some 300 tokens; a bias of 2 % of the mass would be ten times that
    # Independent draws at every position, neither fewer nor correlated. What the codec rounds is
    # taken off above: it is most of the error of tokens that are kept exactly almost everywhere.
    assert (error[common] ** 2 / variance[common]).mean() > 0.7
    assert (z**2).mean() < 1.3
    # A function of many tokens at once: their errors are correlated within a position.
    assert abs(error.sum()) < 1e-3 * positions


def test_seeds_names_and_replicas_draw_independently(tmp_path, configure, make_model, wordpiece):
    model = make_model("bert", AUTO["masked_lm"], wordpiece, seed=4, initializer_range=0.15)
    base = {"model": str(model), "task": "masked_lm", "targets": TARGETS["random"]}
    teachers = [base | {"name": "one"}, base | {"name": "two"}]
    few = {"limit_sequences": 8}
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        cache_teachers(configure(tmp_path / name, teachers, corpus=few, cache={"seed": seed}))
    a, again, b = (Cache.open(tmp_path / name) for name in ("a", "again", "b"))

    def drawn(cache: Cache, name: str) -> list[set[int]]:
        found = [t for i in range(8) for t in cache.example(i).targets[name]]
        return [set(row[row >= 0].tolist()) for target in found for row in target.ids]

    assert drawn(a, "one") == drawn(again, "one")
    assert drawn(a, "one") != drawn(a, "two")
    assert about(tmp_path / "b", "one")["seed"] == 1
    one, two = drawn(a, "one"), drawn(a, "two")
    assert np.mean([x == y for x, y in zip(one, two, strict=True)]) < 0.2
    # Another seed gives other masks as well; what both have is drawn anew.
    assert len(b.example(0).targets["one"]) == 2


def test_k_of_the_whole_vocabulary_is_exact(world):
    for name in ("whole", "every"):
        for target, logits in in_world(world, name, "precise"):
            exact = np.take_along_axis(log_softmax(logits), target.ids, axis=1)
            assert (np.sort(target.ids, axis=1) == np.arange(logits.shape[1])).all()
            near = exact > exact.max(axis=1, keepdims=True) - 31.9
            assert np.abs(target.log_probs - exact)[near].max() <= 2 / 2048 + NOISE


# --- vocabularies that the model pads -------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_padded_rows_of_the_head_are_no_tokens_in_any_kind(tmp_path, configure, padded_model, task):
    model, size = padded_model(task)
    names = ["threshold", "random", "hidden", "whole"]
    teachers = teachers_of(model, task, names, "precise")
    cache_teachers(configure(tmp_path / "cache", teachers, corpus={"limit_sequences": 4}))
    cache = Cache.open(tmp_path / "cache")
    weights = load_file(tmp_path / "cache" / "targets" / "hidden" / "head.safetensors")["weight"]
    assert len(weights) == size
    stolen = []
    for name in names:
        assert cache.teachers[name].vocabulary_size == size
        for target, whole in targets_of(cache, name, model, AUTO[task]):
            assert whole.shape[1] == size + 6
            stolen += np.exp(log_softmax(whole)[:, size:]).sum(axis=1).tolist()
            exact = log_softmax(whole[:, :size])
            assert target.ids.max() < size
            assert np.exp(target.log_probs).sum(axis=1) == pytest.approx(1, abs=1e-4)
            if name == "hidden":
                assert np.abs(target.log_probs - exact).max() < 0.05
            if name == "random":
                likely = np.take_along_axis(exact, target.ids.clip(0), axis=1)
                assert likely[target.ids >= 0].min() > -16
            if name == "whole":
                there = np.take_along_axis(exact, target.ids, axis=1)
                near = there > there.max(axis=1, keepdims=True) - 31.9
                assert np.abs(target.log_probs - there)[near].max() < 2e-3
            if name == "threshold":
                theta = np.array([theta_of(np.exp(row), K) for row in exact])[:, None]
                there = np.take_along_axis(np.exp(exact), target.ids, axis=1)
                expected = np.log(np.maximum(there, theta))
                assert np.abs(target.log_probs - expected).max() < 4e-3
    assert np.median(stolen) > 0.9
