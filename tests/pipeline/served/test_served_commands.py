"""What the commands say of a served teacher: plan, verify, inspect, cache-teachers."""

import json
import shutil

import pytest
import yaml

from rekindle.data.storage.shards import ShardSet
from rekindle.data.storage.store import open_store
from rekindle.pipeline.config import dump_config


@pytest.fixture
def run_file(tmp_path, configure, teacher):
    """run_file(cache, keys) -> a run file's path."""

    def make(cache, **served):
        config = configure(cache, [teacher(**served)])
        path = tmp_path / "run.yaml"
        path.write_text(dump_config(config))
        return path

    return make


def test_plan_counts_the_requests(tmp_path, command, run_file, double):
    run = run_file(tmp_path / "cache", prompts_per_request=2)
    code, out, err = command("plan", run)
    assert code == 0, err
    # 12 sequences in files of 5, 5 and 2, and the probes of each.
    assert "big: 10 requests to its server" in (told := " ".join(out.split()))
    assert "that of one request, measured now" in told
    assert "(3 are sent at a time)" in told
    found = json.loads(command("plan", run, "--json")[1])["teachers"][0]
    assert (found["requests"], found["units_to_make"]) == (10, 3)
    assert found["seconds"] > 0
    assert found["bytes"] > 0
    assert not (tmp_path / "cache").exists()


def test_plan_without_the_server(tmp_path, command, run_file):
    code, out, err = command("plan", run_file(tmp_path / "cache", url="http://127.0.0.1:9/v1"))
    assert code == 0, err
    assert "big: its server http://127.0.0.1:9/v1 does not answer" in " ".join(out.split())


def test_plan_of_what_is_missing_without_the_server(tmp_path, command, run_file, whole):
    cache = shutil.copytree(whole, tmp_path / "cache")
    ShardSet(open_store(cache), "targets/big").forget("00001")
    code, out, err = command("plan", run_file(cache, url="http://127.0.0.1:9/v1"))
    assert code == 0, err
    assert "does not answer" in (told := " ".join(out.split()))
    assert "big: 6 requests to its server" in told


def test_inspect_verify_and_audit(command, run_file, whole):
    out = " ".join(command("inspect", whole)[1].split())
    assert "big was served as tiny (served_root org/tiny, vllm 0.11.0); tails derived" in out
    found = json.loads(command("inspect", whole, "--json")[1])["teachers"]["big"]
    assert found["served"]["model"] == "tiny"
    assert len(found["weights"]) == 64  # the digest of the probes
    code, out, err = command("verify", whole, "--audit", 4, "--config", run_file(whole))
    assert code == 0, err
    assert "audit of big: mean_error" in out


def test_a_wrong_answer_is_exit_code_2_and_the_same_line_goes_on(
    tmp_path, command, run_file, double
):
    run = run_file(tmp_path / "cache", max_concurrency=1)
    double.faults += ["", "", "", "above"]
    code, _, err = command("cache-teachers", run)
    assert code == 2
    assert "sequence 0: prompt_logprobs: entry 2" in err
    assert command("cache-teachers", run)[0] == 0


def test_a_student_learns_from_it(command, run_file, whole, make_teacher, tmp_path):
    run = run_file(whole)
    values = yaml.safe_load(run.read_text())
    values["student"] = {
        "model": make_teacher("start", "causal_lm", seed=3)["model"],
        "task": "causal_lm",
    }
    values["train"] = {"steps": 2, "batch_sequences": 4, "held_out": 0.25, "objective": {}}
    values["train"]["objective"]["distill"] = [{"teachers": ["big"], "weight": 1.0}]
    run.write_text(yaml.safe_dump(values))
    code, _, err = command("train-student", run, "--out", tmp_path / "student")
    assert code == 0, err
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert losses
    assert all(loss > 0 for loss in losses)
    assert any("kl/big" in line for line in lines)
