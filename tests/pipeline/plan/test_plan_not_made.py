"""A plan makes no built-in model: it names those that are not made, and what is not known without.

The home of built-in models is empty, or lacks one of them.
"""

import json
from pathlib import Path

import pytest

from rekindle.pipeline.builtin.names import resolve_name

RUN = """
corpus: {source: [%s], tokenizer: %s, sequence_length: 16}
cache: {path: cache}
teachers:
  - {name: part, model: python-docs/expert-part, task: sequence_classification}
  - {name: lm, model: python-docs/bert-text, task: masked_lm}
student: {model: python-docs/bert-larger, from_scratch: true}
train: {objective: {distill: [{teachers: [lm]}]}}
"""
EVERYTHING = {"sequences", "tokens", "units", "positions", "bytes", "seconds", "break-even"}


@pytest.fixture
def plan(tmp_path, monkeypatch, command):
    """plan(source, tokenizer, *options): what `pipeline plan` says, in an empty folder and home."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))

    def run(source: object, tokenizer: object, *options: str) -> str:
        Path("run.yaml").write_text(RUN % (source, tokenizer))
        code, said, errors = command("plan", "run.yaml", *options)
        assert code == 0, errors
        assert [path.name for path in work.iterdir()] == ["run.yaml"]
        assert not (tmp_path / "home").exists()
        return said

    return run


def named(values: dict) -> dict[str, set[str]]:
    return {one["name"]: set(one["unknown"]) for one in values["to_make"]}


def test_of_a_corpus_without_its_tokenizer_nothing_is_known(plan):
    values = json.loads(plan("python-docs/corpus", "python-docs/bert", "--json"))
    assert values["corpus"]["sequences"] is values["corpus"]["tokens"] is None
    assert "python-docs/bert and python-docs/corpus are not made" in values["corpus"]["basis"]
    assert values["totals"]["bytes"] is values["break_even"]["runs"] is None
    assert values["totals"]["unknown"] == ["part", "lm"]
    assert all(work["units_to_make"] is None for work in values["teachers"])
    found = named(values)
    assert found["python-docs/bert"] == found["python-docs/corpus"] == EVERYTHING
    of_its_own = {f"{figure} of part" for figure in ("positions", "bytes", "seconds")}
    assert found["python-docs/expert-part"] == of_its_own
    assert found["python-docs/bert-larger"] == set()
    assert {one["path"] for one in values["to_make"]} == {resolve_name(name) for name in found}


def test_people_are_told_as_well(plan):
    said = plan("python-docs/corpus", "python-docs/bert")
    assert "not known; python-docs/bert and python-docs/corpus are not made yet" in said
    assert "total for cache: not known" in said
    told = " ".join(said.split())
    assert "python-docs/bert: a masked language model; not known without it: sequences" in told
    assert "larger masked language model, without weights" in told


@pytest.mark.parametrize("probe", ["--probe", "--no-probe"])
def test_without_a_teachers_model_the_corpus_is_known(plan, tmp_path, wordpiece, probe):
    (tmp_path / "a.txt").write_text("a tokenizer and a model\n" * 40)
    values = json.loads(plan(tmp_path / "a.txt", wordpiece, "--json", probe))
    assert values["corpus"]["sequences"] > 0
    part, lm = values["teachers"]
    assert part["reason"] == "its model python-docs/expert-part is not made yet"
    assert (part["bytes"], part["seconds"], lm["seconds"]) == (None, None, None)
    assert lm["bytes"] > 0
    assert lm["units_to_make"] == 4
    assert values["break_even"]["runs"] > 0
    assert named(values) == {
        "python-docs/bert-larger": set(),
        "python-docs/expert-part": {"bytes of part", "seconds of part"},
        "python-docs/bert-text": {"seconds of lm"},
    }


def test_stages_are_planned_without_making_anything(plan):
    stages = "stages=[{name: one}, {name: two, set: {train.seed: 1}}]"
    said = plan("python-docs/corpus", "python-docs/bert", "--json", "--set", stages)
    assert "python-docs/bert" in named(json.loads(said)["stages"][0]["plan"])
