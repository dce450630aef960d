"""What the host knows of a tensor is what the device would say, or is not said."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, masking_utils
from transformers.modeling_flash_attention_utils import _get_unpad_data

from rekindle.train.distributed import compile_blocks
from rekindle.train.host.known import Known, are_equal, note, plain, values_of
from rekindle.train.model.passes import with_known_padding
from testlib.host.reads import Reads

WIDTH = 6
LENGTHS = st.lists(st.integers(1, WIDTH), min_size=1, max_size=3)


def mask_of(lengths, kind=torch.bool):
    """A mask, and the same known."""
    values = np.arange(WIDTH) < np.array(lengths)[:, None]
    mask = torch.from_numpy(values).to(kind)
    return mask, Known.of(mask.clone(), values)


def hides_nothing_to_sdpa(mask, size, offset):
    return bool(masking_utils._ignore_causal_mask_sdpa(mask, size, mask.shape[1], offset, 0))


# What transformers asks of a mask; a tensor is what it goes on with.
QUESTIONS = {
    "causal": lambda mask: hides_nothing_to_sdpa(mask, WIDTH, 0),
    "causal, the first tokens": lambda mask: hides_nothing_to_sdpa(mask, 3, 0),
    "causal, one token": lambda mask: hides_nothing_to_sdpa(mask, 1, 5),
    "bidirectional": lambda mask: bool(masking_utils._ignore_bidirectional_mask_sdpa(mask, WIDTH)),
    "flash": lambda mask: masking_utils.flash_attention_mask(1, WIDTH, WIDTH, attention_mask=mask),
    "flash, fewer": lambda mask: masking_utils.flash_attention_mask(1, 4, 4, attention_mask=mask),
    "flash, unpadded": _get_unpad_data,
    "recurrent": lambda mask: masking_utils.create_recurrent_attention_mask(
        None, mask[..., None].float(), mask, None
    ),
    "with a prompt": lambda mask: bool(torch.cat([mask[:, :1], mask], dim=1).all()),
    "one of them": lambda mask: int(mask[-1].sum()),
    "longest": lambda mask: mask.sum(dim=1).max().item(),
}


def same(found, expected):
    if isinstance(expected, tuple):
        return all(map(same, found, expected))
    if isinstance(expected, torch.Tensor):
        return torch.equal(plain(found), expected) and found.dtype == expected.dtype
    return found == expected and type(found) is type(expected)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
@pytest.mark.parametrize("question", QUESTIONS)
@given(lengths=LENGTHS)
def test_what_transformers_asks_of_a_mask_is_known(question, kind, lengths):
    mask, known = mask_of(lengths, kind)
    ask = QUESTIONS[question]
    expected = ask(mask)
    with Reads() as reads:
        found = ask(known)
    assert same(found, expected)
    assert not reads.found


@given(lengths=LENGTHS)
def test_what_transformers_asks_of_positions_is_known(lengths):
    """Whether any row has several documents: those that begin at each of ``lengths``."""
    rows = np.stack([np.arange(WIDTH) % length for length in lengths])
    positions = torch.from_numpy(rows)
    expected = masking_utils.find_packed_sequence_indices(positions)
    with Reads() as reads:
        found = masking_utils.find_packed_sequence_indices(Known.of(positions, rows))
    assert same(found, expected)
    assert not reads.found


OTHERS = {
    "a float": lambda mask: mask.to(torch.float32).sum(),
    "an unknown tensor": lambda mask: (mask == torch.ones_like(plain(mask))).all(),
    "chosen columns": lambda mask: mask[:, [0, 5]].all(),
    "an unknown argument": lambda mask: mask.sum(dim=1, keepdim=True).max(),
    "another shape": lambda mask: mask.sum(1, True).max(),
    "an unknown function": lambda mask: mask.roll(1, 1)[0, 0],
    "two results": lambda mask: mask.max(dim=1).values.all(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_understood_is_asked_of_the_device(name):
    mask, known = mask_of([2, 6])
    found = OTHERS[name](known)
    assert type(found) is torch.Tensor
    assert torch.equal(found, OTHERS[name](mask))


def write_in_place(mask):
    mask.logical_and_(torch.zeros(WIDTH, dtype=torch.bool))


def write_an_item(mask):
    mask[0, 0] = False


def write_a_view(mask):
    mask.unsqueeze(1).zero_()


@pytest.mark.parametrize("write", [write_in_place, write_an_item, write_a_view])
def test_what_is_written_is_known_no_more(write):
    _, known = mask_of([6, 6])
    noted = note(torch.ones(2, WIDTH, dtype=torch.bool), np.ones((2, WIDTH), bool))
    part = known[:, :1]
    assert known.all()
    write(known)
    write(noted)
    assert not known.all()
    assert not part.all()
    assert values_of(noted) is None


def write_as_output(mask):
    torch.logical_not(mask, out=mask)


@pytest.mark.parametrize("write", [write_in_place, write_an_item, write_as_output])
def test_nor_where_pytorch_does_not_count_what_is_written(write):
    with torch.inference_mode():
        _, known = mask_of([6, 6])
        assert known.all()
        write(known)
        assert not known.all()


def test_equal_tensors_are_told_apart_on_the_host():
    values = np.array([3, 1, 2])
    one, same_values, other = (
        note(torch.from_numpy(v), v) for v in (values, values.copy(), values[::-1].copy())
    )
    with Reads() as reads:
        assert are_equal(one, same_values)
        assert not are_equal(one, other)
    assert not reads.found
    unknown = torch.tensor([3, 1, 2])
    assert are_equal(one, unknown)
    assert not are_equal(unknown, other)
    assert are_equal(unknown, unknown)


class Layer(torch.nn.Module):
    def forward(self, states, mask=None):
        return states * mask[..., None]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.model = self


def test_a_compiled_block_sees_plain_tensors(monkeypatch):
    """PyTorch compiles for no others; some families give their blocks the mask itself."""
    compile_by = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda one: compile_by(one, backend="aot_eager")
    )
    model, (mask, known) = Model(), mask_of([2, 6])
    states = torch.randn(2, WIDTH, 3)
    expected = [layer(states, mask=mask) for layer in model.layers]
    compile_blocks(model)
    for layer, each in zip(model.layers, expected, strict=True):
        assert torch.equal(layer(states, known), each)
        assert torch.equal(layer(states, mask=known), each)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_flex_attention_gets_a_plain_mask(attention):
    """It compiles the functions that read it, which PyTorch does for no class of tensors."""
    mask = note(torch.ones(2, WIDTH, dtype=torch.bool), np.ones((2, WIDTH), bool))
    config = BertConfig()
    config._attn_implementation = attention
    given = with_known_padding({"attention_mask": mask}, config)["attention_mask"]
    assert type(given) is (Known if attention == "sdpa" else torch.Tensor)
