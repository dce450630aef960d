"""A plan says what stage 1 will do before it is done, is right about it, and leaves no trace."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus import source_sample
from rekindle.data.counted import shown_bytes
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.plan import probe as plan_probe
from rekindle.pipeline.plan.figures import Padding
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.sample import survey_corpus
from rekindle.pipeline.plan.surveyed import _padding
from rekindle.pipeline.plan.text import format_plan
from rekindle.train.config import StudentConfig
from testlib.stage_one.planned import NAMES, WHOLE, of


def tree(path: Path) -> dict[str, Any]:
    """Every file and folder below: content and when it was changed."""
    found = sorted(path.rglob("*"))
    return {str(p): (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in found}


@pytest.fixture
def untouched(tmp_path) -> Path:
    """A folder in which nothing may change."""
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "beside.txt").write_text("other work")
    return folder


# --- before it is made, against what was made -----------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "probed"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_and_positions_come_out_as_planned(made, how, name):
    real = Cache.open(made["path"]).teachers[name]
    planned = of(made[how], name)
    assert planned.units_to_make == len(real.commits)
    assert planned.units_present == 0
    assert planned.bytes == pytest.approx(real.bytes, rel=0.15)
    assert planned.positions == pytest.approx(real.positions, rel=0.15)


KEPT = {
    "precise": {"k": 16, "codec": "precise"},
    "compact": {"k": 64, "codec": "compact"},
    "threshold": {"k": 16, "kind": "threshold"},
    "random": {"k": 16, "kind": "random"},
    "hidden": {"kind": "hidden"},
}


def test_other_targets_and_codecs_come_out_as_probed(tmp_path, configure, teachers):
    """Without a probe, as much as they can be at most."""
    others = [teachers[1] | {"name": name, "targets": kept} for name, kept in KEPT.items()]
    where = {"sequences_per_shard": 64}
    config = configure(tmp_path / "cache", others, corpus=WHOLE, cache=where)
    probed, plain = plan_run(config), plan_run(config, probe=False)
    cache_teachers(config)
    for name in KEPT:
        files = [p for p in (tmp_path / f"cache/targets/{name}").rglob("*") if p.suffix != ".json"]
        real = sum(path.stat().st_size for path in files if path.is_file())
        assert of(probed, name).bytes == pytest.approx(real, rel=0.15)
        assert of(plain, name).bytes > 0.95 * real
        assert of(plain, name).at_most == (name in ("compact", "random"))
        if not of(plain, name).at_most:
            assert of(plain, name).bytes == pytest.approx(real, rel=0.1)
        assert not of(probed, name).at_most
    assert "at most" not in format_plan(probed)
    told = format_plan(plain)
    assert f"≤ {shown_bytes(of(plain, 'random').bytes)}" in told
    assert f"at most {shown_bytes(plain.totals.bytes)} to write" in told.replace("\n", " ")


def test_more_of_a_teacher_that_is_there(tmp_path, configure, teachers):
    """A larger k and further temperatures are parts of their own."""
    where = {"sequences_per_shard": 64}
    small = {"targets": {"kind": "topk", "k": 16, "temperatures": [1.0]}}
    cache_teachers(configure(tmp_path, [teachers[0] | small], corpus=WHOLE, cache=where))
    there = len(Cache.open(tmp_path).teachers["lm"].commits)
    for k, temperatures, units in ((8, [1], 0), (16, [1, 3], there), (32, [1, 3], there)):
        more = teachers[0] | {"targets": {"kind": "topk", "k": k, "temperatures": temperatures}}
        config = configure(tmp_path, [more], corpus=WHOLE, cache=where)
        before = sum(p.stat().st_size for p in tmp_path.rglob("*.arrow"))
        found = plan_run(config, probe=False).teachers[0]
        assert found.units_to_make == units == cache_teachers(config).units_done
        written = sum(p.stat().st_size for p in tmp_path.rglob("*.arrow")) - before
        assert found.bytes == pytest.approx(written, rel=0.15)


def test_a_small_source_is_counted(made):
    corpus, planned = Cache.open(made["path"]).corpus, made["plain"].corpus
    assert (planned.sequences, planned.tokens) == (len(corpus), corpus.tokens)
    assert not planned.estimated
    assert planned.bytes == pytest.approx(sum(c.bytes for c in corpus.commits), rel=0.15)


def test_what_padding_costs_the_student_is_said(made, tmp_path):
    model = StudentConfig(model=made["config"].corpus.tokenizer)
    chosen = made["config"].model_copy(update={"student": model})
    found = _padding(chosen, survey_corpus(chosen, tmp_path))
    assert found.batching == "shuffled"
    assert found.shuffled >= found.similar_lengths >= 1
    uneven = replace(made["plain"].corpus, padding=Padding("similar_lengths", 3.0, 1.04))
    shown = " ".join(format_plan(replace(made["plain"], corpus=uneven)).split())
    assert (
        "train.batching similar_lengths: with padding, about 1.04 tokens are computed for each of "
        "the text (shuffled: 3.00)" in shown
    )


def test_the_views_come_out_as_planned(made):
    views = Cache.open(made["path"]).views
    planned = {view.name: view for view in made["plain"].views}
    assert planned.keys() == views.keys()
    for name, view in views.items():
        assert planned[name].units_to_make == len(view.commits)
        real = sum(commit.bytes for commit in view.commits.values())
        assert planned[name].bytes == pytest.approx(real, rel=0.25)


def test_time_is_known_with_a_probe_only(made):
    for work in made["probed"].teachers:
        assert work.seconds > 0
        assert work.reason is None
    for work in made["plain"].teachers:
        assert work.seconds is None
        assert "not probed" in work.reason
    total = sum(work.seconds for work in made["probed"].teachers)
    assert made["probed"].totals.seconds == pytest.approx(total)
    assert made["plain"].totals.seconds is None


def test_the_total_is_the_sum(made):
    found = made["plain"]
    parts = [found.corpus, *found.views, *found.teachers]
    assert found.totals.bytes == sum(part.bytes for part in parts)


def test_of_a_finished_cache_nothing_is_left(made, monkeypatch):
    after = made["after"]
    assert [w.units_to_make for w in after.teachers] == [0] * len(NAMES)
    assert after.totals.bytes == 0
    assert after.totals.seconds == 0
    assert [v.units_to_make for v in after.views] == [0, 0]
    assert after.corpus.basis == "the corpus is in the cache"
    monkeypatch.setattr(plan_probe, "Teacher", None)  # no model is loaded for that
    again = plan_run(made["config"])
    assert (again.corpus, again.views, again.teachers) == (
        after.corpus,
        after.views,
        after.teachers,
    )


# --- half-made ------------------------------------------------------------------------------------


def test_of_a_half_made_cache_the_missing_units_are_left(tmp_path, configure, teachers):
    config = configure(tmp_path / "cache", teachers[:4])
    cache_teachers(config, ["lm", "causal"])
    real = Cache.open(tmp_path / "cache").teachers
    for unit in ("00000-r000", "00001-r001"):
        (tmp_path / f"cache/targets/lm/commits/{unit}.json").unlink()
    found = plan_run(config, probe=False)
    left = {w.name: (w.units_to_make, w.units_present) for w in found.teachers}
    assert left == {"lm": (2, 4), "causal": (0, 3), "dense": (3, 0), "classes": (3, 0)}
    gone = real["lm"].commits
    expected = gone["00000-r000"].bytes + gone["00001-r001"].bytes
    assert of(found, "lm").bytes == pytest.approx(expected, rel=0.15)
    assert found.corpus.bytes == 0


def test_of_a_corpus_that_was_interrupted_the_rest_is_left(tmp_path, configure, teachers):
    config = configure(tmp_path / "cache", teachers[:1])
    cache_teachers(config)
    whole = Cache.open(tmp_path / "cache").corpus
    size = whole.commits[2].bytes
    for unit in ("00002-r000", "00002-r001"):
        (tmp_path / f"cache/targets/lm/commits/{unit}.json").unlink()
    (tmp_path / "cache/corpus/complete.json").unlink()
    (tmp_path / "cache/corpus/commits/00002.json").unlink()
    found = plan_run(config, probe=False)
    assert (found.corpus.sequences, found.corpus.tokens) == (12, whole.tokens)
    assert 0 < found.corpus.bytes < size
    assert (of(found, "lm").units_to_make, of(found, "lm").units_present) == (2, 4)


def test_a_longer_corpus_adds_to_what_is_there(tmp_path, configure, teachers):
    cache_teachers(configure(tmp_path / "cache", teachers[3:4]))
    longer = configure(tmp_path / "cache", teachers[3:4], corpus={"limit_sequences": 23})
    found = plan_run(longer, probe=False)
    assert found.corpus.sequences == 23
    assert (found.teachers[0].units_to_make, found.teachers[0].units_present) == (3, 3)
    assert cache_teachers(longer).units_done == 3


# --- nothing is written ---------------------------------------------------------------------------


def test_no_cache_comes_into_being(untouched, configure, teachers):
    before = tree(untouched)
    plan_run(configure(untouched / "new" / "cache", teachers[:2]))
    assert tree(untouched) == before


def test_a_cache_is_only_read(untouched, configure, teachers):
    cache_teachers(configure(untouched / "cache", teachers[:2]))
    (untouched / "cache/targets/lm/commits/00001-r000.json").unlink()
    before = tree(untouched)
    plan_run(configure(untouched / "cache", teachers[:4]))
    assert tree(untouched) == before


# --- what cannot be known -------------------------------------------------------------------------


def test_a_model_that_is_not_here(tmp_path, configure, teachers, made):
    """Of a vocabulary teacher all but the time is known without it."""
    absent = [t | {"model": "nobody/no-such-model"} for t in teachers]
    where = {"sequences_per_shard": 64, "mask": {"policy": "random", "probability": 0.5}}
    config = configure(tmp_path / "cache", absent, corpus=WHOLE, cache=where)
    for probe in (True, False):
        found = plan_run(config, probe=probe)
        for name in NAMES:
            work, known = of(found, name), of(made["plain"], name)
            assert work.seconds is None
            assert "nobody/no-such-model is not on this machine" in work.reason
            assert work.units_to_make == known.units_to_make
            if name in ("lm", "causal", "dense", "even"):
                assert work.bytes == pytest.approx(known.bytes, rel=0.05)
            else:
                assert work.bytes is None
        assert set(found.totals.unknown) == set(NAMES)
        assert "at least" in " ".join(format_plan(found).split())  # lines are wrapped


def test_a_teacher_whose_model_cannot_be_looked_at_is_warned_of_first(
    tmp_path, configure, teachers, monkeypatch
):
    """An id on the hub is one as long as no folder here has the owner's name."""
    monkeypatch.chdir(tmp_path)
    config = configure(tmp_path / "cache", [teachers[0] | {"model": "nobody/no-such-model"}])
    found = plan_run(config)
    assert found.warnings[0] == (
        f"teacher {teachers[0]['name']!r} is planned without its model, nobody/no-such-model: "
        "whether it can teach on this corpus is not known"
    )
    assert format_plan(found).startswith("warning: teacher ")
    (tmp_path / "nobody").mkdir()
    with pytest.raises(InputError, match=r"not a hub id.*as hf://nobody/no-such-model"):
        plan_run(config)


def test_labels_are_known_from_the_cache(tmp_path, configure, teachers):
    cache_teachers(configure(tmp_path, teachers[3:4]))
    (tmp_path / "targets/classes/commits/00001.json").unlink()
    config = configure(tmp_path, [teachers[3] | {"model": "nobody/no-such-model"}])
    work = plan_run(config).teachers[0]
    assert work.kept == "40 logits"
    assert work.bytes > 5 * 40 * 4


def test_a_folder_that_is_not_there_is_a_mistake_unless_nothing_is_probed(tmp_path, configure):
    model = str(tmp_path / "gone")
    config = configure(tmp_path, [{"name": "lm", "model": model, "task": "masked_lm"}])
    with pytest.raises(InputError, match="no such directory"):
        plan_run(config)
    assert "not on this machine" in plan_run(config, probe=False).teachers[0].reason


def test_a_bad_source_is_a_mistake(tmp_path, configure):
    with pytest.raises(InputError, match="no-such"):
        plan_run(configure(tmp_path, [], corpus={"source": str(tmp_path / "no-such.txt")}))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match=r"the corpus is empty.*empty\.txt"):
        plan_run(configure(tmp_path, [], corpus={"source": str(empty), "domain_field": None}))


def test_an_unknown_domain_is_a_mistake_once_all_domains_are_known(
    tmp_path, configure, teachers, monkeypatch
):
    config = configure(tmp_path, [teachers[0] | {"domains": ["neither"]}], corpus=WHOLE)
    with pytest.raises(InputError, match=r"no domain 'neither'.*even \(\d+ seq.*odd \(\d+ seq"):
        plan_run(config, probe=False)
    monkeypatch.setattr(source_sample, "SAMPLE_DOCUMENTS", 10)
    work = plan_run(config, probe=False).teachers[0]
    assert (work.positions, work.bytes, work.share) == (None, None, 0)
    assert "no sequence of its domains" in work.reason


def test_another_teacher_of_that_name_in_the_cache_is_a_mismatch(tmp_path, configure, teachers):
    cache_teachers(configure(tmp_path, teachers[:1]))
    other = teachers[0] | {"model": teachers[4]["model"], "task": "masked_lm"}
    other |= {"domains": ["even"], "model": teachers[0]["model"]}
    with pytest.raises(CacheMismatchError, match="domains"):
        plan_run(configure(tmp_path, [other]))


# --- what is shown --------------------------------------------------------------------------------


def test_too_little_room_is_told(tmp_path, configure, teachers, monkeypatch):
    path = tmp_path / "not" / "yet"
    config = configure(path, teachers[:1])
    found = plan_run(config, probe=False)
    assert found.totals.disk == str(tmp_path)
    assert found.warnings == ()

    class Usage:
        free = found.totals.bytes - 1

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage)
    short = plan_run(config, probe=False)
    assert len(short.warnings) == 1
    assert "not enough room" in format_plan(short)
