"""Tokenizers that are a sentencepiece model alone are read as sentencepiece itself reads them."""

import json
import shutil

import pytest

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.storage.store import LocalStore

TEXT = "the old river runs under the new city and keeps its water cold in winter"
ALBERT = {
    **{"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1},
    "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
}
KINDS = {
    "xlm-roberta": ("unigram", "sentencepiece.bpe.model", {}),
    "t5": ("unigram", "spiece.model", {}),
    "albert": ("unigram", "spiece.model", ALBERT),
    "deberta-v2": ("unigram", "spm.model", ALBERT),
    "llama": ("bpe", "tokenizer.model", {"byte_fallback": True, "vocab_size": 340}),
}


@pytest.fixture(params=KINDS)
def bare(request, tmp_path):
    """A directory with the model alone (and its configuration), and sentencepiece's own reader."""
    import sentencepiece

    kind, name, options = KINDS[request.param]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{TEXT} number {n * 7}" for n in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        **{"input": str(text), "model_prefix": str(tmp_path / "model"), "model_type": kind},
        **{"vocab_size": 80, "minloglevel": 2} | options,
    )
    target = tmp_path / "tokenizer"
    target.mkdir()
    shutil.copy(tmp_path / "model.model", target / name)
    (target / "config.json").write_text(json.dumps({"model_type": request.param}))
    return target, sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model.model"))


def test_its_pieces_are_sentencepieces(bare, tmp_path):
    directory, model = bare
    tokenizer = load_tokenizer(str(directory))
    (found,) = tokenizer.encode([TEXT])
    assert tokenizer.hf.convert_ids_to_tokens(found.ids.tolist()) == model.encode(
        TEXT, out_type=str
    )
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).digest == tokenizer.digest
    (tmp_path / "docs.txt").write_text(f"{TEXT}\n\n{TEXT}.\n")
    config = CorpusConfig(source=str(tmp_path / "docs.txt"), tokenizer=str(directory))
    corpus = build_corpus(LocalStore(tmp_path / "cache"), config, 10)
    assert corpus.rows(0, 0, 1)["text"].to_pylist() == [TEXT]
