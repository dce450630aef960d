"""Students that are adapters: what they compute, what of them is trained, saved and loaded."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import World
from rekindle.train.loop import train_student
from rekindle.train.model.files import load_language_model
from rekindle.train.prepare import prepare
from rekindle.train.student import Student
from testlib.loop import CPU, stop_at
from testlib.models import AUTO
from testlib.students import metrics, same_gradients

TERMS = [{"teachers": ["lm"]}, {"teachers": ["sense"], "weight": 0.5}]


def student_config(model, task, **lora):
    values = {"r": 2, "alpha": 6} | lora
    return parse_settings(StudentConfig, {"model": str(model), "task": task, "lora": values})


def train_config(terms=TERMS, /, **values):
    quick = {
        "steps": 6,
        "batch_sequences": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "checkpoint_every": 2,
        "evaluate_every": 3,
        "held_out": 0.2,
        "log_gradients_every": 3,
        "objective": {"distill": terms},
    }
    return parse_settings(TrainConfig, quick | values)


def train(taught, task, out, config=None, lora=None, **options):
    cache, model = taught(task)
    student = student_config(options.pop("model", model), task, **(lora or {}))
    return train_student(cache, student, config or train_config(), out, **options)


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def still(model, folder):
    """A copy of a model without dropout."""
    made = shutil.copytree(model, folder)
    config = json.loads((made / "config.json").read_text())
    drop = {name: 0.0 for name in config if name.endswith(("dropout", "dropout_prob"))}
    (made / "config.json").write_text(json.dumps(config | drop))
    return made


def by_hand(model, task, lora, targets, size, scale=3.0):
    """The loss of sequences as a formula of A and B, with gradients: the base's own forward pass
    with W + scale·B·A in place of each W; KL of the kept candidates and the rest, and CE.
    """
    base = getattr(transformers, AUTO[task]).from_pretrained(str(model)).eval()
    leaves = {name: values.clone().requires_grad_() for name, values in lora.items()}
    weights = {name: values.detach().clone() for name, values in base.named_parameters()}
    for name, low in leaves.items():
        if ".lora_A." in name:
            whole = name.removeprefix("base_model.model.").replace(".lora_A", "")
            high = leaves[name.replace("lora_A", "lora_B")]
            weights[whole] = weights[whole] + scale * high @ low
    kl, ce = [], []
    for target in targets:
        ids = torch.from_numpy(target.input_ids.astype("int64"))[None]
        logits = functional_call(base, weights, kwargs={"input_ids": ids}).logits[0]
        logp = logits[torch.from_numpy(target.positions.astype("int64")), :size].log_softmax(-1)
        kept = torch.from_numpy(target.ids.astype("int64"))
        logq = torch.from_numpy(target.log_probs).float()
        rest_q = torch.from_numpy(target.log_tail[1.0]).float()
        rest_p = (1 - logp.gather(1, kept).exp().sum(1)).log()
        kl += [
            (logq.exp() * (logq - logp.gather(1, kept))).sum(1) + rest_q.exp() * (rest_q - rest_p)
        ]
        gold = torch.from_numpy(target.gold_ids.astype("int64"))
        ce += [-logp.gather(1, gold[:, None])[:, 0]]
    loss = torch.cat(ce).mean() + torch.cat(kl).mean()
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_a_step_is_that_of_a_direct_computation(taught, tmp_path, task):
    """Loss and the adapter's gradients, of base + scale·B·A by hand; nothing else has any."""
    cache, model = taught(task)
    model = still(model, tmp_path / "still")
    config = train_config([{"teachers": ["lm"]}], held_out=0, batch_sequences=3)
    view = next((name for name in cache.views if "masked" in name), None)
    made = prepare(cache, student_config(model, task), config, view, World.alone())
    student, objective = made.student, made.objective
    torch.manual_seed(1)
    with torch.no_grad():
        for name, values in student.adapter.tensors().items():
            if ".lora_B." in name:
                values.normal_(std=0.3)
    lora = {name: values.clone() for name, values in student.adapter.tensors().items()}
    plan = objective.plan(0)
    index = made.stream.order.at(0)
    batch = objective.select_targets(cache.gather(index, ["lm"], masked_view=view), plan)
    replica = 0 if batch.masked is None else batch.masked.replica
    loss, _ = objective.loss(student, batch, objective.counts(batch, plan), plan, CPU)
    loss.backward()
    targets = [cache.example(int(number)).targets["lm"][replica] for number in index]
    size = cache.corpus.info["tokenizer"]["size"]
    expected, gradients = by_hand(model, task, lora, targets, size)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = {
        "base_model." + name.replace(".default", ""): p.grad
        for name, p in student.named_parameters()
        if p.grad is not None
    }
    assert found.keys() == gradients.keys() == lora.keys()
    same_gradients(found, gradients, tolerance=5e-5)


def test_only_the_adapter_and_heads_move_and_the_folder_holds_nothing_else(
    taught, tmp_path, caplog
):
    """With everything that a run has: dropout, heads, checkpoints, the best of them, a log of
    gradients. peft alone loads what is left, with equal logits.
    """
    import peft

    out, model = tmp_path / "run", taught("masked_lm")[1]
    before = (model / "model.safetensors").read_bytes()
    with caplog.at_level("INFO", "rekindle"):
        train(taught, "masked_lm", out, lora={"dropout": 0.1})
    assert f"an adapter of {model}; " in caplog.text
    assert "of them in heads" in caplog.text
    written = {path.name for path in out.iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "heads.safetensors"} <= written
    assert not written & {"model.safetensors", "config.json"}
    assert (model / "model.safetensors").read_bytes() == before
    tensors = adapter_of(out)
    assert all(name.split(".")[-2] in ("lora_A", "lora_B") for name in tensors)
    assert all(values.abs().max() > 0 for name, values in tensors.items() if "lora_B" in name)
    about = json.loads((out / "rekindle_student.json").read_text())
    assert about["base"].keys() == {"model", "weights", "config"}
    base = transformers.AutoModelForMaskedLM.from_pretrained(str(model))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, str(out)).eval()(input_ids=ids).logits
        student = Student.from_pretrained(out)
        found = student.eval().model(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (out / "checkpoints/step-00000006/adapter_model.safetensors").is_file()
    assert student.head_configs.keys() == {"sense"}
    plain = load_language_model(model, "masked_lm").eval()
    assert not torch.allclose(expected, plain(input_ids=ids).logits, atol=0.01)


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm"])
def test_an_interrupted_run_goes_on_to_the_same_bits(taught, tmp_path, task):
    lora = {"dropout": 0.2, "bias": "lora_only", "dora": task == "causal_lm"}
    train(taught, task, tmp_path / "whole", lora=lora)
    with pytest.raises(KeyboardInterrupt):
        train(taught, task, tmp_path / "run", lora=lora, report=stop_at(3))
    train(taught, task, tmp_path / "run", lora=lora, resume=True)
    one, other = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "run")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    files = [(tmp_path / n / "adapter_config.json").read_bytes() for n in ("whole", "run")]
    assert files[0] == files[1]


def test_micro_batches_and_checkpointed_activations_change_nothing(taught, tmp_path):
    quick = {"steps": 3, "learning_rate": 1e-3, "evaluate_every": 3}
    quick |= {"objective": {"distill": [{"teachers": ["lm"]}]}}  # a head has dropout
    train(taught, "causal_lm", tmp_path / "plain", train_config(**quick))
    ways = {"micro_batch_sequences": 2, "gradient_checkpointing": True}
    train(taught, "causal_lm", tmp_path / "ways", train_config(**quick, **ways))
    for one, other in zip(*(metrics(tmp_path / name) for name in ("plain", "ways")), strict=True):
        for value in ("loss", "ce", "grad_norm"):
            if value in one:
                assert other[value] == pytest.approx(one[value], rel=1e-4), (one["step"], value)


WHOLE = {"modules_to_save": ["transform"], "target_modules": ["query", "value"]}


@pytest.mark.parametrize("lora", [{}, {"bias": "all", "rslora": True}, WHOLE])
def test_merged_at_the_end_it_is_a_whole_model_with_equal_logits(taught, tmp_path, lora):
    """The same run twice: an adapter, and the sum."""
    train(taught, "masked_lm", tmp_path / "adapter", lora=lora)
    train(taught, "masked_lm", tmp_path / "merged", lora=lora | {"merge": True})
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json"} <= names
    assert "adapter_config.json" not in names
    merged = transformers.AutoModelForMaskedLM.from_pretrained(str(tmp_path / "merged")).eval()
    sums = load_language_model(tmp_path / "adapter", "masked_lm").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        one, other = merged(input_ids=ids).logits, sums(input_ids=ids).logits
    assert (one - other).abs().max() < 1e-4 * other.abs().max()
    heads = [load_file(tmp_path / name / "heads.safetensors") for name in ("adapter", "merged")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    again = train(
        taught, "masked_lm", tmp_path / "merged", lora=lora | {"merge": True}, resume=True
    )
    assert again.was_finished


def test_a_run_does_not_go_on_without_its_adapter(taught, tmp_path):
    """The key is recorded only where it is set: what lacks it is compared all the same."""
    cache, model = taught("masked_lm")
    one = train_config(steps=1, warmup_steps=0, evaluate_every=1)
    train(taught, "masked_lm", tmp_path / "run", one)
    whole = parse_settings(StudentConfig, {"model": str(model)})
    with pytest.raises(
        CheckpointError, match=r"another configuration \(student\.lora: .* None here"
    ):
        train_student(cache, whole, one, tmp_path / "run", resume=True)


def test_another_base_is_refused_by_its_digest(taught, tmp_path):
    model = shutil.copytree(taught("masked_lm")[1], tmp_path / "base")
    with pytest.raises(KeyboardInterrupt):
        train(taught, "masked_lm", tmp_path / "run", model=model, report=stop_at(3))
    train(taught, "masked_lm", tmp_path / "done", model=model)
    weights = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    changed = weights | {name: weights[name] + 1e-3}
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"begun with another student: .* weights"):
        train(taught, "masked_lm", tmp_path / "run", model=model, resume=True)
    with pytest.raises(InputError, match=r"is not the base that it was trained on: its weights"):
        load_language_model(tmp_path / "done", "masked_lm")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    load_language_model(tmp_path / "done", "masked_lm")


REFUSED = {
    "names no layer": ({"target_modules": ["nowhere"]}, "nowhere"),
    "the output matrix": ({"target_modules": ["decoder"]}, "names the output matrix"),
    "the embeddings": ({"target_modules": ["word_embeddings"]}, "names the input embeddings"),
    "tied, saved whole": ({"modules_to_save": ["decoder"]}, "saved whole, they would be two"),
    "tied, within it": ({"modules_to_save": ["cls"]}, "modules_to_save names the output matrix"),
    "one of two": ({"target_modules": ["query", "nope"]}, "target_modules names 'nope'"),
    "saves no layer": ({"modules_to_save": ["transform", "nope"]}, "modules_to_save names 'nope'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_before_anything_is_written(taught, tmp_path, case):
    lora, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        train(taught, "masked_lm", tmp_path / "run", lora=lora)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_an_adapter_and_a_fresh_head_are_refused(
    taught, tmp_path, make_model, wordpiece
):
    train(taught, "masked_lm", tmp_path / "first", train_config(steps=1, warmup_steps=0))
    with pytest.raises(InputError, match=r"is already an adapter.*pipeline merge-adapter"):
        train(taught, "masked_lm", tmp_path / "second", model=tmp_path / "first")
    body = make_model("bert", "AutoModel", wordpiece)
    with pytest.raises(InputError, match="has no language-model head, and with"):
        train(taught, "masked_lm", tmp_path / "third", model=body)
    alone = {"hard": {"weight": 0}, "distill": [{"teachers": ["sense"]}]}
    one = {"steps": 1, "warmup_steps": 0, "evaluate_every": 1}
    train(taught, "masked_lm", tmp_path / "third", train_config(objective=alone, **one), model=body)
