"""What a run leaves behind, and gradients, held against others."""

import torch
from safetensors.torch import load_file

from rekindle.train.record.run_log import read_metrics

TIMES = ("tokens_per_second", "data_wait", "seconds")


def weights(out):
    """The tensors that a run left behind, by name."""
    found = load_file(out / "model.safetensors")
    found |= {f"heads.{k}": v for k, v in load_file(out / "heads.safetensors").items()}
    if (prompts := out / "prompts.safetensors").is_file():
        found |= {f"prompts.{k}": v for k, v in load_file(prompts).items()}
    return found


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def metrics(out):
    """Every record without what depends on the clock."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(out)]


def gradients(student):
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def same_gradients(found, expected, tolerance=2e-5, least=1e-3):
    """To a share of the largest one; a gradient that is not there is 0."""
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > least
    zero = torch.zeros(())
    for name in found.keys() | expected.keys():
        a, b = found.get(name, zero), expected.get(name, zero)
        assert float((a - b).abs().max()) <= tolerance * scale, name
