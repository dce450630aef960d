"""Which head a folder's weights are of, and what is said of those that nobody takes."""

import json
import logging

import pytest
import torch
import transformers

from rekindle.train.config import StudentConfig
from rekindle.train.model.files import load_language_model
from rekindle.train.model.split_model import SplitLanguageModel
from rekindle.train.student import build_student

SIZES = {
    "vocab_size": 90,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
IDS = torch.arange(5, 17)[None]


@pytest.mark.parametrize("family", ["Deberta", "DebertaV2"])
def test_debertas_own_head_is_the_one_that_is_used(tmp_path, family, caplog):
    """As its authors' files are: weights of ``lm_predictions``, and no word of it in the config."""
    config = getattr(transformers, f"{family}Config")(**SIZES, legacy=False)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    torch.nn.init.normal_(model.lm_predictions.lm_head.bias)
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "legacy"})
    )
    with caplog.at_level(logging.INFO, logger="rekindle"):
        student = build_student(StudentConfig(model=str(tmp_path / "m")), {}, 90, 0).eval()
    assert "fresh LM head" not in caplog.text
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        expected = model(**inputs).logits[0]
        assert torch.allclose(student.model(**inputs).logits[0], expected, atol=1e-6)
        hidden = student(inputs, select=torch.tensor([2, 7])).hidden
        found = student.output_head.logits(hidden)
    assert torch.allclose(found, expected[[2, 7]], atol=1e-4)
    student.save_pretrained(tmp_path / "s")
    plain = getattr(transformers, f"{family}ForMaskedLM").from_pretrained(tmp_path / "s").eval()
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits[0], expected, atol=1e-6)


def test_a_head_of_another_kind_is_named_when_it_is_left_out(tmp_path, caplog):
    config = transformers.ElectraConfig(**SIZES, embedding_size=16)
    transformers.ElectraForPreTraining(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="rekindle"):
        SplitLanguageModel(load_language_model(tmp_path, "masked_lm"), causal=False)
    assert "ElectraForMaskedLM does not have are not used: discriminator_predictions" in caplog.text
    assert "fresh LM head" in caplog.text
