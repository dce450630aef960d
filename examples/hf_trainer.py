"""Hugging Face's Trainer with cached targets (needs accelerate: pip install -e '.[hf]'):

python examples/hf_trainer.py CACHE TEACHER STUDENT OUT [STEPS]
"""

import sys

from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments

from rekindle.data.cache import Cache
from rekindle.train.hf.distillation import Distillation
from rekindle.train.hf.trainer import DistillationMixin


class KDTrainer(DistillationMixin, Trainer):
    """The text and its masks are the cache's; everything else is the Trainer's."""


def main(place: str, teacher: str, student: str, out: str, steps: str = "20") -> None:
    teaching = Distillation(Cache.open(place), [teacher], kd_weight=0.5, ce_weight=0.5)
    model = AutoModelForMaskedLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    teaching.check_student(model, tokenizer)  # the same vocabulary, the same task
    arguments = TrainingArguments(
        out,
        max_steps=int(steps),
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        logging_steps=5,
        report_to="none",
    )
    trainer = KDTrainer(
        model=model, args=arguments, processing_class=tokenizer, distillation=teaching
    )
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
