"""The loss of a step and its gradient, held against plain PyTorch on the model's full logits.

The reference knows nothing of batches: it walks over decoded examples one by one, asks the whole
model for all its logits, and writes the losses down as the papers do.
"""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rekindle.data.batch import SequenceTargetBatch
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.data.targets import SequenceTargets, TeacherInfo, TokenLabelTargets
from rekindle.train.config import DistillTerm, ObjectiveConfig, StudentConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.objective import Counts, Objective, task_loss
from rekindle.train.student import build_student

CPU = torch.device("cpu")
EPOCH = 1


class Setting:
    """A student, an objective and a batch of one world; ``task`` follows the world's student."""

    def __init__(self, world, objective, steps=10, batch=None, missing=()):
        self.cache = world.open()
        self.task = "masked_lm" if any("masked" in v for v in self.cache.views) else "causal_lm"
        self.view = self.cache.masked_view().name if self.task == "masked_lm" else None
        config = parse_settings(ObjectiveConfig, objective)
        names = [name for term in config.distill for name in term.teachers]
        infos = {name: self.cache.teacher(name).info for name in names}
        self.objective = Objective(config, infos, self.task, steps)
        self.vocabulary = self.cache.corpus.info["tokenizer"]["size"]
        student = StudentConfig(model=str(world.student), task=self.task)
        self.student = build_student(student, self.objective.heads, self.vocabulary, 0).eval()
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():  # biases and LayerNorms away from their initial values
            for parameter in self.student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
        self.index = np.arange(3, 20) if batch is None else np.asarray(batch)
        self.missing = missing

    def batch(self, step):
        return self.cache.gather(
            self.index,
            self.objective.teachers_at(step),
            epoch=EPOCH,
            masked_view=self.view,
            allow_missing=self.missing,
        )

    def run(self, step=0, micro=None):
        """(loss, terms, gradients by parameter) of a step, in micro-batches."""
        batch = self.batch(step)
        counts = Counts.of(batch, self.task)
        self.student.zero_grad(set_to_none=True)
        loss, terms = 0.0, {}
        for part in split_batch(batch, micro or len(batch.index)):
            result = self.objective.loss(self.student, part, counts, step, CPU)
            if result.total.requires_grad:
                result.total.backward()
            loss += float(result.total.detach())
            for name, value in result.terms.items():
                terms[name] = terms.get(name, 0.0) + float(value)
        return loss, terms, self.gradients()

    def gradients(self):
        return {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}

    def reference(self, step=0):
        self.student.zero_grad(set_to_none=True)
        loss, terms = reference(self, step)
        loss.backward()
        return float(loss.detach()), terms, self.gradients()

    def check(self, step=0):
        """Loss, shown terms and gradients are the reference's; returns the terms."""
        loss, terms, found = self.run(step)
        expected_loss, expected_terms, expected = self.reference(step)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert terms.keys() == expected_terms.keys()
        for name, value in expected_terms.items():
            assert terms[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        same_gradients(found, expected)
        return terms


def same_gradients(found, expected, tolerance=2e-5):
    names = found.keys() | expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for name in names:
        zero = torch.zeros(())
        a, b = found.get(name, zero), expected.get(name, zero)
        assert float((a - b).abs().max()) <= tolerance * scale, name


# --- the reference ---


def ask(setting, ids, types=None):
    """(logits [S,V], final states [S,H]) of one sequence, without any padding."""
    inputs = {"input_ids": torch.as_tensor(ids).long()[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if types is not None:
        inputs["token_type_ids"] = torch.as_tensor(types).long()[None]
    model = setting.student.model
    logits = model(**inputs).logits[0]
    states = model.base_model(**inputs).last_hidden_state[0]
    return logits[:, : setting.vocabulary], states


def head(setting, name, state):
    return setting.student.heads[name.replace(".", "·")](state)


def targets_of(setting, example, name):
    """The one entry of the step's replica, or None."""
    found = example.targets[name]
    masked = [t for t in found if getattr(t, "replica", None) is not None]
    return next((t for t in masked or found if not masked or t.replica == EPOCH), None)


def masked_example(setting, index):
    """(input ids, masked positions) of replica 1, from the view itself."""
    batch = setting.cache.gather(np.array([index]), [], epoch=EPOCH, masked_view=setting.view)
    return batch.masked.input_ids[0], batch.masked.positions


def language_example(setting, index):
    """(inputs, positions with an LM loss, their labels)."""
    clean = setting.cache.example(index).input_ids
    if setting.task == "causal_lm":
        return clean, np.arange(len(clean) - 1), clean[1:]
    seen, positions = masked_example(setting, index)
    return seen, positions, clean[positions]


def tempered(target, tau):
    """Probabilities [P,K] and tail [P] at τ: the candidates share what the tail leaves."""
    tail = torch.as_tensor(target.log_tail[tau]).double().exp()
    kept = torch.softmax(torch.as_tensor(target.log_probs).double() / tau, dim=1)
    return (kept * (1 - tail)[:, None]).float(), tail.float()


def bucket_kl(logits, ids, probs, tail, tau):
    """Σ_K q log(q/p) + tail log(tail/rest), one row at a time."""
    out = []
    for z, i, q, t in zip(logits, ids, probs, tail, strict=True):
        p = torch.softmax(z / tau, dim=0)
        rest = torch.ones(len(p)).scatter(0, i, 0.0) @ p
        kl = (q * (q.log() - p[i].log())).sum()
        out.append(kl if t <= 0 else kl + t * (t.log() - rest.log()))
    return torch.stack(out) if out else logits.new_zeros(0)


def language_terms(setting, step):
    """CE and KL sums over all examples, with their counts."""
    sums = {"ce": [0.0, 0]}
    for index in setting.index.tolist():
        seen, positions, labels = language_example(setting, index)
        logits, _ = ask(setting, seen)
        example = setting.cache.example(index)
        picked = logits[positions]
        labels = torch.as_tensor(labels).long()
        sums["ce"][0] += F.cross_entropy(picked, labels, reduction="sum")
        sums["ce"][1] += len(positions)
        for term in setting.objective.config.distill:
            if setting.objective.teachers[term.teachers[0]].kind not in ("topk", "dense"):
                continue
            name = "kd/" + "+".join(term.teachers)
            sums.setdefault(name, [0.0, 0])
            found = [targets_of(setting, example, t) for t in term.teachers]
            if found[0] is None or not len(found[0].positions):
                continue
            ids, probs, tail = mixture(found, term)
            rows = logits[torch.as_tensor(found[0].positions)]
            kl = bucket_kl(rows, ids, probs, tail, term.temperature)
            sums[name][0] += kl.sum()
            sums[name][1] += len(rows)
    return sums


def mixture(found, term):
    """The mean of the teachers' sparse targets, by dictionary; one teacher is itself."""
    if term.k is not None:
        return prefix(found[0], term.k)
    parts = [tempered(t, term.temperature) for t in found]
    if len(found) == 1:
        return torch.tensor(found[0].ids), *parts[0]
    rows = []
    for row in range(len(found[0].positions)):
        mixed: dict[int, float] = {}
        for target, (probs, _) in zip(found, parts, strict=True):
            for token, q in zip(target.ids[row].tolist(), probs[row], strict=True):
                mixed[token] = mixed.get(token, 0.0) + q / len(found)
        rows.append((torch.tensor(list(mixed)), torch.stack(list(mixed.values()))))
    tail = sum(part[1] for part in parts) / len(found)
    return [r[0] for r in rows], [r[1] for r in rows], tail


def prefix(target, k):
    probs, tail = tempered(target, 1.0)
    return torch.as_tensor(target.ids[:, :k]), probs[:, :k], tail + probs[:, k:].sum(1)


def task_terms(setting):
    """name -> [sum of bare divergences, rows, τ² or 1]."""
    sums = {}
    for term in setting.objective.config.distill:
        for name in term.teachers:
            info = setting.objective.teachers[name]
            if info.kind not in ("sequence", "token"):
                continue
            total, rows = 0.0, 0
            for index in setting.index.tolist():
                for logits, wanted in task_rows(setting, index, name, info, term):
                    total = total + divergence(logits, wanted, info, term)
                    rows += 1
            square = term.divergence != "mse" and info.problem != "regression"
            sums[f"kd/{name}"] = [total, rows, term.temperature**2 if square else 1.0]
    return sums


def task_rows(setting, index, name, info, term):
    """(student logits [C], teacher logits [C]) for each target of one example."""
    example = setting.cache.example(index)
    target = targets_of(setting, example, name)
    if target is None:
        return
    ids, types = example.input_ids, None
    if term.view == "masked":
        ids = masked_example(setting, index)[0]
    if info.view.startswith("pairs-"):
        tokenizer = setting.cache.corpus.tokenizer
        ids, types = tokenizer.encode_pair(*example.pairs[info.view], max_length=24)
    _, states = ask(setting, ids, types)
    if isinstance(target, SequenceTargets):
        pooled = states[0] if setting.task == "masked_lm" else states[-1]
        yield head(setting, name, pooled), torch.as_tensor(target.logits)
        return
    assert isinstance(target, TokenLabelTargets)
    for position, logits in zip(target.positions, target.logits, strict=True):
        yield head(setting, name, states[position]), torch.as_tensor(logits)


def divergence(logits, wanted, info, term):
    if term.divergence == "mse" or info.problem == "regression":
        return (logits - wanted).square().mean()
    tau = term.temperature
    if info.problem == "multi_label_classification":
        q, p = torch.sigmoid(wanted / tau), torch.sigmoid(logits / tau)
        kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        return kl.mean()
    q, p = torch.softmax(wanted / tau, 0), torch.softmax(logits / tau, 0)
    return (q * (q / p).log()).sum()


def reference(setting, step):
    """(loss, shown terms): hard·CE + Σ weight·τ²·D, each a mean over the rows it has."""
    objective = setting.objective
    hard = objective.hard_weight(step)
    weights = {n: w for term, w in objective.active(step) for n in term.teachers}
    total, shown = 0.0, {}
    for name, (value, count) in language_terms(setting, step).items():
        if name == "ce":
            weight, factor = hard, 1.0
        else:
            first = name.removeprefix("kd/").split("+")[0]
            weight = weights.get(first, 0.0)
            tau = next(t.temperature for t in objective.config.distill if first in t.teachers)
            factor = tau**2
        if weight > 0:
            total = total + weight * factor * value / max(count, 1)
            shown[name] = float(torch.as_tensor(value).detach()) / max(count, 1)
    for name, (value, count, factor) in task_terms(setting).items():
        weight = weights.get(name.removeprefix("kd/"), 0.0)
        if weight > 0 and count:
            total = total + weight * factor * value / count
            shown[name] = float(value.detach()) / count
    return total, shown


def term(*teachers, **values):
    return {"teachers": list(teachers), **values}


FALL = {"schedule": "linear", "from": 1.0, "to": 0.0, "over": 0.5}
RISE = {"schedule": "linear", "from": 0.0, "to": 1.0, "over": 0.5}
OBJECTIVES = {
    "plain": {"hard": {"weight": 0.7}},
    "ce and kd": {"distill": [term("big", temperature=2.0, weight=0.6)]},
    "kd alone": {"hard": {"weight": 0}, "distill": [term("big", temperature=4.0)]},
    "kd alone, dense": {"hard": {"weight": 0}, "distill": [term("whole")]},
    "prefix": {"distill": [term("wide", k=5)]},
    "two terms": {"distill": [term("big", temperature=2.0), term("wide", weight=0.3)]},
    "mixture": {"distill": [term("big", "wide", temperature=2.0, combine="mixture")]},
    "one domain": {"distill": [term("odd.lm", temperature=2.0, weight=0.5)]},
    "one domain alone": {"hard": {"weight": 0}, "distill": [term("odd.lm")]},
    "a teacher per domain": {"distill": [term("odd.lm"), term("even.lm", temperature=2.0)]},
    "classifier": {"distill": [term("sense", temperature=3.0)]},
    "classifier, masked": {"distill": [term("sense", view="masked")]},
    "classifier, logits": {"distill": [term("sense", divergence="mse", temperature=2.0)]},
    "regression": {"hard": {"weight": 0}, "distill": [term("score", weight=0.1)]},
    "multi-label": {"hard": {"weight": 0}, "distill": [term("topics", temperature=2.0)]},
    "tokens": {"distill": [term("tags", temperature=2.0, weight=0.4)]},
    "tokens, masked": {"hard": {"weight": 0}, "distill": [term("tags", view="masked")]},
    "pairs": {"hard": {"weight": 0}, "distill": [term("pair", temperature=2.0)]},
    "everything": {
        "hard": {"weight": 0.5},
        "distill": [
            term("big", "wide", temperature=2.0, weight=0.9, combine="mixture"),
            term("odd.lm", weight=0.2),
            term("sense", "topics", "tags", weight=0.3),
            term("score", view="masked", weight=0.05),
            term("pair", weight=0.7),
        ],
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_masked_students_loss_and_gradient(masked_world, name):
    setting = Setting(masked_world, OBJECTIVES[name])
    terms = setting.check()
    assert all(value > 0.01 for value in terms.values())


@pytest.mark.parametrize(
    "objective",
    [
        {"distill": [term("lm", temperature=2.0, weight=0.5)]},
        {"distill": [term("odd"), term("lm", weight=0.2), term("sense")]},
        {"hard": {"weight": 0}, "distill": [term("sense", temperature=2.0)]},
    ],
)
def test_a_causal_students_loss_and_gradient(causal_world, objective):
    Setting(causal_world, objective).check()


@pytest.mark.parametrize("step", [0, 1, 4, 5, 9])
def test_knowledge_inheritance_weighs_as_published(masked_world, step):
    """(1−α)·CE + α·τ²·KL with α = max(1 − t/5, 0), τ = 2 (Qin et al. 2022)."""
    distill = [term("big", temperature=2.0, weight=FALL)]
    setting = Setting(masked_world, {"hard": {"weight": RISE}, "distill": distill})
    alpha = max(1 - step / 5, 0)
    assert setting.objective.hard_weight(step) == pytest.approx(1 - alpha)
    assert setting.objective.teachers_at(step) == (["big"] if alpha > 0 else [])
    terms = setting.check(step)
    loss = setting.run(step)[0]
    both = (1 - alpha) * terms.get("ce", 0) + alpha * 4 * terms.get("kd/big", 0)
    assert loss == pytest.approx(both, rel=1e-5)
    assert ("ce" in terms) == (step > 0)


@pytest.mark.parametrize(
    ("divergence", "tail"),
    [("reverse_kl", "bucket"), ("jsd", "bucket"), ("tvd", "bucket"), ("forward_kl", "renormalise")],
)
def test_divergence_and_tail_reach_the_loss(masked_world, divergence, tail):
    distill = [term("big", divergence=divergence, tail=tail)]
    setting = Setting(masked_world, {"hard": {"weight": 0}, "distill": distill}, batch=[4, 9])
    _, terms, found = setting.run()
    total, count = 0.0, 0
    setting.student.zero_grad(set_to_none=True)
    for index in (4, 9):
        seen, _, _ = language_example(setting, index)
        target = targets_of(setting, setting.cache.example(index), "big")
        logits = ask(setting, seen)[0][torch.as_tensor(target.positions)]
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
            }[divergence].sum()
        count += len(logits)
    (total / count).backward()
    assert terms["kd/big"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
    same_gradients(found, setting.gradients(), tolerance=1e-3)  # 1 − Σp is rough in float32


@pytest.mark.parametrize("name", ["everything", "one domain", "kd alone", "a teacher per domain"])
def test_micro_batches_of_every_size_give_the_same_gradient(masked_world, name):
    setting = Setting(masked_world, OBJECTIVES[name])
    masked = setting.batch(0).masked
    assert len(set(np.bincount(masked.rows).tolist())) > 2  # unequal numbers of masked positions
    loss, terms, expected = setting.run()
    for micro in (1, 2, 3, 5, 8, 16):
        found_loss, found_terms, found = setting.run(micro=micro)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found_terms == pytest.approx(terms, rel=1e-5)
        same_gradients(found, expected)


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
    alone = {"hard": {"weight": 0}, "distill": [term("pair")]}
    assert Setting(masked_world, alone, batch=single).run() == (0.0, {}, {})


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
    counts = Counts.of(batch, "masked_lm")
    examples = [setting.cache.example(i) for i in setting.index]
    assert counts.labels == len(batch.masked.labels) > 0
    assert counts.targets["big"] == counts.labels
    assert counts.targets["odd.lm"] == sum(
        len(t.positions) for e in examples for t in e.targets["odd.lm"] if t.replica == EPOCH
    )
    assert 0 < counts.targets["odd.lm"] < counts.labels
    assert counts.targets["pair"] == sum(len(e.targets["pair"]) for e in examples)
    assert counts.targets["tags"] == sum(len(e.targets["tags"][0].positions) for e in examples)
    lengths = [len(e.input_ids) for e in map(causal_world.open().example, range(3, 20))]
    causal = Counts.of(Setting(causal_world, {}).batch(0), "causal_lm")
    assert causal.labels == sum(n - 1 for n in lengths)


def test_schedules_decide_who_is_read(masked_world):
    fall = {"schedule": "step", "from": 1.0, "to": 0.0, "over": 0.5}
    rise = {"schedule": "step", "from": 0.0, "to": 1.0, "over": 0.2}
    distill = [term("big", weight=fall), term("sense", "topics", weight=rise), term("wide")]
    objective = Setting(masked_world, {"distill": distill}).objective
    read = [objective.teachers_at(step) for step in range(10)]
    assert read[:2] == [["big", "wide"]] * 2
    assert read[2:5] == [["big", "sense", "topics", "wide"]] * 3
    assert read[5:] == [["sense", "topics", "wide"]] * 5
    assert objective.heads.keys() == {"sense", "topics"}


# --- what is refused before the first step ---


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ([term("big", "sense")], "vocabulary teachers and task experts need a term each"),
        ([term("sense", "pair")], "saw different views"),
        ([term("sense", "topics", combine="mixture")], "mixture is for vocabulary teachers"),
        ([term("big", divergence="mse")], "mse is for task logits; big predicts tokens"),
        ([term("big", "wide")], "several vocabulary teachers in one term must be a mixture"),
        ([term("big", temperature=3.0)], r"stores the temperatures \[1.0, 2.0, 4.0\], not 3.0"),
        ([term("big", k=9)], "k = 9, but teacher 'big' keeps 8"),
        ([term("big"), term("wide"), term("big")], "'big' stands in two distill terms"),
        ([term("big", "big", combine="mixture")], "'big' stands in two distill terms"),
        ([term("sense"), term("pair", view="masked")], "distill.1: .*pairs are shown clean"),
    ],
)
def test_impossible_terms_are_refused(masked_world, distill, message):
    with pytest.raises(InputError, match=message):
        Setting(masked_world, {"distill": distill})


def test_the_error_names_the_term(masked_world):
    with pytest.raises(InputError, match=r"train\.objective\.distill\.1: "):
        Setting(masked_world, {"distill": [term("wide"), term("big", k=100)]})


def test_a_teacher_of_the_other_task_is_refused(masked_world, causal_world):
    infos = {n: masked_world.open().teacher(n).info for n in ("big", "sense")}
    config = parse_settings(ObjectiveConfig, {"distill": [term("big")]})
    with pytest.raises(InputError, match="'big' is a masked_lm; a causal_lm student has no loss"):
        Objective(config, infos, "causal_lm", 10)
    config = parse_settings(ObjectiveConfig, {"distill": [term("sense", view="masked")]})
    with pytest.raises(InputError, match="a causal_lm student has no masked view"):
        Objective(config, infos, "causal_lm", 10)
    infos = {"lm": causal_world.open().teacher("lm").info}
    config = parse_settings(ObjectiveConfig, {"distill": [term("lm")]})
    with pytest.raises(InputError, match="'lm' is a causal_lm; a masked_lm student has no loss"):
        Objective(config, infos, "masked_lm", 10)


def test_a_mixture_of_different_domains_is_refused(masked_world):
    distill = [term("big", "odd.lm", combine="mixture")]
    with pytest.raises(InputError, match=r"big, odd\.lm are for different domains"):
        Setting(masked_world, {"distill": distill})


def test_a_mixture_with_a_hole_in_one_teacher_is_refused(masked_world, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(masked_world.path, folder)
    (folder / "targets/wide/commits/00000-r001.json").unlink()
    distill = [term("big", "wide", combine="mixture")]
    world = replace(masked_world, path=folder)
    setting = Setting(world, {"distill": distill}, missing=("wide",), batch=range(30, 50))
    with pytest.raises(InputError, match="one has holes where another has none"):
        setting.run()


FALL_TO_ZERO = {"from": 1.0, "to": 0.0, "over": 0.5}


@pytest.mark.parametrize(
    "objective",
    [
        {"hard": {"weight": 0}},
        {"hard": {"weight": 0}, "distill": [term("big", weight=0)]},
        {"hard": {"weight": 0}, "distill": [term("big", weight=FALL_TO_ZERO)]},
        {"hard": {"weight": FALL_TO_ZERO}, "distill": [term("big", weight=FALL_TO_ZERO)]},
    ],
)
def test_an_objective_that_ends_as_nothing_is_refused(masked_world, objective):
    with pytest.raises(InputError, match="every weight is 0, so nothing is trained"):
        Setting(masked_world, objective)


def test_a_weight_that_falls_to_zero_at_the_very_end_is_no_such_objective(masked_world):
    fall = {"from": 1.0, "to": 0.0, "over": 1.0}
    distill = [term("big", weight=fall)]
    objective = Setting(masked_world, {"hard": {"weight": 0}, "distill": distill}).objective
    assert objective.teachers_at(9) == ["big"]


# --- task losses by themselves ---


def info_of(problem, labels=3):
    return TeacherInfo(
        name="t",
        task="sequence_classification",
        kind="sequence",
        view="text",
        num_labels=labels,
        problem=problem,
    )


@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_a_task_loss_is_zero_where_student_and_teacher_agree(problem):
    labels = 1 if problem == "regression" else 3
    logits = torch.randn(5, labels, requires_grad=True)
    found = task_loss(
        logits, logits.detach(), info_of(problem, labels), DistillTerm(teachers=("t",))
    )
    found[0].backward()
    assert float(found[0].detach()) == pytest.approx(0, abs=1e-5)
    assert float(found[1]) == pytest.approx(0, abs=1e-5)
    assert float(logits.grad.abs().max()) < 1e-6


def test_sequence_divergences_are_those_of_the_configuration():
    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(4, 3, generator=draw), torch.randn(4, 3, generator=draw)
    q, p = torch.softmax(t / 2, 1), torch.softmax(z / 2, 1)
    m = (p + q) / 2
    expected = {
        "forward_kl": (q * (q / p).log()).sum(),
        "reverse_kl": (p * (p / q).log()).sum(),
        "jsd": (q * (q / m).log() + p * (p / m).log()).sum() / 2,
        "tvd": (p - q).abs().sum() / 2,
    }
    for name, value in expected.items():
        config = DistillTerm(teachers=("t",), divergence=name, temperature=2.0)
        loss, shown = task_loss(z, t, info_of("single_label_classification"), config)
        assert float(shown) == pytest.approx(float(value), rel=1e-4)
        assert float(loss) == pytest.approx(4 * float(value), rel=1e-4)


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
