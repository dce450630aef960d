"""A served teacher's cache is what the same model leaves that is run here, whatever the server's
faults; stage 1 goes on after a kill.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.storage.seal import WITH_SERVED
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.config import dump_config
from testlib.caches import committed, examples
from testlib.command import run_main
from testlib.killing import Journal, assert_finished, die, forked, with_workers
from testlib.processes import Child

STEP = 1 / 2048  # of the precise codec


@pytest.fixture
def own(tmp_path, whole) -> Path:
    """A copy of ``whole``."""
    return Path(shutil.copytree(whole, tmp_path / "own"))


def said(path: Path) -> dict[str, bytes]:
    return committed(path, "targets")


def test_it_says_what_the_same_model_says_here(tmp_path, configure, teacher, local):
    config = configure(tmp_path, [teacher(), local])
    cache_teachers(config)
    cache, compared = Cache.open(tmp_path), 0
    for example in examples(cache):
        (ours,), (theirs,) = example.targets["local"], example.targets["big"]
        assert np.array_equal(ours.positions, theirs.positions)
        assert np.array_equal(ours.ids, theirs.ids)
        # Float32 on both sides: a value may be rounded to the next step, no further.
        assert np.abs(ours.log_probs - theirs.log_probs).max() <= STEP + 1e-5
        assert np.abs(ours.log_tail[1.0] - theirs.log_tail[1.0]).max() <= 2 * STEP
        assert np.array_equal(ours.gold_rank, theirs.gold_rank)
        assert np.abs(ours.gold_log_prob - theirs.gold_log_prob).max() <= 2 * STEP + 1e-5
        compared += ours.ids.size
    assert compared > 500
    info = cache.teachers["big"].info
    assert (info.estimator["tail"], info.lacks) == ("derived", ("entropy",))
    with pytest.raises(InputError, match="gives no entropies"):
        cache.scores("big", "mean_entropy")
    assert cache.scores("big", "mean_loss") == pytest.approx(
        cache.scores("local", "mean_loss"), abs=1e-3
    )
    assert verify_cache(str(tmp_path)).problems == []
    found = audit_cache(str(tmp_path), config, 12)
    assert found.problems == []
    assert found.values["big"]["top1"] == 1.0
    assert found.values["big"]["max_error"] <= 1e-6  # the server says the same again


def test_a_corpus_that_says_what_is_trained(tmp_path, configure, teacher, local):
    ids = [[9, 30, 41, 52, 63, 74, 85], [11, 40, 50]]
    rows = [
        {"input_ids": ids[0], "labels": [-100, -100, 41, 52, -100, -100, 85]},
        {"input_ids": ids[1], "labels": [-100, -100, 50]},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    corpus = {"source": [str(source)], "format": "tokens", "limit_sequences": None}
    cache_teachers(
        configure(tmp_path / "cache", [teacher(), local], corpus | {"domain_field": None})
    )
    cache = Cache.open(tmp_path / "cache")
    found = [example.targets for example in examples(cache)]
    assert [t["big"][0].positions.tolist() for t in found] == [[1, 2, 5], [1]]
    for one in found:
        assert np.array_equal(one["big"][0].ids, one["local"][0].ids)
    assert verify_cache(str(tmp_path / "cache")).problems == []


FAULTS = ["429", "503", "drop", "cut", "500", "slow", "408"]


def test_faults_and_the_order_of_answers_leave_the_same_bytes(
    tmp_path, configure, teacher, double, whole
):
    asked = len(double.asked)
    double.faults += ["", "", "", *FAULTS, *["reordered"] * 20]
    config = configure(tmp_path / "cache", [teacher(prompts_per_request=2, timeout_s=0.3)])
    cache_teachers(config)
    assert said(tmp_path / "cache") == said(whole)
    requests = len(double.asked) - asked
    # Shards of 5, 5 and 2 sequences by two, the probes of each, three times the probes before.
    assert requests == 3 + (3 + 3 + 1) + 3 + len(FAULTS)
    again = double.asked[-1]["prompt"]
    assert cache_teachers(config).units_done == 0
    assert double.asked[-1]["prompt"] == again  # the probes, once more


def test_several_processes_make_it(tmp_path, configure, teacher, whole):
    config = configure(tmp_path / "cache", [teacher()])
    child = with_workers(config, Journal(tmp_path / "journal", tmp_path / "cache"))
    assert child.wait() == 0, child.errors
    assert said(tmp_path / "cache") == said(whole)


def test_killed_it_goes_on(tmp_path, configure, teacher, whole):
    cache = tmp_path / "cache"
    config = configure(cache, [teacher()])
    step = "after link /targets/big/commits/00001.json"
    child = forked(config, Journal(tmp_path / "journal", cache, step, die))
    assert child.wait() == -signal.SIGKILL, child.errors
    assert_finished(cache, config, whole)


def test_an_interrupt_waits_for_no_answer(tmp_path, configure, teacher, double):
    """Ctrl-C while the server hangs ends the command, though ``timeout_s`` is far away."""
    run = tmp_path / "run.yaml"
    run.write_text(dump_config(configure(tmp_path / "cache", [teacher(timeout_s=600)])))
    double.faults += ["", "", "", *["hang"] * 3]
    child = Child(lambda: run_main("cache-teachers", run))
    assert double.hung.wait(60)
    try:
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(30) == 130, child.errors
    finally:
        double.let_go.set()


def test_it_is_exported(whole):
    """What a server does not say stands in no row."""
    found = Cache.open(whole).to_datasets(["big"])["big"]
    assert {"gold_log_probs", "gold_ranks", "log_tail"} <= {*found.column_names}
    assert "entropy" not in found.column_names


def test_another_address_of_the_same_model_goes_on(tmp_path, configure, teacher, double, own):
    ShardSet(open_store(own), "targets/big").forget("00001")
    url = double.url.replace("127.0.0.1", "localhost")
    done = cache_teachers(configure(own, [teacher(url=url, max_concurrency=1)]))
    assert (done.units_done, done.units_present) == (1, 2)
    manifest = json.loads((own / "cache.json").read_text())
    assert manifest["format_version"] == WITH_SERVED


def test_more_candidates_are_kept_beside_the_first(configure, teacher, own):
    before = said(own)
    done = cache_teachers(configure(own, [teacher({"k": 9})]))
    assert (done.units_done, done.units_present) == (3, 0)
    assert before.items() <= said(own).items()
    assert Cache.open(own).example(3).targets["big"][0].ids.shape[1] == 9


def test_a_key_is_sent_and_written_nowhere(
    tmp_path, configure, teacher, double, monkeypatch, caplog
):
    monkeypatch.setenv("SERVED_KEY", secret := "sk-only-in-the-header")
    double.api_key = secret
    double.faults += ["", "", "503"]
    double.keys.clear()
    with caplog.at_level("DEBUG"):
        cache_teachers(configure(tmp_path / "cache", [teacher(api_key_env="SERVED_KEY")]))
    assert double.keys == {f"Bearer {secret}"}
    assert secret not in caplog.text
    files = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(secret.encode() in content for content in files)
