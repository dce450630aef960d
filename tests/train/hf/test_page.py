"""The programs of docs/own_trainer.md: the plain loop learns; a LightningModule's step is its loss.

Lightning itself is not installed: its module is a PyTorch module with ``log``.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

PAGE = Path(__file__).parents[3] / "docs/own_trainer.md"
NAMES = {"runs/cache": "{cache}", "path/to/big-lm": "{lm}", "big-lm": "lm", "code-lm": "odd"}
NAMES |= {"range(3)": "range(1)", "AutoModelForMaskedLM": "AutoModelForCausalLM"}


@pytest.fixture
def blocks(causal_world):
    """The page's Python, about the cache of the tests."""
    text = PAGE.read_text(encoding="utf-8")
    lm = causal_world.open().teacher("lm").info.model
    for name, ours in NAMES.items():
        assert name in text
        text = text.replace(name, ours.format(cache=causal_world.path, lm=lm))
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


class Module(torch.nn.Module):
    """What the page's class is given of LightningModule."""

    def log(self, name, value):
        self.logged = {name: float(value)}


def test_the_plain_loop_and_the_lightning_module(blocks, causal_world, monkeypatch, capsys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(causal_world.student)).eval()
    here = {"model": model, "rank": 0, "world_size": 1, "device": "cpu"}
    here |= {"tokenizer": causal_world.open().corpus.tokenizer.hf}
    here |= {"optimizer": torch.optim.AdamW(model.parameters(), lr=2e-3)}
    aligned, taught, _, loop, module = blocks
    exec(aligned, here)
    assert 0 <= float(re.search(r"\d[\d.e-]*", capsys.readouterr().out)[0]) < 1e-3
    exec(taught, here)
    teaching, lightning = here["teaching"], SimpleNamespace(LightningModule=Module)
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    exec(module, here)
    student = here["Student"](model, teaching)

    def step():
        from rekindle.train.hf.dataset import CacheDataset

        data = CacheDataset(here["cache"], seed=0)
        batch = teaching.collator()([data[i] for i in range(16)])
        with torch.no_grad():
            moved = student.transfer_batch_to_device(batch, torch.device("cpu"), 0)
            loss = student.training_step(moved, 0)
            shown = {n: v for n, v in batch.items() if n not in ("distillation", "labels")}
            expected = teaching.loss(model(**shown).logits, batch["distillation"])
        assert float(loss) == float(expected.loss)
        assert student.logged == {"ce": float(expected.ce)}
        return float(loss)

    before = step()
    exec(loop, here)
    assert step() < before - 0.1
    assert isinstance(student.configure_optimizers(), torch.optim.AdamW)
    student.trainer = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=here["data"]))
    student.current_epoch = 5
    student.on_train_epoch_start()
    assert here["data"].epoch == 5
