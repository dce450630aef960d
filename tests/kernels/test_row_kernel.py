"""What the compiler makes of the row kernel for each GPU, found without one.

Compiled in a process of its own: this one may hold the interpreter's version of the kernel.
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

# (architecture, logits, rows aligned, V, K, options): both tiles of the launch table, every way to
# get both sums, both ways to the complement's sum, every type, the costliest divergence
VARIANTS = [
    (arch, "bf16", aligned, vocabulary, 64, {"POWER": power, "HIDE": hide})
    for arch, aligned, vocabulary, power, hide in [
        (80, True, 30528, 1, True),
        (80, False, 30522, 1, False),
        (90, True, 30528, 1, True),
        (90, False, 30522, 1, False),
        (90, False, 30522, 2, False),
        (90, False, 30522, 0, True),
        (90, True, 128256, 1, True),
        (90, True, 256000, 0, False),
        (100, False, 30522, 1, False),
        (100, True, 256000, 0, True),
    ]
] + [
    (90, "fp16", False, 50257, 256, {"POWER": 0, "HIDE": False, "DIVERGENCE": 2, "SOFTCAP": True}),
    (90, "fp32", False, 30522, 8, {"POWER": 4, "HIDE": True, "DIVERGENCE": 1}),
    (80, "bf16", False, 30522, 64, {"POWER": 2, "HIDE": False, "DIVERGENCE": 4}),
    (90, "bf16", True, 128256, 64, {"POWER": 0, "HIDE": True, "DIVERGENCE": 4}),
    (90, "bf16", False, 30522, 64, {"POWER": 2, "HIDE": True, "ENCODED": True}),
    (90, "bf16", True, 128256, 64, {"POWER": 1, "HIDE": True, "ENCODED": True, "PLANES": 1}),
    (100, "bf16", True, 256000, 64, {"POWER": 2, "HIDE": True, "ENCODED": True, "PLANES": 2}),
    (90, "bf16", True, 30522, 64, {"POWER": 2, "HIDE": True, "bias": "fp32"}),
    (90, "bf16", False, 30522, 192, {"POWER": 2, "HIDE": False, "TEACHERS": 3}),
    (90, "bf16", True, 128256, 192, {"POWER": 1, "HIDE": True, "TEACHERS": 3}),
]

# Two of each architecture, and one of every program that is another text; the others, half a second
# each, differ from one of these by an architecture or a length alone.
QUICK = {0, 4, 5, 9, 10, 11, 13, 14, 16, 17, 19}


def of_each() -> list[Any]:
    slow = pytest.mark.slow
    return [
        pytest.param(index, marks=[] if index in QUICK else slow, id=str(variant[:4]))
        for index, variant in enumerate(VARIANTS)
    ]


COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rekindle.kernels.triton_rows import COMPILED, _tile
from rekindle.kernels.row_kernel import row_kernel

FLOATS = ("probs", "tail", "weight", "counts", "ce", "kd")
TYPES = {"ids_ptr": "*i64", "labels_ptr": "*i64"} | {f"{n}_ptr": "*fp32" for n in FLOATS}
TYPES |= dict.fromkeys(("stride", "V", "K", "kept", "ignore_index", "upstream_stride"), "i32")
TYPES |= dict.fromkeys(("inverse_tau", "scale", "softcap", "resolution",
    "log_skew", "logit_skew", "ce_weight", "spread"), "fp32")
tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")

def compiled(arch, dtype, aligned, vocabulary, kept, options):
    block_k = triton.next_power_of_2(kept)
    tile = _tile(vocabulary, block_k)
    bias = options.pop("bias", None)
    constants = dict(DIVERGENCE=0, TAIL=0, POWER=1, ENCODED=False, PLANES=0, TEACHERS=1,
        SOFTCAP=False, HIDE=True, GRADIENT=True, BLOCK=tile.pop("BLOCK"), BLOCK_K=block_k) | options
    types = TYPES | {"logits_ptr": "*" + dtype, "grad_ptr": "*" + dtype}
    if constants["ENCODED"]:
        types |= {"ids_ptr": "*i16", "probs_ptr": "*u8", "tail_ptr": "*i16", "high_ptr": "*u8"}
    if bias:
        types["bias_ptr"] = "*" + bias
    types["kd_weights"] = ("fp32",) * constants["TEACHERS"]
    names = row_kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    constants |= {n: None for n in names if n not in types and n not in constants}
    sixteen = [["tt.divisibility", 16]]
    attributes = {(i,): sixteen for i, n in enumerate(names)
                  if n.endswith("_ptr") or (aligned and n == "stride")}
    source = ASTSource(row_kernel, signature,
                       {(names.index(n),): v for n, v in constants.items()}, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                            options=tile | COMPILED)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups())
    vector = r"{}\\.global(?:\\.[a-z0-9_:]+)*\\.v4\\.b32"
    narrow = r"{}\\.global(?:\\.[a-z0-9_:]+)*\\.b16"
    ptx = kernel.asm["ptx"]
    count = lambda pattern, what: len(re.findall(pattern.format(what), ptx))
    return dict(registers=registers, stack=stack, threads=32 * tile["num_warps"],
                entries=constants["BLOCK"],
                vector_loads=count(vector, "ld"), vector_stores=count(vector, "st"),
                fused=len(re.findall(r"\\bfma\\.rn\\.", ptx)),
                narrow_loads=count(narrow, "ld"), narrow_stores=count(narrow, "st"))

print(json.dumps([compiled(*v) for v in json.loads(sys.argv[1])]))
"""


def compiled(indices: Sequence[int]) -> dict[int, dict[str, int]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([VARIANTS[index] for index in indices])],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "FP_FUSION" not in run.stderr  # 3.9 warns where fusion is left to a default
    return dict(zip(indices, json.loads(run.stdout), strict=True))


@pytest.fixture(scope="module")
def quick_results() -> dict[int, dict[str, int]]:
    return compiled(sorted(QUICK))


@pytest.fixture(scope="module")
def slow_results() -> dict[int, dict[str, int]]:
    return compiled([index for index in range(len(VARIANTS)) if index not in QUICK])


@pytest.fixture
def results(request: pytest.FixtureRequest) -> dict[int, dict[str, int]]:
    slow = request.node.get_closest_marker("slow")
    found: dict[int, dict[str, int]] = request.getfixturevalue(
        "slow_results" if slow else "quick_results"
    )
    return found


@pytest.mark.parametrize("index", of_each())
def test_no_spills_and_whole_vectors(results: dict[int, dict[str, int]], index: int) -> None:
    """Rows are read and written sixteen bytes at a time wherever they start, and nothing spills."""
    size = 4 if VARIANTS[index][1] == "fp32" else 2
    found = results[index]
    assert found["stack"] == 0
    assert found["registers"] * found["threads"] <= 65536
    steps = found["entries"] * size // 16 // found["threads"]  # vectors a thread and block
    assert found["vector_loads"] >= 2 * steps  # both readings of the row
    assert found["vector_stores"] >= steps
    # what is narrow are the k ids, the label and the edges, never a step of the row
    assert found["narrow_loads"] <= 8
    assert found["narrow_stores"] <= 8


@pytest.mark.parametrize("index", of_each())
def test_products_are_fused_with_sums(results: dict[int, dict[str, int]], index: int) -> None:
    """By any version: 60 stand in the logarithms (84 with a softcap); fusion adds 40 or more."""
    written = 84 if VARIANTS[index][-1].get("SOFTCAP") else 60
    assert results[index]["fused"] >= written + 40


def test_every_launch_says_how_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels; no compiler is asked."""
    from rekindle.kernels import triton_rows
    from rekindle.kernels.targets import LossSettings, SparseTargets

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
    targets = SparseTargets(ids, torch.ones(2, 1), None, ids[:, 0], None)
    kernel = triton_rows.RowKernel(targets, LossSettings(), False)
    kernel.run(z, z, slice(0, 2))
    kernel.losses()
    triton_rows.scale_unless_one(z, torch.tensor(2.0))
    fusion = {name: options.get("enable_fp_fusion") for name, options in said.items()}
    assert fusion == dict.fromkeys(names, True)
