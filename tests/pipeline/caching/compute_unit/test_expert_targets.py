"""What the cache holds of experts is what they say: sequences, pairs, words, Monte Carlo."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.example import SequenceTargets, TokenLabelTargets
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from testlib.caches import examples
from testlib.models import STILL
from testlib.run_alone import CLASSIFIER, NOISE, logits_of, model_of

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


def test_an_expert_whose_tokenizer_makes_nothing_of_the_texts_is_refused(
    tmp_path, configure, make_model, wordpiece
):
    """Another family's, loaded as its own: transformers does that by the model's kind."""
    model = Path(shutil.copytree(make_model("bert", CLASSIFIER, wordpiece), tmp_path / "expert"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<pad>": 0}, [])), pad_token="<pad>"
    ).save_pretrained(model)
    teacher = {"name": "deaf", "model": str(model), "task": "sequence_classification"}
    with pytest.raises(
        InputError, match=r"'deaf': its tokenizer gives no token for any of \d+ texts"
    ):
        cache_teachers(configure(tmp_path / "cache", [teacher]))


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
    still = STILL
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
