"""The page of a comparison: scores below runs, live teachers estimated, caches that are gone."""

import json
from pathlib import Path

import pytest

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.compare.page import comparison_html, comparison_page
from rekindle.pipeline.compare.runs import compare_runs
from rekindle.pipeline.plan.break_even import taught_sequences
from rekindle.pipeline.report.page import Facts, Note
from rekindle.pipeline.report.table import Table
from rekindle.train.config import StudentConfig, TrainConfig


def write_run(run: Path, cache: dict, distill: list, **train) -> Path:
    """A finished run of 4 steps with an evaluation after every second one."""
    run.mkdir(parents=True)
    values = {"steps": 4, "batch_sequences": 3, "objective": {"distill": distill}} | train
    settings = parse_settings(TrainConfig, values).model_dump(mode="json", by_alias=True)
    student = parse_settings(StudentConfig, {"model": "m"}).model_dump(mode="json")
    about = {"student": student, "train": settings, "cache": cache, "evaluation": {"measure": 3}}
    (run / "run.json").write_text(json.dumps(about))
    lines = []
    for step in range(1, 5):
        loss = {"loss": 7.0 / step, "ce": 6.0 / step}
        seen = {"tokens": 9, "tokens_per_second": 9.0, "seconds": float(step), "data_wait": 0.0}
        lines.append({"kind": "train", "step": step} | loss | seen)
        if step % 2 == 0:
            lines.append({"kind": "evaluate", "step": step, "loss": 5.0 / step})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"steps": 4, "seconds": 4.0, "evaluation": {"loss": 1.25}, "coverage": {}}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def recorded(cache, *teachers: str, **more) -> dict:
    """What ``run.json`` says of a cache."""
    return {
        "path": cache.store.location,
        "corpus": cache.corpus.fingerprint,
        "masked_view": None,
        "teachers": {name: cache.teacher(name).fingerprint for name in teachers},
        "teacher_seconds": {name: cache.teacher(name).seconds for name in teachers},
    } | more


@pytest.fixture(scope="module")
def cache(tmp_path_factory, configure, make_model, wordpiece):
    """A cache with a masked LM (two replicas) and a classifier."""
    from rekindle.data.cache import Cache
    from rekindle.pipeline.caching.cache_teachers import cache_teachers

    path = tmp_path_factory.mktemp("page") / "cache"
    lm, topics = (
        str(make_model("bert", f"AutoModelFor{auto}", wordpiece))
        for auto in ("MaskedLM", "SequenceClassification")
    )
    kept = {"kind": "topk", "k": 4}
    teachers = [
        {"name": "lm", "model": lm, "task": "masked_lm", "targets": kept},
        {"name": "topics", "model": topics, "task": "sequence_classification"},
    ]
    cache_teachers(configure(path, teachers))
    return Cache.open(path)


def parts(page, kind):
    return [block for section in page.sections for block in section.blocks if type(block) is kind]


def cells(page, title):
    """The column of that title, of the first table that has one."""
    return next(c.cells for t in parts(page, Table) for c in t.columns if c.title == title)


def notes(page):
    return " ".join(note.text for note in parts(page, Note))


def test_live_teachers_are_estimated_from_recorded_seconds(cache, tmp_path):
    about = recorded(cache, "lm", "topics")
    half = {"schedule": "linear", "from": 1.0, "to": 0.0, "over": 0.5}
    distill = [{"teachers": ["lm"], "weight": half}, {"teachers": ["topics"]}]
    run = write_run(tmp_path / "kd", about, distill)
    plain = write_run(tmp_path / "plain", recorded(cache), [])
    page = comparison_page(compare_runs([run, plain]))
    lm, topics = cache.teacher("lm"), cache.teacher("topics")
    # Two of four steps of three sequences read the LM, which saw 2 replicas of 12; all read topics.
    expected = 2 * 3 * lm.seconds / 24 + 4 * 3 * topics.seconds / 12
    assert cells(page, "its teachers live") == [f"{expected:,.1f}", "0.0"]
    assert cells(page, "learns from") == ["lm, topics", "no teacher"]
    facts = dict(pair for block in parts(page, Facts) for pair in block.facts)
    assert facts["a student run itself"] == "4.0 s"
    assert facts["text"] == f"12 sequences, {cache.corpus.tokens:,} tokens"
    assert "cost is an estimate" in notes(page)


def test_sequences_that_a_teacher_teaches():
    values = {"steps": 4, "batch_sequences": 3}
    named = {"distill": [{"teachers": ["a"]}], "methods": [{"method": "replaced_tokens"}]}
    train = parse_settings(TrainConfig, values | {"objective": named})
    assert taught_sequences(train, "a") == 12
    assert taught_sequences(train, "of the method") == 12
    curriculum = {"curriculum": {"teacher": "c"}, "objective": named}
    assert taught_sequences(parse_settings(TrainConfig, values | curriculum), "c") == 0


def test_a_cache_that_is_gone_leaves_the_rest(cache, tmp_path):
    gone = recorded(cache, "lm", path=str(tmp_path / "gone"))
    run = write_run(tmp_path / "run", gone, [{"teachers": ["lm"]}])
    page = comparison_page(compare_runs([run]))
    assert "gone cannot be read any more" in notes(page)
    assert cells(page, "its teachers live") == ["unknown"]
    assert "Unknown: the time of run" in notes(page)
    assert "gone cannot be read" in comparison_html(compare_runs([run]))


def test_a_cache_with_another_teacher_is_told_and_not_counted(cache, tmp_path):
    other = recorded(cache, "lm") | {"teachers": {"lm": "another"}}
    run = write_run(tmp_path / "run", other, [{"teachers": ["lm"]}])
    page = comparison_page(compare_runs([run]))
    assert "Changed since the runs read it: teacher lm" in notes(page)
    assert cells(page, "its teachers live") == ["unknown"]


def test_settings_of_another_version_make_the_live_cost_unknown(cache, tmp_path):
    run = write_run(tmp_path / "run", recorded(cache, "lm"), [{"teachers": ["lm"]}])
    about = json.loads((run / "run.json").read_text())
    about["train"]["a_key_of_the_future"] = 1
    (run / "run.json").write_text(json.dumps(about))
    assert cells(comparison_page(compare_runs([run])), "its teachers live") == ["unknown"]


def scored(folder: Path, dev: list, test: list | None, metric: str = "accuracy") -> None:
    folder.mkdir(parents=True)
    seeds = [
        {"seed": n, "scores": {metric: value}, "test_scores": test and {metric: test[n]}}
        for n, value in enumerate(dev)
    ]
    metrics = {"metric": metric, "mean": 0.5, "per_seed": seeds}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_scores_are_those_on_test_where_there_are_such(cache, tmp_path):
    runs = [write_run(tmp_path / name, recorded(cache), [], seed=n) for n, name in enumerate("ab")]
    for run in runs:
        scored(run / "fine-tuned" / "cola", [0.5, 0.6], [0.4, 0.3], "matthews")
    scored(runs[0] / "fine-tuned" / "sst2", [0.9, 0.8], None)
    (runs[1] / "metrics.json").write_text(json.dumps({"metric": 3}))  # of something else
    comparison = compare_runs(runs)
    cola, sst2 = (one.scores for one in comparison.standings)
    assert (cola.title, cola.scores) == (
        "cola matthews (test)",
        {"a": [0.4, 0.3], "b": [0.4, 0.3]},
    )
    assert (sst2.title, sst2.scores) == ("sst2 accuracy (dev)", {"a": [0.9, 0.8]})
    page = comparison_html(comparison)
    assert "35.00 ± 7.07" in page
    assert "n=2" in page


def test_a_cycle_is_its_students(cache, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "cycle.json").write_text('{"written_by": "rekindle cycle"}')
    with pytest.raises(InputError, match="empty"):
        compare_runs([tmp_path / "empty"])
    for name in ("mlm", "mixture"):
        write_run(tmp_path / "students" / name, recorded(cache), [])
    (tmp_path / "students" / "mlm.yaml").write_text("")
    (tmp_path / "cycle.json").write_text('{"written_by": "rekindle cycle"}')
    assert [run.name for run in compare_runs([tmp_path]).runs] == ["mixture", "mlm"]


def test_numbers_that_are_none_and_runs_that_have_not_begun(cache, tmp_path):
    """Half a sweep, and a run that diverged: there is a page, and it has no such words."""
    runs = []
    for number in range(2):
        run = write_run(tmp_path / f"seed={number}", recorded(cache, "lm"), [], seed=number)
        runs.append({"name": run.name, "values": {}} | json.loads((run / "run.json").read_text()))
    text = (tmp_path / "seed=0" / "metrics.jsonl").read_text()
    (tmp_path / "seed=0" / "metrics.jsonl").write_text(text.replace("1.25", "NaN"))
    for file in (tmp_path / "seed=1").iterdir():
        file.unlink()
    (tmp_path / "sweep.json").write_text(
        json.dumps({"corpus": cache.corpus.fingerprint, "runs": runs})
    )
    page = comparison_page(compare_runs([tmp_path]))
    assert "2 runs, of which 1 finished" in page.lead
    assert "Gaps in lines" in notes(page)
    assert cells(page, "its teachers live")[1] == "0.0"
