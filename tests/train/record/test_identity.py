"""What a run is: free, to be gone on with, another one, or finished."""

import json
import re

import pytest

from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.atomic import write_json
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.methods.replaced_tokens import ReplacedTokensSettings
from rekindle.train.record.identity import RUN_FILE, VERSION, check_run, keys_that_may_change

ABOUT = {
    "student": {"model": "m", "task": "masked_lm"},
    "train": {"steps": 10, "objective": {"hard": {"weight": 1.0}}, "tags": ("a", "b")},
    "cache": {"path": "/here", "corpus": "abc", "teachers": {"big": "123"}},
}


def changed(part, key, value):
    about = json.loads(json.dumps(ABOUT))
    about[part][key] = value
    return about


def test_a_new_directory_is_free(tmp_path):
    assert check_run(tmp_path / "new", ABOUT, resume=False) is False
    assert check_run(tmp_path / "new", ABOUT, resume=True) is False
    assert check_run(tmp_path, ABOUT, resume=True) is False
    assert not (tmp_path / "new").exists()
    write_json(tmp_path / "new/deep" / RUN_FILE, ABOUT)
    assert check_run(tmp_path / "new/deep", ABOUT, resume=True) is True


def test_a_used_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for resume in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no run"):
            check_run(tmp_path, ABOUT, resume)
        with pytest.raises(InputError, match="is not empty"):
            check_run(tmp_path / "file", ABOUT, resume)
    write_json(tmp_path / "run" / RUN_FILE, ABOUT)
    with pytest.raises(InputError, match="or --resume to continue"):
        check_run(tmp_path / "run", ABOUT, resume=False)


@pytest.mark.parametrize(
    ("part", "key", "value", "named"),
    [
        ("student", "model", "other", "student.model"),
        ("train", "steps", 11, "train.steps"),
        ("train", "objective", {"hard": {"weight": 0.5}}, "train.objective.hard.weight"),
        ("train", "brand_new", 1, "train.brand_new"),
        ("cache", "corpus", "abd", "cache.corpus"),
        ("cache", "teachers", {"big": "124"}, "cache.teachers.big"),
    ],
)
def test_another_configuration_is_refused_by_its_key(tmp_path, part, key, value, named):
    write_json(tmp_path / RUN_FILE, ABOUT)
    with pytest.raises(CheckpointError, match=rf"\({re.escape(named)}: "):
        check_run(tmp_path, changed(part, key, value), resume=True)


def about_of(**train):
    """Whole sections, as a run has them, with the settings of a method."""
    values = {"steps": 9, "objective": {"distill": [{"teachers": ["big"], "temperature": 2}]}}
    config = parse_settings(TrainConfig, values | train).model_dump(mode="json", by_alias=True)
    method = parse_settings(ReplacedTokensSettings, {"method": "replaced_tokens", "teacher": "big"})
    config["objective"]["methods"] = [method.model_dump(mode="json", by_alias=True)]
    student = StudentConfig(model="m").model_dump(mode="json", by_alias=True)
    return {"student": student, "train": config, "cache": ABOUT["cache"]}


def test_a_run_goes_on_although_it_is_older_than_some_keys(tmp_path):
    """Keys that had not been there have their defaults; any other value of them is another run."""
    older = about_of()
    del older["student"]["grow"], older["train"]["curriculum"]
    (term,), (method,) = (older["train"]["objective"][name] for name in ("distill", "methods"))
    del term["ranking"], method["temperature"]
    write_json(tmp_path / RUN_FILE, older)
    assert check_run(tmp_path, about_of(), resume=True)
    for key, value in {"curriculum": {"teacher": "big"}, "steps": 10, "seed": 1}.items():
        with pytest.raises(CheckpointError, match=rf"\(train\.{key}: "):
            check_run(tmp_path, about_of(**{key: value}), resume=True)
    other = about_of()
    other["train"]["objective"]["methods"][0]["temperature"] = 2.0
    with pytest.raises(CheckpointError, match=r"train\.objective"):
        check_run(tmp_path, other, resume=True)


def test_a_cache_that_moved_is_the_same_cache(tmp_path):
    write_json(tmp_path / RUN_FILE, ABOUT)
    assert check_run(tmp_path, changed("cache", "path", "/there"), resume=True)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_record_is_no_reason_for_a_traceback(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        check_run(tmp_path, ABOUT, resume=True)


# --- each key decides, or may change ---

MAY_CHANGE = {
    *("micro_batch_sequences", "gradient_checkpointing", "compile", "parallel", "prefetch_threads"),
    *("checkpoint_every", "keep_checkpoints", "keep_best", "explosion_factor"),
    *("log_gradients_every", "report_to"),
}


def leaves(value, path=()):
    """The dotted keys of a record's single values."""
    inside = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(inside, dict) or not inside:
        return [path]
    return [leaf for key, one in inside.items() for leaf in leaves(one, (*path, key))]


def with_other(record, path):
    found = json.loads(json.dumps(record))
    here = found
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = "another"
    return found


WHOLE = {
    "replay": {"domains": ["old"], "choose": "uniform"},
    "curriculum": {"teacher": "big"},
    "domains": ["new"],
}


@pytest.mark.parametrize("keep_best", ["loss", None])
def test_every_key_of_a_run_decides_it_or_may_change(tmp_path, keep_best):
    train = parse_settings(TrainConfig, about_of(**WHOLE)["train"] | {"keep_best": keep_best})
    student = parse_settings(StudentConfig, {"model": "m", "grow": {"layers": 2}})
    about = about_of(**WHOLE) | {"student": student.model_dump(mode="json", by_alias=True)}
    about["train"]["keep_best"] = keep_best
    free = keys_that_may_change(student, train)
    expected = {f"train.{key}" for key in MAY_CHANGE}
    expected |= {"train.evaluate_every"} if keep_best is None else set()
    assert set(free) == expected
    paths = [path for path in leaves(about) if path[0] != "cache"]
    assert len(paths) > 60
    for path in paths:
        write_json(tmp_path / RUN_FILE, with_other(about, path))
        key = ".".join(map(str, path))
        if any(f"{key}.".startswith(f"{one}.") for one in expected):
            assert check_run(tmp_path, about, True, free)
        else:
            with pytest.raises(CheckpointError, match=rf"\({'.'.join(map(str, path[:2]))}"):
                check_run(tmp_path, about, True, free)


def test_evaluations_that_replay_follows_decide():
    follows = {"replay": {"domains": ["old"]}, "keep_best": None}
    train = parse_settings(TrainConfig, about_of()["train"] | follows)
    assert "train.evaluate_every" not in keys_that_may_change(StudentConfig(model="m"), train)


@pytest.mark.parametrize("version", [VERSION + 1, "2", None, 1.5])
def test_a_record_of_a_later_version_is_refused(tmp_path, version):
    write_json(tmp_path / RUN_FILE, ABOUT | {"version": version})
    with pytest.raises(CheckpointError, match=rf"has version .* reads up to {VERSION}"):
        check_run(tmp_path, ABOUT, resume=True)
