"""Modules that were documented before the rooms: they work, or say where they are now."""

import subprocess
import sys

LINES = {  # and where what they name is now
    "from rekindle.pipeline.prompts import write_prompts": "rekindle.pipeline.stages.prompts",
    "from rekindle.train.merge_baselines import merge_scores": (
        "rekindle.train.finetune.merge_baselines"
    ),
    "from rekindle.train.config import MethodSettings": None,
    "from rekindle.train.device_batch import model_inputs, send, sparse_targets": None,
    "from rekindle.train.method import Method": None,
    "from rekindle.train.student import Student": None,
}


def test_a_former_import_works_and_tells_the_new_place():
    """Once each, in the order of the lines."""
    code = "\n".join(LINES)
    command = [sys.executable, "-W", "default::DeprecationWarning:__main__", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = [text for text in done.stderr.splitlines() if "DeprecationWarning: moved" in text]
    assert [text.rpartition(" moved to ")[2] for text in told] == [*filter(None, LINES.values())]
    numbers = [int(text.split(":")[1]) for text in told]
    assert numbers == [n for n, now in enumerate(LINES.values(), 1) if now]
