"""What becomes of a student that is an adapter: merged, a teacher, trained by several processes or
by a Trainer of Hugging Face's.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import join_world
from rekindle.train.export.folder import export_head
from rekindle.train.export.merged import merge_student
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.run import finetune
from rekindle.train.loop import train_student
from rekindle.train.model.files import (
    load_language_model,
    load_weights,
    weights_fingerprint,
)
from rekindle.train.model.lora import describe_adapter
from rekindle.train.record.lineage import lineage_of_model
from rekindle.train.student import build_student
from testlib.models import AUTO, NARROW, STILL
from testlib.several.forked import end_well, forked_world
from testlib.students import metrics

IDS = torch.arange(5, 25)[None]


def config(steps=4, **values):
    terms = values.pop("terms", [{"teachers": ["lm"]}, {"teachers": ["sense"], "weight": 0.5}])
    quick = {
        "steps": steps,
        "batch_sequences": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "checkpoint_every": steps,
        "evaluate_every": steps,
        "held_out": 0,
        "objective": {"distill": terms},
    }
    return parse_settings(TrainConfig, quick | values)


def adapted(model, task="masked_lm", **lora):
    values = {"model": str(model), "task": task, "lora": {"r": 2, "alpha": 8} | lora}
    return parse_settings(StudentConfig, values)


@pytest.fixture(scope="module")
def run(taught, tmp_path_factory):
    """A finished run of a masked LM, with a head."""
    cache, model = taught("masked_lm")
    out = tmp_path_factory.mktemp("used") / "run"
    train_student(cache, adapted(model), config(), out)
    return out


def test_merged_it_is_a_whole_model_with_all_that_lay_beside(run, tmp_path):
    """An adapter that others put on that has its lineage, too."""
    import peft

    found = merge_student(str(run), str(tmp_path / "m"))
    assert found.heads == ("sense",)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert not names & {"adapter_config.json", "adapter_model.safetensors"}
    merged = transformers.AutoModelForMaskedLM.from_pretrained(str(tmp_path / "m")).eval()
    sums = load_language_model(run, "masked_lm").eval()
    with torch.no_grad():
        one, other = merged(input_ids=IDS).logits, sums(input_ids=IDS).logits
    assert torch.equal(one, other)
    heads = [load_file(place / "heads.safetensors") for place in (run, tmp_path / "m")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    before, after = (lineage_of_model(place) for place in (run, tmp_path / "m"))
    assert [one.steps for one in after] == [one.steps for one in before] == [4]
    transformers.AutoTokenizer.from_pretrained(str(tmp_path / "m"))
    assert export_head(str(tmp_path / "m"), str(tmp_path / "head")).difference < 1e-4
    base = transformers.AutoModelForMaskedLM.from_pretrained(str(tmp_path / "m"))
    other = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"]))
    other.save_pretrained(str(tmp_path / "others"))
    assert lineage_of_model(tmp_path / "others") == after
    with pytest.raises(InputError, match="is a whole model, not an adapter"):
        merge_student(str(tmp_path / "m"), str(tmp_path / "n"))
    with pytest.raises(InputError, match="already holds an export"):
        merge_student(str(run), str(tmp_path / "m"))


def test_an_expert_begins_as_from_the_merged_model(run, tmp_path):
    """Its language model's head is adapted, too, and `dense` is a layer of the expert's head."""
    kind = AUTO["sequence_classification"]
    merge_student(str(run), str(tmp_path / "m"))
    one, other = (load_weights(place, kind, torch.float32, "it") for place in (run, tmp_path / "m"))
    assert (one.body, one.head, one.shapes) == (other.body, other.head, other.shapes)
    assert {name.split(".")[0] for name in one.head} == {"classifier"}
    found, expected = one.model.state_dict(), other.model.state_dict()
    assert found.keys() == expected.keys()
    kept = found.keys() - {*one.body, *one.head}
    assert all(torch.equal(found[name], expected[name]) for name in kept)
    rows = "".join(json.dumps({"text": "the river", "label": name}) + "\n" for name in "abab")
    (tmp_path / "rows.jsonl").write_text(rows)
    files = [str(tmp_path / "rows.jsonl")] * 2
    finetune(str(run), *files, str(tmp_path / "out"), config=FinetuneConfig(epochs=1))
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_its_digest_is_of_its_heads_too(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    assert weights_fingerprint(copied) == weights_fingerprint(run)
    heads = {name: values + 1 for name, values in load_file(copied / "heads.safetensors").items()}
    save_file(heads, copied / "heads.safetensors")
    assert weights_fingerprint(copied) != weights_fingerprint(run)


def test_it_is_exported_with_its_head_as_it_is(run, tmp_path):
    assert export_head(str(run), str(tmp_path / "head")).difference < 1e-4
    card = (run / "README.md").read_text()
    assert f"pipeline merge-adapter {run}" in card
    assert f"pipeline export {run} --head sense" in card


def test_it_teaches_with_its_base_and_lineage(run, tmp_path, configure):
    teacher = {"name": "a", "model": str(run), "task": "masked_lm", "targets": {"kind": "dense"}}
    cache_teachers(configure(tmp_path / "cache", [teacher]))
    cache = Cache.open(tmp_path / "cache")
    info, target = cache.teachers["a"].info, cache.example(3).targets["a"][0]
    assert {"base", "adapter", "peft"} <= info.fingerprints.keys()
    assert [one.steps for one in info.lineage] == [4]
    sums = load_language_model(run, "masked_lm").eval()
    ids = torch.from_numpy(target.input_ids.astype("int64"))[None]
    with torch.no_grad():
        logp = sums(input_ids=ids).logits[0, torch.from_numpy(target.positions.astype("int64"))]
    size = cache.corpus.info["tokenizer"]["size"]
    expected = (
        logp[:, :size].log_softmax(-1).gather(1, torch.from_numpy(target.ids.astype("int64")))
    )
    assert (torch.from_numpy(target.log_probs) - expected).abs().max() < 0.05  # of the codec


def test_what_a_method_puts_into_the_model_is_refused(taught):
    student = build_student(adapted(taught("masked_lm")[1]), {}, 90, 0)
    told = describe_adapter(student, student.adapter, "it")
    own = sum(values.numel() for values in student.adapter.tensors().values())
    assert f"; {own:,} of " in told
    biased = build_student(adapted(taught("masked_lm")[1], bias="all"), {}, 90, 0)
    assert "in heads" not in describe_adapter(biased, biased.adapter, "it")  # it has none
    student.model.discriminator = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"puts parameters into the model.*discriminator"):
        describe_adapter(student, student.adapter, "it")


@pytest.fixture(scope="module")
def still(make_model, wordpiece):
    """A student without dropout: its noise is drawn per process."""
    return make_model("bert", AUTO["masked_lm"], wordpiece, 10, **NARROW, **STILL)


def test_two_processes_train_what_one_does(taught, still, tmp_path):
    cache, _ = taught("masked_lm")
    student = adapted(still)
    train_student(cache, student, config(), tmp_path / "one")

    def work():
        torch.set_num_threads(1)
        with join_world() as world:
            train_student(taught("masked_lm")[0], student, config(), tmp_path / "two", world=world)

    end_well(forked_world(work))
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_a_trainer_of_a_peft_model_has_the_losses_of_our_loop(taught, still, tmp_path):
    """From the same adapter, which its own user has put on the model."""
    import peft
    from transformers import Trainer, TrainingArguments

    from rekindle.train.hf.dataset import CacheDataset
    from rekindle.train.hf.distillation import Distillation
    from rekindle.train.hf.trainer import DistillationMixin
    from rekindle.train.optimizer import configured_adamw

    class KDTrainer(DistillationMixin, Trainer):
        pass

    cache, _ = taught("masked_lm")
    plain = {"schedule": "constant", "max_grad_norm": None, "terms": [{"teachers": ["lm"]}]}
    ours, student = config(**plain), adapted(still)
    train_student(cache, student, ours, tmp_path / "ours")
    size = cache.corpus.info["tokenizer"]["size"]
    build_student(student, {}, size, ours.seed).save_pretrained(tmp_path / "begun")
    base = transformers.AutoModelForMaskedLM.from_pretrained(str(still))
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "begun"), is_trainable=True)
    distillation = Distillation(cache, ["lm"])
    arguments = TrainingArguments(
        str(tmp_path / "hf"),
        max_steps=4,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = KDTrainer(
        model=model,
        args=arguments,
        train_dataset=CacheDataset(cache, seed=ours.seed),
        distillation=distillation,
        optimizers=(configured_adamw(model.parameters(), ours), None),
    )
    trainer.train()
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    expected = [row["loss"] for row in metrics(tmp_path / "ours") if row["kind"] == "train"]
    assert found == pytest.approx(expected, rel=1e-5)
    made = peft.get_peft_model_state_dict(model)
    ends = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert all(torch.allclose(made[name], ends[name], atol=1e-5) for name in ends)
    assert json.loads((tmp_path / "ours" / "run.json").read_text())["student"]["lora"]["r"] == 2
