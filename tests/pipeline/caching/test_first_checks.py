"""What files tell is told before anything is made: of every teacher, and of the student."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.run import plan_run
from testlib.models import AUTO

MASKED, CLASSES = AUTO["masked_lm"], AUTO["sequence_classification"]


@pytest.fixture
def bert(make_model, wordpiece) -> Path:
    return make_model("bert", MASKED, wordpiece)


@pytest.fixture
def no_corpus(monkeypatch):
    """Fail a test in which a corpus is begun, were it of a few sequences."""

    def begun(*arguments, **options):
        raise AssertionError("a corpus was begun")

    for place in ("caching.cache_teachers", "caching.first_checks"):
        monkeypatch.setattr(f"rekindle.pipeline.{place}.build_corpus", begun)
    monkeypatch.setattr("rekindle.pipeline.plan.surveyed.survey_corpus", begun)


def copied(model: Path, target: Path, **settings: object) -> Path:
    shutil.copytree(model, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


def masked(model: Path, name: str = "lm", task: str = "masked_lm") -> dict[str, object]:
    return {"name": name, "model": str(model), "task": task}


def with_student(config: RunConfig, student: dict[str, object], **train: object) -> RunConfig:
    values = config.model_dump(mode="json", by_alias=True)
    return parse_settings(RunConfig, values | {"student": student, "train": train})


def refused(config: RunConfig, cache: Path, *words: str, plans: bool = True) -> None:
    for run in (cache_teachers, plan_run) if plans else (cache_teachers,):
        with pytest.raises(InputError) as caught:
            run(config)
        for word in words:
            assert word in str(caught.value), str(caught.value)
        assert not cache.exists()


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def test_a_second_teacher_that_is_not_there(tmp_path, configure, bert, no_corpus):
    teachers = [masked(bert), masked(tmp_path / "nowhere", "other")]
    refused(configure(tmp_path / "c", teachers), tmp_path / "c", "'other'", "no such directory")


def test_headers_of_a_second_teachers_weights(tmp_path, configure, make_model, bert, no_corpus):
    wrong = copied(bert, tmp_path / "pointer")
    pointer(wrong / "model.safetensors")
    config = configure(tmp_path / "c", [masked(bert), masked(wrong, "other")])
    refused(config, tmp_path / "c", "'other'", "git-lfs pointer")
    shape = copied(bert, tmp_path / "shape", intermediate_size=50)
    config = configure(tmp_path / "c", [masked(bert), masked(shape, "other")])
    refused(config, tmp_path / "c", "'other'", "[48, 32] in the file and [50, 32]")
    config = configure(
        tmp_path / "c", [masked(bert), masked(bert, "other", "token_classification")]
    )
    refused(config, tmp_path / "c", "'other'", "classifier.weight", "would be random")
    left = copied(bert, tmp_path / "left", quantization_config={"quant_method": "gptq"})
    config = configure(tmp_path / "c", [masked(bert), masked(left, "other")])
    refused(config, tmp_path / "c", "'other'", "left over")


def test_older_names_of_weights_are_known_to_headers(tmp_path, configure, bert):
    """gamma and beta, as BERT's own files have them, and names without the body's prefix."""
    old = copied(bert, tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    names = {
        name: name.replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta")
        .removeprefix("bert.")
        for name in weights
    }
    renamed = {names[name]: values for name, values in weights.items()}
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    assert cache_teachers(configure(tmp_path / "c", [masked(old)])).units_done == 6


def test_the_student_is_looked_at_before_the_teachers_run(tmp_path, configure, bert, no_corpus):
    config = configure(tmp_path / "c", [masked(bert)])
    absent = with_student(config, {"model": str(tmp_path / "gone"), "task": "masked_lm"})
    refused(absent, tmp_path / "c", "gone", "no such directory")
    wrong = copied(bert, tmp_path / "student", intermediate_size=50)
    student = {"model": str(wrong), "task": "masked_lm"}
    refused(with_student(config, student), tmp_path / "c", "student", "[50, 32] by its config.json")


def test_what_the_first_sequences_tell(tmp_path, configure, make_model, bytelevel, bert):
    """A tokenizer of its own, sequences that are too long: nothing of the cache is begun."""
    other = make_model("roberta", MASKED, bytelevel)
    config = configure(tmp_path / "c", [masked(bert), masked(other, "other")])
    refused(config, tmp_path / "c", "'other'", "another tokenizer")
    short = make_model("bert", MASKED, bert, max_position_embeddings=16)
    config = configure(tmp_path / "c", [masked(bert), masked(short, "other")])
    refused(config, tmp_path / "c", "'other'", "at most 16 tokens")


def test_terms_that_the_teachers_cannot_serve(tmp_path, configure, bert):
    config = configure(tmp_path / "c", [masked(bert) | {"targets": {"kind": "topk", "k": 4}}])
    student = {"model": str(bert), "task": "masked_lm"}
    term = {"teachers": ["lm"], "weight": 1.0, "temperature": 3.0}
    asked = with_student(config, student, objective={"distill": [term]})
    refused(asked, tmp_path / "c", "train.objective.distill.0", "temperature", plans=False)
