"""Adapters of a base in four bits: what is computed, trained, and loaded again is that base."""

import json
from importlib.util import find_spec

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.export.merged import merge_student
from rekindle.train.export.plain import not_exportable
from rekindle.train.loop import train_student
from rekindle.train.model.files import load_language_model, weights_fingerprint
from rekindle.train.model.lora import describe_adapter
from rekindle.train.model.network import HeadConfig
from rekindle.train.model.quantised import quantised_layer, rounded
from rekindle.train.student import build_student, check_student, saved_tensors
from testlib.loop import stop_at
from testlib.models import AUTO

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 7, 96)])
def test_a_layer_computes_with_what_is_rounded_and_hands_its_gradient_on(shape):
    """One row and several: these are separate code."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 64)
    made, weight = quantised_layer(layer, "it"), rounded(layer.weight.data)
    assert 0.01 < float((weight - layer.weight).abs().max() / layer.weight.abs().max()) < 0.2
    states = torch.randn(*shape, requires_grad=True)
    found, expected = made(states), nn.functional.linear(states, weight, layer.bias)
    assert torch.allclose(found, expected, atol=1e-5)
    given = torch.randn_like(found)
    (one,) = torch.autograd.grad(found, states, given)
    (other,) = torch.autograd.grad(expected, states, given)
    assert torch.allclose(one, other, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(made.eval()(states), expected, atol=1e-5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, make_teacher, make_cache):
    path = tmp_path_factory.mktemp("quantised") / "cache"
    make_cache(path, [make_teacher("lm", "causal_lm", 1, targets={"kind": "topk", "k": 8})])
    return Cache.open(path)


@pytest.fixture(scope="module")
def student(make_model, wordpiece):
    model = make_model("llama", AUTO["causal_lm"], wordpiece, 10)
    values = {"model": str(model), "task": "causal_lm", "lora": {"r": 2, "quantize": "nf4"}}
    return parse_settings(StudentConfig, values)


def quick(**values):
    more = {"steps": 4, "batch_sequences": 4, "warmup_steps": 0, "learning_rate": 1e-2}
    more |= {"objective": {"distill": [{"teachers": ["lm"]}]}, "checkpoint_every": 2}
    return parse_settings(TrainConfig, more | {"held_out": 0} | values)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def close(found, expected):
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def test_what_was_trained_is_what_is_loaded_merged_and_fingerprinted(cache, student, tmp_path):
    """And not the base's own weights with the adapter added."""
    train_student(cache, student, quick(), tmp_path / "run")
    about = json.loads((tmp_path / "run" / "rekindle_student.json").read_text())
    assert about["base"]["quantize"] == "nf4"
    size = cache.corpus.info["tokenizer"]["size"]
    again = build_student(student, {}, size, 0)
    own = again.own_weights()
    for name, place in saved_tensors(tmp_path / "run").items():
        own[name].detach().copy_(load_file(place.file)[place.key])
    trained = logits(again.model)
    loaded = load_language_model(tmp_path / "run", "causal_lm")
    assert close(logits(loaded), trained)
    merge_student(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert close(logits(load_language_model(tmp_path / "merged", "causal_lm")), trained)
    print_ = weights_fingerprint(tmp_path / "run")
    del about["base"]["quantize"]
    (tmp_path / "run" / "rekindle_student.json").write_text(json.dumps(about))
    assert not close(logits(load_language_model(tmp_path / "run", "causal_lm")), trained)
    assert weights_fingerprint(tmp_path / "run") != print_


def test_merged_at_the_end_and_gone_on_with_it_is_the_same(cache, student, tmp_path):
    merged = student.model_copy(update={"lora": student.lora.model_copy(update={"merge": True})})
    train_student(cache, merged, quick(), tmp_path / "merged")
    with pytest.raises(KeyboardInterrupt):
        train_student(cache, student, quick(), tmp_path / "run", report=stop_at(3))
    train_student(cache, student, quick(), tmp_path / "run", resume=True)
    sums = [load_language_model(tmp_path / name, "causal_lm") for name in ("merged", "run")]
    assert close(*map(logits, sums))


def test_layers_that_are_no_linear_ones_are_refused(make_model, bytelevel):
    model = make_model("gpt2", AUTO["causal_lm"], bytelevel)
    values = {"model": str(model), "task": "causal_lm", "lora": {"quantize": "nf4"}}
    with pytest.raises(InputError, match="quantize rounds linear layers, but a Conv1D"):
        build_student(parse_settings(StudentConfig, values), {}, 90, 0)


def test_experts_that_are_adapted_as_one_tensor_are_refused(tmp_path):
    """They would be adapted, and not rounded."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"num_key_value_heads": 1, "moe_intermediate_size": 8, "intermediate_size": 8}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    config = transformers.Qwen3MoeConfig(**sizes, vocab_size=90)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    values = {"model": str(tmp_path), "task": "causal_lm", "lora": {"quantize": "nf4"}}
    with pytest.raises(InputError, match=r"linear layers, but .*experts.*, which is not one, is"):
        check_student(parse_settings(StudentConfig, values))
    values["lora"] |= {"target_modules": ["q_proj", "v_proj"]}
    check_student(parse_settings(StudentConfig, values))


def test_what_is_said_of_it_is_what_is_said_of_one_that_is_not_rounded(make_model, wordpiece):
    """Of its parameters, and that its head can be exported, which is merged first."""
    model = make_model("bert", AUTO["masked_lm"], wordpiece)
    said = []
    for more in ({}, {"quantize": "nf4"}):
        config = parse_settings(StudentConfig, {"model": str(model), "lora": {"r": 2} | more})
        head = HeadConfig(kind="sequence", num_labels=3)
        student = build_student(config, {"sense": head}, 0, 0)
        assert not_exportable(student, "sense") is None
        said += [describe_adapter(student, student.adapter, "it")]
    assert said[0] == said[1]
