"""The student: what comes out of a pass, and that its directory is everybody's model directory."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import StudentConfig
from rekindle.train.model.files import longest_input
from rekindle.train.model.network import HeadConfig, TaskHead
from rekindle.train.student import Student, build_student

SENSE = HeadConfig(kind="sequence", num_labels=3, label_names=("a", "b", "c"), problem="x")
TAGS = HeadConfig(kind="token", num_labels=5)
# The last ones are names that a ModuleDict has for itself.
HEADS = {"sense": SENSE, "v1.tags": TAGS, "type": SENSE, "keys": TAGS}


@pytest.fixture(scope="module")
def directories(make_model, wordpiece, bytelevel):
    """By task: a model directory with 7 rows more than its tokenizer has tokens."""
    found = {}
    for task, family, auto, tokenizer in (
        ("masked_lm", "bert", "AutoModelForMaskedLM", wordpiece),
        ("causal_lm", "gpt2", "AutoModelForCausalLM", bytelevel),
    ):
        size = load_tokenizer(str(tokenizer)).size
        found[task] = make_model(family, auto, tokenizer, vocab_size=size + 7), size
    return found


def student_of(directories, task="masked_lm", heads=HEADS, seed=0, **config):
    directory, size = directories[task]
    values = {"model": str(directory), "task": task} | config
    return build_student(StudentConfig(**values), heads, size, seed)


def padded():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (3, 9), generator=draw)
    mask = (torch.arange(9) < torch.tensor([9, 1, 4])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def weights(student):
    return {name: value.clone() for name, value in student.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- one pass ---


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_a_pass_gives_what_was_asked_for(directories, task):
    student = student_of(directories, task).eval()
    inputs, select = padded(), torch.tensor([3, 0, 20])
    places = torch.tensor([8, 1])
    output = student(inputs, select, ["sense", "type"], {"v1.tags": places})
    states = student.model.base_model(**inputs).last_hidden_state
    full = student.model(**inputs).logits.flatten(0, 1)[select]
    last = [0, 0, 0] if task == "masked_lm" else [8, 0, 3]  # the first token, or the last real one
    pooled = states[torch.arange(3), last]
    torch.testing.assert_close(
        student.output_head.logits(output.hidden), full[:, : student.vocabulary_size]
    )
    torch.testing.assert_close(output.logits["sense"], student.heads["sense"](pooled))
    torch.testing.assert_close(
        output.logits["v1.tags"], student.heads["v1·tags"](states.flatten(0, 1)[places])
    )
    assert output.logits.keys() == {"sense", "type", "v1.tags"}
    assert output.logits["type"].shape == (3, 3)


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_without_a_selection_there_is_no_lm_pass(directories, task):
    student = student_of(directories, task).eval()
    asked = []
    student.model.get_output_embeddings().register_forward_hook(lambda *a: asked.append(1))
    output = student(padded(), sequence_heads=["sense"])
    assert output.hidden is None
    assert not asked
    with_lm = student(padded(), torch.tensor([0]), ["sense"])
    torch.testing.assert_close(output.logits["sense"], with_lm.logits["sense"])


def test_a_heads_formula():
    head = TaskHead(4, 2, 0.1).eval()
    x = torch.randn(3, 5, 4)
    dense, out = head.dense, head.out
    expected = torch.tanh(x @ dense.weight.T + dense.bias) @ out.weight.T + out.bias
    torch.testing.assert_close(head(x), expected)


def test_a_head_that_fits_a_cached_expert():
    info = TeacherInfo(
        name="t",
        task="sequence_classification",
        kind="sequence",
        view="text",
        num_labels=2,
        label_names=("no", "yes"),
        problem="single_label_classification",
    )
    expected = HeadConfig(
        kind="sequence",
        num_labels=2,
        label_names=("no", "yes"),
        problem="single_label_classification",
    )
    assert HeadConfig.of(info) == expected


def test_padding_rows_are_cut_off_the_output_head(directories):
    student = student_of(directories)
    size = directories["masked_lm"][1]
    assert student.vocabulary_size == size
    assert len(student.output_head.weight) == len(student.output_head.bias) == size
    assert len(student.model.get_output_embeddings().weight) == size + 7


# --- building ---


@pytest.mark.parametrize("scratch", [False, True])
def test_the_same_seed_builds_the_same_student(directories, scratch):
    first, again, other = (
        weights(student_of(directories, seed=seed, from_scratch=scratch)) for seed in (3, 3, 4)
    )
    assert equal(first, again)
    assert not torch.equal(first["heads.sense.out.weight"], other["heads.sense.out.weight"])
    body = "model.bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(first[body], other[body]) != scratch
    kept = load_file(directories["masked_lm"][0] / "model.safetensors")
    assert torch.equal(first[body], kept[body.removeprefix("model.")]) != scratch


def test_scratch_needs_a_configuration_alone(directories, tmp_path):
    directory, size = directories["masked_lm"]
    shutil.copy(directory / "config.json", tmp_path)
    config = StudentConfig(model=str(tmp_path), from_scratch=True)
    assert build_student(config, {}, size, 0).vocabulary_size == size
    with pytest.raises(InputError, match=r"set student\.from_scratch"):
        build_student(StudentConfig(model=str(tmp_path)), {}, size, 0)


@pytest.mark.parametrize("scratch", [False, True])
def test_weights_are_float32_whatever_the_configuration_says(directories, tmp_path, scratch):
    model = AutoModelForMaskedLM.from_pretrained(directories["masked_lm"][0], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    config = StudentConfig(model=str(tmp_path), from_scratch=scratch)
    student = build_student(config, {"sense": SENSE}, directories["masked_lm"][1], 0)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_vocabulary_that_is_too_small_is_refused(directories):
    directory, size = directories["masked_lm"]
    with pytest.raises(InputError, match=f"vocabulary of {size + 7}, .* go up to {size + 7};"):
        build_student(StudentConfig(model=str(directory)), {}, size + 8, 0)
    build_student(StudentConfig(model=str(directory)), {}, size + 7, 0)


def test_sequences_that_are_too_long_are_refused(directories):
    """BERT has 256 positions here; a longer sequence would end in an index error at some step."""
    directory, size = directories["masked_lm"]
    config = StudentConfig(model=str(directory))
    with pytest.raises(InputError, match=r"takes at most 256 tokens, .* up to 257"):
        build_student(config, {}, size, 0, sequence_length=257)
    build_student(config, {}, size, 0, sequence_length=256)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Camembert", "MPNet", "GPT2", "Llama"])
def test_the_longest_input_is_what_the_model_takes(family):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": 40, "max_position_embeddings": 20}
    if family == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20, "vocab_size": 40}
    config = getattr(transformers, family + "Config")(**sizes)
    model = getattr(transformers, family + "Model")(config).eval()
    longest = longest_input(config)
    model(torch.full((1, longest), 5))
    if family != "Llama":  # rotary positions have no end
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, longest + 1), 5))


def test_the_longest_input_of_a_model_without_positions():
    assert longest_input(transformers.BloomConfig()) is None


def test_an_expert_may_become_a_student_with_a_fresh_lm_head(make_model, wordpiece, caplog):
    expert = make_model("bert", "AutoModelForSequenceClassification", wordpiece, num_labels=3)
    size = load_tokenizer(str(wordpiece)).size
    with caplog.at_level(logging.INFO, logger="rekindle"):
        student = build_student(StudentConfig(model=str(expert)), {}, size, 0)
    assert "fresh LM head" in caplog.text
    kept = load_file(expert / "model.safetensors")
    body = student.model.bert.state_dict()
    assert len(body) > 10
    assert all(torch.equal(value, kept["bert." + name]) for name, value in body.items())


def test_a_body_with_a_hole_is_refused(directories, tmp_path):
    directory, size = directories["masked_lm"]
    shutil.copytree(directory, tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of its body \(bert.encoder.layer.1"):
        build_student(StudentConfig(model=str(tmp_path / "m")), {}, size, 0)


def test_pickled_weights_are_refused(directories, tmp_path):
    directory, size = directories["masked_lm"]
    shutil.copy(directory / "config.json", tmp_path)
    torch.save(load_file(directory / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="Pickled weights are not loaded"):
        build_student(StudentConfig(model=str(tmp_path)), {}, size, 0)


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_a_family_without_such_a_model_is_refused(tmp_path, scratch, task):
    config = transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    student = StudentConfig(model=str(tmp_path), task=task, from_scratch=scratch)
    with pytest.raises(InputError, match=r"t5 is an encoder and a decoder.* it can be seq"):
        build_student(student, {}, 50, 0)


# --- saving ---


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_a_saved_student_is_an_ordinary_model_directory(directories, tmp_path, task):
    student = student_of(directories, task).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    student.save_pretrained(tmp_path)
    factory = AutoModelForMaskedLM if task == "masked_lm" else AutoModelForCausalLM
    model, info = factory.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    inputs = padded()
    expected = student.model(**inputs).logits
    torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=0, atol=0)


def test_a_saved_student_comes_back_with_its_heads(directories, tmp_path):
    student = student_of(directories)
    student.save_pretrained(tmp_path, {"made_by": {"steps": 7}})
    again = Student.from_pretrained(tmp_path)
    assert equal(weights(again), weights(student))
    assert again.head_configs == student.head_configs == HEADS
    assert (again.task, again.vocabulary_size) == (student.task, student.vocabulary_size)
    about = json.loads((tmp_path / "rekindle_student.json").read_text())
    assert about["made_by"] == {"steps": 7}
    assert Student.from_pretrained(tmp_path, vocabulary_size=50).vocabulary_size == 50


def test_other_directories_are_no_students(directories, tmp_path):
    with pytest.raises(InputError, match="is not the directory of a student"):
        Student.from_pretrained(directories["masked_lm"][0])
    student_of(directories).save_pretrained(tmp_path)
    (tmp_path / "rekindle_student.json").write_text("{")
    with pytest.raises(InputError, match="is not the directory of a student"):
        Student.from_pretrained(tmp_path)


def test_heads_that_are_gone_are_named(directories, tmp_path):
    student_of(directories).save_pretrained(tmp_path)
    (tmp_path / "heads.safetensors").unlink()
    with pytest.raises(InputError, match=r"a student without its heads\.safetensors"):
        Student.from_pretrained(tmp_path)


def test_heads_are_carried_over_where_they_are_the_same(directories, tmp_path):
    student = student_of(directories)
    student.save_pretrained(tmp_path)
    other = SENSE.model_copy(update={"label_names": ("x", "y", "z")})
    wanted = {"sense": SENSE, "v1.tags": TAGS, "type": other, "new": TAGS}
    again = build_student(
        StudentConfig(model=str(tmp_path)), wanted, directories["masked_lm"][1], seed=99
    )
    assert again.head_configs == wanted  # "keys" is not asked for any more
    before, after = weights(student), weights(again)
    for name in before:
        if name.startswith(("model.", "heads.sense.", "heads.v1·tags.")):
            assert torch.equal(before[name], after[name]), name
    # Three other labels: not the same task, though of the same shape.
    assert not torch.equal(before["heads.type*.out.weight"], after["heads.type*.out.weight"])


def test_scratch_forgets_the_heads_too(directories, tmp_path):
    student = student_of(directories)
    student.save_pretrained(tmp_path)
    config = StudentConfig(model=str(tmp_path), from_scratch=True)
    again = build_student(config, {"sense": SENSE}, directories["masked_lm"][1], 0)
    name = "heads.sense.out.weight"
    assert not torch.equal(weights(again)[name], weights(student)[name])
