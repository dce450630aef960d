"""What a server cannot give, or gives wrongly, is refused with its place, and nothing of it is
kept; another model under the same name is known.
"""

import re
import shutil
from pathlib import Path

import pytest

from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.settings import changeable_keys, parse_settings
from rekindle.data.storage import patience
from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.served import client
from rekindle.pipeline.served.config import ServedConfig
from rekindle.pipeline.teacher_config import TeacherConfig
from testlib.caches import committed

NOWHERE = "http://127.0.0.1:9/v1"
SERVED = {"url": "http://host:8000/v1/", "model": "org/big"}


def parsed(**more):
    return parse_settings(TeacherConfig, {"name": "big", "served": SERVED} | more)


def test_a_served_teacher_needs_its_server_alone():
    config = parsed()
    assert (config.model, config.task) == ("org/big", "causal_lm")
    assert (config.targets.kind, config.targets.temperatures) == ("topk", (1.0,))
    assert config.served.url == "http://host:8000/v1"
    assert config.resources.num_gpus == 0
    again = parse_settings(TeacherConfig, config.model_dump(mode="json"))
    assert again == config


def test_what_may_change_when_work_goes_on():
    free = {key.removeprefix("served.") for key in changeable_keys(parsed()) if "served" in key}
    fixed = {*ServedConfig.model_fields} - free
    assert fixed == {"model", "tokenizer"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"targets": {"kind": "threshold"}}, "targets.kind topk, not threshold"),
        ({"targets": {"kind": "dense"}}, "targets.kind topk, not dense"),
        ({"targets": {"temperatures": [1, 2]}}, "only at temperature 1"),
        ({"targets": {"temperatures": [2.0]}}, "only at temperature 1"),
        ({"task": "masked_lm"}, "causal_lm"),
        ({"model": "elsewhere"}, "leave model out"),
        ({"precision": "bf16"}, "precision is up to the server"),
        ({"device_map": "auto"}, "device_map is up to the server"),
        ({"served": SERVED | {"url": "host:8000"}}, "http://host:8000/v1"),
        ({"served": SERVED | {"url": "http://me:secret@host/v1"}}, "api_key_env"),
        ({"served": SERVED | {"modle": "x"}}, "did you mean 'model'"),
    ],
)
def test_the_run_file_says_nothing_that_a_server_cannot(given, told):
    with pytest.raises(InputError, match=re.escape(told)):
        parsed(**given)


def no_units(path: Path) -> bool:
    return not committed(path, "targets") if (path / "cache.json").exists() else True


@pytest.mark.parametrize(
    ("server", "more", "told"),
    [
        ({"max_logprobs": 5}, {}, "max allowed: 5. Serve the model with --max-logprobs 6"),
        ({"max_model_len": 24}, {}, "--max-model-len 25"),
        ({"name": "tiny-2"}, {}, "has no model 'tiny' (it has: tiny-2); did you mean 'tiny-2'?"),
        ({"api_key": "k"}, {}, "name the environment variable that has it"),
        ({}, {"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE, and that environment"),
        ({}, {"url": NOWHERE}, "for 0.2 s ([Errno 111] Connection refused). Is it"),
        ({}, {"url": "+/more"}, "end where the server's API begins"),
    ],
)
def test_before_any_work(tmp_path, configure, teacher, double, server, more, told):
    double.__dict__ |= server
    if more.get("url", "").startswith("+"):
        more = {"url": double.url + more["url"][1:]}
    with pytest.raises(InputError, match=re.escape(told)) as error:
        cache_teachers(configure(tmp_path / "cache", [teacher(**more)]))
    assert "teacher 'big'" in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_another_tokenizer(tmp_path, configure, teacher, double, bytelevel):
    other = teacher(tokenizer=str(bytelevel))
    with pytest.raises(InputError, match="served model has another tokenizer than the corpus"):
        cache_teachers(configure(tmp_path, [other]))
    double.tokenizer = type("Other", (), {"decode": lambda self, ids: f"w{ids[0]}"})()
    try:
        with pytest.raises(InputError, match=r"another tokenizer than the corpus: id .* here"):
            cache_teachers(configure(tmp_path, [teacher()]))
    finally:
        double.serve(double.folder)


WRONG = {
    "count": "it read 25 tokens where 24 were sent",
    "tokens": "it read other tokens than those sent",
    "short": "one entry for each of the sequence's 24 tokens",
    "shifted": "lacks the prompt's own token",
    "above": "above 0",
    "nan": "finite",
    "rank": "has no rank",
    "ids": "999999 is no token of the cache's vocabulary",
    "few": "and the 6 likeliest were asked for",
    "hole": "lacks the candidate of rank 3",
    "null": "entry 2 is null: the server has read that part of the prompt from its prefix cache",
    "none": "has no prompt_logprobs",
    "index": "there must be one for each, from 0",
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_answer_with_its_place(tmp_path, configure, teacher, double, whole, fault):
    shutil.copytree(whole, tmp_path / "cache")
    ShardSet(open_store(tmp_path / "cache"), "targets/big").forget("00001")
    config = configure(tmp_path / "cache", [teacher(max_concurrency=1)])
    double.faults += ["", "", fault]  # after the probes of the plan and of the unit's maker
    with pytest.raises(InputError, match=re.escape(WRONG[fault])) as error:
        cache_teachers(config, check=False)
    assert re.search(r"teacher 'big' \(tiny at http://.*\): sequence 5: ", str(error.value))
    there = ShardSet(open_store(tmp_path / "cache"), "targets/big").committed()
    assert sorted(there) == ["00000", "00002"]


@pytest.fixture
def other(make_teacher) -> Path:
    """Another model of the same kind."""
    return Path(make_teacher("other", "causal_lm", seed=1)["model"])


def test_a_changed_model_under_the_same_name(
    tmp_path, configure, teacher, double, whole, other, local
):
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    ShardSet(open_store(cache), "targets/big").forget("00001")
    config = configure(cache, [teacher()])
    double.serve(other)
    with pytest.raises(CacheMismatchError, match="is now behind the name 'tiny'"):
        cache_teachers(config, check=False)
    with pytest.raises(CacheMismatchError, match="is now behind the name 'tiny'"):
        audit_cache(str(cache), config, 2)
    double.serve(Path(local["model"]))
    double.other = other
    double.faults += ["", "", "", "", "swap"]  # while a unit is made: nothing is kept of it
    with pytest.raises(CacheMismatchError, match="is now behind the name 'tiny'"):
        cache_teachers(config, check=False)
    assert "00001" not in ShardSet(open_store(cache), "targets/big").committed()
    double.serve(Path(local["model"]))
    double.name = "tiny-2"
    with pytest.raises(CacheMismatchError, match="was served as 'tiny', not as 'tiny-2'"):
        cache_teachers(configure(cache, [teacher(model="tiny-2")]), check=False)
    double.name = "tiny"
    cache_teachers(config)
    assert committed(cache, "targets") == committed(whole, "targets")


def test_a_server_that_is_gone_is_needed_for_what_is_missing_alone(
    tmp_path, configure, teacher, whole, caplog
):
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    config = configure(cache, [teacher(url=NOWHERE)])
    with caplog.at_level("WARNING", logger="rekindle"):
        assert cache_teachers(config).units_present == 3
    assert "It is assumed to be unchanged" in caplog.text
    ShardSet(open_store(cache), "targets/big").forget("00001")
    with pytest.raises(InputError, match="Is it running"):
        cache_teachers(config, check=False)


def test_a_local_teacher_and_a_served_one_are_two(tmp_path, configure, whole, local):
    shutil.copytree(whole, tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=r"was served \(tiny\), but this one is run"):
        cache_teachers(configure(tmp_path / "cache", [local | {"name": "big"}]), check=False)


def test_patience_ends(tmp_path, configure, teacher, double, monkeypatch):
    double.faults += ["", "", "", *["503"] * 200]
    monkeypatch.setattr(patience, "LONGEST_DELAY", 0.02)
    with pytest.raises(InputError, match=r"not answered for 0.2 s \(HTTP 503: later\).*continues"):
        cache_teachers(configure(tmp_path, [teacher(patience_s=0.2, max_concurrency=1)]))


@pytest.mark.parametrize(
    ("order", "least", "most"),
    [("3", 3, 3), (None, 0, 0), ("soon", 0, 0), ("Wed, 21 Oct 2065 07:28:00 GMT", 1e9, 3e9)],
)
def test_a_retry_after_is_understood(order, least, most):
    assert least <= client._seconds(order) <= most


def test_the_server_says_when_to_come_back(double):
    waited: list[float] = []
    asking = client.Client(ServedConfig(url=double.url, model="tiny"))
    asking._stop = Recorded(waited)
    double.faults += ["429", "503"]
    double.retry_after = "7"
    body = {"model": "tiny", "prompt": [[5, 6]], "prompt_logprobs": 1, "max_tokens": 1}
    assert len(asking.post("/completions", body)["choices"]) == 1
    assert waited == [7.0, 7.0]
    double.faults += ["429"]
    double.retry_after = "9000"
    with pytest.raises(InputError, match="asks to come back in 9000 s; run the same command then"):
        asking.post("/completions", body)


class Recorded:
    """An event that is never set, and notes how long somebody would wait for it."""

    def __init__(self, waited: list[float]):
        self.waited = waited

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return False
