"""What a cache says of itself and of its texts, and what its experts' batches answer."""

from dataclasses import replace

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus.texts import CorpusTexts
from rekindle.data.errors import InputError


def test_repr_is_a_line_for_the_corpus_and_one_for_each_teacher(cache, made):
    first, *lines = repr(cache).splitlines()
    assert first.startswith(f"Cache({str(made)!r}): {len(cache):,} sequences")
    assert f"{cache.corpus.tokens:,} tokens, complete" in first
    told = {line.split(":")[0].strip(): line for line in lines}
    assert told.keys() == cache.teachers.keys()
    maskings = cache.masked_view().replicas
    assert f"masked_lm, topk, k = 9, {maskings} maskings, " in told["mlm"]
    assert "dense, all" in told["dense"]
    assert "3 logits" in told["tags"]
    assert all(line.endswith("B, complete") for line in lines)


def test_repr_says_what_is_missing(copied):
    next((copied / "targets/mlm/commits").glob("*.json")).unlink()
    cache = Cache.open(copied)
    told = next(line for line in repr(cache).splitlines() if "mlm:" in line)
    assert 0.5 < cache.teacher("mlm").coverage < 1
    assert told.endswith(f"incomplete: {cache.teacher('mlm').coverage:.1%}")


def test_texts_are_those_of_the_examples(cache):
    texts = cache.texts
    assert len(texts) == len(cache)
    for number in (0, 7, len(cache) - 1):
        assert texts[number] == cache.example(number).text
    assert texts[-1] == texts[len(cache) - 1]
    assert list(texts[10:4:-3]) == [texts[10], texts[7]]
    assert texts[3:9][1:][0] == texts[4]
    with pytest.raises(IndexError):
        texts[len(cache)]
    assert len(repr(texts)) < 80


def test_a_sequence_without_a_text_is_decoded(cache, monkeypatch):
    """As one of a source of tokens alone would be."""
    ids = cache.example(5).input_ids
    monkeypatch.setattr(type(cache.corpus), "text", lambda *_: "")
    found = CorpusTexts(cache.corpus)[5]
    content = [i for i in ids.tolist() if i not in cache.corpus.tokenizer.special_ids]
    assert found == cache.corpus.tokenizer.hf.decode(content)
    assert found


def test_sequences_may_be_any_integers(cache):
    wanted = cache.gather(np.array([4, 1]), ["dense"], masked_view=cache.masked_view().name)
    found = cache.gather([4, 1], ["dense"], masked_view=cache.masked_view().name)
    assert np.array_equal(found.index, wanted.index)
    assert np.array_equal(found.input_ids, wanted.input_ids)
    assert len(cache.gather([], []).index) == 0
    for wrong in ([0.5], 3, [[1]], [True]):
        with pytest.raises(ValueError, match="they must be numbers"):
            cache.gather(wrong, [])


def test_what_classifiers_answer(cache):
    """Where they have a target; NaN elsewhere."""
    batch = cache.gather(np.arange(20), ["expert", "tags"])
    for name in ("expert", "tags"):
        target = batch.targets[name]
        assert target.labels == cache.teachers[name].info.label_names
        probs, entropy = target.probabilities(2.0), target.entropy(2.0)
        assert probs.shape == target.logits.shape
        assert entropy.shape == probs.shape[:1]
        there = target.present if name == "expert" else np.ones(len(target.rows), bool)
        expected = np.exp(target.logits.astype(np.float64) / 2)
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probs[there], expected[there], rtol=1e-5)
        np.testing.assert_allclose(
            entropy[there], -(expected * np.log(expected)).sum(axis=1)[there], rtol=1e-4
        )
        assert np.isnan(probs[~there]).all()
        assert np.isnan(entropy[~there]).all()
    assert not batch.targets["expert"].present.all()


def test_labels_that_each_hold_or_do_not_and_scores(cache):
    target = cache.gather(np.arange(4), ["tags"]).targets["tags"]
    several = replace(
        target,
        info=target.info.model_copy(update={"problem": "multi_label_classification"}),
        logits=np.array([[0.0, 90.0, -90.0]], np.float32),
    )
    np.testing.assert_allclose(several.probabilities(), [[0.5, 1, 0]], atol=1e-7)
    np.testing.assert_allclose(several.entropy(), [np.log(2)], rtol=1e-6)
    scores = replace(target, info=target.info.model_copy(update={"problem": "regression"}))
    with pytest.raises(InputError, match="'tags' gives scores, which have no probabilities"):
        scores.entropy()
    unnamed = replace(target, info=target.info.model_copy(update={"label_names": ()}))
    assert unnamed.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
