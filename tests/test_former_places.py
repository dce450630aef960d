"""Modules that were documented before the rooms: they work, or say where they are now."""

import sys
import warnings

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


def test_a_former_import_works_and_tells_the_new_place(monkeypatch):
    """At the line that imports it, as what is imported for the first time does."""
    for line, now in LINES.items():
        if now:
            monkeypatch.delitem(sys.modules, line.split()[1], raising=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        exec(compile("\n".join(LINES), "lines.py", "exec"), {"__name__": "__main__"})
    told = [w for w in found if str(w.message).startswith("moved to ")]
    assert all(w.category is DeprecationWarning and w.filename == "lines.py" for w in told)
    assert [str(w.message).removeprefix("moved to ") for w in told] == [
        *filter(None, LINES.values())
    ]
    assert [w.lineno for w in told] == [n for n, now in enumerate(LINES.values(), 1) if now]
