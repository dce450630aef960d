"""What a model sees is found by trying: its name and its configuration may say otherwise."""

import copy

import pytest
import torch
import transformers

from rekindle.data.errors import InputError
from rekindle.train.device_batch import model_inputs
from rekindle.train.model.sight import (
    SightError,
    check_sight,
    find_form,
    padding_influence,
    sample_ids,
)
from rekindle.train.model.split_model import SplitLanguageModel
from rekindle.train.packed.forms import Form, as_read, possible_forms
from rekindle.train.student import Student
from testlib.families.rows import FAMILIES
from testlib.host.reads import Reads, counting_copies
from testlib.run_alone import CLASSIFIER

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 90,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHER = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
GEMMA = {"num_key_value_heads": 1, "head_dim": 8}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2}


def made(family: str, head: str, **values: object) -> transformers.PreTrainedModel:
    sizes = SIZES | values
    if family == "XLNet":  # no setting: it takes any length
        del sizes["max_position_embeddings"]
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, family + head)(config).eval()


TWO_SIDED = {
    "a llama that says so": ("Llama", "ForCausalLM", {"is_causal": False}),
    "gemma's embedders": ("Gemma3Text", "ForCausalLM", {}),
    "bert": ("Bert", "LMHeadModel", {}),
    "xlnet": ("XLNet", "LMHeadModel", XLNET),
    "xlm": ("XLM", "WithLMHeadModel", XLM),
}


def model_of(case: dict, name: str) -> transformers.PreTrainedModel:
    family, head, values = case[name]
    if family == "Gemma3Text":
        config = transformers.Gemma3TextConfig(**SIZES | GEMMA)
        config.use_bidirectional_attention = True
        torch.manual_seed(0)
        return transformers.Gemma3ForCausalLM(config).eval()
    return made(family, head, **values)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_no_causal_lm_may_see_what_it_predicts(name):
    model = model_of(TWO_SIDED, name)
    told = "Say `task: masked_lm`" if name in ("bert", "xlm") else "embedders are not language"
    for build in (
        lambda: SplitLanguageModel(model, causal=True),
        lambda: Student(model, "causal_lm"),
    ):
        with pytest.raises(InputError, match=f"(?s)is not a causal LM: .*last token.*{told}"):
            build()


@pytest.mark.parametrize(
    ("family", "values"), [("GPT2", OTHER), ("Llama", {}), ("Mamba", {}), ("XLM", {"causal": True})]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_lm_sees_no_later_token(family, values, dtype):
    head = {"GPT2": "LMHeadModel", "XLM": "WithLMHeadModel"}.get(family, "ForCausalLM")
    check_sight(made(family, head, **(XLM if family == "XLM" else {}) | values).to(dtype), True)


@pytest.mark.parametrize("leak", [0.0, 1e-2])
def test_a_deep_model_may_round_more_than_a_shallow_one(leak):
    """As SmolLM2 does: a row's first logits depend on where it stands in a product."""
    model = made("Llama", "ForCausalLM")

    def rough(module, args, kwargs, output):
        logits = output.logits
        spread = logits.std()
        logits[-1] += 4e-5 * spread  # the last row, also of one
        logits[:, 0] += leak * spread * (kwargs["input_ids"][:, -1:] % 2 * 2 - 1)

    model.register_forward_hook(rough, with_kwargs=True)
    if leak:
        with pytest.raises(SightError, match="last token"):
            check_sight(model, causal=True)
    else:
        check_sight(model, causal=True)


@pytest.mark.parametrize("blind", ["later", "earlier", None])
def test_a_masked_lm_sees_both_sides(blind):
    model = made("Bert", "ForMaskedLM", is_decoder=blind is not None)
    if blind == "earlier":  # the mirror image of a decoder
        run = model.forward

        def mirrored(input_ids, **rest):
            out = copy.copy(run(input_ids.flip(1), **rest))
            out.logits = out.logits.flip(1)
            return out

        model.forward = mirrored
    if blind is None:
        check_sight(model, causal=False)
        return
    with pytest.raises(SightError, match=f"not a masked LM: when a {blind} token is changed"):
        check_sight(model, causal=False)


def test_the_model_is_left_as_it_was():
    model = made("Bert", "ForMaskedLM").train()
    before = torch.get_rng_state()
    check_sight(model, causal=False)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


FUNNEL = {
    "vocab_size": 90,
    "d_model": 16,
    "n_head": 2,
    "d_head": 8,
    "d_inner": 24,
    "block_sizes": [1, 1],
}
CONV = {"embedding_size": 16, "conv_kernel_size": 3}
PADDED = {
    "FNet": ("FNet", {}),
    "ConvBert": ("ConvBert", CONV),
}


@pytest.mark.parametrize("family", PADDED)
def test_padding_that_moves_the_tokens_themselves_is_found(family):
    model = made(family, "ForMaskedLM", **PADDED[family][1])
    assert padding_influence(model) > 1e-4


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Llama", "Mamba"])
def test_padding_moves_nothing_elsewhere(family):
    head = "ForCausalLM" if family in ("Llama", "Mamba") else "ForMaskedLM"
    for dtype in (torch.float32, torch.bfloat16):
        assert padding_influence(made(family, head).to(dtype)) == 0.0


@pytest.mark.parametrize(
    ("name", "moved"), [("XLNet", True), ("GPT-2", False), ("Qwen2", False), ("RoBERTa", False)]
)
def test_a_classifier_may_read_padding_in_the_place_of_the_text(name, moved):
    """XLNet's reads the last state, whatever the mask says; others find the last token, also those
    without a padding token.
    """
    (family,) = (family for family in FAMILIES if family.title == name)
    model = family.build(CLASSIFIER, num_labels=3)
    padding = model.config.pad_token_id
    assert (padding_influence(model) > 0.1) == moved
    assert model.config.pad_token_id == padding


def test_states_of_another_number_are_moved():
    """Funnel's classifiers read states of several tokens each: padding makes them more."""
    model = transformers.FunnelForSequenceClassification(transformers.FunnelConfig(**FUNNEL))
    assert padding_influence(model) > 1


# --- rows of several documents --------------------------------------------------------------------

WINDOWS = {"local_attention": 8, "global_attn_every_n_layers": 2}
SLIDING = {"sliding_window": 4, "num_key_value_heads": 1}
PACKED = {
    "bert": ("Bert", "ForMaskedLM", {}, Form("mask", 0)),
    "roberta": ("Roberta", "ForMaskedLM", {}, Form("mask", 1)),  # it counts past its padding id
    "modernbert": ("ModernBert", "ForMaskedLM", WINDOWS, Form("windows", 0)),
    "llama": ("Llama", "ForCausalLM", {}, Form("mask", 0)),
    "mistral": ("Mistral", "ForCausalLM", SLIDING, Form("positions", 0)),
}
DOCUMENTS_IN_ROWS = [(3, 9, 4), (11, 2), (13,)]  # tokens of each; the widest row has 16


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_documents_of_a_row_are_read_as_if_each_were_alone(name, attention):
    family, head, values, form = PACKED[name]
    model = made(family, head, **values)
    model.set_attn_implementation(attention)
    causal = head == "ForCausalLM"
    assert find_form(model, causal, 16) == form
    assert_read_alone(SplitLanguageModel(model, causal))


def test_rows_may_be_read_one_after_another():
    """As for flash attention, which is told where documents begin; here by their positions."""
    split = SplitLanguageModel(made("Llama", "ForCausalLM"), causal=True)
    split._form = Form("flat", 0)
    assert_read_alone(split)


def test_flash_attention_is_told_where_documents_begin():
    model = made("Bert", "ForMaskedLM")
    model.config._attn_implementation = "flash_attention_2"
    (forms,) = possible_forms(model, causal=False)
    numbers = torch.tensor([[0, 0, 1, -1], [0, 0, 0, 1]])
    inputs = {"input_ids": torch.arange(8).view(2, 4), "document_numbers": numbers}
    told = as_read(model, inputs, forms[0], causal=False)
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 2, 3, 4, 7, 8]
    assert (told["max_length_q"], told["max_length_k"], told["attention_mask"]) == (3, 3, None)
    assert told["position_ids"].tolist() == [[0, 1, 0, 0, 0, 1, 2, 0]]
    assert told["input_ids"].tolist() == [[*range(8)]]


def assert_read_alone(split):
    ids = sample_ids(split.model.config, 42)
    rows, numbers = torch.zeros(3, 16, dtype=torch.int64), torch.full((3, 16), -1)
    alone, at = [], 0
    for row, lengths in enumerate(DOCUMENTS_IN_ROWS):
        place = 0
        for number, length in enumerate(lengths):
            one = ids[at : at + length][None]
            rows[row, place : place + length], numbers[row, place : place + length] = one[0], number
            alone.append(
                split.states({"input_ids": one, "attention_mask": torch.ones_like(one)})[0]
            )
            at, place = at + length, place + length
    lengths = (numbers >= 0).sum(dim=1).numpy()
    inputs = model_inputs(rows.numpy(), lengths, CPU, None, numbers.numpy())
    select = (numbers.flatten() >= 0).nonzero()[:, 0]
    split.hidden(inputs, select[:1])  # what is found by trying is found now
    with Reads() as reads, pytest.MonkeyPatch.context() as patch:
        copied = counting_copies(patch)
        _, states = split.hidden(inputs, select)
    assert not reads.found + copied
    assert torch.allclose(states[numbers >= 0], torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "head", "values"),
    [
        ("Mamba", "ForCausalLM", {}),
        ("Bloom", "ForCausalLM", {"n_head": 2}),
        ("FNet", "ForMaskedLM", {}),
    ],
)
def test_a_model_that_cannot_be_told_of_documents_is_refused(family, head, values):
    model = made(family, head, **values)
    with pytest.raises(SightError, match=r"cannot read rows of several documents.*packing: doc"):
        find_form(model, head == "ForCausalLM", 16)
