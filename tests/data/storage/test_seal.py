"""What a cache says about itself: every changed byte of it is found, and its version is known."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.errors import CacheFormatError
from rekindle.data.storage.seal import (
    FORMAT_VERSION,
    SEAL,
    VERSION,
    checksum,
    read_sealed,
    seal,
    unseal,
)
from rekindle.data.storage.store import LocalStore

BODY = {
    "config": {"source": ["a.jsonl", "b/é.txt"], "limit_sequences": None, "packing": "document"},
    "sources": {"a.jsonl": [1234, "00ff"], "b/é.txt": [0, ""]},
    "temperatures": [1.0, 0.5, 1e-05],
    "after": {"shards": 3, "sequences": 12},
    "flag": True,
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
KEYS = st.text(max_size=6).filter(lambda key: key not in (SEAL, VERSION))


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


@given(st.dictionaries(KEYS, JSON, max_size=5))
def test_what_is_sealed_is_read(body):
    found = unseal(json.loads(seal(body)), "x")
    assert found.pop(VERSION) == FORMAT_VERSION
    assert found == body


@given(st.dictionaries(KEYS, JSON, max_size=5), st.randoms())
def test_the_bytes_do_not_depend_on_the_order_of_the_keys(body, random):
    keys = list(body)
    random.shuffle(keys)
    assert seal({key: body[key] for key in keys}) == seal(body)


@given(st.dictionaries(KEYS, JSON, max_size=4), st.dictionaries(KEYS, JSON, max_size=4))
def test_bodies_that_differ_have_other_checksums(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (checksum(one) == checksum(other)) == same


def test_tuples_and_lists_are_the_same_to_a_seal():
    """Readers get JSON back: what was a tuple must not be damage."""
    assert seal({"a": (1, 2)}) == seal({"a": [1, 2]})
    assert unseal(json.loads(seal({"a": (1, 2)})), "x")["a"] == [1, 2]


def test_reading_leaves_seal_and_version_out(store):
    store.create("x.json", seal(BODY))
    assert read_sealed(store, "x.json") == BODY
    with pytest.raises(FileNotFoundError):
        read_sealed(store, "y.json")


def test_every_flipped_bit_is_found(store):
    """In the body, in the seal, in the version, in between. Where JSON has two spellings of one
    content (é in an escape, the exponent of a number), the content is what it was.
    """
    content = seal(BODY)
    spellings = named = 0
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            store.replace("x.json", bytes(damaged))
            try:
                found = read_sealed(store, "x.json")
            except CacheFormatError as error:
                named += "x.json" in str(error)
                continue
            assert found == BODY
            spellings += 1
    assert spellings <= 8
    assert named == 8 * len(content) - spellings


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_replaced_byte_is_found(data):
    content = seal(BODY)
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[place] = data.draw(st.integers(0, 255))
    try:
        values = json.loads(bytes(damaged))
    except ValueError:
        return
    try:
        found = unseal(values, "x")
    except CacheFormatError:
        return
    assert found == BODY | {VERSION: FORMAT_VERSION}


def test_every_truncation_is_found(store):
    content = seal(BODY)
    for length in range(len(content) - 1):  # the last byte is a line break
        store.replace("x.json", content[:length])
        with pytest.raises(CacheFormatError, match=r"x\.json"):
            read_sealed(store, "x.json")


def test_what_is_put_behind_is_found(store):
    store.replace("x.json", seal(BODY) + seal(BODY))
    with pytest.raises(CacheFormatError):
        read_sealed(store, "x.json")


@pytest.mark.parametrize("key", [*BODY, VERSION])
def test_a_key_that_was_taken_out_is_found(key):
    values = json.loads(seal(BODY))
    del values[key]
    with pytest.raises(CacheFormatError, match=r"where is damaged.*checksum does not match"):
        unseal(values, "where")


def test_a_key_that_was_put_in_is_found():
    with pytest.raises(CacheFormatError, match="checksum"):
        unseal(json.loads(seal(BODY)) | {"more": None}, "x")


def test_a_seal_cannot_be_left_out():
    values = json.loads(seal(BODY))
    del values[SEAL]
    with pytest.raises(CacheFormatError, match="checksum"):
        unseal(values, "x")
    with pytest.raises(CacheFormatError, match="checksum"):
        unseal(values | {SEAL: None}, "x")


def test_files_of_format_1_have_neither_seal_nor_version():
    assert unseal({"k": 4}, "x") == {"k": 4}
    assert unseal({"k": 4, VERSION: 1}, "x") == {"k": 4, VERSION: 1}
    for version in (2, 3, "1", None):
        with pytest.raises(CacheFormatError):
            unseal({"k": 4, VERSION: version}, "x")


@pytest.mark.parametrize("values", [None, [], [{}], "text", 3, True])
def test_what_is_no_object(values):
    with pytest.raises(CacheFormatError, match="where is damaged: it is not a JSON object"):
        unseal(values, "where")


def test_unsealing_leaves_what_it_was_given_as_it_was():
    values = json.loads(seal(BODY))
    before = json.loads(seal(BODY))
    unseal(values, "x")
    assert values == before
