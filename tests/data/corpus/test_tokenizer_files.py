"""A tokenizer that cannot be read is blamed on the file that is wrong, and on no other."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rekindle.data.corpus import tokenizer_files
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.data.errors import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def refused(directory, *words):
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(directory))
    for word in words:
        assert word in str(caught.value), caught.value
    return str(caught.value)


@pytest.fixture
def changed(tmp_path, wordpiece):
    """changed(file, content): the tokenizer with one other file."""

    def make(name, content):
        target = tmp_path / "tokenizer"
        shutil.copytree(wordpiece, target)
        (target / name).write_text(content)
        return target

    return make


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "told"),
    [("{bad", "is not JSON"), ("[]", "holds list, not an object"), (POINTER, "git-lfs pointer")],
)
def test_the_file_that_is_no_json_object_is_named(changed, name, content, told):
    refused(changed(name, content), f"tokenizer/{name} {told}".replace("git", "is a git"))


def test_a_configuration_that_is_none_is_no_fault_of_the_tokenizer(changed):
    wrong = json.dumps({"model_type": "bert", "hidden_size": "wide"})
    told = refused(changed("config.json", wrong), "tokenizer/config.json cannot be used")
    assert "hidden_size" in told
    assert not told.startswith("tokenizer ")


@pytest.mark.parametrize("text", ["a", "b"])
def test_a_character_that_a_tokenizer_does_not_know_wants_an_unknown_token(tmp_path, text):
    """The library raises a bare Exception: as it is read here, or at a text."""
    known = {"<pad>": 0} | ({"a": 1} if text == "b" else {})
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(known)), pad_token="<pad>"
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"cannot encode a text: .*needs an unknown token"):
        load_tokenizer(str(tmp_path)).encode([text])


@pytest.mark.parametrize(
    "name", ["spm.model", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"]
)
@pytest.mark.parametrize("with_config", [False, True])
def test_a_sentencepiece_model_wants_sentencepiece(tmp_path, monkeypatch, name, with_config):
    """DeBERTa-v3, ALBERT and T5, Llama 2, XLM-R."""
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda package: None)
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    assert has_tokenizer_files(tmp_path)
    told = refused(tmp_path, name, "pip install -e '.[sentencepiece]'", "tokenizer.json")
    assert "tiktoken" not in told


def test_a_sentencepiece_model_beside_a_tokenizer_json_wants_nothing(changed, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda package: None)
    assert load_tokenizer(str(changed("spiece.model", "\n"))).size == 168


def test_tiktokens_own_files_are_not_sentencepieces(tmp_path, monkeypatch):
    """Llama 3's tokenizer.model is of the other kind: a line for each token."""
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda package: None)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    tokenizer_files._check_pieces(tmp_path)
