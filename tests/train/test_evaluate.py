"""The numbers of an evaluation, computed a second time sequence by sequence."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.storage.shards import ShardSet
from rekindle.train.config import DistillTerm, StudentConfig
from rekindle.train.evaluate import EvaluationData, better_of, evaluate
from rekindle.train.model.network import HeadConfig
from rekindle.train.model.passes import SharedPasses
from rekindle.train.objective.task_loss import heads_of
from rekindle.train.student import build_student

CPU = torch.device("cpu")
EXPERTS = ("sense", "score", "topics", "pair", "tags")


def model_of(world, teacher):
    return next(t.model for t in world.config.teachers if t.name == teacher)


def data_of(world, teachers, index=range(5, 25), size=6):
    cache = world.open()
    masked = any(view.startswith("masked-") for view in cache.views)
    view = cache.masked_view().name if masked else None
    return EvaluationData(cache, np.asarray(index), tuple(teachers), view, size)


def student_of(world, model, heads=()):
    cache = world.open()
    task = "masked_lm" if any("masked" in view for view in cache.views) else "causal_lm"
    configs = {name: HeadConfig.of(cache.teacher(name).info) for name in heads}
    vocabulary = cache.corpus.info["tokenizer"]["size"]
    config = StudentConfig(model=str(model), task=task)
    return build_student(config, configs, vocabulary, 0).to(CPU)


def masked_rows(data, index):
    batch = data.cache.gather(np.array([index]), [], epoch=0, masked_view=data.masked_view)
    return batch.masked.input_ids, batch.masked.positions, batch.masked.labels


def hard_losses(data, student):
    """Cross-entropies of every held-out position, from full logits, without any batch."""
    student.eval()
    out = []
    for index in data.index.tolist():
        if student.task == "masked_lm":
            ids, positions, labels = masked_rows(data, index)
        else:
            ids = data.cache.example(index).input_ids[None]
            positions, labels = np.arange(ids.shape[1] - 1), ids[0, 1:]
        with torch.no_grad():
            logits = student.model(torch.as_tensor(ids).long()).logits[0, positions]
        logits = logits[:, : student.vocabulary_size]
        out.append(F.cross_entropy(logits, torch.as_tensor(labels).long(), reduction="none"))
    return torch.cat(out)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_ce_is_the_mean_cross_entropy_over_the_held_out_positions(kind, masked_world, causal_world):
    world = masked_world if kind == "masked" else causal_world
    data = data_of(world, [])
    student = student_of(world, world.student)
    losses = hard_losses(data, student)
    found = evaluate(student, data, CPU)
    assert found.keys() == {"ce"}
    assert found["ce"] == pytest.approx(float(losses.mean()), rel=1e-5)


class Numbers:
    """A cache whose batches are the numbers that are asked for."""

    def gather(self, index, *arguments, **options):
        return index.tolist()


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 9))
def test_processes_share_what_is_evaluated(count, world_size, size):
    """Each sequence counts once; all have as many batches; each reads neighbours."""
    data = EvaluationData(Numbers(), np.arange(count) * 3, (), None, size)
    shares = [list(data.share(rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    counted = [[n for batch, counts in share for n in batch if counts] for share in shares]
    assert [n for share in counted for n in share] == data.index.tolist()
    assert all(len(batch) <= size for share in shares for batch, _ in share)
    assert all(len(batch) > 0 for share in shares for batch, _ in share)


@pytest.fixture
def opened(monkeypatch):
    """The units that were opened, by folder."""
    found, real = {}, ShardSet.open

    def noted(self, commit, *arguments, **options):
        found.setdefault(self.folder, set()).add(commit.unit)
        return real(self, commit, *arguments, **options)

    monkeypatch.setattr(ShardSet, "open", noted)
    return found


@pytest.mark.parametrize("rank", [0, 3])
def test_a_process_opens_only_the_shards_that_hold_its_share(masked_world, opened, rank):
    """Of the corpus, the masks and each teacher."""
    index = np.arange(len(masked_world.open().corpus))
    data = data_of(masked_world, ["big", "sense"], index)
    opened.clear()
    for batch, _ in data.share(rank, 4):
        assert batch.targets
    shards, _ = data.cache.corpus.locate(np.array_split(index, 4)[rank])
    wanted = {f"{shard:05d}" for shard in shards}
    assert len(wanted) < len(data.cache.corpus.commits)
    assert len(opened) == 4
    for units in opened.values():  # 00000, or of a replica 00000-r000
        assert {unit[:5] for unit in units} == wanted


def test_a_pass_that_one_process_does_not_know_is_run_by_all():
    inputs = {"input_ids": torch.tensor([[1, 2]])}
    runs, answers = [], iter([False, False, True])
    passes = SharedPasses(lambda known: next(answers))
    for _ in range(3):
        passes.run(inputs, None, lambda *given: runs.append(given) or (None, torch.zeros(1)))
    assert len(runs) == 2


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_the_ce_of_each_domain_is_that_of_its_sequences_alone(kind, masked_world, causal_world):
    """And the others' values are what they are without domains."""
    world = masked_world if kind == "masked" else causal_world
    teacher = "big" if kind == "masked" else "lm"
    domains = {"a": np.array([1, 7, 30]), "b b": np.array([5, 6])}
    student = student_of(world, world.student)
    plain = data_of(world, [teacher], size=2)
    found = evaluate(student, replace(plain, domains=domains), CPU)
    for name, index in domains.items():
        losses = hard_losses(data_of(world, [], index), student)
        assert found.pop(f"ce/{name}") == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found == evaluate(student, plain, CPU)
    nothing = replace(plain, index=plain.index[:0], domains=domains)
    assert evaluate(student, nothing, CPU).keys() == {"ce/a", "ce/b b"}


@pytest.mark.parametrize("name", ["big", "wide", "whole"])
def test_a_student_that_is_the_teacher_has_no_divergence_from_it(masked_world, name):
    """Dense targets are exact; the 8-bit codec leaves a few thousandths of a nat."""
    student = student_of(masked_world, model_of(masked_world, name))
    found = evaluate(student, data_of(masked_world, [name]), CPU)
    assert abs(found[f"kl/{name}"]) < (1e-5 if name == "whole" else 2e-3)
    assert found[f"agreement/{name}"] == 1.0


def test_a_causal_student_that_is_the_teacher(causal_world):
    student = student_of(causal_world, model_of(causal_world, "lm"))
    found = evaluate(student, data_of(causal_world, ["lm", "odd"]), CPU)
    assert abs(found["kl/lm"]) < 2e-3
    assert found["agreement/lm"] == 1.0
    assert found["kl/odd"] > 0.5  # another model
    assert found["agreement/odd"] < 1


def test_divergence_from_another_model_is_that_of_its_stored_targets(masked_world):
    data = data_of(masked_world, ["big", "odd.lm"])
    student = student_of(masked_world, masked_world.student)
    found = evaluate(student, data, CPU)
    sums = {name: [0.0, 0, 0] for name in data.teachers}
    for index in data.index.tolist():
        ids, _, _ = masked_rows(data, index)
        with torch.no_grad():
            logits = student.eval().model(torch.as_tensor(ids).long()).logits[0]
        for name in data.teachers:
            targets = [t for t in data.cache.example(index).targets[name] if t.replica == 0]
            for target in targets:
                p = torch.softmax(logits[target.positions, : student.vocabulary_size], 1).double()
                q = torch.as_tensor(target.log_probs).double().exp()
                tail = torch.as_tensor(target.log_tail[1.0]).double().exp()
                at = p.gather(1, torch.tensor(target.ids))
                kl = (q * (q / at).log()).sum(1) + tail * (tail / (1 - at.sum(1))).log()
                sums[name][0] += float(kl.sum())
                sums[name][1] += int((p.argmax(1) == torch.tensor(target.ids[:, 0])).sum())
                sums[name][2] += len(q)
    assert 0 < sums["odd.lm"][2] < sums["big"][2]
    for name, (kl, agree, count) in sums.items():
        assert found[f"kl/{name}"] == pytest.approx(kl / count, rel=1e-4)
        assert found[f"agreement/{name}"] == pytest.approx(agree / count)


def test_experts_are_compared_on_what_they_saw(masked_world):
    """One sequence at a time through the body and the head, pairs and tags included."""
    data = data_of(masked_world, EXPERTS)
    student = student_of(masked_world, masked_world.student, EXPERTS).eval()
    rows = {name: [] for name in EXPERTS}
    tokenizer = data.cache.corpus.tokenizer
    with torch.no_grad():
        for index in data.index.tolist():
            example = data.cache.example(index)
            for name in EXPERTS:
                for target in example.targets[name]:
                    inputs = {"input_ids": torch.as_tensor(example.input_ids).long()[None]}
                    if name == "pair":
                        pair = example.pairs[data.cache.teacher(name).info.view]
                        joined = tokenizer.encode_pair(*pair, max_length=24)
                        names = ("input_ids", "token_type_ids")
                        inputs = {
                            n: torch.as_tensor(v).long()[None]
                            for n, v in zip(names, joined, strict=True)
                        }
                    states = student.model.base_model(**inputs).last_hidden_state[0]
                    at = states[target.positions] if name == "tags" else states[:1]
                    wanted = torch.tensor(target.logits).reshape(len(at), -1)
                    rows[name].append((student.heads[name](at), wanted))
    ours = {name: torch.cat([a for a, _ in pairs]) for name, pairs in rows.items()}
    theirs = {name: torch.cat([b for _, b in pairs]) for name, pairs in rows.items()}
    assert 0 < len(ours["pair"]) < len(ours["sense"]) < len(ours["tags"])
    expected = {"ce": float(hard_losses(data, student).mean())}
    expected["mse/score"] = float((ours["score"] - theirs["score"]).square().mean())
    same = (ours["topics"] > 0) == (theirs["topics"] > 0)
    expected["agreement/topics"] = float(same.float().mean())
    for name in ("sense", "pair", "tags"):
        q, p = torch.softmax(theirs[name], 1), torch.softmax(ours[name], 1)
        expected[f"kl/{name}"] = float((q * (q / p).log()).sum(1).mean())
        same = ours[name].argmax(1) == theirs[name].argmax(1)
        expected[f"agreement/{name}"] = float(same.float().mean())
    assert evaluate(student, data, CPU) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [1, 7, 20, 64])
def test_the_batch_size_changes_nothing(masked_world, size):
    names = ("big", "odd.lm", *EXPERTS)
    student = student_of(masked_world, masked_world.student, EXPERTS)
    expected = evaluate(student, data_of(masked_world, names), CPU)
    found = evaluate(student, data_of(masked_world, names, size=size), CPU)
    assert found == pytest.approx(expected, rel=1e-5)


def test_dropout_is_off_and_the_mode_is_put_back(masked_world):
    student = student_of(masked_world, masked_world.student, ["sense"])
    data = data_of(masked_world, ["sense"])
    student.train()
    first = evaluate(student, data, CPU)
    assert student.training
    assert student.model.training
    assert first == evaluate(student, data, CPU)
    student.eval()
    assert first == evaluate(student, data, CPU)
    assert not student.training
    assert all(p.grad is None for p in student.parameters())


def test_the_mode_is_put_back_after_an_error(masked_world):
    student = student_of(masked_world, masked_world.student).train()
    with pytest.raises(IndexError):
        evaluate(student, data_of(masked_world, [], index=[10**6]), CPU)
    assert student.training


def test_what_cannot_be_compared_is_left_out(masked_world):
    student = student_of(masked_world, masked_world.student)
    assert evaluate(student, data_of(masked_world, [], index=[]), CPU) == {}
    assert evaluate(student, data_of(masked_world, ["sense"]), CPU).keys() == {"ce"}
    cache = masked_world.open()
    domains = cache.gather(np.arange(len(cache)), []).domains
    even = [i for i, domain in enumerate(domains) if domain == "even"][:5]
    found = evaluate(student, data_of(masked_world, ["odd.lm", "even.lm"], index=even), CPU)
    assert found.keys() == {"ce", "kl/even.lm", "agreement/even.lm"}


@pytest.mark.parametrize("labels", ["merge", "apart"])
def test_a_head_over_several_experts_is_compared_with_each(experts_world, labels):
    """With the head's logits at that expert's own classes."""
    term = DistillTerm(teachers=("animals", "pets"), combine="mixture", labels=labels)
    cache = experts_world.open()
    infos = {name: cache.teacher(name).info for name in term.teachers}
    heads = heads_of(term, infos)
    config = StudentConfig(model=str(experts_world.student))
    student = build_student(config, heads, cache.corpus.info["tokenizer"]["size"], 0).eval()
    with torch.no_grad():
        student.heads["animals+pets"].out.weight.normal_(generator=torch.manual_seed(3))
    data = data_of(experts_world, term.teachers)
    found = evaluate(student, data, CPU)
    names = heads["animals+pets"].label_names
    assert len(names) == (4 if labels == "merge" else 6)
    for expert, info in infos.items():
        wanted = [n if labels == "merge" else f"{expert}/{n}" for n in info.label_names]
        places = [names.index(n) for n in wanted]
        divergences = []
        for index in data.index.tolist():
            example = cache.example(index)
            ids = torch.as_tensor(example.input_ids).long()[None]
            with torch.no_grad():
                state = student.model.base_model(ids).last_hidden_state[:, 0]
                logits = student.heads["animals+pets"](state)[0][places]
            q = torch.softmax(torch.as_tensor(example.targets[expert][0].logits), 0)
            divergences.append(float((q * (q.log() - torch.log_softmax(logits, 0))).sum()))
        assert found[f"kl/{expert}"] == pytest.approx(np.mean(divergences), rel=1e-4)


def test_what_is_best_is_asked_of_one_value_only():
    best = {"step": 5, "name": "loss", "value": 2.3}
    assert better_of({"loss": 2.2}, "loss", 6, best) == {"step": 6, "name": "loss", "value": 2.2}
    assert better_of({"loss": 2.3}, "loss", 6, best) is best
    assert better_of({"loss": 2.4}, "loss", 6, best) is best
    assert better_of({"loss": float("nan")}, "loss", 6, None) is None
    assert better_of({}, "loss", 6, None) is None
    assert better_of({"loss": 1.0}, None, 6, None) is None
    domain = better_of({"loss/f1": 2.0}, "loss/f1", 6, None)
    assert better_of({"loss/f1": 3.0}, "loss/f1", 6, domain) is domain
    agreed = {"step": 6, "name": "agreement/a", "value": 0.1}
    # another keep_best now
    assert better_of({"agreement/a": 0.1}, "agreement/a", 6, best) == agreed
    assert better_of({"agreement/a": 0.2}, "agreement/a", 7, agreed) == agreed | {
        "step": 7,
        "value": 0.2,
    }
    assert better_of({"agreement/a": 0.05}, "agreement/a", 7, agreed) is agreed
