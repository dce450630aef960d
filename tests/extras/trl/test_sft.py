"""The mixin with TRL's SFTTrainer: the same losses as our own loop, beside TRL's own settings."""

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.hf.trainer import DistillationMixin
from testlib.models import AUTO, NARROW
from testlib.pages.examples import run_example
from testlib.trainers.runs import (
    BATCH,
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


def made(world, out, tokenizer, **more):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class KDTrainer(DistillationMixin, SFTTrainer):
        pass

    path, student = world
    return trainer_of(
        KDTrainer,
        SFTConfig,
        AutoModelForCausalLM.from_pretrained(str(student)),
        teaching(Cache.open(path), ONE),
        out,
        max_steps=STEPS,
        bf16=False,
        gradient_checkpointing=False,
        built={"processing_class": AutoTokenizer.from_pretrained(str(tokenizer))},
        **more,
    )


def test_its_steps_are_those_of_our_loop(world, ours, tmp_path, wordpiece, bytelevel):
    trainer = made(world, tmp_path, wordpiece, batch=BATCH // 2, each=2)
    trainer.train()
    assert losses(trainer) == ours
    with pytest.raises(InputError, match="the student has another tokenizer than the corpus"):
        made(world, tmp_path, bytelevel)


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
