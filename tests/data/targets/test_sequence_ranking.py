"""Scores, rankings and hard positions: against plain loops over the decoded examples, and without
a look at the targets.
"""

import shutil
import statistics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheError, CacheFormatError, CacheMismatchError, InputError
from rekindle.data.targets.reading.sequence_ranking import Score, _medians
from testlib.models import NARROW

PER_SHARD = 140  # two record batches
SMALL = NARROW | {"num_hidden_layers": 1}
SCORES = list(Score.__args__)
CAUSAL = ["top", "packed", "exact", "sample", "draws", "dense", "states", "odd"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_teacher, make_cache):
    """Teachers of every kind of vocabulary target; no test writes into it."""
    path = tmp_path_factory.mktemp("selection") / "cache"
    five = {"kind": "topk", "k": 5}
    causal = {
        "top": {"k": 5},
        "packed": {"k": 5, "codec": "compact"},
        "exact": {"k": 5, "codec": "precise"},
        "sample": {"kind": "threshold", "k": 5, "temperatures": [2.0]},
        "draws": {"kind": "random", "k": 5},
        "dense": {"kind": "dense"},
        "states": {"kind": "hidden"},
    }
    teachers = [
        *(make_teacher(name, "causal_lm", 2, SMALL, targets=t) for name, t in causal.items()),
        make_teacher("odd", "causal_lm", 2, SMALL, targets=five, domains=["odd"]),
        make_teacher("masked", "masked_lm", 2, SMALL, targets=five),
        make_teacher("expert", "sequence_classification", 2, SMALL),
    ]
    corpus = {"sequence_length": 12, "limit_sequences": 150}
    mask = {"policy": "random", "probability": 0.1}
    make_cache(path, teachers, corpus, {"sequences_per_shard": PER_SHARD, "mask": mask})
    return path


@pytest.fixture(scope="module")
def cache(made):
    return Cache.open(made)


@pytest.fixture(scope="module")
def targets(cache):
    """Of every teacher and sequence, the decoded targets."""
    decoded = [cache.example(i).targets for i in range(len(cache))]
    return {name: [example[name] for example in decoded] for name in (*CAUSAL, "masked")}


def brute(target, score, predictable=10, threshold=0.1):
    """The definition, position by position; None where nothing counts."""
    losses = [-float(x) for x in target.gold_log_prob]
    values = {
        "median_loss": [
            x for x, r in zip(losses, target.gold_rank, strict=True) if r < predictable
        ],
        "mean_loss": losses,
        "mean_entropy": [float(x) for x in target.entropy],
        "hard_share": [float(x > threshold) for x in losses],
    }[score]
    if not values:
        return None
    return statistics.median(values) if score == "median_loss" else statistics.fmean(values)


def expected_scores(found, score, **settings):
    """Of each sequence: the mean over the replicas in which it has a score."""
    out = []
    for replicas in found:
        each = [brute(target, score, **settings) for target in replicas]
        each = [value for value in each if value is not None]
        out.append(statistics.fmean(each) if each else np.nan)
    return np.array(out)


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", [*CAUSAL, "masked"])
def test_scores_are_those_of_plain_loops(cache, targets, name, score):
    found = cache.scores(name, score)
    assert found.dtype == np.float64
    assert found.shape == (len(cache),) == (150,)
    np.testing.assert_allclose(found, expected_scores(targets[name], score), atol=1e-5)
    assert np.isfinite(found).sum() > 15


def test_the_default_is_salts_median_over_the_ten_likeliest(cache, targets):
    expected = expected_scores(targets["top"], "median_loss", predictable=10)
    np.testing.assert_allclose(cache.scores("top"), expected, atol=1e-5)


@pytest.mark.parametrize("predictable", [0, 1, 3, 100_000])
def test_what_counts_as_predictable_can_be_set(cache, targets, predictable):
    found = cache.scores("top", "median_loss", predictable=predictable)
    expected = expected_scores(targets["top"], "median_loss", predictable=predictable)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if predictable == 0:
        assert np.isnan(found).all()


@pytest.mark.parametrize("threshold", [0.0, 1.0, 5.0, 100.0])
def test_what_counts_as_hard_can_be_set(cache, targets, threshold):
    found = cache.scores("top", "hard_share", threshold=threshold)
    expected = expected_scores(targets["top"], "hard_share", threshold=threshold)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_one_replica_or_the_mean_over_all(cache, targets, score):
    more = {"predictable": 40} if score == "median_loss" else {}
    alone = []
    for replica in (0, 1):
        found = cache.scores("masked", score, replica, **more)
        one = [[example[replica]] for example in targets["masked"]]
        np.testing.assert_allclose(found, expected_scores(one, score, **more), atol=1e-5)
        alone.append(found)
    together = cache.scores("masked", score, **more)
    first, second = alone
    both = np.isfinite(first) & np.isfinite(second)
    assert both.any()
    np.testing.assert_allclose(together[both], (first[both] + second[both]) / 2)
    # A sequence may have a score in one replica alone: it is that one, not half of it.
    single = np.isfinite(first) != np.isfinite(second)
    assert single.any() == (score == "median_loss")
    only = np.where(np.isfinite(first), first, second)
    np.testing.assert_allclose(together[single], only[single])
    assert (np.isnan(together) == (np.isnan(first) & np.isnan(second))).all()


def test_sequences_of_other_domains_have_no_score(cache):
    domains = [cache.example(i).domain for i in range(len(cache))]
    found = np.isfinite(cache.scores("odd", "mean_loss"))
    assert found.tolist() == [domain == "odd" for domain in domains]
    same = cache.scores("top", "mean_loss")
    np.testing.assert_array_equal(cache.scores("odd", "mean_loss")[found], same[found])


def test_a_score_does_not_depend_on_what_is_kept_beside_it(cache):
    for score in SCORES:
        found = [cache.scores(name, score) for name in CAUSAL if name != "odd"]
        for other in found[1:]:
            # Each is rounded to 1/1024 nat, maybe to the other side.
            np.testing.assert_allclose(other, found[0], atol=1 / 1024)


@settings(max_examples=200)
@given(st.lists(st.lists(st.floats(0, 60, width=32), max_size=6), min_size=1, max_size=8))
def test_medians_are_those_of_the_standard_library(rows):
    values = np.array([x for row in rows for x in row], np.float64)
    numbers = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    order = np.random.default_rng(len(values)).permutation(len(values))
    found = _medians(values[order], numbers[order], len(rows))
    expected = [statistics.median(row) if row else np.nan for row in rows]
    np.testing.assert_allclose(found, expected)


# --- rankings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["top", "masked", "odd"])
def test_a_ranking_falls_and_ends_with_what_has_no_score(cache, name, score):
    values, order = cache.scores(name, score), cache.ranking(name, score)
    assert sorted(order.tolist()) == list(range(len(cache)))
    ranked = values[order]
    known = np.isfinite(ranked)
    assert known[: known.sum()].all()
    assert (np.diff(ranked[known]) <= 0).all()
    # Ties, and all that has no score, in corpus order.
    tied = (ranked[1:] == ranked[:-1]) | (np.isnan(ranked[1:]) & np.isnan(ranked[:-1]))
    assert (np.diff(order)[tied] > 0).all()


def test_settings_reach_the_ranking(cache):
    values = cache.scores("top", "hard_share", threshold=3.0)
    order = cache.ranking("top", "hard_share", threshold=3.0)
    assert (np.diff(values[order]) <= 0).all()
    assert len(np.unique(values)) < len(values)  # there are ties
    assert order.tolist() != cache.ranking("top", "hard_share", threshold=1.0).tolist()
    masked = cache.ranking("masked", "mean_loss", 1)
    assert masked.tolist() != cache.ranking("masked", "mean_loss", 0).tolist()


# --- hard positions -------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.1, 2.0, 1000.0])
@pytest.mark.parametrize("name", [*CAUSAL, "masked"])
def test_hard_positions_are_those_of_plain_loops(cache, targets, name, threshold):
    found = list(cache.hard_positions(name, threshold))
    assert [hard.index for hard in found] == list(range(len(cache)))
    total = 0
    for hard, (target, *_) in zip(found, targets[name], strict=True):
        expected = {
            int(position): float(-loss)
            for position, loss in zip(target.positions, target.gold_log_prob, strict=True)
            if -loss > threshold
        }
        assert hard.positions.tolist() == list(expected)
        np.testing.assert_allclose(hard.losses, list(expected.values()), atol=1e-6)
        total += len(expected)
    assert (total > 0) == (threshold < 100)


def test_hard_positions_of_another_replica(cache, targets):
    found = list(cache.hard_positions("masked", 0.1, 1))
    for hard, example in zip(found, targets["masked"], strict=True):
        chosen = example[1].gold_log_prob < -0.1
        assert hard.positions.tolist() == example[1].positions[chosen].tolist()


# --- what cannot be scored ------------------------------------------------------------------------


def test_an_expert_says_nothing_of_tokens(cache):
    for act in (cache.scores, cache.ranking, lambda name: list(cache.hard_positions(name))):
        with pytest.raises(
            InputError, match=r"'expert' \(sequence_classification\) has no scalars"
        ):
            act("expert")


def test_unknown_names(cache):
    with pytest.raises(InputError, match=r"no teacher 'none' \(it has: .*top"):
        cache.scores("none")
    with pytest.raises(InputError, match="no score 'best'; there are median_loss, mean_loss"):
        cache.scores("top", "best")


def test_a_replica_that_is_not_there(cache):
    with pytest.raises(CacheMismatchError, match="has no targets for unit 00000-r002"):
        cache.scores("masked", "mean_loss", 2)


def test_a_teacher_that_is_not_complete(made, tmp_path):
    shutil.copytree(made, tmp_path / "cache")
    (tmp_path / "cache/targets/top/commits/00001.json").unlink()
    cut = Cache.open(tmp_path / "cache")
    for act in (cut.scores, lambda name: list(cut.hard_positions(name))):
        with pytest.raises(CacheMismatchError, match=r"'top' has no targets for unit 00001"):
            act("top")


# --- nothing but the scalars is read --------------------------------------------------------------

KEPT = {
    "top": ["ids", "values", "tail_log_odds", "log_prob_max", "log_prob_min"],
    "exact": ["ids", "values"],
    "sample": ["ids", "values"],
    "draws": ["ids", "counts"],
    "dense": ["log_probs"],
    "states": ["hidden", "hidden_scale"],
}


def overwrite(path, name, unit, number, columns):
    """Garbage of the same length where the values of some columns lie."""
    (file,) = (path / "targets" / name / "data").glob(f"{unit}-????????.arrow")
    with pa.memory_map(str(file)) as mapped:
        whole = mapped.read_buffer()
        batch, places = pa.ipc.open_file(whole).get_batch(number), []
        for column in columns:
            array = batch[column]
            while not pa.types.is_primitive(array.type):
                array = array.values
            values = array.buffers()[1]
            places.append((values.address - whole.address, values.size))
    content = bytearray(file.read_bytes())
    for first, size in places:
        assert size > 0
        content[first : first + size] = bytes(byte ^ 0xA5 for byte in content[first : first + size])
    file.write_bytes(content)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", KEPT)
def test_the_targets_bytes_are_not_read(cache, made, tmp_path, name, number):
    """Overwritten in the first or the second record batch: the scores are right all the same, and
    only whoever wants the targets is told.
    """
    shutil.copytree(made, tmp_path / "cache")
    overwrite(tmp_path / "cache", name, "00000", number, KEPT[name])
    broken = Cache.open(tmp_path / "cache")
    for score in SCORES:
        np.testing.assert_array_equal(broken.scores(name, score), cache.scores(name, score))
    for hard, same in zip(broken.hard_positions(name), cache.hard_positions(name), strict=True):
        assert np.array_equal(hard.positions, same.positions)
    with pytest.raises(CacheFormatError, match="checksum mismatch"):
        broken.gather(np.arange(128, 132) - (0 if number else 128), [name])


@pytest.mark.covering
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("column", ["positions", "gold_log_prob", "gold_rank", "entropy"])
@pytest.mark.parametrize("name", ["top", "dense", "draws"])
def test_scalars_that_were_changed_are_found(made, tmp_path, name, column, number):
    shutil.copytree(made / "targets", tmp_path / "cache" / "targets")
    for folder in ("corpus", "views"):
        shutil.copytree(made / folder, tmp_path / "cache" / folder)
    shutil.copy(made / "cache.json", tmp_path / "cache")
    overwrite(tmp_path / "cache", name, "00000", number, [column])
    with pytest.raises(CacheFormatError, match=f"targets/{name}"):
        Cache.open(tmp_path / "cache").scores(name, "mean_loss")


def test_scalars_of_other_sequences_are_refused(made, tmp_path):
    """Two shards of one teacher, exchanged with their records."""
    shutil.copytree(made, tmp_path / "cache")
    target = tmp_path / "cache/targets"
    for source, goal in (("top", "dense"), ("dense", "top")):
        shutil.rmtree(target / source / "data")
        shutil.rmtree(target / source / "commits")
        shutil.copytree(made / "targets" / goal / "data", target / source / "data")
        shutil.copytree(made / "targets" / goal / "commits", target / source / "commits")
    broken = Cache.open(tmp_path / "cache")
    for name in ("top", "dense"):
        with pytest.raises(CacheError):
            broken.scores(name)
