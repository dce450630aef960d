"""The shapes that `kd_losses.py --shapes` times. Needs neither torch nor Triton."""

from typing import Any

REGISTERS = {16: 64, 32: 80, 64: 128}  # by how much of its row a thread holds
Fields = tuple[Any, ...]  # of a `row_shapes.Shape`


def candidates(
    vocabulary: int, size: int, clusters: bool, processors: int, cache: int
) -> dict[str, Fields]:
    """Return shapes by name: held by 1 to 16 programs, and streamed with and without a bound on
    rows.
    """
    block = max(256, 1 << (vocabulary - 1).bit_length())
    found: dict[str, Fields] = {}
    for ctas in (1, 2, 4, 8, 16) if clusters else (1,):
        for warps in (8, 16, 32):
            held = block // (ctas * warps * 32)
            registers = REGISTERS.get(held)
            if registers is not None and registers * 32 * warps <= 65_536:
                found[f"held {ctas}x{warps}"] = (True, ctas, block, warps, registers, 1, None)
    for tile, warps, registers in ((4_096, 8, 64), (8_192, 16, 64), (16_384, 16, 128)):
        resident = processors * (65_536 // (32 * warps * registers))
        bounds = {"": None, " resident": resident, " L2": cache // (vocabulary * size)}
        for stages in (1, 3) if tile <= block else ():
            for name, programs in bounds.items():
                shape = (False, 1, tile, warps, registers, stages, programs)
                found[f"streamed {tile}x{warps} stages {stages}{name}"] = shape
    return found
