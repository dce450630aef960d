"""Directories of runs that nobody has trained."""

import json

import pytest

from testlib.compared.runs import about


@pytest.fixture
def write(tmp_path):
    """write(name, loss=…, **about) -> a run's directory; ``done``: steps if it is unfinished."""

    def make(name, loss=5.0, done=None, evaluation=None, speed=100.0, **values):
        run = tmp_path / name
        run.mkdir(parents=True)
        content = about(**values)
        (run / "run.json").write_text(json.dumps(content))
        steps = content["train"]["steps"]
        evaluation = evaluation or {"loss": loss, "kl/lm": loss / 2, "agreement/lm": 1 / loss}
        lines = [
            # The second step has as many tokens again as the first, at half the speed.
            {"kind": "train", "step": step, "loss": 1.0, "tokens": tokens}
            | {"tokens_per_second": 2 * speed if step == 1 else speed, "data_wait": step / 100}
            for step, tokens in zip(range(1, 1 + (done or steps)), (200, 400, 0, 0), strict=False)
        ]
        lines.append({"kind": "evaluate", "step": len(lines)} | evaluation)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)
        if done is None:
            summary = {"steps": steps, "seconds": 12.34, "evaluation": evaluation}
            coverage = {
                **{"sequences_with_kd": 30, "sequences_ce_only": 10, "sequences_neither": 0},
                **{"positions_with_kd": 90, "positions_ce_only": 0, "positions_neither": 10},
            }
            (run / "summary.json").write_text(json.dumps(summary | {"coverage": coverage}))
        return run

    return make


@pytest.fixture
def curve(write):
    """curve(name, {step: ce}, per_step=…, teacher=…, **about) -> a run's directory with these
    evaluations, ``per_step`` seconds a step (None: not recorded), its teacher's pass ``teacher``.
    """

    def make(name, losses, per_step=1.0, teacher=None, taught=True, **values):
        values |= {} if taught else {"objective": {"distill": []}}
        run = write(name, steps=max(losses), **values)
        recorded = json.loads((run / "run.json").read_text())
        if not taught:
            recorded["cache"]["teachers"] = {}
        recorded["cache"]["teacher_seconds"] = {"lm": teacher} if taught else {}
        (run / "run.json").write_text(json.dumps(recorded))
        lines = []
        for step in range(1, max(losses) + 1):
            time = {} if per_step is None else {"seconds": per_step * step}
            lines.append(
                {"kind": "train", "step": step, "tokens": 1, "tokens_per_second": 1} | time
            )
            if step in losses:
                lines.append({"kind": "evaluate", "step": step, "ce": losses[step]})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)
        return run

    return make
