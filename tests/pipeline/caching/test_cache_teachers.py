"""Stage 1 as a whole: the same bytes every time, resumed after any interruption, by domain."""

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.storage.commits import Commit, seconds_of
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching import make_unit
from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from rekindle.pipeline.processes import units
from rekindle.pipeline.processes.units import OnThisMachine
from rekindle.pipeline.processes.worker import Place, Returned, Worker
from rekindle.pipeline.progress import Progress
from testlib.caches import committed

Teachers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def stable(make_teacher) -> Teachers:
    """A teacher of each kind of shard: top-k, of sequences with dropout, of words, of pairs."""
    return [
        make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 8}),
        make_teacher("mc", "sequence_classification", monte_carlo={"passes": 2}),
        make_teacher("words", "token_classification"),
        make_teacher("pairs", "sequence_classification", pairs="adjacent"),
    ]


UNITS = {"lm": 6, "mc": 3, "words": 3, "pairs": 3}


def files(path: Path) -> dict[Path, tuple[int, int]]:
    """Every file but the manifest and the card: its inode and when it was written."""
    told = ("cache.json", "README.md")
    found = {p: p.stat() for p in path.rglob("*") if p.is_file() and p.name not in told}
    return {p: (s.st_ino, s.st_mtime_ns) for p, s in found.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, configure, stable) -> Path:
    """A cache made in one go."""
    path = tmp_path_factory.mktemp("whole")
    assert cache_teachers(configure(path, stable)) == StageOne(12, 15, 0)
    return path


def test_a_shard_for_every_unit(whole):
    store = open_store(whole)
    for name, count in UNITS.items():
        assert len(ShardSet(store, f"targets/{name}").committed()) == count
    assert len(committed(whole)) == 3 + 6 + 3 + 15  # corpus, masks, pairs, targets


def test_every_unit_says_how_long_it_took(
    whole,
):
    """Caches of before do not: then it is unknown, also if one unit alone says nothing."""
    for reader in Cache.open(whole).teachers.values():
        each = [seconds_of(commit) for commit in reader.commits.values()]
        assert all(0 < seconds < 600 for seconds in each)
        assert reader.seconds == pytest.approx(sum(each))
    cache = Cache.open(whole)
    reader = next(iter(cache.teachers.values()))
    commit = next(iter(reader.main.commits.values()))
    reader.main.commits.add(replace(commit, facts={"tokens": 1, "positions": 1}))
    assert reader.seconds is None


@pytest.mark.parametrize("bad", [None, "1", True, -1, math.nan, math.inf])
def test_seconds_that_are_none_are_unknown(bad):
    commit = Commit("00000", "data/x.arrow", 1, 1, "", (), {"seconds": bad})
    assert seconds_of(commit) is None
    assert seconds_of(replace(commit, facts={"seconds": 2})) == 2.0


def test_the_same_configuration_and_seed_give_the_same_bytes(tmp_path, configure, stable, whole):
    cache_teachers(configure(tmp_path, stable))
    assert committed(tmp_path) == committed(whole)


def test_another_seed_gives_other_masks_over_the_same_corpus(tmp_path, configure, stable, whole):
    cache_teachers(configure(tmp_path, stable[:1], cache={"seed": 1}))
    other, ours = committed(tmp_path), committed(whole)
    assert {n for n in other if n in ours and other[n] == ours[n]} == {
        f"corpus/{shard:05d}" for shard in range(3)
    }


def test_run_again_it_does_nothing(tmp_path, configure, stable):
    config = configure(tmp_path, stable[1:3])
    cache_teachers(config)
    before = files(tmp_path)
    manifest = (tmp_path / "cache.json").read_bytes()
    assert cache_teachers(config) == StageOne(12, 0, 6)
    assert files(tmp_path) == before
    assert (tmp_path / "cache.json").read_bytes() == manifest


def test_a_finished_cache_needs_no_model_to_be_loaded(tmp_path, configure, stable, monkeypatch):
    config = configure(tmp_path, stable[:1])
    cache_teachers(config)
    monkeypatch.setattr(make_unit, "Teacher", None)
    assert cache_teachers(config).units_done == 0


@pytest.mark.parametrize(
    ("step", "number"), [("run_unit", 0), ("write_unit", 4), ("write_unit", 14)]
)
def test_interrupted_in_any_unit_it_goes_on(
    tmp_path, configure, stable, whole, monkeypatch, step, number
):
    """The same shards in the end, those that were finished untouched, nothing left over."""
    config = configure(tmp_path, stable)
    original, calls = getattr(make_unit, step), []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(make_unit, step, failing)
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(config)
    before, half = files(tmp_path), committed(tmp_path)
    finished = sum(name.startswith("targets/") for name in half)
    assert number - 1 <= finished <= number
    again = cache_teachers(config)
    assert (again.units_done, again.units_present) == (15 - finished, finished)
    assert committed(tmp_path) == committed(whole)
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert Cache.open(tmp_path).manifest["teachers"].keys() == UNITS.keys()


def test_killed_in_the_middle_of_a_shard(tmp_path, configure, stable, whole):
    """What a killed process leaves, a half-written file without a record, harms nothing."""
    config = configure(tmp_path, stable)
    cache_teachers(config)
    data = next((tmp_path / "targets" / "mc" / "data").glob("00001-*"))
    record = tmp_path / "targets" / "mc" / "commits" / "00001.json"
    (data.parent / "00001-0badbeef.arrow").write_bytes(data.read_bytes()[:700])
    data.unlink()
    record.unlink()
    before = files(tmp_path)
    assert cache_teachers(config) == StageOne(12, 1, 14)
    assert committed(tmp_path) == committed(whole)
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before


def test_a_teacher_added_later_leaves_the_others_alone(tmp_path, configure, stable, whole):
    cache_teachers(configure(tmp_path, stable[:1]))
    before = files(tmp_path)
    assert cache_teachers(configure(tmp_path, stable)) == StageOne(12, 9, 6)
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert committed(tmp_path) == committed(whole)


def test_replicas_added_later_leave_the_others_alone(tmp_path, configure, stable):
    random = {"mask": {"policy": "random"}}
    cache_teachers(configure(tmp_path, stable[:1], cache=random | {"replicas": 1}))
    before = files(tmp_path)
    assert cache_teachers(configure(tmp_path, stable[:1], cache=random)) == StageOne(12, 3, 3)
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert Cache.open(tmp_path).teachers["lm"].coverage == 1


def test_a_teacher_left_out_stays_in_the_cache(tmp_path, configure, stable):
    cache_teachers(configure(tmp_path, stable[1:3]))
    cache_teachers(configure(tmp_path, stable[2:3]))
    assert set(Cache.open(tmp_path).teachers) == {"mc", "words"}


def test_only_the_chosen_teachers_run(tmp_path, configure, stable):
    config = configure(tmp_path, stable)
    assert cache_teachers(config, only=["words", "mc", "words"]) == StageOne(12, 6, 0)
    assert set(Cache.open(tmp_path).teachers) == {"mc", "words"}
    assert cache_teachers(config, only=["lm"]).units_done == 6
    assert cache_teachers(config).units_done == 3


def test_an_unknown_teacher_in_only(tmp_path, configure, stable):
    with pytest.raises(InputError, match=r"no teacher 'lx' .*lm, mc, words, pairs"):
        cache_teachers(configure(tmp_path, stable), only=["lm", "lx"])
    assert list(tmp_path.iterdir()) == []


def test_no_teacher_is_a_corpus_and_its_masks(tmp_path, configure):
    assert cache_teachers(configure(tmp_path, [])) == StageOne(12, 0, 0)
    assert len(Cache.open(tmp_path)) == 12


def test_another_corpus_in_the_same_place(tmp_path, configure, stable):
    cache_teachers(configure(tmp_path, stable[1:2]))
    with pytest.raises(CacheMismatchError, match="sequence_length: 24 there, 32 here"):
        cache_teachers(configure(tmp_path, stable[1:2], corpus={"sequence_length": 32}))


def test_progress_counts_what_was_done(tmp_path, configure, stable):
    noted = []

    class Noted(Progress):
        @contextmanager
        def task(self, name: str, unit: str, total: int | None = None) -> Iterator[Any]:
            with super().task(name, unit, total) as task:
                yield task
                noted.append((name, total, task.done, task.counts))

    cache_teachers(configure(tmp_path, stable[:2]), progress=Noted())
    cache = Cache.open(tmp_path)
    done = {name: (total, count, counts) for name, total, count, counts in noted}
    tokens = cache.corpus.tokens
    assert done["corpus"] == (None, 12, {"tokens": tokens})
    assert done["lm, 2 maskings"] == (
        24,
        24,
        {"tokens": 2 * tokens, "bytes": cache.teachers["lm"].bytes},
    )
    assert done["mc"] == (12, 12, {"tokens": tokens, "bytes": cache.teachers["mc"].bytes})


# --- domains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["even", "odd"])
def test_a_teacher_with_domains_has_targets_exactly_for_their_sequences(
    tmp_path, configure, make_model, wordpiece, bytelevel, stable, domain
):
    causal = make_model("llama", "AutoModelForCausalLM", wordpiece)
    teachers = [t | {"domains": [domain]} for t in stable]
    teachers += [
        {"name": "causal", "model": str(causal), "task": "causal_lm", "domains": [domain]},
        {
            "name": "everywhere",
            "model": str(causal),
            "task": "causal_lm",
            "targets": {"kind": "topk", "k": 2},
        },
    ]
    cache_teachers(configure(tmp_path, teachers))
    cache = Cache.open(tmp_path)
    inside = 0
    for index in range(len(cache)):
        example = cache.example(index)
        wanted = example.domain == domain
        inside += wanted
        assert len(example.targets["everywhere"][0].positions) == len(example.input_ids) - 1
        pair = next(iter(example.pairs.values()))
        assert bool(example.targets["mc"]) == wanted
        assert bool(example.targets["pairs"]) == (wanted and pair is not None)
        for name in ("lm", "causal", "words"):
            for target in example.targets[name]:
                assert (len(target.positions) > 0) == wanted
    assert 0 < inside < len(cache)
    # Targets of other domains are absent for the trainer as well, in every batch.
    for batch in cache.batches(batch_sequences=5):
        wanted = np.array([d == domain for d in batch.domains])
        assert (batch.targets["mc"].present == wanted).all()
        for name in ("lm", "causal", "words"):
            assert set(np.unique(batch.targets[name].rows)) == set(np.flatnonzero(wanted))


def test_a_shard_without_a_sequence_of_the_domain(tmp_path, configure, stable):
    """Its unit is committed and empty: nothing is missing, and nothing is there."""
    teachers = [t | {"domains": ["odd"]} for t in stable]
    mask = {"policy": "random", "probability": 0.5}
    cache = {"sequences_per_shard": 1, "replicas": 1, "mask": mask}
    done = cache_teachers(configure(tmp_path, teachers, cache=cache, corpus={"limit_sequences": 4}))
    found = Cache.open(tmp_path)
    examples = [found.example(i) for i in range(4)]
    assert [e.domain for e in examples] == ["even", "odd", "odd", "odd"]
    assert done.units_done == 16
    for name in ("lm", "words"):
        assert [sum(len(t.positions) for t in e.targets[name]) > 0 for e in examples] == [
            False,
            True,
            True,
            True,
        ]
    assert found.teachers["mc"].coverage == 1


# --- processes ------------------------------------------------------------------------------------


class Thread(Worker):
    """Stands for a worker process: does what one does, in a thread of this process."""

    def __init__(self, name: str, work: Callable[[Connection], object], place: Place):
        self._connection, parent = multiprocessing.Pipe()
        self.place = place

        def live() -> None:
            try:
                parent.send(Returned(work(parent)))
            except Exception as error:
                parent.send(error)

        self._process: Any = SimpleNamespace(join=lambda: None, kill=lambda: None)
        threading.Thread(target=live, daemon=True).start()


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Runs what worker processes run, without starting any: as one, for threads share a seed."""
    monkeypatch.setattr(units, "Worker", Thread)
    monkeypatch.setattr(units, "places_for", lambda workers: [Place(None, 1)])


def test_workers_write_the_same_bytes(tmp_path, configure, stable, whole, in_this_process):
    cache_teachers(configure(tmp_path, stable), executor=OnThisMachine(2))
    assert committed(tmp_path) == committed(whole)


def test_a_workers_error_is_the_teachers(
    tmp_path, configure, make_model, wordpiece, in_this_process
):
    """Not "a process was killed": a model that cannot be loaded says why in any process."""
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    teacher = {"name": "lm", "model": str(model), "task": "sequence_classification"}
    with pytest.raises(InputError, match=r"classifier\.weight"):
        cache_teachers(configure(tmp_path, [teacher]), executor=OnThisMachine(2))


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path, configure, stable, whole):
    """One thread each on any machine here, as in ``whole``: BLAS adds in another order with two."""
    if len(os.sched_getaffinity(0)) > 3:
        pytest.skip("workers would compute with two threads or more, and round otherwise")
    result = cache_teachers(configure(tmp_path, stable), executor=OnThisMachine(2))
    assert result == StageOne(12, 15, 0)
    assert committed(tmp_path) == committed(whole)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_an_error_in_a_process_is_the_teachers(tmp_path, configure, make_model, wordpiece, capfd):
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    teacher = {"name": "lm", "model": str(model), "task": "sequence_classification"}
    with pytest.raises(InputError, match=r"classifier\.weight"):
        cache_teachers(configure(tmp_path, [teacher]), executor=OnThisMachine(2))
    assert "Traceback" not in capfd.readouterr().err
