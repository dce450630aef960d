"""A plain PyTorch loop over cached targets:

    python examples/own_loop.py CACHE TEACHER STUDENT [STEPS]

STUDENT is a folder of a masked LM with the cache's tokenizer.
"""

import sys

import torch
from transformers import AutoModelForMaskedLM

from rekindle.data.cache import Cache
from rekindle.kernels.losses import kd_loss
from rekindle.train.to_device import to_device


def main(place: str, teacher: str, student: str, steps: str = "20") -> list[float]:
    cache = Cache.open(place)
    model = AutoModelForMaskedLM.from_pretrained(student).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses: list[float] = []
    epoch = 0
    while len(losses) < int(steps):
        for batch in cache.batches(teachers=[teacher], batch_sequences=8, seed=0, epoch=epoch):
            moved = to_device(batch, model.device)
            target = moved.targets[teacher]
            tokens = target.info.vocabulary_size  # rows that pad the output matrix are none
            logits = model(**target.inputs).logits.flatten(0, 1)[target.select, :tokens]
            found = kd_loss(
                logits, target.targets, labels=target.labels, ce_weight=0.5, kd_weight=0.5
            )
            found.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(found.loss.detach()))
            print(f"step {len(losses)}: loss {losses[-1]:.4f}")
            if len(losses) == int(steps):
                break
        epoch += 1  # another order, and the next masking of each sequence
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
