"""The programs of examples/, run within the tests' own process."""

import runpy
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[4] / "examples"


def run_example(name: str, *arguments: object) -> dict[str, Any]:
    """Run a program as from the command line, with these arguments; return its names."""
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before
