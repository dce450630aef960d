"""Losses of vectors: each is what a direct computation in float64 gives, in a step in any parts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.train.objective.embedding.config import VectorConfig, vector_losses
from rekindle.train.objective.vector_loss import sort_vectors, step_rows, vector_loss
from testlib.command import python

TAU = 0.3


def drawn(rows, size, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=draw, dtype=torch.float64)


def term(**values):
    return parse_settings(VectorConfig, values)


def cosine_of(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def by_hand(name, own, wanted):
    """A loss in Python's own numbers, row by row."""
    own, wanted = own.tolist(), wanted.tolist()
    if name == "cosine":
        return sum(1 - cosine_of(a, b) for a, b in zip(own, wanted, strict=True))
    if name == "mse":
        each = [(x - y) ** 2 for a, b in zip(own, wanted, strict=True) for x, y in zip(a, b)]  # noqa: B905
        return sum(each) / len(own[0])
    total = 0.0
    for i in range(len(own)):
        others = [j for j in range(len(own)) if j != i]
        rows = []
        for vectors in (wanted, own):
            powers = [math.exp(cosine_of(vectors[i], vectors[j]) / TAU) for j in others]
            rows.append([power / sum(powers) for power in powers])
        total += sum(q * math.log(q / p) for q, p in zip(*rows, strict=True))
    return total


GIVEN = {"cosine": 1.0, "mse": 1.0, "similarity": {"temperature": TAU}}


@pytest.mark.parametrize("name", sorted(vector_losses()))
def test_a_loss_is_the_direct_computation_and_its_gradient_the_derivative(name):
    own, wanted = drawn(5, 7), drawn(5, 7 if vector_losses()[name].needs_equal_sizes else 4, 1)
    asked, keys = term(**{name: GIVEN[name]}), np.arange(5)
    loss = vector_loss(own, wanted, keys, None, asked)[0]
    assert float(loss) == pytest.approx(by_hand(name, own, wanted), rel=1e-12)
    own.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: vector_loss(v, wanted, keys, None, asked)[0], own)


def test_a_sum_of_losses_has_their_weights():
    own, wanted = drawn(4, 3), drawn(4, 3, 1)
    asked = term(cosine=0.5, mse={"weight": 2}, similarity={"weight": 0.1, "temperature": TAU})
    expected = 0.5 * by_hand("cosine", own, wanted) + 2 * by_hand("mse", own, wanted)
    expected += 0.1 * by_hand("similarity", own, wanted)
    loss, shown = vector_loss(own, wanted, np.arange(4), None, asked)
    assert float(loss) == float(shown) == pytest.approx(expected, rel=1e-12)
    assert [*term().losses] == ["cosine"]
    assert [*term(mse=1, cosine=0).losses] == ["mse"]


@pytest.mark.parametrize("parts", [[2, 3, 2], [1] * 7, [6, 1]])
@pytest.mark.parametrize("keys", [[4, 9, 1, 0, 7, 3, 8], [4, 4, 1, 4, 7, 1, 8]], ids=str)
def test_the_parts_of_a_step_add_up_to_it(keys, parts):
    """Whatever micro-batches or processes hold which rows, and where a sequence comes twice."""
    asked, keys = term(mse=1.0, similarity={"temperature": TAU}), np.array(keys)
    _, first = np.unique(keys, return_inverse=True)  # a sequence that comes twice has one vector
    own, wanted = drawn(7, 5)[first].requires_grad_(), drawn(7, 5, 1)[first]
    loss = vector_loss(own, wanted, keys, None, asked)[0]
    (expected,) = torch.autograd.grad(loss, own)
    step = sort_vectors(keys, own.detach(), wanted.numpy())
    starts = np.cumsum([0, *parts])
    total, found = 0.0, []
    for start, stop in pairwise(starts):
        live = own[start:stop].detach().requires_grad_()
        part = vector_loss(live, wanted[start:stop], keys[start:stop], step, asked)[0]
        total += float(part.detach())
        found += torch.autograd.grad(part, live)
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-10, atol=1e-12)


def test_equal_keys_have_places_of_their_own():
    known = np.array([1, 1, 4, 4, 4, 9])
    assert step_rows(np.array([4, 9, 1, 4]), known).tolist() == [2, 5, 0, 3]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_row_without_another_has_no_similarity(rows):
    own = drawn(rows, 3).requires_grad_()
    loss = vector_loss(own, drawn(rows, 3, 1), np.arange(rows), None, term(similarity=1.0))[0]
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool((own.grad == 0).all())


def test_a_vector_of_length_0_gives_no_nan():
    own = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    vector_loss(own, drawn(3, 4), np.arange(3), None, term(cosine=1, similarity=1))[0].backward()
    assert bool(torch.isfinite(own.grad).all())


def test_a_file_is_all_that_a_further_loss_needs(tmp_path):
    """Its name is a key of the configuration, its settings are checked, and it is computed."""
    (tmp_path / "halves.py").write_text(
        '"""Halves."""\n\n'
        "from rekindle.train.objective.embedding.base import LossSettings, VectorLoss\n\n\n"
        "class HalvesSettings(LossSettings):\n    power: int = 2\n\n\n"
        'class Halves(VectorLoss):\n    """Half the error."""\n\n    Settings = HalvesSettings\n\n'
        "    def rows(self, own, wanted):\n"
        "        return ((own - wanted) ** self.settings.power).sum(dim=1) / 2\n"
    )
    code = (
        "import sys, rekindle.train.objective.embedding.losses as home\n"
        f"home.__path__.append({str(tmp_path)!r})\n"
        "from rekindle.data.errors import InputError\n"
        "from rekindle.data.settings import parse_settings\n"
        "from rekindle.train.config import DistillTerm\n"
        "assert 'torch' not in sys.modules\n"
        "given = {'teachers': ['a'], 'embedding': {'halves': {'power': 4}}}\n"
        "term = parse_settings(DistillTerm, given)\n"
        "import torch\n"
        "(loss,) = term.embedding.losses.values()\n"
        "print(loss.rows(torch.full((1, 3), 2.0), torch.zeros(1, 3)).tolist())\n"
        "try:\n"
        "    parse_settings(DistillTerm, {'teachers': ['a'], 'embedding': {'halve': 1}})\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    found = python(code).splitlines()
    assert found[0] == "[24.0]"
    assert "did you mean 'halves'?" in found[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cosin": 1.0}, "did you mean 'cosine'?"),
        ({"cosine": 0}, "every loss has the weight 0"),
        ({"cosine": True}, "must be a weight or a section"),
        ({"mse": -1}, "mse"),
        ({"similarity": {"temperature": 0}}, "temperature"),
        ({"similarity": {"tau": 0.1}}, "unknown key 'similarity.tau'"),
    ],
    ids=str,
)
def test_what_a_term_cannot_say_of_vectors(given, told):
    with pytest.raises(InputError, match=told.replace("?", r"\?").replace(".", r"\.")):
        term(**given)
