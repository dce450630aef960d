"""A batch moved whole: its losses are the training loop's own, whatever process made it."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from rekindle.data.errors import InputError
from rekindle.kernels.losses import kd_loss, linear_kd_loss
from rekindle.train.to_device import to_device
from testlib.objective.setting import EPOCH, Setting
from testlib.students import gradients, same_gradients

TERMS = [
    {"teachers": ["big"], "temperature": 2.0, "weight": 0.7},
    {"teachers": ["wide"], "divergence": "jsd", "k": 5},
    {"teachers": ["whole"], "temperature": 3.0, "divergence": "reverse_kl"},
    {"teachers": ["odd.lm"], "tail": "renormalise"},
    {"teachers": ["sense"], "temperature": 2.0, "weight": 1.5},
    {"teachers": ["pair"]},
    {"teachers": ["tags"], "divergence": "jsd"},
    {"teachers": ["score"]},
]


def gathered(setting):
    names = [term["teachers"][0] for term in TERMS if term["teachers"][0] in setting.cache.teachers]
    return setting.cache.gather(setting.index, names, epoch=EPOCH, masked_view=setting.view)


def road_loss(student, moved, terms):
    """The objective of one batch, as a loop of one's own would write it."""
    head = student.output_head
    options = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
    hidden = student(moved.inputs, moved.select).hidden
    total = F.cross_entropy(head.logits(hidden), moved.labels)
    for term in terms:
        (name,), tau, weight = term["teachers"], term.get("temperature", 1.0), term.get("weight", 1)
        found = moved.targets[name]
        choice = {key: term[key] for key in ("divergence", "tail") if key in term}
        if found.info.is_vocabulary:
            hidden = student(found.inputs, found.select).hidden
            loss = linear_kd_loss(
                *(hidden, head.weight, found.targets),
                **options | choice,
                temperature=found.temperature,
                kd_weight=weight,
            ).loss
        else:
            tokens = {name: found.select} if name == "tags" else {}
            logits = student(found.inputs, None, [] if tokens else [name], tokens).logits[name]
            logits = logits if tokens else logits[found.select]
            if name == "score":
                loss = weight * F.mse_loss(logits, found.logits)
            else:
                loss = kd_loss(
                    logits, found.targets, temperature=tau, kd_weight=weight, **choice
                ).loss
        total = total + loss
    return total


def test_its_losses_and_gradients_are_those_of_the_objective(masked_world):
    setting = Setting(masked_world, {"hard": {"weight": 1.0}, "distill": TERMS})
    expected = setting.run()
    moved = to_device(
        gathered(setting), "cpu", temperature={"big": 2.0, "whole": 3.0}, k={"wide": 5}
    )
    assert len(moved.targets["odd.lm"].select) < len(moved.select)  # it knows some domains alone
    setting.student.zero_grad()
    loss = road_loss(setting.student, moved, TERMS)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected[0]), rel=1e-5)
    same_gradients(gradients(setting.student), expected[2])


@pytest.mark.parametrize("world", ["masked_world", "causal_world"])
def test_labels_are_the_true_tokens_of_each_teachers_own_rows(world, request):
    """Of a causal LM they stand one to the right of the rows."""
    setting = Setting(request.getfixturevalue(world), {"hard": {"weight": 1.0}})
    names = [n for n, t in setting.cache.teachers.items() if t.info.is_vocabulary]
    batch = setting.cache.gather(setting.index, names, epoch=1, masked_view=setting.view)
    moved = to_device(batch, "cpu")
    width = batch.input_ids.shape[1]
    for name, found in moved.targets.items():
        row, position = found.select.numpy() // width, found.select.numpy() % width
        true = batch.input_ids[row, position + (setting.task == "causal_lm")]
        assert np.array_equal(found.labels, true)
        assert np.array_equal(found.select, batch.targets[name].rows * width + position)
        assert len(found.labels) > 0


class Batches(Dataset):
    """Batches by their sequences, as a worker of a DataLoader makes them."""

    def __init__(self, cache, names):
        self.cache, self.names = cache, names

    def __len__(self):
        return 3

    def __getitem__(self, number):
        index = np.arange(number, len(self.cache), 40)
        view = self.cache.masked_view().name
        return self.cache.gather(index, self.names, epoch=number, masked_view=view)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_batches_come_from_workers_of_a_data_loader(masked_world, start):
    cache = masked_world.open()
    made = Batches(cache, ["big", "whole", "sense", "pair", "tags"])
    made[0]  # what this process has read and mapped does not travel
    loader = DataLoader(made, batch_size=None, num_workers=1, multiprocessing_context=start)
    for number, batch in enumerate(loader):
        here = made[number]
        assert batch.digests == list(here.digests)
        found, expected = to_device(batch, "cpu"), to_device(here, "cpu")
        assert flat(found) == flat(expected)


def flat(value):
    """Tensors as lists, whatever they stand in."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: flat(each) for key, each in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {key: flat(each) for key, each in vars(value).items()}
    return [flat(each) for each in value] if isinstance(value, tuple) else str(value)


def test_a_pickled_cache_is_the_one_that_was_opened(masked_world, tmp_path):
    """Its extent too, and without a byte of its shards."""
    cache = masked_world.open()
    cache.example(3), cache.corpus.tokenizer
    content = pickle.dumps(cache)
    again = pickle.loads(content)
    assert len(content) < cache.teachers["whole"].bytes / 4
    assert again.corpus.fingerprint == cache.corpus.fingerprint
    one, other = (next(each.batches(seed=3, epoch=1)) for each in (cache, again))
    assert np.array_equal(one.masked.input_ids, other.masked.input_ids)
    assert flat(to_device(one, "cpu")) == flat(to_device(other, "cpu"))


def test_what_no_language_model_of_the_batch_is_for_is_refused(masked_world):
    cache = masked_world.open()
    batch = Batches(cache, ["big", "sense", "topics"])[0]
    with pytest.raises(InputError, match=r"temperature names 'sense'; the batch has .*'big'"):
        to_device(batch, "cpu", temperature={"sense": 2.0})
    with pytest.raises(InputError, match=r"stores the temperatures \[1.0, 2.0, 4.0\], not 3"):
        to_device(batch, "cpu", temperature=3.0)
    with pytest.raises(InputError, match="'big' is a masked_lm; a causal_lm student has no loss"):
        to_device(batch, "cpu", task="causal_lm")
    with pytest.raises(ValueError, match="task is 'bert'"):
        to_device(batch, "cpu", task="bert")
    with pytest.raises(ValueError, match="temperature_between is 'guess'"):
        to_device(batch, "cpu", temperature_between="guess")
    with pytest.raises(InputError, match="a multi_label_classification expert: kd_loss compares"):
        _ = to_device(batch, "cpu").targets["topics"].targets
    experts = cache.gather(np.arange(3), ["sense"])
    with pytest.raises(InputError, match=r"temperature is 2.0; the batch has the"):
        to_device(experts, "cpu", temperature=2.0)
    assert len(to_device(experts, "cpu").select) == 0
