"""The loss of a step and its gradient, held against plain PyTorch on the model's full logits."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from rekindle.data.batch import SequenceTargetBatch
from rekindle.train.objective.selection import Counts
from testlib.objective.cases import CASES, FALL, KINDS, MERGED, OBJECTIVES, RISE, alone, term
from testlib.objective.reference import (
    EPOCH,
    ask,
    language_example,
    muki_weights,
    targets_of,
    tempered,
    union_of,
)
from testlib.objective.setting import Setting, same_step
from testlib.students import gradients, same_gradients


@pytest.mark.parametrize(("world", "name"), CASES)
def test_loss_and_gradient_are_the_references(setting_of, world, name):
    terms = setting_of(world, name, batch=range(3, 14)).check()
    assert all(value > 0.005 for value in terms.values())


@pytest.mark.parametrize("step", [0, 1, 4, 5, 9])
def test_knowledge_inheritance_weighs_as_published(masked_world, step):
    """(1−α)·CE + α·τ²·KL with α = max(1 − t/5, 0), τ = 2 (Qin et al. 2022)."""
    distill = [term("big", temperature=2.0, weight=FALL)]
    setting = Setting(masked_world, {"hard": {"weight": RISE}, "distill": distill})
    alpha = max(1 - step / 5, 0)
    assert setting.objective.plan(step).hard == pytest.approx(1 - alpha)
    assert setting.objective.plan(step).teachers == (("big",) if alpha > 0 else ())
    terms = setting.check(step)
    loss = setting.run(step)[0]
    both = (1 - alpha) * terms.get("ce", 0) + alpha * 4 * terms.get("kd/big", 0)
    assert loss == pytest.approx(both, rel=1e-5)
    assert ("ce" in terms) == (step > 0)


@pytest.mark.parametrize(
    ("divergence", "tail"),
    [
        ("reverse_kl", "bucket"),
        ("jsd", "bucket"),
        ("tvd", "bucket"),
        ("skew_kl", "bucket"),
        ("forward_kl", "renormalise"),
    ],
)
def test_divergence_and_tail_reach_the_loss(masked_world, divergence, tail):
    skew = {"skew": 0.3} if divergence == "skew_kl" else {}
    distill = [term("big", divergence=divergence, tail=tail, **skew)]
    setting = Setting(masked_world, {"hard": {"weight": 0}, "distill": distill}, batch=[4, 9])
    _, terms, found = setting.run()
    total, count = 0.0, 0
    setting.student.zero_grad(set_to_none=True)
    for index in (4, 9):
        seen, _, _ = language_example(setting, index)
        target = targets_of(setting, setting.cache.example(index), "big")
        logits = ask(setting, seen)[torch.as_tensor(target.positions)]
        q, rest = tempered(target, 1.0)
        p = torch.softmax(logits, 1).gather(1, torch.as_tensor(target.ids))
        if tail == "renormalise":
            q = q / q.sum(1, keepdim=True)
            total += (q * (q / p).log()).sum()
        else:
            q, p = torch.cat([q, rest[:, None]], 1), torch.cat([p, 1 - p.sum(1, keepdim=True)], 1)
            m = (p + q) / 2
            total += {
                "reverse_kl": p * (p / q).log(),
                "jsd": (q * (q / m).log() + p * (p / m).log()) / 2,
                "tvd": (p - q).abs() / 2,
                "skew_kl": q * (q / (0.3 * q + 0.7 * p)).log(),
            }[divergence].sum()
        count += len(logits)
    (total / count).backward()
    assert terms["kd/big"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
    same_gradients(found, gradients(setting.student), tolerance=1e-3)  # 1 − Σp is rough in float32


def test_rows_that_pad_the_vocabulary_get_no_gradient(masked_world, causal_world):
    for world, names in ((masked_world, ["big"]), (causal_world, ["lm"])):
        setting = Setting(world, {"distill": [term(*names, temperature=2.0)]})
        setting.run()
        weight = setting.student.model.get_output_embeddings().weight
        assert len(weight) == setting.vocabulary + 7
        assert (weight.grad[setting.vocabulary :] == 0).all()
        assert (weight.grad[: setting.vocabulary] != 0).any(dim=1).all()
        bias = setting.student.model.get_output_embeddings().bias
        if bias is not None:
            assert (bias.grad[setting.vocabulary :] == 0).all()


def test_a_batch_without_any_target_of_a_teacher(masked_world):
    """No sequence of its domain, or no pair: its term is 0, the others are as they were."""
    cache = masked_world.open()
    batch = cache.gather(np.arange(len(cache)), ["pair"])
    even = [i for i, domain in enumerate(batch.domains) if domain == "even"][:4]
    single = [i for i in range(len(cache)) if not batch.targets["pair"].present[i]][:4]
    plain = Setting(masked_world, {}, batch=even).run()
    setting = Setting(masked_world, {"distill": [term("odd.lm")]}, batch=even)
    loss, terms, found = setting.run()
    assert loss == pytest.approx(plain[0])
    assert terms["kd/odd.lm"] == 0
    same_gradients(found, plain[2])
    loss, terms, found = Setting(masked_world, alone(term("pair")), batch=single).run()
    assert (loss, terms) == (0.0, {"kd/pair": 0.0})
    assert not any(gradient.any() for gradient in found.values())


def test_a_route_goes_past_a_teachers_holes(masked_world, tmp_path):
    """Sequences of a shard that the first teacher has not finished are the second one's."""
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    (folder / "targets/wide/commits/00000-r001.json").unlink()
    world = replace(masked_world, path=folder)
    distill = [term("wide", "big", combine="route", temperature=2.0)]
    setting = Setting(world, {"distill": distill}, missing=("wide",), batch=range(30, 50))
    targets = setting.batch(0).targets
    assert set(targets["big"].rows.tolist()) == set(range(10))
    assert set(targets["wide"].rows.tolist()) == set(range(10, 20))
    setting.check()


def test_a_teacher_that_never_teaches_changes_nothing(masked_world):
    with_second = Setting(masked_world, OBJECTIVES["route, first always"])
    first = term("big", weight=0.6)
    loss, terms, found = Setting(masked_world, {"distill": [first]}).run()
    routed = with_second.run()
    assert routed[0] == pytest.approx(loss, rel=1e-6)
    assert routed[1] == {
        "ce": pytest.approx(terms["ce"]),
        "kd/big+odd.lm": pytest.approx(terms["kd/big"]),
    }
    same_gradients(routed[2], found)


def test_routed_rows_share_one_mean(masked_world):
    """Not a mean of means: odd and even sequences have unequal numbers of positions."""
    sums = {}
    for name in ("odd.lm", "even.lm"):
        setting = Setting(masked_world, alone(term(name)))
        rows = setting.objective.counts(setting.batch(0), setting.objective.plan(0)).rows[
            f"kd/{name}"
        ]
        sums[name] = (rows * setting.run()[0], rows)
    (a, n), (b, m) = sums.values()
    assert n != m
    routed = Setting(masked_world, alone(term("odd.lm", "even.lm", combine="route"))).run()
    assert routed[0] == pytest.approx((a + b) / (n + m), rel=1e-5)
    separate = Setting(masked_world, alone(term("odd.lm", "even.lm"))).run()
    assert separate[0] == pytest.approx(a / n + b / m, rel=1e-5)


@pytest.mark.parametrize("hard", [0, 1])
def test_all_positions_by_entropy_are_all_positions(masked_world, hard):
    runs = [
        Setting(masked_world, {"hard": {"weight": hard}, "distill": [term("big", **values)]}).run()
        for values in ({}, {"entropy_fraction": 1.0})
    ]
    same_step(runs[1], runs[0])


def test_of_equal_entropies_the_first_positions_are_taken(masked_world):
    """The reference sorts stably, and a student without an output matrix is sure of nothing."""
    setting = Setting(masked_world, OBJECTIVES["entropy"])
    output = setting.student.model.get_output_embeddings()
    with torch.no_grad():
        output.weight.zero_()
        output.bias.zero_()
    setting.check()


def test_a_fraction_of_the_positions_gives_another_loss(masked_world):
    """The reference's, which would not say so if both took all of them."""
    loss = Setting(masked_world, alone(term("big", entropy_fraction=0.3))).run()[0]
    everything = Setting(masked_world, alone(term("big"))).run()[0]
    assert abs(loss - everything) > 0.01 * everything


@pytest.mark.parametrize(("labels", "size"), [("merge", 4), ("apart", 6)])
def test_a_mixture_has_one_head_over_all_labels(experts_world, labels, size):
    distill = [term("animals", "pets", combine="mixture", labels=labels)]
    setting = Setting(experts_world, alone(*distill))
    head = setting.objective.heads["animals+pets"]
    union = union_of(setting, setting.objective.config.distill[0])
    expected = ["/".join(n) if labels == "apart" else n for n in union]
    assert list(head.label_names) == expected
    assert (head.num_labels, head.problem) == (size, "single_label_classification")
    assert list(setting.student.head_configs) == ["animals+pets"]


def test_the_experts_of_the_tests_differ_in_certainty(experts_world):
    """Else soft and hard weights, or margins, could not be told apart."""
    setting = Setting(experts_world, MERGED["muki"])
    one = setting.objective.config.distill[0]
    found = []
    for index in setting.index.tolist():
        example = setting.cache.example(index)
        means = {n: targets_of(setting, example, n).mc_probs.tolist() for n in KINDS}
        found.append(muki_weights(means, one))
    best = {max(weights, key=weights.get) for weights, _ in found}
    assert len(best) > 1
    assert max(v for _, v in found) > 2 * min(v for _, v in found)
    assert all(max(weights.values()) < 0.95 for weights, _ in found[:3])


def test_losses_are_shown_in_a_fixed_order(experts_world):
    """Only those that the step has rows for."""
    setting = Setting(experts_world, MERGED["all of it"])
    counts = setting.objective.counts(setting.batch(0), setting.objective.plan(0))
    names = ["ce", "kd/animals+pets+weather", "kd/lm", "kd/odd.plants", "kd/odd.score"]
    names += ["kd/odd.tags+tags", "kd/pair.a+pair.b"]
    assert setting.objective.loss_names(counts, setting.objective.plan(0)) == names
    assert (
        setting.objective.loss_names(
            Counts(0, dict.fromkeys(counts.rows, 0)), setting.objective.plan(0)
        )
        == []
    )
    some = Counts(3, dict.fromkeys(counts.rows, 0) | {"kd/lm": 1})
    assert setting.objective.loss_names(some, setting.objective.plan(0)) == ["ce", "kd/lm"]


def test_absent_pairs_weigh_nothing(masked_world):
    """The mean is over the pairs there are."""
    cache = masked_world.open()
    present = cache.gather(np.arange(len(cache)), ["pair"]).targets["pair"].present
    some, none = np.flatnonzero(present)[:3], np.flatnonzero(~present)[:5]
    objective = {"hard": {"weight": 0}, "distill": [term("pair")]}
    mixed = np.concatenate([none[:2], some[:1], none[2:], some[1:]])
    loss, _, found = Setting(masked_world, objective, batch=mixed).run()
    expected = Setting(masked_world, objective, batch=some).run()
    assert loss == pytest.approx(expected[0], rel=1e-5)
    same_gradients(found, expected[2])


def test_counts_are_the_rows_of_the_whole_batch(masked_world, causal_world):
    setting = Setting(masked_world, OBJECTIVES["everything"])
    batch = setting.batch(0)
    counts = setting.objective.counts(batch, setting.objective.plan(0))
    examples = [setting.cache.example(i) for i in setting.index]
    assert counts.labels == len(batch.masked.labels) > 0
    assert counts.rows["kd/big+wide"] == counts.labels
    assert counts.rows["kd/odd.lm"] == sum(
        len(t.positions) for e in examples for t in e.targets["odd.lm"] if t.replica == EPOCH
    )
    assert 0 < counts.rows["kd/odd.lm"] < counts.labels
    assert counts.rows["kd/pair"] == sum(len(e.targets["pair"]) for e in examples)
    assert counts.rows["kd/tags"] == sum(len(e.targets["tags"][0].positions) for e in examples)
    lengths = [len(e.input_ids) for e in map(causal_world.open().example, range(3, 20))]
    plain = Setting(causal_world, {})
    causal = plain.objective.counts(plain.batch(0), plain.objective.plan(0))
    assert causal.labels == sum(n - 1 for n in lengths)


def test_schedules_decide_who_is_read(masked_world):
    fall = {"schedule": "step", "from": 1.0, "to": 0.0, "over": 0.5}
    rise = {"schedule": "step", "from": 0.0, "to": 1.0, "over": 0.2}
    distill = [term("big", weight=fall), term("sense", "topics", weight=rise), term("wide")]
    objective = Setting(masked_world, {"distill": distill}).objective
    read = [objective.plan(step).teachers for step in range(10)]
    assert read[:2] == [("big", "wide")] * 2
    assert read[2:5] == [("big", "sense", "topics", "wide")] * 3
    assert read[5:] == [("sense", "topics", "wide")] * 5
    assert objective.heads.keys() == {"sense", "topics"}


def test_a_head_of_a_tag_expert_is_asked_only_where_there_are_tags(masked_world):
    setting = Setting(masked_world, OBJECTIVES["tokens"])
    batch = setting.batch(0)
    assert not isinstance(batch.targets["tags"], SequenceTargetBatch)
    seen = []
    hook = setting.student.heads["tags"].register_forward_hook(
        lambda module, arguments, output: seen.append(output.shape)
    )
    setting.run()
    hook.remove()
    assert seen == [(len(batch.targets["tags"].rows), 5)]


def test_the_loss_never_asks_for_all_logits(masked_world):
    """Logits [B,S,V] are what the split is there to avoid."""
    setting = Setting(masked_world, OBJECTIVES["ce and kd"])
    seen = []
    module = setting.student.model.get_output_embeddings()
    hook = module.register_forward_hook(lambda m, a, output: seen.append(output.shape))
    setting.run()
    hook.remove()
    rows = len(setting.batch(0).masked.labels)
    assert seen == [(rows, 16)]
    assert math.prod(seen[0]) < rows * setting.vocabulary


@pytest.mark.parametrize(
    ("weights", "taught"),
    [
        ((0, 0.5), {"wide"}),
        ((FALL, RISE), {"big", "wide"}),
        ((RISE | {"from": 0, "to": 0}, 1), {"wide"}),
        ((FALL | {"from": 0.3, "to": 0, "over": 0.01}, 0), {"big"}),
    ],
)
def test_who_teaches_at_some_step(masked_world, weights, taught):
    """Its cost is the run's; that of the others, of weight 0 throughout, is not."""
    names = ("big", "wide")
    distill = [term(name, weight=w) for name, w in zip(names, weights, strict=True)]
    objective = Setting(masked_world, {"distill": distill}).objective
    assert objective.active_teachers == taught
    assert taught == {n for step in range(objective.steps) for n in objective.plan(step).teachers}
