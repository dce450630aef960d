"""The held-out loss: what is trained, of all held-out sequences as if they were one step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rekindle.train.evaluate import EvaluationData, evaluate
from rekindle.train.method import Method
from rekindle.train.objective.held_out_loss import HeldOutLoss
from testlib.objective.cases import SPLIT, WORLDS, alone, term
from testlib.objective.setting import CPU, Setting


def data_of(setting, size=5, **values):
    plan = setting.objective.last
    terms = {name: term for term in setting.objective.config.distill for name in term.teachers}
    data = EvaluationData(
        setting.cache, setting.index, (), setting.view, size,
        terms=terms, objective=setting.objective, **values,
    )  # fmt: skip
    return data.at(plan)


def trained(setting):
    """The objective's own loss of the sequences, all in one step and one micro-batch."""
    objective, plan = setting.objective, setting.objective.last
    batch = setting.cache.gather(setting.index, plan.teachers, epoch=0, masked_view=setting.view)
    batch = objective.select_targets(batch, plan)
    counts = setting._centred(objective.counts(batch, plan), [batch], plan.step, setting.world)
    with torch.no_grad():
        return float(objective.loss(setting.student, batch, counts, plan, CPU).total)


@pytest.fixture
def setting_of(request):
    def make(world, objective, **values):
        from rekindle.train.distributed import World

        setting = Setting(request.getfixturevalue(world), objective, **values)
        setting.world = World.alone()
        return setting

    return make


@pytest.mark.parametrize(("world", "name"), SPLIT)
def test_the_held_out_loss_is_the_objective_of_all_of_them_at_once(setting_of, world, name):
    """However they are cut into batches, whatever of it is formed for other values anyway."""
    setting = setting_of(world, WORLDS[world][name], batch=range(3, 14))
    found = evaluate(setting.student, data_of(setting), CPU)
    assert next(iter(found)) == "loss"
    assert found["loss"] == pytest.approx(trained(setting), rel=2e-5, abs=1e-6)


def test_it_has_the_weights_of_the_last_step_from_the_beginning(setting_of):
    fall = {"schedule": "linear", "from": 1.0, "to": 0.0, "over": 0.5}
    rise = {"schedule": "linear", "from": 0.0, "to": 0.5, "over": 0.5}
    terms = [term("big", weight=fall), term("sense", weight=rise)]
    setting = setting_of("masked_world", {"hard": {"weight": 1.0}, "distill": terms})
    data = data_of(setting)
    first = evaluate(setting.student, data.at(setting.objective.plan(0)), CPU)
    last = evaluate(setting.student, data.at(setting.objective.last), CPU)
    assert first["loss"] == last["loss"]
    assert first["loss"] == pytest.approx(first["ce"] + 0.5 * first["kl/sense"], rel=1e-5)
    assert "kl/big" in first  # its weight is above 0 there
    assert "kl/big" not in last


@pytest.mark.parametrize(
    ("objective", "measured"),
    [
        (alone(term("sense")), False),
        (alone(term("score", ranking={}), term("pair")), False),
        (alone(term("big")), True),
        ({"distill": [term("sense")]}, True),
        ({"hard": {"weight": {"from": 0.0, "to": 0.0}}, "distill": [term("sense")]}, False),
    ],
)
def test_a_language_model_that_nothing_trains_has_no_cross_entropy(
    setting_of, objective, measured, monkeypatch
):
    """Nor is it run: not a pass for it is made."""
    setting = setting_of("masked_world", objective)
    domains = {"odd": setting.index[:4]}
    if not measured:
        monkeypatch.setattr("rekindle.train.evaluate.language_rows", None)
    found = evaluate(setting.student, data_of(setting, domains=domains), CPU)
    assert ("ce" in found) is measured
    assert {"ce/odd", "loss/odd"} & found.keys() == {"ce/odd" if measured else "loss/odd"}
    if not measured:
        apart = replace(data_of(setting), index=setting.index[:4])
        assert found["loss/odd"] == evaluate(setting.student, apart, CPU)["loss"]


def test_equal_passes_are_made_once(setting_of, monkeypatch):
    """The text as it is for three experts and their terms, with masks for all language models."""
    objective = {"distill": [term("big"), term("wide", temperature=2.0), term("sense", "topics")]}
    setting = setting_of("masked_world", objective)
    data, passes = data_of(setting, size=len(setting.index)), []
    base = setting.student.model.base_model
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    evaluate(setting.student, data, CPU)
    assert len(passes) == 2
    passes.clear()
    evaluate(setting.student, data, CPU)  # another evaluation remembers nothing of it
    assert len(passes) == 2


class Length(Method):
    """A loss that does not ask the student: the sequences' lengths."""

    values = ("mean",)
    asked = 0

    def count(self, batch):
        return {"mean": len(batch.index)}

    def losses(self, student, batch, step, device):
        type(self).asked += 1
        total = torch.tensor(float(batch.lengths.sum()))
        yield "mean", 2 * total, total

    def evaluate(self, student, batch, device):
        return {"mean": (float(batch.lengths.sum()), len(batch.index))}


@pytest.mark.parametrize("known", [False, True])
def test_the_loss_of_a_method_is_part_of_it(setting_of, monkeypatch, known):
    """As ``losses`` has it; as ``evaluate`` has it where the method says that they are the same."""
    from rekindle.train.config import MethodSettings

    setting = setting_of("masked_world", {"hard": {"weight": 0.5}})
    monkeypatch.setattr(Length, "evaluates_losses", known)
    monkeypatch.setattr(Length, "asked", 0)
    method = Length(MethodSettings(method="length", weight=0.25), None)
    objective = replace(setting.objective, methods=(method,))
    data = replace(data_of(setting), objective=objective).at(objective.last)
    found = evaluate(setting.student, data, CPU)
    mean = float(np.mean(setting.cache.gather(setting.index, []).lengths))
    assert found["length/mean"] == pytest.approx(mean)
    expected = 0.5 * found["ce"] + 0.25 * mean * (1 if known else 2)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert (Length.asked == 0) is known


@pytest.mark.parametrize("what", ["terms", "losses of a method"])
def test_it_is_summed_up_in_the_order_of_the_configuration(setting_of, what):
    """To the last bit: a set would have an order of its own in every process, so that a resumed run
    would have another loss, and perhaps another best step, than one that was not interrupted.
    """
    from rekindle.train.config import MethodSettings

    names = ["big", "wide", "whole", "odd.lm", "even.lm"]
    setting = setting_of("masked_world", alone(term(*names)), batch=[3])
    objective, parts = setting.objective, [f"kd/{name}" for name in names]
    batch = setting.cache.gather(setting.index, names, epoch=0, masked_view=setting.view)
    if what != "terms":
        method = Length(MethodSettings(method="length", weight=1.0), None)
        method.evaluates_losses = True
        method.count = lambda batch: dict.fromkeys("abcdefgh", 1)
        objective = replace(setting_of("masked_world", {}).objective, methods=(method,))
        parts = ["ce", *(f"length/{name}" for name in "abcdefgh")]
    for seed in range(20):  # of other magnitudes each: any two orders differ in one of them
        values = (10.0 ** np.random.default_rng(seed).uniform(-9, 9, len(parts))).tolist()
        loss = HeldOutLoss(objective)
        loss.add(
            setting.student, batch, CPU, {n: (v, 1) for n, v in zip(parts, values, strict=True)}
        )
        assert loss.mean() == sum(values)
