"""Make the row kernel take a shape of the test's choice, whatever the table says."""

from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def shape_named(name: str, vocabulary: int) -> Any:
    """Return the shape: "streamed" over several blocks, "held", or held by a "cluster of" 4, 8 or
    16 programs.
    """
    from rekindle.kernels.row_shapes import Shape

    if name == "streamed":
        return Shape(False, 1, 256, 1, 64, stages=3, programs=2)
    block = max(256, 1 << (vocabulary - 1).bit_length())
    programs = 1 if name == "held" else int(name.removeprefix("cluster of "))
    return Shape(True, programs, block, 16 if programs == 16 else 8, 128)


def kernel_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every row in this shape; skip the test where a GPU has no clusters."""
    from rekindle.kernels import row_shapes, triton_rows

    machine = row_shapes.machine_of(torch.device(DEVICE))
    if name.startswith("cluster") and DEVICE == "cuda" and not machine.clusters:
        pytest.skip("no clusters by this GPU or this Triton")
    monkeypatch.setattr(
        triton_rows, "shape_of", lambda vocabulary, *_: shape_named(name, vocabulary)
    )
