"""A Trainer that lacks what the mixin is made of, or comes before it, is refused by one message."""

from types import SimpleNamespace

import pytest

from rekindle.data.errors import InputError
from rekindle.train.hf.distillation import Distillation
from rekindle.train.hf.trainer import METHODS, DistillationMixin


class Bare:
    """A Trainer of a version that has other names."""

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None):
        self.model, self.args = model, args
        self.accelerator = self.model_accepts_loss_kwargs = None
        self._train_batch_size = 1


for name in {*METHODS} - {"get_tp_size"}:
    setattr(Bare, name, lambda self: None)


class KDTrainer(DistillationMixin, Bare):
    pass


def test_what_is_lacking_is_named(causal_world):
    teaching = Distillation(causal_world.open(), ["lm"])
    told = r"lacks get_tp_size, label_smoother, which .* transformers 5\.17 or newer"
    with pytest.raises(InputError, match=told):
        KDTrainer(args=SimpleNamespace(seed=0), distillation=teaching)


def test_the_mixin_comes_first():
    with pytest.raises(TypeError, match=r"DistillationMixin must come before Bare, .*KD\(Distilla"):
        type("KD", (Bare, DistillationMixin), {})
    type("KD", (KDTrainer,), {})
