"""Adapters of peft's, wherever a model folder is taken, are the merged model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.train.answers.score import evaluate
from rekindle.train.config import StudentConfig
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.run import finetune
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.files import load_config, load_language_model, load_weights
from rekindle.train.model.headers import check_teacher_files
from rekindle.train.model.padding import set_padding
from rekindle.train.student import build_student
from testlib.models import AUTO

MASKED, CLASSES = AUTO["masked_lm"], AUTO["sequence_classification"]


@pytest.fixture
def bert(tmp_path, make_model, wordpiece) -> Path:
    return Path(shutil.copytree(make_model("bert", MASKED, wordpiece), tmp_path / "base"))


def adapted(base: Path, target: Path, auto: str = MASKED, seed: int = 1, **settings: object):
    """Save an adapter of ``base`` that changes much; returns its model, merged, and its folder."""
    import peft

    labels = settings.pop("num_labels", None)
    extra = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_pretrained(str(base), **extra)
    if (size := settings.pop("vocabulary", None)) is not None:
        model.resize_token_embeddings(size)
    settings = {"target_modules": ["query", "value"]} | settings
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                values.normal_(std=0.5)
    model.save_pretrained(str(target))
    return model.merge_and_unload().eval(), target


def masked(model: Path, **more: object) -> dict[str, object]:
    return {"name": "lm", "model": str(model), "task": "masked_lm", "targets": {"kind": "dense"}}


def first_log_probs(cache: Path) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    target = Cache.open(cache).example(3).targets["lm"][0]
    order = np.argsort(target.ids, axis=1)
    found = np.take_along_axis(target.log_probs, order, axis=1)
    return torch.from_numpy(target.input_ids.astype(np.int64))[None], target.positions, found


def direct(model, ids: torch.Tensor, positions: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=ids).logits[0, positions].log_softmax(-1).numpy()


def test_a_teachers_targets_are_those_of_the_merged_model(tmp_path, configure, bert):
    merged, folder = adapted(bert, tmp_path / "adapter")
    config = configure(tmp_path / "cache", [masked(folder)])
    cache_teachers(config)
    ids, positions, found = first_log_probs(tmp_path / "cache")
    assert np.abs(found - direct(merged, ids, positions)).max() < 0.02  # of the codec
    base = transformers.AutoModelForMaskedLM.from_pretrained(str(bert)).eval()
    assert np.abs(found - direct(base, ids, positions)).max() > 1
    prints = Cache.open(tmp_path / "cache").teachers["lm"].info.fingerprints
    assert set(prints) == {"weights", "config", "tokenizer", "base", "adapter", "peft"}
    assert cache_teachers(config).units_done == 0


def test_another_adapter_or_base_is_another_teacher(tmp_path, configure, bert):
    _, one = adapted(bert, tmp_path / "one")
    _, other = adapted(bert, tmp_path / "other", seed=2)
    cache_teachers(configure(tmp_path / "cache", [masked(one)]))
    with pytest.raises(CacheMismatchError, match="other adapter and weights"):
        cache_teachers(configure(tmp_path / "cache", [masked(other)]))
    weights = load_file(bert / "model.safetensors")
    changed = {name: values + 1 for name, values in weights.items()}
    save_file(changed, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CacheMismatchError, match="other base and weights"):
        cache_teachers(configure(tmp_path / "cache", [masked(one)]))


def test_a_base_that_is_named_by_a_path_from_elsewhere(tmp_path, configure, bert):
    _, folder = adapted(bert, tmp_path / "runs" / "adapter")
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "base"}
    file.write_text(json.dumps(settings))
    cache_teachers(configure(tmp_path / "cache", [masked(folder)]))
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(InputError, match=r"its base cannot be had.*base_model_name_or_path"):
        cache_teachers(configure(tmp_path / "cache", [masked(folder)]))


def test_a_head_that_an_adapter_brings(tmp_path, configure, bert):
    head = {"num_labels": 3, "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}
    merged, folder = adapted(bert, tmp_path / "a", CLASSES, **head)
    teacher = masked(folder) | {"task": "sequence_classification", "targets": {}}
    cache_teachers(configure(tmp_path / "cache", [teacher]))
    cache = Cache.open(tmp_path / "cache")
    info, example = cache.teachers["lm"].info, cache.example(2)
    assert info.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(bert))
    with torch.no_grad():
        expected = merged(**tokenizer(example.text, return_tensors="pt")).logits[0].numpy()
    found = example.targets["lm"][0].logits
    assert np.abs(found - expected).max() < 1e-4
    with pytest.raises(InputError, match=r"has weights for bert\.pooler"):
        cache_teachers(configure(tmp_path / "d", [masked(folder)]))  # as a masked LM


def test_an_adapter_of_a_classifier_has_its_bases_labels(tmp_path, make_model, wordpiece):
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    base = make_model("bert", CLASSES, wordpiece, **names)
    merged, folder = adapted(base, tmp_path / "adapter", CLASSES)
    data = TaskData(["the old river", "a model"], None, np.array([0, 1]), ("yes", "no"))
    _, logits = evaluate(str(folder), data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(base))
    with torch.no_grad():
        expected = merged(**tokenizer(data.texts[:1], return_tensors="pt")).logits.numpy()
    assert np.abs(logits[:1] - expected).max() < 1e-4


def test_a_student_and_a_finetuned_model_begin_from_the_sum_and_learn(tmp_path, bert):
    merged, folder = adapted(bert, tmp_path / "adapter")
    student = build_student(StudentConfig(model=str(folder)), {}, 100, 0)
    found, expected = student.model.state_dict(), merged.state_dict()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert all(p.requires_grad for p in student.model.parameters())
    rows = [{"text": f"the river {i}", "label": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "rows.jsonl")] * 2
    quick = FinetuneConfig(epochs=1, batch_size=8)
    for name, options in {"lm": {}, "cls": {"num_labels": 5, "task_type": "SEQ_CLS"}}.items():
        _, one = adapted(bert, tmp_path / name, CLASSES if options else MASKED, **options)
        finetune(str(one), *files, str(tmp_path / f"{name}-out"), config=quick)
        made = load_file(tmp_path / f"{name}-out" / "model.safetensors")
        assert made["classifier.weight"].shape[0] == 2
        assert not any("lora" in key for key in made)


def test_a_longer_vocabulary_comes_with_its_embeddings(tmp_path, configure, bert):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(bert))
    tokenizer.add_tokens(["[one]", "[two]"])
    size = len(tokenizer)
    whole = {"modules_to_save": ["word_embeddings"], "vocabulary": size}
    with pytest.warns(UserWarning, match="tie"):
        merged, folder = adapted(bert, tmp_path / "adapter", **whole)
    tokenizer.save_pretrained(folder)
    config = configure(tmp_path / "cache", [masked(folder)], corpus={"tokenizer": str(folder)})
    cache_teachers(config)
    ids, positions, found = first_log_probs(tmp_path / "cache")
    assert found.shape[1] == size
    assert np.abs(found - direct(merged, ids, positions)).max() < 0.02
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: values for name, values in weights.items() if "decoder" not in name}
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    save_file(kept, half / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"decoder\.weight is not in.*would be random"):
        cache_teachers(configure(tmp_path / "h", [masked(half)], corpus={"tokenizer": str(half)}))
    _, bare = adapted(bert, tmp_path / "bare")
    tokenizer.save_pretrained(bare)
    with pytest.raises(InputError, match="embeddings for more than"):
        cache_teachers(configure(tmp_path / "d", [masked(bare)], corpus={"tokenizer": str(bare)}))


def test_adapters_that_cannot_be_merged_are_refused(tmp_path, configure, bert):
    import peft

    model = transformers.AutoModelForMaskedLM.from_pretrained(str(bert))
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
    peft.get_peft_model(model, prompts).save_pretrained(str(tmp_path / "prompts"))
    with pytest.raises(InputError, match="PROMPT_TUNING, which cannot be merged"):
        cache_teachers(configure(tmp_path / "c", [masked(tmp_path / "prompts")]))
    assert not (tmp_path / "c" / "targets").exists()


def test_a_base_of_another_size_or_a_quantised_one_is_told_before_the_corpus(
    tmp_path, configure, bert, make_model, wordpiece
):
    _, folder = adapted(bert, tmp_path / "adapter")
    larger = make_model("bert", MASKED, wordpiece, hidden_size=64)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base_model_name_or_path": str(larger)}))
    told = (
        r"query\.weight by a matrix \[32, 32\], but that of its base .* is \[64, 64\].*base_model"
    )
    with pytest.raises(InputError, match=told):
        check_teacher_files(folder, "masked_lm", "teacher 'x'")
    file.write_text(json.dumps(settings))
    weights = load_file(bert / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    weights |= {name: weights[name].to(torch.int8), f"{name}_scale": torch.ones(1)}
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    base = json.loads((bert / "config.json").read_text())
    base["quantization_config"] = {"quant_method": "gptq", "bits": 8}
    (bert / "config.json").write_text(json.dumps(base))
    with pytest.raises(InputError, match="an adapter is merged into whole weights: dequantise"):
        check_teacher_files(folder, "masked_lm", "teacher 'x'")


def test_what_is_set_of_a_student_goes_before_its_base(tmp_path, bert):
    _, folder = adapted(bert, tmp_path / "adapter")
    file = bert / "config.json"
    settings = json.loads(file.read_text()) | {"attn_implementation": "flash_attention_2"}
    file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="flash_attn is not installed"):
        build_student(StudentConfig(model=str(folder)), {}, 100, 0)
    student = build_student(StudentConfig(model=str(folder), attention="eager"), {}, 100, 0)
    assert student.model.config._attn_implementation == "eager"


def test_a_family_without_a_padding_id(tmp_path):
    sizes = {"vocab_size": 90, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    config = transformers.CodeGenConfig(n_positions=32, **sizes)
    transformers.CodeGenForCausalLM(config).save_pretrained(tmp_path / "base")
    options = {"auto": AUTO["causal_lm"], "target_modules": ["qkv_proj"]}
    merged, folder = adapted(tmp_path / "base", tmp_path / "adapter", **options)
    found = load_language_model(folder, "causal_lm").state_dict()
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in merged.state_dict().items())


def test_the_padding_id_is_set_in_a_text_part_too(tmp_path):
    """A classifier's head reads it there."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24}
    text = sizes | {"vocab_size": 90, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, num_labels=2, mm_tokens_per_image=4
    )
    transformers.Gemma3ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    _, folder = adapted(tmp_path / "base", tmp_path / "a", CLASSES, target_modules=["q_proj"])
    given = load_config(folder, CLASSES)
    set_padding(given, 7)
    found = load_weights(folder, CLASSES, torch.float32, "it", config=given).model.config
    assert found.get_text_config().pad_token_id == 7
