"""What an adapter excludes, told before peft or the model is needed."""

import pytest

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.several_runs import check_same_runs
from rekindle.pipeline.stages.resolve import plan_stages
from rekindle.train.config import StudentConfig
from rekindle.train.student import check_student

RUN = {
    "corpus": {"source": ["text.jsonl"], "tokenizer": "tokens"},
    "cache": {"path": "cache"},
    "student": {"model": "base", "lora": {"r": 16}},
}


def configured(student=(), train=(), **more):
    student = RUN["student"] | dict(student)
    return parse_settings(RunConfig, RUN | {"student": student, "train": dict(train)} | more)


EXCLUDED = {
    "student.from_scratch": ({"from_scratch": True}, {}),
    "student.head: family": ({"head": "family", "lora": {"quantize": "nf4"}}, {}),
    "student.grow": ({"grow": {"layers": 4}}, {}),
    "train.warm_head_steps": ({}, {"warm_head_steps": 5}),
    "train.parallel: fsdp": ({}, {"parallel": "fsdp"}),
}


@pytest.mark.parametrize("key", EXCLUDED)
def test_what_an_adapter_excludes_is_told_when_the_file_is_read(key):
    student, train = EXCLUDED[key]
    with pytest.raises(InputError, match=f"student.lora and {key} exclude each other"):
        configured(student, train)
    configured({**student, "lora": None}, train)


def test_its_keys_are_checked():
    with pytest.raises(InputError, match=r"student\.lora\.rank.*"):
        configured({"lora": {"rank": 4}})
    found = configured({"lora": {"r": 4, "alpha": 12, "target_modules": "query"}}).student.lora
    assert (found.r, found.alpha, found.target_modules) == (4, 12, ("query",))
    with pytest.raises(InputError, match="all-linear must stand alone"):
        configured({"lora": {"target_modules": ["all-linear", "query"]}})


def test_a_student_without_one_is_recorded_as_before():
    """An earlier version refuses a key that it does not know, and could not go on with the run."""
    assert "lora" not in StudentConfig(model="base").model_dump()
    config = configured().needed_student()
    again = parse_settings(StudentConfig, config.model_dump(mode="json"))
    assert again == config


def test_without_peft_the_command_that_installs_it_is_told(monkeypatch, make_model, wordpiece):
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    monkeypatch.setattr("rekindle.train.model.lora.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package peft.*pip install -e '\.\[peft\]'"):
        check_student(StudentConfig(model=str(model), lora={"r": 2}))


def test_four_bits_need_bitsandbytes_and_exclude_dora(monkeypatch, make_model, wordpiece):
    with pytest.raises(InputError, match="quantize and dora exclude each other"):
        configured({"lora": {"quantize": "nf4", "dora": True}})
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    monkeypatch.setattr("rekindle.train.model.lora.find_spec", lambda name: True)
    monkeypatch.setattr("rekindle.train.model.quantised.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"the package bitsandbytes.*'\.\[quantized\]'"):
        check_student(StudentConfig(model=str(model), lora={"r": 2, "quantize": "nf4"}))


def test_a_stage_adapts_no_adapter(tmp_path):
    second = {"name": "two", "set": {"student.model": "{one}"}}
    config = configured(stages=[{"name": "one"}, second])
    with pytest.raises(InputError, match=r"stage 'one'.*Set student\.lora\.merge: true"):
        plan_stages(config, tmp_path)
    merged = {"lora": {"merge": True}}
    plan_stages(configured(merged, stages=[{"name": "one"}, second]), tmp_path)


def test_several_runs_do_not_go_on_without_it(tmp_path):
    """The key is recorded only where it is set: what lacks it is compared all the same."""
    model = tmp_path / "base"
    with_it, without = (configured({"model": str(model), "lora": one}) for one in ({"r": 2}, None))
    recorded, now = (
        {"a": config.model_dump(mode="json", by_alias=True, include={"student", "train"})}
        for config in (with_it, without)
    )
    for before, after, config in ((recorded, now, without), (now, recorded, with_it)):
        with pytest.raises(CheckpointError, match=r"another configuration \(student\.lora"):
            check_same_runs(tmp_path, before, after, "", "", {"a": config})
    check_same_runs(tmp_path, now, now, "", "", {"a": without})
