"""Tokens are shown as the text that they stand for, whatever family their tokenizer is of."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rekindle.data.corpus.pieces import PieceTexts
from rekindle.data.corpus.tokenizer import load_tokenizer


def sentencepiece(prepend):
    """As XLM-R and DeBERTa have it (Metaspace), or Llama 2 (Replace, ByteFallback)."""
    pieces = ["<unk>", "<0xE4>", "<0x0A>", "▁the", "ing", "▁"]
    if prepend:
        backend = Tokenizer(models.Unigram([(p, -1.0) for p in pieces], 0, byte_fallback=True))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("prepend", [True, False])
def test_sentencepiece(prepend):
    texts = PieceTexts(sentencepiece(prepend))
    assert [texts[n] for n in range(6)] == ["<unk>", "\\xe4", "\n", " the", "ing", " "]
    assert texts[99] == "<99>"


def test_wordpiece(wordpiece):
    hf = load_tokenizer(str(wordpiece)).hf
    texts = PieceTexts(hf)
    found = [texts[hf.convert_tokens_to_ids(piece)] for piece in ("[MASK]", "a", "##a")]
    assert found == ["[MASK]", " a", "a"]


def test_bytes(bytelevel):
    hf = load_tokenizer(str(bytelevel)).hf
    texts = PieceTexts(hf)
    ids = hf("The river, naïve 中 <|endoftext|>\n")["input_ids"]
    shown = [texts[number] for number in ids]
    assert "\\xc3" in shown  # half of ï, which no token of this vocabulary has whole
    assert "<|endoftext|>" in shown
    assert shown[-1] == "\n"
    assert not {"Ġ", "Ã"} & {*"".join(shown)}
