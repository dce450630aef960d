"""The mixin with TRL's SFTTrainer: the same losses as our own loop, beside TRL's own settings."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.hf.trainer import DistillationMixin
from testlib.models import AUTO, NARROW
from testlib.pages.examples import run_example
from testlib.trainers.runs import (
    BATCH,
    CE,
    in_two_processes,
    losses,
    our_losses,
    teaching,
    trainer_of,
)

ONE, STEPS = {"big": 0.7}, 6


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_teacher, make_cache, make_model, wordpiece):
    """The cache's path and the student's."""
    path = tmp_path_factory.mktemp("sft") / "cache"
    kept = {"targets": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}}
    make_cache(path, [make_teacher("big", "causal_lm", 1, NARROW, **kept)])
    return path, make_model("llama", AUTO["causal_lm"], wordpiece, 10, **NARROW)


@pytest.fixture(scope="module")
def ours(world, tmp_path_factory):
    """The losses of our own loop, to 1e-5."""
    path, student = world
    out = tmp_path_factory.mktemp("ours") / "run"
    found = our_losses(Cache.open(path), student, "causal_lm", out, weights=ONE, steps=STEPS)
    assert len(found) == STEPS
    return pytest.approx(found, rel=1e-5)


def made(world, out, tokenizer, built=None, **more):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class KDTrainer(DistillationMixin, SFTTrainer):
        pass

    path, student = world
    built = built or {}
    return trainer_of(
        KDTrainer,
        SFTConfig,
        AutoModelForCausalLM.from_pretrained(str(student)),
        teaching(Cache.open(path), ONE),
        out,
        bf16=False,
        gradient_checkpointing=False,
        built={"processing_class": AutoTokenizer.from_pretrained(str(tokenizer))} | built,
        **{"max_steps": STEPS} | more,
    )


def test_its_steps_are_those_of_our_loop(world, ours, tmp_path, wordpiece, bytelevel):
    trainer = made(world, tmp_path, wordpiece, batch=BATCH // 2, each=2)
    trainer.train()
    assert losses(trainer) == ours
    with pytest.raises(InputError, match="the student has another tokenizer than the corpus"):
        made(world, tmp_path, bytelevel)


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_an_adapter_that_trl_makes_has_the_loss_of_a_direct_computation(
    world, tmp_path, wordpiece, monkeypatch
):
    """By ``peft_config``, in its third step: full logits of the adapter on its base, in float64."""
    import peft

    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(InputError, match=r"holds no trained parameter: .* peft_config"):
        made(world, tmp_path, wordpiece, built={"peft_config": lora})
    built = {"peft_config": lora, "optimizers": (None, None)}
    trainer = made(world, tmp_path, wordpiece, built=built, max_steps=3)
    teaching, taken = trainer.distillation, []
    own = trainer.compute_loss

    def watched(model, inputs, *rest, **more):
        taken[:] = [inputs | {}, by_hand(model, inputs, teaching)]
        return own(model, inputs, *rest, **more)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    before = by_name(trainer.model)
    trainer.train()
    assert losses(trainer)[-1] == pytest.approx(taken[1], rel=1e-5)
    after = by_name(trainer.model).items()
    assert {name for name, v in after if not v.equal(before[name])} == {
        name for name, _ in after if ".lora_" in name
    }


def by_name(model):
    return {name: values.detach().clone() for name, values in model.named_parameters()}


def by_hand(model, inputs, teaching):
    """0.5 · CE + 0.7 · τ² · KL of the kept candidates and the rest, at τ = 2."""
    batch, labels = inputs["distillation"], inputs["labels"]
    with torch.no_grad():
        shown = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits = model(**shown).logits.double()[..., : teaching.vocabulary_size]
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    target = batch.targets["big"]
    ids, log_q, log_rest = map(torch.from_numpy, target.decode(2.0))
    log_p = (logits[target.rows, target.positions] / 2).log_softmax(-1).gather(1, ids.long())
    rest = (1 - log_p.exp().sum(1)).log()
    kl = (log_q.exp() * (log_q - log_p)).sum(1) + log_rest.exp() * (log_rest - rest)
    return float(CE * ce + ONE["big"] * 4 * kl.mean())


@pytest.mark.parametrize("each", [1, 2])
def test_two_processes_share_every_step(world, ours, tmp_path, wordpiece, each):
    """Also by micro-batches."""
    halves = {"batch": BATCH // 2 // each, "each": each, "ddp_backend": "gloo"}
    assert in_two_processes(lambda: made(world, tmp_path, wordpiece, **halves), tmp_path) == ours


def test_the_example_runs(world, tmp_path):
    from transformers import AutoModelForCausalLM

    path, student = world
    run_example("trl_sft.py", path, "big", student, tmp_path / "out", 4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
