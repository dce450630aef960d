"""The loss of a step, in plain PyTorch on the model's full logits.

The reference knows nothing of batches: it goes through decoded examples one by one, computes all
logits of the model, and writes the losses as in the papers.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F

from rekindle.data.example import SequenceTargets, TokenLabelTargets

EPOCH = 1
LOG_OF_ZERO = -126 * math.log(2)  # for a probability of 0, where reverse KL needs it


def inputs_of(ids, types=None):
    """Return the inputs of one sequence, without padding."""
    inputs = {"input_ids": torch.as_tensor(ids).long()[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if types is not None:
        inputs["token_type_ids"] = torch.as_tensor(types).long()[None]
    return inputs


def ask(setting, ids):
    """Return the logits [S,V] of one sequence."""
    return setting.student.model(**inputs_of(ids)).logits[0][:, : setting.vocabulary]


def final_states(setting, ids, types=None):
    """Return the final states [S,H] of one sequence."""
    body = setting.student.model.base_model
    return body(**inputs_of(ids, types)).last_hidden_state[0]


@functools.lru_cache(1000)
def example_of(cache, index):
    """Decode once: every objective of a world uses the same examples."""
    return cache.example(index)


def head(setting, name, state):
    return setting.student.heads[name.replace(".", "·")](state)


def targets_of(setting, example, name):
    """Return the entry of the step's replica, or None."""
    found = example.targets[name]
    masked = [t for t in found if getattr(t, "replica", None) is not None]
    return next((t for t in masked or found if not masked or t.replica == EPOCH), None)


def who_teaches(setting, example, term):
    """Yield (name of the loss, teachers of one target) for each loss of an example."""
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
    """Return whether an expert's answer reaches the confidence of pseudo-labels."""
    if term.divergence != "pseudo_label":
        return True
    least = 0.9 if term.confidence is None else term.confidence
    logits = torch.as_tensor(logits).double()
    if info.problem == "multi_label_classification":
        p = torch.sigmoid(logits)
        return bool((torch.maximum(p, 1 - p) >= least).any())
    return bool(torch.softmax(logits, 0).max() >= least)


def kept_positions(setting, example, target, term):
    """Return which of the target's entries are used."""
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
    """Return the names of a term's losses."""
    if term.combine == "separate":
        return [f"kd/{name}" for name in term.teachers]
    return ["kd/" + "+".join(term.teachers)]


def masked_example(setting, index):
    """Return (input ids, masked positions) of replica 1, from the view itself."""
    batch = setting.cache.gather(np.array([index]), [], epoch=EPOCH, masked_view=setting.view)
    return batch.masked.input_ids[0], batch.masked.positions


def language_example(setting, index):
    """Return (inputs, positions with an LM loss, their labels)."""
    clean = example_of(setting.cache, index).input_ids
    if setting.task == "causal_lm":
        return clean, np.arange(len(clean) - 1), clean[1:]
    seen, positions = masked_example(setting, index)
    return seen, positions, clean[positions]


def tempered(target, tau):
    """Return probabilities [P,K] and tail [P] at τ: the candidates share what the tail leaves."""
    tail = torch.as_tensor(target.log_tail[tau]).double().exp()
    kept = torch.softmax(torch.as_tensor(target.log_probs).double() / tau, dim=1)
    return (kept * (1 - tail)[:, None]).float(), tail.float()


def bucket_kl(logits, ids, probs, tail, tau):
    """Return Σ_K q log(q/p) + tail log(tail/rest), one row at a time."""
    out = []
    for z, i, q, t in zip(logits, ids, probs, tail, strict=True):
        p = torch.softmax(z / tau, dim=0)
        rest = torch.ones(len(p)).scatter(0, i, 0.0) @ p
        kl = (q * (q.log() - p[i].log())).sum()
        out.append(kl if t <= 0 else kl + t * (t.log() - rest.log()))
    return torch.stack(out) if out else logits.new_zeros(0)


class Sums:
    """Sums of one loss: Σ τ²·D, Σ D as reported, and the number of rows."""

    def __init__(self):
        self.loss, self.shown, self.rows = 0.0, 0.0, 0

    def add(self, loss, shown, rows=1):
        self.loss, self.shown, self.rows = self.loss + loss, self.shown + shown, self.rows + rows


def language_sums(setting, terms, sums):
    """Add CE and KL over all examples."""
    for index in setting.index.tolist():
        seen, positions, labels = language_example(setting, index)
        logits = ask(setting, seen)
        example = example_of(setting.cache, index)
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
    """Return the rows with the highest entropy: that fraction of them, rounded up."""
    p = torch.softmax(logits.detach().double(), dim=1)
    entropies = (-(p * p.log()).sum(1)).tolist()
    wanted = math.ceil(Fraction(str(fraction)) * len(entropies))
    return sorted(range(len(entropies)), key=lambda row: -entropies[row])[:wanted]


def mixture(found, term):
    """Return the mean of the teachers' sparse targets, by dictionary; one teacher is itself."""
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
    """Add the losses of the heads over all examples."""
    for term in terms:
        if term.ranking is not None:
            ranking_sums(setting, term, sums)
            continue
        for index in setting.index.tolist():
            example = example_of(setting.cache, index)
            for name, teachers in who_teaches(setting, example, term):
                if term.combine in ("mixture", "uncertainty", "concatenate"):
                    sums[name].add(*mixed_row(setting, example, term))
                    continue
                info = setting.objective.teachers[teachers[0]]
                for logits, wanted in task_rows(setting, example, info, term):
                    sums[name].add(*task_row(logits, wanted, info, term))


def ranking_sums(setting, term, sums):
    """Add the mean error of the scores, of the differences of two scores of a group, and the
    divergence over a group.
    """
    ranking, tau = term.ranking, term.temperature
    for name in term.teachers:
        info, rows = setting.objective.teachers[name], []
        for index in setting.index.tolist():
            example = example_of(setting.cache, index)
            if targets_of(setting, example, name) is not None:
                group = {"batch": ""} | {
                    name: getattr(example, name) for name in ("domain", "document", "group")
                }
                [(score, wanted)] = task_rows(setting, example, info, term)
                rows.append((group[ranking.group], score[0], wanted[0]))
        points = [(s - t) ** 2 for _, s, t in rows]
        lists = [[row for row in rows if row[0] == group] for group in {row[0] for row in rows}]
        pairs, divergences = [], []
        for own in lists:
            best = max(own, key=lambda row: row[2])
            for i, (_, s, t) in enumerate(own):
                others = own[:i] if ranking.pairs == "all" else [best] if own[i] != best else []
                pairs += [((s - z) - (t - u)) ** 2 for _, z, u in others]
            if len(own) > 1:
                log_p, q = (
                    torch.log_softmax(torch.stack([row[1] for row in own]) / tau, 0),
                    torch.softmax(torch.stack([row[2] for row in own]) / tau, 0),
                )
                divergences.append((q * (q.log() - log_p)).sum())
        loss = ranking.pointwise * sum(points) / len(points)
        if pairs:
            loss = loss + ranking.pairwise * sum(pairs) / len(pairs)
        if divergences:
            loss = loss + ranking.listwise * tau**2 * sum(divergences) / len(divergences)
        sums[f"kd/{name}"].add(loss, loss.detach())


def states_of(setting, example, info, term):
    """Return the student's final states [S,H] for what it is shown."""
    ids, types = example.input_ids, None
    if term.view == "masked":
        ids = masked_example(setting, example.index)[0]
    if info.view.startswith("pairs-"):
        tokenizer = setting.cache.corpus.tokenizer
        ids, types = tokenizer.encode_pair(*example.pairs[info.view], max_length=24)
    return final_states(setting, ids, types)


def pooled(setting, states):
    return states[0] if setting.task == "masked_lm" else states[-1]


def task_rows(setting, example, info, term):
    """Yield (student logits [C], teacher logits [C]) for each target of one example."""
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
    """Return (loss with its τ², reported value) of one row."""
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
        kl = divergence(q, p, term)
    return tau**2 * kl, kl.detach()


def pseudo_label_row(logits, wanted, info, term):
    """Return −log p of the expert's class; for yes/no answers, of those it is sure of."""
    if info.problem != "multi_label_classification":
        return -torch.log_softmax(logits, 0)[int(wanted.argmax())]
    losses = []
    for own, z in zip(logits, wanted.double(), strict=True):
        if max(torch.sigmoid(z), torch.sigmoid(-z)) >= (term.confidence or 0.9):
            losses.append(-torch.log(torch.sigmoid(own if z > 0 else -own)))
    return sum(losses) / len(logits)


def divergence(q, p, term):
    """Return D of two vectors of probabilities, with 0·log 0 = 0."""
    m, skew = (q + p) / 2, term.skew or 0.1
    return {
        "forward_kl": torch.special.xlogy(q, q) - torch.special.xlogy(q, p),
        "reverse_kl": p * (p.log() - q.log().clamp(min=LOG_OF_ZERO)),
        "jsd": (torch.special.xlogy(q, q) - torch.special.xlogy(q, m) + p * (p / m).log()) / 2,
        "tvd": (p - q).abs() / 2,
        "skew_kl": torch.special.xlogy(q, q) - torch.special.xlogy(q, skew * q + (1 - skew) * p),
    }[term.divergence].sum()


def labels_of(setting, teacher, term):
    """Return an expert's labels: equal names are one label, or each expert has its own."""
    names = setting.objective.teachers[teacher].label_names
    return [(teacher, name) if term.labels == "apart" else name for name in names]


def union_of(setting, term):
    """Return all labels in the order in which the experts introduce them."""
    every = [label for teacher in term.teachers for label in labels_of(setting, teacher, term)]
    return list(dict.fromkeys(every))


def mixed_row(setting, example, term):
    """Return (v·τ²·D(q ‖ p), v·D) of one example, as in MUKI's paper."""
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
    d = divergence(torch.tensor(list(q.values())), p, term)
    return v * tau**2 * d, v * d.detach()


def muki_weights(means, term):
    """Return w by expert, and v, from the Monte-Carlo means by expert."""
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
    """Return (loss, reported terms): hard·CE + Σ weight·τ²·D, each a mean over its rows."""
    objective = setting.objective
    active = objective.plan(step).terms
    weights = {name: weight for term, weight in active for name in all_names(term)}
    if objective.plan(step).hard > 0:
        weights["ce"] = objective.plan(step).hard
    sums = {name: Sums() for name in ["ce", *weights]}
    terms = [term for term, _ in active]
    words = [t for t in terms if objective.teachers[t.teachers[0]].kind in ("topk", "dense")]
    language_sums(setting, words, sums)
    task_sums(setting, [t for t in terms if t not in words], sums)
    total = sum(w * sums[name].loss / max(sums[name].rows, 1) for name, w in weights.items())
    return total, {name: float(sums[name].shown) / max(sums[name].rows, 1) for name in weights}
