"""The losses of task heads by themselves."""

import pytest
import torch

from rekindle.data.targets.schema import TeacherInfo
from rekindle.train.config import DistillTerm
from rekindle.train.objective.task_loss import task_loss


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
    ("problem", "labels"),
    [
        ("single_label_classification", 3),
        ("multi_label_classification", 3),
        ("regression", 1),
        ("regression", 3),
    ],
)
def test_a_task_loss_is_zero_where_student_and_teacher_agree(problem, labels):
    logits = torch.randn(5, labels, requires_grad=True)
    found = task_loss(
        logits, logits.detach(), info_of(problem, labels), DistillTerm(teachers=("t",))
    )
    found[0].backward()
    assert float(found[0].detach()) == pytest.approx(0, abs=1e-5)
    assert float(found[1]) == pytest.approx(0, abs=1e-5)
    assert float(logits.grad.abs().max()) < 1e-6


def test_the_loss_of_several_scores_is_their_mean_squared_error():
    own, wanted = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    loss, shown = task_loss(own, wanted, info_of("regression", 2), DistillTerm(teachers=("t",)))
    assert float(loss) == float(shown) == pytest.approx((1 + 0) / 2 + (9 + 9) / 2)


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
        "skew_kl": (q * (q / (0.1 * q + 0.9 * p)).log()).sum(),
    }
    for name, value in expected.items():
        config = DistillTerm(teachers=("t",), divergence=name, temperature=2.0)
        loss, shown = task_loss(z, t, info_of("single_label_classification"), config)
        assert float(shown) == pytest.approx(float(value), rel=1e-4)
        assert float(loss) == pytest.approx(4 * float(value), rel=1e-4)
