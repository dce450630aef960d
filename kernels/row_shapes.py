"""Choose the row kernel's shape for a row from a table; autotuning cannot do it here.

Memory traffic of a row with V entries of s bytes: 2·V·s if held (read once and written once, the
minimum). If streamed, the same plus V·s times the share that the second reading does not find in
the L2 cache: read backwards with P rows in flight, it finds min(1, L2 / (P·V·s)). The sparse
entries add some 3·32·k, targets and losses 12·k. If no mass of a row lies outside its ids, within
its type's resolution, even a held row is read again, mostly from the L2.
"""

import functools
from typing import NamedTuple

import torch
import triton

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Compile every kernel with floating-point fusion, stated at each launch: a·b + c may become one
# instruction that rounds once. Triton does so by default up to 3.9 and no longer from 3.10
# (triton-lang/triton#11270). The row kernel needs it for speed: without it, it has 1 to 10 % more
# instructions and up to 16 more registers a thread. Accuracy does not depend on it: the
# interpreter, which fuses nothing, meets the same bounds as a GPU. In either case the compiler
# chooses which pairs to fuse, so losses and gradients are bit-identical on one version of Triton
# and one GPU only.
COMPILED = {"enable_fp_fusion": True}


class Machine(NamedTuple):
    """What a shape depends on besides the row."""

    clusters: bool  # several programs can share a row
    processors: int
    cache: int  # bytes of the L2


class Shape(NamedTuple):
    """How a row is read, and by how many programs."""

    held: bool
    ctas: int  # programs of a cluster
    block: int  # entries read at a time; for a held row all
    warps: int  # per program
    registers: int  # maximum per thread
    stages: int = 1  # blocks being loaded while one is summed
    programs: int | None = None  # programs that share the rows; None: one per row

    @property
    def constants(self) -> dict[str, int]:
        """Return the constants that the kernel is compiled for."""
        kernel = {"HELD": self.held, "CTAS": self.ctas, "STAGES": self.stages, "BLOCK": self.block}
        return kernel | {
            "num_warps": self.warps, "num_ctas": self.ctas, "maxnreg": self.registers
        }  # fmt: skip


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """Return the machine of a device. Clusters need sm_90 and Triton 3.8, as earlier versions
    cannot lower a sum over a cluster.
    """
    if device.type != "cuda":  # interpreted: few programs, so that each takes several rows
        return Machine(False, 2, 2**20)
    properties = torch.cuda.get_device_properties(device)
    clusters = properties.major >= 9 and TRITON >= (3, 8)
    return Machine(clusters, properties.multi_processor_count, properties.L2_cache_size)


# For held rows of at most so many entries: programs of a cluster, and warps of each. In a cluster a
# program has 8,192 entries, 32 a thread. With 80 registers, three programs of different rows share
# a processor, so one reads while another writes; 16 entries a thread and 64 registers would allow
# two. A cluster has at most sixteen programs: for the longest rows each has twice as many entries
# and a processor to itself. With sixteen programs eight warps do not work: the compiler then takes
# each one's sixteen edge entries for a large tensor and converts the row to their layout.
_CLUSTERS = {
    16_384: ((2, 8),),
    32_768: ((4, 8),),
    65_536: ((8, 8),),
    131_072: ((16, 16),),
    262_144: ((16, 16),),
}
# One program holds at most 64 floats in each of 512 threads. With eight warps a second one fits.
_SINGLE_PROGRAM = {
    1_024: ((1, 1),),
    2_048: ((1, 2),),
    4_096: ((1, 4),),
    8_192: ((1, 8),),
    16_384: ((1, 8), (1, 16)),
    32_768: ((1, 16),),
}
_HELD_IDS = 256  # more ids need the registers that would hold the row
_FLOATS = {16: 64, 32: 80, 64: 128}  # registers by the floats of its row that a thread holds


@functools.cache
def shape_of(vocabulary: int, size: int, ids: int, floats: int, machine: Machine) -> Shape:
    """Return the shape for rows of V entries of `size` bytes with this many ids, a power of two.

    `floats` values are kept for each entry of a held row: one exponential, or two if neither is a
    power of the other, and under a softcap the logit itself. Logits of four bytes take one more
    register until they are exponentials.
    """
    floats += size == 4
    block = max(256, 1 << (vocabulary - 1).bit_length())
    table = _SINGLE_PROGRAM | _CLUSTERS if machine.clusters else _SINGLE_PROGRAM
    layouts = next((table[limit] for limit in sorted(table) if block <= limit), ())
    for ctas, warps in layouts if ids <= _HELD_IDS else ():
        held_floats = block // (ctas * warps * 32) * floats
        registers = next((r for limit, r in _FLOATS.items() if held_floats <= limit), None)
        if registers is not None:
            return Shape(True, ctas, block, warps, registers)
    return _streamed(vocabulary, size, ids, block, machine)


def _streamed(vocabulary: int, size: int, ids: int, block: int, machine: Machine) -> Shape:
    """Return a shape in which few programs share the rows: as many as are resident and as the L2
    has room for rows.

    At least half of the processors work: with fewer, the L2 delivers no more than memory does to
    all.
    """
    if vocabulary >= 100_000:
        block, warps, registers = 16_384, 16, 128
    else:
        block = min(4_096, block)
        warps, registers = max(1, block // 512), 64
    if ids > 512:
        registers = 65_536 // (32 * warps) if warps > 8 else 255
    resident = machine.processors * max(1, 65_536 // (32 * warps * registers))
    rows_in_cache = max(machine.processors // 2, machine.cache // max(1, vocabulary * size))
    return Shape(False, 1, block, warps, registers, 3, min(resident, rows_in_cache))
