"""Damage of every kind is found and named, and a sound cache agrees with its live teachers."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheError, InputError, RekindleError
from rekindle.data.storage.shards import Commit
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks import audit
from rekindle.pipeline.checks.verify import VerifyReport, verify_cache
from testlib.caches import problems
from testlib.models import AUTO

NAMES = ["lm", "causal", "dense", "odd", "classes", "score", "words", "pairs"]


def audit_cache(*arguments: Any, **more: Any) -> dict[str, dict[str, float]]:
    return audit.audit_cache(*arguments, **more).values


@pytest.fixture(scope="module")
def teachers(make_teacher) -> list[dict[str, Any]]:
    topk, few = {"kind": "topk", "k": 16}, {"kind": "topk", "k": 2}
    return [
        make_teacher("lm", "masked_lm", targets=topk),
        make_teacher("causal", "causal_lm", targets=topk),
        make_teacher("dense", "causal_lm", targets={"kind": "dense"}),
        make_teacher("odd", "masked_lm", targets=few, domains=["odd"]),
        make_teacher("classes", "sequence_classification"),
        make_teacher("score", "regression", domains=["even"]),
        make_teacher("words", "token_classification"),
        make_teacher("pairs", "sequence_classification", pairs="adjacent"),
    ]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, configure, teachers) -> Path:
    path = tmp_path_factory.mktemp("sound") / "cache"
    cache_teachers(configure(path, teachers))
    return path


@pytest.fixture
def copy(tmp_path, sound) -> Path:
    return shutil.copytree(sound, tmp_path / "cache")


def data_file(cache: Path, folder: str, unit: str) -> Path:
    record = json.loads((cache / folder / "commits" / f"{unit}.json").read_text())
    return cache / folder / record["path"]


def view_of(cache: Path, kind: str) -> str:
    return next(f"views/{p.name}" for p in (cache / "views").iterdir() if p.name.startswith(kind))


# --- verify ---------------------------------------------------------------------------------------


def test_a_sound_cache(sound):
    before = {p: p.read_bytes() for p in sound.rglob("*") if p.is_file()}
    report = verify_cache(str(sound))
    assert report.problems == []
    assert report.orphans == 0
    assert report.coverage == dict.fromkeys(NAMES, 1.0)
    data = list(sound.rglob("*.arrow"))
    assert report.shards == len(data) == 3 + 6 + 3 + 2 * 6 + 6 * 3
    assert report.bytes == sum(p.stat().st_size for p in data)
    assert report.as_dict()["sound"] is True
    assert json.loads(json.dumps(report.as_dict()))["coverage"]["lm"] == 1.0
    text = report.as_text("here")
    assert text.startswith("here: 42 shards")
    assert text.endswith("sound")
    assert {p: p.read_bytes() for p in sound.rglob("*") if p.is_file()} == before


def test_a_damaged_shard_is_in_the_report(copy):
    """What damage is found, and in which files: ../caching/test_repair.py."""
    file = data_file(copy, "targets/dense", "00002")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    report = verify_cache(str(copy))
    (found,) = report.problems
    assert file.name in found
    assert report.as_dict()["sound"] is False
    assert f"PROBLEM: {found}" in report.as_text("x")
    file.unlink()
    (found,) = problems(copy)
    assert f"{file.name} is missing although it was committed" in found
    file.write_bytes(content)
    assert problems(copy) == []


def test_every_damaged_shard_is_named_at_once(copy):
    files = [data_file(copy, "targets/lm", f"0000{i}-r000") for i in range(3)]
    files.append(data_file(copy, "corpus", "00002"))
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    found = problems(copy)
    assert len(found) == 4
    assert all(any(file.name in problem for problem in found) for file in files)


def rewrite(record: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a commit record and make its own checksum right again, as a forger would."""
    body = json.loads(record.read_text())
    change(body)
    body.pop("record")
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    body["record"] = hashlib.sha256(canonical).hexdigest()
    record.write_text(json.dumps(body))
    Commit.from_json(json.loads(record.read_text()), str(record))  # it reads as a sound record


def exchange(cache: Path, one: tuple[str, str], other: tuple[str, str]) -> None:
    """Exchange two units, data and commit records: every checksum stays right."""
    records = [cache / folder / "commits" / f"{unit}.json" for folder, unit in (one, other)]
    bodies = [json.loads(record.read_text()) for record in records]
    for record, (folder, unit), body, source in zip(
        records, (one, other), bodies[::-1], (other, one), strict=True
    ):
        name = f"data/{unit}-{'ab' if (folder, unit) == one else 'cd'}000000.arrow"
        shutil.copy(cache / source[0] / body["path"], cache / folder / name)
        record.write_text(json.dumps(body))
        rewrite(record, lambda b, name=name, unit=unit: b.update(path=name, unit=unit))


EXCHANGES = {
    "shards of masked targets": (("targets/lm", "00000-r000"), ("targets/lm", "00001-r000")),
    "replicas of masked targets": (("targets/lm", "00000-r000"), ("targets/lm", "00000-r001")),
    "shards of causal targets": (("targets/causal", "00000"), ("targets/causal", "00001")),
    "shards of logits": (("targets/classes", "00000"), ("targets/classes", "00001")),
    "shards of words": (("targets/words", "00000"), ("targets/words", "00001")),
    "teachers": (("targets/classes", "00001"), ("targets/pairs", "00001")),
    "tasks": (("targets/causal", "00001"), ("targets/dense", "00001")),
    "replicas of masks": (("views/masked-", "00000-r000"), ("views/masked-", "00000-r001")),
    "shards of masks": (("views/masked-", "00000-r000"), ("views/masked-", "00001-r000")),
    "shards of pairs": (("views/pairs-", "00000"), ("views/pairs-", "00001")),
    "shards of the corpus": (("corpus", "00000"), ("corpus", "00001")),
}


@pytest.mark.parametrize("case", EXCHANGES)
def test_exchanged_units_are_found_though_every_checksum_is_right(copy, case):
    one, other = (
        (view_of(copy, folder.removeprefix("views/")) if folder.endswith("-") else folder, unit)
        for folder, unit in EXCHANGES[case]
    )
    exchange(copy, one, other)
    found = " ".join(problems(copy))
    assert found
    assert one[0] in found or other[0] in found or "corpus" in found


def test_a_commit_record_under_another_name(copy):
    commits = copy / "targets" / "lm" / "commits"
    shutil.copy(commits / "00000-r000.json", commits / "00009-r000.json")
    assert "00009-r000" in " ".join(problems(copy))


def test_a_unit_of_no_corpus_shard(copy):
    """Sound by every checksum, and of nothing: a shard that was copied from a larger cache."""
    record = copy / "targets" / "classes" / "commits" / "00007.json"
    shutil.copy(record.parent / "00000.json", record)
    rewrite(record, lambda body: body.update(unit="00007"))
    (found,) = problems(copy)
    assert "00007" in found


def test_a_record_of_another_corpus_shard(copy):
    record = copy / "targets" / "classes" / "commits" / "00001.json"
    rewrite(record, lambda body: body["facts"].update(corpus_sha256="0" * 64))
    (found,) = problems(copy)
    assert "targets/classes: unit 00001: it was made from another corpus shard" in found


def test_the_sha256_of_the_whole_file_counts(copy):
    """It is what other tools check a copy with; the record's own checksum covers it."""
    record = copy / "targets" / "words" / "commits" / "00001.json"
    rewrite(record, lambda body: body.update(sha256="0" * 64))
    (found,) = problems(copy)
    assert "sha256 is not the committed one" in found
    assert data_file(copy, "targets/words", "00001").name in found


def test_a_damaged_record(copy):
    record = copy / "targets" / "words" / "commits" / "00001.json"
    record.write_text(record.read_text().replace('"rows"', '"rowz"'))
    assert "00001.json" in " ".join(problems(copy))


@pytest.mark.parametrize("name", ["lm", "causal", "odd"])
def test_positions_that_are_missing_are_a_problem(copy, configure, teachers, name, monkeypatch):
    """A shard whose every checksum is right, and in which a sequence has lost its targets."""
    from rekindle.pipeline.caching import make_unit
    from rekindle.pipeline.caching.compute_unit import UnitResult

    shutil.rmtree(copy / "targets" / name)
    run = make_unit.run_unit

    def forgetful(teacher: Any, unit: Any, **_: Any) -> UnitResult:
        found = run(teacher, unit)
        if unit.shard != 1:
            return found
        kept = found.rows != found.rows.max()
        return UnitResult(found.rows[kept], {n: c[kept] for n, c in found.columns.items()})

    monkeypatch.setattr(make_unit, "run_unit", forgetful)
    cache_teachers(configure(copy, teachers), only=[name])
    found = problems(copy)
    assert found
    assert all("other positions than it should" in p and "unit 00001" in p for p in found)


def test_orphans_are_counted_and_harmless(copy):
    for folder in ("corpus", "targets/lm", view_of(copy, "masked-")):
        (copy / folder / "data" / "00000-deadbeef.arrow").write_bytes(b"half a shard")
    report = verify_cache(str(copy))
    assert (report.problems, report.orphans) == ([], 3)
    assert "3 data files of attempts that were never committed" in report.as_text("x")


def test_an_incomplete_cache_is_sound_and_its_coverage_told(copy):
    for record in sorted((copy / "targets" / "lm" / "commits").iterdir())[:2]:
        record.unlink()  # shard 0, both replicas: 10 of 24 rows
    (copy / "targets" / "words" / "commits" / "00002.json").unlink()
    (copy / view_of(copy, "pairs-") / "commits" / "00002.json").unlink()
    report = verify_cache(str(copy))
    assert report.problems == []
    assert report.coverage["lm"] == pytest.approx(14 / 24)
    assert report.coverage["words"] == pytest.approx(10 / 12)
    assert "lm: run on 58.3% of the text" in report.as_text("x")


def test_what_is_no_cache(tmp_path):
    with pytest.raises(CacheError, match="not a Rekindle cache"):
        verify_cache(str(tmp_path))


def test_the_report_of_nothing():
    assert VerifyReport().as_text("x") == "x: 0 shards, 0 bytes checked\nsound"


# --- audit ----------------------------------------------------------------------------------------


def test_the_live_teachers_agree_with_a_sound_cache(sound, configure, teachers):
    found = audit_cache(str(sound), configure(sound, teachers), 12)
    assert list(found) == NAMES
    cache = Cache.open(sound)
    examples = [cache.example(index) for index in range(12)]
    for name in ("lm", "causal", "dense", "odd"):
        values = found[name]
        assert -1e-6 < values["kl"] < 1e-4  # float32 sums may round below zero
        assert values["top1"] == 1.0
        assert 0 < values["kept_mass"] <= 1 + 1e-6
        assert values["rows"] == sum(len(e.targets[name][0].positions) for e in examples)
    assert all(values["of_bound"] < 1 for values in found.values())
    assert found["dense"]["kept_mass"] == pytest.approx(1, abs=1e-5)
    kept = np.concatenate([np.exp(e.targets["lm"][0].log_probs).sum(axis=1) for e in examples])
    assert found["lm"]["kept_mass"] == pytest.approx(kept.mean(), abs=1e-3)
    for name in ("classes", "score", "words", "pairs"):
        assert found[name].keys() == {"max_error", "rows", "of_bound"}
        assert found[name]["max_error"] < 2e-4
    assert found["classes"]["rows"] == 12
    assert found["score"]["rows"] == sum(e.domain == "even" for e in examples)
    assert found["words"]["rows"] == sum(len(e.targets["words"][0].positions) for e in examples)
    assert found["pairs"]["rows"] == sum(bool(e.targets["pairs"]) for e in examples)
    json.dumps(found)


def test_as_many_sequences_as_asked_for_and_in_parts(sound, configure, teachers, monkeypatch):
    config = configure(sound, teachers[4:5])
    assert audit_cache(str(sound), config, 5)["classes"]["rows"] == 5
    assert audit_cache(str(sound), config, 500)["classes"]["rows"] == 12
    whole = audit_cache(str(sound), configure(sound, teachers[:2]), 7, seed=1)
    monkeypatch.setattr(audit, "ROWS_AT_ONCE", 2)
    parts = audit_cache(str(sound), configure(sound, teachers[:2]), 7, seed=1)
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], abs=1e-5)


@pytest.mark.parametrize("name", ["odd", "score"])
def test_sequences_of_other_domains_are_passed_over(sound, configure, teachers, name):
    """One sequence at a time, so that some runs hold nothing for the teacher at all."""
    config = configure(sound, [t for t in teachers if t["name"] == name])
    seen = set()
    for seed in range(40):
        rows = audit_cache(str(sound), config, 1, seed=seed)[name]["rows"]
        seen.add(rows > 0)
        if len(seen) == 2:
            break
    assert seen == {False, True}


def test_an_audit_finds_targets_of_another_model(copy, configure, teachers, make_model, wordpiece):
    """The weights are those on record, the targets are not: what only an audit can see."""
    of_one_layer = {"seed": 7, "num_hidden_layers": 1}  # as the teachers are
    other = make_model("bert", AUTO["masked_lm"], wordpiece, **of_one_layer)
    classes = make_model("bert", AUTO["sequence_classification"], wordpiece, **of_one_layer)
    chosen = [teachers[0], teachers[4]]
    for teacher, model in zip(chosen, (other, classes), strict=True):
        folder = copy / "targets" / teacher["name"]
        description = (folder / "teacher.json").read_bytes()
        shutil.rmtree(folder)
        (copy / "cache.json").write_text('{"format_version": 1}')
        cache_teachers(configure(copy, [teacher | {"model": str(model)}]))
        fingerprint = json.loads(description)["fingerprints"]["weights"]
        forge_weights(copy, teacher["name"], fingerprint)
    report = audit.audit_cache(str(copy), configure(copy, chosen), 12)
    found = report.values
    assert found["lm"]["kl"] > 1
    assert found["lm"]["top1"] < 0.5
    assert found["classes"]["max_error"] > 0.1
    assert [told.split(",")[0] for told in report.problems] == ["teacher 'lm'", "teacher 'classes'"]


def forge_weights(cache: Path, name: str, fingerprint: str) -> None:
    """Claim other weights in the description and in every shard of a teacher."""
    import pyarrow as pa

    from rekindle.data.storage.shards import ShardSet
    from rekindle.data.storage.store import open_store

    shards = ShardSet(open_store(cache), f"targets/{name}")
    for unit, commit in shards.committed().items():
        table = shards.open(commit).table()
        about = json.loads(table.schema.metadata[b"rekindle"])
        about["teacher"]["fingerprints"]["weights"] = fingerprint
        schema = table.schema.with_metadata({"rekindle": json.dumps(about, sort_keys=True)})
        (cache / "targets" / name / "commits" / f"{unit}.json").unlink()
        batches = [pa.record_batch(b.columns, schema=schema) for b in table.to_batches()]
        shards.write(unit, schema, batches, commit.facts)
    path = cache / "targets" / name / "teacher.json"
    path.write_text(json.dumps(about["teacher"]))
    (cache / "cache.json").write_text('{"format_version": 1}')


@pytest.mark.parametrize("what", ["weights", "model configuration", "tokenizer", "task", "pairs"])
def test_a_teacher_that_is_not_the_cached_one_is_refused(
    tmp_path, sound, configure, teachers, make_model, wordpiece, what
):
    lm, pairs = dict(teachers[0]), dict(teachers[7])
    model = tmp_path / "model"
    shutil.copytree(lm["model"], model)
    moved = lm | {"model": str(model)}
    if what == "weights":
        changed = transformers.BertForMaskedLM.from_pretrained(model)
        with torch.no_grad():
            changed.cls.predictions.bias[0] += 1e-3
        changed.save_pretrained(model)
    elif what == "model configuration":
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(values | {"hidden_act": "relu"}))
    elif what == "tokenizer":
        shutil.copytree(pairs["model"], tmp_path / "pairs")
        text = (tmp_path / "pairs" / "tokenizer.json").read_text()
        (tmp_path / "pairs" / "tokenizer.json").write_text(text.replace('"##s"', '"##$"'))
        moved = pairs | {"model": str(tmp_path / "pairs")}
    elif what == "task":
        moved = dict(pairs) | {"pairs": None}
    else:
        moved = dict(pairs) | {"pairs": "random"}
    with pytest.raises(
        RekindleError, match=rf"teacher '{moved['name']}'.*{what}.* differs"
    ) as told:
        audit_cache(str(sound), configure(sound, [moved]), 3)
    assert told.value.exit_code == (2 if what in ("task", "pairs") else 3)


def test_a_configuration_without_any_of_the_teachers(sound, configure, teachers):
    with pytest.raises(InputError, match="none of the teachers"):
        audit_cache(str(sound), configure(sound, [teachers[0] | {"name": "nobody"}]), 3)
    with pytest.raises(InputError, match="none of the teachers"):
        audit_cache(str(sound), configure(sound, []), 3)


def test_a_unit_that_is_not_there_is_passed_over(copy, configure, teachers):
    for record in (copy / "targets" / "lm" / "commits").glob("0000[01]-r000.json"):
        record.unlink()
    found = audit_cache(str(copy), configure(copy, teachers[:1]), 12)["lm"]
    example = [Cache.open(copy).example(index) for index in (10, 11)]
    assert found["rows"] == sum(len(e.targets["lm"][0].positions) for e in example)
    assert found["kl"] < 1e-4
