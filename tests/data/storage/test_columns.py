"""Between NumPy and Arrow: round trips, the 32-bit limit, and lists that lie."""

import io
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.columns import list_array, list_type, list_views, offsets_of, plain_array

DTYPES = [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.float32, np.bool_]

lengths_lists = st.lists(st.integers(0, 6), max_size=12)


def through_a_file(array):
    """The array as a reader of an Arrow file gets it."""
    batch = pa.record_batch([array], names=["x"])
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_file(pa.py_buffer(sink.getvalue())).get_batch(0)["x"]


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_lists, dtype=st.sampled_from(DTYPES))
def test_lists_of_scalars_come_back(lengths, dtype):
    flat = np.arange(sum(lengths)).astype(dtype)
    array = through_a_file(list_array(offsets_of(lengths), flat))
    assert array.type == list_type(pa.from_numpy_dtype(dtype))
    offsets, values = list_views(array, "x")
    assert values.dtype == dtype
    assert np.diff(offsets).tolist() == lengths
    assert np.array_equal(values, flat)
    assert array.to_pylist() == [flat[a:b].tolist() for a, b in pairwise(offsets)]


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_lists, width=st.integers(1, 5), dtype=st.sampled_from(DTYPES[:-1]))
def test_lists_of_fixed_size_lists_come_back(lengths, width, dtype):
    flat = np.arange(sum(lengths) * width).astype(dtype).reshape(-1, width)
    array = through_a_file(list_array(offsets_of(lengths), flat))
    assert array.type == list_type(pa.from_numpy_dtype(dtype), width)
    offsets, values = list_views(array, "x")
    assert values.shape == (sum(lengths), width)
    assert np.diff(offsets).tolist() == lengths
    assert np.array_equal(values, flat)


def test_views_are_of_the_file_s_own_memory():
    array = through_a_file(list_array(offsets_of([2, 1]), np.arange(6, dtype=np.uint16)[:3]))
    _, values = list_views(array, "x")
    assert values.__array_interface__["data"][0] == array.values.buffers()[1].address


def test_a_column_that_is_not_contiguous_is_written_as_it_looks():
    wide = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert plain_array(wide[:, ::2]).to_pylist() == wide[:, ::2].tolist()
    assert plain_array(wide[::2, 1]).to_pylist() == wide[::2, 1].tolist()


def test_a_slice_of_a_list_column_reads_its_own_rows():
    array = list_array(offsets_of([1, 2, 3]), np.arange(6, dtype=np.int32)).slice(1, 2)
    offsets, values = list_views(array, "x")
    assert [values[a:b].tolist() for a, b in pairwise(offsets)] == [
        [1, 2],
        [3, 4, 5],
    ]


def test_offsets_up_to_the_last_32_bit_number():
    assert offsets_of([]).tolist() == [0]
    assert offsets_of([2**30, 2**30 - 1]).tolist() == [0, 2**30, 2**31 - 1]
    assert offsets_of(np.array([3, 0, 1])).dtype == np.int32


@pytest.mark.parametrize("lengths", [[2**31], [2**30, 2**30], [2**31 - 1, 0, 1]])
def test_offsets_past_32_bits_are_refused(lengths):
    with pytest.raises(ValueError, match="2\\^31"):
        offsets_of(lengths)


@pytest.mark.parametrize("offsets", [[0, 2, 1], [0, 1, 4], [-1, 0, 3], [1, 0, 3]])
def test_offsets_that_leave_the_values_are_refused(offsets):
    values = pa.array([1, 2, 3], pa.int32())
    memory = np.array([0, 1, 2], np.int32)
    buffers = [None, pa.py_buffer(memory)]
    lying = pa.ListArray.from_buffers(list_type(pa.int32()), 2, buffers, children=[values])
    memory[:] = offsets  # Arrow itself refuses to make such an array
    with pytest.raises(CacheFormatError, match="'x' has list offsets outside"):
        list_views(lying, "x")


NULLS = [
    pa.array([[1], None], pa.list_(pa.int32())),
    pa.array([[1, None]], pa.list_(pa.int32())),
    pa.array([[[1, 2], None]], pa.list_(pa.list_(pa.int32(), 2))),
    pa.array([[[1, None]]], pa.list_(pa.list_(pa.int32(), 2))),
]


@pytest.mark.parametrize("array", NULLS)
def test_nulls_are_refused_not_read_as_numbers(array):
    with pytest.raises(CacheFormatError, match="nulls"):
        list_views(array, "x")
