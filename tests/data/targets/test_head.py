"""An output matrix in the cache: stored once and whole, the states beside it to half a step."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.seal import seal
from rekindle.data.storage.store import LocalStore
from rekindle.data.targets.head import (
    StoredHead,
    decode_hidden,
    encode_hidden,
    read_head,
    write_head,
)

FOLDER = "targets/lm"


def head_of(seed=0, size=50, width=8, bias=True, **more):
    draw = np.random.default_rng(seed)
    return StoredHead(
        draw.normal(size=(size, width)).astype(np.float32),
        draw.normal(size=size).astype(np.float32) if bias else None,
        **more,
    )


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def files(store):
    names = [f"{FOLDER}/head.safetensors", f"{FOLDER}/head.json"]
    return {name: store.read_bytes(name) for name in names}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("more", [{}, {"scale": 0.125}, {"softcap": 30.0, "scale": 2.0}])
def test_what_is_written_is_read(store, bias, more):
    head = head_of(bias=bias, **more)
    write_head(store, FOLDER, head)
    found = read_head(store, FOLDER)
    assert np.array_equal(found.weight, head.weight)
    assert found.weight.dtype == np.float32
    assert (found.bias is None) == (not bias)
    if bias:
        assert np.array_equal(found.bias, head.bias)
    assert (found.scale, found.softcap) == (head.scale, head.softcap)


def test_a_matrix_that_is_no_contiguous_array(store):
    head = StoredHead(np.asfortranarray(head_of().weight), head_of().bias[::-1])
    write_head(store, FOLDER, head)
    assert np.array_equal(read_head(store, FOLDER).weight, head.weight)
    assert np.array_equal(read_head(store, FOLDER).bias, head.bias)


def test_the_same_matrix_again_changes_nothing(store):
    write_head(store, FOLDER, head_of())
    before = files(store)
    write_head(store, FOLDER, head_of())
    assert files(store) == before


@pytest.mark.parametrize(
    "other",
    [
        head_of(seed=1),
        head_of(bias=False),
        head_of(size=49),
        head_of(scale=0.5),
        head_of(softcap=30.0),
    ],
    ids=["weights", "bias", "size", "scale", "softcap"],
)
def test_another_matrix_is_refused_and_the_first_stays(store, other):
    """States of the other model would be multiplied with a matrix that is not theirs."""
    write_head(store, FOLDER, head_of())
    before = files(store)
    with pytest.raises(CacheFormatError):
        write_head(store, FOLDER, other)
    assert files(store) == before


@pytest.mark.parametrize("lost", ["head.safetensors", "head.json"])
def test_one_of_two_files_is_not_enough(store, lost):
    write_head(store, FOLDER, head_of())
    store.discard(f"{FOLDER}/{lost}")
    with pytest.raises(CacheFormatError, match=r"head\.safetensors is missing .*cache-teachers"):
        read_head(store, FOLDER)
    write_head(store, FOLDER, head_of())  # what a killed process did not come to
    assert np.array_equal(read_head(store, FOLDER).weight, head_of().weight)


def test_no_matrix(store):
    with pytest.raises(CacheFormatError, match=r"targets/lm/head\.safetensors is missing"):
        read_head(store, FOLDER)


def test_every_flipped_byte_is_found(store):
    write_head(store, FOLDER, head_of(size=6, width=3))
    for name, content in files(store).items():
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            store.replace(name, bytes(damaged))
            with pytest.raises(CacheFormatError):
                read_head(store, FOLDER)
        store.replace(name, content)
        assert read_head(store, FOLDER).weight.shape == (6, 3)


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_holds_no_matrix(store, content):
    import hashlib

    sha256 = hashlib.sha256(content).hexdigest()
    store.create(f"{FOLDER}/head.safetensors", content)
    store.create(f"{FOLDER}/head.json", seal({"sha256": sha256, "scale": 1.0, "softcap": None}))
    with pytest.raises(CacheFormatError, match="is no output matrix"):
        read_head(store, FOLDER)


def test_a_record_without_what_is_needed(store):
    write_head(store, FOLDER, head_of())
    about = json.loads(store.read_bytes(f"{FOLDER}/head.json"))
    for key in ("sha256", "scale", "softcap"):
        values = {
            k: v for k, v in about.items() if k in ("sha256", "scale", "softcap") and k != key
        }
        store.replace(f"{FOLDER}/head.json", seal(values))
        with pytest.raises(CacheFormatError):
            read_head(store, FOLDER)


# --- distributions --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_probs_are_those_of_float64(bias, scale, softcap):
    head = head_of(bias=bias, scale=scale, softcap=softcap)
    hidden = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32) * 3
    before = hidden.copy()
    found = head.log_probs(hidden)
    logits = hidden.astype(np.float64) @ head.weight.astype(np.float64).T
    logits = scale * (logits + (head.bias.astype(np.float64) if bias else 0))
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    expected = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    assert found.dtype == np.float32
    assert found.shape == (20, 50)
    assert np.abs(found - expected).max() < 1e-4
    assert np.array_equal(hidden, before)


def test_log_probs_of_no_states():
    assert head_of().log_probs(np.zeros((0, 8), np.float32)).shape == (0, 50)


def test_log_probs_of_very_large_states_are_finite():
    found = head_of().log_probs(np.full((2, 8), 1e6, np.float32))
    assert np.isfinite(found.max())
    assert np.exp(found.astype(np.float64)).sum(axis=1) == pytest.approx(1)


# --- states ---------------------------------------------------------------------------------------

STATES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 5), st.integers(1, 7)),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


@settings(max_examples=200)
@given(STATES)
@example(np.array([[1.444713e-37, -1.444713e-37]], np.float32))
def test_states_are_kept_to_half_a_step(hidden):
    stored, scale = encode_hidden(hidden)
    assert (stored.dtype, scale.dtype) == (np.int16, np.float32)
    assert (stored.shape, scale.shape) == (hidden.shape, (len(hidden),))
    found = decode_hidden(stored, scale)
    assert found.dtype == np.float32
    largest = np.abs(hidden).max(axis=1, initial=0).astype(np.float64)
    error = np.abs(found.astype(np.float64) - hidden)
    # Half a step, and what float32 rounds when the step is formed and multiplied with.
    assert (error <= (largest / 65_534 * 1.001 + largest * 2e-7 + 1e-37)[:, None]).all()


def test_a_rows_largest_state_is_kept_best():
    hidden = np.array([[3.0, -7.0, 0.0], [0.001, 0.0005, -0.001]], np.float32)
    stored, scale = encode_hidden(hidden)
    assert stored[0].tolist()[1:] == [-32767, 0]
    assert np.abs(stored[1]).max() == 32767
    found = decode_hidden(stored, scale)
    assert found[0, 1] == pytest.approx(-7.0, rel=1e-6)
    assert found[0, 2] == 0.0


def test_rows_do_not_move_one_another():
    hidden = np.random.default_rng(0).normal(size=(30, 9)).astype(np.float32)
    hidden[::3] *= 1000
    together = encode_hidden(hidden)
    for row in range(30):
        alone = encode_hidden(hidden[row : row + 1])
        assert np.array_equal(alone[0][0], together[0][row])
        assert alone[1][0] == together[1][row]


def test_a_row_of_zeros():
    stored, scale = encode_hidden(np.zeros((2, 4), np.float32))
    assert not stored.any()
    assert np.array_equal(decode_hidden(stored, scale), np.zeros((2, 4), np.float32))
