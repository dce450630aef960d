"""Experts whose models take fewer tokens than a text has say how much they do not see."""

import json

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BloomConfig

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.inspect import inspect_cache
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.text import format_plan

LIMIT = 14  # tokens that the experts take


@pytest.fixture(scope="module")
def experts(make_teacher):
    """Two that see little, of texts and of pairs, one for words, and one that sees all."""
    short = {"config": {"max_position_embeddings": LIMIT}}
    return [
        make_teacher("text", "sequence_classification", domains=["even"], **short),
        make_teacher("pairs", "sequence_classification", pairs="adjacent", **short),
        make_teacher("words", "token_classification", **short),
        make_teacher("whole", "sequence_classification"),
    ]


def shares(lengths):
    """Of texts that are cut, and of tokens that are lost."""
    return np.mean(lengths > LIMIT), np.maximum(lengths - LIMIT, 0).sum() / lengths.sum()


def test_what_experts_do_not_see_is_planned_said_and_recorded(
    tmp_path, configure, experts, wordpiece, caplog
):
    config = configure(tmp_path / "c", experts, corpus={"sequence_length": 24})
    planned = plan_run(config, probe=False)
    cache_teachers(config)
    cache, tokenizer = Cache.open(tmp_path / "c"), AutoTokenizer.from_pretrained(wordpiece)
    examples = [cache.example(n) for n in range(len(cache))]
    (pairs,) = [view for view in cache.views.values() if not view.kind.masked]
    given = {
        "text": [(e.text,) for e in examples if e.domain == "even"],
        "pairs": [e.pairs[pairs.name] for e in examples if e.pairs.get(pairs.name)],
        "words": [(e.text,) for e in examples],
    }
    facts = json.loads(inspect_cache(str(tmp_path / "c"), as_json=True))["teachers"]
    told = format_plan(planned).replace("\n", " ")
    for name, texts in given.items():
        lengths = np.array([len(tokenizer(*text)["input_ids"]) for text in texts])
        cut, lost = shares(lengths)
        assert cut > 0
        work = next(work for work in planned.teachers if work.name == name)
        assert (work.cut.sequences, work.cut.tokens) == pytest.approx((cut, lost))
        assert work.longest == LIMIT
        assert facts[name]["cut"]["sequences"] == pytest.approx(cut)
        assert facts[name]["cut"]["tokens"] == pytest.approx(lost)
        assert f"{name} does not see all: {cut:.1%} of its texts are cut" in told
        assert f"teacher {name} does not see all: {cut:.1%} of its texts are cut" in caplog.text
    assert planned.teachers[3].cut is None
    assert facts["whole"]["cut"] is None
    assert "whole does not" not in told + caplog.text
    as_json = {work["name"]: work for work in planned.as_dict()["teachers"]}
    assert as_json["text"]["cut"] == vars(planned.teachers[0].cut)
    records = [commit.facts for commit in cache.teacher("whole").commits.values()]
    assert all("cut" not in record for record in records)


def test_nothing_is_cut_where_neither_model_nor_tokenizer_has_a_limit(
    tmp_path, configure, wordpiece
):
    config = BloomConfig(vocab_size=200, hidden_size=16, n_layer=1, n_head=2, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bloom")
    AutoTokenizer.from_pretrained(wordpiece).save_pretrained(tmp_path / "bloom")
    bloom = {"name": "b", "model": str(tmp_path / "bloom"), "task": "sequence_classification"}
    config = configure(tmp_path / "c", [bloom])
    assert plan_run(config, probe=False).teachers[0].cut is None
    cache_teachers(config)
    assert Cache.open(tmp_path / "c").teachers["b"].coverage == 1
