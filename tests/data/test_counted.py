"""Numbers of things in words."""

import pytest

from rekindle.data.counted import counted


@pytest.mark.parametrize(
    ("number", "unit", "told"),
    [
        (0, "unit", "0 units"),
        (1, "sequence", "1 sequence"),
        (2, "data file", "2 data files"),
        (1234, "token", "1,234 tokens"),
        (1, "forward pass", "1 forward pass"),
        (3, "forward pass", "3 forward passes"),
    ],
)
def test_one_is_singular(number, unit, told):
    assert counted(number, unit) == told
