"""A mixture-of-experts student learns the balance of its routers as in our own loop."""

import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.train.hf.dataset import CacheDataset
from rekindle.train.hf.trainer import DistillationMixin
from rekindle.train.record.run_log import read_metrics
from testlib.models import NARROW
from testlib.trainers.runs import BATCH, SEED, losses, our_losses, teaching, trainer_of

SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "mlp_only_layers": [1]},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
ONE = {"big": 0.7}


@pytest.fixture(scope="module")
def taught(tmp_path_factory, make_teacher, make_cache):
    path = tmp_path_factory.mktemp("experts") / "cache"
    kept = {"targets": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}}
    make_cache(path, [make_teacher("big", "causal_lm", 1, NARROW, **kept)])
    return Cache.open(path)


def student_of(cache, folder, **more):
    size = cache.corpus.info["tokenizer"]["size"]
    config = transformers.Qwen3MoeConfig(**SIZES | more, vocab_size=size, pad_token_id=None)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    cache.corpus.tokenizer.save(str(folder))
    return folder


WEIGHT = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def trained(cache, folder, out, **more):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    class KDTrainer(DistillationMixin, Trainer):
        pass

    model = AutoModelForCausalLM.from_pretrained(str(folder))
    taught = teaching(cache, ONE)
    trainer = trainer_of(KDTrainer, TrainingArguments, model, taught, out, max_steps=6, **more)
    trainer.train()
    return trainer


def test_the_balance_of_routers_is_learnt_as_in_our_loop(taught, tmp_path, caplog):
    folder = student_of(taught, tmp_path / "student", **WEIGHT)
    ours = our_losses(taught, folder, "causal_lm", tmp_path / "ours", weights=ONE, steps=6)
    with caplog.at_level("INFO", logger="rekindle"):
        trainer = trained(taught, folder, tmp_path / "hf")
    assert "student: load-balancing loss of its routers (router) at weight 0.5" in caplog.text
    assert losses(trainer) == pytest.approx(ours, rel=1e-5)
    rows = [row for row in read_metrics(tmp_path / "ours") if "learning_rate" in row]
    found = [row["router"] for row in trainer.state.log_history if "router" in row]
    assert found == pytest.approx([row["router"] for row in rows], rel=1e-5)


def test_each_micro_batch_has_the_share_of_its_tokens(taught, tmp_path):
    """What balances is no sum over sequences: our loop's micro-batches hold others than these."""
    folder = student_of(taught, tmp_path / "student", **WEIGHT)
    trainer = trained(taught, folder, tmp_path / "hf", batch=BATCH // 2, each=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).train()
    data, collate = CacheDataset(taught, seed=SEED), trainer.distillation.collator()
    total = tokens = 0
    for first in (0, BATCH // 2):
        batch = collate([data[first + n] for n in range(BATCH // 2)])
        mask = batch["attention_mask"]
        with torch.no_grad():
            balance = model(input_ids=batch["input_ids"], attention_mask=mask).aux_loss
        total, tokens = total + float(balance) * int(mask.sum()), tokens + int(mask.sum())
    row = trainer.state.log_history[0]
    assert row["router"] == pytest.approx(total / tokens, rel=1e-5)
    parts = 0.5 * row["ce"] + 0.7 * 4 * row["kd/big"] + 0.5 * row["router"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_without_router_logits_there_is_none_and_that_is_said(taught, tmp_path, caplog):
    folder = student_of(taught, tmp_path / "student", router_aux_loss_coef=0.5)
    with caplog.at_level("INFO", logger="rekindle"):
        trainer = trained(taught, folder, tmp_path / "hf")
    assert "student: no load-balancing loss of its routers" in caplog.text
    assert not any("router" in row for row in trainer.state.log_history)
