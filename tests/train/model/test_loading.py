"""One list of causes why a model cannot be had, whoever asks for it: each one message, exit 2."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rekindle.data.errors import InputError
from rekindle.train.config import StudentConfig
from rekindle.train.finetune.classifier import classifier_config, load_trained, padded_tokenizer
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.files import (
    load_config,
    load_language_model,
    load_model,
    new_language_model,
    weights_fingerprint,
)
from rekindle.train.model.folder import ADAPTER_WEIGHTS, resolve_model, stored_tensors
from rekindle.train.model.headers import check_expert_files
from rekindle.train.student import build_student, saved_tensors
from testlib.models import AUTO

MASKED, CLASSES = AUTO["masked_lm"], AUTO["sequence_classification"]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 123456\n"


@pytest.fixture
def bert(tmp_path, make_model, wordpiece) -> Path:
    return copied(make_model("bert", MASKED, wordpiece), tmp_path / "model")


@pytest.fixture
def expert(tmp_path, make_model, wordpiece) -> Path:
    return copied(make_model("bert", CLASSES, wordpiece, num_labels=3), tmp_path / "expert")


def copied(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    return target


def change(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    settings = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def as_teacher(path: Path) -> None:
    load_model(resolve_model(str(path)), MASKED, torch.float32)


def as_student(path: Path) -> None:
    build_student(StudentConfig(model=str(path)), {}, 100, 0)


def as_new_student(path: Path) -> None:
    build_student(StudentConfig(model=str(path), from_scratch=True), {}, 100, 0)


def as_expert(path: Path) -> None:
    load_trained(str(path))


LOADERS = (as_teacher, as_student, as_expert)


def refused(path: Path, *words: str, loaders=(*LOADERS, as_new_student)) -> None:
    """Each loader gives the same error, with the words in it."""
    for load in loaders:
        with pytest.raises(InputError) as caught:
            load(path)
        assert caught.value.exit_code == 2
        for word in words:
            assert word in str(caught.value), (load, str(caught.value))


# --- the folder -----------------------------------------------------------------------------------


def test_a_git_lfs_pointer_is_called_so(bert):
    (bert / "model.safetensors").write_text(POINTER)
    refused(bert, "model.safetensors is a git-lfs pointer", "git lfs pull", loaders=LOADERS)
    (bert / "config.json").write_text(POINTER)
    refused(bert, "config.json is a git-lfs pointer", loaders=[as_new_student])


@pytest.mark.parametrize("cut", [4, 1000, -100])
def test_weights_that_are_cut_off(bert, cut):
    file = bert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refused(bert, str(file), "truncated", "again", loaders=LOADERS)


HEADERS = {
    "a type that is none": ({"dtype": -1}, "the header says"),
    "a type that there is not": ({"dtype": "F33"}, "the header says"),
    "a place in a list": ({"data_offsets": [[0], 4]}, "the header says"),
    "a shape of other bytes": ({"shape": [1, 1]}, "F32 values of the shape [1, 1] are not its"),
    "no shape": ({"shape": None}, "the header says"),
    "the place of another tensor": ({"data_offsets": [4, 132]}, "it begins at byte 4, but the one"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_held_against_itself_and_the_tensor_named(bert, case):
    values, told = HEADERS[case]
    file = bert / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    # The first one, of 32 values: none may begin where it begins.
    name = min(
        (name for name in entries if name != "__metadata__"),
        key=lambda name: entries[name]["data_offsets"],
    )
    entries[name] |= {"shape": [32]} if "shape" not in values else {}
    entries[name] |= values
    said = json.dumps(entries).encode()
    file.write_bytes(len(said).to_bytes(8, "little") + said + content[end:])
    refused(
        bert,
        f"{file} is damaged: its header is wrong about the tensor",
        repr(name),
        told,
        loaders=LOADERS,
    )


def test_shards_of_which_one_is_missing(bert):
    (bert / "model.safetensors").rename(bert / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(bert, "lacks model-1.safetensors", loaders=LOADERS)


@pytest.mark.parametrize("shards", ["gone", "there", "cut off"])
def test_one_file_goes_before_the_shards_of_an_older_save(bert, tmp_path, shards):
    """transformers loads the one file; a save in place leaves the other's index behind."""
    fresh = weights_fingerprint(bert)
    kept = load_file(bert / "model.safetensors")
    (bert / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )
    if shards != "gone":
        save_file({"a": torch.ones(1)}, bert / "model-00001-of-00001.safetensors")
    if shards == "cut off":
        (bert / "model-00001-of-00001.safetensors").write_bytes(b"0123")
    for load in LOADERS[:2]:
        load(bert)
    assert weights_fingerprint(bert) == fresh
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(load_language_model(bert, "masked_lm").state_dict()[name], kept[name])
    save_file({}, bert / "heads.safetensors")
    assert saved_tensors(bert)[f"model.{name}"].file.name == "model.safetensors"
    assert weights_fingerprint(bert) != fresh  # the heads are the student's


def test_a_gguf_file_and_an_adapter_without_its_settings(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "GGUF file (model-q4.gguf)")
    (tmp_path / "model-q4.gguf").rename(tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "adapter_config.json")


def test_an_adapter_beside_whole_weights_is_refused_by_both_names(bert):
    (bert / "adapter_config.json").write_text("{}")
    refused(bert, "adapter_config.json", "model.safetensors")


def test_an_adapter_needs_peft_and_says_so_once(bert, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"base_model_name_or_path": str(bert), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / ADAPTER_WEIGHTS)
    monkeypatch.setattr("rekindle.train.model.adapter.find_spec", lambda name: None)
    refused(folder, "is an adapter", "pip install -e '.[peft]'", "Merge it")
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "pickled")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"adapter .* without its weights, adapter_model\.saf"):
        stored_tensors(folder)


# --- config.json ----------------------------------------------------------------------------------


def test_a_configuration_that_is_no_json(bert):
    (bert / "config.json").write_text("{")
    refused(bert, "config.json is not JSON")
    (bert / "config.json").write_text("[]")
    refused(bert, "config.json holds list")


def test_no_model_type(bert):
    change(bert, model_type=None)
    refused(bert, "config.json has no model_type")


def test_code_that_comes_with_a_model_is_not_run(bert):
    (bert / "own.py").write_text("raise SystemExit('ran')")
    change(bert, model_type="own", auto_map={"AutoConfig": "own.Config"})
    refused(bert, "auto_map", "remote code is off")


def test_an_unknown_activation(bert):
    change(bert, hidden_act="gelou")
    refused(bert, "no activation 'gelou'", "hidden_act")


@pytest.mark.parametrize("named", ["BertForMaskedLM", [3], [["BertForMaskedLM"]], {"a": "b"}])
def test_the_class_that_it_was_saved_as_is_a_list_of_names(bert, named):
    change(bert, architectures=named)
    refused(bert, "config.json: architectures is ", '["BertForMaskedLM"]')


@pytest.mark.parametrize(("key", "size"), [("type_vocab_size", -1), ("hidden_size", 2**31)])
def test_a_size_that_no_model_has(bert, key, size):
    change(bert, **{key: size})
    refused(bert, f"config.json: {key} is {size:,}; it must be from 0 to 2,147,483,647")


@pytest.mark.parametrize("share", [-1, 1.5, float("nan")])
def test_a_dropout_that_is_no_probability(bert, share):
    change(bert, hidden_dropout_prob=share)
    refused(bert, f"config.json: hidden_dropout_prob is {share}; it must be from 0 to 1")


def test_what_transformers_says_after_drawing_a_model(bert):
    change(bert, add_cross_attention=True)
    told = "should be used as a decoder model if cross attention is added"
    refused(bert, "config.json", told, loaders=[as_new_student])


def test_values_that_make_no_model(bert):
    change(bert, num_attention_heads=5)
    refused(bert, str(bert))
    change(bert, num_attention_heads="two")
    refused(bert, str(bert))


def test_a_value_of_a_wrong_type_is_told_with_what_it_is(bert):
    change(bert, hidden_size="big")
    refused(bert, "config.json cannot be used", "'hidden_size': ", "expected int", "'big'")


def test_tensors_of_another_shape_are_named_with_both(bert):
    change(bert, intermediate_size=50)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    refused(bert, f"tensor {name} is [48, 32] in the file and [50, 32] by", loaders=LOADERS)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("bitsandbytes", "bitsandbytes"),
        ("gptq", "gptqmodel"),
        ("awq", "gptqmodel"),
        ("compressed-tensors", "compressed_tensors"),
        ("quark", "quark"),
        ("fp8", None),
    ],
)
def test_quantised_weights_are_called_so(bert, method, package):
    """Where the package is installed, a teacher is what it makes of them."""
    there = package is not None and find_spec(package) is not None
    loaders = [load for load in LOADERS if not (there and load is as_teacher)]
    weights = load_file(bert / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    weights |= {name: weights[name].to(torch.int8), f"{name}_scale": torch.ones(1)}
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    refused(bert, "weights are quantised", "no quantization_config", "dequant", loaders=LOADERS)
    change(bert, quantization_config={"quant_method": method, "load_in_8bit": True})
    refused(bert, f"quantised by {method}", "dequantise", loaders=loaders)
    if package and not there:
        pip = {"quark": "amd-quark"}.get(package, package.replace("_", "-"))
        told = f"{package} is not installed. Install it (pip install {pip})"
        refused(bert, told, loaders=[as_teacher])
    new = new_language_model(bert, "masked_lm")  # new weights are none of these
    assert not hasattr(new.config, "quantization_config")


def test_a_quantisation_that_is_left_over_is_called_so(bert):
    change(bert, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(bert, "plain (F32)", "left over", "Remove quantization_config", loaders=LOADERS)


def test_float64_is_no_quantisation(bert):
    weights = {k: v.double() for k, v in load_file(bert / "model.safetensors").items()}
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    for load in LOADERS[:2]:
        load(bert)
    change(bert, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(bert, "plain (F64)", "left over", loaders=LOADERS)


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        ("flash_attention_2", "flash_attn is not installed"),
        ("kernels-community/flash-attn", "download"),
    ],
)
def test_attention_that_is_not_there_or_would_be_downloaded(bert, attention, told):
    change(bert, attn_implementation=attention)
    refused(bert, str(bert / "config.json"), attention, told, "sdpa")
    config = StudentConfig(model=str(bert), attention="sdpa")
    build_student(config, {}, 100, 0)  # what the run file says goes first


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"1": "a", "2": "b"}, ["LABEL_0", "a", "b"]),
        ({"0": "a", "2": "c"}, ["a", "LABEL_1", "c"]),
        ({"1": "a", "2": "b", "3": "c"}, ["LABEL_0", "a", "b"]),
        ({"0": "a", "1": "b"}, ["a", "b", "LABEL_2"]),
        (None, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_the_head_says_how_many_labels_there_are(expert, given, names, caplog):
    change(expert, id2label=given, label2id=None)
    config = load_config(expert, CLASSES)
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: number for number, name in enumerate(names)}
    assert "its head has 3 outputs" in caplog.text
    assert "LABEL_" in caplog.text
    model = load_model(expert, CLASSES, torch.float32)
    assert torch.equal(
        model.classifier.weight, load_file(expert / "model.safetensors")["classifier.weight"]
    )


def test_names_without_an_output_name_nothing_and_that_is_said(expert, caplog):
    change(expert, id2label={str(i): f"l{i}" for i in range(5)}, label2id=None)
    assert load_model(expert, CLASSES, torch.float32).config.id2label == {0: "l0", 1: "l1", 2: "l2"}
    assert "id2label" in caplog.text
    assert "3 ('l3'), 4 ('l4'): no output has that number" in caplog.text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"x": "a", "y": "b", "z": "c"}, "id2label has the key 'x', which is not a number"),
        (["a", "b", "c"], "id2label is a list, not an object"),
    ],
)
def test_labels_that_are_no_numbers_with_names(expert, given, told):
    change(expert, id2label=given, label2id=None)
    refused(expert, "config.json", told, '{"0": "no", "1": "yes"}', loaders=[as_expert])


def test_an_experts_body_is_checked_by_headers_and_its_head_is_not(expert):
    change(expert, id2label={str(i): f"l{i}" for i in range(4)}, label2id=None)
    check_expert_files(expert)
    change(expert, intermediate_size=50)
    with pytest.raises(InputError, match=r"intermediate.*is \[48, 32\] in the file and \[50, 32"):
        check_expert_files(expert)


# --- the forward pass -----------------------------------------------------------------------------


def test_a_model_whose_own_code_fails_is_named(tmp_path, make_model, wordpiece):
    """T5's decoder begins with a token that the configuration has to name."""
    import transformers

    tokenizer = padded_tokenizer_of(make_model, wordpiece)
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    config = transformers.T5Config(vocab_size=len(tokenizer), num_labels=2, **sizes)
    config.eos_token_id = tokenizer.sep_token_id
    model = transformers.T5ForSequenceClassification(config)
    model.config.decoder_start_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from rekindle.train.answers.score import evaluate

    labels = torch.zeros(1, dtype=torch.int64).numpy()
    names = ("LABEL_0", "LABEL_1")
    data = TaskData(["a river"], None, labels, names)
    with pytest.raises(InputError, match=r"fails when it is run.*decoder_start_token_id"):
        evaluate(str(tmp_path), data)


def padded_tokenizer_of(make_model, wordpiece):
    return padded_tokenizer(str(make_model("bert", MASKED, wordpiece)))


def test_memory_that_runs_out_is_not_the_models_fault(bert, monkeypatch):
    import transformers

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(transformers.AutoModelForMaskedLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_language_model(bert, "masked_lm")


def test_an_experts_configuration_alone_is_read_by_its_own_loader(expert):
    assert classifier_config(str(expert)).num_labels == 3
