"""What the compiler makes of the row kernel for each GPU, found without one.

Compiled in a process of its own: this one may hold the interpreter's version of the kernel. Another
Triton's is looked at by naming the Python of an environment that has it, torch or no torch:

    TRITON_PYTHON=newer/bin/python pytest -m "slow or not slow" tests/kernels/test_row_kernel.py
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

# (architecture, logits, rows aligned, V, K, options): every shape of the table, every way to get
# both sums, both ways to the complement's sum, every type, the costliest divergence
VARIANTS = [
    (arch, "bf16", aligned, vocabulary, 64, {"POWER": power, "HIDE": hide})
    for arch, aligned, vocabulary, power, hide in [
        (80, False, 30522, 2, False),
        (80, False, 30522, 0, False),
        (80, True, 128256, 1, True),
        (90, True, 30528, 1, True),
        (90, False, 30522, 0, True),
        (90, True, 16384, 2, False),
        (90, True, 50368, 1, False),
        (90, True, 256000, 0, False),
        (100, False, 30522, 1, False),
    ]
] + [
    (90, "fp16", False, 50257, 256, {"POWER": 0, "HIDE": False, "DIVERGENCE": 2, "SOFTCAP": True}),
    (90, "fp32", False, 30522, 8, {"POWER": 4, "HIDE": True, "DIVERGENCE": 1}),
    (80, "bf16", False, 50257, 64, {"POWER": 2, "HIDE": False, "DIVERGENCE": 4}),
    (90, "bf16", True, 128256, 64, {"POWER": 0, "HIDE": True, "DIVERGENCE": 4}),
    (90, "bf16", False, 30522, 64, {"POWER": 2, "HIDE": True, "ENCODED": True}),
    (100, "bf16", True, 256000, 64, {"POWER": 2, "HIDE": True, "ENCODED": True, "PLANES": 2}),
    (90, "bf16", True, 30522, 64, {"POWER": 2, "HIDE": True, "bias": "fp32"}),
    (90, "bf16", False, 30522, 192, {"POWER": 2, "HIDE": False, "TEACHERS": 3}),
    (90, "bf16", True, 128256, 192, {"POWER": 1, "HIDE": True, "TEACHERS": 3}),
]

ROOT = Path(__file__).parents[2]

# Two of each architecture, and one of every program that is another text; the others, some seconds
# each, differ from one of these by an architecture or a length alone.
QUICK = {0, 1, 2, 4, 9, 10, 13, 14, 16}


def of_each() -> list[Any]:
    slow = pytest.mark.slow
    return [
        pytest.param(index, marks=[] if index in QUICK else slow, id=str(variant[:4]))
        for index, variant in enumerate(VARIANTS)
    ]


def compiled(indices: Sequence[int]) -> dict[int, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    python = environment.pop("TRITON_PYTHON", None)
    if python is not None:
        environment["PYTHONPATH"] = str(ROOT / ".ns")
    script = ROOT / "tests" / "lib" / "testlib" / "kernels" / "compiled_rows.py"
    run = subprocess.run(
        [python or sys.executable, str(script), json.dumps([VARIANTS[i] for i in indices])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "FP_FUSION" not in run.stderr  # 3.9 warns where fusion is left to a default
    return dict(zip(indices, json.loads(run.stdout), strict=True))


@pytest.fixture(scope="module")
def quick_results() -> dict[int, dict[str, Any]]:
    return compiled(sorted(QUICK))


@pytest.fixture(scope="module")
def slow_results() -> dict[int, dict[str, Any]]:
    return compiled([index for index in range(len(VARIANTS)) if index not in QUICK])


@pytest.fixture
def results(request: pytest.FixtureRequest) -> dict[int, dict[str, Any]]:
    slow = request.node.get_closest_marker("slow")
    found: dict[int, dict[str, Any]] = request.getfixturevalue(
        "slow_results" if slow else "quick_results"
    )
    return found


@pytest.mark.parametrize("index", of_each())
def test_no_spills_and_whole_vectors(results: dict[int, dict[str, Any]], index: int) -> None:
    """Rows are read and written sixteen bytes at a time wherever they start, and nothing spills
    but a few of a row's constants.
    """
    size = 4 if VARIANTS[index][1] == "fp32" else 2
    found = results[index]
    held, ctas, block, warps, _, _, _ = found["shape"]
    assert found["stack"] <= 64
    assert found["registers"] * 32 * warps <= 65536
    steps = block // ctas * size // 16 // (32 * warps)  # vectors a thread and block
    assert found["vector_loads"] >= steps * (1 if held else 2)  # a streamed row is read twice
    assert held or found["copies"] >= 2 * steps  # both times with the next block on its way
    assert found["vector_stores"] >= steps
    # what is narrow are the k ids, the label and the edges, never a step of the row
    assert found["narrow_loads"] <= 20
    assert found["narrow_stores"] <= 8


@pytest.mark.parametrize("index", of_each())
def test_programs_of_a_cluster_share_little(results: dict[int, dict[str, Any]], index: int) -> None:
    """Each has a part of the row and all that is about its ids, and stores into its own part alone:
    without that a sum over ids would wait for the others, and a store could overtake another's.
    """
    found = results[index]
    assert found["apart"]
    # four for each of two exchanges, and for that in the loop which is seldom entered
    assert found["cluster_barriers"] <= (12 if found["shape"][1] > 1 else 0)


@pytest.mark.parametrize("index", of_each())
def test_products_are_fused_with_sums(results: dict[int, dict[str, Any]], index: int) -> None:
    """By any version: 60 stand in the logarithms (84 with a softcap); fusion adds 40 or more."""
    written = 84 if VARIANTS[index][-1].get("SOFTCAP") else 60
    assert results[index]["fused"] >= written + 40


def test_every_launch_says_how_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels; no compiler is asked."""
    from rekindle.kernels import triton_rows
    from rekindle.kernels.targets import KernelTargets, LossSettings

    said: dict[str, dict[str, object]] = {}

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> "Kernel":
            return self

        def __call__(self, *arguments: object, **options: object) -> None:
            said[self.name] = options

    names = {"_count_kernel", "row_kernel", "_sum_kernel", "_scale_kernel"}
    for name in names:
        monkeypatch.setattr(triton_rows, name, Kernel(name))
    z = torch.zeros(2, 9)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    targets = KernelTargets(ids, torch.ones(2, 1), None, ids[:, 0], None)
    kernel = triton_rows.RowKernel(targets, LossSettings(), False)
    kernel.run(z, z, slice(0, 2))
    kernel.losses()
    triton_rows.scale_unless_one(z, torch.tensor(2.0))
    fusion = {name: options.get("enable_fp_fusion") for name, options in said.items()}
    assert fusion == dict.fromkeys(names, True)
