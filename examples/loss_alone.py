"""The distillation loss on logits of one's own, without a cache: python examples/loss_alone.py"""

import torch

from rekindle.kernels.losses import kd_loss

POSITIONS, VOCABULARY, KEPT = 16, 1000, 8
TEMPERATURE = 2.0


def main() -> float:
    torch.manual_seed(0)
    teacher = torch.randn(POSITIONS, VOCABULARY)
    student = torch.randn(POSITIONS, VOCABULARY, requires_grad=True)
    labels = torch.randint(VOCABULARY, (POSITIONS,))

    # What a teacher keeps: its likeliest ids, and the mass outside them, at the temperature.
    log_probs, ids = torch.log_softmax(teacher / TEMPERATURE, dim=1).topk(KEPT)
    probs = log_probs.exp()

    found = kd_loss(
        student,
        ids,
        probs,
        tail_prob=1 - probs.sum(dim=1),
        labels=labels,
        temperature=TEMPERATURE,
        ce_weight=0.5,
        kd_weight=0.5,  # loss = 0.5 · CE + 0.5 · τ² · KL
    )
    found.loss.backward()
    print(f"loss {found.loss:.4f}, cross-entropy {found.ce:.4f}, KL {found.kd:.4f}")
    print(f"gradient [{', '.join(map(str, student.grad.shape))}], norm {student.grad.norm():.4f}")
    return found.loss.item()


if __name__ == "__main__":
    main()
