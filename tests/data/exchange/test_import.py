"""Targets that were made elsewhere become a teacher's: what is read is what was given."""

import shutil

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.targets import codec_compact
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


@pytest.mark.parametrize("codec", ["default", "precise", "compact"])
def test_what_is_read_is_what_was_given(cache, codec):
    done = cache.import_targets("there", rows_of(cache), PROVENANCE, codec=codec)
    assert (done.rows, done.units_done, done.units_present) == (12, 3, 0)
    assert "1 minus the candidates, in float64" in done.as_text()
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
    assert "sorted by probability" in told
    assert committed(tmp_path / "other", "targets") == committed(cache.store.root, "targets")


@pytest.mark.parametrize("codec", ["default", "compact"])
def test_scalars_are_kept_where_they_are_given(cache, codec):
    rows = [with_gold(cache, row) for row in rows_of(cache)]
    cache.import_targets("there", rows, PROVENANCE, codec=codec)
    for row in rows:
        (found,) = cache.example(row["index"]).targets["there"]
        np.testing.assert_allclose(found.gold_log_prob, row["gold_log_probs"], atol=1e-3)
        np.testing.assert_array_equal(found.gold_rank, row["gold_ranks"])
        np.testing.assert_allclose(found.entropy, row["entropy"], atol=1e-3)
    losses = [-np.mean(row["gold_log_probs"]) if row["gold_ranks"] else np.nan for row in rows]
    np.testing.assert_allclose(cache.scores("there", "mean_loss"), losses, atol=1e-3)


@pytest.mark.parametrize("codec", ["default", "compact"])
def test_scalars_that_were_not_given_are_none(cache, codec):
    told = cache.import_targets("there", rows_of(cache), PROVENANCE, codec=codec).as_text()
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
    entry = {str(row["input_ids"][1]): {"logprob": -0.5, "rank": "first"}}
    odd = row | {"prompt_logprobs": [None, entry, *row["prompt_logprobs"][2:]]}
    with pytest.raises(InputError, match="entry 1 must be an object: token id"):
        cache.import_targets("there", [odd], PROVENANCE, k=4)
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": [0]}, "0 has no target: it is not masked in this replica"),
        ({"positions": None}, "neither positions nor shown_ids"),
        ({"replica": 1, "positions": None, "shown_ids": 0}, "of replica 1 from place"),
        ({"shown_ids": 1}, "shown_ids: they differ from those of sequence 2 with the masks of rep"),
        ({"shown_ids": 0, "positions": None}, None),
    ],
)
def test_masks_are_proved(cache, change, words):
    """Targets of one replica's masks are not taken for another's: by where, or by what was shown.
    ``shown_ids`` stands for the number of the replica.
    """
    view = cache.masked_view().name
    seen = [cache.gather([2], [], epoch=e, masked_view=view).masked for e in (0, 1)]
    count = len(seen[0].positions)
    assert len(seen[1].positions) == count
    row = {
        "index": 2,
        "replica": 0,
        "digest": cache.example(2).digest,
        "positions": seen[0].positions.tolist(),
        "ids": [[7, 8, 9]] * count,
        "log_probs": [[-0.7, -1.5, -3.0]] * count,
    } | change
    if row.get("shown_ids") is not None:
        row["shown_ids"] = seen[row["shown_ids"]].input_ids[0].tolist()
    if words is None:
        words = "23 sequences of the cache without a row"
    with pytest.raises(InputError, match=words):
        cache.import_targets("m", [row], PROVENANCE, task="masked_lm")


def test_what_a_causal_lm_was_shown_is_the_text(cache):
    row = row_of(cache, 2)
    shown = [*row["input_ids"][:3], 4, *row["input_ids"][4:]]
    with pytest.raises(InputError, match=r"shown_ids: .* sequence 2 from place 3 on"):
        cache.import_targets("t", [row | {"shown_ids": shown}], PROVENANCE)


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


def test_another_import_that_was_quicker_has_the_same_targets(cache):
    """Two at once under one name: what the first has committed is what both have, or an error."""
    rows = rows_of(cache)
    quicker = Cache.open(cache.store.location)

    def meanwhile(other):
        yield from rows[:4]
        quicker.import_targets("there", [*other, *rows[5:]], PROVENANCE)
        yield from rows[4:]

    changed = rows[4] | {"log_probs": [[v - 0.5 for v in one] for one in rows[4]["log_probs"]]}
    with pytest.raises(CacheMismatchError, match="sequence 4: the cache has other targets"):
        cache.import_targets("there", meanwhile([*rows[:4], changed]), PROVENANCE)
    shutil.rmtree(cache.store.root / "targets/there")
    done = cache.import_targets("there", meanwhile(rows[:5]), PROVENANCE)
    assert (done.units_done, done.units_present) == (0, 3)
    assert_like_the_rows(cache)


def test_a_lost_description_is_what_the_shards_say(cache):
    """Another teacher's rows do not take its place, and a different k of the first row does not."""
    rows = rows_of(cache)
    cache.import_targets("there", rows, PROVENANCE)
    whole = committed(cache.store.root, "targets")
    path = cache.store.root / "targets/there/teacher.json"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(CacheMismatchError, match="other provenance"):
        cache.import_targets("there", rows, PROVENANCE | {"revision": 4})
    assert not path.exists()
    more = row_of(cache, 0, k=7)
    cache.import_targets("there", [more, *rows[1:]], PROVENANCE)
    assert path.read_bytes() == content
    assert committed(cache.store.root, "targets") == whole


def test_another_provenance_is_another_teacher(cache):
    cache.import_targets("there", rows_of(cache), PROVENANCE)
    with pytest.raises(CacheMismatchError, match="differs from this one"):
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


def test_compact_targets_are_the_default_ones_and_go_on(cache, monkeypatch):
    """Every column as it is used, of several record batches, after an interruption."""
    rows = [with_gold(cache, row) for row in rows_of(cache)]
    cache.import_targets("plain", rows, PROVENANCE)
    monkeypatch.setattr(codec_compact, "POSITIONS_PER_BATCH", 64)
    with pytest.raises(InputError, match="of the cache without a row"):
        cache.import_targets("there", rows[:8], PROVENANCE, codec="compact")
    done = cache.import_targets("there", rows, PROVENANCE, codec="compact")
    assert (done.units_present, done.info.rows_per_batch) == (1, 2)
    reader, plain = cache.teacher("there"), cache.teacher("plain")
    for place in [(0, 0), (0, 4), (1, 3), (2, 1)]:
        (one, *cut), (two, *same) = reader.cut(place), plain.cut(place)
        assert one.columns.keys() == two.columns.keys()
        for name, values in two.columns.items():
            expected = values[slice(*same)]
            np.testing.assert_array_equal(one.columns[name][slice(*cut)], expected, name)
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


def test_numbers_are_of_the_labels_that_a_row_names(cache):
    """As an export writes them: another order would teach each label another's logits."""
    settings = {"task": "sequence_classification", "labels": ("good", "bad")}
    row = {"index": 0, "digest": cache.example(0).digest, "logits": [2.0, -1.0]}
    with pytest.raises(InputError, match="row 1: labels: its numbers are for bad, good, but"):
        cache.import_targets("j", [row | {"labels": ["bad", "good"]}], PROVENANCE, **settings)
    with pytest.raises(InputError, match="11 sequences of the cache without a row"):
        cache.import_targets("j", [row | {"labels": ["good", "bad"]}], PROVENANCE, **settings)


def test_logits_are_within_float32(cache):
    row = {"index": 0, "digest": cache.example(0).digest, "logits": [1e39, 0.0]}
    settings = {"task": "sequence_classification", "labels": ("good", "bad")}
    with pytest.raises(InputError, match="row 1: logits: must lie within"):
        cache.import_targets("j", [row], PROVENANCE, **settings)


def test_words_without_an_answer_are_an_error_or_counted(cache):
    settings = {"task": "token_classification", "labels": ("noun", "other")}
    rows = []
    for index in range(len(cache)):
        (row,) = cache.corpus.rows(*divmod(index, 5), 1).to_pylist()
        words = np.array(row["word_starts"]) & (np.array(row["char_starts"]) >= 0)
        places = np.flatnonzero(words).tolist()
        logits = [[1.0 * place, -1.0] for place in places]
        of_row = {"index": index, "digest": row["digest"]}
        rows.append(of_row | {"positions": places, "logits": logits})
    few = [row | {key: row[key][1:] for key in ("positions", "logits")} for row in rows]
    with pytest.raises(InputError, match=r"1 of its .* words have no answer \(the first begins at"):
        cache.import_targets("few", few, PROVENANCE, **settings)
    told = cache.import_targets("few", few, PROVENANCE, allow_missing=True, **settings).as_text()
    lacking = sum(len(row["positions"]) > 0 for row in rows)
    assert f"without an answer, in sequences that have a row: {lacking} words" in told
    assert 0 < cache.teachers["few"].coverage < 1
    cache.import_targets("all", rows, PROVENANCE, **settings)
    assert cache.teachers["all"].coverage == 1
    np.testing.assert_array_equal(cache.example(7).targets["all"][0].logits, rows[7]["logits"])
    probs = [[0.5, 0.5]] * len(rows[1]["positions"])
    odd = rows[1] | {"logits": None, "probabilities": [*probs[1:], [0.2, 0.3]]}
    with pytest.raises(InputError, match=r"must sum to 1 \(given: 0.5\)"):
        cache.import_targets("odd", [odd], PROVENANCE, **settings)
    assert problems(cache.store.root) == []
