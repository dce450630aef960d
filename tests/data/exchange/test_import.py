"""Targets that were made elsewhere become a teacher's: what is read is what was given."""

import shutil

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from testlib.caches import committed, problems
from testlib.elsewhere import (
    PROVENANCE,
    as_prompt_logprobs,
    distributions,
    row_of,
    rows_of,
    with_gold,
)


def assert_like_the_rows(cache, k=4, tolerance=0.02):
    """Ids in order, log-probabilities to the codec's rounding, tails as float64 derives them."""
    for index in range(len(cache)):
        (found,) = cache.example(index).targets["there"]
        whole = distributions(cache, index)
        order = np.argsort(-whole, axis=1)[:, :k]
        top = np.take_along_axis(whole, order, axis=1)
        np.testing.assert_array_equal(found.positions, np.arange(len(whole)))
        np.testing.assert_array_equal(found.ids, order)
        np.testing.assert_allclose(found.log_probs, top, atol=tolerance)
        tail = np.log1p(-np.exp(top).sum(axis=1))
        odds = np.log(np.exp(top).sum(axis=1)) - tail
        np.testing.assert_allclose(
            np.log(-np.expm1(found.log_tail[1.0].astype(float))) - found.log_tail[1.0],
            odds,
            atol=2e-3,
        )


@pytest.mark.parametrize("codec", ["default", "precise"])
def test_what_is_read_is_what_was_given(cache, codec):
    done = cache.import_targets("there", rows_of(cache), PROVENANCE, codec=codec)
    assert (done.rows, done.units_done, done.units_present) == (12, 3, 0)
    assert "derived in float64" in done.as_text()
    again = Cache.open(cache.store.location)
    assert_like_the_rows(again, tolerance=1e-3 if codec == "precise" else 0.02)
    info = again.teachers["there"].info
    assert info.imported.provenance == PROVENANCE
    assert info.estimator == {"kind": "topk", "bias": "biased", "tail": "derived"}
    assert again.teachers["there"].coverage == 1.0
    assert problems(again.store.root) == []
    assert again.manifest["format_version"] == 4
    batch = next(again.batches(batch_sequences=12))
    assert len(batch.targets["there"].positions) == done.positions


def test_order_within_a_position_and_of_the_rows_makes_no_difference(bare, tmp_path, cache):
    """Candidates are sorted, which is said; the bytes are those of sorted ones."""
    cache.import_targets("there", rows_of(cache), PROVENANCE)
    shutil.copytree(bare, tmp_path / "other")
    other = Cache.open(tmp_path / "other")
    turned = [
        row | {name: [one[::-1] for one in row[name]] for name in ("ids", "log_probs")}
        for row in rows_of(other)[::-1]
    ]
    told = other.import_targets("there", turned, PROVENANCE).as_text()
    assert "put in order of probability" in told
    assert committed(tmp_path / "other", "targets") == committed(cache.store.root, "targets")


def test_scalars_are_kept_where_they_are_given(cache):
    rows = [with_gold(cache, row) for row in rows_of(cache)]
    cache.import_targets("there", rows, PROVENANCE)
    for row in rows:
        (found,) = cache.example(row["index"]).targets["there"]
        np.testing.assert_allclose(found.gold_log_prob, row["gold_log_probs"], atol=1e-3)
        np.testing.assert_array_equal(found.gold_rank, row["gold_ranks"])
        np.testing.assert_allclose(found.entropy, row["entropy"], atol=1e-3)
    losses = [-np.mean(row["gold_log_probs"]) if row["gold_ranks"] else np.nan for row in rows]
    np.testing.assert_allclose(cache.scores("there", "mean_loss"), losses, atol=1e-3)


def test_scalars_that_were_not_given_are_none(cache):
    told = cache.import_targets("there", rows_of(cache), PROVENANCE).as_text()
    assert "gold_log_prob, gold_rank, entropy" in told
    (found,) = cache.example(0).targets["there"]
    assert np.isnan(found.entropy).all()
    assert np.isnan(found.gold_log_prob).all()
    assert (found.gold_rank == -1).all()
    with pytest.raises(InputError, match="gold_log_probs and gold_ranks"):
        cache.scores("there")


def test_prompt_logprobs_of_an_engine(cache):
    """vLLM's form: the prompt's own token beside the likeliest, ids as texts, in any order."""
    rows = [as_prompt_logprobs(cache, row) for row in rows_of(cache)]
    cache.import_targets("there", rows, PROVENANCE, k=4)
    assert_like_the_rows(cache)
    (found,) = cache.example(3).targets["there"]
    gold = with_gold(cache, row_of(cache, 3))
    np.testing.assert_allclose(found.gold_log_prob, gold["gold_log_probs"], atol=1e-3)
    np.testing.assert_array_equal(found.gold_rank, gold["gold_ranks"])
    assert cache.teachers["there"].info.imported.lacks == ("entropy",)
    assert np.isfinite(cache.scores("there", "mean_loss")).any()
    with pytest.raises(InputError, match="without entropies"):
        cache.scores("there", "mean_entropy")


def test_prompt_logprobs_of_another_prompt_are_refused(cache):
    row = as_prompt_logprobs(cache, row_of(cache, 2))
    row["prompt_logprobs"] = row["prompt_logprobs"][:1] + row["prompt_logprobs"][:0:-1]
    with pytest.raises(InputError, match="lacks the prompt's own token"):
        cache.import_targets("there", [row], PROVENANCE, k=4)
    row["prompt_logprobs"] = row["prompt_logprobs"][:-1]
    with pytest.raises(InputError, match="one entry for each of the sequence's"):
        cache.import_targets("there", [row], PROVENANCE, k=4)


def test_fewer_are_kept_and_the_rest_joins_the_tail(cache):
    told = cache.import_targets("there", rows_of(cache, k=7), PROVENANCE, k=4).as_text()
    assert "the 4 likeliest candidates are kept" in told
    assert_like_the_rows(cache)


def test_all_of_a_vocabulary_has_no_tail(cache):
    size = cache.corpus.info["tokenizer"]["size"]
    cache.import_targets("there", rows_of(cache, k=size), PROVENANCE)
    (found,) = cache.example(1).targets["there"]
    assert found.ids.shape[1] == size
    assert np.isneginf(found.log_tail[1.0]).all()
    assert cache.teachers["there"].info.estimator["bias"] == "exact"


def test_a_masked_lm_by_its_masks(cache):
    """The rows name the replica, and have a target where that masks."""
    view = cache.masked_view()
    generator, rows = np.random.default_rng(0), []
    for index in range(len(cache)):
        batches = [
            cache.gather(np.array([index]), [], epoch=e, masked_view=view.name) for e in (0, 1)
        ]
        for replica, batch in enumerate(batches):
            count = len(batch.masked.positions)
            ids = [generator.permutation(50)[:3].tolist() for _ in range(count)]
            rows.append(
                {
                    "index": index,
                    "replica": replica,
                    "digest": cache.example(index).digest,
                    "positions": batch.masked.positions.tolist(),
                    "ids": ids,
                    "log_probs": [[-0.7, -1.5, -3.0]] * count,
                }
            )
    done = cache.import_targets("there", rows, PROVENANCE, task="masked_lm")
    assert (done.units_done, done.rows) == (6, 24)
    for row in rows:
        found = cache.example(row["index"]).targets["there"][row["replica"]]
        np.testing.assert_array_equal(found.positions, row["positions"])
        np.testing.assert_array_equal(found.ids, np.reshape(row["ids"], (-1, 3)))
    assert problems(cache.store.root) == []
    wrong = rows[0] | {"positions": [0, *rows[0]["positions"][1:]]}
    with pytest.raises(InputError, match="0 has no target: it is not masked in this replica"):
        cache.import_targets("other", [wrong], PROVENANCE, task="masked_lm")


# --- resumed, twice, and with holes ---------------------------------------------------------------


def test_it_goes_on_and_ends_in_the_same_bytes(bare, tmp_path, cache):
    """What was complete before an error stays; the same rows again make the rest."""
    rows = rows_of(cache)
    shutil.copytree(bare, tmp_path / "whole")
    Cache.open(tmp_path / "whole").import_targets("there", rows, PROVENANCE)
    with pytest.raises(InputError, match="rows, row 8: log_probs"):
        cache.import_targets("there", [*rows[:7], rows[7] | {"log_probs": None}], PROVENANCE)
    assert len(committed(cache.store.root, "targets")) == 1
    done = cache.import_targets("there", rows, PROVENANCE)
    assert (done.units_done, done.units_present) == (2, 1)
    assert committed(cache.store.root, "targets") == committed(tmp_path / "whole", "targets")
    assert (cache.store.root / "cache.json").read_text() == (
        tmp_path / "whole" / "cache.json"
    ).read_text()
    again = cache.import_targets("there", rows, PROVENANCE)
    assert (again.units_done, again.units_present) == (0, 3)


def test_other_targets_of_a_finished_unit_are_refused(cache):
    rows = rows_of(cache)
    cache.import_targets("there", rows, PROVENANCE)
    changed = [list(one) for one in rows[6]["log_probs"]]
    changed[2][3] -= 0.5
    rows[6]["log_probs"] = changed
    with pytest.raises(CacheMismatchError, match="sequence 6: the cache has other targets"):
        cache.import_targets("there", rows, PROVENANCE)


def test_another_provenance_is_another_teacher(cache):
    cache.import_targets("there", rows_of(cache), PROVENANCE)
    with pytest.raises(CacheMismatchError, match="not this one"):
        cache.import_targets("there", rows_of(cache), PROVENANCE | {"revision": 4})


def test_missing_sequences_are_an_error_or_counted(cache):
    rows = [row for row in rows_of(cache) if row["index"] not in (3, 11)]
    with pytest.raises(
        InputError, match=r"2 sequences of the cache without a row: 3, 11\. .*\(1 unit\)"
    ):
        cache.import_targets("there", rows, PROVENANCE)
    told = cache.import_targets("there", rows, PROVENANCE, allow_missing=True).as_text()
    assert "2 sequences without a row" in told
    counts = [max(0, len(cache.example(i).input_ids) - 1) for i in range(12)]
    found = [len(cache.example(i).targets["there"][0].positions) for i in range(12)]
    assert found == [0 if i in (3, 11) else count for i, count in enumerate(counts)]
    shares = [
        sum(found[a:b]) / sum(counts[a:b]) * (b - a) / 12 for a, b in ((0, 5), (5, 10), (10, 12))
    ]
    assert cache.teachers["there"].coverage == pytest.approx(sum(shares))
    assert problems(cache.store.root) == []


def test_missing_positions_are_an_error_or_counted(cache):
    """As of an answer within a chat: the cache has what was given, and nothing elsewhere."""
    rows = rows_of(cache)
    for row in rows:
        half = len(row["ids"]) // 2
        row["positions"] = [*range(half, len(row["ids"]))]
        row |= {name: row[name][half:] for name in ("ids", "log_probs")}
    with pytest.raises(InputError, match=r"of its .* positions have no target"):
        cache.import_targets("there", rows, PROVENANCE)
    told = cache.import_targets("there", rows, PROVENANCE, allow_missing=True).as_text()
    assert "without a target, in sequences that have a row" in told
    for row in rows:
        (found,) = cache.example(row["index"]).targets["there"]
        np.testing.assert_array_equal(found.positions, row["positions"])
        np.testing.assert_array_equal(found.ids, np.reshape(row["ids"], (-1, 4)))
    assert cache.teachers["there"].coverage < 0.7
    assert problems(cache.store.root) == []


# --- classifiers ----------------------------------------------------------------------------------


def test_a_classifier_by_its_probabilities(cache):
    probs = np.random.default_rng(0).dirichlet(np.ones(3), len(cache))
    rows = [
        {"index": i, "digest": cache.example(i).digest, "probabilities": probs[i].tolist()}
        for i in range(len(cache))
    ]
    labels = ("good", "fair", "bad")
    cache.import_targets("judge", rows, PROVENANCE, task="sequence_classification", labels=labels)
    assert cache.teachers["judge"].info.label_names == labels
    for index in range(len(cache)):
        (found,) = cache.example(index).targets["judge"]
        exp = np.exp(found.logits)
        np.testing.assert_allclose(exp / exp.sum(), probs[index], rtol=1e-5)
    assert problems(cache.store.root) == []
    rows[4]["probabilities"] = [0.5, 0.4, 0.4]
    with pytest.raises(InputError, match="row 5: probabilities: must sum to 1"):
        cache.import_targets("x", rows, PROVENANCE, task="sequence_classification", labels=labels)
