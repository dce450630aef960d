"""What the cache holds is what the teacher says: every target against the model itself, run alone.

The reference is transformers' own ``model(**inputs).logits`` in float32 on one sequence at a time,
without padding, and ``torch.log_softmax``; none of our helpers takes part in it.
"""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.example import SequenceTargets, TokenLabelTargets, TokenTargets
from rekindle.pipeline.caching import teachers as teachers_module
from rekindle.pipeline.caching.cache_teachers import cache_teachers

TEMPERATURES = [1.0, 2.0, 4.0, 0.5]
# float32 noise between a padded batch and a sequence alone, in nats, at logits of about ±30.
NOISE = 2e-4


@functools.cache
def model_of(directory: Path, auto: str) -> Any:
    found = getattr(transformers, auto).from_pretrained(str(directory), dtype=torch.float32)
    return found.eval()


@torch.no_grad()
def logits_of(directory: Path, auto: str, **inputs: Any) -> torch.Tensor:
    """The model's own logits of one sequence, alone: [S,V], [S,C] or [C]."""
    tensors = {name: torch.tensor([list(map(int, row))]) for name, row in inputs.items()}
    return model_of(directory, auto)(**tensors).logits[0].float()


def stated_precision(exact: np.ndarray, tau: float) -> float:
    """What the codec promises for candidates within 32 nats of the best, at temperature ``tau``."""
    span = min(exact.max() - exact.min(), 32)
    return 2 * (span / 510 + 1 / 1024) / tau + 1 / 2048


def check_distribution(found: TokenTargets, row: int, logits: torch.Tensor, gold: int) -> None:
    """One cached position against the model's logits [V] there, to the codec's precision."""
    exact = torch.log_softmax(logits, -1).double().numpy()
    ids, log_probs = found.ids[row], found.log_probs[row].astype(np.float64)
    assert len(set(ids.tolist())) == len(ids)
    outside = np.setdiff1d(np.arange(len(exact)), ids)
    # The kept ids are the likeliest, by falling probability (equal ones may change places).
    assert exact[ids].min() >= exact[outside].max(initial=-np.inf) - NOISE
    assert (np.diff(exact[ids]) < NOISE).all()
    near = exact[ids] > exact[ids].max() - 32
    error = np.abs(log_probs - exact[ids])[near]
    assert error.max() <= stated_precision(exact[ids], 1.0) + NOISE
    for tau, log_tail in found.log_tail.items():
        tempered = torch.log_softmax(logits.double() / tau, -1)
        tail = float(torch.logsumexp(tempered[outside], -1)) if len(outside) else -np.inf
        kept = float(torch.logsumexp(tempered[ids], -1))
        if tail - kept < -31.9:
            assert log_tail[row] < -31.9
        else:
            assert abs(log_tail[row] - tail) <= 1 / 2048 + NOISE / tau
    assert found.gold_ids[row] == gold
    assert abs(found.gold_log_prob[row] - max(exact[gold], -63.999)) <= 1 / 2048 + NOISE
    ranks = [(exact > exact[gold] + shift).sum() for shift in (NOISE, -NOISE)]
    assert ranks[0] <= found.gold_rank[row] <= max(ranks)
    entropy = -(np.exp(exact) * exact).sum()
    assert abs(found.entropy[row] - entropy) <= 1 / 2048 + NOISE


def check_dense(found: TokenTargets, row: int, logits: torch.Tensor, gold: int) -> None:
    exact = torch.log_softmax(logits, -1).numpy()
    assert found.ids[row].tolist() == list(range(len(exact)))
    assert np.abs(found.log_probs[row] - exact).max() <= NOISE
    assert found.gold_ids[row] == gold
    assert abs(found.gold_log_prob[row] - max(exact[gold], -63.999)) <= 1 / 2048 + NOISE
    assert abs(found.entropy[row] + (np.exp(exact) * exact).sum()) <= 1 / 2048 + NOISE


def examples(cache: Cache) -> Iterator[Any]:
    return (cache.example(index) for index in range(len(cache)))


# --- masked language models -----------------------------------------------------------------------

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


# --- experts: classifiers, regressors, pairs, words -----------------------------------------------

CLASSIFIER = "AutoModelForSequenceClassification"
PAIR_LENGTH = 21  # what the model "short" takes: many pairs are longer


@pytest.fixture(scope="module")
def eos_bytelevel(tmp_path_factory, bytelevel) -> Path:
    """A tokenizer that ends each text with the end-of-sequence token and has no padding token."""
    from tokenizers.processors import TemplateProcessing

    hf = transformers.AutoTokenizer.from_pretrained(str(bytelevel))
    end = ("<|endoftext|>", hf.eos_token_id)
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", pair="$A <|endoftext|> $B <|endoftext|>", special_tokens=[end]
    )
    path = tmp_path_factory.mktemp("eos")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=hf.backend_tokenizer, eos_token="<|endoftext|>", model_max_length=256
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def experts(make_model, wordpiece, bytelevel, eos_bytelevel) -> dict[str, dict[str, Any]]:
    def classify(family: str, tokenizer: Path, **extra: Any) -> dict[str, Any]:
        model = make_model(family, CLASSIFIER, tokenizer, **({"num_labels": 3} | extra))
        return {"model": str(model), "task": "sequence_classification"}

    regression = {"num_labels": 1, "problem_type": "regression"}
    score = {"task": "regression"}
    return {
        "bert": classify("bert", wordpiece),
        "electra": classify("electra", wordpiece, num_labels=2),
        "deberta": classify("deberta", wordpiece),
        "modernbert": classify("modernbert", wordpiece),
        "roberta-other-tokens": classify("roberta", bytelevel),
        "gpt2-other-tokens": classify("gpt2", bytelevel),
        "llama-without-padding": classify("llama", eos_bytelevel, pad_token_id=None),
        "cut-off": classify("bert", wordpiece, max_position_embeddings=16),
        "score": classify("bert", wordpiece, **regression) | score,
        "adjacent": classify("bert", wordpiece, seed=1) | {"pairs": "adjacent"},
        "same-document": classify("roberta", bytelevel, seed=1) | {"pairs": "same-document"},
        "random-score": classify("deberta", wordpiece, **regression) | score | {"pairs": "random"},
        "short-pairs": classify("bert", wordpiece, max_position_embeddings=PAIR_LENGTH)
        | {"pairs": "random"},
        "llama-pairs": classify("llama", eos_bytelevel, pad_token_id=None) | {"pairs": "adjacent"},
    }


@pytest.fixture(scope="module")
def expert_cache(tmp_path_factory, configure, experts) -> Cache:
    teachers = [{"name": name} | expert for name, expert in experts.items()]
    path = tmp_path_factory.mktemp("experts")
    corpus = {"sequence_length": 48, "limit_sequences": 17}
    cache_teachers(configure(path, teachers, corpus=corpus, cache={"sequences_per_shard": 7}))
    return Cache.open(path)


EXPERTS = [
    *["bert", "electra", "deberta", "modernbert", "roberta-other-tokens", "gpt2-other-tokens"],
    *["llama-without-padding", "cut-off", "score", "adjacent", "same-document", "random-score"],
    *["short-pairs", "llama-pairs"],
]


@pytest.mark.parametrize("name", EXPERTS)
def test_an_experts_logits_are_the_models_own(expert_cache, experts, name):
    expert = experts[name]
    directory = Path(expert["model"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    config = transformers.AutoConfig.from_pretrained(str(directory))
    offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    longest = config.max_position_embeddings - offset
    lengths = []
    for example in examples(expert_cache):
        texts = [example.text]
        if "pairs" in expert:
            view = next(v for v in example.pairs if v.startswith(f"pairs-{expert['pairs']}-"))
            texts = example.pairs[view]
        if texts is None:
            assert example.targets[name] == []
            continue
        encoded = tokenizer(*texts, truncation=True, max_length=longest)
        inputs = {k: v for k, v in encoded.items() if k != "attention_mask"}
        if config.model_type not in ("bert", "electra"):
            inputs.pop("token_type_ids", None)
        lengths.append(len(inputs["input_ids"]))
        (found,) = example.targets[name]
        assert isinstance(found, SequenceTargets)
        assert found.mc_probs is None
        logits = logits_of(directory, CLASSIFIER, **inputs).numpy()
        assert found.logits.shape == logits.shape
        assert np.abs(found.logits - logits).max() <= NOISE
    assert len(set(lengths)) > 1 or lengths[0] == longest
    assert max(lengths) == longest if longest < 48 else len(lengths) > 8
    if "pairs" in expert and expert["pairs"] != "random":
        assert len(lengths) < len(expert_cache)  # sequences without a pair are there as well


WORDS_TEXT = [
    "The  old\tmodel \U0001f642 reads\n\nnew papers. \U0001f9d1\u200d\U0001f680runs  ",
    "Rivers, cities and the quick token guides: a student learns!",
    " falls",
    "water " * 30 + "engine",
]


@pytest.fixture(scope="module")
def word_texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS_TEXT))
    return path


@pytest.mark.parametrize("theirs", ["wordpiece", "bytelevel"])
@pytest.mark.parametrize("ours", ["wordpiece", "bytelevel"])
def test_a_words_label_is_that_of_the_experts_first_token_of_it(
    request, tmp_path, configure, make_model, word_texts, ours, theirs
):
    ours, theirs = request.getfixturevalue(ours), request.getfixturevalue(theirs)
    auto = "AutoModelForTokenClassification"
    family = "bert" if "wordpiece" in str(theirs) else "roberta"
    directory = make_model(family, auto, theirs, num_labels=4)
    short = make_model(family, auto, theirs, num_labels=4, max_position_embeddings=16)
    teachers = [
        {"name": name, "model": str(path), "task": "token_classification"}
        for name, path in (("words", directory), ("short", short))
    ]
    corpus = {"source": [str(word_texts)], "tokenizer": str(ours), "domain_field": None}
    cache_teachers(configure(tmp_path, teachers, corpus=corpus))
    cache = Cache.open(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(theirs))
    labelled = 0
    for index, example in enumerate(examples(cache)):
        row = {
            name: column.to_pylist()[index % 5]
            for name, column in zip(
                cache.corpus.shard(index // 5).schema.names,
                cache.corpus.shard(index // 5).batch(0).columns,
                strict=True,
            )
        }
        begins = {  # position -> first character of its word that is no white space
            position: start + re.match(r"\s*", example.text[start:]).end()
            for position, (start, word) in enumerate(
                zip(row["char_starts"], row["word_starts"], strict=True)
            )
            if word
        }
        # A word of white space alone has no label; its first solid character is the next word's.
        solid = list(begins.values())
        begins = {p: c for i, (p, c) in enumerate(begins.items()) if c not in solid[i + 1 :]}
        for name, path, limit in (("words", directory, 256), ("short", short, 16)):
            offset = (
                0
                if family == "bert"
                else transformers.AutoConfig.from_pretrained(str(path)).pad_token_id + 1
            )
            encoded = tokenizer(
                example.text,
                return_offsets_mapping=True,
                truncation=True,
                max_length=limit - offset,
            )
            spans = encoded["offset_mapping"]
            logits = logits_of(path, auto, input_ids=encoded["input_ids"])
            expected = {}
            for position, character in begins.items():
                cover = [i for i, (a, b) in enumerate(spans) if a <= character < b]
                if cover:
                    expected[position] = logits[cover[0]]
            (found,) = example.targets[name]
            assert isinstance(found, TokenLabelTargets)
            assert found.positions.tolist() == list(expected)
            if expected:
                assert (
                    np.abs(found.logits - torch.stack(list(expected.values())).numpy()).max()
                    <= NOISE
                )
            labelled += name == "words" and len(expected)
    text = " ".join(WORDS_TEXT)
    assert labelled >= len(re.findall(r"\w+", text))  # every word of letters, at the least


# --- vocabularies that the model pads, shards of several record batches ---------------------------


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("llama", "causal_lm")])
@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_padded_rows_of_the_head_get_no_probability(
    tmp_path, configure, make_model, wordpiece, family, task, kind
):
    """Vocabulary + 6 rows, which hold nearly all of the model's own mass: they are no tokens."""
    auto = "AutoModelForMaskedLM" if task == "masked_lm" else "AutoModelForCausalLM"
    size = len(transformers.AutoTokenizer.from_pretrained(str(wordpiece)))
    extra = {} if family == "bert" else {"tie_word_embeddings": False}
    padded = make_model(family, auto, wordpiece, seed=5, vocab_size=size + 6, **extra)
    model = getattr(transformers, auto).from_pretrained(str(padded))
    with torch.no_grad():
        if family == "bert":
            model.cls.predictions.bias[size:] = 40.0
        else:
            model.lm_head.weight[size:] = 50 * model.lm_head.weight[:6]
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(str(wordpiece)).save_pretrained(tmp_path / "model")
    targets = {"kind": kind, "k": size} | ({"temperatures": TEMPERATURES} if kind == "topk" else {})
    teacher = {"name": "lm", "model": str(tmp_path / "model"), "task": task, "targets": targets}
    cache_teachers(configure(tmp_path / "cache", [teacher], corpus={"limit_sequences": 4}))
    cache = Cache.open(tmp_path / "cache")
    assert cache.teachers["lm"].vocabulary_size == size
    stolen = []
    check = check_dense if kind == "dense" else check_distribution
    for example in examples(cache):
        for target in example.targets["lm"]:
            whole = logits_of(tmp_path / "model", auto, input_ids=target.input_ids)
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


# --- memory ---------------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 412316860416 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError(),
}


@pytest.fixture
def small_memory(monkeypatch):
    """small_memory(tokens, error): models loaded from now on take no batch of more tokens."""
    seen: list[tuple[int, int]] = []

    def limit(tokens: int, error: BaseException) -> list[tuple[int, int]]:
        load = teachers_module.load_model

        def limited(*arguments: Any, **options: Any) -> Any:
            model = load(*arguments, **options)
            body = model.base_model if "CausalLM" in type(model).__name__ else model
            run = body.forward

            def forward(*args: Any, **inputs: Any) -> Any:
                shape = tuple(inputs["input_ids"].shape)
                seen.append(shape)
                if shape[0] * shape[1] > tokens:
                    raise error
                return run(*args, **inputs)

            body.forward = forward
            return model

        monkeypatch.setattr(teachers_module, "load_model", limited)
        return seen

    return limit


def teachers_of_all_kinds(make_model, wordpiece) -> list[dict[str, str]]:
    kinds = [
        ("bert", "AutoModelForMaskedLM", "masked_lm"),
        ("llama", "AutoModelForCausalLM", "causal_lm"),
        ("bert", "AutoModelForSequenceClassification", "sequence_classification"),
        ("bert", "AutoModelForTokenClassification", "token_classification"),
    ]
    # The precise codec: a step of the default one is wider than float32 noise that crosses it.
    precise = {"targets": {"kind": "topk", "codec": "precise"}}
    return [
        {"name": task, "model": str(make_model(family, auto, wordpiece)), "task": task}
        | (precise if task in ("masked_lm", "causal_lm") else {})
        for family, auto, task in kinds
    ]


def assert_same_ids(ids: np.ndarray, others: np.ndarray, log_probs: np.ndarray) -> None:
    """Equal but for neighbours so near each other that noise decides which comes first."""
    for row, place in zip(*np.nonzero(ids != others), strict=True):
        near = np.abs(log_probs[row] - log_probs[row, place]) < 2e-3
        assert near.sum() > 1, f"row {row}: {ids[row]} and {others[row]}"


def assert_same_targets(one: Cache, other: Cache) -> None:
    """Equal but for float32 noise (batches of another shape round otherwise)."""
    for a, b in zip(examples(one), examples(other), strict=True):
        assert a.digest == b.digest
        for name in a.targets:
            for first, second in zip(a.targets[name], b.targets[name], strict=True):
                for field, value in vars(first).items():
                    if field == "ids":
                        assert_same_ids(value, getattr(second, field), first.log_probs)
                    elif isinstance(value, np.ndarray):
                        np.testing.assert_allclose(getattr(second, field), value, atol=2e-3)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_batch_out_of_memory_is_halved_and_the_targets_are_the_same(
    tmp_path, configure, make_model, wordpiece, small_memory, kind, caplog
):
    teachers = teachers_of_all_kinds(make_model, wordpiece)[: 4 if kind == "cuda" else 1]
    cache_teachers(configure(tmp_path / "plenty", teachers))
    seen = small_memory(60, OUT_OF_MEMORY[kind])
    with caplog.at_level("WARNING", logger="rekindle"):
        cache_teachers(configure(tmp_path / "little", teachers))
    assert_same_targets(Cache.open(tmp_path / "plenty"), Cache.open(tmp_path / "little"))
    # 5 sequences of up to 24 tokens at first; then half as many tokens, from there on and for good.
    failed = [rows * width for rows, width in seen if rows * width > 60]
    assert len(failed) == len(teachers)
    assert len([r for r in caplog.records if "out of memory" in r.getMessage()]) == len(teachers)
    # What fits into the smaller budget still runs together.
    assert max(rows for rows, width in seen if rows * width <= 60) > 1


def test_a_sequence_that_alone_does_not_fit_is_named(
    tmp_path, configure, make_model, wordpiece, small_memory
):
    teacher = teachers_of_all_kinds(make_model, wordpiece)[0]
    small_memory(10, OUT_OF_MEMORY["cuda"])
    with pytest.raises(InputError, match=r"'masked_lm': one sequence of 24 tokens alone does not"):
        cache_teachers(configure(tmp_path, [teacher]))


def test_other_errors_of_a_model_are_not_taken_for_lack_of_memory(
    tmp_path, configure, make_model, wordpiece, small_memory
):
    teacher = teachers_of_all_kinds(make_model, wordpiece)[2]
    seen = small_memory(10, RuntimeError("shape mismatch"))
    with pytest.raises(InputError, match=r"failed on a batch of 5 sequences .*: shape mismatch"):
        cache_teachers(configure(tmp_path, [teacher]))
    assert len(seen) == 1


# --- models that say NaN --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "value"),
    [(0, np.nan), (0, np.inf), (1, np.nan), (2, np.inf), (2, np.nan), (3, np.nan)],
)
def test_logits_that_are_no_numbers_are_refused(
    tmp_path, configure, make_model, wordpiece, number, value
):
    teacher = teachers_of_all_kinds(make_model, wordpiece)[number]
    autos = ["MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification"]
    auto = getattr(transformers, f"AutoModelFor{autos[number]}")
    model = auto.from_pretrained(teacher["model"])
    with torch.no_grad():
        {
            0: lambda: model.cls.predictions.bias,
            1: lambda: model.lm_head.weight,
            2: lambda: model.classifier.bias,
            3: lambda: model.classifier.bias,
        }[number]()[1] = value
    model.save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(wordpiece))
    tokenizer.save_pretrained(tmp_path / "model")
    config = configure(tmp_path / "cache", [teacher | {"model": str(tmp_path / "model")}])
    with pytest.raises(InputError, match=rf"'{teacher['task']}' produced logits that are .*fp32"):
        cache_teachers(config)
    # Nothing of it is in the cache, and its name is free for a model that works.
    assert not (tmp_path / "cache" / "targets").exists()
    assert cache_teachers(configure(tmp_path / "cache", [teacher])).units_done >= 3


# --- Monte-Carlo dropout --------------------------------------------------------------------------


def monte_carlo(make_model, wordpiece, passes: int, **extra: Any) -> dict[str, Any]:
    model = make_model("bert", CLASSIFIER, wordpiece, num_labels=3, **extra)
    return {
        "name": "mc",
        "model": str(model),
        "task": "sequence_classification",
        "monte_carlo": {"passes": passes},
    }


def test_monte_carlo_probabilities(tmp_path, configure, make_model, wordpiece):
    teacher, few = monte_carlo(make_model, wordpiece, 64), {"limit_sequences": 6}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        cache_teachers(configure(tmp_path / name, [teacher], corpus=few, cache={"seed": seed}))
    one, two, other = (Cache.open(tmp_path / name) for name in ("one", "two", "other"))
    directory, gaps = Path(teacher["model"]), []
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(wordpiece))
    for a, b, c in zip(examples(one), examples(two), examples(other), strict=True):
        first, again, seeded = (e.targets["mc"][0] for e in (a, b, c))
        assert first.mc_probs.sum() == pytest.approx(1, abs=1e-5)
        assert (first.mc_probs == again.mc_probs).all()
        assert (first.mc_probs != seeded.mc_probs).any()
        assert (first.logits == seeded.logits).all()  # these are of a pass without dropout
        probs = torch.softmax(torch.tensor(first.logits), -1).numpy()
        assert (first.mc_probs != probs).any()
        # Against passes of our own: 64 and 256 of them, probabilities of a spread below ½.
        model = model_of(directory, CLASSIFIER).train()
        ids = torch.tensor([tokenizer(a.text)["input_ids"]] * 256)
        mean = torch.softmax(model(input_ids=ids).logits, -1).mean(0).detach().numpy()
        model.eval()
        gaps.append(np.abs(first.mc_probs - mean))
    assert np.max(gaps) < 5 * 0.5 * (1 / 64 + 1 / 256) ** 0.5
    # A mean of 64 draws is closer to the mean than one pass would be.
    assert np.mean(gaps) < 0.06


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_monte_carlo_without_dropout_is_refused(tmp_path, configure, make_model, wordpiece, passes):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = monte_carlo(make_model, wordpiece, passes, **still)
    message = rf"'mc': {passes} Monte-Carlo passes are identical.*no dropout"
    with pytest.raises(InputError, match=message):
        cache_teachers(configure(tmp_path, [teacher]))
    assert not (tmp_path / "targets/mc/commits").exists()


def test_an_expert_that_is_sure_whatever_dropout_does_is_not_refused(
    tmp_path, configure, make_model, wordpiece
):
    """Its probabilities are 0 and 1 in every pass; that is certainty, not a lack of dropout."""
    model = Path(shutil.copytree(monte_carlo(make_model, wordpiece, 2)["model"], tmp_path / "sure"))
    weights = load_file(model / "model.safetensors")
    weights["classifier.bias"] = torch.tensor([1e4, 0.0, 0.0])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    teacher = monte_carlo(make_model, wordpiece, 2) | {"model": str(model)}
    cache_teachers(configure(tmp_path / "cache", [teacher]))
    for example in examples(Cache.open(tmp_path / "cache")):
        assert example.targets["mc"][0].mc_probs.tolist() == [1.0, 0.0, 0.0]


def test_monte_carlo_is_for_classes_that_exclude_each_other(
    tmp_path, configure, make_model, wordpiece
):
    """A softmax over labels of which several may hold is no probability of any of them."""
    teacher = monte_carlo(make_model, wordpiece, 4, problem_type="multi_label_classification")
    with pytest.raises(InputError, match="'mc' has 3 labels that do not exclude each other"):
        cache_teachers(configure(tmp_path, [teacher]))


def test_monte_carlo_is_for_classes(tmp_path, configure, make_model, wordpiece):
    """The softmax of a regression's one output is 1 whatever the dropout."""
    teacher = monte_carlo(make_model, wordpiece, 4) | {"task": "regression"}
    with pytest.raises(InputError, match="sequence_classification"):
        configure(tmp_path, [teacher])
