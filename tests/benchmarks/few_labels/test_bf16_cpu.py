"""bf16_cpu.py reaches modules that were imported before it, as in a process of a cycle's job."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("bf16_cpu.py")
CODE = """
import runpy
from rekindle.train import precision, running_out
from rekindle.train.model import files
runpy.run_path({script!r})
for module in (precision, running_out, files):
    assert module.chosen_precision("auto", "cpu") == "bf16", module
    assert module.chosen_precision("fp32", "cpu") == "fp32", module
"""


def test_every_module_that_chooses_a_precision_takes_bf16() -> None:
    subprocess.run([sys.executable, "-c", CODE.format(script=str(SCRIPT))], check=True)
