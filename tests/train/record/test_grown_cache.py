"""A run's targets and masks are those it was begun with, whatever its cache has grown to."""

import json
import shutil
from types import SimpleNamespace

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.data.targets.reading.extent import Extent, settle_extent
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.compare.runs import compare_runs
from rekindle.pipeline.config import RunConfig, load_config
from rekindle.pipeline.sweep.grid import SweepRun
from rekindle.pipeline.sweep.run import run_sweep
from rekindle.pipeline.train_student import train_from_config
from rekindle.train import loop
from rekindle.train.config import TrainConfig
from testlib.loop import train_config
from testlib.models import NARROW
from testlib.students import metrics, same_weights

STEPS = 6


def run_file(base, path, k=None, replicas=None, term=None):
    """The file; what is None is not written in it."""
    values = json.loads(json.dumps(base))
    values["cache"]["path"] = str(path)
    if k is not None:
        values["teachers"][0]["targets"]["k"] = k
    if replicas is not None:
        values["cache"]["replicas"] = replicas
    train = train_config([{"teachers": ["lm"]} | (term or {})], steps=STEPS)
    values["train"] = train.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return parse_settings(RunConfig, values)


@pytest.fixture(scope="module")
def base(small_corpus, make_teacher, masked_student):
    targets = {"kind": "topk", "temperatures": [1.0]}
    lm = make_teacher("lm", "masked_lm", 1, NARROW, targets=targets)
    return {
        "corpus": small_corpus | {"limit_sequences": None},
        "cache": {"sequences_per_shard": 40},
        "teachers": [lm],
        "student": {"model": str(masked_student)},
    }


@pytest.fixture(scope="module")
def small(base, tmp_path_factory):
    """A cache of four candidates and two replicas."""
    path = tmp_path_factory.mktemp("small") / "cache"
    cache_teachers(run_file(base, path, 4, 2))
    return path


@pytest.fixture(scope="module")
def grown(base, small, tmp_path_factory):
    """The same with more of all: candidates, replicas, temperatures."""
    path = tmp_path_factory.mktemp("grown") / "cache"
    shutil.copytree(small, path)
    config = run_file(base, path, 12, 4)
    cache_teachers(config)
    lm = config.teachers[0]
    targets = lm.targets.model_copy(update={"temperatures": (1.0, 3.0)})
    more = config.model_copy(update={"teachers": (lm.model_copy(update={"targets": targets}),)})
    cache_teachers(more)
    opened = Cache.open(path).teacher("lm")
    assert (opened.info.k, opened.replicas, opened.info.temperatures) == (12, 4, (1.0, 3.0))
    return path


@pytest.fixture(scope="module")
def whole(base, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train_from_config(run_file(base, small, 4, 2), out)
    assert max(r["step"] for r in metrics(out)) == STEPS
    return out


def interrupted(config, out, monkeypatch, step=4):
    """Begin the run and end it after its checkpoint."""
    save = loop._save

    def stop(training, done, state):
        save(training, done, state)
        if done == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            train_from_config(config, out)


def assert_same(out, whole):
    assert same_weights(out, whole)
    assert metrics(out) == metrics(whole)


@pytest.mark.parametrize("written", [{"k": 4, "replicas": 2}, {}])
def test_a_run_goes_on_as_it_began(base, small, grown, whole, tmp_path, monkeypatch, written):
    """Where the file says nothing, what the cache had at the beginning is kept."""
    out = tmp_path / "run"
    interrupted(run_file(base, small, **written), out, monkeypatch)
    train_from_config(run_file(base, grown, **written), out, resume=True)
    assert_same(out, whole)
    recorded = json.loads((out / "run.json").read_text())["cache"]
    assert recorded["replicas"] == 2
    assert recorded["targets"] == {"lm": {"part": "", "k": 4}}


def test_a_corpus_that_has_grown_is_refused_in_its_own_words(base, tmp_path, monkeypatch, caplog):
    """And a copy of the cache as it was goes on."""

    def limited(sequences, path):
        corpus = base["corpus"] | {"limit_sequences": sequences}
        config = run_file(base | {"corpus": corpus}, path)
        train = config.train.model_dump(mode="json") | {"steps": None, "epochs": 1}
        return config.model_copy(update={"train": parse_settings(TrainConfig, train)})

    cache, copy, out = tmp_path / "cache", tmp_path / "copy", tmp_path / "run"
    cache_teachers(limited(40, cache))
    shutil.copytree(cache, copy)
    interrupted(limited(40, cache), out, monkeypatch)
    cache_teachers(limited(60, cache))
    caplog.clear()
    with caplog.at_level("INFO", "rekindle"), pytest.raises(CheckpointError) as refused:
        train_from_config(limited(60, cache), out, resume=True)
    assert str(refused.value) == (
        f"the corpus of the cache {cache} has grown since {out} was begun, so its "
        "training sequences would change. Start a new run in another --out, or resume this one "
        "with a copy of the cache as it was then (--set cache.path=COPY)"
    )
    assert "1 epoch = " not in caplog.text
    assert train_from_config(limited(60, copy), out, resume=True).steps > 4


def test_the_same_file_again_trains_the_same_student(base, grown, whole, tmp_path):
    train_from_config(run_file(base, grown, 4, 2), tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_its_run_yaml_reads_what_the_run_read(base, small, grown, whole, tmp_path):
    """Of a file that says nothing of it, in the same cache and in one that has grown."""
    train_from_config(run_file(base, small), tmp_path / "run")
    for place in (small, grown):
        config = load_config(tmp_path / "run/run.yaml", [f"cache.path={place}"])
        out = tmp_path / f"again-{place.parent.name}"
        train_from_config(config, out)
        assert_same(out, whole)
    train_from_config(load_config(tmp_path / "run/run.yaml"), tmp_path / "run", resume=True)


def test_a_view_without_a_replica_has_advice_that_helps():
    with pytest.raises(InputError, match=r"no finished replica .* makes them"):
        settle_extent(Extent(replicas=4), [], SimpleNamespace(replicas=0), Extent())


def test_a_run_is_not_resumed_at_another_k_or_more_replicas(
    base, small, grown, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    interrupted(run_file(base, small, 4, 2), out, monkeypatch)
    for key, k, replicas in (("targets.lm.k: 4", 12, 2), ("replicas: 2", 4, 4)):
        with pytest.raises(CheckpointError, match=rf"cache\.{key} there"):
            train_from_config(run_file(base, grown, k, replicas), out, resume=True)


def test_a_sweep_goes_on_as_it_began(base, small, grown, tmp_path):
    """Also students that were not begun before the cache grew."""

    def runs(path, seeds):
        config = run_file(base, path)
        trains = [config.train.model_copy(update={"seed": seed}) for seed in seeds]
        return [
            SweepRun(f"seed={one.seed}", {}, config.model_copy(update={"train": one}))
            for one in trains
        ]

    out = tmp_path / "out"
    assert not run_sweep(runs(small, [0]), out)
    assert not run_sweep(runs(grown, [0, 1]), out, resume=True)
    read = [json.loads((out / f"seed={n}/run.json").read_text())["cache"] for n in (0, 1)]
    for key in ("replicas", "targets"):
        assert read[0][key] == read[1][key]


def test_compare_names_what_was_read(base, grown, whole, tmp_path):
    train_from_config(run_file(base, grown), tmp_path / "more")
    found = compare_runs([whole, tmp_path / "more"])
    settings = {key: [run.settings[key] for run in found.runs] for key in found.runs[0].settings}
    assert settings == {"cache.replicas": [2, 4], "cache.targets.lm.k": [4, 12]}


def test_held_out_values_are_those_of_the_trained_k(base, grown, tmp_path):
    for k in (4, 12):
        train_from_config(run_file(base, grown, 12, 2, term={"k": k}), tmp_path / f"{k}")
    values = [
        [r["kl/lm"] for r in metrics(tmp_path / f"{k}") if r["kind"] == "evaluate"] for k in (4, 12)
    ]
    assert all(abs(a - b) > 1e-2 for a, b in zip(*values, strict=True))


def test_candidates_of_a_larger_k_are_used_as_far_as_asked(base, grown, tmp_path):
    """A term's k and the file's are the same prefix, in training and on held-out text."""
    train_from_config(run_file(base, grown, 12, 2, term={"k": 7}), tmp_path / "term")
    train_from_config(run_file(base, grown, 7, 2), tmp_path / "file")
    assert_same(tmp_path / "file", tmp_path / "term")


def test_more_than_the_cache_has_is_refused_before_anything(base, small, grown, tmp_path):
    refusals = {
        r"'lm': targets\.k is 12, and the cache has 4 candidates": run_file(base, small, 12, 2),
        r"cache\.replicas is 4, and of these masks the cache has 2": run_file(base, small, 4, 4),
        r"distill\.0: k is 9, .* has targets\.k: 7": run_file(base, grown, 7, 2, term={"k": 9}),
    }
    for message, config in refusals.items():
        with pytest.raises(InputError, match=message):
            train_from_config(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
