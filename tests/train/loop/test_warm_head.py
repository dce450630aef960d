"""A language model's own head trained alone at first: nothing else moves, and all goes on then."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from rekindle.data.errors import InputError
from rekindle.train.objective.objective import Objective
from rekindle.train.record.run_log import read_metrics
from testlib.loop import refused, run, stop_at, train_config
from testlib.models import NARROW
from testlib.students import metrics, same_weights

HEAD = "cls.predictions."
DISTILL = [{"teachers": ["big"], "weight": 0.5}, {"teachers": ["sense"], "weight": 0.2}]
WARM = {"steps": 6, "warm_head_steps": 3, "warmup_steps": 1, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def body(make_model, wordpiece, tmp_path_factory):
    """An encoder without a language model's head."""
    whole = make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **NARROW)
    folder = tmp_path_factory.mktemp("encoder") / "body"
    BertModel.from_pretrained(whole, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (whole / name).is_file():
            (folder / name).write_bytes((whole / name).read_bytes())
    return folder


def parts(folder):
    """The weights of a checkpoint: of the head, of the body, of the experts' heads."""
    found = load_file(folder / "model.safetensors")
    head = {name: value for name, value in found.items() if name.startswith(HEAD)}
    return (
        head,
        {n: v for n, v in found.items() if n not in head},
        load_file(folder / "heads.safetensors"),
    )


def moved(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.fixture(scope="module")
def warmed(masked_world, body, tmp_path_factory):
    out = tmp_path_factory.mktemp("warm") / "run"
    result = run(masked_world, out, train_config(DISTILL, **WARM), model=body)
    return result.directory


def test_only_the_head_moves_in_the_warm_steps_and_all_of_it_after(
    masked_world, body, warmed, tmp_path
):
    """Bit by bit: no decay, no noise reaches the body, whose embeddings are the output matrix."""
    more = {"steps": 4, "warmup_steps": 0, "checkpoint_every": 1, "keep_checkpoints": 9}
    once = train_config(DISTILL, **WARM | more)
    out = run(masked_world, tmp_path / "run", once, model=body).directory
    each = [parts(out / f"checkpoints/step-{step:08d}") for step in (1, 2, 3, 4)]
    source = load_file(body / "model.safetensors")
    assert all(torch.equal(each[0][1][f"bert.{name}"], value) for name, value in source.items())
    for before, after in pairwise(each[:3]):
        assert len(moved(before[0], after[0])) == len(before[0]) > 3
        assert moved(before[1], after[1]) == moved(before[2], after[2]) == []
    assert len(moved(each[2][1], each[3][1])) > len(each[2][1]) / 2
    assert moved(each[2][2], each[3][2])
    state = load_file(out / "checkpoints/step-00000003/optimizer.safetensors")
    assert {name.split("\0")[0].startswith(f"model.{HEAD}") for name in state} == {True}


def test_the_records_tell_of_them(warmed):
    """Of their terms, and their rate: the peak; then the schedule begins with its warm-up."""
    steps = [r for r in read_metrics(warmed) if r["kind"] == "train"]
    assert [r.get("head_alone") for r in steps] == [1.0] * 3 + [None] * 3
    assert ["kd/sense" in r for r in steps] == [False] * 3 + [True] * 3
    assert all("kd/big" in r and "ce" in r for r in steps)
    peak = 1e-3
    assert [r["learning_rate"] for r in steps] == pytest.approx(
        [peak] * 4 + [peak, peak / 2], rel=1e-6
    )
    assert json.loads((warmed / "run.json").read_text())["train"]["warm_head_steps"] == 3


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(masked_world, body, warmed, tmp_path, stop):
    config = train_config(DISTILL, **WARM | {"checkpoint_every": 1})
    with pytest.raises(KeyboardInterrupt):
        run(masked_world, tmp_path / "run", config, model=body, report=stop_at(stop))
    run(masked_world, tmp_path / "run", config, model=body, resume=True)
    assert same_weights(tmp_path / "run", warmed)
    assert metrics(tmp_path / "run") == metrics(warmed)


def test_no_gradient_is_made_of_the_body(masked_world, body, tmp_path, monkeypatch):
    seen = []
    loss = Objective.loss

    def noting(self, student, *rest):
        found = loss(self, student, *rest)
        found.total.backward(retain_graph=True)
        seen.append({n for n, p in student.named_parameters() if p.grad is not None})
        student.zero_grad(set_to_none=True)
        return found

    monkeypatch.setattr(Objective, "loss", noting)
    run(masked_world, tmp_path / "run", train_config(DISTILL, **WARM), model=body)
    assert all(name.startswith(f"model.{HEAD}") for names in seen[:3] for name in names)
    assert any(name.startswith("model.bert.encoder") for name in seen[3])


def test_a_fresh_head_says_what_it_does_and_what_to_do(masked_world, body, tmp_path, caplog):
    word = "has no language-model head"
    run(masked_world, tmp_path / "ce", train_config(DISTILL, steps=1), model=body)
    (told,) = [r for r in caplog.records if word in r.getMessage()]
    assert told.levelname == "WARNING"
    for part in ("begins near", "train.warm_head_steps: 1)", "train.objective.hard.weight: 0"):
        assert part in told.getMessage()
    caplog.clear()
    later = train_config(DISTILL, steps=2, hard={"from": 0.0, "to": 1.0})
    run(masked_world, tmp_path / "later", later, model=body)
    (told,) = [line for line in caplog.messages if word in line]
    assert "is trained. Its cross-entropy" in told  # not by its teachers' words alone
    caplog.clear()
    run(masked_world, tmp_path / "whole", train_config(DISTILL, steps=1))  # has one
    run(masked_world, tmp_path / "warm", train_config(DISTILL, **WARM), model=body)
    alone = train_config([{"teachers": ["sense"]}], steps=1, hard=0.0)
    caplog.set_level("INFO", "rekindle")
    found = run(masked_world, tmp_path / "kd", alone, model=body).evaluation
    assert word not in caplog.text
    assert "nothing trains its fresh language-model head" in caplog.text
    assert found.keys() == {"loss", "kl/sense", "agreement/sense"}
    assert found["loss"] == pytest.approx(found["kl/sense"], rel=1e-5)


def test_what_cannot_be_is_refused(masked_world, causal_world, tmp_path):
    experts = train_config([{"teachers": ["sense"]}], hard=0.0, **WARM)
    refused(masked_world, tmp_path, "no loss reaches that head: hard.weight is 0", experts)
    refused(causal_world, tmp_path, "no head of its own", train_config(**WARM))
    for values, words in (
        ({"warm_head_steps": 10}, "nothing but the language model's head"),
        ({"warm_head_steps": 9, "warmup_steps": 1}, "steps 10 less warm_head_steps 9"),
    ):
        with pytest.raises(InputError, match=words):
            train_config(**values)
