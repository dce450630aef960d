"""TRL's SFTTrainer with cached targets, for causal LMs (pip install trl):

python examples/trl_sft.py CACHE TEACHER STUDENT OUT [STEPS]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from rekindle.data.cache import Cache
from rekindle.train.hf.distillation import Distillation
from rekindle.train.hf.trainer import DistillationMixin


class KDTrainer(DistillationMixin, SFTTrainer):
    """The text, with what of it is trained, is the cache's."""


def main(place: str, teacher: str, student: str, out: str, steps: str = "20") -> None:
    teaching = Distillation(Cache.open(place), [teacher], kd_weight=0.5, ce_weight=0.5)
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    teaching.check_student(model, tokenizer)
    arguments = SFTConfig(
        out,
        max_steps=int(steps),
        per_device_train_batch_size=8,
        logging_steps=5,
        report_to="none",
        bf16=False,
    )
    trainer = KDTrainer(
        model=model, args=arguments, processing_class=tokenizer, distillation=teaching
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
