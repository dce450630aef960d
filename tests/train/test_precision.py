"""Precisions that a CPU has no instructions for: every stage says so before its work."""

import pytest
import torch

from rekindle.train.answers.config import PerplexityConfig
from rekindle.train.answers.perplexity import text_perplexity
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.run import finetune
from rekindle.train.precision import describe_slow_precision
from testlib.answers.judges import write
from testlib.loop import run, train_config

OF = {"train.precision: {}": "bf16"}


@pytest.fixture
def cpu(monkeypatch):
    """cpu(NAME, …): from now on the CPU has these instructions alone."""

    def has(*names):
        found = dict.fromkeys(("avx2", "bf16", "avx512_bf16"), False) | dict.fromkeys(names, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)

    return has


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_nothing_is_said_where_there_are_instructions(cpu, name):
    cpu("avx2")
    assert describe_slow_precision(OF, "cpu").startswith(
        "train.precision: bf16: this CPU has no instructions"
    )
    cpu("avx2", name)
    assert describe_slow_precision(OF, "cpu") is None


def test_it_is_said_of_each_setting_and_what_to_put(cpu):
    cpu("avx2", "avx512_bf16")
    asked = {"train.precision: {}": "bf16", "teachers.a.precision: {}": "fp16", "b: {}": "auto"}
    told = describe_slow_precision(asked, "cpu")
    assert told.startswith("teachers.a.precision: fp16: ")  # and not the one that it can
    assert told.endswith("for speed set teachers.a.precision: fp32")
    assert describe_slow_precision(asked, "cuda") is None
    cpu()
    told = describe_slow_precision(asked, "cpu")
    assert told.endswith("for speed set train.precision: fp32, teachers.a.precision: fp32")


def test_training_fine_tuning_and_perplexity_say_it_once(
    cpu, caplog, masked_world, tmp_path, make_model, wordpiece
):
    rows = [{"text": f"river {n}", "label": n % 2} for n in range(4)]
    file = write(tmp_path / "rows.jsonl", rows)
    bert = str(make_model("bert", "AutoModelForMaskedLM", wordpiece))
    one = {"steps": 1, "warmup_steps": 0, "evaluate_every": 1, "checkpoint_every": 1}

    def train(precision, out):
        run(masked_world, tmp_path / out, train_config(**one, precision=precision))

    def tune(precision, out):
        config = FinetuneConfig(max_steps=1, precision=precision)
        finetune(bert, file, file, str(tmp_path / f"tuned-{out}"), config=config)

    def ask(precision, out):
        text_perplexity(bert, file, config=PerplexityConfig(tokens=2, precision=precision))

    for stage, put in (
        (train, "train.precision: fp32"),
        (tune, "--set precision=fp32"),
        (ask, "--set precision=fp32"),
    ):
        caplog.clear()
        cpu("avx2")
        stage("bf16", "slow")
        (line,) = [one for one in caplog.messages if "no instructions" in one]
        assert line.endswith(f"for speed set {put}"), stage
        stage("auto", "auto")
        cpu("amx_bf16")
        stage("bf16", "quick")
        assert sum("no instructions" in one for one in caplog.messages) == 1, stage
