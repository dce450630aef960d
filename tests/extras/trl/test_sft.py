"""The mixin with TRL's SFTTrainer: the same losses as our own loop, beside TRL's own settings."""

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.hf.trainer import DistillationMixin
from testlib.models import AUTO, NARROW
from testlib.trainers.runs import BATCH, losses, our_losses, teaching, trainer_of


def test_its_steps_are_those_of_our_loop(
    tmp_path, make_teacher, make_cache, make_model, wordpiece, bytelevel
):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class KDTrainer(DistillationMixin, SFTTrainer):
        pass

    kept = {"targets": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}}
    make_cache(tmp_path / "cache", [make_teacher("big", "causal_lm", 1, NARROW, **kept)])
    student = make_model("llama", AUTO["causal_lm"], wordpiece, 10, **NARROW)
    cache, one = Cache.open(tmp_path / "cache"), {"big": 0.7}
    ours = our_losses(cache, student, "causal_lm", tmp_path / "ours", weights=one, steps=6)

    def made(tokenizer):
        return trainer_of(
            KDTrainer,
            SFTConfig,
            AutoModelForCausalLM.from_pretrained(str(student)),
            teaching(cache, one),
            tmp_path / "sft",
            batch=BATCH // 2,
            each=2,
            max_steps=6,
            bf16=False,
            gradient_checkpointing=False,
            built={"processing_class": AutoTokenizer.from_pretrained(str(tokenizer))},
        )

    trainer = made(wordpiece)
    trainer.train()
    assert losses(trainer) == pytest.approx(ours, rel=1e-5)
    with pytest.raises(InputError, match="the student has another tokenizer than the corpus"):
        made(bytelevel)
