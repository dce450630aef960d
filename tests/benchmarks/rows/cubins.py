"""The row kernel's clusters under an older Triton: compiled by a newer one, launched by the driver.

    PYTHONPATH=.ns:tests/lib:tests/benchmarks newer/bin/python -m rows.cubins DIR    # needs no GPU
    python tests/benchmarks/kd_losses.py --shapes --cubins DIR                       # on sm_90

The first needs Triton ≥ 3.8 and no torch; for k = 64 ids, bfloat16, forward KL and labels.
"""

import ctypes
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARIES = (30_522, 50_368, 128_256, 256_000)
KEPT = 64
NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


def build(folder: Path) -> None:
    """Write a cubin of each shape with a cluster, and an index of what its launch needs."""
    from rows.candidates import candidates

    from testlib.kernels.compiled_rows import compiled

    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for vocabulary in VOCABULARIES:
        for name, shape in candidates(vocabulary, 2, True, 132, 50 * 2**20).items():
            for power in (1, 2, 0) if shape[1] > 1 else ():
                options = {"POWER": power, "HIDE": False, "shape": shape}
                kernel, _, source = compiled(
                    90, "bf16", vocabulary % 16 == 0, vocabulary, KEPT, options
                )
                file = f"{vocabulary}_{name.replace(' ', '_')}_{power}.cubin"
                (folder / file).write_bytes(kernel.asm["cubin"])
                entry = re.search(r"\.entry (\w+)\((.*?)\)", kernel.asm["ptx"], re.S)
                assert entry
                given = [(n, t) for n, t in source.signature.items() if t != "constexpr"]
                index.append(
                    {"file": file, "name": name, "vocabulary": vocabulary, "power": power,
                     "ctas": shape[1], "warps": shape[3], "shared": kernel.metadata.shared,
                     "entry": entry[1], "params": entry[2].count(".param"), "given": given}
                )  # fmt: skip
                (folder / "index.json").write_text(json.dumps(index))
                print(file, flush=True)


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Launch(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_uint) for n in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


def launchers(
    folder: Path, vocabulary: int, power: int, rows: int, values: dict[str, Any], stream: int
) -> dict[str, Callable[[], None]]:
    """Return functions, by name, that launch each cubin for these rows once; `values` are the
    kernel's arguments.

    Tensors among them are held for as long as the returned functions.
    """
    driver = ctypes.CDLL("libcuda.so.1")

    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA driver error {status}")

    def launcher(about: dict[str, Any]) -> Callable[[], None]:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        image = (folder / about["file"]).read_bytes()
        check(driver.cuModuleLoadData(ctypes.byref(module), image))
        check(driver.cuModuleGetFunction(ctypes.byref(function), module, about["entry"].encode()))
        if about["ctas"] > 8:  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            check(driver.cuFuncSetAttribute(function, 14, 1))
        arguments: list[Any] = []
        for name, kind in about["given"]:
            if isinstance(kind, list):  # a tuple's entries are separate arguments
                arguments += [NUMBERS[k](v) for k, v in zip(kind, values[name], strict=True)]
            elif kind.startswith("*"):
                arguments.append(ctypes.c_void_p(values[name].data_ptr()))
            else:
                arguments.append(NUMBERS[kind](values[name]))
        assert about["params"] - len(arguments) in (0, 1, 2), "the kernel takes other arguments"
        arguments += [ctypes.c_void_p(0)] * (about["params"] - len(arguments))  # Triton's scratch
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in arguments)
        )
        cluster = (_Attribute * 1)()
        cluster[0].id = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster[0].value[0], cluster[0].value[1], cluster[0].value[2] = about["ctas"], 1, 1
        launch = _Launch(
            rows * about["ctas"], 1, 1, 32 * about["warps"], 1, 1, about["shared"], stream,
            cluster, 1,
        )  # fmt: skip
        kept = arguments, cluster, values

        def run() -> None:
            assert kept
            check(driver.cuLaunchKernelEx(ctypes.byref(launch), function, pointers, None))

        return run

    index = json.loads((folder / "index.json").read_text())
    fitting = [a for a in index if (a["vocabulary"], a["power"]) == (vocabulary, power)]
    return {f"cubin {about['name']}": launcher(about) for about in fitting}


if __name__ == "__main__":
    build(Path(sys.argv[1]))
