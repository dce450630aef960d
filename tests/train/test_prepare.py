"""Ways to run the same student: compiled, with less memory, with another attention."""

from functools import partialmethod

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.bert.modeling_bert import BertAttention

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import blocks
from rekindle.train.loop import train_student
from rekindle.train.prepare import _log_not_exportable
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student, build_student
from testlib.models import STILL

DISTILL = [{"teachers": ["big"], "temperature": 2.0}, {"teachers": ["sense", "tags"]}]


def run(world, out, attention="auto", **values):
    quick = {"steps": 4, "batch_sequences": 4, "warmup_steps": 1, "held_out": 0.1}
    quick |= {"learning_rate": 1e-3, "objective": {"distill": DISTILL}}
    config = parse_settings(TrainConfig, quick | values)
    student = StudentConfig(model=str(world.student), attention=attention)
    train_student(world.open(), student, config, out)
    return out


def losses(out):
    return [r["loss"] for r in read_metrics(out)]


@pytest.fixture(scope="module")
def plain(masked_world, tmp_path_factory):
    return run(masked_world, tmp_path_factory.mktemp("plain") / "run")


def test_computing_activations_again_changes_no_bit(masked_world, plain, tmp_path, monkeypatch):
    """Dropout is drawn again as it was."""
    calls = []
    forward = BertAttention.forward

    def counting(self, *arguments, **options):
        calls.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BertAttention, "forward", counting)
    out = run(masked_world, tmp_path / "run", gradient_checkpointing=True)
    # Two layers, in the masked pass and in the clean one of four steps; each again going backward.
    assert sum(calls) == 2 * 2 * 4 * 2
    assert losses(out) == losses(plain)
    ours, theirs = (load_file(o / "model.safetensors") for o in (out, plain))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_heads_that_will_not_be_exported_are_told_before_training(plain, caplog):
    """A student of heads on tokens; what it is told draws nothing that training draws."""
    student = Student.from_pretrained(plain)
    assert {one.kind for one in student.head_configs.values()} == {"sequence", "token"}
    state = torch.get_rng_state()
    with caplog.at_level("INFO", logger="rekindle"):
        _log_not_exportable(student)
    assert torch.equal(torch.get_rng_state(), state)
    (line,) = caplog.messages
    assert "the head 'tags' cannot be exported: BertForTokenClassification has no place" in line
    assert "--set student.head=family" in line


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_is_the_one_asked_for(masked_world, tmp_path, attention, caplog):
    with caplog.at_level("INFO", logger="rekindle"):
        run(masked_world, tmp_path / attention, attention)
    assert f"student: {attention} attention" in caplog.text


def test_an_attention_that_a_model_has_not_is_refused(masked_world, tmp_path):
    with pytest.raises(InputError, match=r"student.attention asks for .* flash_attn is not"):
        run(masked_world, tmp_path / "run", "flash_attention_2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_train_the_same_student(
    masked_world, make_model, wordpiece, tmp_path, monkeypatch, backend
):
    """Dropout is drawn otherwise, so it is off. The quick backend writes and builds no C++."""
    compiled_by = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled_by)
    off = STILL | {"hidden_size": 16}
    path = make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **off)
    student = StudentConfig(model=str(path))
    found = []
    for compiled in (False, True):
        values = {"steps": 3, "batch_sequences": 4, "held_out": 0.1, "warmup_steps": 1}
        values |= {"compile": compiled, "objective": {"distill": DISTILL}}
        config = parse_settings(TrainConfig, values)
        out = tmp_path / str(compiled)
        train_student(masked_world.open(), student, config, out)
        found.append(losses(out))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("bert", 2), ("deberta", 2), ("modernbert", 2), ("gpt2", 2), ("llama", 2)],
)
def test_blocks_are_the_models_layers(make_model, wordpiece, bytelevel, family, layers):
    causal = family in ("gpt2", "llama")
    auto, tokenizer = ("CausalLM", bytelevel) if causal else ("MaskedLM", wordpiece)
    model = make_model(family, f"AutoModelFor{auto}", tokenizer)
    task = "causal_lm" if causal else "masked_lm"
    student = build_student(StudentConfig(model=str(model), task=task), {}, 5, 0)
    found = blocks(student.model)
    assert len(found) == layers
    inside = {id(p) for block in found for p in block.parameters()}
    assert id(student.output_head.weight) not in inside
    assert id(student.model.get_input_embeddings().weight) not in inside
