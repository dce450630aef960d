"""What a plan says of the student: that its language-model head is a fresh one, and what to do."""

import json
import shutil

import pytest

from rekindle.data.settings import parse_settings
from rekindle.pipeline.plan.run import plan_run
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.step_config import usual_head_steps

FLASH = {"_attn_implementation": "flash_attention_2"}  # not installed, and not asked for
TEXT, KD = "has no language-model head", {"hard": {"weight": 0}}
NEVER, LATER = ({"hard": {"weight": {"from": 0.0, "to": to}}} for to in (0.0, 1.0))
WORDS, CLASSES = [{"teachers": ["lm"]}], [{"teachers": ["classes"]}]


@pytest.fixture(scope="module")
def told(tmp_path_factory, configure, teachers, make_model, wordpiece):
    """told(kind, student, settings, **train): what a plan says of a fresh head of a student of that
    class, whose own config.json has these settings, too.
    """

    def plan(kind="AutoModel", student=None, settings=None, **train):
        model = str(make_model("bert", kind, wordpiece, 3))
        if settings:
            copy = shutil.copytree(model, tmp_path_factory.mktemp("student") / "model")
            own = json.loads((copy / "config.json").read_text()) | settings
            (copy / "config.json").write_text(json.dumps(own))
            model = str(copy)
        chosen = [one for one in teachers if one["name"] in ("lm", "classes")]
        config = configure(tmp_path_factory.mktemp("plan"), chosen)
        own = StudentConfig(model=model, **student or {})
        parts = {"student": own, "train": parse_settings(TrainConfig, train)}
        config = config.model_copy(update=parts)
        return [one for one in plan_run(config, probe=False).warnings if TEXT in one]

    return plan


def test_a_fresh_head_that_is_trained_is_told_before_anything_is_made(told):
    (line,) = told(steps=50)
    assert f"train.warm_head_steps: {usual_head_steps(50)})" in line
    (line,) = told(epochs=2)
    assert "train.warm_head_steps: N, a fifth of the steps" in line
    (line,) = told(objective=KD | {"distill": WORDS})
    assert "is trained, from its teachers' words alone" in line
    (line,) = told(objective=LATER | {"distill": WORDS})
    assert "is trained. Its cross-entropy" in line


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("AutoModelForMaskedLM", {}),
        ("AutoModel", {"objective": KD | {"distill": CLASSES}}),
        ("AutoModel", {"objective": NEVER | {"distill": CLASSES}}),
        ("AutoModel", {"warm_head_steps": 5, "steps": 50}),
        ("AutoModel", {"student": {"from_scratch": True}}),
        ("AutoModelForMaskedLM", {"student": {"attention": "eager"}, "settings": FLASH}),
    ],
)
def test_nothing_is_told_of_a_head_that_is_there_or_not_trained_with_the_body(told, kind, given):
    assert told(kind, **given) == []
