"""The loss of a step and its gradient, held against plain PyTorch on the model's full logits.

The reference knows nothing of batches: it walks over decoded examples one by one, asks the whole
model for all its logits, and writes the losses down as the papers do.
"""

import math
import shutil
import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rekindle.data.batch import SequenceTargetBatch, TokenLabelBatch
from rekindle.data.errors import InputError
from rekindle.data.example import SequenceTargets, TokenLabelTargets
from rekindle.data.settings import parse_settings
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import DistillTerm, ObjectiveConfig, StudentConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.distributed import World
from rekindle.train.objective.objective import Objective
from rekindle.train.objective.ranking_pass import with_centres
from rekindle.train.objective.selection import Counts
from rekindle.train.objective.task_loss import task_loss
from rekindle.train.objective.terms import check_terms
from rekindle.train.student import build_student

CPU = torch.device("cpu")
EPOCH = 1
LOG_OF_ZERO = -126 * math.log(2)  # of a probability of 0, where reverse KL needs it


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
        found = self.cache.gather(
            self.index,
            self.objective.teachers_at(step),
            epoch=EPOCH,
            masked_view=self.view,
            allow_missing=self.missing,
        )
        return self.objective.select(found, step)

    def run(self, step=0, micro=None):
        """(loss, terms, gradients by parameter) of a step, in micro-batches."""
        batch = self.batch(step)
        counts = self.objective.counts(batch, step)
        parts = split_batch(batch, micro or len(batch.index))
        return self._sum(parts, self._centred(counts, parts, step, World.alone()), step)

    def _centred(self, counts, parts, step, world):
        def run(work, *arguments):
            return work(self.student, *arguments)

        return with_centres(counts, self.objective, parts, step, world, run)

    def run_apart(self, processes, step=0):
        """The same of a step of which each process reads, selects and counts its own part."""
        index = self.index
        parts, counted = [], []
        for rank in range(processes):
            self.index = index[rank::processes]
            parts.append(self.batch(step))
            counted.append(self.objective.counts(parts[-1], step))
        self.index = index
        counts = Counts(
            sum(c.labels for c in counted),
            {name: sum(c.rows[name] for c in counted) for name in counted[0].rows},
        )
        assert counts == self.objective.counts(self.batch(step), step)
        found = at_once(
            processes,
            lambda world, rank: self._centred(counts, split_batch(parts[rank], 2), step, world),
        )
        assert all(one == found[0] for one in found)
        return self._sum(parts, found[0], step)

    def passes(self, batch, step=0):
        """Which forward passes a micro-batch takes, and which parameters get a gradient."""
        seen = []
        forward = self.student.forward

        def watch(inputs, select=None, sequence_heads=(), token_heads=None):
            heads = (tuple(sequence_heads), tuple(token_heads or {}))
            seen.append((select is None, "token_type_ids" in inputs, *heads))
            return forward(inputs, select, sequence_heads, token_heads)

        self.student.forward = watch
        try:
            counts = self.objective.counts(batch, step)
            found = self._sum([batch], self._centred(counts, [batch], step, World.alone()), step)[2]
        finally:
            self.student.forward = forward
        return seen, sorted(found)

    def _sum(self, parts, counts, step):
        self.student.zero_grad(set_to_none=True)
        loss, terms = 0.0, {}
        for part in parts:
            result = self.objective.loss(self.student, part, counts, step, CPU)
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


class Threads(World):
    """Processes that are threads of one."""

    meeting, table = None, None

    def sum(self, values):
        self.table[self.rank] = list(values)
        self.meeting.wait()
        found = [sum(column) for column in zip(*self.table, strict=True)]
        self.meeting.wait()
        return found


def at_once(processes, work):
    """What ``work(world, rank)`` returns in each of some processes."""
    meeting, table = threading.Barrier(processes), [None] * processes
    found = [None] * processes

    def run(rank):
        world = Threads(rank, processes, CPU, CPU)
        object.__setattr__(world, "meeting", meeting)
        object.__setattr__(world, "table", table)
        try:
            found[rank] = work(world, rank)
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found
    return found


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


def who_teaches(setting, example, term):
    """(name of the loss, teachers that make one target) for each loss of an example."""
    have = [name for name in term.teachers if has_targets(setting, example, name, term)]
    joint = "kd/" + "+".join(term.teachers)
    if term.combine == "separate":
        return [(f"kd/{name}", [name]) for name in have]
    if term.combine == "route":
        return [(joint, have[:1])] if have else []
    return [(joint, have)] if have == list(term.teachers) else []


def has_targets(setting, example, name, term):
    target = targets_of(setting, example, name)
    if target is None:
        return False
    if isinstance(target, SequenceTargets):
        return is_sure(target.logits, setting.objective.teachers[name], term)
    return len(kept_positions(setting, example, target, term)) > 0


def is_sure(logits, info, term):
    """Whether an expert's answer reaches the confidence of pseudo-labels."""
    if term.divergence != "pseudo_label":
        return True
    least = 0.9 if term.confidence is None else term.confidence
    logits = torch.as_tensor(logits).double()
    if info.problem == "multi_label_classification":
        p = torch.sigmoid(logits)
        return bool((torch.maximum(p, 1 - p) >= least).any())
    return bool(torch.softmax(logits, 0).max() >= least)


def kept_positions(setting, example, target, term):
    """Which of the target's entries are used."""
    if isinstance(target, TokenLabelTargets):
        info = setting.objective.teachers[term.teachers[0]]
        sure = [i for i, z in enumerate(target.logits) if is_sure(z, info, term)]
        if term.positions == "all":
            return sure
        masked = set(masked_example(setting, example.index)[1].tolist())
        return [i for i in sure if target.positions[i] in masked]
    if term.positions == "all":
        return list(range(len(target.positions)))
    masked = set(masked_example(setting, example.index)[1].tolist())
    return [i for i, place in enumerate(target.positions.tolist()) if place in masked]


def all_names(term):
    """The names of the losses of a term."""
    if term.combine == "separate":
        return [f"kd/{name}" for name in term.teachers]
    return ["kd/" + "+".join(term.teachers)]


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


class Sums:
    """Of one loss: Σ τ²·D, Σ D as it is shown, and the number of rows."""

    def __init__(self):
        self.loss, self.shown, self.rows = 0.0, 0.0, 0

    def add(self, loss, shown, rows=1):
        self.loss, self.shown, self.rows = self.loss + loss, self.shown + shown, self.rows + rows


def language_sums(setting, terms, sums):
    """CE and KL over all examples."""
    for index in setting.index.tolist():
        seen, positions, labels = language_example(setting, index)
        logits, _ = ask(setting, seen)
        example = setting.cache.example(index)
        labels = torch.as_tensor(labels).long()
        ce = F.cross_entropy(logits[positions], labels, reduction="sum")
        sums["ce"].add(ce, ce.detach(), len(positions))
        for term in terms:
            for name, teachers in who_teaches(setting, example, term):
                found = [targets_of(setting, example, teacher) for teacher in teachers]
                ids, probs, tail = mixture(found, term)
                rows = logits[torch.as_tensor(found[0].positions)]
                kl = bucket_kl(rows, ids, probs, tail, term.temperature)
                if term.entropy_fraction is not None:
                    kl = kl[least_certain(rows, term.entropy_fraction)]
                sums[name].add(term.temperature**2 * kl.sum(), kl.sum().detach(), len(kl))


def least_certain(logits, fraction):
    """The rows with the highest entropy: the fraction of them, rounded up."""
    p = torch.softmax(logits.detach().double(), dim=1)
    entropies = (-(p * p.log()).sum(1)).tolist()
    wanted = math.ceil(Fraction(str(fraction)) * len(entropies))
    return sorted(range(len(entropies)), key=lambda row: -entropies[row])[:wanted]


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


def task_sums(setting, terms, sums):
    """What the heads are taught, over all examples."""
    for term in terms:
        if term.ranking is not None:
            ranking_sums(setting, term, sums)
            continue
        for index in setting.index.tolist():
            example = setting.cache.example(index)
            for name, teachers in who_teaches(setting, example, term):
                if term.combine in ("mixture", "uncertainty", "concatenate"):
                    sums[name].add(*mixed_row(setting, example, term))
                    continue
                info = setting.objective.teachers[teachers[0]]
                for logits, wanted in task_rows(setting, example, info, term):
                    sums[name].add(*task_row(logits, wanted, info, term))


def ranking_sums(setting, term, sums):
    """Mean error of the scores, and of all differences of two scores of a group."""
    for name in term.teachers:
        info, rows = setting.objective.teachers[name], []
        for index in setting.index.tolist():
            example = setting.cache.example(index)
            if targets_of(setting, example, name) is not None:
                group = {"batch": "", "domain": example.domain, "document": example.document}
                [(score, wanted)] = task_rows(setting, example, info, term)
                rows.append((group[term.ranking.group], score[0], wanted[0]))
        points = [(s - t) ** 2 for _, s, t in rows]
        pairs = [
            ((s - z) - (t - u)) ** 2
            for i, (group, s, t) in enumerate(rows)
            for other, z, u in rows[:i]
            if group == other
        ]
        loss = term.ranking.pointwise * sum(points) / len(points)
        if pairs:
            loss = loss + term.ranking.pairwise * sum(pairs) / len(pairs)
        sums[f"kd/{name}"].add(loss, loss.detach())


def states_of(setting, example, info, term):
    """The student's final states [S,H] of what it is shown."""
    ids, types = example.input_ids, None
    if term.view == "masked":
        ids = masked_example(setting, example.index)[0]
    if info.view.startswith("pairs-"):
        tokenizer = setting.cache.corpus.tokenizer
        ids, types = tokenizer.encode_pair(*example.pairs[info.view], max_length=24)
    return ask(setting, ids, types)[1]


def pooled(setting, states):
    return states[0] if setting.task == "masked_lm" else states[-1]


def task_rows(setting, example, info, term):
    """(student logits [C], teacher logits [C]) for each target of one example."""
    target = targets_of(setting, example, info.name)
    states = states_of(setting, example, info, term)
    if isinstance(target, SequenceTargets):
        yield head(setting, info.name, pooled(setting, states)), torch.as_tensor(target.logits)
        return
    assert isinstance(target, TokenLabelTargets)
    for entry in kept_positions(setting, example, target, term):
        logits = head(setting, info.name, states[target.positions[entry]])
        yield logits, torch.as_tensor(target.logits[entry])


def task_row(logits, wanted, info, term):
    """(loss with its τ², what is shown) of one row."""
    if term.divergence == "mse" or info.problem == "regression":
        error = (logits - wanted).square().mean()
        return error, error.detach()
    if term.divergence == "pseudo_label":
        ce = pseudo_label_row(logits, wanted, info, term)
        return ce, ce.detach()
    tau = term.temperature
    if info.problem == "multi_label_classification":
        q, p = torch.sigmoid(wanted / tau), torch.sigmoid(logits / tau)
        kl = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    else:
        q, p = torch.softmax(wanted / tau, 0), torch.softmax(logits / tau, 0)
        kl = divergence(q, p, term.divergence)
    return tau**2 * kl, kl.detach()


def pseudo_label_row(logits, wanted, info, term):
    """−log p of the expert's class; of its answers, yes or no, that it is sure of."""
    if info.problem != "multi_label_classification":
        return -torch.log_softmax(logits, 0)[int(wanted.argmax())]
    losses = []
    for own, z in zip(logits, wanted.double(), strict=True):
        if max(torch.sigmoid(z), torch.sigmoid(-z)) >= (term.confidence or 0.9):
            losses.append(-torch.log(torch.sigmoid(own if z > 0 else -own)))
    return sum(losses) / len(logits)


def divergence(q, p, kind):
    """D of two vectors of probabilities; 0·log 0 = 0."""
    m = (q + p) / 2
    return {
        "forward_kl": torch.special.xlogy(q, q) - torch.special.xlogy(q, p),
        "reverse_kl": p * (p.log() - q.log().clamp(min=LOG_OF_ZERO)),
        "jsd": (torch.special.xlogy(q, q) - torch.special.xlogy(q, m) + p * (p / m).log()) / 2,
        "tvd": (p - q).abs() / 2,
    }[kind].sum()


def labels_of(setting, teacher, term):
    """An expert's labels: equal names are one label, or each expert has its own."""
    names = setting.objective.teachers[teacher].label_names
    return [(teacher, name) if term.labels == "apart" else name for name in names]


def union_of(setting, term):
    """All labels, in the order in which the experts bring them."""
    every = [label for teacher in term.teachers for label in labels_of(setting, teacher, term)]
    return list(dict.fromkeys(every))


def mixed_row(setting, example, term):
    """(v·τ²·D(q ‖ p), v·D) of one example, as METHODS.md writes MUKI down."""
    tau = term.temperature
    found = {teacher: targets_of(setting, example, teacher) for teacher in term.teachers}
    weights, v = dict.fromkeys(found, 1 / len(found)), 1.0
    if term.combine == "uncertainty":
        weights, v = muki_weights({n: t.mc_probs.tolist() for n, t in found.items()}, term)
    q = dict.fromkeys(union_of(setting, term), 0.0)
    if term.combine == "concatenate":  # one softmax: each expert weighs as its powers do
        sums = {n: sum(math.exp(z / tau) for z in t.logits.tolist()) for n, t in found.items()}
        weights = {n: part / sum(sums.values()) for n, part in sums.items()}
    for teacher, target in found.items():
        powers = [math.exp(z / tau) for z in target.logits.tolist()]
        for label, power in zip(labels_of(setting, teacher, term), powers, strict=True):
            q[label] += weights[teacher] * power / sum(powers)
    info = setting.objective.teachers[term.teachers[0]]
    state = pooled(setting, states_of(setting, example, info, term))
    p = torch.softmax(head(setting, "+".join(term.teachers), state) / tau, 0)
    d = divergence(torch.tensor(list(q.values())), p, term.divergence)
    return v * tau**2 * d, v * d.detach()


def muki_weights(means, term):
    """w by expert, and v, of the Monte-Carlo means by expert."""
    s = {
        n: 1 + sum(p * math.log(p) for p in mean if p > 0) / math.log(len(mean))
        for n, mean in means.items()
    }
    best, second = sorted(s.values(), reverse=True)[:2]
    v = best - second + 1e-6 if term.uncertainty.margin else 1.0
    if term.uncertainty.selection == "hard":
        return {n: float(value == best) for n, value in s.items()}, v
    powers = {n: math.exp(value / term.uncertainty.sharpness) for n, value in s.items()}
    return {n: power / sum(powers.values()) for n, power in powers.items()}, v


def reference(setting, step):
    """(loss, shown terms): hard·CE + Σ weight·τ²·D, each a mean over the rows it has."""
    objective = setting.objective
    active = objective.active(step)
    weights = {name: weight for term, weight in active for name in all_names(term)}
    if objective.hard_weight(step) > 0:
        weights["ce"] = objective.hard_weight(step)
    sums = {name: Sums() for name in ["ce", *weights]}
    terms = [term for term, _ in active]
    words = [t for t in terms if objective.teachers[t.teachers[0]].kind in ("topk", "dense")]
    language_sums(setting, words, sums)
    task_sums(setting, [t for t in terms if t not in words], sums)
    total = sum(w * sums[name].loss / max(sums[name].rows, 1) for name, w in weights.items())
    return total, {name: float(sums[name].shown) / max(sums[name].rows, 1) for name in weights}


def term(*teachers, **values):
    return {"teachers": list(teachers), **values}


def alone(*terms):
    return {"hard": {"weight": 0}, "distill": list(terms)}


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
    "separate": {"distill": [term("big", "wide", temperature=2.0, weight=0.4)]},
    "separate, alone": {"hard": {"weight": 0}, "distill": [term("big", "odd.lm")]},
    "route": {"distill": [term("odd.lm", "even.lm", "big", combine="route", temperature=2.0)]},
    "route, alone": {"hard": {"weight": 0}, "distill": [term("odd.lm", "wide", combine="route")]},
    "route, first always": {"distill": [term("big", "odd.lm", combine="route", weight=0.6)]},
    "entropy": {"distill": [term("big", entropy_fraction=0.3, temperature=2.0, weight=0.7)]},
    "entropy, alone": {"hard": {"weight": 0}, "distill": [term("wide", entropy_fraction=0.5)]},
    "entropy, all": {"distill": [term("big", entropy_fraction=1.0)]},
    "entropy, separate": {"distill": [term("big", "odd.lm", entropy_fraction=0.3)]},
    "entropy, route": {
        "hard": {"weight": 0.5},
        "distill": [term("odd.lm", "big", combine="route", entropy_fraction=0.3)],
    },
    "entropy, beside": {
        "distill": [term("odd.lm", weight=0.4), term("big", entropy_fraction=0.3), term("wide")]
    },
    "one domain": {"distill": [term("odd.lm", temperature=2.0, weight=0.5)]},
    "one domain alone": {"hard": {"weight": 0}, "distill": [term("odd.lm")]},
    "a teacher per domain": {"distill": [term("odd.lm"), term("even.lm", temperature=2.0)]},
    "classifier": {"distill": [term("sense", temperature=3.0)]},
    "classifier, masked": {"distill": [term("sense", view="masked")]},
    "classifier, logits": {"distill": [term("sense", divergence="mse", temperature=2.0)]},
    "regression": {"hard": {"weight": 0}, "distill": [term("score", weight=0.1)]},
    "ranking": alone(term("score", ranking={})),
    "ranking, pairs alone": alone(term("score", ranking={"pointwise": 0}, weight=0.3)),
    "ranking, points alone": alone(term("score", ranking={"pairwise": 0})),
    "ranking by domain": alone(term("score", ranking={"group": "domain", "pairwise": 0.4})),
    "ranking by document": {
        "distill": [term("score", ranking={"group": "document", "pairwise": 2.0}, weight=0.3)]
    },
    "ranking, masked": alone(term("score", ranking={"pointwise": 0.5}, view="masked")),
    "pseudo-labels": alone(term("sense", divergence="pseudo_label", confidence=0.6)),
    "pseudo-labels, masked": {
        "distill": [term("sense", divergence="pseudo_label", confidence=0.5, view="masked")]
    },
    "pseudo-labels of several": {
        "distill": [
            term("topics", divergence="pseudo_label", confidence=0.7, weight=0.7),
            term("pair", divergence="pseudo_label", confidence=0.6),
        ]
    },
    "pseudo-labels of all": alone(term("sense", divergence="pseudo_label", confidence=0)),
    "pseudo-labels of tokens": alone(term("tags", divergence="pseudo_label", confidence=0.5)),
    "pseudo-labels of tokens at masks": alone(
        term("tags", divergence="pseudo_label", confidence=0.5, positions="masked")
    ),
    "multi-label": {"hard": {"weight": 0}, "distill": [term("topics", temperature=2.0)]},
    "tokens": {"distill": [term("tags", temperature=2.0, weight=0.4)]},
    "tokens, masked": {"hard": {"weight": 0}, "distill": [term("tags", view="masked")]},
    "tokens, at masks": {"distill": [term("tags", positions="masked", temperature=2.0)]},
    "tokens, at masks, masked": {
        "hard": {"weight": 0},
        "distill": [term("tags", positions="masked", view="masked")],
    },
    "words, at masks": {"distill": [term("big", positions="masked")]},
    "experts": {"distill": [term("sense", "score", "tags", temperature=2.0)]},
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


KINDS = ("animals", "pets", "weather")  # animals and pets share two labels of three
MUKI = {"combine": "uncertainty", "weight": 20.0}
MERGED = {
    "route, experts": alone(term("odd.plants", "animals", combine="route", temperature=2.0)),
    "route, experts of two tasks": alone(
        term("odd.score", "animals", combine="route", temperature=2.0)
    ),
    "route, tokens": {"distill": [term("odd.tags", "tags", combine="route", view="masked")]},
    "route, tokens at masks": alone(
        term("odd.tags", "tags", combine="route", positions="masked", temperature=2.0)
    ),
    "mixture, one expert": alone(term("unnamed", combine="mixture")),
    "mixture, nothing shared": alone(term("animals", "weather", combine="mixture")),
    "mixture, merged": {"distill": [term("animals", "pets", combine="mixture", temperature=2.0)]},
    "mixture, apart": alone(term("animals", "pets", combine="mixture", labels="apart")),
    "mixture, apart without names": alone(
        term("unnamed", "animals", combine="mixture", labels="apart")
    ),
    "mixture, masked": {"distill": [term("animals", "pets", combine="mixture", view="masked")]},
    "mixture, one domain": alone(term("animals", "odd.plants", combine="mixture")),
    "mixture, pairs": alone(term("pair.a", "pair.b", combine="mixture", weight=3.0)),
    "mixture, reverse": alone(
        term("animals", "weather", combine="mixture", divergence="reverse_kl", temperature=2.0)
    ),
    "mixture, jsd": alone(term("animals", "pets", combine="mixture", divergence="jsd")),
    "mixture, tvd": alone(term(*KINDS, combine="mixture", divergence="tvd", temperature=2.0)),
    "concatenate": alone(term("animals", "weather", combine="concatenate")),
    "concatenate, merged": alone(term(*KINDS, combine="concatenate", temperature=2.0)),
    "concatenate, apart": alone(term(*KINDS, combine="concatenate", labels="apart")),
    "concatenate, one domain": {
        "distill": [term("odd.plants", "pets", combine="concatenate", divergence="jsd")]
    },
    "pseudo-labels, route": alone(
        term("odd.plants", "animals", combine="route", divergence="pseudo_label", confidence=0.6)
    ),
    "ranking, one domain": alone(term("odd.score", ranking={}, weight=0.2)),
    "muki": alone(term(*KINDS, **MUKI)),
    "muki, hot": {"distill": [term(*KINDS, temperature=2.0, **MUKI)]},
    "muki, apart": alone(term("animals", "pets", labels="apart", **MUKI)),
    "muki, hard": alone(term(*KINDS, uncertainty={"selection": "hard"}, **MUKI)),
    "muki, no margin": alone(term(*KINDS, uncertainty={"margin": False, "sharpness": 1.0}, **MUKI)),
    "muki, hard, no margin": alone(
        term(*KINDS, uncertainty={"margin": False, "selection": "hard"}, temperature=2.0, **MUKI)
    ),
    "muki, hard, reverse": alone(
        term(*KINDS, uncertainty={"selection": "hard"}, divergence="reverse_kl", **MUKI)
    ),
    "muki, jsd": alone(term("weather", "pets", divergence="jsd", temperature=2.0, **MUKI)),
    "muki, tvd, hard": alone(
        term(*KINDS, uncertainty={"selection": "hard"}, divergence="tvd", **MUKI)
    ),
    "muki, one domain": alone(term("odd.plants", "weather", **MUKI)),
    "muki, pairs": alone(term("pair.a", "pair.b", labels="merge", **MUKI)),
    "all of it": {
        "hard": {"weight": 0.5},
        "distill": [
            term("lm", entropy_fraction=0.3, weight=0.6),
            term("animals", "pets", "weather", **MUKI),
            term("pair.a", "pair.b", combine="mixture", weight=0.7),
            term("odd.tags", "tags", combine="route", positions="masked", weight=0.3),
            term("odd.plants", "odd.score", view="masked", weight=0.2),
        ],
    },
}
CAUSAL = {
    "kd": {"distill": [term("lm", temperature=2.0, weight=0.5)]},
    "two terms and an expert": {"distill": [term("odd"), term("lm", weight=0.2), term("sense")]},
    "expert": {"hard": {"weight": 0}, "distill": [term("sense", temperature=2.0)]},
    "separate": {"distill": [term("odd", "lm", temperature=2.0)]},
    "route": {"distill": [term("odd", "lm", combine="route", temperature=2.0, weight=0.5)]},
    "entropy": {"distill": [term("lm", entropy_fraction=0.3, temperature=2.0)]},
    "entropy, alone": alone(term("odd", "lm", combine="route", entropy_fraction=0.5)),
}
WORLDS = {"masked_world": OBJECTIVES, "experts_world": MERGED, "causal_world": CAUSAL}
CASES = [(world, name) for world, objectives in WORLDS.items() for name in objectives]


@pytest.fixture
def setting_of(request):
    """setting_of(world, name of an objective, batch=…) -> the Setting."""

    def make(world, name, **more):
        return Setting(request.getfixturevalue(world), WORLDS[world][name], **more)

    return make


@pytest.mark.parametrize(("world", "name"), CASES)
def test_loss_and_gradient_are_the_references(setting_of, world, name):
    terms = setting_of(world, name).check()
    assert all(value > 0.005 for value in terms.values())


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
    whole = setting.run()
    for micro in (2, 3, 5, 8, 16):
        same_step(setting.run(micro=micro), whole)


@pytest.mark.parametrize(("world", "name"), CASES)
def test_how_a_step_is_split_changes_nothing(setting_of, world, name):
    """Neither micro-batches nor processes, each with every n-th sequence."""
    setting = setting_of(world, name, batch=range(5, 16))
    whole = setting.run()
    for micro in (1, 4):
        same_step(setting.run(micro=micro), whole)
    for processes in (2, 3):
        same_step(setting.run_apart(processes), whole)


def same_step(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-7)
    same_gradients(found[2], expected[2])


@pytest.mark.parametrize(("world", "name"), CASES)
def test_all_processes_make_the_same_passes(setting_of, world, name):
    """Whatever a micro-batch lacks: otherwise they would wait for each other's gradients."""
    setting = setting_of(world, name, batch=range(3, 9))
    whole = setting.passes(setting.batch(0))
    assert all(whole)
    for part in [*split_batch(setting.batch(0), 1), without_rows(setting.batch(0))]:
        assert setting.passes(part) == whole


def without_rows(batch):
    """The sequences of a batch cut to their first token: no loss has anything in them."""
    none = np.zeros(0, np.int64)
    masked = batch.masked and replace(batch.masked, rows=none, positions=none, labels=none)
    targets = {}
    for name, target in batch.targets.items():
        if isinstance(target, SequenceTargetBatch):
            targets[name] = replace(target, present=np.zeros_like(target.present))
        elif isinstance(target, TokenLabelBatch):
            targets[name] = replace(target, rows=none, positions=none, logits=target.logits[:0])
        else:
            columns = {key: column[:0] for key, column in target.columns.items()}
            targets[name] = replace(target, rows=none, positions=none, columns=columns)
    pairs = {name: replace(p, lengths=np.zeros_like(p.lengths)) for name, p in batch.pairs.items()}
    lengths = np.ones_like(batch.lengths)
    return replace(batch, lengths=lengths, masked=masked, targets=targets, pairs=pairs)


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
        rows = setting.objective.counts(setting.batch(0), 0).rows[f"kd/{name}"]
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
    counts = setting.objective.counts(setting.batch(0), 0)
    names = ["ce", "kd/animals+pets+weather", "kd/lm", "kd/odd.plants", "kd/odd.score"]
    names += ["kd/odd.tags+tags", "kd/pair.a+pair.b"]
    assert setting.objective.shown(counts, 0) == names
    assert setting.objective.shown(Counts(0, dict.fromkeys(counts.rows, 0)), 0) == []
    some = Counts(3, dict.fromkeys(counts.rows, 0) | {"kd/lm": 1})
    assert setting.objective.shown(some, 0) == ["ce", "kd/lm"]


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
    counts = setting.objective.counts(batch, 0)
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
    causal = plain.objective.counts(plain.batch(0), 0)
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


def lm_info(name, **about):
    kind = {"kind": "topk", "k": 8, "vocabulary_size": 99, "temperatures": (1.0, 2.0)}
    base = {"task": "masked_lm", "view": "masked-0", **kind}
    return TeacherInfo(name=name, **(base | about))


def expert_info(name, *labels, **about):
    base = {
        "task": "sequence_classification",
        "kind": "sequence",
        "view": "text",
        "num_labels": len(labels),
        "label_names": labels,
        "problem": "single_label_classification",
    }
    return TeacherInfo(name=name, **(base | about))


INFOS = [
    lm_info("big"),
    lm_info("wide", k=24),
    lm_info("odd", domains=("odd",)),
    lm_info("drawn", kind="random", temperatures=(1.0,)),
    lm_info("gpt", task="causal_lm", view="clean"),
    expert_info("sense", "good", "bad", monte_carlo_passes=4),
    expert_info("mood", "bad", "glad", monte_carlo_passes=4),
    expert_info("sure", "yes", "no"),
    expert_info("unnamed", "LABEL_0", "LABEL_1", monte_carlo_passes=4),
    expert_info("twice", "yes", "yes", monte_carlo_passes=4),
    expert_info("few", "yes", monte_carlo_passes=4, num_labels=2),
    expert_info("odd.sense", "oak", "rose", monte_carlo_passes=4, domains=("odd",)),
    expert_info("even.sense", "cat", "dog", monte_carlo_passes=4, domains=("even",)),
    expert_info("alone", "yes", monte_carlo_passes=4, num_labels=1),
    expert_info("topics", "a", "b", problem="multi_label_classification"),
    expert_info("score", "x", task="regression", problem="regression"),
    expert_info("pair", "yes", "no", view="pairs-adjacent-0", monte_carlo_passes=4),
    expert_info("tags", "x", "y", task="token_classification", kind="token", problem=None),
]
MIX, WEIGH = {"combine": "mixture"}, {"combine": "uncertainty"}


def refusal_of(terms, task="masked_lm"):
    """The whole message."""
    parsed = [parse_settings(DistillTerm, values) for values in terms]
    with pytest.raises(InputError) as caught:
        check_terms(parsed, {info.name: info for info in INFOS}, task)
    return str(caught.value)


REFUSED = [
    (term("big", "sense"), "vocabulary teachers and task experts need a term each"),
    (term("sense", "pair"), "sense, pair saw different views; use a term each"),
    (term("big", "gpt"), "big, gpt saw different views; use a term each"),
    (
        term("sense", entropy_fraction=0.5),
        "entropy_fraction is for vocabulary teachers; sense are none",
    ),
    (term("pair", view="masked"), "view: masked, but pairs are shown clean; use clean"),
    (term("sense", positions="masked"), "positions: masked, but sense judge whole sequences"),
    (
        term("sense", "tags", combine="route"),
        "sense, tags judge sequences and tokens, which share no mean; use a term each",
    ),
    (term("sense", k=2), "k is for vocabulary teachers; of sense all logits are kept"),
    (
        term("sense", "alone", **WEIGH),
        "combine: uncertainty, but 'alone' has one class and is always certain",
    ),
    # vocabulary teachers together
    (term("big", divergence="mse"), "mse is for task logits; big predicts tokens"),
    (
        term("big", "wide", **WEIGH),
        "combine: uncertainty weighs classifiers, and big predicts tokens; use mixture, or route "
        "for teachers of different domains",
    ),
    (
        term("big", "odd", **MIX),
        "a mixture needs all its teachers at the same positions, and big, odd are for different "
        "domains; use combine: route",
    ),
    (
        term("big", "wide", entropy_fraction=0.3, **MIX),
        "entropy_fraction cannot be used with combine: mixture",
    ),
    (
        term("big", "wide", combine="concatenate"),
        "combine: concatenate puts the logits of classifiers side by side, and big predicts "
        "tokens; use mixture",
    ),
    # scores and their order
    (
        term("sense", ranking={}),
        "ranking is for regression experts, whose score is an order, and 'sense' is a "
        "single_label_classification expert; leave ranking out",
    ),
    (
        term("big", ranking={}),
        "ranking is for regression experts, whose score is an order, and 'big' is a masked_lm "
        "expert; leave ranking out",
    ),
    (
        term("score", ranking={}, combine="route"),
        "ranking compares the scores of one expert with each other, so combine: route has no "
        "pairs; use separate",
    ),
    (
        term("score", ranking={"pointwise": 0, "pairwise": 0}),
        "ranking has the weights 0 and 0; give one of them a weight",
    ),
    (
        term("score", ranking={}, divergence="jsd"),
        "ranking is a squared error; leave divergence: jsd out",
    ),
    # classes as labels
    (
        term("sense", confidence=0.8),
        "confidence is for divergence: pseudo_label, not forward_kl",
    ),
    (
        term("score", divergence="pseudo_label"),
        "pseudo_label is for classifiers, and 'score' is a regression expert; use mse or "
        "forward_kl",
    ),
    (
        term("big", divergence="pseudo_label"),
        "pseudo_label is for classifiers, and 'big' is a masked_lm expert; use mse or forward_kl",
    ),
    (
        term("sense", "mood", divergence="pseudo_label", **MIX),
        "pseudo_label takes one expert's word for a class; combine: mixture makes a distribution "
        "of several. Use separate, or route: the first that is sure",
    ),
    (
        term("sense", divergence="pseudo_label", temperature=2.0),
        "a pseudo-label has no temperature; leave temperature: 2.0 out",
    ),
    # classifiers together
    (
        term("sense", "score", combine="concatenate"),
        "combine: concatenate merges classifiers of sequences, and 'score' is a regression "
        "expert; use separate",
    ),
    (
        term("sense", "topics", **MIX),
        "combine: mixture merges classifiers of sequences, and 'topics' is a "
        "multi_label_classification expert; use separate",
    ),
    (
        term("sense", "score", **WEIGH),
        "combine: uncertainty merges classifiers of sequences, and 'score' is a regression "
        "expert; use separate",
    ),
    (
        term("sense", "tags", **MIX),
        "combine: mixture merges classifiers of sequences, and 'tags' is a token_classification "
        "expert; use separate",
    ),
    (
        term("sense", "sure", **WEIGH),
        "combine: uncertainty needs Monte-Carlo passes, and teacher 'sure' was cached without; "
        "cache it with monte_carlo: {passes: 16}",
    ),
    (term("sense", **WEIGH), "combine: uncertainty weighs at least two experts"),
    (
        term("sense", "mood", divergence="mse", **MIX),
        "a mixture is a distribution; mse is for separate experts",
    ),
    (
        term("sense", "unnamed", **WEIGH),
        "the classes of teacher 'unnamed' have no names (LABEL_0 …), and equal names would become "
        "one label. Name them (id2label in its config.json), or use labels: apart",
    ),
    (
        term("sense", "twice", labels="apart", **MIX),
        "teacher 'twice' has 2 classes and the label names ['yes', 'yes']: a union of label sets "
        "needs a different name for each class (id2label in the expert's config.json)",
    ),
    (
        term("sense", "few", **WEIGH),
        "teacher 'few' has 2 classes and the label names ['yes']: a union of label sets needs a "
        "different name for each class (id2label in the expert's config.json)",
    ),
    (
        term("odd.sense", "even.sense", **MIX),
        "a mixture teaches where all its experts know the text, and odd.sense, even.sense have no "
        "domain in common; use combine: route",
    ),
    # a vocabulary teacher by itself
    (
        term("gpt"),
        "teacher 'gpt' is a causal_lm; a masked_lm student has no loss at its positions",
    ),
    (
        term("big", temperature=3.0),
        "teacher 'big' stores the temperatures [1.0, 2.0], not 3.0: the mass outside its top 8 at "
        "another one is not known (or not yet of all text: `pipeline cache-teachers` was not "
        "finished). Add it to the teacher's targets.temperatures, or train at a stored one",
    ),
    (
        term("drawn", k=4),
        "teacher 'drawn' keeps a sample of 8 (threshold): a part of it would be biased. Leave k "
        "out, or cache a smaller sample",
    ),
    (term("big", k=9), "teacher 'big' keeps 8 candidates; k = 9 is not cached"),
    (term("wide", "big", k=9), "teacher 'big' keeps 8 candidates; k = 9 is not cached"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_impossible_terms_are_refused(given, message):
    assert refusal_of([given]) == f"train.objective.distill.0: {message}"
    fine = term("mood", weight=0.5) if "mood" not in given["teachers"] else term("sure")
    assert refusal_of([fine, given]) == f"train.objective.distill.1: {message}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            term("sense", view="masked"),
            "view: masked, but a causal_lm student has no masked view",
        ),
        (
            term("gpt", positions="masked"),
            "positions: masked, but a causal_lm student has no masked view",
        ),
        (
            term("big"),
            "teacher 'big' is a masked_lm; a causal_lm student has no loss at its positions",
        ),
    ],
)
def test_impossible_terms_of_a_causal_student_are_refused(given, message):
    assert refusal_of([given], "causal_lm") == f"train.objective.distill.0: {message}"


@pytest.mark.parametrize(
    "terms",
    [
        [term("big"), term("wide"), term("big")],
        [term("big", "big", **MIX)],
        [term("big", "wide"), term("odd", "big", combine="route")],
    ],
)
def test_a_teacher_in_two_places_is_refused(terms):
    message = "teacher 'big' stands in two distill terms; use one term per teacher"
    assert refusal_of(terms) == message


@pytest.mark.parametrize(
    "given",
    [
        term("big", "wide"),
        term("big", "odd", combine="route", entropy_fraction=0.3),
        term("big", "odd", entropy_fraction=1.0),
        term("wide", "big", k=8, **MIX),
        term("drawn", k=8),
        term("sense", "score", "topics", "tags", divergence="mse"),
        term("tags", positions="masked", view="masked"),
        term("sense", "mood", "odd.sense", labels="apart", **WEIGH),
        term("sense", "sure", divergence="tvd", **MIX),
        term("unnamed", "mood", labels="apart", **MIX),
        term("unnamed", **MIX),
        term("even.sense", "odd.sense", combine="route"),
        term("score", ranking={"group": "document"}, divergence="mse"),
        term("sense", "mood", combine="concatenate"),
        term("sense", "topics", "tags", divergence="pseudo_label", confidence=1.0),
        term("sense", "mood", divergence="pseudo_label", combine="route"),
    ],
)
def test_possible_terms_are_not_refused(given):
    parsed = parse_settings(DistillTerm, given)
    check_terms([parsed], {info.name: info for info in INFOS}, "masked_lm")


def test_the_error_names_the_term(masked_world):
    with pytest.raises(InputError, match=r"train\.objective\.distill\.1: "):
        Setting(masked_world, {"distill": [term("wide"), term("big", k=100)]})


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
