"""Compare the results of runs, and gradients."""

import pytest
import torch
from safetensors.torch import load_file

from rekindle.train.record.run_log import read_metrics

TIMES = ("tokens_per_second", "data_wait", "seconds")


def weights(out):
    """Return the tensors that a run left, by name."""
    found = {k: v for file in out.glob("model*.safetensors") for k, v in load_file(file).items()}
    found |= {f"heads.{k}": v for k, v in load_file(out / "heads.safetensors").items()}
    if (prompts := out / "prompts.safetensors").is_file():
        found |= {f"prompts.{k}": v for k, v in load_file(prompts).items()}
    return found


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def metrics(out):
    """Return every record without what depends on the clock."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(out)]


def gradients(student):
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def same_gradients(found, expected, tolerance=2e-5, least=1e-3):
    """Compare gradients relative to the largest one; a missing gradient is 0."""
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > least
    zero = torch.zeros(())
    for name in found.keys() | expected.keys():
        a, b = found.get(name, zero), expected.get(name, zero)
        assert float((a - b).abs().max()) <= tolerance * scale, name


def assert_same_run(found, expected):
    """Compare two runs, allowing another order of summation."""
    ours, theirs = read_metrics(found), read_metrics(expected)
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"kind", "step", "tokens_per_second", "data_wait", "seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (name, a["step"])
    assert_same_weights(weights(found), weights(expected))


def assert_same_weights(found, expected):
    """Compare weights, except the attention's key biases.

    Their gradient is 0 except for rounding (a softmax ignores a constant added to all its inputs),
    and Adam turns that into whole steps.
    """
    assert found.keys() == expected.keys()
    for name in found:
        if not name.endswith("key.bias"):
            a, b = found[name], expected[name]
            torch.testing.assert_close(
                a, b, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
