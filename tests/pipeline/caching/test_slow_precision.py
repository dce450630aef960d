"""What is said of a teacher whose precision the CPU has no instructions for: before it runs."""

import pytest
import torch

from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.plan.run import plan_run

SLOW = "this CPU has no instructions"


@pytest.fixture
def _avx2_alone(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})


@pytest.mark.usefixtures("_avx2_alone")
def test_it_is_planned_and_said_before_a_teacher_runs_and_not_after(
    tmp_path, configure, make_model, wordpiece, caplog
):
    model = str(make_model("bert", "AutoModelForMaskedLM", wordpiece))
    teacher = {"name": "lm", "model": model, "task": "masked_lm"}
    other = {**teacher, "name": "quick"}
    asked = configure(tmp_path, [other, {**teacher, "precision": "bf16"}])

    def said(config, do=cache_teachers):
        caplog.clear()
        do(config)
        return [one for one in caplog.messages if SLOW in one]

    (planned,) = [one for one in plan_run(asked, probe=False).warnings if SLOW in one]
    assert planned.startswith("teachers.lm.precision: bf16: ")
    assert planned.endswith("for speed set teachers.lm.precision: fp32")
    assert said(asked) == [planned]
    assert said(asked) == []  # nothing runs
    assert not [one for one in plan_run(asked, probe=False).warnings if SLOW in one]

    next((tmp_path / "targets" / "lm" / "commits").iterdir()).unlink()
    (line,) = said(configure(tmp_path, [other, teacher]))  # auto is as the cache has it
    assert line.startswith("teachers.lm.precision: bf16: ")
    assert line.endswith("or cache it again under another name in fp32")

    (line,) = said(asked, lambda config: audit_cache(str(tmp_path), config, 1))
    assert line.startswith("teacher 'lm': bf16: ")
