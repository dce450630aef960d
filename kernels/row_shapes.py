"""Which shape of the row kernel takes a row: a table and its reasons, for what cannot be autotuned.

Bytes that a row of V entries of s bytes moves to and from memory: held 2·V·s, read once and written
once, the least there is. Streamed as much, and V·s more for what its second reading does not find
in the L2: backwards, with P rows in flight, it finds min(1, L2 / (P·V·s)). The sparse entries move
some 3·32·k more, targets and losses 12·k. A row none of whose mass is outside its ids to within its
type's resolution is read again where it is held, too, mostly from the L2.
"""

import functools
from typing import NamedTuple

import torch
import triton

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# How every kernel is compiled, said at each launch: a·b + c may become one instruction that rounds
# once. Triton does so unasked up to 3.9 and no longer from 3.10 (triton-lang/triton#11270). The row
# kernel wants it for its speed: without, it has 1 to 10 % more instructions and up to 16 more
# registers a thread. Its accuracy needs neither: the interpreter, which fuses nothing, is held to
# the same bounds as a GPU. Said or not, which pairs are fused is the compiler's choice: losses and
# gradients are equal to the bit on one version of Triton and one GPU, not from one to another.
COMPILED = {"enable_fp_fusion": True}


class Machine(NamedTuple):
    """What a shape depends on beside the row."""

    clusters: bool  # programs can hold a row together
    processors: int
    cache: int  # bytes of the L2


class Shape(NamedTuple):
    """How a row is read, and by how many programs."""

    held: bool
    ctas: int  # programs of a cluster
    block: int  # entries read at a time; of a held row all
    warps: int  # of a program
    registers: int  # a thread's at most
    stages: int = 1  # blocks on their way while one is summed
    programs: int | None = None  # that share the rows; None: as many as there are rows

    @property
    def constants(self) -> dict[str, int]:
        """What the kernel is compiled for."""
        kernel = {"HELD": self.held, "CTAS": self.ctas, "STAGES": self.stages, "BLOCK": self.block}
        return kernel | {
            "num_warps": self.warps, "num_ctas": self.ctas, "maxnreg": self.registers
        }  # fmt: skip


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """Clusters are there from sm_90 and Triton 3.8 on: before, it cannot lower a sum over one."""
    if device.type != "cuda":  # interpreted: few programs, so that they take several rows
        return Machine(False, 2, 2**20)
    found = torch.cuda.get_device_properties(device)
    clusters = found.major >= 9 and TRITON >= (3, 8)
    return Machine(clusters, found.multi_processor_count, found.L2_cache_size)


# Held rows of at most so many entries: programs of a cluster, and warps of each. In a cluster a
# program has 8,192 entries, 32 a thread: with 80 registers three programs of different rows share a
# processor, so that one reads while another writes; 16 a thread and 64 registers let two. Sixteen
# programs are the largest cluster: of the longest rows each has twice as many entries, and a
# processor alone. Eight warps do not do for sixteen: the compiler, which then takes the sixteen
# edges of each for a large tensor, brings the row into their layout.
_CLUSTERS = {
    16_384: ((2, 8),),
    32_768: ((4, 8),),
    65_536: ((8, 8),),
    131_072: ((16, 16),),
    262_144: ((16, 16),),
}
# One program holds at most 64 floats in each of 512 threads. Eight warps leave room for a second.
_ALONE = {
    1_024: ((1, 1),),
    2_048: ((1, 2),),
    4_096: ((1, 4),),
    8_192: ((1, 8),),
    16_384: ((1, 8), (1, 16)),
    32_768: ((1, 16),),
}
_HELD_IDS = 256  # more ids take the registers that a row would be held in
_FLOATS = {16: 64, 32: 80, 64: 128}  # registers by what a thread holds of its row


@functools.cache
def shape_of(vocabulary: int, size: int, ids: int, floats: int, machine: Machine) -> Shape:
    """The shape for rows of V entries of `size` bytes with so many ids, a power of two.

    `floats` are kept of each entry of a held row: an exponential, or two where neither is a power
    of the other, and the logit itself under a softcap. Logits of four bytes take one more register
    until they are exponentials.
    """
    floats += size == 4
    block = max(256, 1 << (vocabulary - 1).bit_length())
    table = _ALONE | _CLUSTERS if machine.clusters else _ALONE
    fitting = next((table[most] for most in sorted(table) if block <= most), ())
    for ctas, warps in fitting if ids <= _HELD_IDS else ():
        held = block // (ctas * warps * 32) * floats
        registers = next((r for most, r in _FLOATS.items() if held <= most), None)
        if registers is not None:
            return Shape(True, ctas, block, warps, registers)
    return _streamed(vocabulary, size, ids, block, machine)


def _streamed(vocabulary: int, size: int, ids: int, block: int, machine: Machine) -> Shape:
    """In few programs that share the rows: as many as are resident, and as the L2 has rows' room.

    Half of the processors work at least: the L2 delivers to fewer no more than memory does to all.
    """
    if vocabulary >= 100_000:
        block, warps, registers = 16_384, 16, 128
    else:
        block = min(4_096, block)
        warps, registers = max(1, block // 512), 64
    if ids > 512:
        registers = 65_536 // (32 * warps) if warps > 8 else 255
    resident = machine.processors * max(1, 65_536 // (32 * warps * registers))
    room = max(machine.processors // 2, machine.cache // max(1, vocabulary * size))
    return Shape(False, 1, block, warps, registers, 3, min(resident, room))
