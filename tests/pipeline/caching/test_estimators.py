"""Every kind of vocabulary target and every codec, end to end, against the model itself.

The reference is transformers' own ``model(**inputs).logits`` of one sequence at a time and float64
arithmetic; none of our helpers takes part in it. Sampled kinds are also held to their promise of
being unbiased, over all positions of a corpus.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from rekindle.data.batch import TokenTargetBatch
from rekindle.data.cache import Cache
from rekindle.data.errors import CacheError, InputError
from rekindle.data.example import TokenTargets
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.data.targets.head import StoredHead, write_head
from rekindle.pipeline.caching import cache_teachers as stage_one
from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.verify import verify_cache

NOISE = 2e-4  # float32 noise between a padded batch and a sequence alone, in nats
TAUS = (0.5, 1.0, 2.0, 4.0)
K = 12
DRAWS = 20
CODECS = ["default", "precise", "compact"]
TASKS = ["masked_lm", "causal_lm"]
AUTO = {"masked_lm": "AutoModelForMaskedLM", "causal_lm": "AutoModelForCausalLM"}
FAMILY = {"masked_lm": "bert", "causal_lm": "llama"}

# What each kind of target is asked for as; those with a codec are cached with each of the three.
TARGETS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": K, "temperatures": list(TAUS)},
    "threshold": {"kind": "threshold", "k": K},
    "threshold-2": {"kind": "threshold", "k": K, "temperatures": [2.0]},
    "whole": {"kind": "threshold", "k": 100_000},
    "every": {"kind": "topk", "k": 100_000, "temperatures": [1.0]},
    "random": {"kind": "random", "k": DRAWS},
    "random-2": {"kind": "random", "k": DRAWS, "temperatures": [2.0]},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}
CODED = ["topk", "threshold", "threshold-2", "whole", "every"]
SAMPLES = {"threshold": 1.0, "threshold-2": 2.0, "random": 1.0, "random-2": 2.0}


class World(NamedTuple):
    """One teacher model's targets of every kind, a cache for each codec."""

    task: str
    model: Path
    folders: dict[str, Path]  # by codec
    config: Any

    def open(self, codec: str = "default") -> Cache:
        return Cache.open(self.folders[codec])


def teachers_of(model: Path, task: str, names: list[str], codec: str = "default") -> list[dict]:
    chosen = {name: TARGETS[name] | ({"codec": codec} if name in CODED else {}) for name in names}
    base = {"model": str(model), "task": task}
    return [base | {"name": name, "targets": targets} for name, targets in chosen.items()]


@pytest.fixture(scope="module", params=TASKS)
def world(request, tmp_path_factory, configure, make_model, wordpiece) -> World:
    task = request.param
    model = make_model(FAMILY[task], AUTO[task], wordpiece, seed=3, initializer_range=0.3)
    folder = tmp_path_factory.mktemp(task)
    corpus, cache = {"limit_sequences": 24}, {"sequences_per_shard": 10}
    configs = {
        codec: configure(
            folder / codec,
            teachers_of(model, task, list(TARGETS) if codec == "default" else CODED, codec),
            corpus=corpus,
            cache=cache,
        )
        for codec in CODECS
    }
    for config in configs.values():
        cache_teachers(config)
    folders = {codec: folder / codec for codec in CODECS}
    return World(task, model, folders, configs["default"])


@functools.cache
def model_of(directory: Path, auto: str) -> Any:
    found = getattr(transformers, auto).from_pretrained(str(directory), dtype=torch.float32)
    return found.eval()


@functools.cache
@torch.no_grad()
def _logits(directory: Path, auto: str, ids: tuple[int, ...]) -> np.ndarray:
    return model_of(directory, auto)(input_ids=torch.tensor([ids])).logits[0].double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def targets_of(
    cache: Cache, name: str, directory: Path, auto: str, size: int | None = None
) -> Iterator[tuple[TokenTargets, np.ndarray]]:
    """Every cached target of a teacher, and the model's own logits [P,V] at its positions."""
    for index in range(len(cache)):
        for target in cache.example(index).targets[name]:
            whole = _logits(directory, auto, tuple(map(int, target.input_ids)))
            yield target, whole[target.positions][:, :size]


def in_world(world: World, name: str, codec: str = "default") -> Iterator[Any]:
    return targets_of(world.open(codec), name, world.model, AUTO[world.task])


def stated_precision(codec: str, relative: np.ndarray, tau: float) -> np.ndarray:
    """What the codec promises [P,1] for candidates ``relative`` [P,K] below the best, at τ."""
    if codec == "precise":
        return np.full((len(relative), 1), 1 / (2048 * tau) + 1 / 2048)
    span = np.minimum(-relative.min(axis=1, keepdims=True), 32)
    return 2 * (span / 510 + 1 / 1024) / tau + 1 / 2048


def whole_batch(cache: Cache, name: str, replica: int = 0) -> TokenTargetBatch:
    view = cache.teachers[name].info.view
    masked = view if view.startswith("masked-") else None
    found = cache.gather(np.arange(len(cache)), [name], epoch=replica, masked_view=masked)
    return found.targets[name]


def theta_of(probs: np.ndarray, k: int) -> float:
    """θ with Σ min(1, t/θ) = k by its definition: the largest m with t_m ≥ rest/(k − m)."""
    ordered = np.sort(probs)[::-1]
    rest = ordered.sum() - np.concatenate([[0.0], np.cumsum(ordered)])
    kept = 0
    while kept < k - 1 and ordered[kept] * (k - kept) >= rest[kept]:
        kept += 1
    return float(rest[kept] / (k - kept))


# --- what is recorded -----------------------------------------------------------------------------


def about(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "targets" / name / "teacher.json").read_text())


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
            part, columns = cache.teachers["hidden"].position_rows(shard, [row], target.replica)[0]
            scale = columns["hidden_scale"][part].astype(np.float64)
            whole = _logits(world.model, AUTO[world.task], tuple(map(int, target.input_ids)))
            exact = log_softmax(whole[target.positions])
            error = np.abs(target.log_probs - exact).max(axis=1)
            assert (error <= 2 * 0.5 * scale * reach + NOISE).all()
            worst.append(error.max())
    assert max(worst) < 0.01  # the bound means something: far below the default codec's


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


# --- codecs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODED)
def test_compact_decodes_to_the_default_columns(world, name):
    default, compact = (world.open(codec).teachers[name] for codec in ("default", "compact"))
    corpus, seen = world.open().corpus, 0
    for shard, commit in enumerate(corpus.commits):
        for replica in range(default.replicas) if default.masked else [None]:
            rows = range(commit.rows)
            pairs = zip(
                default.position_rows(shard, rows, replica),
                compact.position_rows(shard, rows, replica),
                strict=True,
            )
            for (one, columns), (other, same) in pairs:
                assert columns.keys() == same.keys()
                for column, values in columns.items():
                    assert values.dtype == same[column].dtype
                    assert np.array_equal(values[one], same[column][other]), column
                seen += one.stop - one.start
    assert seen == default.positions == compact.positions


@pytest.mark.parametrize("name", CODED)
def test_all_codecs_keep_the_same_ids(world, name):
    """The same draws, too: they depend on the teacher's name and seed, not on how values lie."""
    tau = TARGETS[name].get("temperatures", [1.0])[0]
    ids = [whole_batch(world.open(codec), name).decode(tau)[0] for codec in CODECS]
    assert np.array_equal(ids[0], ids[1])
    assert np.array_equal(ids[0], ids[2])


def stored_bytes(folder: Path, name: str) -> int:
    return sum(p.stat().st_size for p in (folder / "targets" / name / "data").iterdir())


@pytest.mark.parametrize("task", TASKS)
def test_compact_is_smaller_than_default_and_default_than_precise(
    tmp_path, configure, make_model, wordpiece, task
):
    model = make_model(FAMILY[task], AUTO[task], wordpiece, seed=4, initializer_range=0.15)
    sizes = {}
    for codec in CODECS:
        teachers = [
            {
                "name": kind,
                "model": str(model),
                "task": task,
                "targets": {"kind": kind, "k": 100, "codec": codec},
            }
            for kind in ("topk", "threshold")
        ]
        long = {"sequence_length": 64, "limit_sequences": 64}
        config = configure(
            tmp_path / codec, teachers, corpus=long, cache={"sequences_per_shard": 64}
        )
        cache_teachers(config)
        sizes[codec] = {t["name"]: stored_bytes(tmp_path / codec, t["name"]) for t in teachers}
    for kind in ("topk", "threshold"):
        assert sizes["compact"][kind] < sizes["default"][kind] < sizes["precise"][kind]
        per_value = sizes["precise"][kind] - sizes["default"][kind]
        positions = Cache.open(tmp_path / "default").teachers[kind].positions
        # A byte more per value, two less per position for the smallest log-probability.
        assert 0.95 * 98 * positions < per_value < 1.1 * 98 * positions


# --- the same whatever the batch, and after a resume ----------------------------------------------


def shards(path: Path) -> dict[str, bytes]:
    """The bytes of every committed shard of targets."""
    store = open_store(path)
    found = {}
    for name in store.folders("targets"):
        for unit, commit in ShardSet(store, f"targets/{name}").committed().items():
            found[f"{name}/{unit}"] = (path / "targets" / name / commit.path).read_bytes()
    return found


@pytest.fixture(scope="module")
def lookup(tmp_path_factory, wordpiece) -> Path:
    """A Llama that looks its answer up by the current token: a product with one term in each sum
    rounds alike in every batch, so that what is left to differ is ours.
    """
    from rekindle.data.corpus.tokenizer import load_tokenizer

    path = tmp_path_factory.mktemp("lookup")
    loaded = load_tokenizer(str(wordpiece))
    width = 4 * -(-loaded.size // 4)
    config = transformers.LlamaConfig(
        vocab_size=loaded.size,
        hidden_size=width,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=loaded.pad_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(width)[: loaded.size])
        model.lm_head.weight.normal_(std=0.15)
    model.save_pretrained(path)
    loaded.save(str(path))
    return path


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_bytes_with_any_batch_and_after_a_resume(
    tmp_path, configure, lookup, codec, monkeypatch
):
    names = list(TARGETS) if codec == "default" else CODED
    teachers = teachers_of(lookup, "causal_lm", names, codec)
    found = {}
    for tokens in (1, 60, 4096):
        given = [teacher | {"batch_tokens": tokens} for teacher in teachers]
        config = configure(tmp_path / str(tokens), given)
        if tokens == 60:
            original, calls = stage_one.run_unit, []

            def failing(*arguments: Any, _run: Any = original, _calls: list = calls, **options):
                _calls.append(arguments)
                if len(_calls) % 4 == 2:
                    raise KeyboardInterrupt
                return _run(*arguments, **options)

            with monkeypatch.context() as patch:
                patch.setattr(stage_one, "run_unit", failing)
                interrupted = 0
                while True:
                    try:
                        cache_teachers(config)
                    except KeyboardInterrupt:
                        interrupted += 1
                        continue
                    break
            assert interrupted >= 5
        else:
            cache_teachers(config)
        found[tokens] = shards(tmp_path / str(tokens))
    assert len(found[1]) == 3 * len(names)
    assert found[1] == found[60] == found[4096]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_batchs_rounding_hardly_moves_a_draw(tmp_path, configure, make_model, wordpiece, name):
    """Of a real model: its logits differ by float32 noise from batch to batch."""
    model = make_model("bert", AUTO["masked_lm"], wordpiece, seed=4, initializer_range=0.15)
    caches = []
    for tokens in (24, 4096):
        given = [t | {"batch_tokens": tokens} for t in teachers_of(model, "masked_lm", [name])]
        cache_teachers(configure(tmp_path / str(tokens), given))
        caches.append(whole_batch(Cache.open(tmp_path / str(tokens)), name))
    one, other = (np.sort(c.decode(SAMPLES[name])[0], axis=1) for c in caches)
    assert len(one) > 80
    assert (one != other).any(axis=1).mean() <= 0.02


# --- the output matrix ----------------------------------------------------------------------------


def test_the_output_matrix_is_stored_once(world):
    folder = world.folders["default"]
    assert list(folder.rglob("head*.safetensors")) == [
        folder / "targets" / "hidden" / "head.safetensors"
    ]
    stored = load_file(folder / "targets" / "hidden" / "head.safetensors")
    module = model_of(world.model, AUTO[world.task]).get_output_embeddings()
    assert np.array_equal(stored["weight"], module.weight.detach().numpy())
    if module.bias is not None:
        assert np.array_equal(stored["bias"], module.bias.detach().numpy())
    else:
        assert set(stored) == {"weight"}
    # Per position two bytes a value, not four a token.
    cache = world.open()
    assert cache.teachers["hidden"].bytes < cache.teachers["dense"].bytes / 4


def test_the_output_matrix_is_not_written_again(tmp_path, configure, make_model, wordpiece):
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    config = configure(tmp_path, teachers_of(model, "causal_lm", ["hidden"]))
    cache_teachers(config)
    files = [tmp_path / "targets" / "hidden" / n for n in ("head.safetensors", "head.json")]
    before = [(f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes()) for f in files]
    assert cache_teachers(config) == StageOne(12, 0, 3)
    assert [(f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes()) for f in files] == before


@pytest.mark.parametrize("damage", ["gone", "flipped", "record gone"])
def test_an_output_matrix_that_is_lost_is_made_again(
    tmp_path, configure, make_model, wordpiece, damage
):
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    config = configure(tmp_path, teachers_of(model, "causal_lm", ["hidden"]))
    cache_teachers(config)
    file = tmp_path / "targets" / "hidden" / "head.safetensors"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    else:
        file.with_name("head.json").unlink()
    assert cache_teachers(config).units_done == 0
    assert file.read_bytes() == whole
    assert verify_cache(str(tmp_path)).problems == []
    assert Cache.open(tmp_path).example(0).targets["hidden"][0].log_probs.shape[1] > 100


@pytest.mark.parametrize("cut", ["tokens", "width"])
def test_an_output_matrix_of_another_shape_is_refused(
    tmp_path, configure, make_model, wordpiece, cut
):
    """Whole and sealed, but not this teacher's: an error of the cache, not of an array."""
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    cache_teachers(configure(tmp_path, teachers_of(model, "causal_lm", ["hidden"])))
    folder = "targets/hidden"
    head = Cache.open(tmp_path).teachers["hidden"].head
    for name in ("head.safetensors", "head.json"):
        (tmp_path / folder / name).unlink()
    weight = head.weight[:-1] if cut == "tokens" else head.weight[:, :-1]
    write_head(open_store(tmp_path), folder, StoredHead(weight, None))
    with pytest.raises(CacheError):
        Cache.open(tmp_path).example(0)


def test_a_new_hidden_teacher_never_makes_the_cache_unreadable(
    tmp_path, configure, make_model, wordpiece, monkeypatch
):
    """Whenever its matrix is written: what was there is readable before its first unit is."""
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    cache_teachers(configure(tmp_path, teachers_of(model, "causal_lm", ["topk"])))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    teachers = teachers_of(model, "causal_lm", ["topk", "hidden"])
    with monkeypatch.context() as patch:
        patch.setattr(stage_one, "run_unit", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(configure(tmp_path, teachers))
    assert len(Cache.open(tmp_path).example(0).targets["topk"]) == 1


def test_states_never_meet_another_models_matrix(
    tmp_path, configure, make_model, wordpiece, monkeypatch
):
    """A run that ended before its first unit leaves the name free, but not its matrix behind."""
    first = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    second = make_model("llama", AUTO["causal_lm"], wordpiece, seed=8, initializer_range=0.3)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage_one, "run_unit", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(configure(tmp_path, teachers_of(first, "causal_lm", ["hidden"])))
    cache_teachers(configure(tmp_path, teachers_of(second, "causal_lm", ["hidden"])))
    for target, logits in targets_of(Cache.open(tmp_path), "hidden", second, AUTO["causal_lm"]):
        assert np.abs(target.log_probs - log_softmax(logits)).max() < 0.05


# --- vocabularies that the model pads -------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_padded_rows_of_the_head_are_no_tokens_in_any_kind(
    tmp_path, configure, make_model, wordpiece, task
):
    """Vocabulary + 6 rows, which hold nearly all of the model's own mass."""
    loaded = transformers.AutoTokenizer.from_pretrained(str(wordpiece))
    size, auto = len(loaded), AUTO[task]
    extra = {} if task == "masked_lm" else {"tie_word_embeddings": False}
    padded = make_model(FAMILY[task], auto, wordpiece, seed=5, vocab_size=size + 6, **extra)
    model = getattr(transformers, auto).from_pretrained(str(padded))
    with torch.no_grad():
        if task == "masked_lm":
            model.cls.predictions.bias[size:] = 40.0
        else:
            model.lm_head.weight[size:] = 50 * model.lm_head.weight[:6]
    model.save_pretrained(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "model")
    names = ["threshold", "random", "hidden", "whole"]
    teachers = teachers_of(tmp_path / "model", task, names, "precise")
    cache_teachers(configure(tmp_path / "cache", teachers, corpus={"limit_sequences": 4}))
    cache = Cache.open(tmp_path / "cache")
    weights = load_file(tmp_path / "cache" / "targets" / "hidden" / "head.safetensors")["weight"]
    assert len(weights) == size
    stolen = []
    for name in names:
        assert cache.teachers[name].vocabulary_size == size
        for target, whole in targets_of(cache, name, tmp_path / "model", auto):
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


# --- the audit ------------------------------------------------------------------------------------


def test_the_audit_agrees_with_every_kind(world):
    found = audit_cache(str(world.folders["default"]), world.config, 24)
    assert found.keys() == TARGETS.keys()
    for name, values in found.items():
        assert values["rows"] > 100
        if name in SAMPLES or name == "whole":
            assert values["total_variation"] <= 0.02, name
            continue
        assert abs(values["kl"]) < 5e-3, name
        assert values["top1"] > 0.99, name
    assert found["random"]["total_variation"] < 1e-3
    assert found["random-2"]["total_variation"] < 1e-3
    assert found["dense"]["kl"] < 1e-6
    assert found["hidden"]["kl"] < 1e-4
    for name in ("dense", "every"):
        assert found[name]["kept_mass"] == pytest.approx(1, abs=1e-5)
    assert 0.2 < found["topk"]["kept_mass"] < 1


@pytest.mark.parametrize("codec", ["precise", "compact"])
def test_the_audit_agrees_with_every_codec(world, configure, codec):
    teachers = teachers_of(world.model, world.task, CODED, codec)
    config = configure(
        world.folders[codec],
        teachers,
        corpus={"limit_sequences": 24},
        cache={"sequences_per_shard": 10},
    )
    found = audit_cache(str(world.folders[codec]), config, 10)
    bound = {"precise": 1e-5, "compact": 5e-3}[codec]
    for name in ("topk", "every"):
        assert abs(found[name]["kl"]) < bound
    variation = {"precise": 2e-3, "compact": 0.02}[codec]
    for name in ("threshold", "threshold-2", "whole"):
        assert found[name]["total_variation"] <= variation, name


# --- what cannot be asked for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            {"kind": "threshold", "temperatures": [1.0, 2.0]},
            "teachers.0.targets: threshold targets are a sample of the distribution at one "
            "temperature; list one",
        ),
        (
            {"kind": "random", "temperatures": []},
            "teachers.0.targets: random targets are a sample of the distribution at one "
            "temperature; list one",
        ),
        (
            {"kind": "random", "k": 256},
            "teachers.0.targets: random targets are of at most 255 draws, not 256",
        ),
        (
            {"kind": "dense", "codec": "compact"},
            "teachers.0.targets: codec compact is for topk and threshold, not dense",
        ),
        (
            {"kind": "random", "codec": "precise"},
            "teachers.0.targets: codec precise is for topk and threshold, not random",
        ),
        (
            {"kind": "hidden", "codec": "precise"},
            "teachers.0.targets: codec precise is for topk and threshold, not hidden",
        ),
    ],
)
def test_targets_that_make_no_sense(tmp_path, configure, targets, message):
    teacher = {"name": "lm", "model": "x", "task": "masked_lm", "targets": targets}
    with pytest.raises(InputError) as caught:
        configure(tmp_path, [teacher])
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", ["topk", "threshold", "random", "hidden"])
@pytest.mark.parametrize("task", ["sequence_classification", "regression", "token_classification"])
def test_kinds_of_vocabulary_targets_are_not_for_task_heads(tmp_path, configure, kind, task):
    teacher = {"name": "t", "model": "x", "task": task, "targets": {"kind": kind}}
    with pytest.raises(InputError) as caught:
        configure(tmp_path, [teacher])
    assert str(caught.value) == (
        f"teachers.0: {kind} targets are for masked_lm and causal_lm; task heads are kept whole"
    )


def test_a_sample_of_one_given_temperature_is_of_that_one(tmp_path, configure):
    def temperatures(**targets: Any) -> tuple[float, ...]:
        teacher = {"name": "lm", "model": "x", "task": "masked_lm", "targets": targets}
        return configure(tmp_path, [teacher]).teachers[0].targets.temperatures

    assert temperatures(kind="threshold") == (1.0,)
    assert temperatures(kind="random", temperatures=[2.0]) == (2.0,)
    assert temperatures(kind="random", k=255) == (1.0,)
    assert temperatures(kind="topk", temperatures=[4.0, 2.0]) == (1.0, 2.0, 4.0)
