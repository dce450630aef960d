"""A plan says what stage 1 will do before it is done, is right about it, and leaves no trace."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.cache import Cache
from rekindle.data.corpus.growth import CorpusConfig
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan import probe as plan_probe
from rekindle.pipeline.plan import run as plan
from rekindle.pipeline.plan import sample as plan_sample
from rekindle.pipeline.plan.break_even import active_steps
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.sample import sample_source
from rekindle.pipeline.plan.text import counted, shown_bytes, shown_seconds

Teachers = list[dict[str, Any]]
WHOLE = {"limit_sequences": None}


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


@pytest.fixture(scope="module")
def teachers(make_model, wordpiece) -> Teachers:
    """A teacher of each kind of target."""

    def teacher(name: str, family: str, auto: str, task: str, **more: Any) -> dict[str, Any]:
        labels = {} if "LM" in auto else {"num_labels": 40}
        model = make_model(family, f"AutoModelFor{auto}", wordpiece, **labels)
        return {"name": name, "model": str(model), "task": task} | more

    classes = ("SequenceClassification", "sequence_classification")
    return [
        teacher("lm", "bert", "MaskedLM", "masked_lm", targets={"kind": "topk", "k": 64}),
        teacher("causal", "llama", "CausalLM", "causal_lm", targets={"kind": "topk", "k": 32}),
        teacher("dense", "llama", "CausalLM", "causal_lm", targets={"kind": "dense"}),
        teacher("classes", "bert", *classes),
        teacher("mc", "bert", *classes, monte_carlo={"passes": 2}),
        teacher("pairs", "bert", *classes, pairs="adjacent"),
        teacher("words", "bert", "TokenClassification", "token_classification"),
        teacher("even", "bert", "MaskedLM", "masked_lm", domains=["even"]),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory, configure, teachers) -> dict[str, Any]:
    """The same configuration planned, planned with a probe, made, and planned again."""
    path = tmp_path_factory.mktemp("planned") / "cache"
    # A probability of masks as the sample has it, and shards that are not all frame.
    where = {"sequences_per_shard": 64, "mask": {"policy": "random", "probability": 0.5}}
    config = configure(path, teachers, corpus=WHOLE, cache=where)
    before = {"plain": plan_run(config, probe=False), "probed": plan_run(config)}
    assert not path.exists()
    cache_teachers(config)
    return {"config": config, "path": path, **before, "after": plan_run(config)}


NAMES = ("lm", "causal", "dense", "classes", "mc", "pairs", "words", "even")


def of(found: plan.RunPlan, name: str) -> Any:
    return next(work for work in found.teachers if work.name == name)


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
        assert "at least" in found.as_text()


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
    monkeypatch.setattr(plan_sample, "SAMPLE_DOCUMENTS", 10)
    work = plan_run(config, probe=False).teachers[0]
    assert (work.positions, work.bytes, work.share) == (None, None, 0)
    assert "no sequence of its domains" in work.reason


def test_another_corpus_or_teacher_in_the_cache_is_a_mismatch(tmp_path, configure, teachers):
    cache_teachers(configure(tmp_path, teachers[:1]))
    with pytest.raises(CacheMismatchError, match="sequence_length"):
        plan_run(configure(tmp_path, teachers[:1], corpus={"sequence_length": 32}))
    other = teachers[0] | {"model": teachers[4]["model"], "task": "masked_lm"}
    other |= {"domains": ["even"], "model": teachers[0]["model"]}
    with pytest.raises(CacheMismatchError, match="domains"):
        plan_run(configure(tmp_path, [other]))


# --- the estimate ---------------------------------------------------------------------------------

SENTENCE = "the old river runs under the new city and the light falls over a quick engine"
WORDS = [*SENTENCE.split()]


def write(path: Path, texts: list[str]) -> None:
    """The texts in the format that the name says."""
    lines = "".join(json.dumps({"text": t, "other": 7}) + "\n" for t in texts)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif path.suffix == ".arrow":
        table = pa.table({"text": texts})
        opened = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
        with opened(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=100)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".jsonl.zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines.encode())
    else:
        path.write_text(lines if path.suffix == ".jsonl" else "\n\n".join(texts))


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.txt",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.parquet",
        "a.file.arrow",
        "a.stream.arrow",
    ],
)
def test_the_share_of_one_file(tmp_path, name, monkeypatch):
    monkeypatch.setattr(plan_sample, "SAMPLE_DOCUMENTS", 300)
    write(tmp_path / name, [" ".join(WORDS[: 5 + n % 9]) + f" {n}" for n in range(1000)])
    config = CorpusConfig(source=(str(tmp_path / name),), tokenizer="unused")
    sample = sample_source(config)
    assert len(sample.documents) == 300
    assert sample.share == pytest.approx(0.3, rel=0.1)


def test_the_share_of_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_sample, "SAMPLE_DOCUMENTS", 250)
    for number in range(10):
        write(tmp_path / f"{number}.jsonl", [" ".join(WORDS)] * 100)
    config = CorpusConfig(source=(str(tmp_path / "*.jsonl"),), tokenizer="unused")
    sample = sample_source(config)
    assert len(sample.documents) == 250
    assert sample.share == pytest.approx(0.25, rel=0.02)
    monkeypatch.setattr(plan_sample, "SAMPLE_DOCUMENTS", 1000)
    assert sample_source(config).share == 1  # that was everything, to the last document


def test_the_sample_ends_at_so_much_text(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_sample, "SAMPLE_BYTES", 1000)
    write(tmp_path / "a.jsonl", ["é" * 50] * 100)
    config = CorpusConfig(source=(str(tmp_path / "a.jsonl"),), tokenizer="unused")
    assert len(sample_source(config).documents) == 10


def test_a_corpus_that_is_not_built_is_estimated(tmp_path, configure, monkeypatch):
    """Within a tenth of what it turns out to be."""
    write(tmp_path / "a.jsonl", [" ".join(WORDS * (1 + n % 5)) for n in range(600)])
    corpus = {"source": str(tmp_path / "a.jsonl"), "domain_field": None, "limit_sequences": None}
    config = configure(tmp_path / "cache", [], corpus=corpus, cache={"sequences_per_shard": 64})
    monkeypatch.setattr(plan_sample, "SAMPLE_DOCUMENTS", 100)
    found = plan_run(config).corpus
    cache_teachers(config)
    real = Cache.open(tmp_path / "cache").corpus
    assert found.estimated
    assert "the first 100 documents, about 16" in found.basis
    assert found.sequences == pytest.approx(len(real), rel=0.1)
    assert found.tokens == pytest.approx(real.tokens, rel=0.1)
    assert found.bytes == pytest.approx(sum(c.bytes for c in real.commits), rel=0.2)


@pytest.mark.parametrize("packing", ["document", "contiguous"])
@pytest.mark.parametrize("limit", [1, 7, 150, 10_000])
def test_a_limit_caps_the_corpus(tmp_path, configure, monkeypatch, packing, limit):
    write(tmp_path / "a.jsonl", [" ".join(WORDS * (1 + n % 5)) for n in range(90)])
    corpus = {"source": str(tmp_path / "a.jsonl"), "domain_field": None, "packing": packing}
    config = configure(tmp_path / "cache", [], corpus=corpus | {"limit_sequences": limit})
    monkeypatch.setattr(plan_sample, "SAMPLE_DOCUMENTS", 30)
    found = plan_run(config).corpus
    cache_teachers(config)
    real = Cache.open(tmp_path / "cache").corpus
    assert found.estimated == (limit >= 150)
    exact = 0 if limit < 10_000 else 0.1
    assert found.sequences == pytest.approx(len(real), rel=exact)
    assert found.tokens == pytest.approx(real.tokens, rel=0.1 if found.estimated else 0)


def test_a_source_of_unknown_size_needs_a_limit(tmp_path, configure, monkeypatch):
    """What a datasets id holds is not known before it is read."""
    path = tmp_path / "a.jsonl"
    write(path, [" ".join(WORDS)] * 50)
    read = plan_sample.read_documents
    monkeypatch.setattr(plan_sample, "SAMPLE_DOCUMENTS", 20)
    monkeypatch.setattr(plan_sample, "source_files", lambda source: [])
    monkeypatch.setattr(plan_sample, "read_documents", lambda source, *rest: read([path], *rest))
    corpus = {"source": "owner/name", "domain_field": None}
    with pytest.raises(InputError, match=r"owner/name.*corpus\.limit_sequences"):
        plan_run(configure(tmp_path / "cache", [], corpus=corpus | {"limit_sequences": None}))
    found = plan_run(configure(tmp_path / "cache", [], corpus=corpus | {"limit_sequences": 400}))
    assert found.corpus.sequences == 400
    assert found.corpus.basis == "estimated from the first 20 documents"


def test_domains_of_the_estimate(tmp_path, configure, teachers, monkeypatch):
    """A teacher for half the sequences has about half the work."""
    monkeypatch.setattr(plan_sample, "SAMPLE_DOCUMENTS", 20)
    both = [teachers[3], teachers[3] | {"name": "half", "domains": ["even"]}]
    found = plan_run(configure(tmp_path / "cache", both, corpus=WHOLE), probe=False)
    whole, half = found.teachers
    assert found.corpus.estimated
    assert whole.share == 1
    assert half.positions == pytest.approx(whole.positions * half.share, abs=1)
    assert 0.2 < half.share < 0.8


# --- the probe ------------------------------------------------------------------------------------


def test_a_slow_teacher_is_probed_on_one_sequence(tmp_path, configure, teachers, monkeypatch):
    seen: list[int] = []
    run = plan_probe._run

    def slow(teacher: Any, steps: Any, shard: int) -> Any:
        seen.append(shard)
        unit, result, _ = run(teacher, steps, shard)
        return unit, result, 1.0  # a second per token

    monkeypatch.setattr(plan_probe, "_run", slow)
    found = plan_run(configure(tmp_path / "cache", teachers[3:4]))
    assert seen == [0]
    assert found.teachers[0].seconds == pytest.approx(found.corpus.tokens)


def test_a_probe_ends_when_it_is_good_enough(tmp_path, configure, teachers, monkeypatch):
    monkeypatch.setattr(plan_probe, "ENOUGH", 0.0)
    seen: list[int] = []
    run = plan_probe._run
    monkeypatch.setattr(plan_probe, "_run", lambda *a: seen.append(a[2]) or run(*a))
    plan_run(configure(tmp_path / "cache", teachers[3:4], corpus=WHOLE))
    assert seen == [0, 0, 1, 2]  # the warm-up, then 1, 4 and 16 sequences


def test_replicas_count_for_the_time(tmp_path, configure, teachers, monkeypatch):
    monkeypatch.setattr(plan_probe, "_run", _at_a_second_per_token(plan_probe._run))
    found = plan_run(configure(tmp_path, teachers[:2], cache={"replicas": 3}))
    assert of(found, "lm").seconds == pytest.approx(3 * found.corpus.tokens)
    assert of(found, "causal").seconds == pytest.approx(found.corpus.tokens)


def _at_a_second_per_token(run: Any) -> Any:
    return lambda *arguments: (*run(*arguments)[:2], 1.0)


# --- break-even -----------------------------------------------------------------------------------


def student(config: RunConfig, **train: Any) -> RunConfig:
    values = config.model_dump(mode="json", by_alias=True)
    values |= {"student": {"model": "unused"}, "train": train}
    return parse_settings(RunConfig, values)


def test_break_even_counts_forward_passes(tmp_path, configure, teachers):
    """12 sequences in 2 replicas against 3 steps of 4: two runs; of sequences once, one."""
    terms = [{"teachers": ["lm"]}, {"teachers": ["classes"]}]
    config = student(
        configure(tmp_path, [*teachers[:2], teachers[3]]),
        steps=3,
        batch_sequences=4,
        objective={"distill": terms},
    )
    found = plan_run(config, probe=False).break_even
    assert found.teachers == {"lm": 2, "causal": None, "classes": 1}
    assert found.runs == math.ceil((24 + 12) / (12 + 12))
    assert "after 2 student runs" in found.sentence
    assert "36 teacher forward passes" in found.sentence
    assert "24." in found.sentence


def test_break_even_weighs_teachers_by_their_time(tmp_path, configure, teachers, monkeypatch):
    def run(teacher: Any, steps: Any, shard: int) -> Any:
        return (*original(teacher, steps, shard)[:2], 100.0 if teacher.info.name == "lm" else 1.0)

    original = plan_probe._run
    monkeypatch.setattr(plan_probe, "_run", run)
    terms = [{"teachers": ["lm"]}, {"teachers": ["classes"]}]
    made_of = {"steps": 1, "batch_sequences": 12, "objective": {"distill": terms}}
    wide = {"replicas": 9}
    config = student(configure(tmp_path, [teachers[0], teachers[3]], cache=wide), **made_of)
    assert plan_run(config, probe=False).break_even.runs == 5  # (9 + 1) / 2
    assert plan_run(config).break_even.runs == 9  # 901 / 101


@given(
    steps=st.integers(1, 50),
    fraction=st.floats(0.01, 1),
    start=st.sampled_from([0.0, 1.0]),
    end=st.sampled_from([0.0, 0.5]),
    shape=st.sampled_from(["constant", "linear", "step", "cosine"]),
)
def test_steps_without_weight_cost_no_live_teacher(steps, fraction, start, end, shape):
    from rekindle.train.config import TrainConfig
    from rekindle.train.objective.objective import Objective

    weight = {"schedule": shape, "from": start, "to": end, "over": fraction}
    values = {"steps": steps, "objective": {"distill": [{"teachers": ["a"], "weight": weight}]}}
    train = parse_settings(TrainConfig, values)
    objective = Objective.__new__(Objective)
    objective.config, objective.steps, objective.methods = train.objective, steps, ()
    expected = sum("a" in objective.plan(step).teachers for step in range(steps))
    assert active_steps(train, "a") == expected
    assert active_steps(train, "b") == 0


def test_break_even_needs_a_student_that_uses_teachers(tmp_path, configure, teachers):
    config = configure(tmp_path, teachers[:1])
    assert plan_run(config, probe=False).break_even.runs is None
    found = plan_run(student(config), probe=False).break_even
    assert (found.runs, found.teachers) == (None, {"lm": None})
    assert "uses none" in found.sentence
    for named in ({}, {"teacher": "lm"}):
        methods = [{"method": "replaced_tokens", "weight": {"over": 0.5}} | named]
        using = student(config, steps=4, batch_sequences=12, objective={"methods": methods})
        assert plan_run(using, probe=False).break_even.teachers["lm"] is not None
    assert active_steps(using.train, "lm", using.train.objective.methods) == 2
    weightless = {"distill": [{"teachers": ["lm"], "weight": 0.0}]}
    found = plan_run(student(config, objective=weightless), probe=False).break_even
    assert found.runs is None


# --- what is shown --------------------------------------------------------------------------------


def test_too_little_room_is_told(tmp_path, configure, teachers, monkeypatch):
    path = tmp_path / "not" / "yet"
    config = configure(path, teachers[:1])
    found = plan_run(config, probe=False)
    assert found.totals.disk == str(tmp_path)
    assert found.warnings == ()

    class Usage:
        free = found.totals.bytes - 1

    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: Usage)
    short = plan_run(config, probe=False)
    assert len(short.warnings) == 1
    assert "not enough room" in short.as_text()


@pytest.mark.parametrize("when", ["plain", "probed", "after"])
def test_text_and_json(made, when):
    found = made[when]
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [t["name"] for t in values["teachers"]] == list(NAMES)
    assert values["corpus"]["sequences"] == found.corpus.sequences
    text = found.as_text()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert all(name in text for name in NAMES)


@given(st.integers(0, 10**16))
def test_bytes_are_shown_to_three_digits(size):
    value, unit = shown_bytes(size).split()
    power = {"byte": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(value.replace(",", "")) * power == pytest.approx(size, rel=0.051)
    assert unit == "TB" or float(value.replace(",", "")) < 1000


@given(st.floats(0, 1e8))
def test_seconds_are_shown_in_the_unit_that_fits(seconds):
    shown = shown_seconds(seconds)
    if shown == "under a second":
        assert seconds < 1
        return
    value, unit = shown.split()
    size = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}[unit.removesuffix("s")]
    assert float(value.replace(",", "")) * size == pytest.approx(seconds, abs=0.51 * size, rel=0.06)
    assert (float(value.replace(",", "")) == 1) == (not unit.endswith("s"))


def test_one_is_singular():
    assert (counted(1, "unit"), counted(0, "unit"), counted(1200, "unit")) == (
        "1 unit",
        "0 units",
        "1,200 units",
    )
    assert shown_bytes(1) == "1 byte"
    assert shown_bytes(1_500_000_000) == "1.5 GB"
    assert shown_seconds(1) == "1 second"
    assert shown_seconds(5400) == "1.5 hours"
    assert shown_seconds(150) == "2.5 minutes"
