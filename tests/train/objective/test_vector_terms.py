"""Terms of sentence encoders: loss and gradient are those of a direct computation, however the step
is split; beside the cross-entropy, on clean and on masked text.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rekindle.data.batch import EmbeddingBatch
from rekindle.data.errors import InputError
from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import StudentConfig
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import build_student
from testlib.objective import setting as settings
from testlib.objective.ahead import Noted, Sends
from testlib.objective.cases import alone, term
from testlib.objective.reference import final_states, inputs_of
from testlib.objective.setting import Setting, same_step

SIZES = {"wide": 48, "narrow": 5, "same": 32}  # beside students of 32
TAU = 0.2
SIMILARITY = {"similarity": {"temperature": TAU, "weight": 0.5}}


def info_of(name, size, normalised=False):
    return TeacherInfo(
        name=name,
        task="embedding",
        kind="embedding",
        view="plain",
        dimensions=size,
        normalised=normalised,
        pooling="mean",
        vectors="fp16",
    )


class WithVectors:
    """A cache that also has encoders: their vectors are drawn for each sequence."""

    def __init__(self, cache, infos):
        self.cache, self.infos = cache, infos

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def teacher(self, name):
        found = self.infos.get(name)
        return SimpleNamespace(info=found) if found else self.cache.teacher(name)

    def vector(self, name, index):
        """None where the sequence has none."""
        draw = np.random.default_rng([int(index), len(name)])
        if draw.random() < 0.2:
            return None
        found = draw.normal(size=self.infos[name].dimensions)
        return found / np.linalg.norm(found) if self.infos[name].normalised else found

    def gather(self, index, teachers, **more):
        batch = self.cache.gather(index, [n for n in teachers if n not in self.infos], **more)
        for name in [n for n in teachers if n in self.infos]:
            each = [self.vector(name, number) for number in index]
            rows = np.array([n for n, one in enumerate(each) if one is not None], np.int64)
            size = self.infos[name].dimensions
            vectors = np.array([each[row] for row in rows], np.float32).reshape(-1, size)
            batch.targets[name] = EmbeddingBatch(self.infos[name], rows, vectors)
        return batch


@pytest.fixture
def vectors_of(request, monkeypatch):
    """vectors_of(objective, …) -> a Setting whose world has the encoders of ``SIZES``."""
    infos = {name: info_of(name, size, name == "same") for name, size in SIZES.items()}
    opened = settings.opened

    def make(objective, world="masked_world", **more):
        return Setting(request.getfixturevalue(world), objective, **more)

    monkeypatch.setattr(settings, "opened", lambda path: WithVectors(opened(path), infos))
    return make


@pytest.mark.parametrize("view", ["clean", "masked"])
def test_vectors_are_sent_ahead(vectors_of, monkeypatch, view):
    """And the step itself sends nothing."""
    encoders = term("wide", "same", view=view, embedding={"cosine": 1.0, "mse": 0.5})
    setting = vectors_of({"hard": {"weight": 0.5}, "distill": [encoders]})
    expected, copies, sends = setting.run(micro=7), Noted(), Sends(monkeypatch)
    found = setting.run_ahead(copies, micro=7)
    assert found[:2] == expected[:2]
    assert all(torch.equal(found[2][name], value) for name, value in expected[2].items())
    assert not sends.late
    assert not sends.unused(copies)


def vector_of(setting, name, example, batch, row, view):
    """The student's vector of one sequence, in plain PyTorch."""
    ids = (
        example.input_ids
        if view == "clean"
        else batch.masked.input_ids[row][: len(example.input_ids)]
    )
    found = final_states(setting, ids).mean(dim=0)
    head = setting.student.heads[name]
    if head.projection is not None:
        found = head.projection.weight @ found + head.projection.bias
    return found / found.norm() if setting.student.head_configs[name].normalise else found


def cosine_of(a, b):
    return (a @ b) / (a.norm() * b.norm())


def reference(setting, objective):
    """The loss of the terms and the cross-entropy, row by row."""
    batch, total = setting.batch(0), 0.0
    if (hard := objective["hard"]["weight"] if "hard" in objective else 1.0) > 0:
        rows = []
        for row in range(len(batch.index)):
            here = batch.masked.rows == row
            length = int(batch.lengths[row])
            logits = setting.student.model(**inputs_of(batch.masked.input_ids[row][:length])).logits
            logits = logits[0][:, : setting.vocabulary].log_softmax(dim=1)
            for at, label in zip(
                batch.masked.positions[here], batch.masked.labels[here], strict=True
            ):
                rows.append(-logits[at, label])
        total = total + hard * sum(rows) / len(rows)
    for one in setting.objective.config.distill:
        for name in one.teachers:
            wanted, own = [], []
            for row, index in enumerate(batch.index):
                if (vector := setting.cache.vector(name, index)) is not None:
                    example = setting.cache.example(int(index))
                    own.append(vector_of(setting, name, example, batch, row, one.view))
                    wanted.append(torch.from_numpy(vector.astype(np.float32)))
            total = total + one.weight * term_by_hand(one.of_vectors, own, wanted)
    return total


def term_by_hand(asked, own, wanted):
    weights = {name: loss.settings.weight for name, loss in asked.losses.items()}
    total = torch.zeros(())
    for i, (a, b) in enumerate(zip(own, wanted, strict=True)):
        if "cosine" in weights:
            total = total + weights["cosine"] * (1 - cosine_of(a, b))
        if "mse" in weights:
            total = total + weights["mse"] * ((a - b) ** 2).mean()
        if "similarity" in weights:
            others = [j for j in range(len(own)) if j != i]
            p = torch.stack([cosine_of(a, own[j]) for j in others]).div(TAU).log_softmax(dim=0)
            q = torch.stack([cosine_of(b, wanted[j]) for j in others]).div(TAU).softmax(dim=0)
            total = total + weights["similarity"] * (q * (q.log() - p)).sum()
    return total / len(own)


CASES = {
    "cosine, projected": alone(term("wide")),
    "mse, projected": alone(term("narrow", embedding={"mse": 1})),
    "mse, equal sizes": alone(term("same", embedding={"mse": 20})),
    "similarity, no projection": alone(term("wide", embedding=SIMILARITY)),
    "all, beside the text": {
        "hard": {"weight": 0.5},
        "distill": [
            term("wide", weight=0.7, embedding={"cosine": 1, "mse": 0.3, **SIMILARITY}),
            term("same", "narrow", view="masked", embedding={"cosine": 0.5, **SIMILARITY}),
        ],
    },
    "projected all the same": alone(term("same", embedding={"projection": True})),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_direct_computation(vectors_of, name):
    setting = vectors_of(CASES[name], batch=range(4, 12))
    found = setting.run()
    setting.student.zero_grad(set_to_none=True)
    loss = reference(setting, CASES[name])
    loss.backward()
    assert found[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    settings.same_gradients(found[2], settings.gradients(setting.student), least=1e-4)


@pytest.mark.parametrize("name", ["all, beside the text", "similarity, no projection"])
def test_how_a_step_is_split_changes_nothing(vectors_of, name):
    """Neither micro-batches nor processes, although rows are compared with all of the step."""
    setting = vectors_of(CASES[name], batch=[5, 6, 7, 8, 9, 10, 11, 6])
    whole = setting.run()
    for micro in (1, 3):
        same_step(setting.run(micro=micro), whole)
    for processes in (2, 3):
        same_step(setting.run_apart(processes), whole)


def test_a_causal_student_says_how_it_pools(causal_world):
    config = StudentConfig(model=str(causal_world.student), task="causal_lm")
    head = HeadConfig.of(info_of("wide", 48), as_long=True)
    with pytest.raises(InputError, match="pooling: lasttoken"):
        build_student(config, {"wide": head}, 0, 0)
    told = StudentConfig.model_validate(
        config.model_dump() | {"embedding": {"pooling": "lasttoken"}}
    )
    student = build_student(told, {"wide": head}, 0, 0)
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    student.eval()
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = student(inputs, sequence_heads=["wide"]).logits["wide"]
    states = student.states(inputs)
    expected = student.heads["wide"].projection(states[[0, 1], [2, 1]])
    torch.testing.assert_close(found, expected)
