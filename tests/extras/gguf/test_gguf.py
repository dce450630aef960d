"""Models in llama.cpp's format: the folder made of one has the weights that transformers reads."""

import json

import pytest
import torch

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import load_config
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.model.files import load_model
from rekindle.train.model.folder import resolve_model

HIDDEN, INNER, HEADS, LAYERS = 32, 64, 2, 2
WORDS = ["the", "a", "of", "river", "runs", "city", "light", "falls"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer; its matrices are in blocks of eight bits."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("models") / "tiny.Q8_0.gguf"
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = ["<|endoftext|>", "<|start|>", "<|end|>", *letters, "Ġ"]
    merges = []
    for word in WORDS:
        for size in range(2, len(word) + 1):
            if word[:size] not in tokens:
                merges.append(f"{word[: size - 1]} {word[size - 1]}")
                tokens.append(word[:size])
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    draw = np.random.default_rng(0)

    def matrix(name, rows, columns):
        values = draw.normal(0, 0.2, (rows, columns)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", len(tokens), HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            matrix(f"blk.{layer}.{name}.weight", INNER, HIDDEN)
        matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REKINDLE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def test_the_folder_says_what_transformers_reads(file):
    import transformers

    folder = resolve_model(str(file))
    read = {"gguf_file": file.name, "dtype": torch.float32}
    direct = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), **read)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        ours = load_model(folder, "AutoModelForCausalLM", torch.float32)(input_ids=ids).logits
        assert torch.equal(ours, direct(input_ids=ids).logits)
    about = json.loads((folder / "gguf.json").read_text())
    assert about["file"] == file.name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(file)) == folder  # made once
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    text = "the river runs"
    theirs = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    for place in (str(file), str(folder)):
        tokenizer = load_tokenizer(place)
        own = tokenizer.encoder.texts([text]).tokens.ids.tolist()
        assert own == theirs(text, add_special_tokens=False)["input_ids"]


def test_a_file_of_the_same_name_is_another_model(file, tmp_path):
    other = tmp_path / file.name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # in a weight
    other.write_bytes(content)
    assert resolve_model(str(other)) != resolve_model(str(file))


def run_file(file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join("the river runs of a city light falls the light" for _ in range(40)))
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "corpus": {
                    "source": [str(text)],
                    "tokenizer": str(file),
                    "sequence_length": 32,
                    "limit_sequences": 4,
                },
                "cache": {"path": str(tmp_path / "cache")},
                "teachers": [
                    {
                        "name": "tiny",
                        "model": str(file.parent),
                        "gguf_file": file.name,
                        "task": "causal_lm",
                    }
                ],
                "student": {"model": str(file), "task": "causal_lm"},
                "train": {"steps": 2, "batch_sequences": 2, "held_out": 0},
            }
        )
    )
    return path


def test_both_stages_with_the_file_as_teacher_and_student(file, tmp_path):
    run = run_file(file, tmp_path)
    config = load_config(run)
    assert config.teachers[0].model == str(file)  # both ways of saying it are one
    cache_teachers(config)
    train_from_config(config, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"PK..", "does not begin with GGUF"), (None, "cannot be read: .*is it truncated")],
)
def test_what_is_no_model(file, tmp_path, content, told):
    """Nothing is left where a model would be looked for."""
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content if content is not None else file.read_bytes()[:3000])
    with pytest.raises(InputError, match=told) as caught:
        resolve_model(str(bad))
    assert str(bad) in str(caught.value)
    assert not list((resolve_model(str(file)).parent).glob("bad*/config.json"))


def test_a_file_that_is_not_there_and_a_key_that_names_none(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        resolve_model(str(tmp_path / "none.gguf"))
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        TeacherConfig(name="a", model="b", task="causal_lm", gguf_file="model.safetensors")
