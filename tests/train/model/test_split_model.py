"""The split into body and output matrix, held against the models' own logits and gradients."""

import pytest
import torch
import transformers
from torch import nn

from rekindle.data.errors import InputError
from rekindle.train.model import split_model
from rekindle.train.model.split_model import OutputHead, SplitLanguageModel
from rekindle.train.student import Student
from testlib.families.kinds import COMMON, ROWS
from testlib.families.language import CAUSAL, language_model

# Beside those that the grid of families tries quickly, as students (tests/pipeline/families): heads
# that are not tied or are, transform, or are followed by a cap, a factor or a divisor.
OTHERS = (
    *("BERT (untied head)", "ELECTRA (generator)", "DistilBERT", "DeBERTa (`legacy: false`)"),
    *("Llama", "Llama (tied head)", "Granite", "HyperCLOVA X", "Falcon-H1", "RecurrentGemma"),
    *("xLSTM", "Gemma 4"),  # whose cap stands in the configuration's text part alone
    "bert causal",  # a decoder may transform its states, too
)


def split_of(name: str, model: nn.Module) -> SplitLanguageModel:
    return SplitLanguageModel(model, causal=name in CAUSAL)


def padded_batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three sequences of different lengths, and every real position in a shuffled order."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, ROWS, (3, 11), generator=draw)
    mask = (torch.arange(11) < torch.tensor([11, 7, 2])[:, None]).long()
    ids = torch.where(mask == 1, ids, 1)
    real = mask.flatten().nonzero()[:, 0]
    return {"input_ids": ids, "attention_mask": mask}, real[torch.randperm(20, generator=draw)]


@pytest.mark.parametrize("name", OTHERS)
def test_the_split_gives_the_models_logits_and_gradients(name):
    model = language_model(name)
    split = split_of(name, model)
    inputs, select = padded_batch()
    draw = torch.Generator().manual_seed(2)
    upstream = torch.randn(len(select), ROWS, generator=draw)

    plain = model(**inputs).logits.flatten(0, 1)[select].float()
    (plain * upstream).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    hidden, states = split.hidden(inputs, select)
    logits = split.head.logits(hidden)
    (logits * upstream).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert hidden.shape == (20, split.head.weight.shape[1])
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states, split.states(inputs), rtol=1e-6, atol=1e-6)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-3
        torch.testing.assert_close(
            found[parameter], gradient, rtol=1e-4, atol=1e-4 * scale, msg=lambda m: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "gpt2"])
def test_half_precision_is_the_models_own(name):
    """Some keep their states in float32 then, and round them before the output matrix."""
    model = language_model(name).bfloat16()
    inputs, select = padded_batch()
    split = SplitLanguageModel(model, causal=True)
    with torch.no_grad():
        found = split.head.logits(split.hidden(inputs, select)[0])
        plain = model(**inputs).logits.flatten(0, 1)[select].float()
    assert float((found - plain).abs().mean()) < 2e-3


@pytest.mark.parametrize("name", ["bert", "electra", "distilbert", "modernbert", "llama"])
def test_the_split_leaves_the_model_as_it_was(name):
    model = language_model(name)
    inputs, select = padded_batch()
    before, weights = model(**inputs).logits, set(model.state_dict())
    model.train()
    split = split_of(name, model)
    assert model.training  # the check puts the mode back
    model.eval()
    split.hidden(inputs, select)
    assert torch.equal(model(**inputs).logits, before)
    assert set(model.state_dict()) == weights


def test_a_failed_pass_does_not_leave_the_selection_behind():
    model = language_model("bert")
    split = split_of("bert", model)
    inputs, select = padded_batch()
    before = model(**inputs).logits
    with pytest.raises(IndexError):
        split.hidden(inputs, torch.tensor([10_000]))
    assert torch.equal(model(**inputs).logits, before)
    assert split.hidden(inputs, select)[0].shape == (20, 16)


def test_a_selection_may_be_empty_or_repeat_rows():
    for name in ("bert", "gpt2"):
        split = split_of(name, language_model(name))
        inputs, _ = padded_batch()
        assert split.hidden(inputs, torch.zeros(0, dtype=torch.long))[0].shape == (0, 16)
        hidden, _ = split.hidden(inputs, torch.tensor([4, 1, 4]))
        assert torch.equal(hidden[0], hidden[2])


def test_the_softcap_bites():
    """The Gemma 2 case above would prove nothing if all logits were far below the cap."""
    model = language_model("gemma2")
    head = split_of("gemma2", model).head
    assert head.softcap == 1.0
    logits = model(**padded_batch()[0]).logits.detach()
    assert 0.8 < float(logits.abs().max()) <= 1.0
    assert split_of("cohere", language_model("cohere")).head.logit_scale == 0.3
    assert split_of("granite", language_model("granite")).head.logit_scale == pytest.approx(1 / 7)


def test_a_cap_that_is_not_known_is_no_split(monkeypatch):
    """Caps as they are in use leave small logits as they are: large states show them."""
    model = language_model("gemma2")
    model.config.final_logit_softcapping = 30.0
    SplitLanguageModel(model, causal=True)
    monkeypatch.setattr(split_model, "SOFTCAPS", ())
    with pytest.raises(NotImplementedError, match="its logits are not"):
        SplitLanguageModel(model, causal=True)


@pytest.mark.parametrize(("family", "name"), [("cohere", "MULTIPLIERS"), ("granite", "DIVISORS")])
def test_a_factor_that_is_not_known_is_one_of_the_states(monkeypatch, family, name):
    model = language_model(family)
    monkeypatch.setattr(split_model, name, ())
    split = SplitLanguageModel(model, causal=True)
    inputs, select = padded_batch()
    found = split.head.logits(split.hidden(inputs, select)[0])
    plain = model(**inputs).logits.flatten(0, 1)[select]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_the_head_is_shared_with_the_model_and_can_be_cut():
    model = language_model("bert")
    head = split_of("bert", model).head
    assert head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    cut = head.cut(50)
    hidden = torch.randn(4, 16)
    assert cut.weight.data_ptr() == head.weight.data_ptr()
    assert torch.allclose(cut.logits(hidden), head.logits(hidden)[:, :50])


def test_head_logits_are_the_stated_formula_in_float32():
    weight, bias = torch.randn(7, 3), torch.randn(7)
    hidden = torch.randn(5, 3)
    plain = hidden @ weight.T + bias
    for cap, scale in ((None, 1.0), (None, 0.25), (2.0, 1.0), (2.0, 4.0)):
        z = scale * plain
        z = z if cap is None else cap * torch.tanh(z / cap)
        assert torch.allclose(OutputHead(weight, bias, cap, scale).logits(hidden), z, atol=1e-5)
    half = OutputHead(weight.bfloat16(), None, None, 1.0).logits(hidden.bfloat16())
    assert half.dtype == torch.float32


class AddsAfterwards(nn.Module):
    """A BERT that does something to its logits which no output matrix tells of."""

    base_model_prefix = "bert"

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.bert, self.cls = inner, inner.bert, inner.cls
        self.config, self.base_model = inner.config, inner.bert
        self.get_output_embeddings = inner.get_output_embeddings

    def forward(self, **inputs):
        out = self.inner(**inputs)
        out.logits = out.logits + torch.linspace(-5, 5, out.logits.shape[-1])
        return out


def test_a_model_whose_logits_are_not_head_of_hidden_is_refused():
    with pytest.raises(NotImplementedError, match="AddsAfterwards cannot be split"):
        SplitLanguageModel(AddsAfterwards(language_model("bert")), causal=False)


def unsupported(name: str) -> nn.Module:
    if name == "encoder-decoder":
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
        config = transformers.BartConfig(
            **sizes, vocab_size=ROWS, decoder_ffn_dim=32, max_position_embeddings=64
        )
        return transformers.BartForConditionalGeneration(config)
    if name == "concatenated head":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "embedding_size": 16}
        config = transformers.MobileBertConfig(
            **sizes, vocab_size=ROWS, num_hidden_layers=1, num_attention_heads=2
        )
        return transformers.MobileBertForMaskedLM(config)
    return transformers.BertModel(transformers.BertConfig(**COMMON))  # a body without a head


@pytest.mark.parametrize("name", ["encoder-decoder", "concatenated head", "no head"])
def test_unsupported_models_are_refused_with_a_reason(name):
    model = unsupported(name)
    with pytest.raises(NotImplementedError, match="masked and causal LMs whose logits are one"):
        SplitLanguageModel(model, causal=False)
    with pytest.raises(InputError, match="cannot be split"):
        Student(model, "masked_lm")
