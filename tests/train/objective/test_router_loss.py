"""The load-balancing loss of a mixture-of-experts student, held against transformers' own."""

import logging
from dataclasses import replace

import pytest
import torch
import transformers

from rekindle.data.errors import CheckpointError, ResumableError
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.device_batch import CLEAN_TEXT
from rekindle.train.loop import train_student
from rekindle.train.record.run_log import read_metrics
from testlib.objective.setting import Setting
from testlib.students import gradients, same_gradients

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
FAMILIES = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"head_dim": 8, "mlp_only_layers": [1]},
}


@pytest.fixture(params=FAMILIES)
def world(request, causal_world, tmp_path):
    """The causal world with a student of experts."""
    size = causal_world.open().corpus.info["tokenizer"]["size"]
    config = getattr(transformers, f"{request.param}Config")(
        **SIZES | FAMILIES[request.param], vocab_size=size, pad_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "student")
    return replace(causal_world, student=tmp_path / "student")


def test_it_is_transformers_own_in_value_and_gradient(world):
    setting = Setting(world, {"hard": {"weight": 1.0}})
    setting.objective.load_balancing_weight = 0.5
    setting.student.train()
    loss, terms, found = setting.run()
    batch = setting.batch(0)
    ids = torch.from_numpy(batch.input_ids.astype("int64"))
    mask = (torch.arange(ids.shape[1]) < torch.from_numpy(batch.lengths)[:, None]).long()
    setting.student.zero_grad(set_to_none=True)
    out = setting.student.model(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)
    )
    out.loss.backward()
    assert float(terms["router"]) == pytest.approx(float(out.aux_loss), rel=1e-5)
    assert float(loss) == pytest.approx(float(out.loss), rel=1e-5)
    expected = {f"{n}": g for n, g in gradients(setting.student).items()}
    assert any("gate" in name or "router" in name for name in expected)
    same_gradients(found, expected)


def test_it_is_logged_and_said(world, tmp_path, caplog):
    train = TrainConfig(steps=2, batch_sequences=4, micro_batch_sequences=2, warmup_steps=0)
    with caplog.at_level(logging.INFO, logger="rekindle"):
        student = StudentConfig(model=str(world.student), task="causal_lm")
        train_student(world.open(), student, train, tmp_path / "run")
    assert "load-balancing loss of its routers (router) at weight 0.5" in caplog.text
    steps = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert all(1.0 <= record["router"] < 4.0 for record in steps)
    for record in steps:
        assert record["loss"] == pytest.approx(record["ce"] + 0.5 * record["router"], rel=1e-5)


def test_it_is_of_the_text_that_the_language_loss_reads_alone(world, monkeypatch):
    """Whatever other views the student's experts need: these are passes of their own."""
    each = []
    for hard, apart in ((1.0, False), (1.0, True), (0.0, True)):
        setting = Setting(world, {"hard": {"weight": hard}, "distill": [{"teachers": ["sense"]}]})
        setting.objective.load_balancing_weight = 0.5
        setting.student.train()
        split = setting.objective._group_by_pass

        def moved(plan, split=split):  # an expert of pairs, as it were
            found = split(plan)
            return found._replace(joined=[], by_view={CLEAN_TEXT: found.joined})

        if apart:
            monkeypatch.setattr(setting.objective, "_group_by_pass", moved)
        plan = setting.objective.plan(0)
        shown = setting.objective.loss_names(setting.objective.counts(setting.batch(0), plan), plan)
        found = setting.run()[1]
        assert ("router" in shown) == ("router" in found) == (hard > 0)
        each += [float(found["router"])] if hard else []
    assert each[1] == pytest.approx(each[0], rel=1e-5)


def test_what_is_in_a_forward_pass_may_not_change_on_resume(world, tmp_path):
    """It decides the loss, which is no sum over sequences; nor is it advice for want of memory."""
    train = TrainConfig(steps=2, batch_sequences=4, warmup_steps=0, checkpoint_every=1)
    student = StudentConfig(model=str(world.student), task="causal_lm")

    def begin(micro, resume, report):
        config = train.model_copy(update={"micro_batch_sequences": micro})
        out = tmp_path / "run"
        train_student(world.open(), student, config, out, resume=resume, report=report)

    def short(step, values):
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResumableError) as caught:
        begin(4, False, short)
    assert "--out: a lower train.micro_batch_sequences (now 4), which changes" in str(caught.value)
    assert caught.value.settings == ("train.gradient_checkpointing=true",)
    with pytest.raises(CheckpointError, match=r"train\.micro_batch_sequences: 4 there, 2 here"):
        begin(2, True, short)
