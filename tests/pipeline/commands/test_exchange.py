"""Targets into a cache and out of it by commands, and what the other commands say of them."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rekindle.data.cache import Cache
from rekindle.data.storage.shards import ShardSet
from testlib.caches import committed, problems
from testlib.command import pipeline
from testlib.elsewhere import rows_of

FROM = ("--provenance", "model=big/one", "--provenance", "engine=vLLM 0.11")


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_teacher, make_model, method_run, wordpiece):
    """A run file over a finished cache with the causal LM ``clm``, which teaches a student."""
    folder = tmp_path_factory.mktemp("exchange")
    teachers = [make_teacher("clm", "causal_lm", targets={"kind": "topk", "k": 5})]
    student = {
        "model": str(make_model("llama", "AutoModelForCausalLM", wordpiece, 7)),
        "task": "causal_lm",
    }
    objective = {"hard": {"weight": 1.0}, "distill": [{"teachers": ["clm"], "weight": 1.0}]}
    train = {"steps": 3, "learning_rate": 1e-3, "evaluate_every": 3, "held_out": 0.2}
    path = method_run(folder, teachers, student, objective, **train, batch_sequences=4)
    done = pipeline("cache-teachers", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def cache(run, tmp_path):
    """A copy of its cache."""
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def rows(cache, tmp_path):
    """A file of rows for each of its sequences."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in rows_of(Cache.open(cache))]
    path.write_text("\n".join(lines) + "\n")
    return path


def done(*arguments):
    result = pipeline(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def trained(run, cache, out, teacher, *options):
    """Losses of a student that was trained from that teacher."""
    named = f"train.objective.distill.0.teachers=[{teacher}]"
    options = ("--set", f"cache.path={cache}", "--set", named, *options)
    done("train-student", run, "--out", out, *options)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    keys = {"loss", "ce", f"kl/{teacher}"}
    return [[value for key, value in line.items() if key in keys] for line in lines]


def test_a_student_learns_of_imported_targets_as_of_those_that_were_run(run, cache, tmp_path):
    """What a teacher said, taken out and in again, trains a student the same; and without being in
    the run file's `teachers`.
    """
    out = tmp_path / "rows.parquet"
    assert done("export-targets", cache, "--teacher", "clm", "--out", out) == f"{out}: 12 rows\n"
    done("import-targets", cache, "again", out, *FROM)
    values = yaml.safe_load(run.read_text()) | {"teachers": []}
    alone = tmp_path / "alone.yaml"
    alone.write_text(yaml.safe_dump(values))
    found = trained(alone, cache, tmp_path / "b", "again")
    assert found == trained(run, cache, tmp_path / "a", "clm")
    assert any(found)


def test_holes_are_trained_where_they_are_allowed(run, cache, rows, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:9]))
    refused = pipeline("import-targets", cache, "few", few, *FROM)
    assert refused.returncode == 2
    assert "3 sequences of the cache without a row: 9, 10, 11" in refused.stderr
    told = done("import-targets", cache, "few", few, *FROM, "--allow-missing")
    assert "name the teacher in train.allow_missing" in told
    named = ("--set", f"cache.path={cache}", "--set", "train.objective.distill.0.teachers=[few]")
    result = pipeline("train-student", run, "--out", tmp_path / "a", *named)
    assert result.returncode == 2
    assert "Finish it with `pipeline import-targets`" in result.stderr
    assert any(trained(run, cache, tmp_path / "a", "few", "--set", "train.allow_missing=[few]"))


def test_files_of_each_kind_and_several(cache, rows, tmp_path):
    """JSON lines, parquet and Arrow say the same; rows may be spread over files."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    first, last = pa.Table.from_pylist(lines[:7]), pa.Table.from_pylist(lines[7:])
    pq.write_table(first, tmp_path / "first.parquet")
    with pa.ipc.new_file(tmp_path / "last.arrow", last.schema) as writer:
        writer.write_table(last)
    done("import-targets", cache, "lines", rows, *FROM)
    done(
        "import-targets",
        cache,
        "columns",
        tmp_path / "last.arrow",
        tmp_path / "first.parquet",
        *FROM,
    )
    opened = Cache.open(cache)
    for index in range(12):
        (one,), (two,) = (opened.example(index).targets[name] for name in ("lines", "columns"))
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.log_probs, two.log_probs)
    facts = json.loads(done("import-targets", cache, "lines", rows, *FROM, "--json"))
    assert (facts["units_done"], facts["units_present"], facts["rows"]) == (0, 3, 12)


def test_a_wrong_row_is_one_message_with_its_file_and_number(cache, rows, tmp_path):
    lines = rows.read_text().splitlines()
    bad = json.loads(lines[4])
    bad["log_probs"][2][1] = 0.5
    rows.write_text("\n".join([*lines[:4], json.dumps(bad), *lines[5:]]))
    result = pipeline("import-targets", cache, "there", rows, *FROM)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {rows}, row 5: position 2: ")
    assert "there" not in Cache.open(cache).teachers
    rows.write_text("\n".join(lines))
    result = pipeline("import-targets", cache, "there", rows, tmp_path / "more.jsonl", *FROM)
    assert result.returncode == 2
    assert "no such file" in result.stderr
    assert "there" not in Cache.open(cache).teachers
    result = pipeline("import-targets", cache, "there", rows, *FROM, "--provenance", "model=b")
    assert "--provenance model is big/one and b; give it once" in result.stderr
    result = pipeline("import-targets", cache, "there", rows, "--provenance", "model")
    assert (result.returncode, result.stdout) == (2, "")
    assert "give KEY=VALUE" in result.stderr
    result = pipeline("import-targets", cache, "there", rows, *FROM, "--codec", "precise")
    assert "Type: --set codec=precise" in result.stderr


def test_inspect_shows_where_targets_come_from(cache, rows):
    done("import-targets", cache, "there", rows, *FROM)
    text = done("inspect", cache)
    assert "there was imported: model big/one, engine vLLM 0.11; tails derived in float64" in text
    facts = json.loads(done("inspect", cache, "--json"))["teachers"]
    assert facts["there"]["imported"]["provenance"] == {"model": "big/one", "engine": "vLLM 0.11"}
    assert facts["there"]["estimator"]["tail"] == "derived"
    assert "imported" not in facts["clm"]
    example = done("inspect", cache, "--example", 1, "--teacher", "there")
    assert "?" in example


def test_damage_of_imported_targets_is_told_and_imported_again(run, cache, rows):
    """`cache-teachers` says that it cannot run their model; the same import makes them anew."""
    done("import-targets", cache, "there", rows, *FROM)
    whole = committed(cache, "targets")
    shards = ShardSet(Cache.open(cache).store, "targets/there")
    file = cache / "targets/there" / shards.committed()["00001"].path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (cache / "targets/there/teacher.json").write_text("{")
    result = pipeline("verify", cache)
    assert result.returncode == 3
    assert (
        "there: imported, so there is no model to run; `pipeline import-targets`" in result.stderr
    )
    result = pipeline("cache-teachers", run, "--set", f"cache.path={cache}")
    assert "it was imported, so no model can be run for it" in result.stderr
    done("import-targets", cache, "there", rows, *FROM)
    assert committed(cache, "targets") == whole
    assert problems(cache) == []
    done("gc", cache, "--older-than", 0)
    assert problems(cache) == []


def test_a_name_is_of_a_run_teacher_or_of_an_imported_one(run, cache, rows):
    result = pipeline("import-targets", cache, "clm", rows, *FROM)
    assert result.returncode == 3
    assert "not imported; give these targets another name" in result.stderr
    done("import-targets", cache, "there", rows, *FROM)
    named = ("--set", f"cache.path={cache}", "--set", "teachers.0.name=there")
    result = pipeline("cache-teachers", run, *named)
    assert result.returncode == 3
    assert "Nothing has to be run for it: remove it from `teachers`" in result.stderr
    assert len(committed(cache, "targets/there")) == 3
    audit = tmp = run.parent / "there.yaml"
    values = yaml.safe_load(run.read_text())
    values["teachers"][0]["name"], values["cache"]["path"] = "there", str(cache)
    tmp.write_text(yaml.safe_dump(values))
    result = pipeline("verify", cache, "--audit", 1, "--config", audit)
    assert "there is no model to audit it with" in result.stderr


def test_the_text_alone_is_exported_for_an_engine(cache, tmp_path):
    out = tmp_path / "prompts.jsonl"
    done("export-targets", cache, "--out", out, "--limit", 3)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    opened = Cache.open(cache)
    assert [row["input_ids"] for row in rows] == [
        opened.example(i).input_ids.tolist() for i in range(3)
    ]
    assert rows[0]["digest"] == opened.example(0).digest
    result = pipeline("export-targets", cache, "--out", out)
    assert result.returncode == 2
    assert "already exists" in result.stderr
