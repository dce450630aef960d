"""What the cache holds of language models is what they say: every target against the model."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from testlib.caches import examples
from testlib.models import AUTO
from testlib.run_alone import (
    NOISE,
    TEMPERATURES,
    check_dense,
    check_distribution,
    logits_of,
    stated_precision,
)

MASKED = ["bert", "roberta", "electra", "deberta", "modernbert"]
LIMIT = {"document": 12, "contiguous": 7}
VOCABULARY_TARGETS = {
    "topk": {"kind": "topk", "k": 16, "temperatures": TEMPERATURES},
    "one": {"kind": "topk", "k": 1},
    "whole": {"kind": "topk", "k": 10_000},
    "dense": {"kind": "dense"},
}


@pytest.fixture(scope="module")
def masked_models(make_model, wordpiece) -> dict[str, Path]:
    return {f: make_model(f, "AutoModelForMaskedLM", wordpiece) for f in MASKED}


@pytest.fixture(scope="module", params=["document", "contiguous"])
def masked_cache(request, tmp_path_factory, configure, masked_models) -> Cache:
    teachers = [
        {"name": family, "model": str(path), "task": "masked_lm", "targets": targets}
        for family, path in masked_models.items()
        for targets in [VOCABULARY_TARGETS["topk"]]
    ]
    teachers += [
        {"name": name, "model": str(masked_models["bert"]), "task": "masked_lm", "targets": targets}
        for name, targets in VOCABULARY_TARGETS.items()
    ]
    path = tmp_path_factory.mktemp("masked")
    corpus = {"packing": request.param, "limit_sequences": LIMIT[request.param]}
    cache_teachers(configure(path, teachers, corpus=corpus))
    return Cache.open(path)


@pytest.mark.covering
@pytest.mark.parametrize("name", [*MASKED, *VOCABULARY_TARGETS])
def test_masked_targets_are_the_models_own(masked_cache, masked_models, name):
    directory = masked_models.get(name, masked_models["bert"])
    check = check_dense if name == "dense" else check_distribution
    ends_checked = 0
    for example in examples(masked_cache):
        found = example.targets[name]
        assert [t.replica for t in found] == [0, 1]
        masked = np.concatenate([t.positions for t in found])
        # The two replicas cover every token but [CLS] and [SEP], first and last ones included.
        content = np.flatnonzero(~np.isin(example.input_ids, [2, 3]))
        assert sorted(masked.tolist()) == content.tolist()
        ends_checked += {1, len(example.input_ids) - 2} <= set(masked.tolist())
        for target in found:
            hidden = np.setdiff1d(np.arange(len(example.input_ids)), target.positions)
            assert (target.input_ids[hidden] == example.input_ids[hidden]).all()
            logits = logits_of(directory, "AutoModelForMaskedLM", input_ids=target.input_ids)
            for row, position in enumerate(target.positions):
                check(target, row, logits[position], int(example.input_ids[position]))
    assert ends_checked == len(masked_cache)


def test_the_corpora_have_what_could_go_wrong(masked_cache):
    """Short sequences beside long ones, an incomplete last shard, documents that share one."""
    lengths = [len(e.input_ids) for e in examples(masked_cache)]
    rows = [c.rows for c in masked_cache.corpus.commits]
    if len(masked_cache) == LIMIT["document"]:
        assert rows == [5, 5, 2]
        assert all(len(set(lengths[first : first + 5])) > 1 for first in (0, 5))
        assert min(lengths) < 10
    else:
        assert rows == [5, 2]
        assert set(lengths) == {24}
        starts = masked_cache.corpus.shard(0).batch(0)["document_starts"].to_pylist()
        assert any(len(row) > 1 for row in starts)


def test_targets_at_a_temperature_are_the_models_own(masked_cache, masked_models):
    """What a student reads: ids, log-probabilities and tail at τ, through the batch."""
    for batch in masked_cache.batches(["bert"], batch_sequences=7, epoch=1):
        target, masked = batch.targets["bert"], batch.masked
        logits = [
            logits_of(masked_models["bert"], "AutoModelForMaskedLM", input_ids=row[:length])
            for row, length in zip(masked.input_ids, batch.lengths, strict=True)
        ]
        assert (target.rows == masked.rows).all()
        assert (target.positions == masked.positions).all()
        for tau in TEMPERATURES:
            ids, log_probs, log_tail = target.decode(tau)
            for p, (row, position) in enumerate(zip(target.rows, target.positions, strict=True)):
                here = logits[row][position].double()
                exact = torch.log_softmax(here / tau, -1).numpy()
                error = np.abs(log_probs[p] - exact[ids[p]])
                assert error.max() <= stated_precision(here.numpy()[ids[p]], tau) + NOISE / tau
                assert np.logaddexp(log_tail[p], np.logaddexp.reduce(log_probs[p])) == (
                    pytest.approx(0, abs=1e-5)
                )


@pytest.fixture(scope="module", params=["document", "contiguous"])
def clean_cache(request, tmp_path_factory, configure, masked_models) -> Cache:
    shared = {"task": "masked_lm", "targets": VOCABULARY_TARGETS["topk"], "view": "clean"}
    teachers = [{"name": f, "model": str(path), **shared} for f, path in masked_models.items()]
    path = tmp_path_factory.mktemp("clean")
    corpus = {"packing": request.param, "limit_sequences": 6}
    cache_teachers(configure(path, teachers, corpus=corpus))
    return Cache.open(path)


@pytest.mark.parametrize("name", MASKED)
def test_clean_targets_are_the_models_own(clean_cache, masked_models, name):
    """A masked LM that sees the text as it is: a target for every token, at the token."""
    assert not clean_cache.views
    for example in examples(clean_cache):
        (found,) = example.targets[name]
        ids = example.input_ids
        assert found.replica is None
        assert (found.input_ids == ids).all()
        content = np.flatnonzero(~np.isin(ids, [2, 3]))
        assert found.positions.tolist() == content.tolist()
        logits = logits_of(masked_models[name], "AutoModelForMaskedLM", input_ids=ids)
        for row, position in enumerate(content.tolist()):
            check_distribution(found, row, logits[position], int(ids[position]))


# --- causal language models -----------------------------------------------------------------------


CAUSAL = ["gpt2", "llama"]


@pytest.fixture(scope="module")
def causal_models(make_model, bytelevel) -> dict[str, Path]:
    return {f: make_model(f, "AutoModelForCausalLM", bytelevel) for f in CAUSAL}


@pytest.fixture(scope="module", params=["document", "contiguous"])
def causal_cache(request, tmp_path_factory, configure, causal_models, bytelevel) -> Cache:
    teachers = [
        {"name": f"{family}-{name}", "model": str(path), "task": "causal_lm", "targets": targets}
        for family, path in causal_models.items()
        for name, targets in VOCABULARY_TARGETS.items()
    ]
    path = tmp_path_factory.mktemp("causal")
    corpus = {"packing": request.param, "tokenizer": str(bytelevel), "limit_sequences": 7}
    cache_teachers(configure(path, teachers, corpus=corpus))
    return Cache.open(path)


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", VOCABULARY_TARGETS)
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_targets_are_the_models_own(causal_cache, causal_models, family, kind):
    check = check_dense if kind == "dense" else check_distribution
    for example in examples(causal_cache):
        (target,) = example.targets[f"{family}-{kind}"]
        assert target.replica is None
        ids = example.input_ids
        assert target.positions.tolist() == list(range(len(ids) - 1))
        assert (target.input_ids == ids).all()
        logits = logits_of(causal_models[family], "AutoModelForCausalLM", input_ids=ids)
        for position in range(len(ids) - 1):
            check(target, position, logits[position], int(ids[position + 1]))


@pytest.fixture(scope="module")
def cycle(tmp_path_factory) -> SimpleNamespace:
    """Text in which each word has one successor, and a Llama that knows it and nothing else."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("cycle")
    words = [f"w{i}" for i in range(13)]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, "?"])}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?")
    size = len(tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()  # only the current token is left
        layer.mlp.down_proj.weight.zero_()
        table = torch.eye(32)[:size]
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight.zero_()
        for token in range(13):
            model.lm_head.weight[(token + 5) % 13] = table[token]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [
        {"text": " ".join(words[(start + 5 * i) % 13] for i in range(3 + 4 * start))}
        for start in range(9)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(model=folder / "model", text=folder / "text.jsonl")


@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_the_target_at_t_is_the_distribution_of_token_t_plus_1(tmp_path, configure, cycle, kind):
    teacher = {"name": "lm", "model": str(cycle.model), "task": "causal_lm"}
    corpus = {
        "source": [str(cycle.text)],
        "tokenizer": str(cycle.model),
        "domain_field": None,
        "sequence_length": 11,
        "limit_sequences": None,
    }
    targets = {"kind": kind, "k": 3}
    cache_teachers(configure(tmp_path, [teacher | {"targets": targets}], corpus=corpus))
    cache = Cache.open(tmp_path)
    checked = 0
    for example in examples(cache):
        (target,) = example.targets["lm"]
        best = target.ids[np.arange(len(target.ids)), target.log_probs.argmax(axis=1)]
        assert best.tolist() == example.input_ids[1:].tolist()
        assert target.gold_rank.tolist() == [0] * (len(example.input_ids) - 1)
        checked += len(best)
    assert checked > 100


# --- vocabularies that the model pads, shards of several record batches ---------------------------


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_padded_rows_of_the_head_get_no_probability(tmp_path, configure, padded_model, task, kind):
    model, size = padded_model(task)
    targets = {"kind": kind, "k": size} | ({"temperatures": TEMPERATURES} if kind == "topk" else {})
    teacher = {"name": "lm", "model": str(model), "task": task, "targets": targets}
    cache_teachers(configure(tmp_path / "cache", [teacher], corpus={"limit_sequences": 4}))
    cache = Cache.open(tmp_path / "cache")
    assert cache.teachers["lm"].vocabulary_size == size
    stolen = []
    check = check_dense if kind == "dense" else check_distribution
    for example in examples(cache):
        for target in example.targets["lm"]:
            whole = logits_of(model, AUTO[task], input_ids=target.input_ids)
            assert whole.shape[1] == size + 6
            assert target.ids.max() < size
            assert np.exp(target.log_probs).sum(axis=1) == pytest.approx(1, abs=1e-4)
            for row, position in enumerate(target.positions):
                stolen.append(float(torch.softmax(whole[position], -1)[size:].sum()))
                check(target, row, whole[position, :size], int(target.gold_ids[row]))
    assert np.median(stolen) > 0.9  # without the cut these targets would be worthless


def test_shards_of_several_record_batches(tmp_path, configure, masked_models):
    teacher = {"name": "lm", "model": str(masked_models["bert"]), "task": "masked_lm"}
    expert = {"targets": {"kind": "topk", "k": 4}}
    corpus = {"sequence_length": 8, "limit_sequences": 270}
    cache = {"sequences_per_shard": 260, "replicas": 1, "mask": {"policy": "random"}}
    cache_teachers(configure(tmp_path, [teacher | expert], corpus=corpus, cache=cache))
    cache = Cache.open(tmp_path)
    assert [c.rows for c in cache.corpus.commits] == [260, 10]
    for index in [0, *range(125, 131), *range(253, 264), 269]:
        example = cache.example(index)
        (target,) = example.targets["lm"]
        logits = logits_of(
            masked_models["bert"], "AutoModelForMaskedLM", input_ids=target.input_ids
        )
        assert len(target.positions) > 0
        for row, position in enumerate(target.positions):
            check_distribution(target, row, logits[position], int(example.input_ids[position]))
