"""``pipeline teachers``, and what the other commands say of a cache whose teachers were changed."""

import json
import shutil

import pytest
import yaml

from rekindle.data.cache import Cache
from rekindle.data.storage.store import open_store
from testlib.caches import committed, problems
from testlib.changes.changing import killed_before
from testlib.command import pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_teacher, make_model, method_run, wordpiece):
    """A run file over a finished cache with the causal LM ``clm``, which teaches a student."""
    folder = tmp_path_factory.mktemp("teachers")
    teachers = [make_teacher("clm", "causal_lm", targets={"kind": "topk", "k": 5})]
    model = make_model("llama", "AutoModelForCausalLM", wordpiece, 7, num_hidden_layers=1)
    student = {"model": str(model), "task": "causal_lm"}
    objective = {"hard": {"weight": 1.0}, "distill": [{"teachers": ["clm"], "weight": 1.0}]}
    train = {"steps": 2, "learning_rate": 1e-3, "checkpoint_every": 1, "batch_sequences": 4}
    path = method_run(folder, teachers, student, objective, **train)
    done("cache-teachers", path)
    return path


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, with its cache."""
    shutil.copytree(made.parent / "cache", tmp_path / "cache")
    values = yaml.safe_load(made.read_text())
    values["cache"]["path"] = str(tmp_path / "cache")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


@pytest.fixture
def cache(run):
    return run.parent / "cache"


def done(*arguments):
    result = pipeline(*arguments)
    assert result.returncode == 0, result.stderr
    return result


def refused(*arguments, code=2):
    result = pipeline(*arguments)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return message


def test_they_are_listed_with_bytes_and_where_they_come_from(cache):
    (clm,) = json.loads(done("teachers", cache, "--json").stdout)["teachers"]
    assert (clm["units"], clm["units_planned"], clm["codec"], clm["made"]) == (
        3,
        3,
        "default",
        "run",
    )
    assert clm["bytes"] == sum(p.stat().st_size for p in (cache / "targets").rglob("*.arrow"))
    text = done("teachers", cache).stdout
    for word in ("1 teacher", "3 of 3", "default", "clean", clm["fingerprint"][:12], clm["model"]):
        assert word in text


def test_a_removed_teacher_is_said_cached_again_to_the_byte(run, cache, made):
    assert "3 units, " in refused("teachers", cache, "--remove", "clm")
    assert committed(cache) == committed(made.parent / "cache")
    told = json.loads(done("teachers", cache, "--remove", "clm", "--yes", "--json").stdout)
    assert told["changed"]
    assert "was removed before" in done("teachers", cache, "--remove", "clm", "--yes").stdout
    message = refused("train-student", run, "--out", run.parent / "a")
    assert "Teacher 'clm' was removed from this cache" in message
    again = done("cache-teachers", run)
    assert "teacher clm was removed from this cache; it is cached again" in again.stderr
    assert committed(cache) == committed(made.parent / "cache")
    done("train-student", run, "--out", run.parent / "a")


def test_a_renamed_teacher_is_not_run_twice_and_its_students_go_on(run, cache):
    out = run.parent / "a"
    done("train-student", run, "--out", out)
    (out / "summary.json").unlink()  # it was killed at its end
    done("teachers", cache, "--rename", "clm", "big")
    assert "was renamed to 'big'" in refused("cache-teachers", run)
    message = refused("train-student", run, "--out", out, "--resume")
    assert "Teacher 'clm' was renamed to 'big'" in message
    assert f"pipeline teachers {cache} --rename big clm" in message
    done("teachers", cache, "--rename", "big", "clm")
    done("train-student", run, "--out", out, "--resume")
    values = yaml.safe_load(run.read_text())
    values["teachers"][0]["name"] = "third"  # asked for by name, it is another one
    run.write_text(yaml.safe_dump(values))
    done("cache-teachers", run)
    assert {*Cache.open(cache).teachers} == {"clm", "third"}


def test_run_files_are_told_of_the_codec_and_students_see_the_same(run, cache):
    done("train-student", run, "--out", run.parent / "a")
    assert "no error" in done("teachers", cache, "--transcode", "clm", "compact").stdout
    message = refused("cache-teachers", run, code=3)
    assert "Set its targets.codec to compact, or transcode it" in message
    assert "--transcode clm default`" in message
    done("cache-teachers", run, "--set", "teachers.0.targets.codec=compact")
    done("train-student", run, "--out", run.parent / "b")
    weights = [(run.parent / out / "model.safetensors").read_bytes() for out in "ab"]
    assert weights[0] == weights[1]
    done("verify", cache, "--audit", "2", "--config", run)


def test_others_wait_for_a_change_and_it_waits_for_them(run, cache):
    store = open_store(cache)
    change = ("teachers", cache, "--rename", "clm", "big")
    with store.reading():
        assert "another process reads" in refused(*change)
    with store.working():
        assert "another process writes to" in refused(*change)
    train = ("train-student", run, "--out", run.parent / "a")
    with store.changing():
        for command in (("cache-teachers", run), train, ("verify", cache)):
            assert "`pipeline teachers` is changing" in refused(*command)
        assert "another process writes to" in refused(*change)
    assert not (run.parent / "a").exists()


def test_what_was_killed_is_finished_or_given_up_before_anything_is_added(run, cache, made):
    killed_before(cache, ("rename", "clm", "big"), 4)
    line = f"pipeline teachers {cache} --rename clm big"
    assert f"Run `{line}` (again) first" in refused("cache-teachers", run)
    assert line in done("teachers", cache).stdout
    assert "--older-than 0" in refused("gc", cache)
    assert problems(cache) == []
    done("train-student", run, "--out", run.parent / "a")  # it sees what was there before
    done("gc", cache, "--older-than", "0")
    assert committed(cache) == committed(made.parent / "cache")
    assert "0 units made" in done("cache-teachers", run).stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--remove", "clm", "--rename", "clm", "b"], "--remove and --rename: give one of them"),
        (["--yes"], "--yes is for --remove"),
        (["--rename", "clm", "CON/1"], "a name becomes a folder"),
        (["--transcode", "x", "compact"], "has no teacher 'x' (it has: clm)"),
    ],
)
def test_what_makes_no_sense_is_refused(cache, options, words):
    assert words in refused("teachers", cache, *options)


def test_where_there_is_no_cache(tmp_path):
    for options in ([], ["--remove", "a", "--yes"], ["--rename", "a", "b"]):
        assert "is not a Rekindle cache" in refused("teachers", tmp_path / "none", *options, code=3)
    assert not (tmp_path / "none").exists()


def test_what_was_imported_and_renamed_is_not_imported_twice(cache, tmp_path):
    rows = ("export-targets", cache, "--teacher", "clm", "--out", tmp_path / "rows.jsonl")
    done(*rows)
    imported = ("import-targets", cache, "imp", tmp_path / "rows.jsonl", "--provenance", "model=x")
    done(*imported)
    done("teachers", cache, "--rename", "imp", "imported")
    assert "was renamed to 'imported'" in refused(*imported)
    done(*imported[:-1], "model=y")  # another one may have that name


def test_an_audit_says_whom_it_leaves_out(run, cache):
    audit = ("verify", cache, "--audit", "1", "--config", run)
    values = yaml.safe_load(run.read_text())
    values["teachers"].append(values["teachers"][0] | {"name": "again"})
    run.write_text(yaml.safe_dump(values))
    done("cache-teachers", run)
    done("teachers", cache, "--rename", "clm", "big")
    told = done(*audit).stderr
    assert "teacher big is not audited: the configuration has no teacher of that name" in told
    assert "teacher clm of the configuration is not in the cache. Teacher 'clm' was renamed" in told
    assert "--config is for --audit" in refused("verify", cache, "--config", run)
    assert "cannot read the configuration" in refused(*audit[:-1], "none.yaml")
