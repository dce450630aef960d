"""Compile variants of the row kernel for a GPU that need not be present, and print the result.

  python compiled_rows.py '[[90, "bf16", true, 30528, 64, {"POWER": 1}], ...]'

Prints a JSON object per variant (architecture, logits, rows aligned, V, K, options), with the shape
the table gives for such a machine. Needs Triton but not torch: with `.ns` on the path it runs in an
environment with a newer Triton.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from typing import Any

if importlib.util.find_spec("torch") is None:  # signatures only need the names
    stand_in: Any = types.ModuleType("torch")
    stand_in.Tensor, stand_in.device, stand_in.dtype = (type(n, (), {}) for n in "abc")
    sys.modules["torch"] = stand_in

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rekindle.kernels.row_kernel import row_kernel
from rekindle.kernels.row_shapes import COMPILED, TRITON, Machine, Shape, shape_of

FLOATS = ("probs", "tail", "weight", "counts", "ce", "kd")
TYPES: dict[str, Any] = {"ids_ptr": "*i64", "labels_ptr": "*i64"}
TYPES |= {f"{name}_ptr": "*fp32" for name in FLOATS}
TYPES |= dict.fromkeys(
    ("rows", "stride", "V", "K", "kept", "ignore_index", "upstream_stride"), "i32"
)
TYPES |= dict.fromkeys(
    ("inverse_tau", "scale", "softcap", "resolution", "log_skew", "logit_skew"), "fp32"
)
TYPES |= dict.fromkeys(("ce_weight", "spread"), "fp32")
SIXTEEN = [["tt.divisibility", 16]]


def compiled(
    arch: int, dtype: str, aligned: bool, vocabulary: int, kept: int, options: dict[str, Any]
) -> tuple[Any, Shape, Any]:
    """Return the compiled kernel, its shape, and its source."""
    options = dict(options)
    bias, given = options.pop("bias", None), options.pop("shape", None)
    constants = {"DIVERGENCE": 0, "TAIL": 0, "POWER": 1, "ENCODED": False, "PLANES": 0}
    constants |= {"TEACHERS": 1, "SOFTCAP": False, "HIDE": True, "GRADIENT": True}
    constants |= options | {"BLOCK_K": 1 << (kept - 1).bit_length()}
    floats = 1 + (constants["POWER"] == 0) + constants["SOFTCAP"]
    size = 4 if dtype == "fp32" else 2
    # processors and L2 of an H100 and an A100
    machine = Machine(arch >= 90 and TRITON >= (3, 8), 132 if arch >= 90 else 108, 50 * 2**20)
    shape = shape_of(vocabulary, size, constants["BLOCK_K"], floats, machine)
    shape = Shape(*given) if given else shape
    constants["HIDE"] = constants["HIDE"] and not shape.held
    asked = shape.constants
    build = {n: asked.pop(n) for n in ("num_warps", "num_ctas", "maxnreg")} | COMPILED
    constants |= asked
    types = TYPES | {"logits_ptr": "*" + dtype, "grad_ptr": "*" + dtype}
    if constants["ENCODED"]:
        types |= {"ids_ptr": "*i16", "probs_ptr": "*u8", "tail_ptr": "*i16", "high_ptr": "*u8"}
        types |= {"max_ptr": "*i16", "min_ptr": "*i16"}
    if bias:
        types["bias_ptr"] = "*" + bias
    types["kd_weights"] = ("fp32",) * constants["TEACHERS"]
    names = row_kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    constants |= {n: None for n in names if n not in types and n not in constants}
    attributes = {
        (i,): SIXTEEN
        for i, n in enumerate(names)
        if n.endswith("_ptr") or (aligned and n == "stride")
    }
    source = ASTSource(
        row_kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=build)
    return kernel, shape, source


def described(kernel: Any, shape: Shape) -> dict[str, Any]:
    """Return registers and stack bytes per thread, memory instructions, and what a cluster
    shares.
    """
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found
    ptx = kernel.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    plain = r"\.global(?:\.[A-Za-z0-9_:]+)*"
    layouts = re.findall(r"CGALayout = \[(\[.*?\])\]", kernel.asm["ttgir"])
    bases = [
        [int(n) for n in b.split(",")] for text in layouts for b in re.findall(r"\[(.*?)\]", text)
    ]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shape": list(shape),
        "vector_loads": count(f"ld{plain}\\.v4\\.b32") + count(r"cp\.async\.c[ag]\..*, 0x10,"),
        "copies": count(r"cp\.async\.c[ag]\..*, 0x10,"),
        "vector_stores": count(f"st{plain}\\.v4\\.b32"),
        "narrow_loads": count(f"ld{plain}\\.b16"),
        "narrow_stores": count(f"st{plain}\\.b16"),
        "fused": count(r"\bfma\.rn\."),
        "cluster_barriers": count(r"barrier\.cluster\.arrive"),
        # whether programs of a cluster differ only in the first dimension of all tensors
        "apart": all(not any(basis[1:]) and basis[0] for basis in bases),
    }


if __name__ == "__main__":
    variants = json.loads(sys.argv[1])
    print(json.dumps([described(*compiled(*variant)[:2]) for variant in variants]))
